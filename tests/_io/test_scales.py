"""Scales that are stated, an instrument's, or follow from an array."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._io import Where
from spatiaflow._io._scales import array_scale, remember


def visium(mpp=0.4, turn=0.0, n=12):
    """Spots of Visium: neighbours of a row are two columns and 100 µm apart."""
    row, col = np.meshgrid(np.arange(n), np.arange(2 * n), indexing="ij")
    row, col = (a[(row + col) % 2 == 0] for a in (row, col))
    um = np.column_stack([col * 50.0, row * 50.0 * np.sqrt(3)])
    c, s = np.cos(turn), np.sin(turn)
    return pd.DataFrame({"array_row": row, "array_col": col}), um @ [[c, s], [-s, c]] / mpp + 300


def square(mpp=0.5, n=10, seed=0):
    """Spots of legacy ST: printed where they should be within a tenth of their pitch."""
    row, col = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    um = np.column_stack([col, row]) * 200.0 + np.random.default_rng(seed).normal(0, 8, (n * n, 2))
    return pd.DataFrame({"array_row": row, "array_col": col}), um / mpp


def table_of(obs, xy, **uns):
    obs.index = [f"s{i}" for i in range(len(obs))]
    return ad.AnnData(np.ones((len(obs), 2), np.float32), obs=obs, obsm={"spatial": xy}, uns=uns)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 3.7])
@pytest.mark.parametrize("turn", [0, 0.3, np.pi / 2, np.pi])
def test_the_scale_of_visium_follows_from_its_array(mpp, turn):
    assert array_scale(*visium(mpp, turn))[0] == pytest.approx(mpp, rel=1e-6)


@pytest.mark.parametrize("mpp", [0.25, 2.8])
def test_the_scale_of_legacy_st_follows_from_its_array(mpp):
    assert array_scale(*square(mpp))[0] == pytest.approx(mpp, rel=0.02)


def test_the_scale_needs_an_array():
    obs, xy = visium()
    assert array_scale(obs.drop(columns="array_row"), xy) is None
    assert array_scale(obs.assign(array_row=0), xy) is None
    assert array_scale(obs, np.random.default_rng(0).uniform(0, 99, xy.shape)) is None
    obs, xy = square()
    assert array_scale(obs + 90, xy) is None  # no array of ST is so large


def test_visium_as_scanpy_reads_it_needs_no_scale():
    (slide,) = _io.places(table_of(*visium(0.4)))
    assert slide.mpp == pytest.approx(0.4)
    assert slide.pitch == pytest.approx(100)
    with pytest.warns(UserWarning, match="mpp=1 was given, but the array of Visium .* says 0.4 µm per pixel"):
        _io.places(table_of(*visium(0.4)), Where(mpp=1.0))


def test_what_is_stated_comes_before_the_array():
    table = table_of(*visium(0.4), spatial={"s": {"metadata": {"microns_per_pixel": 0.41}}})
    assert _io.places(table)[0].mpp == 0.41


@pytest.mark.parametrize("columns", [("x_centroid", "y_centroid"), ("center_x", "center_y")])
def test_positions_that_an_instrument_wrote_in_microns(columns):
    xy = np.random.default_rng(0).uniform(0, 90, (30, 2))
    obs = pd.DataFrame(xy, columns=columns)
    assert _io.places(table_of(obs, xy))[0].mpp == 1
    with pytest.raises(ValueError, match="the scale of slide 'slide' is unknown: give mpp="):
        _io.places(table_of(obs, xy * 2))


@pytest.mark.parametrize("value", ["0.5", 0, -1, np.nan, np.inf, True, [0.5]])
def test_a_stated_scale_must_be_a_positive_number(value):
    xy = np.random.default_rng(0).uniform(0, 90, (30, 2))
    table = table_of(pd.DataFrame(index=range(30)), xy, spatial={"s": {"metadata": {"microns_per_pixel": value}}})
    slot = r"uns\['spatial'\]\['s'\]\['metadata'\]\['microns_per_pixel'\] must be a positive number"
    with pytest.raises(ValueError, match=slot):
        _io.places(table)


@pytest.mark.parametrize(
    "entry", [{"is_single": True}, np.zeros((3, 2)), {"a": "text"}, {"is_single": np.bool_(True)}], ids=repr
)
def test_what_is_no_dict_is_no_slide(entry):
    table = table_of(*visium(0.4), spatial=entry)
    assert [slide.name for slide in _io.places(table)] == ["slide"]
    if isinstance(entry, dict):
        table.uns["spatial"] = entry | {"s": {"images": {}}}
        assert [slide.name for slide in _io.places(table)] == ["s"]


@pytest.mark.parametrize("part", ["images", "scalefactors", "metadata"])
def test_parts_of_a_library_are_dicts_on_their_own_level(part):
    with pytest.raises(ValueError, match="without the level of slides"):
        _io.places(table_of(*visium(), spatial={part: {}}))
    with pytest.raises(ValueError, match=rf"\['s'\]\['{part}'\] must be a dict; it is NoneType"):
        _io.places(table_of(*visium(), spatial={"s": {part: None}}))


def test_a_scale_given_once_is_remembered_beside_the_image():
    xy = np.random.default_rng(0).uniform(0, 90, (30, 2))
    table = table_of(pd.DataFrame(index=range(30)), xy, spatial={"s": {"images": {}}})
    remember(table, _io.places(table, Where(mpp=0.5)), 0.5)
    assert _io.places(table)[0].mpp == 0.5
    bare = table_of(pd.DataFrame(index=range(30)), xy)
    remember(bare, _io.places(bare, Where(mpp=0.5)), 0.5)
    assert "spatial" not in bare.uns


@pytest.fixture
def unscaled(slide):
    """A slide that does not say its scale, as its picture and as an object of each kind."""
    adata = slide(mpp=0.5)
    adata.obsm["spatial"] += 200  # all lie in the picture
    library = adata.uns["spatial"]["s0"]
    del library["metadata"]["microns_per_pixel"]
    library["images"]["hires"] = np.random.default_rng(0).integers(0, 255, library["images"]["hires"].shape, np.uint8)
    sdata = SpatialData(
        images={"he": Image2DModel.parse(library["images"]["hires"].transpose(2, 0, 1), dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(adata.obsm["spatial"] * 0.1, geometry=0, radius=5.0)},
    )
    table = ad.AnnData(adata.X, adata.obs.assign(region=pd.Categorical(["spots"] * adata.n_obs), id=range(adata.n_obs)))
    table.var_names = adata.var_names
    sdata["table"] = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    return {"AnnData": (adata, 0.5), "SpatialData": (sdata, 5.0)}


def mean_colour(patches):
    return patches.float().mean((2, 3))


mean_colour.mpp = 5.0


@pytest.mark.parametrize("kind", ["AnnData", "SpatialData"])
def test_a_scale_given_to_one_function_holds_for_the_next(unscaled, kind):
    data, mpp = unscaled[kind]
    table = data if kind == "AnnData" else data["table"]
    with pytest.raises(ValueError, match="is unknown: give mpp="):
        sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean")
    with pytest.raises(ValueError, match="many times the width"):
        sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean", mpp=mpp, patch_um=1e6)
    with pytest.raises(ValueError, match="is unknown"):  # a call that failed leaves nothing
        _io.places(data)
    other = sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean", mpp=mpp, copy=True)
    assert _io.places(other)[0].mpp == mpp
    with pytest.raises(ValueError, match="is unknown"):  # and a copy is another object
        _io.places(data)
    sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean", mpp=mpp)
    config = sf.models.STFlowConfig(width=16, n_heads=2, n_layers=1, regions=2)
    model = sf.tl.train_stflow(data, use_rep="X_mean", genes=3, max_epochs=1, validation=0.3, config=config)
    sf.tl.predict_expression(data, model=model)
    assert np.isfinite(table.obsm["stflow"]).all()


def test_figures_and_new_objects_remember_nothing(unscaled, model):
    data, mpp = unscaled["AnnData"]
    sf.pp.tiles(data, tile_um=400, mpp=mpp)
    sf.pp.crops(data, mpp=mpp, image_key="hires")
    with pytest.raises(ValueError, match="is unknown"):
        _io.places(data)
    other = sf.tl.predict_expression(data, model=model, mpp=mpp, copy=True)
    for name in ("stflow", "stflow_rate", "stflow_std"):
        data.obsm[name] = other.obsm[name]
    data.uns["stflow"] = other.uns["stflow"]
    sf.pl.expression(data, model.genes[0], mpp=mpp, show=False)
    with pytest.raises(ValueError, match="is unknown"):
        _io.places(data)
