"""Expression from histology where the truth is known: are planted genes recovered, and are the intervals right?

    python benchmarks/simulated.py --seeds 3

Trains on three simulated slides and predicts a fourth. By what drives the genes: Pearson of STFlow, of ridge and of
smoothed ridge with the counts; of the planted rates themselves with the counts (no predictor can do better); Pearson of
STFlow with the planted rates; coverage of 90 % intervals; CRPS and interval score beside each gene's training
distribution and, for CRPS, beside the law that made the counts.
"""

import argparse

import numpy as np
import pandas as pd
import torch

import results
import spatiaflow as sf
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import gene_pearson

DRIVERS = ("type", "niche", "state", "morphology", "none")  # of genes, as the simulation plants them


def log_expression(table, genes):
    counts = table.X.toarray()
    return log_normalize(counts, counts.sum(1), 1e4)[:, table.var_names.get_indexer(genes)]


def one(seed: int, n_cells: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Scores of every gene, by method and metric; and what drives each gene."""
    slides = [sf.datasets.simulated_tissue(n_cells, seed=10 * seed + i) for i in range(4)]
    for slide in slides:
        sf.pp.encode_patches(slide, image_key="he", patch_um=64)
    model = sf.tl.train_stflow(slides[:3], genes=list(slides[0]["table"].var_names), random_state=seed)
    test, genes = slides[3], model.genes
    sf.tl.predict_expression(test, model=model, n_samples=10, new_donor=False, random_state=seed)
    table = test["table"]
    y, mean, std = log_expression(table, genes), table.obsm["stflow"], table.obsm["stflow_std"]
    rate = table[:, genes].layers["rate"].astype(float)
    rng, library = np.random.default_rng(seed), table.obs["library"].to_numpy()
    theta = table.uns["planted"]["theta"]
    sizes = rng.choice(
        library, (200, len(table))
    )  # the law that made the counts, library unknown as it is to the model
    oracle = np.stack([log_normalize(rng.poisson(rng.gamma(theta, s[:, None] * rate / theta)), s, 1e4) for s in sizes])
    draws = model.counting.sample(mean.astype(float), std.astype(float), 200, seed)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
    training = np.concatenate([log_expression(s["table"], genes) for s in slides[:3]])
    grid = np.quantile(training, (np.arange(100) + 0.5) / 100, axis=0)[:, None] * np.ones((1, len(y), 1))
    flat = [np.tile(np.quantile(training, q, axis=0), (len(y), 1)) for q in (0.05, 0.95)]
    features, xy = table.obsm["X_texture"], table.obsm["spatial"]
    counts, interval_score = "pearson with counts", sf.metrics.interval_score
    scores = {
        "STFlow": {
            counts: gene_pearson(y, mean), "pearson with planted rates": gene_pearson(np.log(rate), mean),
            "coverage90": ((y >= low) & (y <= high)).mean(0), "crps": sf.metrics.crps_ensemble(y, draws).mean(0),
            "interval": interval_score(y, low, high).mean(0), "skill": model.skill,
        },
        "ridge": {counts: gene_pearson(y, model.simple_prediction(features))},
        "ridge + smoothing": {counts: gene_pearson(y, model.simple_prediction(features, xy))},
        "planted rates": {counts: gene_pearson(y, np.log(rate))},
        "training distribution": {
            "crps": sf.metrics.crps_ensemble(y, grid, fair=False).mean(0), "interval": interval_score(y, *flat).mean(0),
        },
        "true law": {"crps": sf.metrics.crps_ensemble(y, oracle).mean(0)},
    }  # fmt: skip
    return scores, table.var.loc[genes, "driver"].astype(str).to_numpy()


def run(args) -> None:
    table = results.Table("simulated", again=args.again)
    for seed in range(args.seeds):
        if not any(table.lacks("simulated", f"genes of {name}", seed, "run") for name in DRIVERS):
            continue
        scores, driver = one(seed, args.n_cells)
        for name in DRIVERS:
            genes = driver == name
            means = {method: pd.DataFrame(found)[genes].mean().to_dict() for method, found in scores.items()}
            table.add_all("simulated", f"genes of {name}", seed, means)
            table.add("simulated", f"genes of {name}", seed, "run", {"genes": genes.sum()})


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--n-cells", type=int, default=1500)
    out.add_argument("--threads", type=int, default=2)
    return out


if __name__ == "__main__":
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    run(args)
    rows = results.read("simulated")
    print(results.pivot(rows, ["method", "metric"], "split").round(3).to_markdown())
