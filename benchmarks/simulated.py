"""Expression from histology where the truth is known: are planted genes recovered, and are the intervals right?

    python benchmarks/simulated.py --seeds 3

Trains on three simulated slides and predicts a fourth. By what drives the genes: Pearson of STFlow, of ridge and of
smoothed ridge with the counts; of the planted rates themselves with the counts (no predictor can do better); Pearson of
STFlow with the planted rates; coverage of 90 % intervals; CRPS and interval score beside each gene's training
distribution and, for CRPS, beside the law that made the counts.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import spatiaflow as sf
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.simple import gene_pearson


def log_expression(table, genes):
    counts = table.X.toarray()
    return log_normalize(counts, counts.sum(1), 1e4)[:, table.var_names.get_indexer(genes)]


def one(seed: int, n_cells: int) -> pd.DataFrame:
    slides = [sf.datasets.simulated_tissue(n_cells, seed=10 * seed + i) for i in range(4)]
    for slide in slides:
        sf.pp.encode_patches(slide, image_key="he", patch_um=64)
    model = sf.tl.train_stflow(slides[:3], genes=list(slides[0]["table"].var_names), random_state=seed)
    test, genes = slides[3], model.genes
    sf.tl.predict_expression(test, model=model, n_samples=10, random_state=seed)
    table = test["table"]
    y, mean, std = log_expression(table, genes), table.obsm["stflow"], table.obsm["stflow_std"]
    rate = table[:, genes].layers["rate"].astype(float)
    rng, library = np.random.default_rng(seed), table.obs["library"].to_numpy()
    theta = table.uns["planted"]["theta"]
    sizes = rng.choice(
        library, (200, len(table))
    )  # the law that made the counts, library unknown as it is to the model
    oracle = np.stack([log_normalize(rng.poisson(rng.gamma(theta, s[:, None] * rate / theta)), s, 1e4) for s in sizes])
    draws = model.law.sample(mean.astype(float), std.astype(float), 200, seed)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
    training = np.concatenate([log_expression(s["table"], genes) for s in slides[:3]])
    grid = np.quantile(training, (np.arange(100) + 0.5) / 100, axis=0)[:, None] * np.ones((1, len(y), 1))
    flat = [np.tile(np.quantile(training, q, axis=0), (len(y), 1)) for q in (0.05, 0.95)]
    features, xy = table.obsm["X_texture"], table.obsm["spatial"]
    columns = {
        "STFlow": gene_pearson(y, mean), "ridge": gene_pearson(y, model.simple_prediction(features)),
        "smoothed ridge": gene_pearson(y, model.simple_prediction(features, xy)),
        "planted rates": gene_pearson(y, np.log(rate)), "STFlow with planted rates": gene_pearson(np.log(rate), mean),
        "coverage": ((y >= low) & (y <= high)).mean(0), "CRPS": sf.metrics.crps_ensemble(y, draws).mean(0),
        "CRPS training": sf.metrics.crps_ensemble(y, grid, fair=False).mean(0),
        "CRPS true law": sf.metrics.crps_ensemble(y, oracle).mean(0),
        "interval": sf.metrics.interval_score(y, low, high).mean(0),
        "interval training": sf.metrics.interval_score(y, *flat).mean(0), "skill": model.skill,
    }  # fmt: skip
    driver = table.var.loc[genes, "driver"].astype(str).to_numpy()
    return pd.DataFrame(columns | {"driver": driver, "seed": seed}, index=genes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-cells", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulated/expression.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = pd.concat([one(seed, args.n_cells) for seed in range(args.seeds)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.out)
    print(rows.groupby("driver").mean(numeric_only=True).drop(columns="seed").T.round(3).to_markdown())
    print("\nmean over seeds, standard deviation between seeds, of all genes:")
    print(rows.groupby("seed").mean(numeric_only=True).agg(["mean", "std"]).T.round(3).to_markdown())
