import anndata as ad
import numpy as np
import pandas as pd

from spatiaflow import _io


def table(labels, run=None):
    out = ad.AnnData(obs=pd.DataFrame({"niche": pd.Categorical(labels)}, index=map(str, range(len(labels)))))
    if run is not None:
        out.uns["niche"] = {"params": {"clustering_sha256": run}}
    return out


def test_a_fingerprint_is_that_of_the_values():
    x = np.arange(6.0).reshape(2, 3)
    assert _io.fingerprint(x) == _io.fingerprint(np.asfortranarray(x)) != _io.fingerprint(x + 1e-12)
    assert len({_io.fingerprint(x), _io.fingerprint(x, x), _io.fingerprint(x[:1])}) == 3


def test_the_run_is_known_where_it_was_written():
    assert _io.clustering_of(table(["0", "1", None], "a"), "niche") == "a"
    assert _io.clustering_of(table([0, 1, 1], "a"), "niche") == "a"  # numbers of a file that lost its categories
    assert _io.clustering_of(table(["0", "1"]), "niche") == _io.clustering_of(table(["0"], "a"), "other") == ""


def test_names_of_the_user_need_no_run():
    assert _io.clustering_of(table(["gland", "stroma"], "a"), "niche") == ""


def test_objects_of_different_runs_are_told():
    tables = {"x": table(["0", "1"], "a"), "y": table(["0", "1"]), "z": table(["0", "1"], "b")}
    assert _io.different_clusterings(tables, "niche") == ("x", "z")
    assert _io.different_clusterings({name: tables[name] for name in "xy"}, "niche") is None
    assert _io.different_clusterings({}, "niche") is None
