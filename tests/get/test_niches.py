import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf


@pytest.fixture
def cells():
    obs = pd.DataFrame({"niche": pd.Categorical(list("001201") + [None]), "sample": list("aaabbbb")})
    obs.index = [f"c{i}" for i in range(7)]
    return ad.AnnData(np.ones((7, 1)), obs=obs)


def test_shares_of_each_sample_by_hand(cells):
    found = sf.get.niche_composition(cells, by="sample")
    np.testing.assert_allclose(found.loc["a", ["0", "1", "2"]], [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(found.loc["b", ["0", "1", "2"]], [1 / 3, 1 / 3, 1 / 3])
    assert found.attrs["n_cells"] == {"a": 3, "b": 3}  # a cell without a niche is left out


def test_objects_are_samples(cells):
    parts = {name: cells[cells.obs["sample"] == name].copy() for name in "ab"}
    expected = sf.get.niche_composition(cells, by="sample")
    pd.testing.assert_frame_equal(sf.get.niche_composition(parts)[expected.columns], expected, check_names=False)
    assert list(sf.get.niche_composition(list(parts.values())).index) == ["0", "1"]


def test_counts_and_the_order_of_samples(cells):
    counts = sf.get.niche_composition(cells, by="sample", counts=True)
    assert counts.to_numpy().tolist() == [[2, 1, 0], [1, 1, 1]]
    many = [cells[:1].copy() for _ in range(11)]
    assert list(sf.get.niche_composition(many).index) == [str(i) for i in range(11)]
    cells.obs["sample"] = pd.Categorical(cells.obs["sample"], ["c", "b", "a"])
    assert list(sf.get.niche_composition(cells, by="sample").index) == ["b", "a"]


def test_clear_errors(cells):
    with pytest.raises(KeyError, match="obs has no 'donor'.*cluster_niches"):
        sf.get.niche_composition(cells, by="donor")
    with pytest.raises(KeyError, match="obs has no 'domain'"):
        sf.get.niche_composition(cells, key="domain")
