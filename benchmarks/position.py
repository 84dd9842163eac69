"""Position only: expression of serial sections of the same tissue, carried over by registering their H&E images.

No local histology is used: a spot gets the Gaussian-weighted mean of the other sections of its donor at the same place.
"""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, rotate
from scipy.signal import fftconvolve
from scipy.spatial.distance import cdist

from spatiaflow import _io
from spatiaflow.models.regression import gene_pearson

PIXEL = 40.0  # µm
BANDWIDTHS = (75.0, 100.0, 150.0, 200.0, 300.0, 450.0)  # µm


def density_map(adata) -> np.ndarray:
    """Optical density of the H&E image, square, PIXEL µm a pixel, the bounding box of the spots in the middle."""
    slide = _io.places(adata, _io.Where())[0]
    image = _io.slide_image(adata, slide, image_key="hires")
    size = int(np.ptp(slide.xy, axis=0).max() / PIXEL * 1.4) | 1
    grid = (np.arange(size) - size // 2) * PIXEL / image.mpp
    x, y = np.meshgrid(*(grid + middle for middle in (image.xy.min(0) + image.xy.max(0)) / 2))
    density = -np.log((np.asarray(image.source)[..., :3].mean(-1) + 1) / 256)
    blurred = gaussian_filter(density, PIXEL / image.mpp / 2)
    return map_coordinates(blurred, [y, x], order=1, mode="nearest")


def register(moving: np.ndarray, fixed: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Rotation (degrees) and then shift (pixels, y and x) that bring ``moving`` onto ``fixed``, and their correlation.

    All rotations in steps of 6 degrees, then of 1 around the best; all shifts by Fourier transform.
    """
    pad = max(len(moving), len(fixed))
    moving, fixed = (np.pad(m - np.median(m), (pad - len(m)) // 2 + pad // 4) for m in (moving, fixed))
    size = min(len(moving), len(fixed))
    moving, fixed = moving[:size, :size], fixed[:size, :size]

    def try_angle(angle):
        turned = rotate(moving, angle, reshape=False, order=1)
        match = fftconvolve(fixed, turned[::-1, ::-1], mode="same")
        at = np.unravel_index(match.argmax(), match.shape)
        shift = np.array(at) - (size - 1) // 2
        return match.max() / (np.linalg.norm(turned) * np.linalg.norm(fixed)), angle, shift

    best = max((try_angle(a) for a in range(0, 360, 6)), key=lambda r: r[0])
    best = max((try_angle(best[1] + a) for a in range(-5, 6)), key=lambda r: r[0])
    return best[1], best[2], float(best[0])


def carried_over(xy: np.ndarray, angle: float, shift: np.ndarray) -> np.ndarray:
    """Positions (µm, around the middle of their section) after a registration of :func:`register`."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return xy @ np.array([[c, -s], [s, c]]) + shift[::-1] * PIXEL


def position_only(sections: dict, train: list, test) -> np.ndarray:
    """Predict ``test`` from the sections of its donor (same first letter) in ``train``; bandwidth by inner sections."""
    donor = [s for s in train if s.name[0] == test.name[0]]
    if not donor:
        raise ValueError(f"section {test.name} has no sibling among the training sections.")
    maps = {s.name: density_map(sections[s.name]) for s in [*donor, test]}
    middle = {s.name: s.slide.xy - (s.slide.xy.min(0) + s.slide.xy.max(0)) / 2 for s in [*donor, test]}

    def predict(others, target, bandwidth):
        total, mass = 0.0, 1e-12
        for other in others:
            pair = other.name, target.name
            if pair not in moved:
                moved[pair] = register(maps[pair[0]], maps[pair[1]])
            at = carried_over(middle[pair[0]], *moved[pair][:2])
            weight = np.exp(-(cdist(middle[pair[1]], at) ** 2) / (2 * bandwidth**2))
            total, mass = total + weight @ (other.y - other.y.mean(0)), mass + weight.sum(1, keepdims=True)
        return np.mean([s.y.mean(0) for s in others], 0) + total / mass

    moved: dict = {}
    scores = np.zeros(len(BANDWIDTHS))
    for inner in donor if len(donor) > 1 else []:
        others = [s for s in donor if s is not inner]
        scores += [np.nanmean(gene_pearson(inner.y, predict(others, inner, b))) for b in BANDWIDTHS]
    return predict(donor, test, BANDWIDTHS[int(scores.argmax())])
