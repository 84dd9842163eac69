"""What is no tissue: strokes of a pen, the frame of dots, a small copy in a corner; and parts out of focus."""

import numpy as np
import pytest
from scipy import ndimage

import spatiaflow as sf
from spatiaflow._slides.artefacts import artefacts_of, at_cells, sharpness

UM, GLASS = 5.0, 235  # µm per pixel of the small pictures


def tissue(height=800, width=900):
    """Pink and purple tissue in x 250 to 650, y 250 to 550."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), GLASS, float)
    image[250:550, 250:650] = [190, 110, 170]
    image[250:550:7, 250:650] = [90, 60, 140]
    return np.clip(image + rng.normal(0, 2, image.shape), 1, 255).astype(np.uint8)


def dots(image, *, ring=False, diameter=18, pitch=30, jitter=0.0):
    """A frame of two rows of dots around the picture."""
    image, rng = image.copy(), np.random.default_rng(1)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    places = [(30 + i * pitch, 30 + j * pitch) for i in range(25) for j in range(28)
              if min(i, 24 - i) < 2 or min(j, 27 - j) < 2]  # fmt: skip
    for row, column in places:
        row, column = np.array([row, column]) + rng.uniform(-1, 1, 2) * jitter
        distance = np.hypot(y - row, x - column)
        image[(distance <= diameter / 2) & (distance >= (diameter / 2 - 3 if ring else 0))] = [140, 120, 140]
    return image


@pytest.mark.parametrize("ring", [False, True])
def test_the_frame_of_a_slide_is_no_tissue(ring):
    plain, framed = tissue(), dots(tissue(), ring=ring)
    found = artefacts_of(framed, UM) == 2
    assert found[(framed != plain).any(-1)].all()
    assert not found[230:570, 230:670].any()
    grid, right = sf.pp.grid(framed, mpp=UM), sf.pp.grid(plain, mpp=UM)
    assert grid.obs_names.equals(right.obs_names)


def test_small_pieces_without_a_pattern_are_tissue():
    scattered = dots(tissue(), jitter=8)
    assert not artefacts_of(scattered, UM).any()


@pytest.mark.parametrize("ink", [(30, 110, 180), (20, 120, 60), (45, 45, 48)])
def test_a_stroke_of_a_pen_is_no_tissue(ink):
    image = tissue()
    image[650:690, 100:800] = ink  # on glass
    image[300:500, 400:440] = ink  # over tissue
    found = artefacts_of(image, UM)
    assert (found[650:690, 100:800] == 1).all()
    assert (found[300:500, 400:440] == 1).all()
    assert (found > 0).mean() < 0.07
    grid = sf.pp.grid(image, mpp=UM)
    assert grid.obsm["spatial"][:, 1].max() < 560
    assert set(grid.obs["artefact"].dropna()) == {"pen"}


def test_nuclei_and_blood_are_no_pen():
    image = tissue()
    image[300:400, 300:400] = [70, 60, 150]  # dense haematoxylin
    image[400:500, 450:550] = [160, 43, 92]  # the reddest of vessels in a section of lung
    assert not artefacts_of(image, UM).any()


@pytest.mark.parametrize("ink", [(200, 30, 40), (230, 70, 90)])
def test_red_ink_is_named_and_kept(ink):
    image = tissue()
    image[650:690, 100:800] = ink  # on glass
    image[300:500, 400:440] = ink  # over tissue
    found = artefacts_of(image, UM)
    assert (found[650:690, 100:800] == 4).all()
    assert (found[300:500, 400:440] == 4).all()
    assert (found > 0).mean() < 0.07
    with pytest.warns(UserWarning, match="as red as ink"):
        grid = sf.pp.grid(image, mpp=UM)
    assert set(grid.obs["artefact"].dropna()) == {"red"}
    assert grid.obs["tissue"][grid.obs["artefact"] == "red"].max() == 1
    assert grid[grid.obs["artefact"] != "red"].obsm["spatial"][:, 1].max() < 560


def test_a_small_copy_in_a_corner_is_no_tissue():
    image = np.zeros((1000, 1300, 3), np.uint8)
    image[150:950, 50:950] = tissue()
    image[:200, 1075:] = tissue()[::4, ::4]
    assert (artefacts_of(image, UM)[:200, 1075:] == 3).all()
    grid = sf.pp.grid(image, mpp=UM)
    assert grid.obsm["spatial"][:, 0].max() < 750
    assert grid.obs["artefact"].isna().all()


def test_a_blurred_half_is_named_and_kept():
    rng = np.random.default_rng(0)
    image = np.full((900, 1200, 3), GLASS, float)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (700, 1000)), 1)
    image[100:800, 100:1100] = np.array([170, 100, 160]) + 300 * texture[..., None]
    sharp = np.clip(image, 0, 255).astype(np.uint8)
    image[:, 600:] = ndimage.gaussian_filter(image[:, 600:], (2, 2, 0))
    half = np.clip(image + rng.normal(0, 1, image.shape), 0, 255).astype(np.uint8)
    assert sf.pp.grid(sharp, mpp=1).obs["artefact"].isna().all()
    grid = sf.pp.grid(half, mpp=1)
    assert len(grid) == len(sf.pp.grid(sharp, mpp=1))
    named, x = (grid.obs["artefact"] == "blurred").to_numpy(), grid.obsm["spatial"][:, 0]
    assert named[x > 650].all()
    assert not named[x < 550].any()
    assert sf.pp.grid(half, mpp=4).obs["artefact"].isna().all()  # too coarse to tell


@pytest.mark.parametrize("width", [32, 29])
def test_sharpness_is_the_variance_of_a_convolution(width):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image[:40, :60] = 255 * (np.indices((40, 60)).sum(0) % 2)[..., None]  # the largest differences that there are
    centres = np.array([[20.0, 18.0], [60.0, 50.0], [90.0, 70.0]])
    found = sharpness(image, centres, width, width, channels_first=False, progress=lambda _: None)
    kernel, side = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]]), width // 4 * 4
    for row, (x, y) in zip(found, np.ceil(centres - width / 2 - 0.5).astype(int)):
        grey = image[y : y + width, x : x + width].astype(float).mean(-1)
        coarse = grey[:side, :side].reshape(side // 4, 4, side // 4, 4).mean((1, 3))
        expected = [ndimage.convolve(one, kernel)[1:-1, 1:-1].var(ddof=1) for one in (grey, coarse)]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-3)


def test_cells_of_squares_are_where_the_picture_is():
    codes = np.arange(16 * 24, dtype=np.int64).reshape(16, 24)
    found = at_cells(codes, np.array([[4.0, 4.0], [20.0, 12.0]]), 8)
    np.testing.assert_array_equal(found[0], codes[:8, :8])
    np.testing.assert_array_equal(found[1], codes[8:16, 16:24])
