import numpy as np
import pytest
import torch

from spatiaflow.models.orientation import canonical, inverse, turned, turned_offsets

RNG = np.random.default_rng(0)


def test_orientations_of_images_and_neighbours_agree():
    for _ in range(5):
        x, y = RNG.integers(-4, 5, 2)
        image = torch.zeros(8, 1, 9, 9)
        image[:, 0, 4 + y, 4 + x] = 1
        offsets = turned_offsets(torch.tensor([[[float(x), float(y)]]] * 8), np.arange(8))
        for one, offset in zip(turned(image, np.arange(8)), offsets):
            row, column = np.argwhere(one[0].numpy())[0] - 4
            assert (column, row) == tuple(offset[0].tolist())


def ellipses(angle, major, minor, p=32):
    """Discs of these axes (px) in the middle of images, each at its angle, one end brighter."""
    y, x = np.mgrid[:p, :p] - (p - 1) / 2
    along = np.cos(angle)[:, None, None] * x - np.sin(angle)[:, None, None] * y  # rows go down
    across = np.sin(angle)[:, None, None] * x + np.cos(angle)[:, None, None] * y
    inside = (along / major) ** 2 + (across / minor) ** 2 < 1
    return torch.from_numpy((inside * (1 + 0.01 * along))[:, None].astype(np.float32))


def test_long_axes_come_to_lie_along_each_other():
    angles = RNG.uniform(0, np.pi, (2, 400))
    source, target = ellipses(angles[0], 6, 5), ellipses(angles[1], 11, 6.5)  # a target covers any source

    def axis(images):
        y, x = np.mgrid[:32, :32] - 15.5
        v = images[:, 0].numpy()
        return np.arctan2(-2 * (v * x * y).sum((1, 2)), (v * (x**2 - y**2)).sum((1, 2)))  # twice the angle

    def agreement(one, other):
        return np.cos(axis(one) - axis(other)).mean()

    np.testing.assert_allclose(np.cos(axis(target) - 2 * angles[1]), 1, atol=0.02)
    assert abs(agreement(target, source)) < 0.15
    laid = [turned(x, canonical(x)) for x in (target, source)]
    assert agreement(*laid) == pytest.approx(0.81, abs=0.05)  # (4 sin(pi / 4) / pi)^2 within an octant
    assert (np.abs(axis(laid[0]) - np.pi / 4) < np.pi / 4 + 0.1).all()


def test_canonical_orientation_is_the_same_however_an_image_is_turned():
    images, turns = ellipses(RNG.uniform(0, np.pi, 200), 9, 6), RNG.integers(0, 8, 200)
    laid = turned(images, canonical(images))
    again = turned(images, turns)
    torch.testing.assert_close(turned(again, canonical(again)), laid)
    torch.testing.assert_close(turned(turned(images, turns), inverse(turns)), images)
