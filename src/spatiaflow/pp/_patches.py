"""Cut patches around points out of images of any size: every part of the image is read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

TILE = 2048  # pixels of the source that are read at a time


def open_image(source, channels_first: bool):
    """Return an array-like and whether channels come first; files are opened lazily where their format allows."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix.lower() in (".tif", ".tiff"):
            import tifffile
            import zarr

            with tifffile.TiffFile(path) as tif:
                axes = tif.series[0].axes
            store = tifffile.imread(path, aszarr=True, level=0)
            return zarr.open(store, mode="r"), axes.index("Y") > 0
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # slides are larger than Pillow's guard
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB")), False
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if source.ndim == 2:
        return source[None] if channels_first else source[..., None], channels_first
    return source, channels_first


def cut(
    image, xy: np.ndarray, width: float, pixels: int, *, channels_first: bool, batch_size: int
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield (rows, uint8 patches n x C x pixels x pixels) around points.

    Parameters
    ----------
    image
        Array-like (NumPy, dask, Zarr), c x y x or y x c.
    xy
        Centres, n x 2, in pixels of the image; pixel i covers [i, i + 1).
    width
        Side of a patch in pixels of the image.
    pixels
        Side of a patch after resampling (anti-aliased).
    batch_size
        Patches yielded at a time.

    Points near a border see the border's colour repeated, as glass goes on beyond the picture.
    """
    height, breadth = image.shape[1:] if channels_first else image.shape[:2]
    size = max(1, round(width))
    start = np.floor(xy - size / 2 + 1e-6).astype(int)  # top left corner, x and y
    tile = np.floor(xy / TILE).astype(int)
    order = np.lexsort([tile[:, 0], tile[:, 1]])
    groups = np.split(order, np.flatnonzero(np.any(np.diff(tile[order], axis=0), axis=1)) + 1) if len(order) else []
    for rows in groups:
        x0, y0 = start[rows].min(0)
        x1, y1 = start[rows].max(0) + size
        inner = slice(max(y0, 0), min(y1, height)), slice(max(x0, 0), min(x1, breadth))
        block = np.asarray(image[(slice(None), *inner)] if channels_first else image[inner])
        block = block if channels_first else block.transpose(2, 0, 1)
        pad = ((0, 0), (max(-y0, 0), max(y1 - height, 0)), (max(-x0, 0), max(x1 - breadth, 0)))
        if np.any(pad):
            block = np.pad(block, pad, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(block, (size, size), axis=(1, 2))
        for s in range(0, len(rows), batch_size):
            part = rows[s : s + batch_size]
            patches = torch.from_numpy(
                windows[:, start[part, 1] - y0, start[part, 0] - x0].transpose(1, 0, 2, 3).copy()
            )
            if size != pixels:
                patches = F.interpolate(
                    patches.float(), (pixels, pixels), mode="bilinear", antialias=True, align_corners=False
                )
                patches = patches.round().clamp(0, 255).to(torch.uint8)
            yield part, patches
