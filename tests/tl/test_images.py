"""What the generator of morphology reads of slides: levels, channels, and the place of each row."""

import numpy as np
import pytest

import spatiaflow as sf
from _morphology import IMAGE, tissue
from spatiaflow._io import Where
from spatiaflow._slides.crops import Crops
from spatiaflow.models.slide import Slide
from spatiaflow.tl import _images

CROPS = {"crop_um": 12.0, "crop_pixels": 16}


def test_features_are_the_levels_side_by_side_in_the_order_of_the_slide():
    sdata = tissue(1, 60)
    table = sdata["table"]
    del sdata["table"]
    sdata["table"] = table = table[np.random.default_rng(0).permutation(60)].copy()
    (slide,) = _images.cells_with_images(sdata, Where(**IMAGE), "E", counts=True, **CROPS)
    assert list(slide.obs_names) == list(table.obs_names[slide.rows])
    levels = [table.obsm[f"E_{level}"][slide.rows] for level in ("cell", "niche", "tissue")]
    np.testing.assert_array_equal(slide.features[:], np.concatenate(levels, 1))
    np.testing.assert_array_equal(slide.counts.toarray(), table.X[slide.rows].toarray())
    alone = _images.cells_with_images(sdata, Where(**IMAGE), None, **CROPS)[0]
    assert alone.features is None and alone.counts is None
    np.testing.assert_array_equal(alone.crops.read(np.arange(60)), slide.crops.read(np.arange(60)))


def test_levels_must_be_there_and_of_one_width():
    sdata = tissue(1, 60)
    table = sdata["table"]
    with pytest.raises(KeyError, match="embed_spatia"):
        _images.cells_with_images(sdata, Where(**IMAGE), "X_spatia", **CROPS)
    table.obsm["E_niche"] = np.repeat(table.obsm["E_niche"], 3, 1)  # as means of components have
    with pytest.raises(
        ValueError, match=r"have 20, 60, 20 columns. The generator takes learned levels.*context=\"attention\""
    ):
        _images.cells_with_images(sdata, Where(**IMAGE), "E", **CROPS)


def slide_of(channels, rows, xy=None, name="s"):
    """A slide on an image whose channels have the values 0, 1, 2, ... times 50."""
    image = np.empty((len(channels), 40, 60), np.uint8)
    image[:] = 50 * np.arange(len(channels))[:, None, None]
    xy = np.full((len(rows), 2), 20.0) if xy is None else np.asarray(xy, float)
    crops = Crops(image, xy, 8, 8, True, tuple(channels))
    return Slide(name, np.array([f"c{i}" for i in rows]), xy, rows=np.asarray(rows), crops=crops)


def test_channels_of_all_slides_have_one_order():
    slides = [slide_of(["DAPI", "rna"], [0, 1]), slide_of(["Rna", "prot", "dapi"], [2])]
    assert _images.channels_of(slides) == ["dapi", "rna", "prot"]
    own = _images.with_channels(slides, ["rna", "prot"])
    assert [slide.crops.places.tolist() for slide in own] == [[1, -1], [0, 1]]
    np.testing.assert_array_equal(own[1].crops.range, slides[1].crops.intensity())
    assert all(slide.crops.places is None for slide in slides)  # what is given stays as it was
    known = {"dapi": [0.0, 9.0], "rna": [1.0, 8.0], "prot": [2.0, 7.0]}
    scaled = _images.with_channels(slides, ["dapi", "rna", "prot"], known)
    np.testing.assert_array_equal(scaled[0].crops.range, [[0, 9], [1, 8]])
    np.testing.assert_array_equal(scaled[1].crops.range, [[1, 8], [2, 7], [0, 9]])  # by the image's own order


def test_rows_are_placed_among_the_cells_of_all_slides():
    table = tissue(1, 60)["table"][:7].copy()
    first = slide_of(["dapi"], [4, 0, 6], [[10, 10], [99, 10], [59, 39]])
    second = slide_of(["dapi"], [1, 3], [[-1, 0], [30, 30]])
    place, inside = _images.placed(table, [first, second], first=100)
    assert place.tolist() == [101, 103, -1, 104, 100, -1, 102]
    assert inside.tolist() == [False, False, False, True, True, False, True]


def test_tiles_are_known_by_what_their_verb_wrote():
    sdata = sf.datasets.simulated_tissue(60, seed=1)
    table = sdata["table"]
    assert not _images.is_tiles(table)
    assert _images.is_tiles(sf.pp.tiles(sdata, tile_um=40, groupby="state"))
