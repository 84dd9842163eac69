"""Cells in pairs with embeddings that need no training, and a small generator of morphology that is trained on them."""

from functools import cache

import numpy as np
import pytest
from scipy.spatial import cKDTree

import spatiaflow as sf
from spatiaflow.train import morphology

TINY = {"objective": "pairs", "n_latent": 16, "width": 32, "n_layers": 2, "n_neighbors": 4}
IMAGE = {"image_key": "fluorescence"}


def tissue(seed, n=400):
    """A slide with embeddings that need no training: shares of genes, and their means over neighbours."""
    sdata = sf.datasets.simulated_tissue(n, seed=seed)
    table = sdata["table"]
    x = np.sqrt(table.X.toarray() / table.X.sum(1))[:, :20].astype(np.float32)
    near = cKDTree(table.obsm["spatial"]).query(table.obsm["spatial"], 30)[1]
    table.obsm["E_cell"], table.obsm["E_niche"], table.obsm["E_tissue"] = x, x[near[:, :10]].mean(1), x[near].mean(1)
    return sdata


def train(slide, *, use_rep="E", config=(), validation=0.2, max_epochs=2, **options):
    """The autoencoder has some seconds: what it can learn is tested with its own module."""
    config = sf.models.MorphologyConfig(**({"crop_um": 16.0, "crop_pixels": 16} | TINY | dict(config)))
    options |= {"use_rep": use_rep, "config": config, "validation": validation, "max_epochs": max_epochs}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morphology, "MAX_STEPS", 150)
        patch.setattr(morphology, "MIN_BATCHES", 30)
        return sf.tl.train_morphology(slide, **IMAGE, **options)


def generate(slide, model, **options):
    return sf.tl.generate_morphology(slide, **({"source": "A", "target": "B", "model": model} | IMAGE | options))


@cache
def paired_slide():
    """Do not write into it."""
    sdata = tissue(1)
    sf.pp.morphology_profile(sdata, **IMAGE)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B"), ("A", "A")], groupby="state", niche_key="niche")
    return sdata


@cache
def trained():
    """A model of its pairs, trained once. Do not write into it."""
    return train(paired_slide())
