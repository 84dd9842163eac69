import numpy as np
import pytest
import spatialdata as sd

from spatiaflow import _io
from spatiaflow.datasets import simulated_tissue
from spatiaflow.datasets._simulate import AREA, AREA_NICHE, AREA_STATE_B, MPP


@pytest.fixture(scope="module")
def tissue():
    return simulated_tissue(1500, seed=3)


def test_same_seed_same_slide_other_seed_same_rules(tissue):
    again, other = simulated_tissue(1500, seed=3), simulated_tissue(300, seed=4)
    np.testing.assert_array_equal(again["he"].data.compute(), tissue["he"].data.compute())
    np.testing.assert_array_equal(again["table"].X.toarray(), tissue["table"].X.toarray())
    assert list(other["table"].var_names) == list(tissue["table"].var_names)
    assert other["table"].var["driver"].equals(tissue["table"].var["driver"])


def test_counts_have_the_planted_rates(tissue):
    table = tissue["table"]
    rate, library = table.layers["rate"].astype(float), table.obs["library"].to_numpy()
    np.testing.assert_allclose(rate.sum(1), 1, atol=1e-5)
    expected, found = (library[:, None] * rate).sum(0), np.asarray(table.X.sum(0)).ravel()
    np.testing.assert_allclose(found, expected, rtol=0.08)
    mean = library[:, None] * rate
    variance = ((table.X.toarray() - mean) ** 2).mean() / (mean + mean**2 / table.uns["planted"]["theta"]).mean()
    assert variance == pytest.approx(1, abs=0.2)


def test_genes_follow_their_driver(tissue):
    table = tissue["table"]
    y = np.log1p(table.X.toarray() / table.obs["library"].to_numpy()[:, None] * 1e4)
    y = dict(zip(table.var_names, y.T))
    obs = table.obs
    inside = obs[obs["cell_type"] == "fibroblast"]
    gland, stroma = ((obs.index.isin(inside.index)) & (obs["niche"] == n) for n in ("gland", "stroma"))
    assert y["NICHE_gland1"][gland].mean() > y["NICHE_gland1"][stroma].mean() + 0.5
    assert y["TYPE_lymphocyte1"][obs["cell_type"] == "lymphocyte"].mean() > y["TYPE_lymphocyte1"].mean() + 0.5
    assert np.corrcoef(y["MORPH1"], np.log(obs["area_um2"]))[0, 1] > 0.3
    assert np.corrcoef(y["MORPH2"], np.log(obs["area_um2"]))[0, 1] < -0.3
    assert y["STATE1"][obs["state"] == "A"].mean() > y["STATE1"][obs["state"] == "B"].mean() + 0.5


def test_niche_does_not_give_the_type(tissue):
    shares = tissue["table"].obs.groupby("niche", observed=True)["cell_type"].value_counts(normalize=True)
    assert 0.5 < shares.max() < 0.8
    assert shares.min() > 0.03


def test_morphology_is_the_planted_one(tissue):
    obs, shapes = tissue["table"].obs, tissue["nuclei"]
    area = shapes.geometry.area.loc[obs.index].to_numpy()
    np.testing.assert_allclose(area, obs["area_um2"], rtol=0.03)  # a polygon of 24 corners is 1 % smaller
    for (kind, niche, state), part in obs.groupby(["cell_type", "niche", "state"], observed=True):
        if len(part) >= 40:
            planted = AREA[kind] * AREA_NICHE[niche] * (AREA_STATE_B if state == "B" else 1)
            assert part["area_um2"].mean() == pytest.approx(planted, rel=0.06)


def test_state_may_act_by_niche():
    table = simulated_tissue(6000, seed=5, state_by_niche=True)["table"]
    planted, cells = table.uns["planted"], table.obs[table.obs["cell_type"] == "epithelial"]
    for niche, part in cells.groupby("niche", observed=True):
        mean = part.groupby("state", observed=True)[["area_um2", "axis_ratio"]].mean()
        found = mean.loc["B"] / mean.loc["A"]
        assert found["area_um2"] == pytest.approx(planted["area_state_B"][niche], rel=0.06)
        assert found["axis_ratio"] == pytest.approx(planted["axis_ratio_state_B"][niche], rel=0.03)
    assert len(set(planted["area_state_B"].values())) == len(set(planted["axis_ratio_state_B"].values())) == 3


def test_images_show_the_polygons(tissue):
    he, dapi = tissue["he"].data.compute(), tissue["fluorescence"].sel(c="dapi").data.compute()
    x, y = (tissue["table"].obsm["spatial"] / MPP).astype(int).T
    assert he.shape == (3, *dapi.shape)
    assert he[0, y, x].mean() < 0.75 * np.median(he[0])  # hematoxylin takes red away
    assert dapi[y, x].mean() > 3 * np.median(dapi)


def test_positions_are_micrometres(tissue):
    (slide,) = _io.places(tissue)
    np.testing.assert_allclose(slide.xy, tissue["table"].obsm["spatial"], atol=0.3)
    assert slide.mpp == 1.0


def test_zarr_round_trip(tmp_path):
    tissue = simulated_tissue(60)
    tissue.write(tmp_path / "t.zarr")
    again = sd.read_zarr(tmp_path / "t.zarr")
    np.testing.assert_array_equal(again["table"].X.toarray(), tissue["table"].X.toarray())
    assert again["table"].uns["planted"]["theta"] == tissue["table"].uns["planted"]["theta"]
    assert _io.places(again)[0].mpp == 1.0


def test_too_small_is_refused():
    with pytest.raises(ValueError, match="n_cells"):
        simulated_tissue(3)
    with pytest.raises(ValueError, match="n_genes"):
        simulated_tissue(100, n_genes=5)
