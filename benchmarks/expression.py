"""Expression from histology: every baseline and ablation on her2st and the olfactory bulb, section by section.

    python benchmarks/expression.py --data her2st --seeds 3
    python benchmarks/expression.py --data her2st --convention markers --methods "STFlow default" "deterministic twin"
    python benchmarks/expression.py --table            # prints tables, measures paired differences

The split is the held-out section. It touches nothing: genes, scaling, penalties, smoothing, epochs and stack are chosen
inside the training sections. All image-only methods get the same features; each tunes its penalties by leaving one training
section out. Convention "raw" is log1p of raw counts with HEST's genes. Convention "markers" is "10k" with four genes more,
scored one by one and by their mean, ``pearson:markers``. Predictions are kept beside the CSV, as .npz that git ignores: paired
differences need them.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import results
import spatiaflow as sf
from position import position_only
from scored import Scored, chosen_ridge, fitted_ridge, scaled
from spatiaflow import _io
from spatiaflow._slides import gather
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import SMOOTHING, gene_pearson, smooth
from spatiaflow.models.stflow import STFlowConfig
from spatiaflow.train.stflow import train_stflow

SECTIONS = {"her2st": ("B4", "C2", "C3", "C4", "C5"), "mouse_olfactory_bulb": ("MOB1", "MOB2", "MOB3")}
LAST_SIMPLE = "kNN retrieval"  # of simple_rows: where it is there, all are
IMAGE_ONLY = [
    "ridge", "ridge + smoothing", "ridge, z-scores per section", "ridge, z-scores per section + smoothing", "MLP",
    "MLP + smoothing", LAST_SIMPLE,
]  # fmt: skip
MARKERS = ("GATA3", "ERBB2", "UBE2C", "VWF")  # of the papers
DEFAULT = STFlowConfig.of("default")
NETWORKS = {
    "STFlow default": DEFAULT,
    "STFlow paper preset": STFlowConfig.of("paper"),
    "deterministic twin": dataclasses.replace(DEFAULT, flow=False, prior="zero"),
    "no context (k=0)": dataclasses.replace(DEFAULT, n_neighbors=0),
    "features shuffled": DEFAULT,
}


def load(data: str, patch_um: float) -> dict:
    """Every section with its features."""
    out = {}
    for section in SECTIONS[data]:
        adata = getattr(sf.datasets, data)(section)
        sf.pp.encode_patches(adata, patch_um=patch_um)
        out[section] = adata
    return out


def problem(sections: dict, held_out: str, convention: str) -> tuple[list[Scored], Scored, list[str]]:
    """Training slides and the test slide as arrays; genes are chosen on training slides, or as HEST does ("raw")."""
    names = [s for s in sections if s != held_out]
    tables = {s: sections[s] for s in sections}
    known = set(tables[held_out].var_names)
    shared = [g for g in _io.shared_genes([tables[s] for s in names]) if g in known]
    counts = {s: _io.dense(_io.counts(tables[s], shared)[0]) for s in sections}
    library = {s: _io.library_sizes(tables[s]) for s in sections}
    target = None if convention == "raw" else 1e4
    y = {s: log_normalize(counts[s], library[s], target) for s in sections}
    if convention != "raw":
        top = np.argsort(-np.concatenate([y[s] for s in names]).var(0), kind="stable")[:50]
        if convention == "markers":
            top = np.r_[top, [i for i, gene in enumerate(shared) if gene in MARKERS and i not in top]]
    else:  # HEST: in at least 10 % of the spots of every sample (test included), scanpy's HVG over all samples
        import anndata as ad
        import scanpy as sc

        keep = np.all([(counts[s] > 0).mean(0) >= 0.1 for s in sections], 0)
        pooled = ad.AnnData(np.concatenate([y[s] for s in sections])[:, keep])
        sc.pp.highly_variable_genes(pooled, n_top_genes=50)
        top = np.flatnonzero(keep)[pooled.var["highly_variable"].to_numpy()]

    def make(s):
        (slide,) = gather(tables[s], need=["features"], use_rep="X_texture")
        return Scored.of(s, slide.obs_names, slide.xy, slide.features, counts[s][:, top], library[s], genes, target)

    genes = [shared[i] for i in top]
    return [make(s) for s in names], make(held_out), genes


def simple_rows(train, test, seed, sections):
    """Yield (method, prediction) of everything that is not STFlow."""
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.neural_network import MLPRegressor

    yield "training mean", np.tile(np.concatenate([s.y for s in train]).mean(0), (len(test), 1))
    depth = np.log(test.slide.library)[:, None]
    slope = [
        np.polyfit(np.log(np.concatenate([s.slide.library for s in train])), np.concatenate([s.y for s in train]), 1)
    ][0]
    yield "depth only (true counts)", depth * slope[0] + slope[1]
    if test.name in SECTIONS["her2st"] and any(s.name[0] == test.name[0] for s in train):
        yield "position only (siblings registered)", position_only(sections, train, test)
    graph, best = test.graph, {}
    for mode in ("global", "slide"):
        a, (b,) = scaled(train, [test], mode)
        alpha, weight, inner = chosen_ridge(a)
        raw = fitted_ridge(a, alpha).predict(b.features)
        label = "ridge" if mode == "global" else "ridge, z-scores per section"
        yield label, raw
        yield label + " + smoothing", smooth(raw, graph, weight)
        best[inner] = (a, b)
    a, b = best[max(best)]  # the standardisation that wins inside the training sections, for all below
    x, y = np.concatenate([s.features for s in a]), np.concatenate([s.y for s in a])

    def inner_score(make, weights=(0.0,)):
        score = np.zeros(len(weights))
        for i, held_out in enumerate(a):
            rest = [s for j, s in enumerate(a) if j != i]
            fitted = make().fit(np.concatenate([s.features for s in rest]), np.concatenate([s.y for s in rest]))
            p = fitted.predict(held_out.features)
            g = held_out.graph
            score += [np.nanmean(gene_pearson(held_out.y, smooth(p, g, w))) for w in weights]
        return score

    mlps = [
        lambda h=h, alpha=alpha: MLPRegressor(
            hidden_layer_sizes=h, alpha=alpha, early_stopping=True, max_iter=200, random_state=seed
        )
        for h in ((64,), (256,))
        for alpha in (1e-2, 1.0, 10.0)
    ]
    grid = np.array([inner_score(make, SMOOTHING) for make in mlps])
    fitted = mlps[int(grid[:, 0].argmax())]().fit(x, y)
    yield "MLP", fitted.predict(b.features)
    i, w = np.unravel_index(grid.argmax(), grid.shape)
    yield "MLP + smoothing", smooth(mlps[i]().fit(x, y).predict(b.features), graph, SMOOTHING[w])
    knns = [lambda k=k: KNeighborsRegressor(k) for k in (5, 10, 20, 40, 80)]
    best_k = int(np.argmax([inner_score(make)[0] for make in knns]))
    yield "kNN retrieval", knns[best_k]().fit(x, y).predict(b.features)


def network_row(name, train, test, target_sum, seed, epochs=None):
    """Fit one STFlow variant; return (prediction, model)."""
    train, test = list(train), test
    if name == "features shuffled":
        rng = np.random.default_rng(seed)
        train = [s.having(rng.permutation(s.features)) for s in train]
        test = test.having(rng.permutation(test.features))
    model = train_stflow(
        [s.slide for s in train], NETWORKS[name], encoder={"id": "texture"}, target_sum=target_sum, max_epochs=epochs, seed=seed
    )  # fmt: skip
    noisy = model.config.flow and not model.prior.deterministic
    new = all(s.name[0] != test.name[0] for s in train)  # sections of a donor begin with one letter
    return model.predict([test.slide], n_samples=10 if noisy else 1, new_donor=new, seed=seed), model


def uncertainty(test, out, model, train) -> dict:
    """CRPS and interval score beside a constant marginal interval and homoscedastic ridge residuals; coverage."""
    draws = model.counting.sample(out.mean, out.std, 200)
    lower, upper = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")  # unbiased for few draws
    y = np.concatenate([s.y for s in train])
    marginal = np.quantile(y, (np.arange(100) + 0.5) / 100, axis=0)[:, None] * np.ones((1, len(test), 1))
    a, (b,) = scaled(train, [test], model.standardize)
    alpha, weight, _ = chosen_ridge(a)
    mean = smooth(fitted_ridge(a, alpha).predict(b.features), b.graph, weight)
    residual = []
    for i, s in enumerate(a):
        p = fitted_ridge([t for j, t in enumerate(a) if j != i], alpha).predict(s.features)
        residual.append(s.y - smooth(p, s.graph, weight))
    std = np.concatenate(residual).std(0) * np.ones_like(mean)
    detected = np.concatenate([s.slide.counts.toarray() > 0 for s in train]).mean(0)
    inside = (test.y >= lower) & (test.y <= upper)
    pit = np.sort(sf.metrics.pit(test.y, draws, seed=0).ravel())
    bins = {
        "detected below 20 %": detected < 0.2,
        "20-50 %": (detected >= 0.2) & (detected < 0.5),
        "50 % and more": detected >= 0.5,
    }
    return {
        "crps": sf.metrics.crps_ensemble(test.y, draws).mean(),
        "crps_marginal": sf.metrics.crps_ensemble(test.y, marginal, fair=False).mean(),
        "crps_ridge": sf.metrics.crps_normal(test.y, mean, std).mean(),
        "interval": sf.metrics.interval_score(test.y, lower, upper).mean(),
        "interval_marginal": sf.metrics.interval_score(
            test.y, np.tile(np.quantile(y, 0.05, 0), (len(test), 1)), np.tile(np.quantile(y, 0.95, 0), (len(test), 1))
        ).mean(),
        "interval_ridge": sf.metrics.interval_score(test.y, mean - 1.645 * std, mean + 1.645 * std).mean(),
        "coverage90": inside.mean(),
        **{f"coverage90 {name}": inside[:, genes].mean() if genes.any() else np.nan for name, genes in bins.items()},
        **{f"genes {name}": genes.sum() for name, genes in bins.items()},
        "genes within 85-95 %": np.mean((inside.mean(0) >= 0.85) & (inside.mean(0) <= 0.95)),
        "pit_distance": np.abs(pit - (np.arange(len(pit)) + 0.5) / len(pit)).max(),
        "ood": out.ood.mean(),
        "energy": sf.metrics.energy_score(test.y, draws).mean(),
        "gene_gene": sf.metrics.gene_correlation_agreement(test.y, out.mean)["pearson"],
        "gene_gene of draws": sf.metrics.gene_correlation_agreement(test.y, draws[0])["pearson"],
    }  # fmt: skip


def inner_scores(model) -> dict:
    """Scores on held-out training slides, the only ones that choices are made by."""
    scores = {f"inner {name}": value for name, value in model.card["validation_scores"].items()}
    return scores | {"scaled by section": model.standardize == "slide"}


def variant(data: str, convention: str) -> str:
    """What the column ``data`` says."""
    return data if convention == "10k" else f"{data}:{convention}"


def predictions(data: str, section: str, seed: int | str, method: str) -> Path:
    return results.folder() / f"{data}-{section}-{seed}-{method}.npz".replace(" ", "_").replace(":", "-")


def pearson(r: np.ndarray, genes: list[str], markers: bool) -> dict[str, float]:
    """Mean of the 50 genes, and each of the markers."""
    found = {"pearson50": np.nanmean(r[:50])}
    if markers:
        here = {gene: r[i] for i, gene in enumerate(genes) if gene in MARKERS}
        found |= {f"pearson:{gene}": value for gene, value in here.items()}
        found["pearson:markers"] = np.nanmean([*here.values()])
    return found


def run(args) -> None:
    table, data = results.Table("expression", again=args.again), variant(args.data, args.convention)
    markers, target = args.convention == "markers", None if args.convention == "raw" else 1e4
    networks, sections = args.methods or list(NETWORKS), load(args.data, args.patch_um)
    for held_out in args.sections or SECTIONS[args.data]:
        if not any(table.lacks(data, held_out, seed, [LAST_SIMPLE, *networks]) for seed in range(args.seeds)):
            continue
        train, test, genes = problem(sections, held_out, args.convention)
        columns = [list(sections[held_out].var_names).index(g) for g in genes]
        full = _io.dense(_io.counts(sections[held_out])[0])
        ceiling = sf.metrics.noise_ceiling(full, genes=columns, target_sum=target)
        table.add(data, held_out, "", "ceiling", pearson(ceiling, genes, markers))

        def record(seed, method, prediction, started, more=None, *, held_out=held_out, test=test, genes=genes):
            cost = {"seconds": time.perf_counter() - started, "peak_gb": results.peak_gb()}
            kept = {
                "prediction": prediction.astype(np.float32),
                "truth": test.y,
                "xy": test.slide.xy,
                "genes": np.array(genes),
            }
            np.savez_compressed(predictions(data, held_out, seed, method), **kept)
            scores = pearson(gene_pearson(test.y, prediction), genes, markers)
            table.add(data, held_out, seed, method, scores | cost | (more or {}))

        for seed in range(args.seeds):
            if table.lacks(data, held_out, seed, LAST_SIMPLE):
                started = time.perf_counter()
                for method, prediction in simple_rows(train, test, seed, sections):
                    record(seed, method, prediction, started)
                    started = time.perf_counter()
            for method in networks:
                if not table.lacks(data, held_out, seed, method):
                    continue
                started = time.perf_counter()
                out, model = network_row(method, train, test, target, seed, args.epochs)
                record(seed, method, out.mean, started, uncertainty(test, out, model, train) | inner_scores(model))


def show() -> None:
    """Print the tables: mean and spread over seeds, uncertainty, and the paired differences."""
    rows = results.read("expression")
    for data in rows["data"].unique():
        part = results.select(rows, data=data)
        single = part[~part["split"].isin(["C2-C5", "all"]) & (part["seed"] != "mean")]
        metric = "pearson:markers" if data.endswith(":markers") else "pearson50"
        scores = results.select(single, metric=metric)
        mean = results.pivot(scores, columns="split")
        print(f"\n### {data}, {metric}\n\n{mean.sort_values(mean.columns[-1]).round(3).to_markdown()}")
        if scores["seed"].nunique() > 2:
            print(f"\nspread over seeds\n\n{results.pivot(scores, columns='split', how='std').round(3).to_markdown()}")
        default = results.pivot(results.select(single, method="STFlow default"), "metric", "split")
        wanted = default.index.str.startswith(("crps", "interval", "coverage", "genes", "pit", "ood", "between"))
        print("\nSTFlow default, uncertainty on the held-out section\n\n" + default[wanted].round(3).to_markdown())
        names = ["inner model", "crps", "energy", "gene_gene", "gene_gene of draws", "seconds", "peak_gb"]
        networks = results.select(single, method=list(NETWORKS), metric=names)
        print(
            "\nnetworks\n\n"
            + results.pivot(networks, ["method", "split"]).round(3).reset_index().to_markdown(index=False)
        )
        differences = part[part["metric"].str.contains(" minus ")]
        if len(differences):
            print(f"\npaired differences\n\n{differences[['split', 'metric', 'value']].to_markdown(index=False)}")


def paired() -> None:
    """Measure the default minus others from the predictions that are kept, scores averaged over the seeds that both have."""
    table, rows = results.Table("expression", again=True), results.read("expression")
    for data in rows["data"].unique():
        metric = "pearson:markers" if data.endswith(":markers") else "pearson50"
        part = results.select(rows, data=data, metric=metric)
        groups = {"C2-C5": ["C2", "C3", "C4", "C5"], "B4": ["B4"]} if "her2st" in data else {"all": SECTIONS[data]}
        for label, sections in groups.items():
            mean = results.pivot(results.select(part, split=list(sections))).get(metric, pd.Series(dtype=float))
            simple = mean[[name for name in mean.index if name in IMAGE_ONLY]]
            ridges = mean[[name for name in ("ridge", "ridge, z-scores per section") if name in mean]]
            if not len(simple):
                continue
            others = [simple.idxmax(), ridges.idxmax(), "deterministic twin", "no context (k=0)", "STFlow paper preset"]
            for other in dict.fromkeys(name for name in others if name in mean):
                found = difference(data, sections, sorted(set(part["seed"]) - {"", "mean"}), other, metric)
                if found:
                    name = f"{metric} minus {other}"
                    table.add(
                        data, label, "mean", "STFlow default", dict(zip((name, f"{name}, low", f"{name}, high"), found))
                    )


def difference(data: str, sections, seeds: list[str], other: str, metric: str) -> tuple[float, float, float] | None:
    """Paired difference with its interval; None where a section lacks predictions."""
    truth, ours, theirs, xy, library = [], [], [], [], []
    for section in sections:
        paths = [[predictions(data, section, seed, m) for m in ("STFlow default", other)] for seed in seeds]
        pairs = [[np.load(path) for path in both] for both in paths if all(path.exists() for path in both)]
        if not pairs:
            return None
        genes = pairs[0][0]["genes"]
        slots = np.flatnonzero(np.isin(genes, MARKERS)) if metric == "pearson:markers" else np.arange(50)
        # seeds that both have stand side by side as genes do: the mean of their scores, in the same resamples
        truth.append(np.hstack([a["truth"][:, slots] for a, _ in pairs]))
        ours.append(np.hstack([a["prediction"][:, slots] for a, _ in pairs]))
        theirs.append(np.hstack([b["prediction"][:, slots] for _, b in pairs]))
        xy.append(pairs[0][0]["xy"])
        library += [section] * len(xy[-1])
    # genes differ between sections: they were chosen without the held-out one; compare slot by slot
    library = np.array(library)
    blocks = sf.metrics.spatial_blocks(np.concatenate(xy), 1000.0, library=library)
    arrays = [np.concatenate(values) for values in (truth, ours, theirs)]
    return sf.metrics.paired_pearson_difference(*arrays, blocks, library=library)


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("--data", choices=SECTIONS, default="her2st")
    out.add_argument("--convention", choices=("10k", "markers", "raw"), default="10k")
    out.add_argument("--sections", nargs="*")
    out.add_argument("--methods", nargs="*", choices=NETWORKS)
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--epochs", type=int, help="of the networks, fewer than the verb's own")
    out.add_argument("--patch-um", type=float, default=155.0)
    out.add_argument("--threads", type=int, default=1)  # more than there are free cores is slower by far
    out.add_argument(
        "--table", action="store_true", help="print tables; measure paired differences of kept predictions"
    )
    return out


if __name__ == "__main__":
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.table:
        paired()
        show()
    else:
        run(arguments)
