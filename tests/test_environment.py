"""The pinned packages work together."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy.spatial import KDTree


@pytest.mark.slow
def test_scanpy_finds_neighbors_of_many_cells():
    """Above 4,096 cells scanpy leaves the search to pynndescent; some releases of the two do not fit."""
    x = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)
    table = ad.AnnData(x)
    sc.pp.neighbors(table, use_rep="X", n_neighbors=5)
    rows = np.arange(0, len(x), 100)
    nearest = KDTree(x).query(x[rows], k=5)[1][:, 1:]
    found = np.take_along_axis(table.obsp["distances"][rows].toarray() > 0, nearest, axis=1)
    assert found.mean() > 0.95
