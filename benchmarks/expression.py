"""Expression from histology: every baseline and ablation on her2st and the olfactory bulb, section by section.

    python benchmarks/expression.py --data her2st --seeds 3 --out benchmarks/results
    python benchmarks/expression.py --data her2st --convention markers --methods "STFlow default" "deterministic twin"
    python benchmarks/expression.py --table            # the table of docs/benchmarks.md from the result files

Each (data, convention, held-out section, seed, method) is one row of a CSV and one .npz of predictions; runs that are
already there are not repeated. The held-out section touches nothing: genes, scaling, penalties, smoothing, epochs and
stack are chosen inside the training sections. All image-only methods get the same features; each tunes its penalties
by leaving one training section out. Convention "markers" is "10k" with four genes more, whose correlations stand in columns
of their own and whose mean is ``markers``.
"""

import argparse
import dataclasses
import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import spatiaflow as sf
from position import position_only
from spatiaflow import _io
from spatiaflow.models import PRESETS
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.simple import (
    SMOOTHING,
    SlideData,
    choose_ridge,
    fit_ridge,
    gene_pearson,
    slide_graph,
    smooth,
)  # fmt: skip
from spatiaflow.models.stflow import standardize
from spatiaflow.train.stflow import fit_stflow
from writing import RESULTS

SECTIONS = {"her2st": ("B4", "C2", "C3", "C4", "C5"), "mouse_olfactory_bulb": ("MOB1", "MOB2", "MOB3")}
MARKERS = ("GATA3", "ERBB2", "UBE2C", "VWF")  # of the papers
DEFAULT = PRESETS["default"]
NETWORKS = {
    "STFlow default": DEFAULT,
    "STFlow paper preset": PRESETS["paper"],
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


def problem(sections: dict, held_out: str, convention: str) -> tuple[list[SlideData], SlideData, list[str]]:
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
        xy = _io.slides(tables[s])[0].xy
        features = _io.features(tables[s], "X_texture")
        return SlideData(s, xy, features, y[s][:, top], counts[s][:, top], library[s])

    return [make(s) for s in names], make(held_out), [shared[i] for i in top]


def scaled(train, test, mode):
    features = np.concatenate([s.features for s in train]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    std = np.where(std < 1e-6, 1, std)
    return [
        dataclasses.replace(s, features=standardize(s.features, mean, std, mode)) for s in train
    ], dataclasses.replace(test, features=standardize(test.features, mean, std, mode))


def simple_rows(train, test, seed, sections):
    """Yield (method, prediction) of everything that is not STFlow."""
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.neural_network import MLPRegressor

    yield "training mean", np.tile(np.concatenate([s.y for s in train]).mean(0), (len(test), 1))
    depth = np.log(test.library)[:, None]
    slope = [np.polyfit(np.log(np.concatenate([s.library for s in train])), np.concatenate([s.y for s in train]), 1)][0]
    yield "depth only (true counts)", depth * slope[0] + slope[1]
    if test.library_id in SECTIONS["her2st"] and any(s.library_id[0] == test.library_id[0] for s in train):
        yield "position only (siblings registered)", position_only(sections, train, test)
    graph, best = slide_graph(test), {}
    for mode in ("global", "slide"):
        a, b = scaled(train, test, mode)
        alpha, weight, inner = choose_ridge([[s] for s in a])
        raw = fit_ridge(a, alpha).predict(b.features)
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
            g = slide_graph(held_out)
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


def network_row(name, train, test, genes, seed, epochs=None):
    """Fit one STFlow variant; return (prediction, std, model)."""
    train, test = list(train), test
    if name == "features shuffled":
        rng = np.random.default_rng(seed)
        train = [dataclasses.replace(s, features=rng.permutation(s.features)) for s in train]
        test = dataclasses.replace(test, features=rng.permutation(test.features))
    target = None if np.array_equal(train[0].y, np.log1p(train[0].counts).astype(np.float32)) else 1e4
    model = fit_stflow(
        train, genes=genes, encoder={"id": "texture"}, target_sum=target, preset=NETWORKS[name], pitch=200.0, card={},
        seed=seed, **({"max_epochs": epochs} if epochs else {}),
    )  # fmt: skip
    noisy = model.preset.flow and not model.prior.deterministic
    out = model.predict(
        test.features, [(test.library_id, np.arange(len(test)), test.xy)], n_samples=10 if noisy else 1, seed=seed
    )
    return out, model


def uncertainty(test, out, model, train) -> dict:
    """CRPS and interval score beside a constant marginal interval and homoscedastic ridge residuals; coverage."""
    draws = model.law.sample(out.mean, out.std, 200)
    lower, upper = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")  # unbiased for few draws
    y = np.concatenate([s.y for s in train])
    marginal = np.quantile(y, (np.arange(100) + 0.5) / 100, axis=0)[:, None] * np.ones((1, len(test), 1))
    a, b = scaled(train, test, model.standardize)
    alpha, weight, _ = choose_ridge([[s] for s in a])
    mean = smooth(fit_ridge(a, alpha).predict(b.features), slide_graph(b), weight)
    residual = []
    for i, s in enumerate(a):
        p = fit_ridge([t for j, t in enumerate(a) if j != i], alpha).predict(s.features)
        residual.append(s.y - smooth(p, slide_graph(s), weight))
    std = np.concatenate(residual).std(0) * np.ones_like(mean)
    detected = np.concatenate([s.counts > 0 for s in train]).mean(0)
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
        "ood": out.ood.mean(), "between_share": out.between_share,
        "energy": sf.metrics.energy_score(test.y, draws).mean(),
        "gene_gene": sf.metrics.gene_correlation_agreement(test.y, out.mean)["pearson"],
        "gene_gene of draws": sf.metrics.gene_correlation_agreement(test.y, draws[0])["pearson"],
    }  # fmt: skip


def _inner(model) -> dict:
    """Scores on held-out training slides, the only ones that choices are made by."""
    return {f"inner {name}": value for name, value in model.card["scores"].items()} | {"standardize": model.standardize}


def write_row(args, held_out, seed, stem, test, genes, ceiling, method, prediction, seconds, extra=None) -> None:
    """Write one run: a CSV row, and its predictions for paired comparisons."""
    scores, top = gene_pearson(test.y, prediction), np.nanmean(ceiling[:50])
    if args.convention == "markers":
        here = [i for i, gene in enumerate(genes) if gene in MARKERS]
        by_gene = {genes[i]: scores[i] for i in here} | {f"ceiling of {genes[i]}": ceiling[i] for i in here}
        by_gene |= {"markers": np.nanmean(scores[here]), "ceiling of markers": np.nanmean(ceiling[here])}
        extra = by_gene | (extra or {})
    row = {
        "data": args.data, "convention": args.convention, "section": held_out, "seed": seed, "method": method,
        "pearson": np.nanmean(scores[:50]), "ceiling": top, "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "spatiaflow": sf.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"benchmarks/expression.py --data {args.data} --convention {args.convention}",
    } | (extra or {})  # fmt: skip
    name = f"{stem}-{method}".replace(" ", "_")
    pd.DataFrame([row]).to_csv(args.out / f"{name}.csv", index=False)
    np.savez_compressed(args.out / f"{name}.npz", prediction=prediction.astype(np.float32), truth=test.y, xy=test.xy)
    print(f"{stem} {method:32s} {row['pearson']:.3f}  {seconds:.0f} s", flush=True)


def run(args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    sections = load(args.data, args.patch_um)
    for held_out in args.sections or SECTIONS[args.data]:
        train, test, genes = problem(sections, held_out, args.convention)
        full = _io.dense(_io.counts(sections[held_out])[0])
        columns = [list(sections[held_out].var_names).index(g) for g in genes]
        target = None if args.convention == "raw" else 1e4
        ceiling = sf.metrics.noise_ceiling(full, genes=columns, target_sum=target)
        for seed in range(args.seeds):
            stem = f"{args.data}-{args.convention}-{held_out}-{seed}"

            record = partial(write_row, args, held_out, seed, stem, test, genes, ceiling)
            if not (args.out / f"{stem}-kNN_retrieval.csv").exists():
                started = time.perf_counter()
                for method, prediction in simple_rows(train, test, seed, sections):
                    record(method, prediction, time.perf_counter() - started)
                    started = time.perf_counter()
            for method in args.methods or NETWORKS:
                if (args.out / f"{stem}-{method}.csv".replace(" ", "_")).exists():
                    continue
                started = time.perf_counter()
                out, model = network_row(method, train, test, genes, seed, args.epochs)
                seconds = time.perf_counter() - started
                record(method, out.mean, seconds, uncertainty(test, out, model, train) | _inner(model))


def table(out: Path) -> None:
    """Print the tables from the result files: mean and spread over seeds, paired differences with block bootstrap."""
    rows = pd.concat([pd.read_csv(p) for p in sorted(out.glob("*.csv"))], ignore_index=True)
    for (data, convention), part in rows.groupby(["data", "convention"]):
        print(f"\n### {data}, {convention}\n")
        scores = part.groupby(["method", "section"])["pearson"]
        mean, spread = scores.mean().unstack(), scores.std().unstack()
        print(mean.sort_values(mean.columns[-1]).round(3).to_markdown())
        if part["seed"].nunique() > 1:
            print("\nspread over seeds (standard deviation)\n")
            print(spread.round(3).to_markdown())
        print("\nceiling:", part.groupby("section")["ceiling"].first().round(2).to_dict())
        networks = part.dropna(subset=["crps"]) if "crps" in part else part[:0]
        if len(networks):
            names = [
                c for c in networks if c.startswith(("crps", "interval", "coverage", "genes", "pit", "ood", "between"))
            ]
            default = networks[networks["method"] == "STFlow default"].dropna(axis=1, how="all")
            default = default.groupby("section")[[name for name in names if name in default]].mean()
            print("\nSTFlow default, uncertainty on the held-out section\n\n" + default.T.round(3).to_markdown())
            names = ["inner model", "crps", "energy", "gene_gene", "gene_gene of draws", "seconds", "peak_gb"]
            print(
                "\nnetworks\n\n"
                + networks.groupby(["method", "section"])[names].mean().round(3).reset_index().to_markdown(index=False)
            )
        _paired(out, part, data, convention)


def _paired(out: Path, part: pd.DataFrame, data: str, convention: str) -> None:
    """Default against others, scores averaged over seeds; the best baseline by its mean over the sections compared."""
    groups = (
        {"C2-C5": ["C2", "C3", "C4", "C5"], "B4": ["B4"]} if data == "her2st" else {"all": list(part.section.unique())}
    )
    others = [m for m in part.method.unique() if not m.startswith(("STFlow default", "depth", "training", "position"))]
    for label, wanted in groups.items():
        wanted = [s for s in wanted if s in set(part.section)]
        if not wanted or "STFlow default" not in set(part.method):
            continue
        mean = part[part.section.isin(wanted)].groupby("method").pearson.mean()
        baselines = [m for m in others if m in mean and m not in NETWORKS]
        best = mean[baselines].idxmax()
        ridge = mean[[m for m in ("ridge", "ridge, z-scores per section") if m in mean]].idxmax()
        for other in dict.fromkeys([best, ridge, "deterministic twin", "no context (k=0)", "STFlow paper preset"]):
            if other not in mean:
                continue
            truth, first, second, xy, library = [], [], [], [], []
            for section in wanted:
                stems = [f"{data}-{convention}-{section}-{seed}-" for seed in part["seed"].unique()]
                both = ("STFlow default", other)
                paths = [[out / f"{stem}{method}.npz".replace(" ", "_") for method in both] for stem in stems]
                pairs = [[np.load(path) for path in found] for found in paths if all(path.exists() for path in found)]
                # seeds that both have stand side by side as genes do: the mean of their scores, in the same resamples
                truth.append(np.hstack([ours["truth"] for ours, _ in pairs]))
                first.append(np.hstack([ours["prediction"] for ours, _ in pairs]))
                second.append(np.hstack([theirs["prediction"] for _, theirs in pairs]))
                xy.append(pairs[0][0]["xy"])
                library += [section] * len(xy[-1])
            # genes differ between sections: they were chosen without the held-out one; compare slot by slot
            blocks = sf.metrics.spatial_blocks(np.concatenate(xy), 1000.0, library=np.array(library))
            difference, low, high = sf.metrics.paired_pearson_difference(
                np.concatenate(truth), np.concatenate(first), np.concatenate(second), blocks, library=np.array(library)
            )
            print(f"\n{label}: STFlow default - {other}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SECTIONS, default="her2st")
    parser.add_argument("--convention", choices=("10k", "markers", "raw"), default="10k")
    parser.add_argument("--sections", nargs="*")
    parser.add_argument("--methods", nargs="*", choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of the networks, fewer than the verb's own")
    parser.add_argument("--patch-um", type=float, default=155.0)
    parser.add_argument("--threads", type=int, default=1)  # more than there are free cores is slower by far
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables from the result files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table(arguments.out) if arguments.table else run(arguments)
