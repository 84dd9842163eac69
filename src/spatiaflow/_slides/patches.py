"""Cut patches around points from images of any size. Only a part of the image is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

TILE = 2048  # pixels of the source: points are visited tile by tile, one read a tile


def by_tile(xy: np.ndarray) -> list[np.ndarray]:
    """Group points (n x 2, pixels) by the tile of the image that they lie in."""
    tile = np.floor(xy / TILE).astype(int)
    order = np.lexsort([tile[:, 0], tile[:, 1]])
    return np.split(order, np.flatnonzero(np.any(np.diff(tile[order], axis=0), axis=1)) + 1) if len(order) else []


def corners(xy: np.ndarray, size: int) -> np.ndarray:
    """Top left pixel of patches of ``size`` pixels around points, n x 2 (x, y)."""
    return np.ceil(xy - size / 2 - 0.5 - 1e-6).astype(int)


def cut(
    image: Any, xy: np.ndarray, width: float, pixels: int, *, channels_first: bool, batch_size: int
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (rows, patches n x C x pixels x pixels) around points; uint8 where the image is, else float32.

    Parameters
    ----------
    image
        Array-like (NumPy, :class:`spatiaflow._io.Chunks`), c x y x or y x c.
    xy
        Centres, n x 2, in pixels of the image; pixel i covers [i, i + 1).
    width
        Side of a patch in pixels of the image.
    pixels
        Side of a patch after resampling (anti-aliased).
    batch_size
        Patches yielded at a time.

    Patches are cut at whole pixels, so that all are resampled in the same way: centres move by at most half a pixel of the
    image. Beyond the border of the image its last pixels are repeated.
    """
    height, breadth = image.shape[1:] if channels_first else image.shape[:2]
    size = max(1, round(width))
    start = corners(xy, size)
    for rows in by_tile(xy):
        x0, y0 = start[rows].min(0)
        x1, y1 = start[rows].max(0) + size
        at = [np.clip(np.arange(*ends), 0, n - 1) for ends, n in (((y0, y1), height), ((x0, x1), breadth))]
        inner = tuple(slice(places[0], places[-1] + 1) for places in at)
        block = np.asarray(image[(slice(None), *inner)] if channels_first else image[(*inner, slice(None))])
        block = block if channels_first else block.transpose(2, 0, 1)
        if block.shape[1:] != (y1 - y0, x1 - x0):  # beyond the border
            block = block[:, (at[0] - at[0][0])[:, None], at[1] - at[1][0]]
        windows = np.lib.stride_tricks.sliding_window_view(block, (size, size), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        for s in range(0, len(rows), batch_size):
            part = rows[s : s + batch_size]
            found = windows[start[part, 1] - y0, start[part, 0] - x0]  # n x C x size x size
            # uint8 is kept: it is resampled many times faster than float32. Wider integers become float32, which holds 16
            # bits exactly.
            patches = torch.from_numpy(found if found.dtype == np.uint8 else found.astype(np.float32, copy=False))
            if size != pixels:
                patches = F.interpolate(patches, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)
            yield part, patches
