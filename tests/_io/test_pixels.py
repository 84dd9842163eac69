"""The range of a picture, missing pixels, and positions outside of an image."""

import dask.array as da
import numpy as np
import pytest

from spatiaflow import _io
from spatiaflow._io._pixels import white_of

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 300, 600), dtype=np.uint8)
DEPTHS = [
    (np.uint16, 255),
    (np.uint16, 1023),
    (np.uint16, 4095),
    (np.uint16, 65535),
    (np.int64, 255),
    (np.int32, 65535),
]
DEPTHS += [(np.float32, 1), (np.float64, 1), (np.float16, 1), (np.float32, 255), (">f4", 1), (">u2", 65535)]


@pytest.mark.parametrize(("kind", "white"), DEPTHS, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_picture_of_any_depth_becomes_uint8(kind, white, chunked):
    image = (PIXELS.astype(np.float64) * (white / 255)).round(0 if white > 255 else 6).astype(kind)
    if chunked:
        image = _io.open_image(da.from_array(image, chunks=(3, 256, 256)), True)[0]
    found = _io.as_uint8(image, "he")[:, 5:290, 10:590]
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found.astype(int), PIXELS[:, 5:290, 10:590], atol=1)


@pytest.mark.parametrize(
    ("factor", "shift"), [(1.02, 0), (1.3, 0), (np.float32(1) + np.finfo(np.float32).eps, 0), (1.0, -0.01)]
)
def test_a_float_picture_may_go_a_little_beyond_black_and_white(factor, shift):
    image = (PIXELS / np.float32(PIXELS.max()) * factor + shift).astype(np.float32)
    found = _io.as_uint8(image, "he")[...]
    np.testing.assert_allclose(found.astype(int), np.clip(image * 255, 0, 255), atol=1)


@pytest.mark.parametrize(
    "image",
    [
        np.full((3, 9, 9), 2.0),
        np.full((3, 9, 9), 3, np.uint16),
        np.full((3, 9, 9), 300, np.uint16),
        np.full((3, 9, 9), -1),
        np.full((3, 9, 9), np.nan),
    ],
)
def test_a_range_that_cannot_be_told_is_refused(image):
    with pytest.raises(ValueError, match="Convert it to uint8"):
        white_of(image, "he")


def test_missing_pixels_are_named():
    pixels = np.zeros((2, 3, 9, 9), np.float32)
    _io.check_finite(pixels, "he")
    pixels[1, 2, 4, 5] = np.nan
    with pytest.raises(ValueError, match="image 'he' has 1 NaN .*channel 'c', first at y 4, x 5"):
        _io.check_finite(pixels, "he", ("a", "b", "c"))


def inside(xy):
    return _io.inside(np.asarray(xy, float), (200, 100), "s", "he", "They are left out.")


def test_positions_outside():
    rng = np.random.default_rng(0)
    xy = rng.uniform(1, 99, (200, 2)) * [2, 1]
    assert inside(xy).all()
    xy[0] = [300, 5]
    with pytest.warns(UserWarning, match=r"1 of 200 positions of slide 's' \(0.5%\) .* They are left out\.$"):
        assert inside(xy).sum() == 199
    xy[:5] = [300, 5]
    with pytest.warns(UserWarning, match="is mpp wrong"):
        inside(xy)
    xy[:150] = [300, 5]
    with pytest.raises(ValueError, match="150 of 200 positions"):
        inside(xy)


def test_what_would_bring_positions_inside():
    xy = np.random.default_rng(0).uniform(1, 99, (200, 2)) * [2, 1]
    with pytest.raises(ValueError, match="With x and y swapped all would lie inside"):
        inside(xy[:, ::-1])
    with pytest.raises(ValueError, match="times finer scale would lie inside"):
        inside(xy * 4)
