"""Crops: their pixels and order, their channels in a model, and the cells that lie in the image."""

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
import torch

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._io import Where
from spatiaflow._slides import gather
from spatiaflow._slides.crops import Crops, check_inside, share_memory
from spatiaflow.models.slide import Slide


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


def test_wider_crops_follow_the_channels_of_the_first():
    rng = np.random.default_rng(2)
    image, xy = rng.integers(0, 255, (2, 300, 60)).astype(np.uint8), rng.uniform(5, [55, 295], (30, 2))
    crops, near, far = (crops_of(image, xy, width) for width in (6, 6, 18))
    both = replace(crops, wide=3.0)
    assert both.shape == (30, 4, 6, 6) and both.channels == ("a", "b")
    order = rng.permutation(30)[:12]
    expected = torch.cat([near.read(order), far.read(order)], 1)
    assert torch.equal(both.read(order), expected) and torch.equal(both.take(order).read(np.arange(12)), expected)
    for rows, batch in both.batches(5, order):
        assert torch.equal(batch, torch.cat([near.read(rows), far.read(rows)], 1))
    assert both.read(np.array([], int)).shape == (0, 4, 6, 6)
    np.testing.assert_array_equal(both.intensity(), near.intensity())  # one scale for both: they show the same stain


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
    (slide,) = gather(sdata, Where(image_key="fluorescence"), need=("crops",), crop_um=12.0, crop_pixels=pixels)
    crops = slide.crops
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


def test_channels_are_matched_by_name_without_case():
    image = np.stack([np.full((40, 40), 10), np.tile(np.arange(40), (40, 1))]).astype(np.uint8)
    crops = crops_of(image, [[10.0, 10.0], [20.0, 20.0], [90.0, 5.0]])
    found = crops.matched(["B", "c", "A"], None, "s")
    assert found.places.tolist() == [1, -1, 0] and crops.places is None
    np.testing.assert_array_equal(found.range, crops.take([0, 1]).intensity())  # cells outside the image play no part
    assert crops.matched(["x"], {"b": "x"}, "s").places.tolist() == [1]
    np.testing.assert_array_equal(found.take(np.array([False, True, False])).places, found.places)
    known = crops_of(image, [[10.0, 10.0]])
    known.range = np.array([[0.0, 1.0], [0.0, 2.0]])
    assert known.matched(["a"], None, "s").range is known.range


@pytest.mark.parametrize(
    ("channels", "names", "error", "message"),
    [
        (["a"], {"z": "a"}, KeyError, "channels= names 'z'; the image of slide 's' has a, b"),
        (["a"], {"b": "y"}, KeyError, "maps to 'y'; the model has a"),
        (["a"], {"b": "a"}, ValueError, "channels a, b of slide 's' would all be the model's 'a'"),
        (["x"], None, KeyError, "none of the channels of slide 's'"),
    ],
)
def test_channels_that_do_not_fit_are_a_clear_error(channels, names, error, message):
    with pytest.raises(error, match=message):
        crops_of(np.zeros((2, 40, 40), np.uint8), [[10.0, 10.0]]).matched(channels, names, "s")


def test_cells_outside_the_image_are_known():
    image = np.zeros((2, 40, 60), np.uint8)
    crops = crops_of(image, [[0.0, 39.9], [59.9, 0.0], [-0.1, 5.0], [5.0, 40.0], [60.0, 5.0]])
    assert crops.inside.tolist() == [True, True, False, False, False]
    with pytest.warns(UserWarning, match="1 of 3 positions of slide 's' .33.3%. lie outside of image"):
        check_inside(crops.take([0, 1, 2]), "s")
    with pytest.raises(ValueError, match="3 of 5 positions of slide 's'"):
        check_inside(crops, "s")
    with pytest.raises(ValueError, match="60 x 40 px, smaller than a crop"):
        check_inside(crops_of(image, [[5.0, 5.0]], width=50), "s")


def test_images_of_several_slides_share_one_cache():
    image = da.zeros((2, 40, 40), chunks=(2, 20, 20), dtype=np.uint8)
    slides = [Slide(str(i), np.arange(1), crops=crops_of(image, [[9.0, 9.0]])) for i in range(2)]
    share_memory([*slides, Slide("without", np.arange(1))])
    first, second = (slide.crops.image for slide in slides)
    assert first is not second and first.decoded is second.decoded
