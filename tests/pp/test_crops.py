import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.pp._crops import Crops, slide_crops


def crops_of(image, xy, width=6, pixels=6):
    return Crops(_io.open_image(image, True)[0], np.asarray(xy, float), width, pixels, True, ("a", "b"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_crops_equal_a_loop_over_slices(dtype):
    rng = np.random.default_rng(0)
    image = (rng.random((2, 90, 70)) * 200).astype(dtype)
    xy = rng.uniform(5, 65, (40, 2))
    found = crops_of(image, xy).read(np.arange(40))
    assert found.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    for crop, (x, y) in zip(found.numpy(), xy):
        left, top = int(np.ceil(x - 3.5 - 1e-6)), int(np.ceil(y - 3.5 - 1e-6))
        np.testing.assert_array_equal(crop, image[:, top : top + 6, left : left + 6])


def test_rows_come_in_the_order_asked_for_and_in_batches():
    rng = np.random.default_rng(1)
    image, xy = rng.integers(0, 255, (2, 5000, 60)).astype(np.uint8), rng.uniform(5, [55, 4995], (50, 2))
    crops = crops_of(image, xy)
    whole = crops.read(np.arange(50))
    order = rng.permutation(50)[:20]
    assert torch.equal(crops.read(order), whole[order])
    seen = []
    for rows, batch in crops.batches(8, order):
        assert len(rows) <= 8
        assert torch.equal(batch, whole[rows])
        seen += rows.tolist()
    assert sorted(seen) == sorted(order)
    assert crops.read(np.array([], int)).shape == (0, 2, 6, 6)


def test_background_and_bright_end_of_each_channel():
    image = np.zeros((2, 100, 100), np.uint16)
    image[0] = np.arange(100)
    image[1] = 7
    xy = np.stack(np.meshgrid(np.arange(5, 96, 10), np.arange(5, 96, 10)), -1).reshape(-1, 2)
    low, high = crops_of(image, xy, 10, 10).intensity(low=0, high=100)[0]
    assert (low, high) == (0, 99)
    flat = crops_of(image, xy, 10, 10).intensity()[1]
    assert flat[1] > flat[0] == 7  # a constant channel is not divided by zero


@pytest.mark.parametrize("pixels", [24, 12])
def test_a_crop_is_what_lies_around_the_cell(pixels):
    """The mean of a crop of simulated tissue, at two resolutions, is that of the pixels inside its µm."""
    sdata = sf.datasets.simulated_tissue(60, seed=0)
    slide = _io.slides(sdata)[0]
    crops = slide_crops(sdata, slide, crop_um=12.0, pixels=pixels, image_key="fluorescence")
    image = np.asarray(sdata["fluorescence"].data).astype(float)
    found = crops.read(np.arange(60)).float().mean((2, 3)).numpy()
    for mean, (x, y) in zip(found, slide.xy / 0.5):
        if 13 < x < image.shape[2] - 13 and 13 < y < image.shape[1] - 13:
            left, top = int(np.ceil(x - 12.5 - 1e-6)), int(np.ceil(y - 12.5 - 1e-6))
            np.testing.assert_allclose(mean, image[:, top : top + 24, left : left + 24].mean((1, 2)), atol=1.0)
    assert crops.channels == ("dapi", "bound", "rna", "prot")


def test_the_same_row_may_be_asked_for_twice():
    image, xy = np.random.default_rng(1).integers(0, 255, (2, 60, 60)).astype(np.uint8), np.array([[9.0, 9], [40, 30]])
    crops = crops_of(image, xy)
    assert torch.equal(crops.read([1, 0, 1]), crops.read([0, 1])[[1, 0, 1]])


def test_a_crop_may_fit_its_cell_and_says_its_scale():
    sdata = sf.datasets.simulated_tissue(60, seed=0)
    crops = sf.pp.crops(sdata, crop_um=None, pixels=24, image_key="fluorescence")
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
    whole = sf.pp.crops(sdata, crop_um=12.0, pixels=24, image_key="fluorescence")
    own = sf.pp.crops(sdata, crop_um=12.0, pixels=24, own_pixels=True, image_key="fluorescence").read(range(60)).numpy()
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
    members, (slide,) = tiles.uns["tiles"]["members"], _io.slides(sdata)
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
    crops = sf.pp.crops(tiles, crop_um=600, pixels=16, image_key="hires")
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
    (slide,) = _io.slides(sdata, table_key="tiles")
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
