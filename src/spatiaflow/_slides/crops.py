"""Crops of cells: cut from images of any size when they are read, nothing written to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from anndata import AnnData
from torch.nn import functional as F

from spatiaflow import _io
from spatiaflow._slides.patches import corners, cut
from spatiaflow.models.slide import Slide

MARGIN = 1.25  # of a crop that fits its cell, over the longer side of the cell's box


@dataclass
class Crops:
    """Square crops around the cells (or tiles) of one slide; made by :func:`spatiaflow.pp.crops`.

    Attributes
    ----------
    image
        Array-like, opened lazily.
    xy
        Middle of each crop, n x 2, pixels of the image.
    width
        Side of the crops in pixels of the image: one for all, or one of each.
    pixels
        Side of a crop as it is read.
    channels
        Names of the image's channels.
    mpp
        µm per pixel of the image.
    masks
        Pixels of each cell, where those of others are to be left out.
    members
        Of each crop, its place in ``masks``.

    Examples
    --------
    >>> crops = sf.pp.crops(sdata, image_key="fluorescence")
    >>> crops.shape
    (300, 4, 48, 48)
    >>> [len(rows) for rows, images in crops.batches(100)]
    [100, 100, 100]
    """

    image: object
    xy: np.ndarray
    width: float | np.ndarray
    pixels: int
    channels_first: bool
    channels: tuple[str, ...]
    mpp: float = 1.0
    masks: object | None = None
    members: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of crops, channels, and their side twice."""
        n_channels = self.image.shape[0 if self.channels_first else 2]
        return len(self), n_channels, self.pixels, self.pixels

    @property
    def scale(self) -> np.ndarray:
        """µm per pixel of each crop as it is read, n."""
        return np.broadcast_to(np.asarray(self.width) * self.mpp / self.pixels, len(self))

    def take(self, rows: np.ndarray) -> Crops:
        """Some of the crops."""
        width = self.width if np.isscalar(self.width) else self.width[rows]
        members = None if self.members is None else self.members[rows]
        return replace(self, xy=self.xy[rows], width=width, members=members)

    def batches(
        self, batch_size: int = 512, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (rows, crops n x C x p x p), tile of the image by tile, so that each part of it is read once."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        for places, found in self._cut(rows, batch_size):
            yield rows[places], found

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the crops of some cells, n x C x p x p, in the order of ``rows``."""
        rows, out = np.asarray(rows), None
        for places, found in self._cut(rows, 64):  # few enough to stay in the processor's cache until they are copied
            if out is None:
                out = np.empty((len(rows), *found.shape[1:]), found.numpy().dtype)
            out[places] = found.numpy()
        return torch.from_numpy(out) if out is not None else torch.empty(0, *self.shape[1:])

    def _cut(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (places in ``rows``, crops), one width after the other."""
        sizes = np.round(np.broadcast_to(self.width, len(self))[rows]).astype(int)
        arguments = {"channels_first": self.channels_first, "batch_size": batch_size}
        for size in np.unique(sizes):
            same = np.flatnonzero(sizes == size)
            width = self.width if np.isscalar(self.width) else size
            for part, found in cut(self.image, self.xy[rows[same]], width, self.pixels, **arguments):
                if self.masks is not None:
                    found = found * self._own(rows[same[part]], size).to(found.dtype)
                yield same[part], found

    def _own(self, rows: np.ndarray, size: int) -> torch.Tensor:
        """Which pixels of the crops are their cell's own, n x 1 x p x p."""
        start = corners(self.xy[rows], size)
        inside = np.stack(list(self.masks.inside(self.members[rows], np.concatenate([start, start + size], 1))))
        mask = torch.from_numpy(inside)[:, None].float()
        return F.interpolate(mask, (self.pixels, self.pixels), mode="bilinear", antialias=True) > 0.5

    def intensity(self, n: int = 1000, low: float = 1.0, high: float = 99.5) -> np.ndarray:
        """Percentiles of each channel over cells from side to side, channels x 2: background and bright end."""
        along = np.lexsort(self.xy.T)  # the order of the table plays no part
        sample = self.read(along[np.unique(np.linspace(0, len(self) - 1, min(n, len(self))).astype(int))])
        flat = sample.numpy().transpose(1, 0, 2, 3).reshape(sample.shape[1], -1)
        low, high = np.percentile(flat, [low, high], axis=1)
        return np.stack([low, np.maximum(high, low + 1e-6 + 1e-3 * np.abs(low))], 1)


def slide_crops(
    data, slide: Slide, table=None, *, crop_um: float | None, pixels: int, own_pixels=False, image_key=None
) -> Crops:
    """Crops of all cells of one slide; ``crop_um`` None fits them to the cells."""
    found = _io.slide_image(data, slide, image_key=image_key, mpp=(crop_um or 10.0) / pixels)
    masks = None
    if own_pixels or crop_um is None:
        if isinstance(data, AnnData):
            raise ValueError(
                "crops that know their cell need polygons or labels of a SpatialData; an AnnData has none."
            )
        masks = _io.masks(data, table, slide, found)
    if crop_um is None:
        box = masks.bounds
        width = MARGIN * np.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]).astype(float)
        usual = np.median(width[width > 0]) if (width > 0).any() else pixels
        width = np.clip(np.where(width > 0, width, usual), 4, 8 * usual)  # cells without area get the usual width
    else:
        width = crop_um / found.mpp
    image, channels_first, factor = _io.open_image(found.source, found.channels_first, np.median(width) / pixels)
    channels = found.channels or ("r", "g", "b")[: image.shape[0 if channels_first else 2]]
    width, xy = width / factor, found.xy / factor
    if crop_um is not None and abs(width / pixels - 1) < 0.02:  # so near that resampling would only blur
        width = pixels
    members = np.arange(len(xy)) if own_pixels else None
    return Crops(
        image,
        xy,
        width,
        pixels,
        channels_first,
        tuple(channels),
        found.mpp * factor,
        masks if own_pixels else None,
        members,
    )
