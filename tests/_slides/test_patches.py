"""Cutting: the pixels of every kind of source, exact centres, resampling, borders, and how much is read."""

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import zarr
from PIL import Image

from spatiaflow._io import _reader, open_image
from spatiaflow._slides import patches as _patches
from spatiaflow._slides.patches import Tissue, cut

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (90, 130, 3), dtype=np.uint8)  # y, x, c: not square, so that x and y cannot be swapped
CENTRES = np.array([[20.0, 30.0], [100.0, 11.0], [64.0, 45.0], [2.0, 80.0], [129.5, 89.5]])


def sources(tmp_path):
    stored = zarr.create_array(str(tmp_path / "a.zarr"), shape=PIXELS.shape, dtype="u1", chunks=(16, 16, 3))
    stored[:] = PIXELS
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "tiled.tif", PIXELS, tile=(16, 16), photometric="rgb")
    tifffile.imwrite(tmp_path / "strips.tif", PIXELS, rowsperstrip=4, photometric="rgb")
    tifffile.imwrite(tmp_path / "planes.tif", PIXELS.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    return {
        "array": PIXELS,
        "dask": da.from_array(PIXELS, chunks=((16, 70, 4), (100, 30), 3)),
        "zarr": stored,
        "png": tmp_path / "a.png",
        "tiled tif": tmp_path / "tiled.tif",
        "strips tif": tmp_path / "strips.tif",
        "planes tif": tmp_path / "planes.tif",
    }


def patches_of(source, xy, width, pixels, *, first=False, batch_size=2, shrink=1.0):
    image, first, factor = open_image(source, first, shrink)
    xy = np.asarray(xy) / factor
    found = {}
    for rows, patches in cut(image, xy, width / factor, pixels, channels_first=first, batch_size=batch_size):
        found.update(zip(rows.tolist(), patches.numpy()))
    assert sorted(found) == list(range(len(xy)))
    return np.stack([found[i] for i in range(len(xy))])


def naive(xy, width, pixels):
    """One patch after the other, by NumPy slicing of the image with its border repeated, and torch's resize."""
    margin = 60
    padded = np.pad(PIXELS, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    out = []
    for x, y in xy:
        left, top = (
            int(np.floor(x - width / 2 + 0.5 - 1e-9)) + margin,
            int(np.floor(y - width / 2 + 0.5 - 1e-9)) + margin,
        )
        patch = torch.from_numpy(padded[top : top + width, left : left + width].transpose(2, 0, 1).copy()).float()[None]
        if pixels != width:
            patch = torch.nn.functional.interpolate(patch, (pixels, pixels), mode="bilinear", antialias=True)
        out.append(patch[0].round().numpy())
    return np.stack(out).astype(np.uint8)


@pytest.mark.parametrize("kind", ["array", "dask", "zarr", "png", "tiled tif", "strips tif", "planes tif"])
@pytest.mark.parametrize(("width", "pixels"), [(10, 10), (24, 10), (7, 12)])
def test_patches_equal_a_loop_over_slices(tmp_path, monkeypatch, kind, width, pixels):
    monkeypatch.setattr(_patches, "TILE", 40)  # several tiles
    found, expected = patches_of(sources(tmp_path)[kind], CENTRES, width, pixels), naive(CENTRES, width, pixels)
    assert found.dtype == np.uint8
    # resampled as uint8, in fixed point: one level of 256
    np.testing.assert_allclose(found.astype(int), expected, atol=0 if width == pixels else 1, rtol=0)


def test_the_marked_pixel_is_in_the_middle():
    image = np.zeros((40, 60, 3), np.uint8)
    image[12, 47] = 255
    for width in (9, 8):
        (patch,) = patches_of(image, [[47.5, 12.5]], width, width)
        assert patch[:, width // 2, width // 2].tolist() == [255] * 3
        assert patch.sum() == 3 * 255


def test_values_do_not_depend_on_the_batch():
    xy = RNG.uniform([0, 0], [130, 90], (60, 2))
    expected = patches_of(PIXELS, xy, 21, 16, batch_size=60)
    for size in (1, 7):
        np.testing.assert_array_equal(patches_of(PIXELS, xy, 21, 16, batch_size=size), expected)


def test_beyond_the_border_its_colour_goes_on():
    white = np.full((50, 50, 3), 230, np.uint8)
    assert (patches_of(white, [[0.0, 0.0], [50.0, 50.0], [25.0, 25.0]], 200, 20) == 230).all()


def test_each_chunk_is_read_once(monkeypatch):
    reads = []

    def block(block_info=None):
        location = block_info[None]["array-location"]
        reads.append(tuple(location))
        return whole[tuple(slice(*span) for span in location)]

    whole = RNG.integers(0, 255, (3, 1200, 1500), dtype=np.uint8)
    image = da.map_blocks(
        block, chunks=((3,), (300,) * 4, (300,) * 5), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    reads.clear()
    monkeypatch.setattr(_patches, "TILE", 500)
    xy = RNG.uniform([20, 20], [1480, 1180], (800, 2))
    found = patches_of(image, xy, 40, 40, first=True, batch_size=64)
    assert len(reads) == len(set(reads)) == 20
    np.testing.assert_array_equal(found, patches_of(whole, xy, 40, 40, first=True))


def test_memory_holds_a_part_of_the_image(monkeypatch):
    monkeypatch.setattr(_reader, "CACHE_BYTES", 400_000)
    image = da.random.default_rng(0).integers(0, 255, (3, 1200, 1500), chunks=(3, 300, 300), dtype=np.uint8)
    opened, _, _ = open_image(image, True)
    monkeypatch.setattr(_patches, "TILE", 300)
    for _ in cut(opened, RNG.uniform([20, 20], [1480, 1180], (200, 2)), 40, 40, channels_first=True, batch_size=64):
        held = sum(chunk.nbytes for chunk in opened.decoded.chunks.values())
        assert 0 < held == opened.decoded.used <= 400_000


def smooth_tissue(size):
    y, x = np.mgrid[:size, :size] / size
    return np.stack(
        [150 + 80 * np.sin(9 * x) * np.cos(7 * y), 120 + 60 * np.cos(12 * x + 5 * y), 170 + 40 * y], -1
    ).astype(np.uint8)


def test_a_coarser_level_of_a_file_is_read_where_it_is_enough(tmp_path):
    image = smooth_tissue(512)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tif:
        tif.write(image, tile=(64, 64), subifds=2, photometric="rgb")
        for step in (2, 4):
            coarse = image.reshape(512 // step, step, 512 // step, step, 3).mean((1, 3)).astype(np.uint8)
            tif.write(coarse, tile=(64, 64), subfiletype=1, photometric="rgb")
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=98)
    xy = [[200.0, 300.0], [410.0, 90.0]]
    expected = patches_of(image, xy, 160, 40).astype(int)
    for name, factors in (("pyramid.tif", (1, 2, 4)), ("a.jpg", (1, 2, 4))):
        for shrink, factor in zip((1.9, 3.0, 4.0), factors):
            opened, _, found = open_image(tmp_path / name, False, shrink)
            assert found == factor
            assert opened.shape[0] == 512 // factor
        assert abs(patches_of(tmp_path / name, xy, 160, 40, shrink=4.0) - expected).max() <= 6


def shares(image, xy, width=32):
    """Share of tissue of patches of an image (y x x x 3)."""
    tissue = Tissue(np.asarray(xy, float), width, image.shape[:2])
    for rows, patches in cut(image, np.asarray(xy, float), width, 16, channels_first=False, batch_size=2):
        tissue.add(rows, patches)
    return tissue.share()


@pytest.mark.parametrize("glass", [(242, 240, 241), (228, 212, 227)], ids=["white", "tinted"])
def test_tissue_is_told_from_glass_and_padding(glass):
    rng = np.random.default_rng(0)
    image = np.empty((96, 160, 3), np.uint8)
    image[:, :64] = glass
    image[:, 64:96] = (150, 120, 170)  # stained
    image[:, 96:128] = (205, 180, 205) if glass[0] > 230 else (190, 165, 190)  # pale: fat
    image[:, 128:] = 0  # padding
    image = (image + (image > 0) * rng.integers(-3, 4, image.shape)).astype(np.uint8)
    middles = [(16, 48), (48, 48), (80, 48), (112, 48), (144, 48), (64, 48)]
    np.testing.assert_allclose(shares(image, middles), [0, 0, 1, 1, 0, 0.5], atol=0.02)


def test_glass_alone_and_tissue_alone_are_not_split_by_their_noise():
    rng = np.random.default_rng(0)
    glass = (235 + rng.integers(-6, 7, (64, 64, 3))).astype(np.uint8)
    stained = (np.array([140, 110, 160]) + rng.integers(-40, 41, (64, 64, 1))).astype(np.uint8)
    middles = [(16, 16), (48, 16), (32, 32)]
    np.testing.assert_array_equal(shares(glass, middles), 0)
    np.testing.assert_array_equal(shares(stained, middles), 1)
    np.testing.assert_array_equal(shares(np.zeros_like(glass), middles), 0)


def test_what_lies_outside_the_image_is_no_tissue():
    stained = np.full((64, 64, 3), (140, 110, 160), np.uint8)
    np.testing.assert_allclose(shares(stained, [(32, 32), (0, 32), (64, 64)]), [1, 0.5, 0.25])


def test_black_around_a_real_section_is_no_tissue(mirror):
    if not (mirror / "her2st" / "A1.png").exists():
        pytest.skip("section A1 is not in the mirror")
    image = np.asarray(Image.open(mirror / "her2st" / "A1.png"))[..., :3]
    spots = pd.read_csv(mirror / "her2st" / "A1_selection.tsv", sep="\t")
    true = spots.loc[spots["selected"] == 1, ["pixel_x", "pixel_y"]].to_numpy() * 2000 / 6954
    black = np.array([[100.0, 100], [300, 2000], [1900, 2000], [1000, 1900]])
    share = shares(image, np.vstack([true, black]), width=155 / 3.19)
    assert np.quantile(share[:-4], 0.02) > 0.1
    np.testing.assert_array_equal(share[-4:], 0)


def test_stains_of_tissue_are_those_of_the_texture_features():
    from spatiaflow.models.encoders import load_encoder

    image = np.full((100, 300, 3), 240, np.uint8)
    image[:, :200] = [150, 90, 160]
    encoder = load_encoder("texture", device="cpu")
    xy = np.array([[50.0, 50.0], [150.0, 50.0], [250.0, 50.0]])  # the last one is glass
    tissue = Tissue(xy, 96, image.shape[:2])
    for rows, patches in cut(image, xy, 96, 96, channels_first=False, batch_size=8):
        tissue.add(rows, patches)
        features = encoder(patches).numpy()
    found = tissue.stains(tissue.cells())
    for stain, quartiles in zip(("hematoxylin", "eosin"), found):
        expected = features[0, list(encoder.feature_names).index(f"{stain}_mean")]
        np.testing.assert_allclose(quartiles, expected, atol=1e-4)


def test_batches_that_are_done_are_left_out_and_the_others_stay_as_they_are():
    xy = RNG.uniform(0, 5000, (60, 2))
    image = RNG.integers(0, 255, (5000, 5000, 1), dtype=np.uint8)
    whole = list(cut(image, xy, 9, 4, channels_first=False, batch_size=4))
    skip = np.zeros(60, bool)
    skip[np.concatenate([rows for rows, _ in whole[1::2]])] = True
    skip[whole[0][0][0]] = True  # of this batch others are not done
    rest = list(cut(image, xy, 9, 4, channels_first=False, batch_size=4, skip=skip))
    assert len(rest) == len(whole[::2])
    for one, two in zip(rest, whole[::2], strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])
