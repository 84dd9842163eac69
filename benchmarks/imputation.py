"""Genes hidden in the query: how well they are imputed, and whether what is said of their trust is true.

    python benchmarks/imputation.py pancreas --store pancreas.zarr --cache features
    python benchmarks/imputation.py known --store pancreas.zarr --cache features [--weights FILE]
    python benchmarks/imputation.py starmap
    python benchmarks/imputation.py others [--method SpaGE]     published methods on STARmap, where they are installed
    python benchmarks/imputation.py bulb
    python benchmarks/imputation.py memory

Five folds of the genes seen in > 2 % of the query's cells are hidden, one after the other; all else is made without them.
Pancreas: reference x < 16500 px, query x > 19500, cells with >= 15 counts, log1p of counts per 100 of the kept genes, as in
the reference figures. STARmap: each mouse by the other two. Olfactory bulb: each section by the other two. Penalties and
branches by left-out blocks of the reference, for baselines alike. ``known``: no reference, but models of the whole panel:
what ``tl.train_imputation`` keeps, and SPATIA's decoder from the embedding of what is left. Differences to the best baseline
by bootstrap over blocks of the query: 500 um, of the others a sixth of the longer side.
"""

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsRegressor

import peers
import results
import spatiaflow as sf
from flow_head import fit_head
from imputation_trust import DRAWS, conformal, differential, uncertainty
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import gene_pearson
from spatiaflow.models.slide import Slide
from spatiaflow.train.imputer import fit_imputer, held_out_blocks

N_FOLDS, DETECTED, SCORED = 5, 0.02, 3000
PENALTIES = np.geomspace(10, 1e5, 9)
OURS, CHECKED = "ours, branches by left-out blocks", "ours, checked in the query"
FLOW, TWIN = "flow matching head", "perceptron, deterministic twin"


class Task:
    """Reference and query as arrays; one slide (or part) an entry."""

    def __init__(self, reference: list[ad.AnnData], query: ad.AnnData, target_sum: float, block: float, image=None):
        self.genes, self.target_sum, self.image = list(query.var_names), target_sum, image
        self.reference, self.query = reference, query
        everything = np.arange(query.n_vars)
        self.blocks = held_out_blocks([self.cells(a, everything, everything, False) for a in reference])
        self.block = sf.metrics.spatial_blocks(query.obsm["spatial"], block)

    def folds(self, seed: int) -> list[np.ndarray]:
        seen = np.asarray((self.query.X > 0).mean(0)).ravel()
        return np.array_split(np.random.default_rng(seed).permutation(np.flatnonzero(seen > DETECTED)), N_FOLDS)

    def cells(self, one: ad.AnnData, shown: np.ndarray, hidden: np.ndarray, targets: bool) -> Slide:
        x = sparse.csr_matrix(one.X, dtype=np.float32)
        image = None if self.image is None else np.hstack([np.asarray(one.obsm[key]) for key in self.image])
        library = np.asarray(x[:, shown].sum(1), dtype=np.float64).ravel()
        columns = np.r_[shown, hidden] if targets else shown
        genes = [self.genes[i] for i in columns]
        return Slide("", one.obs_names, one.obsm["spatial"], x[:, columns], library, genes, features=image)


def ridge(x: list, y: list, groups: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Ridge on standardised columns, the penalty by left-out groups."""
    x, y = np.concatenate(x).astype(np.float32), np.concatenate(y).astype(np.float32)
    x, centre = np.hstack([x, np.ones((len(x), 1), np.float32)]), y.mean(0)
    names = np.unique(groups)
    sums = [(x[groups == g].T @ x[groups == g], x[groups == g].T @ (y[groups == g] - centre)) for g in names]
    total = [np.sum([s[k] for s in sums], 0, dtype=np.float64) for k in (0, 1)]
    free = np.append(np.ones(x.shape[1] - 1), 1e-9)  # the intercept is not penalised

    def solved(xx, xy, penalty):
        return np.linalg.solve(xx + penalty * np.diag(free), xy)

    scores = np.zeros(len(PENALTIES))
    for g, (xx, xy) in zip(names, sums):
        for i, penalty in enumerate(PENALTIES):
            prediction = x[groups == g] @ solved(total[0] - xx, total[1] - xy, penalty)
            scores[i] += np.nanmean(gene_pearson(y[groups == g], prediction))
    weights = solved(*total, PENALTIES[scores.argmax()])
    return np.maximum(np.hstack([query, np.ones((len(query), 1))]) @ weights + centre, 0)


def inputs(task: Task, train: list[Slide], query: Slide, seed: int) -> dict[str, list[np.ndarray]]:
    """What baselines read of every reference table and the query, standardised."""
    rng, own = np.random.default_rng(seed), {}
    everyone = [one.align(query.genes) for one in [*train, query]]
    log = [log_normalize(c.counts, c.library, task.target_sum).toarray() for c in everyone]
    pca = PCA(min(50, log[0].shape[1] - 1), random_state=seed).fit(np.concatenate(log[:-1]))
    near = [cKDTree(c.xy).query(c.xy, k=min(16, len(c)))[1][:, 1:] for c in everyone]
    own["pca"] = [pca.transform(v) for v in log]
    own["near"] = [v[n].mean(1) for v, n in zip(own["pca"], near)]
    own["permuted"] = [rng.permutation(v) for v in own["near"]]
    own["genes"] = log
    own["near genes"] = [np.stack([v[i].mean(0) for i in n]) for v, n in zip(log, near)]
    own["depth"] = [np.log(np.maximum(c.library, 1))[:, None] for c in everyone]
    if task.image:
        own["image"] = [c.features for c in everyone]
    for name, parts in own.items():
        joint = np.concatenate(parts[:-1])
        mean, std = joint.mean(0), np.maximum(joint.std(0), 1e-3)
        std = std if name not in ("pca", "near", "permuted") else np.full_like(std, joint.std())
        own[name] = [((part - mean) / std).astype(np.float32) for part in parts]
    return own


def joined(own: dict[str, list[np.ndarray]], **weights: float) -> list[np.ndarray]:
    """Some of the inputs side by side, each by its weight."""
    return [np.hstack([w * part for w, part in zip(weights.values(), parts)])
            for parts in zip(*(own[name.replace("_", " ")] for name in weights))]  # fmt: skip


def baselines(task: Task, own: dict[str, list[np.ndarray]], y: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Simple methods with the same genes, neighbours and images."""

    def by(**weights):
        *x, last = joined(own, **weights)
        return ridge(x, y, np.concatenate(task.blocks), last)

    flat = np.concatenate(own["pca"][:-1]), np.concatenate(y)
    out = {
        "training mean": np.repeat(flat[1].mean(0, keepdims=True), len(own["pca"][-1]), 0),
        "depth only": by(depth=1),
        "kNN in 50 components": KNeighborsRegressor(50).fit(*flat).predict(own["pca"][-1]),
        "ridge, 50 components": by(pca=1),
        "ridge, 50 components + neighbors": by(pca=1, near=1),
        "ridge, 50 components + permuted neighbors": by(pca=1, permuted=1),
        "ridge, genes": by(genes=0.3),
        "ridge, genes + neighbors' genes": by(genes=0.3, near_genes=0.15),
    }
    if task.image:
        own_penalty = [by(genes=0.3, near_genes=0.15, image=w) for w in (0.05, 0.15)]
        out |= {
            f"ridge, genes + neighbors' genes + image, {w} of a column": p for w, p in zip((0.05, 0.15), own_penalty)
        }
    return out


def evaluate(table: results.Table, name: str, tasks: dict[str, Task], a) -> None:
    """Measure scores, uncertainty and reliability in some tasks; the split of a fold is ``SPLIT, fold N``."""
    for where, task in tasks.items():
        ceiling = sf.metrics.noise_ceiling(task.query.X, target_sum=task.target_sum)
        for seed in range(a.seeds):
            if not table.lacks(name, where, seed, [CHECKED, "run"]):
                continue
            rng = np.random.default_rng(seed)
            found, truth, about = {}, [], []
            pieces = {"de": [], "conformal": []}
            began = time.perf_counter()
            for fold, hidden in enumerate(task.folds(seed)[: a.folds]):
                shown = np.setdiff1d(np.arange(len(task.genes)), hidden)
                train = [task.cells(one, shown, hidden, True) for one in task.reference]
                query = task.cells(task.query, shown, hidden, False)
                y = log_normalize(
                    task.cells(task.query, hidden, hidden, False).counts, query.library, task.target_sum
                ).toarray()
                seconds = {}
                start = time.perf_counter()
                own = inputs(task, train, query, seed)
                names = [[task.genes[i] for i in rows] for rows in (shown, hidden)]
                targets = [c.align(names[1]).log_normalized(task.target_sum).toarray() for c in train]
                here = baselines(task, own, targets)
                seconds["baselines"] = time.perf_counter() - start
                start = time.perf_counter()
                scored = np.sort(rng.permutation(len(y))[:SCORED])
                weights = {"genes": 1.0, "near_genes": 1.0} | ({"image": 1.0} if task.image else {})
                *x, last = joined(own, **weights)
                drawn = {}
                for key, flow in ((FLOW, True), (TWIN, False)):
                    head = fit_head(np.concatenate(x), np.concatenate(targets), np.concatenate(task.blocks), flow, seed)
                    here[key] = head.mean(last)
                    drawn |= {key: head.draws(last[scored], 50)} if flow else {}
                seconds["heads"] = time.perf_counter() - start
                start = time.perf_counter()
                options = {"target_sum": task.target_sum, "blocks": task.blocks, "seed": seed}
                model, e = fit_imputer(train, *names, **options)
                taken, penalty = model.branches, model.alpha
                sets = [b for b in model.validation_scores if b != taken]
                for branches in sets:
                    model.branches, model.alpha = branches, model.penalties[branches]
                    here[f"ours, {' + '.join(branches)}"] = np.concatenate([m for m, _ in model.predict(query)])
                model.branches, model.alpha = taken, penalty
                here[OURS] = np.concatenate([m for m, _ in model.predict(query)])
                model.adapt([query], seed=seed)
                mean, std = (np.concatenate(v) for v in zip(*model.predict(query)))
                here[CHECKED] = mean
                seconds["ours"] = time.perf_counter() - start
                for key, value in here.items():
                    found.setdefault(key, []).append(value.astype(np.float32))
                truth.append(y)
                held_out = np.maximum(e.predict(model, model.branches, model.alpha, np.arange(len(hidden))), 0)
                pieces["conformal"].append(conformal(y, mean, std, model, e, held_out))
                laws = uncertainty(
                    y[scored], mean[scored], e.y, e.y - held_out,
                    lambda g, m=model, v=mean[scored], q=query.library[scored], r=rng: m.draws(v[:, g], q, g, DRAWS, r),
                    drawn,
                )  # fmt: skip
                table.add_all(name, f"{where}, fold {fold}", seed, laws)
                r = gene_pearson(y, mean)
                about.append(pd.DataFrame({
                    "gene": names[1], "r": r, "reliability": model.reliability, "training variance": e.y.var(0),
                    "detection rate": (e.y > 0).mean(0),
                }))  # fmt: skip
                visible = log_normalize(query.counts, query.library, task.target_sum).toarray()
                pieces["de"].append(differential(y, mean, std, visible, seed))
                print(where, seed, {k: round(float(np.nanmean(gene_pearson(y, v))), 4) for k, v in here.items()},
                      model.branches, {k: round(v, 4) for k, v in model.checked.items()},
                      {k: round(v) for k, v in seconds.items()}, flush=True)  # fmt: skip
            y = np.hstack(truth)
            found = {key: np.hstack(v) for key, v in found.items() if len(v) == a.folds}
            r = {key: gene_pearson(y, v) for key, v in found.items()}
            best = max((k for k in found if not k.startswith("ours")), key=lambda k: np.nanmean(r[k]))
            for key, value in found.items():
                row = {"pearson": np.nanmean(r[key])}
                if key != best:
                    versus = f"pearson minus {best}"
                    difference = sf.metrics.paired_pearson_difference(y, value, found[best], task.block)
                    row |= dict(zip((versus, f"{versus}, low", f"{versus}, high"), difference))
                agreement = sf.metrics.morans_agreement(y, value, task.query.obsm["spatial"])
                row |= {f"Moran's I, {k}": v for k, v in agreement.items() if np.ndim(v) == 0}
                measured, imputed = (np.corrcoef(v[:, np.nanstd(value, 0) > 1e-6].T) for v in (y, value))
                above = np.triu_indices_from(measured, 1)
                if len(above[0]):
                    row["gene-gene correlation, error"] = np.sqrt(np.mean((measured - imputed)[above] ** 2))
                table.add(name, where, seed, key, row | {"seconds": time.perf_counter() - began})
            scored_genes = np.concatenate(task.folds(seed)[: a.folds])
            table.add(name, where, seed, "ceiling", {"pearson": np.nanmean(ceiling[scored_genes])})
            about = pd.concat(about)
            for key in about.columns[2:]:
                rank = stats.spearmanr(about[key], about["r"], nan_policy="omit")[0]
                table.add(name, where, seed, key, {"rank correlation with scores": rank})
            means = {key: value for piece in pieces.values() for key, value in pd.DataFrame(piece).mean().items()}
            table.add(name, where, seed, "ours", means)
            table.add_run(name, where, seed, genes=y.shape[1], cells=len(y))


def pancreas(a, table: results.Table) -> None:
    from transitions import embedded

    parts = {name: part["table"] for name, part in embedded(a.store, a.cache, ("train", "test")).items()}
    for name, cells in parts.items():
        parts[name] = cells[np.asarray(cells.X.sum(1)).ravel() >= 15].copy()
    task = Task([parts["train"]], parts["test"], 100, 500.0, ("image_cell", "image_niche"))
    evaluate(table, "pancreas", {"test": task}, a)


def known(a, table: results.Table) -> None:
    """Genes that a model knows and the query lacks, without a reference: one model for all folds."""
    ours, data = "trained model", "pancreas:known"
    if not (a.save or table.lacks(data, "test", 0, [ours, "run"])):
        return
    import torch

    from transitions import embedded

    parts = embedded(a.store, a.cache, ("train", "test"))
    tables = {
        name: part["table"][np.asarray(part["table"].X.sum(1)).ravel() >= 15].copy() for name, part in parts.items()
    }
    model = sf.models.load(a.weights) if a.weights else sf.tl.train_imputation(tables["train"], target_sum=100)
    spatia = sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    if a.save:
        print(model.save(a.save), model.validation_scores, flush=True)
    query, whole = tables["test"], parts["test"]["table"].copy()
    task, found, truth = Task([tables["train"]], query, 100, 500.0), {}, []
    for hidden in task.folds(0):
        names = [task.genes[i] for i in hidden]
        shown = np.setdiff1d(np.arange(len(task.genes)), hidden)
        left = query[:, shown].copy()
        y = log_normalize(
            sparse.csr_matrix(query.X[:, hidden]), np.asarray(left.X.sum(1), float).ravel(), 100
        ).toarray()
        sf.tl.impute_genes(left, model=model, genes=names)
        here = {ours: left.obsm["imputed"]}
        parts["test"].tables["table"] = whole[:, shown].copy()
        sf.tl.embed_spatia(parts["test"], model=spatia, mpp=1)
        cells = parts["test"]["table"][query.obs_names]
        columns = [[spatia.config.genes.index(g) for g in some] for some in (names, left.var_names)]
        for level in ("cell", "niche", "tissue"):
            with torch.inference_mode():
                embedding = torch.from_numpy(np.asarray(cells.obsm[f"X_spatia_{level}"]))
                share = spatia.network.log_rates(embedding, level).exp().numpy()
            here[f"SPATIA's decoder, {level}"] = np.log1p(
                100 * share[:, columns[0]] / share[:, columns[1]].sum(1, keepdims=True)
            )
        for key, value in here.items():
            found.setdefault(key, []).append(value)
        truth.append(y)
        print({k: round(float(np.nanmean(gene_pearson(y, v))), 4) for k, v in here.items()}, flush=True)
    y, found = np.hstack(truth), {key: np.hstack(value) for key, value in found.items()}
    for key, value in found.items():
        row = {"pearson": np.nanmean(gene_pearson(y, value))}
        if key != ours:
            versus = f"pearson minus {ours}"
            difference = sf.metrics.paired_pearson_difference(y, value, found[ours], task.block)
            row |= dict(zip((versus, f"{versus}, low", f"{versus}, high"), difference))
        table.add(data, "test", 0, key, row)
    table.add_run(data, "test", 0, genes=y.shape[1], cells=len(y))


def starmap_tasks(a) -> dict[str, Task]:
    """Each mouse by the others."""
    mice = sf.datasets.starmap_mpfc()
    mice = {name: mice[mice.obs["mouse"] == name].copy() for name in mice.obs["mouse"].unique()}
    return {
        name: Task([other for key, other in mice.items() if key != name], query, 100, np.ptp(query.obsm["spatial"], 0).max() / 6)
        for name, query in mice.items() if a.only in (None, name)
    }  # fmt: skip


def starmap(a, table: results.Table) -> None:
    evaluate(table, "starmap", starmap_tasks(a), a)


def others(a, table: results.Table) -> None:
    """Published methods on the folds of ``starmap``."""
    for name, (package, method) in peers.IMPUTATION.items():
        if a.method not in (None, name) or not peers.installed(package, name):
            continue
        for where, task in starmap_tasks(a).items():
            for seed in range(a.seeds):
                if not table.lacks("starmap", where, seed, name):
                    continue
                found, truth, start = [], [], time.perf_counter()
                for hidden in task.folds(seed):
                    shown = np.setdiff1d(np.arange(len(task.genes)), hidden)
                    query = task.cells(task.query, shown, hidden, True)
                    names = [task.genes[i] for i in hidden]
                    truth.append(query.align(names).log_normalized(task.target_sum).toarray())
                    found.append(peers.imputed(method, task.reference, task.query, hidden, task.target_sum, seed))
                r = np.nanmean(gene_pearson(np.hstack(truth), np.hstack(found)))
                table.add("starmap", where, seed, name, {"pearson": r, "seconds": time.perf_counter() - start})


def bulb(a, table: results.Table) -> None:
    parts = {name: sf.datasets.mouse_olfactory_bulb(name) for name in ("MOB1", "MOB2", "MOB3")}
    tasks = {
        name: Task([other for key, other in parts.items() if key != name], query, 1e3, np.ptp(query.obsm["spatial"], 0).max() / 6)
        for name, query in parts.items()
    }  # fmt: skip
    evaluate(table, "mouse_olfactory_bulb", tasks, a)


def memory(a, table: results.Table) -> None:
    """100,000 cells x 1,000 imputed genes from 50,000 reference cells: seconds and peak memory."""
    if not table.lacks("simulated:memory", "", "", "run"):
        return
    rng, n_genes = np.random.default_rng(0), 1400
    weight = rng.normal(size=(8, n_genes)).astype(np.float32)

    def made(n, genes):
        parts = []
        for _ in range(0, n, 5000):
            rate = np.exp(0.4 * rng.normal(size=(5000, 8)).astype(np.float32) @ weight)
            parts.append(sparse.csr_matrix(rng.poisson(rate / rate.sum(1, keepdims=True) * 400).astype(np.float32)))
        x = sparse.vstack(parts, format="csr")[:n]
        out = ad.AnnData(x, obsm={"spatial": rng.uniform(0, 5000, (n, 2))})
        out.var_names = [f"gene{i}" for i in range(n_genes)]
        return out[:, genes].copy()

    reference, query = made(50_000, slice(None)), made(100_000, slice(0, 400))
    before, start = results.peak_gb(), time.perf_counter()
    sf.tl.impute_genes(query, reference=reference)
    table.add("simulated:memory", "", "", "run", {
        "cells": query.n_obs, "genes": query.obsm["imputed"].shape[1], "reference cells": reference.n_obs,
        "seconds": time.perf_counter() - start, "peak_gb": results.peak_gb(), "peak_gb before the call": before,
    })  # fmt: skip


COMMANDS = {"pancreas": pancreas, "known": known, "starmap": starmap, "others": others, "bulb": bulb, "memory": memory}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("what", choices=list(COMMANDS))
    out.add_argument("--store")
    out.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    out.add_argument("--weights", help="of a model by tl.train_imputation; else it is trained")
    out.add_argument("--save", type=Path, help="where to keep the trained model")
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--folds", type=int, default=N_FOLDS, help="how many of the five are scored")
    out.add_argument("--only", help="one mouse")
    out.add_argument("--method", choices=list(peers.IMPUTATION), help="one published method")
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.what](a, results.Table("imputation", again=a.again))
