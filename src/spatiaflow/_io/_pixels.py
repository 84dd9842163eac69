"""Checks of pixels: the range of a picture, missing values, and positions outside of an image."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from spatiaflow._settings import warn

DEPTHS = (255, 1023, 4095, 16383, 65535)  # white of 8, 10, 12, 14 and 16 bits
BEYOND = 0.5  # how far resampling and normalisation of stains may go beyond 0 and 1
DARKEST = 10  # of 255: no picture is darker all over
FINEST, COARSEST = 0.05, 20.0  # µm per pixel that a microscope, or a copy of its picture, can have
MAX_OUTSIDE, WORTH_A_WARNING = 0.5, 0.01  # shares of positions outside of the image


def plausible(mpp: float, name: str) -> None:
    """Refuse a scale that no microscope has."""
    if not FINEST <= mpp <= COARSEST:
        raise ValueError(
            f"image {name!r} has {mpp:.4g} µm per pixel, and microscopes have {FINEST:g} to {COARSEST:g}. Give mpp= in µm per "
            "pixel of this very file."
        )


def check_finite(pixels: Any, name: str, channels: tuple[str, ...] = ()) -> None:
    """Refuse pixels (... x c x y x x) that are NaN or infinite: missing is not black."""
    if not np.issubdtype(np.asarray(pixels).dtype, np.inexact):
        return
    bad = ~np.isfinite(pixels)
    if bad.any():
        channel, y, x = np.argwhere(bad)[0][-3:]
        called = channels[channel] if channel < len(channels) else channel
        raise ValueError(
            f"image {name!r} has {int(bad.sum())} NaN or infinite pixels around the cells (channel {called!r}, first at y {y}, "
            f"x {x} of what was read). Fill them, e.g. sdata[{name!r}] = sdata[{name!r}].fillna(0), or drop those cells."
        )


def white_of(image: Any, name: str) -> float:
    """Return the value of white of a picture (H&E), from its type and its brightest pixel.

    Parameters
    ----------
    image
        Array-like, channels first or last.
    name
        Name of the image, for errors.

    Raises
    ------
    ValueError
        Values are negative or not finite, or their range has no usual depth.
    """
    if image.dtype == np.uint8:
        return 255.0
    found = [(part.min(), part.max()) for part in _blocks(image) if part.size]
    low, high = min(float(one[0]) for one in found), max(float(one[1]) for one in found)
    if np.issubdtype(image.dtype, np.inexact) and low >= -BEYOND and 0 < high <= 1 + BEYOND:  # resampled or normalised
        return 1.0
    white = next((depth for depth in DEPTHS if high <= depth), float("nan"))
    # glass is nearly white, so a picture whose brightest pixel is dark has another depth than its type says
    if not (low >= 0 and DARKEST <= high and (white == 255 or high >= 0.5 * white)):
        raise ValueError(
            f"image {name!r} is {image.dtype} with values from {low:g} to {high:g}; a picture has 0-255, 0-1 (float) or the "
            "whole range of 10, 12, 14 or 16 bits. Convert it to uint8, white to 255."
        )
    return float(white)


def _blocks(image: Any) -> Iterator[np.ndarray]:
    """Yield an image chunk by chunk."""
    if not hasattr(image, "edges"):
        yield np.asarray(image)
        return
    key = [slice(None)] * image.ndim
    for y in pairwise(image.edges[0]):
        for x in pairwise(image.edges[1]):
            for axis, (start, stop) in zip(image.axes, (y, x)):
                key[axis] = slice(int(start), int(stop))
            yield np.asarray(image[tuple(key)])


class Picture:
    """A picture of any depth as uint8; it is sliced like the array."""

    def __init__(self, image: Any, name: str):
        self.image, self.white, self.name = image, white_of(image, name), name
        self.shape, self.ndim, self.dtype = image.shape, image.ndim, np.dtype(np.uint8)
        if hasattr(image, "edges"):
            self.edges, self.axes = image.edges, image.axes

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        values = np.asarray(self.image[key], dtype=np.float32)
        check_finite(values, self.name)
        return np.round(values * (255 / self.white)).clip(0, 255).astype(np.uint8)


def as_uint8(image: Any, name: str) -> Any:
    """Return a picture as uint8; one that is uint8 as it is."""
    return image if image.dtype == np.uint8 else Picture(image, name)


def inside(xy: np.ndarray, sides: tuple[int, int], slide: str, image: str, advice: str) -> np.ndarray:
    """Return which positions lie in an image; warn where some do not, and refuse where most do not.

    Parameters
    ----------
    xy
        Positions in pixels of the image, n x 2.
    sides
        Width and height of the image.
    slide, image
        Their names.
    advice
        What becomes of those outside, for the warning.
    """
    size = np.array(sides, float)

    def share(points: np.ndarray) -> float:
        return float(((points >= 0) & (points < size)).all(1).mean())

    found = np.asarray(((xy >= 0) & (xy < size)).all(1))
    known = np.isfinite(xy).all(1)
    outside = 1 - share(xy[known]) if known.any() else 0.0
    if not outside:
        return found
    hint = " Are x and y swapped, or is mpp wrong?"
    ratio = float((xy[known].max(0) / size).max())
    if share(xy[known][:, ::-1]) > max(0.99, 1 - outside):
        hint = (
            " With x and y swapped all would lie inside." if share(xy[known][:, ::-1]) == 1 else " Are x and y swapped?"
        )
    elif ratio > 1.5 and share(xy[known] / ratio) > 0.99:
        hint = f" Positions of a {ratio:.3g} times finer scale would lie inside: is mpp, or the image's scale, wrong?"
    message = (
        f"{int((known & ~found).sum())} of {len(xy)} positions of slide {slide!r} ({outside:.1%}) lie outside of image {image!r} "
        f"({sides[0]} x {sides[1]} px)."
    )
    if outside > MAX_OUTSIDE:
        raise ValueError(message + hint)
    warn(f"{message} {advice}{hint if outside > WORTH_A_WARNING else ''}")
    return found
