"""Cells of two states, of which one is the other after a shift, and their pairs."""

from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import spatiaflow as sf

W = np.random.default_rng(0).normal(size=(6, 120)) * 0.6
SHIFT = np.random.default_rng(1).normal(size=120) * (np.random.default_rng(2).random(120) < 0.3) * 0.5
GONE = np.random.default_rng(3).normal(size=120) * 2.0 * (np.random.default_rng(4).random(120) < 0.5)


def tissue(n_a, n_b, *, seed=0, unmatched=0.0, depth=300, same=False, niches=1, noise=0.0):
    """Cells of states A and B with six latent directions; B is shifted. Some of A have no counterpart in B."""
    rng = np.random.default_rng([seed, n_a, n_b])
    latent = rng.normal(size=(n_a + n_b, 6))
    if same:  # the cells of B are those of A
        latent[n_a:] = latent[:n_b]
    alone = np.r_[rng.random(n_a) < unmatched, np.zeros(n_b, bool)]
    state = np.r_[np.zeros(n_a), np.ones(n_b)]
    log = -1 + latent @ W + state[:, None] * SHIFT + alone[:, None] * GONE
    log = log + noise * rng.normal(size=log.shape)
    rate = np.exp(log) / np.exp(log).sum(1, keepdims=True)
    counts = rng.poisson(rate * depth * rng.lognormal(0, 0.3, (len(log), 1)))
    obs = pd.DataFrame(
        {"state": pd.Categorical(np.where(state, "B", "A")), "niche": rng.integers(0, niches, len(log)).astype(str)},
        index=[f"c{i}" for i in range(len(log))],
    )
    out = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs)
    out.obsm["spatial"] = rng.uniform(0, 500, (len(log), 2))
    out.obs["alone"] = alone
    return out, latent


FIELDS = {field.name for field in fields(sf.models.PairingConfig)}


def paired(adata, **options):
    config = sf.models.PairingConfig(**{name: options.pop(name) for name in FIELDS & set(options)})
    sf.tl.pair_transitions(adata, **({"transitions": [("A", "B")], "groupby": "state", "config": config} | options))
    return adata.uns["transitions"]
