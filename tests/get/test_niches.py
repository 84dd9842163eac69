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


def test_niches_found_in_each_object_alone_are_refused():
    one, other = (sf.datasets.simulated_tissue(300, seed=seed)["table"] for seed in (1, 2))
    for table in (one, other):
        sf.tl.cluster_niches(table, n_clusters=3, mpp=1, key_added="found")
    with pytest.raises(ValueError, match="clusters 'found' of objects '0' and '1' come from separate runs"):
        sf.get.niche_composition([one, other], key="found")
    sf.tl.cluster_niches(other, model=one, mpp=1, key_added="found")
    assert sf.get.niche_composition([one, other], key="found").shape == (2, 3)


def test_integers_are_the_same_niches_as_the_floats_that_missing_values_make_of_them(cells):
    one, other = cells[:6].copy(), cells.copy()
    one.obs["niche"], other.obs["niche"] = [0, 0, 1, 2, 0, 1], [0, 0, 1, 2, 0, 1, np.nan]
    assert sf.get.niche_composition([one, other]).columns.tolist() == ["0", "1", "2"]


def test_clusters_found_in_each_object_alone_are_refused_unless_the_user_names_them():
    tables = [sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (1, 2)]
    for table in tables:
        sf.tl.cluster_cells(table, resolution=0.5)
    with pytest.raises(ValueError, match="clusters 'cell_cluster' of objects '0' and '1' come from separate runs"):
        sf.get.niche_composition(tables, key="cell_cluster")
    for table in tables:
        names = {one: f"type {one}" for one in table.obs["cell_cluster"].cat.categories}
        table.obs["cell_cluster"] = table.obs["cell_cluster"].cat.rename_categories(names)
    assert len(sf.get.niche_composition(tables, key="cell_cluster")) == 2
    sf.tl.cluster_cells(tables, resolution=0.5)
    assert len(sf.get.niche_composition(tables, key="cell_cluster")) == 2


def test_a_sample_of_several_objects_is_told_of(cells, caplog, monkeypatch):
    monkeypatch.setattr(sf._settings.logger, "propagate", True)
    caplog.set_level("INFO", logger=sf._settings.logger.name)
    found = sf.get.niche_composition({"x": cells, "y": cells.copy()}, by="sample", counts=True)
    assert found.loc["a"].tolist() == [4, 2, 0]
    assert "2 samples of obs['sample'] get the cells of several objects, such as 'a' of 'x', 'y'" in caplog.text
