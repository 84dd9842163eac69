"""What spoils a picture of a slide: pen, the frame of a Visium slide, a small copy in a corner, and parts out of focus.

Red ink cannot be told for sure from blood of an orange stain. It has a name of its own, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree

from spatiaflow._slides.patches import BLACK, CELLS, brightest, cut, glass, optical_density

NAMES = ("pen", "frame", "inset", "red", "blurred")  # codes 1 to 5
NO_TISSUE = 3  # the first three are no tissue
COVERED = 0.05  # share of a square that an artefact covers, at least, to be named

DOT_UM = (45.0, 160.0)  # diameters that a fiducial of a Visium slide may have; they measure about 90 µm, 150 µm apart
ROUND = 0.55  # a dot fills this share of the box around it
REGULAR = 0.08  # by how much the distances to a dot's two nearest differ from the commonest distance
GAP_UM = 16.0  # widest gap in the ring that a dot can be
MIN_DOTS = 40  # in a frame; a frame of 6.5 mm has about 400
# a dot, and a speck of up to two dots, is the frame's within this distance of three dots of it
REACH_UM = (600.0, 250.0)
COARSEST_FRAME = 20.0  # µm per pixel at which dots are still apart
RIM_UM = 20.0  # the rim of what is found is blurred

PEN_UM = 100.0  # width of the thinnest stroke
PEN_MM2 = 0.1  # area of the smallest
STROKE = 0.3  # mean optical density of ink, at least
BLUER = 0.35  # ink absorbs more red than green, by this share of the mean; H&E at most .22 in any section looked at
REDDER = 0.7  # red ink absorbs more blue than red, by this share of the mean; H&E at most .57, vessels with blood at most .54
# mean optical density of black ink, and largest difference of its channels, as a share
BLACK_INK, COLOURLESS = 1.2, 0.12

INSET = 0.25  # a small copy covers at most this share of the largest part of the picture
RECTANGLE = 0.95  # and fills this share of the box around it

# µm per pixel at which sharpness is judged, and of the coarsest picture that allows it
SHARP_UM, COARSEST_UM = 1.0, 2.0
FINE = 4  # fine detail is compared with detail this many times coarser
BLURRED = 0.25  # of the upper quartile of the slide's ratios
FLAT = 0.1  # of the upper quartile of the slide's coarse detail


def artefacts_of(small: np.ndarray, um: float) -> np.ndarray:
    """Codes of artefacts (y x x, uint8; 0: none) on a small copy (y x x x 3, uint8) of a picture, ``um`` µm per pixel."""
    known = brightest(small) >= BLACK
    out = np.zeros(known.shape, np.uint8)
    if not known.any():
        return out
    density, threshold = optical_density(small, known)
    reach = max(1, round(RIM_UM / um))
    cold, red = pen(small, known, um)
    dots = frame(known & (density > threshold), um)
    for name, found in (("red", red), ("pen", cold), ("frame", dots), ("inset", inset(known))):
        if found.any():
            out[ndimage.binary_dilation(found, iterations=reach)] = 1 + NAMES.index(name)
    return out


def frame(dense: np.ndarray, um: float) -> np.ndarray:
    """Fiducials of a Visium slide among dense pixels: round dots or rings, each as far from its nearest two as all others."""
    none = np.zeros(dense.shape, bool)
    if um > COARSEST_FRAME:
        return none
    disks = ndimage.binary_fill_holes(_closed(dense, max(1, round(GAP_UM / 2 / um))))
    labels, n = ndimage.label(disks, np.ones((3, 3)))
    if n < MIN_DOTS:
        return none
    area = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    sides = np.array([[side.stop - side.start for side in box] for box in ndimage.find_objects(labels)])
    longest = sides.max(1) * um
    dot = (longest <= DOT_UM[1]) & (sides.min(1) * um >= DOT_UM[0]) & (area >= ROUND * sides.prod(1))
    if dot.sum() < MIN_DOTS:
        return none
    centre = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, n + 1))) * um
    distance = cKDTree(centre[dot]).query(centre[dot], k=3)[0][:, 1:]
    regular = np.flatnonzero(dot)[(np.abs(distance / _commonest(distance[:, 0]) - 1) <= REGULAR).all(1)]
    if len(regular) < MIN_DOTS:
        return none
    chosen, before = np.isin(np.arange(n), regular), 0
    while chosen.sum() > before:  # dots that are smeared, cut or set apart, and specks between them
        before = chosen.sum()
        third = cKDTree(centre[chosen & dot]).query(centre, k=3)[0][:, 2]
        chosen |= (dot & (third <= REACH_UM[0])) | ((longest <= 2 * DOT_UM[1]) & (third <= REACH_UM[1]))
    return np.concatenate([[False], chosen])[labels]


def _closed(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Closing that does not open at the border of the picture."""
    return ndimage.binary_closing(np.pad(mask, pixels), np.ones((3, 3)), pixels)[pixels:-pixels, pixels:-pixels]


def _commonest(values: np.ndarray) -> float:
    """Median of the largest group of values that differ by no more than ``REGULAR``."""
    values = np.sort(values)
    ends = np.searchsorted(values, values * (1 + REGULAR), "right")
    first = int(np.argmax(ends - np.arange(len(values))))
    return float(np.median(values[first : ends[first]]))


def pen(small: np.ndarray, known: np.ndarray, um: float) -> tuple[np.ndarray, np.ndarray]:
    """Strokes of green, blue and black pens, and of red ones.

    Ink between red and purple, and pink ink over tissue, has the colour of eosin, and is not found.
    """
    white, width = glass(small[known]), max(1, round(PEN_UM / 4 / um))
    red, green, blue = (
        -np.log(np.maximum(ndimage.uniform_filter(small[..., i].astype(np.float32), width), 1) / white[i])
        for i in range(3)
    )
    mean = (red + green + blue) / 3
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    dense = known & (mean > STROKE)
    cold = dense & ((red - green > BLUER * mean) | ((mean > BLACK_INK) & (spread < COLOURLESS * mean)))
    return _strokes(cold, um), _strokes(dense & (blue - red > REDDER * mean), um)


def _strokes(ink: np.ndarray, um: float) -> np.ndarray:
    """Ink that is as broad and as large as a stroke."""
    broad = ndimage.binary_opening(ink, np.ones((2, 2)), iterations=max(1, round(PEN_UM / 2 / um)))
    labels, n = ndimage.label(broad)
    return (np.bincount(labels.ravel(), minlength=n + 1) * um**2 / 1e6 >= PEN_MM2)[labels] & broad


def inset(known: np.ndarray) -> np.ndarray:
    """Rectangles in a corner of the picture that black padding sets off from the rest: small copies and labels."""
    labels, n = ndimage.label(known)
    if n < 2:
        return np.zeros(known.shape, bool)
    area = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    chosen = np.zeros(n + 1, bool)
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels)):
        corner = (rows.start == 0 or rows.stop == known.shape[0]) and (
            columns.start == 0 or columns.stop == known.shape[1]
        )
        box = (rows.stop - rows.start) * (columns.stop - columns.start)
        chosen[i + 1] = corner and area[i] >= RECTANGLE * box and area[i] <= INSET * area.max()
    return chosen[labels]


def at_cells(codes: np.ndarray, xy: np.ndarray, width: float) -> np.ndarray:
    """Codes at the cells of squares ``width`` pixels wide around points (n x 2, pixels of ``codes``), n x 8 x 8."""
    offsets = ((np.arange(CELLS) + 0.5) / CELLS - 0.5) * width
    columns, rows = (
        np.clip(np.floor(xy[:, i, None] + offsets).astype(int), 0, codes.shape[1 - i] - 1) for i in range(2)
    )
    return codes[rows[:, :, None], columns[:, None, :]]


def sharpness(
    image: Any, xy: np.ndarray, width: float, pixels: int, *, channels_first: bool, progress: Callable[[int], Any]
) -> np.ndarray:
    """Variance of the Laplacian of each square, and of its copy of a quarter of the size, n x 2, float32."""
    out = np.zeros((len(xy), 2), np.float32)
    for rows, patches in cut(image, xy, width, pixels, channels_first=channels_first, batch_size=256):
        red, green, blue = (patches[:, i].numpy().astype(np.int16) for i in range(3))
        bright, side = red + green + blue, patches.shape[-1] // FINE * FINE
        shifted = [bright[:, i:side:FINE, j:side:FINE] for i in range(FINE) for j in range(FINE)]
        coarse = np.stack(shifted).sum(0, dtype=np.int32)
        out[rows] = np.stack([_laplacian_variance(bright, 3), _laplacian_variance(coarse, 3 * FINE**2)], 1)
        progress(len(rows))
    return out


def _laplacian_variance(sums: np.ndarray, n: int) -> np.ndarray:
    """Variance of the Laplacian of pictures (each y x x, integers) whose pixels are sums of ``n`` values."""
    laplacian = 4 * sums[:, 1:-1, 1:-1]  # a convolution of torch takes ten times as long
    for neighbour in (sums[:, :-2, 1:-1], sums[:, 2:, 1:-1], sums[:, 1:-1, :-2], sums[:, 1:-1, 2:]):
        laplacian -= neighbour
    return (laplacian.reshape(len(sums), -1) / np.float32(n)).var(1, ddof=1)


def out_of_focus(sharp: np.ndarray) -> np.ndarray:
    """Which squares of a slide lack fine detail, from their :func:`sharpness`, n.

    Both variances come from one square: their ratio depends on focus, and little on what the tissue is. Where there is no coarse
    detail either, the slide's is taken.
    """
    fine, coarse = sharp.T
    ratio = fine / (np.maximum(coarse, FLAT * np.quantile(coarse, 0.75)) + 1)
    return ratio < BLURRED * np.quantile(ratio, 0.75)


def named(cells: np.ndarray, sharp: np.ndarray | None) -> pd.Categorical:
    """Artefact of each square from codes at its cells (n x 8 x 8) and its sharpness; missing where there is none."""
    covered = np.stack([(cells == code).mean((1, 2)) for code in range(1, len(NAMES))], 1)
    codes = np.where(covered.max(1) >= COVERED, covered.argmax(1), -1)
    if sharp is not None and len(sharp):
        codes[(codes < 0) & out_of_focus(sharp)] = NAMES.index("blurred")
    return pd.Categorical.from_codes(codes, categories=list(NAMES))
