"""Sibling sections are brought onto one another by their images, whatever way each lay on the glass."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

import position


@pytest.mark.parametrize(("angle", "shift"), [(0, (0, 0)), (37, (4, -6)), (180, (-3, 5)), (251, (7, 2))])
def test_planted_rotation_and_shift_are_found(angle, shift):
    rng = np.random.default_rng(angle)
    size, around = 81, np.arange(81) - 40
    y, x = np.meshgrid(around, around, indexing="ij")
    blob = np.exp(-(((x / 22) ** 2 + (y / 14) ** 2) ** 2))  # a tissue with an inside
    moving = blob * (1 + 6 * gaussian_filter(rng.normal(size=(size, size)), 3))
    # a landmark at p (x, y) of the moving section lies at R p + shift on the fixed one
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    back = np.stack([x - shift[1], y - shift[0]], -1) @ np.array([[c, s], [-s, c]]).T
    fixed = map_coordinates(moving, [back[..., 1] + 40, back[..., 0] + 40], order=1, mode="nearest")
    *found, score = position.register(moving, fixed)
    assert score > 0.9
    landmarks = rng.uniform(-15, 15, (20, 2)) * position.PIXEL
    wanted = landmarks @ np.array([[c, s], [-s, c]]) + np.array(shift)[::-1] * position.PIXEL
    distance = np.linalg.norm(position.carried_over(landmarks, *found) - wanted, axis=1)
    assert distance.max() < 2 * position.PIXEL
