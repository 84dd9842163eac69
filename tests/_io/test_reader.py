"""Images that are read by parts: each chunk is decoded once, kept within a budget, and named where it is damaged."""

import pickle

import dask.array as da
import numpy as np
import pytest
import zarr

from spatiaflow._io import _reader, open_image

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("channels_first", "chunks"), [(True, (3, 300, 250)), (True, (1, 64, 700)), (False, (300, 250, 3))]
)
def test_parts_of_a_chunked_image_equal_slices(channels_first, chunks):
    whole = RNG.integers(0, 255, (3, 700, 800) if channels_first else (700, 800, 3), dtype=np.uint8)
    image, first, factor = open_image(da.from_array(whole, chunks=chunks), channels_first)
    assert (image.shape, first, factor) == (whole.shape, channels_first, 1.0)
    for y, x in RNG.integers(0, 600, (20, 2)):
        rows, columns = slice(y, y + 100), slice(x, x + 190)
        key = (slice(None), rows, columns) if channels_first else (rows, columns, slice(None))
        np.testing.assert_array_equal(image[key], whole[key])


def test_an_image_of_a_store_is_read_without_dask(tmp_path):
    values = RNG.integers(0, 255, (3, 700, 800), dtype=np.uint8)
    stored = zarr.create_array(tmp_path / "image.zarr", data=values, chunks=(1, 300, 300))
    for array, plain in (
        (da.from_zarr(stored), True),
        (da.from_zarr(stored)[::-1], False),
        (da.from_zarr(stored) + 0, False),
    ):
        opened, _, _ = open_image(array, True)
        assert isinstance(opened.array, zarr.Array) == plain
        np.testing.assert_array_equal(opened[:, 250:650, 10:790], array[:, 250:650, 10:790])


def test_images_that_share_memory_keep_their_pixels_apart():
    source = RNG.integers(0, 255, (2, 3, 900, 900), dtype=np.uint8)
    images = [open_image(da.from_array(values, chunks=(3, 300, 300)), True)[0] for values in source]
    images[1].decoded = images[0].decoded
    images[0].decoded.budget = 5 * 3 * 300 * 300
    for y, x in RNG.integers(0, 800, (40, 2)):
        for image, values in zip(images, source):
            np.testing.assert_array_equal(image[:, y : y + 90, x : x + 90], values[:, y : y + 90, x : x + 90])
        assert images[0].decoded.used <= images[0].decoded.budget


def test_the_chunk_that_was_used_last_is_dropped_last():
    decoded, chunk = _reader.Decoded(30), np.zeros(10, np.uint8)
    for key in "abc":
        decoded.put((key,), chunk)
    decoded.get(("a",))
    decoded.put(("d",), chunk)
    assert list(decoded.chunks) == [("c",), ("a",), ("d",)] and decoded.used == 30
    decoded.put(("large",), np.zeros(99, np.uint8))  # larger than the budget: kept alone
    assert list(decoded.chunks) == [("large",)] and decoded.used == 99
    other = pickle.loads(pickle.dumps(decoded))
    assert (other.budget, other.used, len(other.chunks)) == (30, 0, 0)  # another process decodes for itself


@pytest.mark.parametrize("chunked", [True, False])
def test_parts_put_together_are_the_image(chunked):
    whole = RNG.integers(0, 255, (2, 650, 530), dtype=np.uint8)
    image = open_image(da.from_array(whole, chunks=(2, 100, 300)), True)[0] if chunked else whole
    out, seen = np.zeros_like(whole), np.zeros(whole.shape[1:], int)
    for x, y, values in _reader.parts(image):
        _, height, width = values.shape
        out[:, y : y + height, x : x + width] = values
        seen[y : y + height, x : x + width] += 1
    assert (seen == 1).all()
    np.testing.assert_array_equal(out, whole)


def test_a_chunk_that_cannot_be_decoded_is_named():
    def block(block_info=None):
        location = block_info[None]["array-location"]
        if location[1:] == [(300, 600), (0, 300)]:
            raise RuntimeError("bad codec")
        return np.zeros([stop - start for start, stop in location], np.uint8)

    array = da.map_blocks(block, chunks=((3,), (300, 300), (300,)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    image, _, _ = open_image(array, True)
    assert image[:, 0:300, 0:300].shape == (3, 300, 300)
    with pytest.raises(OSError, match="pixels y 300-600 and x 0-300 of an image could not be read.*bad codec"):
        image[:, 200:400, 0:50]
