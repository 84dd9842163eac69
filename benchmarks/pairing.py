"""Pairs of states and their confidence.

python benchmarks/pairing.py planted                                confidence and matching on planted cells; 50,000 x 50,000
python benchmarks/pairing.py spoiled pancreas.zarr --cache features cells of other lineages among the sources of real tissue
"""

import argparse
import resource
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import roc_auc_score

import spatiaflow as sf
import writing

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


def pair(adata, **options):
    sf.tl.pair_transitions(adata, **({"transitions": [("A", "B")], "groupby": "state"} | options))
    return adata.uns["transitions"]


def on_planted(a) -> None:
    rows = []
    for seed in range(a.seeds):
        repeats = [10 if min(size) < 50 else 1 for size in SIZES]  # a few cells alone say little
        parts = [planted(*size, seed=100 * seed + i)[0] for size, k in zip(SIZES, repeats) for i in range(k)]
        adata = ad.concat(parts, index_unique="-")
        adata.obs["group"] = np.repeat([f"{i:03d}" for i in range(len(parts))], [part.n_obs for part in parts])
        found = pair(adata, niche_key="group")
        mean = found.groupby("niche")["confidence"].mean().to_numpy()
        for size, part in zip(SIZES, np.split(mean, np.cumsum(repeats)[:-1])):
            rows.append(
                {
                    "question": "size of the group",
                    "sources": size[0],
                    "targets": size[1],
                    "seed": seed,
                    "value": part.mean(),
                }
            )
        adata, _ = planted(500, 500, seed=seed, unmatched=0.15)
        for confidence in ("mass", "entropy", "peak"):
            found = pair(adata, confidence=confidence)
            alone = adata.obs["alone"].loc[found["source"]].to_numpy()
            auc = roc_auc_score(~alone, found["confidence"])
            rows.append(
                {
                    "question": f"AUC of unmatched, {confidence}",
                    "sources": 500,
                    "targets": 500,
                    "seed": seed,
                    "value": auc,
                }
            )
        for depth in (300, 100, 30, 10):
            value = pair(planted(500, 500, seed=seed, depth=depth)[0])["confidence"].mean()
            rows.append(
                {"question": f"counts a cell {depth}", "sources": 500, "targets": 500, "seed": seed, "value": value}
            )
        adata, latent = planted(1000, 1000, seed=seed, twins=True, depth=20_000)
        for pairs in ("sample", "argmax"):
            found = pair(adata, unbalanced=None, epsilon=0.005, pairs=pairs)
            ends = [latent[adata.obs_names.get_indexer(found[side])] for side in ("source", "target")]
            near = np.linalg.norm(ends[0] - ends[1], axis=1) < 0.2 * np.sqrt(2 * N_LATENT)
            rows.append(
                {
                    "question": f"planted matching, {pairs}",
                    "sources": 1000,
                    "targets": 1000,
                    "seed": seed,
                    "value": near.mean(),
                }
            )
        error = adata.uns["transition_plan"]["problems"]["marginal_error"].max()
        rows.append(
            {"question": "marginal error, balanced", "sources": 1000, "targets": 1000, "seed": seed, "value": error}
        )
    n = a.large
    if n:
        adata, _ = planted(n, n, seed=0, unmatched=0.15)
        start = time.perf_counter()
        found = pair(adata)
        seconds = time.perf_counter() - start
        alone = adata.obs["alone"].loc[found["source"]].to_numpy()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for question, value in (
            ("seconds", seconds), ("peak GB", peak), ("AUC of unmatched, mass", roc_auc_score(~alone, found["confidence"])),
            ("mass beyond the 32 largest", adata.uns["transition_plan"]["problems"]["dropped"].mean()),
        ):  # fmt: skip
            rows.append({"question": question, "sources": n, "targets": n, "seed": 0, "value": value})
    writing.write("pairing-planted", rows)
    spread = pd.DataFrame(rows).query("question == 'size of the group'").groupby(["sources", "targets"])["value"].mean()
    print(f"confidence over group sizes: {spread.min():.3f} to {spread.max():.3f}, range {np.ptp(spread):.3f}")


def spoiled(a) -> None:
    """Whether the confidence of pairs tells sources of other lineages, which have no counterpart, from those of the state."""
    from morphology_weights import VARIANTS, paired

    rows = []
    for seed in range(a.seeds):
        table = paired(a.store, a.cache, spoiled=VARIANTS["spoiled"]["spoiled"], seed=seed)[0]["table"]
        pairs = table.uns["transitions"]
        alien = table.obs["spoiled"].loc[pairs["source"]].to_numpy()
        for name in pairs["transition"].unique():
            here = (pairs["transition"] == name).to_numpy()
            if not alien[here].any():  # a control between halves of a state
                continue
            mean = pairs["confidence"][here].groupby(alien[here]).mean()
            rows.append({
                "transition": name, "seed": seed, "pairs": here.sum(), "share of aliens": alien[here].mean(),
                "AUC of confidence": roc_auc_score(~alien[here], pairs["confidence"][here]),
                "confidence of own": mean[False], "confidence of aliens": mean[True],
                "median counts a source": np.median(np.asarray(table[pairs["source"][here]].X.sum(1))),
            })  # fmt: skip
    writing.write("pairing-spoiled", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["planted", "spoiled"])
    parser.add_argument("store", nargs="?", help="SpatialData of the slide, for spoiled")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", type=int, default=50_000, help="cells a side of the large problem; 0: none")
    a = parser.parse_args()
    {"planted": on_planted, "spoiled": spoiled}[a.what](a)
