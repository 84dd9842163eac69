"""Pairs of states and their confidence.

python benchmarks/pairing.py planted                                confidence and matching on planted cells; 50,000 x 50,000
python benchmarks/pairing.py spoiled pancreas.zarr --cache features cells of other lineages among the sources of real tissue
"""

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import roc_auc_score

import results
import spatiaflow as sf

N_GENES, N_LATENT, DEPTH = 200, 6, 300
SIZES = [(20, 20), (20, 500), (20, 5000), (5000, 20), (50, 50), (200, 200), (500, 500), (1000, 1000), (5000, 5000)]


def planted(n_a, n_b, *, seed, unmatched=0.0, depth=DEPTH, twins=False):
    """Cells of states A and B with six latent directions; all of B are shifted, some of A have no counterpart in B.

    With ``twins`` the cells of B are those of A. Returns the table and the latent directions.
    """
    rule, rng = np.random.default_rng(7), np.random.default_rng([seed, n_a, n_b])
    w = 0.6 * rule.normal(size=(N_LATENT, N_GENES))
    shift = 0.5 * rule.normal(size=N_GENES) * (rule.random(N_GENES) < 0.3)
    gone = 2.0 * rule.normal(size=N_GENES) * (rule.random(N_GENES) < 0.5)
    latent = rng.normal(size=(n_a + n_b, N_LATENT)).astype(np.float32)
    if twins:
        latent[n_a:] = latent[:n_b]
    alone = np.r_[rng.random(n_a) < unmatched, np.zeros(n_b, bool)]
    state = np.repeat([0, 1], [n_a, n_b])
    parts = []
    for rows in np.array_split(np.arange(n_a + n_b), max(1, (n_a + n_b) // 5000)):
        log = latent[rows] @ w + state[rows, None] * shift + alone[rows, None] * gone
        rate = np.exp(log) / np.exp(log).sum(1, keepdims=True)
        counts = rng.poisson(rate * depth * rng.lognormal(0, 0.3, (len(rows), 1)))
        parts.append(sparse.csr_matrix(counts.astype(np.float32)))
    obs = pd.DataFrame({"state": pd.Categorical(np.where(state, "B", "A")), "alone": alone})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return ad.AnnData(sparse.vstack(parts, format="csr"), obs=obs), latent


def pair(adata, niche_key=None, **settings):
    config = sf.models.PairingConfig(**settings)
    sf.tl.pair_transitions(adata, transitions=[("A", "B")], groupby="state", niche_key=niche_key, config=config)
    return adata.uns["transitions"]


def auc(adata, found) -> float:
    """Whether sources without a counterpart have less confidence than the others."""
    return roc_auc_score(~adata.obs["alone"].loc[found["source"]].to_numpy(), found["confidence"])


def by_size(seed: int) -> dict[tuple[int, int], float]:
    """Mean confidence by the size of the group."""
    repeats = [10 if min(size) < 50 else 1 for size in SIZES]  # a few cells alone say little
    parts = [planted(*size, seed=100 * seed + i)[0] for size, k in zip(SIZES, repeats) for i in range(k)]
    adata = ad.concat(parts, index_unique="-")
    adata.obs["group"] = np.repeat([f"{i:03d}" for i in range(len(parts))], [part.n_obs for part in parts])
    mean = pair(adata, niche_key="group").groupby("niche")["confidence"].mean().to_numpy()
    return dict(zip(SIZES, (part.mean() for part in np.split(mean, np.cumsum(repeats)[:-1]))))


def on_planted(a, table: results.Table) -> None:
    for seed in range(a.seeds):
        if not table.lacks("simulated", "1000 x 1000", seed, ["sample", "argmax"]):
            continue
        for size, mean in by_size(seed).items():
            table.add(
                "simulated", "{} x {}".format(*size), seed, "pair_transitions", {"mean confidence, by size": mean}
            )
        adata, _ = planted(500, 500, seed=seed, unmatched=0.15)
        for confidence in ("mass", "entropy", "peak"):
            value = auc(adata, pair(adata, confidence=confidence))
            table.add("simulated", "500 x 500", seed, confidence, {"AUC of unmatched": value})
        for depth in (300, 100, 30, 10):
            value = pair(planted(500, 500, seed=seed, depth=depth)[0])["confidence"].mean()
            table.add(
                "simulated", "500 x 500", seed, "pair_transitions", {f"mean confidence, {depth} counts a cell": value}
            )
        adata, latent = planted(1000, 1000, seed=seed, twins=True, depth=20_000)
        for pairs in ("sample", "argmax"):
            found = pair(adata, unbalanced=None, epsilon=0.005, pairs=pairs)
            ends = [latent[adata.obs_names.get_indexer(found[side])] for side in ("source", "target")]
            near = np.linalg.norm(ends[0] - ends[1], axis=1) < 0.2 * np.sqrt(2 * N_LATENT)
            table.add("simulated", "1000 x 1000", seed, pairs, {"planted twins found": near.mean()})
        error = adata.uns["transition_plan"]["problems"]["marginal_error"].max()
        table.add("simulated", "1000 x 1000", seed, "pair_transitions", {"marginal error, balanced": error})
    size = f"{a.large} x {a.large}"
    if a.large and table.lacks("simulated", size, 0, "run"):
        adata, _ = planted(a.large, a.large, seed=0, unmatched=0.15)
        start = time.perf_counter()
        found = pair(adata)
        seconds, dropped = time.perf_counter() - start, adata.uns["transition_plan"]["problems"]["dropped"].mean()
        table.add("simulated", size, 0, "mass", {"AUC of unmatched": auc(adata, found)})
        table.add("simulated", size, 0, "pair_transitions", {"mass beyond the 32 largest": dropped})
        table.add_run("simulated", size, 0, seconds=seconds)
    spread = results.select(results.read("pairing"), metric="mean confidence, by size").groupby("split")["value"].mean()
    print(f"confidence over group sizes: {spread.min():.3f} to {spread.max():.3f}, range {np.ptp(spread):.3f}")


def spoiled(a, table: results.Table) -> None:
    """Whether the confidence of pairs tells sources of other lineages, which have no counterpart, from those of the state."""
    from morphology_weights import VARIANTS, paired

    for seed in range(a.seeds):
        if len(results.select(results.read("pairing"), split="train", seed=seed)) and not a.again:
            continue
        cells = paired(a.store, a.cache, spoiled=VARIANTS["spoiled"]["spoiled"], seed=seed)[0]["table"]
        pairs = cells.uns["transitions"]
        alien = cells.obs["spoiled"].loc[pairs["source"]].to_numpy()
        for name in pairs["transition"].unique():
            here = (pairs["transition"] == name).to_numpy()
            if not alien[here].any():  # a control between halves of a state
                continue
            mean = pairs["confidence"][here].groupby(alien[here]).mean()
            table.add(f"pancreas:{name}", "train", seed, "pair_transitions", {
                "pairs": here.sum(), "share of aliens": alien[here].mean(),
                "AUC of confidence": roc_auc_score(~alien[here], pairs["confidence"][here]),
                "confidence of own": mean[False], "confidence of aliens": mean[True],
                "median counts a source": np.median(np.asarray(cells[pairs["source"][here]].X.sum(1))),
            })  # fmt: skip


COMMANDS = {"planted": on_planted, "spoiled": spoiled}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("what", choices=list(COMMANDS))
    out.add_argument("store", nargs="?", help="SpatialData of the slide, for spoiled")
    out.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--large", type=int, default=50_000, help="cells a side of the large problem; 0: none")
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.what](a, results.Table("pairing", again=a.again))
