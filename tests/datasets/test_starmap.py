"""STARmap: three mice with their layers, and the package that reads them."""

import sys

import pandas as pd
import pytest

import spatiaflow as sf
from spatiaflow import _io


def test_starmap_has_three_mice_with_the_layers_in_order(cortex, cache):
    import rdata

    assert cortex.obs["mouse"].value_counts().to_dict() == {"BZ5": 1049, "BZ9": 1053, "BZ14": 1088}
    assert cortex.n_vars == 166
    assert cortex.obs["cell_type"].nunique() == 15
    assert cortex.obs["layer"].cat.ordered
    assert list(cortex.obs["layer"].cat.categories) == ["L1", "L2/3", "L5", "L6"]
    depth = pd.Series(cortex.obsm["spatial"][:, 0], cortex.obs_names).groupby(
        [cortex.obs["mouse"], cortex.obs["layer"]], observed=True
    )
    assert (depth.mean().unstack().diff(axis=1).iloc[:, 1:] > 0).all(axis=None)  # layers lie at increasing depth
    most = pd.crosstab(cortex.obs["cell_type"], cortex.obs["layer"]).idxmax(axis=1)
    assert most[["eL2/3", "L5-1", "eL5-3", "eL6-1", "eL6-2"]].tolist() == ["L2/3", "L5", "L5", "L6", "L6"]

    raw = rdata.read_rda(cache / "starmap_mpfc" / "starmap_mpfc.RData")
    for name, counts in raw["starmap_cnts"].items():
        for i in (0, 500, 1000):
            cell = str(counts["dim_1"].values[i])
            mine = cortex[f"{name.split('_')[1]}_{cell}"]
            assert dict(zip(mine.var_names, mine.X.toarray()[0])) == dict(
                zip(map(str, counts["dim_0"].values), counts.values[:, i])
            )
            info = raw["starmap_info"][name].loc[cell]
            assert mine.obsm["spatial"][0].tolist() == [info["x"], info["y"]]
            assert mine.obs["cell_type"].iloc[0] == info["c"]
    assert len(_io.places(cortex, _io.Where(library_key="mouse", mpp=1))) == 3
    with pytest.raises(ValueError, match="the scale of slide 'BZ5' is unknown: give mpp="):
        _io.places(cortex, _io.Where(library_key="mouse"))


def test_starmap_says_what_to_install(cache, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rdata", None)
    with sf.settings.override(cache_dir=tmp_path):
        with pytest.raises(ImportError, match=r'pip install "spatiaflow\[datasets\]"'):
            sf.datasets.starmap_mpfc()
