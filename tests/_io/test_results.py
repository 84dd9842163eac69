import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse

from spatiaflow import _io

GENES = ["a", "b", "c"]


def table(n=4):
    out = ad.AnnData(sparse.csr_matrix(np.arange(3.0 * n).reshape(n, 3)), var=pd.DataFrame(index=GENES))
    out.obs_names = [f"cell_{i}" for i in range(n)]
    return out


def result(n=4):
    out = table(n)
    out.layers["std"] = np.ones((n, 3))
    out.uns["imputed"] = {
        "normalization": {"target_sum": 10.0}, "shared": ["a", "b"], "library_share": 0.5, "params": {"n_obs": n},
    }  # fmt: skip
    return out


def test_a_table_of_its_own_is_a_result_unless_a_slot_holds_it():
    own = result()
    assert _io.own_result(own, own, "imputed") is own
    for changed in (table(), result()):
        changed.layers.pop("std", None)  # values without their error are of another verb
        assert _io.own_result(changed, changed, "imputed") is None
    own.obsm["imputed"] = np.ones((4, 1))
    assert _io.own_result(own, own, "imputed") is None


def test_a_result_of_other_rows_is_refused():
    whole = sd.SpatialData(tables={"table": table(), "imputed": result()})
    assert _io.own_result(whole, whole["table"], "imputed") is whole["imputed"]
    whole["table"] = table()[[0, 2, 1]].copy()
    with pytest.raises(ValueError, match="the table 'imputed' has other rows than the table that it was computed from"):
        _io.own_result(whole, whole["table"], "imputed")


def test_cells_of_the_truth_are_found_by_name():
    truth = table()[[2, 0, 3, 1]].copy()
    np.testing.assert_array_equal(_io.same_cells(truth, table()), [1, 3, 0, 2])
    with pytest.raises(KeyError, match="truth has no cell 'cell_3'"):
        _io.same_cells(table(3), table())


def test_measured_values_are_normalised_as_the_result_is():
    counts, held = table(), result()
    library = counts.X.toarray()[:, :2].sum(1) / 0.5
    expected = np.log1p(counts.X.toarray()[:, [2]] * (10 / np.maximum(library, 1))[:, None])
    np.testing.assert_allclose(_io.log_expression(counts, ["c"], None, "imputed", held=held), expected)
    mixed = counts[[3, 1, 0, 2]].copy()
    np.testing.assert_allclose(_io.log_expression(counts, ["c"], None, "imputed", mixed, held), expected)


def test_a_slot_with_its_genes_is_a_table():
    data = table()
    data.obsm["imputed"], data.obsm["imputed_std"] = np.ones((4, 2), np.float32), np.full((4, 2), 0.5)
    data.uns["imputed"] = {
        "genes": ["x", "y"], "normalization": {"target_sum": 10.0}, "reliability": np.array([0.1, 0.2]),
    }  # fmt: skip
    found = _io.slot_as_anndata(data, "imputed")
    assert list(found.var_names) == ["x", "y"] and found.var["reliability"].tolist() == [0.1, 0.2]
    np.testing.assert_array_equal(found.layers["std"], data.obsm["imputed_std"])
    with pytest.raises(KeyError, match="no result 'other': there is 'imputed'; give key='imputed'"):
        _io.slot_as_anndata(data, "other")
