import warnings

import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf
from spatiaflow import _io


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
