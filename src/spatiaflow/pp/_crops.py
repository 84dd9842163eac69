"""Crops of cells: cut from images of any size when they are read, nothing written to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from spatiaflow import _io
from spatiaflow.pp._patches import cut


@dataclass
class Crops:
    """Square crops around the cells of one slide.

    Attributes
    ----------
    image
        Array-like, opened lazily.
    xy
        Middle of each crop, n x 2, pixels of the image.
    width
        Side of a crop in pixels of the image.
    pixels
        Side of a crop as it is read.
    channels
        Names of the image's channels.
    """

    image: object
    xy: np.ndarray
    width: float
    pixels: int
    channels_first: bool
    channels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of crops, channels, and their side twice."""
        n_channels = self.image.shape[0 if self.channels_first else 2]
        return len(self), n_channels, self.pixels, self.pixels

    def batches(
        self, batch_size: int = 512, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (rows, crops n x C x p x p), tile of the image by tile, so that each part of it is read once."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        arguments = {"channels_first": self.channels_first, "batch_size": batch_size}
        for part, crops in cut(self.image, self.xy[rows], self.width, self.pixels, **arguments):
            yield rows[part], crops

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the crops of some cells, n x C x p x p, in the order of ``rows``."""
        rows, out = np.asarray(rows), None
        arguments = {"channels_first": self.channels_first, "batch_size": max(len(rows), 1)}
        for part, crops in cut(self.image, self.xy[rows], self.width, self.pixels, **arguments):
            out = crops.new_empty(len(rows), *crops.shape[1:]) if out is None else out
            out[torch.from_numpy(part)] = crops
        return out if out is not None else torch.empty(0, *self.shape[1:])

    def intensity(self, n: int = 1000, low: float = 1.0, high: float = 99.5) -> np.ndarray:
        """Percentiles of each channel over evenly spaced cells, channels x 2: background and bright end."""
        sample = self.read(np.unique(np.linspace(0, len(self) - 1, min(n, len(self))).astype(int)))
        flat = sample.numpy().transpose(1, 0, 2, 3).reshape(sample.shape[1], -1)
        low, high = np.percentile(flat, [low, high], axis=1)
        return np.stack([low, np.maximum(high, low + 1e-6 + 1e-3 * np.abs(low))], 1)


def slide_crops(data, slide: _io.Slide, *, crop_um: float, pixels: int, image_key=None) -> Crops:
    """Crops of all cells of one slide."""
    found = _io.slide_image(data, slide, image_key=image_key, mpp=crop_um / pixels)
    width = crop_um / found.mpp
    image, channels_first, factor = _io.open_image(found.source, found.channels_first, width / pixels)
    channels = found.channels or ("r", "g", "b")[: image.shape[0 if channels_first else 2]]
    width, xy = width / factor, found.xy / factor
    if abs(width / pixels - 1) < 0.02:  # so near that resampling would only blur
        width = pixels
    return Crops(image, xy, width, pixels, channels_first, tuple(channels))
