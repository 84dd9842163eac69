"""The pinned packages work together."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy.spatial import KDTree


@pytest.mark.slow
def test_scanpy_finds_neighbors_of_many_cells():
    """Above 4,096 cells scanpy leaves the search to pynndescent; some releases of the two do not fit."""
    x = np.random.default_rng(0).normal(size=(4_200, 4)).astype(np.float32)
    table = ad.AnnData(x)
    threads = torch.get_num_threads()
    sc.pp.neighbors(table, use_rep="X", n_neighbors=5)
    torch.set_num_threads(threads)  # numba lifts the limit, and tests after this one would be many times slower
    rows = np.arange(0, len(x), 20)
    nearest = KDTree(x).query(x[rows], k=5)[1][:, 1:]
    found = np.take_along_axis(table.obsp["distances"][rows].toarray() > 0, nearest, axis=1)
    assert found.mean() > 0.95
