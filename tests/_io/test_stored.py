"""Counts on disk equal those in memory."""

import pickle

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spatiaflow import _io


@pytest.fixture
def stored(tmp_path):
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(0.3, (500, 30)).astype(np.float32))
    adata = ad.AnnData(counts, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))
    adata.layers["half"] = counts * 0.5
    adata.layers["dense"] = counts.toarray()
    adata.write_zarr(tmp_path / "a.zarr")
    return tmp_path / "a.zarr", counts


def test_rows_in_any_order_and_in_a_vocabulary(stored):
    path, counts = stored
    found = _io.StoredCounts(path, "X")
    rows = np.random.default_rng(1).permutation(500)[:70]
    np.testing.assert_array_equal(found.named(np.arange(30), 30)[rows].toarray(), counts[rows].toarray())
    columns = np.full(30, -1)
    columns[[3, 7, 29]] = [4, 0, 2]
    some = found.take(rows).named(columns, 5)
    expected = np.zeros((70, 5))
    expected[:, [4, 0, 2]] = counts[rows][:, [3, 7, 29]].toarray()
    np.testing.assert_array_equal(some[np.arange(70)].toarray(), expected)
    np.testing.assert_array_equal(some.take(np.array([5, 2]))[np.array([1, 0])].toarray(), expected[[2, 5]])
    again = some.named(np.array([1, -1, 0, 2, -1]), 3)  # a vocabulary of a vocabulary
    np.testing.assert_array_equal(again[np.arange(70)].toarray(), expected[:, [2, 0, 3]])
    assert len(some) == 70
    assert some[np.array([], int)].shape == (0, 5)


def test_it_travels_without_what_it_has_read(stored):
    path, counts = stored
    found = _io.StoredCounts(path, "X").named(np.arange(30), 30)
    found[np.arange(500)]
    assert found._cache
    copy = pickle.loads(pickle.dumps(found))
    assert not copy._cache
    np.testing.assert_array_equal(copy[np.arange(9)].toarray(), counts[:9].toarray())


def test_what_is_not_raw_or_not_sparse_is_refused(stored):
    path, _ = stored
    with pytest.raises(ValueError, match="does not hold raw counts"):
        _io.StoredCounts(path, "layers/half")[np.arange(500)]
    with pytest.raises(ValueError, match="CSR"):
        _io.StoredCounts(path, "layers/dense")


def test_a_damaged_chunk_is_named(stored):
    path, _ = stored
    counts = _io.StoredCounts(path, "X")
    for chunk in (path / "X" / "data").rglob("*"):
        if chunk.is_file() and "json" not in chunk.name and chunk.name[0] != ".":
            chunk.write_bytes(b"\x07" * chunk.stat().st_size)
    with pytest.raises(OSError, match="X/data is damaged at chunk 0"):
        counts[np.arange(5)]
