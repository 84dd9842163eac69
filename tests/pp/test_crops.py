import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import spatiaflow as sf
from spatiaflow import _io


def test_a_crop_may_fit_its_cell_and_says_its_scale():
    sdata = sf.datasets.simulated_tissue(60, seed=0)
    crops = sf.pp.crops(sdata, crop_um=None, crop_pixels=24, image_key="fluorescence")
    polygons = sdata["nuclei"].loc[sdata["table"].obs["cell_id"]]
    side = 1.25 * np.maximum(polygons.bounds.maxx - polygons.bounds.minx, polygons.bounds.maxy - polygons.bounds.miny)
    assert np.ptp(crops.scale) > 0.05
    np.testing.assert_allclose(crops.scale * 24, side, atol=2)  # whole pixels of 0.5 µm, two of each
    order = np.array([7, 3, 50])
    assert torch.equal(crops.read(order), torch.stack([crops.take(np.array([i])).read([0])[0] for i in order]))
    assert crops.read(order).shape == (3, 4, 24, 24)


def test_pixels_of_other_cells_are_left_out():
    """Against the polygon itself, pixel by pixel."""
    import shapely

    sdata = sf.datasets.simulated_tissue(60, seed=0)
    whole = sf.pp.crops(sdata, crop_um=12.0, crop_pixels=24, image_key="fluorescence")
    own = (
        sf.pp.crops(sdata, crop_um=12.0, crop_pixels=24, own_pixels=True, image_key="fluorescence")
        .read(range(60))
        .numpy()
    )
    polygons = sdata["nuclei"].loc[sdata["table"].obs["cell_id"]].geometry
    size = 12 / whole.mpp
    for crop, full, polygon, (x, y) in zip(own, whole.read(range(60)).numpy(), polygons, whole.xy):
        left, top = np.ceil(x - size / 2 - 0.5 - 1e-6), np.ceil(y - size / 2 - 0.5 - 1e-6)
        grid = np.meshgrid((left + np.arange(24) + 0.5) * whole.mpp, (top + np.arange(24) + 0.5) * whole.mpp)
        inside = shapely.contains_xy(polygon, *grid)
        np.testing.assert_array_equal(crop, full * inside)
    assert (own == 0).mean() > 0.3


def test_tiles_are_the_sums_of_their_cells():
    sdata = sf.datasets.simulated_tissue(300, seed=0)
    tiles, table = sf.pp.tiles(sdata, tile_um=40), sdata["table"]
    members, (slide,) = tiles.uns["tiles"]["members"], _io.places(sdata)
    assert (members >= 0).all() and tiles.n_obs > 4
    for t in range(tiles.n_obs):
        mine = members == t
        np.testing.assert_array_equal(tiles.X[t].toarray()[0], table.X[mine].sum(0).A1)
        assert tiles.obs["n_cells"].iloc[t] == mine.sum() > 0
        off = np.abs(slide.xy[mine] - tiles.obsm["spatial"][t] * slide.mpp)
        assert off.max() <= 20
    assert tiles.X.sum() == table.X.sum()


def test_tiles_of_an_anndata_have_pictures(slide):
    adata = slide("a")
    adata.uns["spatial"]["a"]["images"] = {"hires": np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)}
    tiles = sf.pp.tiles(adata, tile_um=600)
    crops = sf.pp.crops(tiles, crop_um=600, crop_pixels=16, image_key="hires")
    assert crops.read(range(tiles.n_obs)).shape == (tiles.n_obs, 3, 16, 16)
    np.testing.assert_allclose(crops.scale, 600 / 16)


BAD_CROPS = {
    "several slides": ({"library_key": "section"}, ValueError, "give library_id="),
    "no such slide": ({"library_key": "section", "library_id": "z"}, KeyError, "no slide 'z'"),
    "no polygons": ({"own_pixels": True}, ValueError, "need polygons or labels"),
    "no width": ({"crop_um": 0}, ValueError, "crop_um"),
}


@pytest.mark.parametrize("case", BAD_CROPS)
def test_bad_crops_are_a_clear_error(slide, case):
    adata = slide("a")
    adata.obs["section"] = np.where(np.arange(adata.n_obs) < 70, "x", "y")
    adata.uns["spatial"]["a"]["images"] = {"hires": np.zeros((600, 600, 3), np.uint8)}
    kwargs, error, message = BAD_CROPS[case]
    with pytest.raises(error, match=message):
        sf.pp.crops(adata, mpp=0.5, **({"image_key": "hires"} | kwargs))


def test_tiles_pool_slots_and_stand_in_the_spatialdata(tmp_path):
    import spatialdata as sd

    sdata = sf.datasets.simulated_tissue(300, seed=2)
    table, rng = sdata["table"], np.random.default_rng(0)
    table.obsm["E_niche"] = rng.normal(size=(table.n_obs, 3)).astype(np.float32)
    table.uns["E"] = {"params": {"model_sha256": "x"}}
    frame = pd.DataFrame(rng.normal(size=(table.n_obs, 2)), table.obs_names, ["area", "length"])
    frame.iloc[::3, 0] = np.nan
    table.obsm["morphology"] = frame
    tiles = sf.pp.tiles(sdata, tile_um=40, groupby="state", pool=["E_niche", "morphology"], key_added="tiles")
    members = tiles.uns["tiles"]["members"]
    for t in range(tiles.n_obs):
        np.testing.assert_allclose(tiles.obsm["E_niche"][t], table.obsm["E_niche"][members == t].mean(0), rtol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tile none of whose cells is measured
            expected = np.nanmean(frame[members == t], 0)
        np.testing.assert_allclose(tiles.obsm["morphology"].iloc[t], expected, rtol=1e-5)
    assert tiles.uns["E"] == table.uns["E"]
    (slide,) = _io.places(sdata, _io.Where(table_key="tiles"))
    np.testing.assert_allclose(slide.xy, tiles.obsm["spatial"], rtol=1e-6)
    sdata.write(tmp_path / "a.zarr")
    again = sd.read_zarr(tmp_path / "a.zarr")["tiles"]
    np.testing.assert_allclose(again.obsm["state"], tiles.obsm["state"])
    sf.pp.tiles(sdata, tile_um=60, key_added="tiles")  # our own may be replaced
    assert sdata["tiles"].n_obs < tiles.n_obs
    with pytest.raises(ValueError, match="another element called 'table'"):
        sf.pp.tiles(sdata, key_added="table")
    with pytest.raises(KeyError, match="obsm has no 'nothing' to pool"):
        sf.pp.tiles(sdata, pool=["nothing"])
