"""Which image belongs to a sample where several lie in one SpatialData."""

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from shapely import Point
from spatialdata import SpatialData, concatenate
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Translation

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._io._pictures import owner

XY = np.random.default_rng(0).uniform(20, 100, (40, 2))


def sample(name, image=None, *, ids=0, shift=0.0, shade=0, system="global"):
    """Circles in a picture of one shade of grey, both moved along x."""
    frame = gpd.GeoDataFrame(
        {"radius": np.full(40, 3.0)}, geometry=[Point(x + shift, y) for x, y in XY], index=np.arange(40) + ids
    )
    spots = ShapesModel.parse(frame, transformations={system: Identity()})
    obs = pd.DataFrame({"region": pd.Categorical([name] * 40), "id": np.arange(40) + ids})
    obs.index = [f"{name}{i}" for i in range(40)]
    table = ad.AnnData(np.ones((40, 3), np.float32), obs=obs)
    table = TableModel.parse(table, region=name, region_key="region", instance_key="id")
    images = {}
    if image is not None:
        pixels = np.full((3, 120, 120), shade, np.uint8)
        moved = {system: Translation([shift, 0], axes=("x", "y"))}
        images[image] = Image2DModel.parse(pixels, dims=("c", "y", "x"), transformations=moved)
    return SpatialData(images=images, shapes={name: spots}, tables={"table": table})


def both(*samples):
    return concatenate(list(samples), concatenate_tables=True)


def images_of(data, **options):
    slides = _io.places(data, _io.Where(mpp=1.0))
    return [_io.slide_image(data, slide, **options).name for slide in slides]


@pytest.mark.parametrize(
    ("image", "regions", "expected"),
    [
        ("a_hires_image", ["a", "b"], "a"),
        ("he-a", ["cells-a", "cells-b"], "cells-a"),
        ("he-mouse_1", ["cells-mouse_1", "cells-mouse_2"], "cells-mouse_1"),
        ("1_image", ["1_labels", "11_labels"], "1_labels"),
        ("V10F24-078_A1_hires_image", ["V10F24-078_B1", "V19D02-088_A1", "V10F24-078_A1"], "V10F24-078_A1"),
        ("he", ["a", "b"], None),
        ("slide_image", ["slide_a", "slide_b"], None),
        ("he", [], None),
    ],
)
def test_a_region_whose_name_an_image_bears(image, regions, expected):
    assert owner(image, regions) == expected
    assert owner(image, regions[::-1]) == expected


def test_samples_in_one_system_are_told_apart_by_name():
    data = both(sample("a", "a_he"), sample("b", "b_he", ids=100, shade=200))
    assert images_of(data) == ["a_he", "b_he"]
    data = concatenate(
        {name: sample("cells", "he", shade=shade) for name, shade in (("x", 0), ("y", 200))},
        concatenate_tables=True, merge_coordinate_systems_on_name=True,
    )  # fmt: skip
    assert images_of(data) == ["he-x", "he-y"]
    encoder = lambda patches: patches.float().mean((2, 3))  # noqa: E731
    sf.pp.encode_patches(data, encoder=encoder, key_added="X_mean", patch_um=10, mpp=1.0)
    np.testing.assert_array_equal(data["table"].obsm["X_mean"][:, 0], np.repeat([0, 200], 40))


def test_position_comes_before_name():
    """Samples side by side: what a picture is called does not matter, and a picture of both may be shared."""
    data = both(sample("a", "b_he"), sample("b", "a_he", ids=100, shift=500))
    assert images_of(data) == ["b_he", "a_he"]
    data = both(sample("a", "whole"), sample("b", ids=100, shift=100))
    data["whole"] = Image2DModel.parse(np.zeros((3, 120, 300), np.uint8), dims=("c", "y", "x"))
    assert images_of(data) == ["whole", "whole"]
    assert images_of(data, image_key="whole") == ["whole", "whole"]


@pytest.mark.parametrize(("image", "first"), [("a_he", "'b', 'a'"), ("he", "'a', 'b'")])
def test_a_sample_without_an_image_does_not_take_that_of_another(image, first):
    data = both(sample("a", image), sample("b", ids=100))
    with pytest.raises(KeyError, match=f"{first} lie over one another in 'global', and it cannot be told"):
        images_of(data)


def test_an_image_of_both_samples_may_be_named():
    assert images_of(both(sample("a", "he"), sample("b", ids=100)), image_key="he") == ["he", "he"]


def test_an_image_that_is_named_belongs_to_every_sample():
    data = both(sample("a", "a_he"), sample("b", "b_he", ids=100))
    with pytest.raises(ValueError, match="image 'a_he' belongs to 'a', not to 'b', which the table annotates too"):
        sf.pp.encode_patches(data, image_key="a_he", mpp=1.0, patch_um=10)
    apart = both(sample("a", "a_he", system="A"), sample("b", "b_he", ids=100, system="B"))
    assert images_of(apart) == ["a_he", "b_he"]
    with pytest.raises(KeyError, match="image 'a_he' has no transformation to 'B', where 'b' lies"):
        sf.pp.encode_patches(apart, image_key="a_he", mpp=1.0, patch_um=10)


def test_images_without_a_region_s_name_cannot_be_told():
    data = both(sample("a", "first"), sample("b", "second", ids=100))
    with pytest.raises(KeyError, match="Name each image after its region .'a_image'."):
        images_of(data)


def test_the_picture_under_a_figure_is_the_sample_s_own():
    data = both(sample("a", "a_he"), sample("b", "b_he", ids=100, shade=200))
    slides = _io.places(data, _io.Where(mpp=1.0))
    shades = [_io.background(data, data["table"], slide)[0].max() for slide in slides]
    assert shades == [0, 200]
    alone = both(sample("a", "a_he"), sample("b", ids=100))
    assert _io.background(alone, alone["table"], _io.places(alone, _io.Where(mpp=1.0))[1]) is None
