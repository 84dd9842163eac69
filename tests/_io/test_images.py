"""Which image belongs to a slide, and where its spots lie in it."""

import warnings

import numpy as np
import pytest
import spatialdata as sd
from anndata import AnnData
from PIL import Image
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation, set_transformation

import spatiaflow as sf
from spatiaflow import _io

POINTS = np.array([[20.5, 30.5], [100.5, 11.5], [64.5, 45.5]])  # x, y in pixels of the image
PIXELS = np.random.default_rng(0).integers(0, 255, (3, 90, 130), dtype=np.uint8)


def legacy(tmp_path, *, hires_scale=0.5):
    adata = AnnData(np.ones((3, 2), np.float32), obsm={"spatial": POINTS - 0.5})
    path = tmp_path / "full.png"
    Image.fromarray(PIXELS.transpose(1, 2, 0)).save(path)
    adata.uns["spatial"] = {
        "s": {
            "images": {"hires": np.zeros((45, 65, 3), np.uint8)},
            "scalefactors": {"tissue_hires_scalef": hires_scale, "spot_diameter_fullres": 10.0},
            "metadata": {"microns_per_pixel": 0.5, "source_image_path": str(path)},
        }
    }
    return adata


def found_in(data, **options):
    (slide,) = _io.places(data)
    return _io.slide_image(data, slide, **options)


def test_the_file_of_the_full_resolution_comes_first(tmp_path):
    found = found_in(legacy(tmp_path), mpp=1.0)
    assert found.source == tmp_path / "full.png"
    assert found.mpp == 0.5
    np.testing.assert_allclose(found.xy, POINTS)  # an integer position is the middle of its pixel


def test_hires_stands_in_where_it_is_fine_enough(tmp_path):
    adata = legacy(tmp_path)
    adata.uns["spatial"]["s"]["metadata"]["source_image_path"] = str(tmp_path / "gone.png")
    found = found_in(adata, mpp=1.0)
    assert found.mpp == 1.0
    assert found.source.shape == (45, 65, 3)
    np.testing.assert_allclose(found.xy, POINTS / 2)
    with pytest.raises(FileNotFoundError, match=r"gone.png.*1 µm per pixel, too coarse for 0.5; image_key='hires'"):
        found_in(adata, mpp=0.5)
    assert found_in(adata, mpp=0.5, image_key="hires").mpp == 1.0
    del adata.uns["spatial"]["s"]["metadata"]["source_image_path"]
    with pytest.raises(KeyError, match="source_image_path'] is not set"):
        found_in(adata, mpp=0.5)
    assert found_in(adata, mpp=0.5, coarsest=7.0).mpp == 1.0


def test_an_array_in_uns_needs_its_scale(tmp_path):
    adata = legacy(tmp_path)
    adata.uns["spatial"]["s"]["images"]["full"] = PIXELS.transpose(1, 2, 0)
    with pytest.raises(KeyError, match="tissue_full_scalef"):
        found_in(adata, image_key="full")
    adata.uns["spatial"]["s"]["scalefactors"]["tissue_full_scalef"] = 1.0
    np.testing.assert_allclose(found_in(adata, image_key="full").xy, POINTS)
    with pytest.raises(KeyError, match="no 'lowres'; it has 'hires', 'full'"):
        found_in(adata, image_key="lowres")


def spatial(to_global, *, scale_factors=None, channels=None):
    """Image whose pixels are carried to "global" by ``to_global``; spots stay at POINTS of the image."""
    image = Image2DModel.parse(
        PIXELS,
        dims=("c", "y", "x"),
        transformations={"global": to_global},
        scale_factors=scale_factors,
        c_coords=channels,
    )
    matrix = to_global.to_affine_matrix(("x", "y"), ("x", "y"))
    shapes = ShapesModel.parse(POINTS @ matrix[:2, :2].T + matrix[:2, 2], geometry=0, radius=1.0, index=["a", "b", "c"])
    table = AnnData(np.ones((3, 2), np.float32))
    table.obs["region"], table.obs["id"] = "cells", ["a", "b", "c"]
    table.obs["region"] = table.obs["region"].astype("category")
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="id")
    sdata = sd.SpatialData(images={"he": image}, shapes={"cells": shapes}, tables={"table": table})
    sdata.attrs["microns_per_unit"] = {"global": 0.5}
    return sdata


TURN = Affine([[0, -1, 300], [1, 0, 7], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))


@pytest.mark.parametrize(
    "to_global",
    [Identity(), Sequence([Scale([3.0, 3.0], ("x", "y")), Translation([7.0, -3.0], ("x", "y"))]), TURN],
    ids=["identity", "scale and translation", "quarter turn"],
)
def test_transformations_lead_back_to_the_pixels(to_global, recwarn):
    found = found_in(spatial(to_global))
    np.testing.assert_allclose(found.xy, POINTS, atol=1e-6)
    assert found.mpp == pytest.approx(0.5 * (3.0 if isinstance(to_global, Sequence) else 1.0))
    assert found.channels_first
    assert not [w for w in recwarn if "distorted" in str(w.message)]  # a turn keeps squares square


@pytest.mark.parametrize("matrix", [[[1, 0.3, 0], [0, 1, 0], [0, 0, 1]], [[2, 0, 0], [0, 1, 0], [0, 0, 1]]])
def test_distorted_pixels_warn(matrix):
    with pytest.warns(UserWarning, match="not square"):
        found = found_in(spatial(Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))))
    np.testing.assert_allclose(found.xy, POINTS, atol=1e-6)


@pytest.mark.parametrize(("mpp", "shrink"), [(0.4, 1), (0.5, 1), (0.9, 1), (1.0, 2), (1.9, 2), (2.0, 4), (50.0, 4)])
def test_the_scale_is_the_coarsest_that_is_fine_enough(mpp, shrink):
    found = found_in(spatial(Identity(), scale_factors=[2, 2]), mpp=mpp)
    assert found.source.shape[1] == 90 // shrink
    assert found.mpp == pytest.approx(0.5 * shrink, rel=0.03)
    np.testing.assert_allclose(found.xy, POINTS / shrink, rtol=0.03)


def test_several_images_are_an_error_that_lists_them():
    sdata = spatial(Identity())
    sdata["other"] = Image2DModel.parse(PIXELS, dims=("c", "y", "x"))
    with pytest.raises(KeyError, match="2 images share.*'he', 'other'.*image_key="):
        found_in(sdata)
    assert found_in(sdata, image_key="other").name == "other"
    set_transformation(sdata["other"], {"elsewhere": Identity()}, set_all=True)
    assert found_in(sdata).name == "he"
    with pytest.raises(KeyError, match="'other' has no transformation to 'global'"):
        found_in(sdata, image_key="other")
    with pytest.raises(KeyError, match="no image 'mine'; it has 'he', 'other'"):
        found_in(sdata, image_key="mine")


def test_channel_names_are_known():
    assert found_in(spatial(Identity(), channels=["r", "g", "b"])).channels == ("r", "g", "b")


def test_he_lies_behind_the_spots_of_a_spatialdata():
    sdata = sf.datasets.simulated_tissue(200, seed=0)
    (slide,) = _io.places(sdata)
    picture, scale, corner = _io.background(sdata, sdata["table"], slide, pixels=100)
    image = np.asarray(sdata["he"].data)
    found = _io.slide_image(sdata, slide, image_key="he")
    step = round(scale / found.mpp)
    np.testing.assert_array_equal(picture, image[:, ::step, ::step].transpose(1, 2, 0))
    spot = (slide.xy[0] - corner) / scale  # of the small picture
    np.testing.assert_allclose(spot * step, found.xy[0], atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "is_rgb"),
    [
        (["b", "g", "r"], True),
        (["Blue", "Green", "Red"], True),
        (["alpha", "red", "green", "blue"], True),
        (["RFP", "GFP", "BFP"], False),
        (["rna", "gfap", "bound"], False),
    ],
)
def test_colours_are_known_by_their_names_in_any_order(channels, is_rgb):
    pixels = np.stack([PIXELS["rgb".find(name[0].lower())] for name in channels])
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=channels, transformations={"global": Identity()})
    shapes = ShapesModel.parse(POINTS, geometry=0, radius=1.0, transformations={"global": Identity()})
    table = AnnData(np.ones((3, 2), np.float32))
    table.obs["region"], table.obs["cell"] = "cells", shapes.index
    table.obs["region"] = table.obs["region"].astype("category")
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="cell")
    sdata = sd.SpatialData(images={"he": image}, shapes={"cells": shapes}, tables={"table": table})
    sdata.attrs["microns_per_unit"] = {"global": 1.0}
    found = found_in(sdata)
    assert found.is_rgb(len(channels)) == is_rgb
    if is_rgb:
        np.testing.assert_array_equal(np.asarray(found.source)[:3], PIXELS)
        assert [name[0].lower() for name in found.channels[:3]] == ["r", "g", "b"]
    else:
        assert found.channels == tuple(channels)


@pytest.mark.parametrize("name", ["full.png", "full.tif"])
def test_a_file_of_another_resolution_is_a_warning(tmp_path, name):
    adata = legacy(tmp_path, hires_scale=0.25)
    library = adata.uns["spatial"]["s"]
    library["images"]["hires"] = np.zeros((90, 130, 3), np.uint8)  # of a full resolution of 520 x 360
    library["metadata"]["source_image_path"] = str(tmp_path / name)
    for factor in (1, 2, 0.5):
        picture = Image.fromarray(PIXELS.transpose(1, 2, 0)).resize((int(520 * factor), int(360 * factor)))
        picture.save(tmp_path / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found_in(adata)
        told = [str(one.message) for one in caught]
        assert told == [] if factor == 1 else f"{520 * factor:.0f} x {360 * factor:.0f} px" in told[0]
        assert not told or "the full resolution has 520 x 360" in told[0]
