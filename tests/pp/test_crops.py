import numpy as np
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
