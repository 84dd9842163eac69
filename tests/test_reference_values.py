"""Weights give what they gave when they were saved: no rebuilding moves a number.

``python tests/test_reference_values.py`` writes the values anew (only when a number is meant to move).
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import spatiaflow as sf

DATA = Path(__file__).parent / "data"
FILE = DATA / "reference_values.npz"
HIDDEN = ["KRT19", "COL1A1", "CFTR", "CD3E", "VWF", "ACTA2"]


@cache
def simulated():
    """A simulated slide, embedded from its image."""
    sdata = sf.datasets.simulated_tissue(300, seed=77)
    sf.tl.embed_spatia(sdata, modalities="image", image_key="fluorescence")
    return sdata


@cache
def pancreas():
    """A corner of the public region, embedded from images and genes."""
    sdata = sf.datasets.xenium_pancreas()
    table = sdata["table"]
    x, y = np.asarray(table.obsm["spatial"]).T
    inside = (x < np.quantile(x, 0.3)) & (y < np.quantile(y, 0.3))
    sdata["table"] = table[inside & (np.asarray(table.X.sum(1)).ravel() >= 15)].copy()
    sf.tl.embed_spatia(sdata)
    return sdata


def embeddings(sdata):
    return {level: sdata["table"].obsm[f"X_spatia_{level}"] for level in ("cell", "niche", "tissue")}


def embed_simulated():
    return embeddings(simulated())


def embed_pancreas():
    return embeddings(pancreas())


def generate_simulated():
    made = sf.tl.generate_morphology(
        simulated(),
        source="A",
        target="B",
        model="morphology-simulated-small",
        image_key="fluorescence",
        random_state=0,
    )
    return {"X": made.X, "image": made.obsm["image"].reshape(made.n_obs, -1)[:, ::37]}


def generate_pancreas():
    state = "COL5A2/THBS2"
    model = "morphology-pancreas-small"
    made = sf.tl.generate_morphology(pancreas(), source=state, target=state, model=model, random_state=0)
    return {"X": made.X, "image": made.obsm["image"].reshape(made.n_obs, -1)[:, ::37]}


def impute_by_model():
    table = pancreas()["table"]
    hidden = table[:, ~table.var_names.isin(HIDDEN)].copy()
    names = [gene for gene in HIDDEN if gene in table.var_names]
    sf.tl.impute_genes(hidden, model="imputation-pancreas-small", genes=names)
    return {"mean": hidden.obsm["imputed"], "std": hidden.obsm["imputed_std"]}


def impute_by_reference():
    table = simulated()["table"]
    query = table[150:, table.var["driver"] != "morphology"].copy()
    sf.tl.impute_genes(query, reference=table[:150].copy(), random_state=0)
    return {"mean": query.obsm["imputed"], "std": query.obsm["imputed_std"]}


def predict_spots():
    """By a small model that version 0.2.0 saved."""
    adata = sf.pp.tiles(encoded(0), tile_um=20, pool=["X_texture"])
    sf.tl.predict_expression(adata, model=DATA / "stflow.safetensors", n_samples=2, random_state=0)
    return {"mean": adata.obsm["stflow"], "std": adata.obsm["stflow_std"], "ood": adata.obs["stflow_ood"].to_numpy()}


def encoded(seed):
    sdata = sf.datasets.simulated_tissue(300, seed=seed)
    sf.pp.encode_patches(sdata, image_key="he", patch_um=64)
    return sdata


SIMULATED = (embed_simulated, generate_simulated, impute_by_reference, predict_spots)
REAL = (embed_pancreas, generate_pancreas, impute_by_model)


def summary(values):
    """The first rows, and mean and standard deviation of every column."""
    values = np.asarray(values, np.float64)
    return np.concatenate([np.atleast_2d(values.T).T[:12].ravel(), values.mean(0).ravel(), values.std(0).ravel()])


def deviation(run):
    """Largest difference to the stored values, relative to the largest value of each array above 1."""
    found = {f"{run.__name__}/{name}": summary(values) for name, values in run().items()}
    with np.load(FILE) as stored:
        known = {name: stored[name] for name in stored.files if name.startswith(f"{run.__name__}/")}
    assert set(found) == set(known)
    return max(float(np.abs(found[name] - known[name]).max() / max(1.0, np.abs(known[name]).max())) for name in known)


@pytest.mark.parametrize("run", SIMULATED, ids=lambda run: run.__name__)
def test_simulated_tissue(run):
    assert deviation(run) <= 1e-5


@pytest.mark.parametrize("run", REAL, ids=lambda run: run.__name__)
def test_real_tissue(run, mirror):
    with sf.settings.override(mirror=str(mirror)):
        assert deviation(run) <= 1e-5


if __name__ == "__main__":
    found = {f"{run.__name__}/{name}": summary(values) for run in SIMULATED + REAL for name, values in run().items()}
    np.savez_compressed(FILE, **{name: values.astype(np.float32) for name, values in found.items()})
