"""Cut patches around points from images of any size. Only a part of the image is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from spatiaflow._settings import warn

TILE = 2048  # pixels of the source: points are visited tile by tile, one read a tile
CELLS = 8  # a patch is judged as tissue or not in 8 x 8 cells, each the mean of its pixels
WHITE = 200  # of 255: where no glass is seen, it is taken to be at least as bright as this in every channel
GREY, DIM = 12, 120  # of 255: channels of glass differ by no more than GREY, and the darkest is above DIM
PADDING = 254  # of 255: what is as bright in every channel is padding, or glass that the camera could not resolve
ENOUGH_GLASS = 0.01  # of the cells
BLACK = 30  # of 255: what is darker in every channel is padding, no stain absorbs as much
DARK = 80  # of 255: the brightest channel of stained tissue is brighter
GREENISH = 0.1  # of the mean density: how much more H&E absorbs green than red and blue, at least
BESIDE_PADDING = 0.05  # of the cells that are not black: where more are white, what is black is padding
OD = (0.08, 0.15)  # bounds of the threshold of optical density; the upper one is that of Macenko et al. 2009


def warn_of_dark(name: str, where: str) -> None:
    """Warn of a picture that is darker than stained tissue ``where`` it is read."""
    warn(
        f"image {name!r} is dark {where}: is it fluorescence, or inverted? It is read as H&E in red, green and blue. Name the "
        "channels of others: sdata.set_channel_names(...)."
    )


def by_tile(xy: np.ndarray) -> list[np.ndarray]:
    """Group points (n x 2, pixels) by the tile of the image that they lie in."""
    tile = np.floor(xy / TILE).astype(int)
    order = np.lexsort([tile[:, 0], tile[:, 1]])
    return np.split(order, np.flatnonzero(np.any(np.diff(tile[order], axis=0), axis=1)) + 1) if len(order) else []


def corners(xy: np.ndarray, size: int) -> np.ndarray:
    """Top left pixel of patches of ``size`` pixels around points, n x 2 (x, y)."""
    return np.ceil(xy - size / 2 - 0.5 - 1e-6).astype(int)


def cut(
    image: Any,
    xy: np.ndarray,
    width: float,
    pixels: int,
    *,
    channels_first: bool,
    batch_size: int,
    coarse: int | None = None,
    skip: np.ndarray | None = None,
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
    coarse
        Side in pixels that patches are averaged to first, where they have more: detail that coarser pictures lack is gone.
    skip
        Points that are done, n. A batch of such points alone is left out; other batches are as they would be without.

    Patches are cut at whole pixels, so that all are resampled in the same way: centres move by at most half a pixel of the
    image. Beyond the border of the image its last pixels are repeated.
    """
    height, breadth = image.shape[1:] if channels_first else image.shape[:2]
    size = max(1, round(width))
    start = corners(xy, size)
    for rows in by_tile(xy):
        batches = [rows[s : s + batch_size] for s in range(0, len(rows), batch_size)]
        batches = batches if skip is None else [part for part in batches if not skip[part].all()]
        if not batches:
            continue
        x0, y0 = start[rows].min(0)
        x1, y1 = start[rows].max(0) + size
        at = [np.clip(np.arange(*ends), 0, n - 1) for ends, n in (((y0, y1), height), ((x0, x1), breadth))]
        inner = tuple(slice(places[0], places[-1] + 1) for places in at)
        block = np.asarray(image[(slice(None), *inner)] if channels_first else image[(*inner, slice(None))])
        block = block if channels_first else block.transpose(2, 0, 1)
        if block.shape[1:] != (y1 - y0, x1 - x0):  # beyond the border
            block = block[:, (at[0] - at[0][0])[:, None], at[1] - at[1][0]]
        windows = np.lib.stride_tricks.sliding_window_view(block, (size, size), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        for part in batches:
            found = windows[start[part, 1] - y0, start[part, 0] - x0]  # n x C x size x size
            # uint8 is kept: it is resampled many times faster than float32. Wider integers become float32, which holds 16
            # bits exactly.
            patches = torch.from_numpy(found if found.dtype == np.uint8 else found.astype(np.float32, copy=False))
            for side in (min(coarse or size, size), pixels):
                if side != patches.shape[-1]:
                    patches = F.interpolate(patches, (side, side), mode="bilinear", antialias=True, align_corners=False)
            yield part, patches


class Tissue:
    """Which share of each patch of a bright-field image is tissue. Fed with the patches as they are cut.

    A patch is judged in 8 x 8 cells, each the mean of its pixels (14 µm of a patch of 112 µm). A cell is tissue where its
    mean optical density against the glass of the image is above a threshold. Glass is the commonest of the bright cells without a
    colour, white padding left out: scans may have glass at two thirds of white. Where there are none, it is the 99 % quantile of
    all cells. The threshold is Otsu's (1979), within bounds: without them an image with little glass would be cut
    between pale and dark tissue, and one without tissue in the noise of its glass. Black cells are padding, and what lies
    outside the image is no tissue.
    """

    def __init__(self, xy: np.ndarray, width: float, shape: Sequence[int]):
        """For patches ``width`` pixels wide around points (n x 2) of an image of ``shape`` (height, breadth)."""
        size = max(1, round(width))
        middle = corners(xy, size)[:, None] + (np.arange(CELLS)[:, None] + 0.5) * size / CELLS  # n x 8 x 2 (x, y)
        good = (middle >= 0) & (middle < np.array([shape[1], shape[0]]))
        self.inside = good[:, :, None, 1] & good[:, None, :, 0]
        self.colour = np.zeros((len(xy), CELLS, CELLS, 3), np.uint8)

    def add(self, rows: np.ndarray, patches: torch.Tensor) -> None:
        """Take in patches (n x 3 x p x p, 0 to 255) of some rows."""
        pooled = F.adaptive_avg_pool2d(patches.float(), CELLS)
        self.colour[rows] = pooled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    @property
    def dark(self) -> bool:
        """Whether most of what the patches show is too dark for light that went through tissue, and it is no black padding."""
        colour = self.colour[self.inside]
        if not len(colour) or (brightest(colour) < DARK).mean() <= 0.5:
            return False
        seen = colour[brightest(colour) >= BLACK]
        return not len(seen) or bool((darkest(seen) > WHITE).mean() < BESIDE_PADDING)

    def cells(self, without: np.ndarray | None = None) -> np.ndarray:
        """Which cells are tissue, n x 8 x 8; those of ``without`` are none."""
        known = self.inside & (brightest(self.colour) >= BLACK)
        known = known if without is None else known & ~without
        if not known.any():
            return known
        density, threshold = optical_density(self.colour, known)
        return known & (density > threshold)

    def share(self, without: np.ndarray | None = None) -> np.ndarray:
        """Share of each patch, n, float32 in [0, 1]; cells of ``without`` (n x 8 x 8) are no tissue."""
        return self.cells(without).mean((1, 2), dtype=np.float32)

    def unlike_stain(self, rows: np.ndarray, cells: np.ndarray) -> float:
        """Share of the ``cells`` of some rows that absorb green hardly more than red and blue: in H&E at most 2 % do."""
        colour = self.colour[rows][cells]
        if not len(colour):
            return 0.0
        density = np.log(glass(self.colour[self.inside]) / np.maximum(colour, 1))
        return float((density[:, 1] - density[:, [0, 2]].mean(1) < GREENISH * density.mean(1)).mean())

    def stains(self, cells: np.ndarray) -> np.ndarray:
        """Quartiles over the patches of the mean optical density of hematoxylin and eosin in their ``cells``, 2 x 3.

        Against a fixed white, as the texture features see it; NaN where no cell is tissue.
        """
        from spatiaflow.models.encoders._texture import UNMIX

        out = np.full((len(cells), 2), np.nan, np.float32)
        for start in range(0, len(cells), 4096):
            part = slice(start, start + 4096)
            density = -np.log10((self.colour[part].astype(np.float32) + 1) / 256) @ UNMIX.numpy()[:, :2]
            own = cells[part][..., None]
            count = own.sum((1, 2))
            out[part] = np.where(count > 0, (density * own).sum((1, 2)) / np.maximum(count, 1), np.nan)
        known = out[np.isfinite(out).all(1)]
        return np.quantile(known, (0.25, 0.5, 0.75), axis=0).T if len(known) else np.full((2, 3), np.nan)


def optical_density(colour: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean optical density of colours (... x 3, uint8) against the glass among those ``known``, and the threshold of tissue."""
    white = glass(colour[known])
    density = np.zeros(known.shape, np.float32)
    for channel in range(3):  # one at a time: 64 floats of a patch, not 192
        density -= np.log(np.maximum(colour[..., channel], 1) / white[channel]) / 3
    return density, float(np.clip(otsu(density[known]), *OD))


def brightest(colour: np.ndarray) -> np.ndarray:
    """Brightest channel of colours (... x 3); ``max`` over so short an axis takes 25 times as long."""
    return np.maximum(np.maximum(colour[..., 0], colour[..., 1]), colour[..., 2])


def darkest(colour: np.ndarray) -> np.ndarray:
    """Darkest channel of colours (... x 3)."""
    return np.minimum(np.minimum(colour[..., 0], colour[..., 1]), colour[..., 2])


def glass(colour: np.ndarray) -> np.ndarray:
    """Colour of the glass among the colours of cells (n x 3, uint8), float32."""
    low, high = darkest(colour), brightest(colour)
    grey = colour[(high - low <= GREY) & (low > DIM) & (low < PADDING)]
    if len(grey) < max(ENOUGH_GLASS * len(colour), 1):
        return np.clip(np.quantile(colour, 0.99, axis=0), WHITE, 255).astype(np.float32)
    brightness = grey.mean(1)
    count, edges = np.histogram(brightness, np.arange(DIM, 260, 4))
    common = edges[np.argmax(count)] + 2
    return np.median(grey[np.abs(brightness - common) <= 6], axis=0).astype(np.float32)


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Threshold of largest variance between the two classes that it makes (Otsu, 1979)."""
    count, edges = np.histogram(values, bins)
    below = np.cumsum(count)[:-1]
    weighted = np.cumsum(count * (edges[1:] + edges[:-1]) / 2)
    above = len(values) - below
    between = (
        below
        * above
        * (weighted[:-1] / np.maximum(below, 1) - (weighted[-1] - weighted[:-1]) / np.maximum(above, 1)) ** 2
    )
    return float(edges[1 + np.argmax(between)])
