"""Crops of cells, cut from images of any size when they are read. Nothing is written to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from spatialdata import SpatialData
from torch.nn import functional as F

from spatiaflow import _io
from spatiaflow._settings import logger
from spatiaflow._slides.patches import corners, cut
from spatiaflow.models.slide import ABSENT, Slide

MARGIN = 1.25  # width of a crop that fits its cell, over the longer side of the cell's box
SHARED_BYTES = 1536 * 2**20  # decoded chunks that training keeps, because scattered cells come back to the same places


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
        Pixels of each cell, to set all others to 0.
    members
        Row of each crop in ``masks``.
    places
        For each channel of a model its place among the image's channels, or -1; see :meth:`matched`.
    range
        Background and bright end of each channel of the image, channels x 2.
    name
        Name of the image, for errors.
    wide
        Width of a second crop around each cell over that of the first. Its channels follow those of the first. 0: none.

    Examples
    --------
    >>> crops = sf.pp.crops(sdata, image_key="fluorescence")
    >>> crops.shape
    (300, 4, 48, 48)
    >>> [len(rows) for rows, images in crops.batches(100)]
    [100, 100, 100]
    """

    image: Any
    xy: np.ndarray
    width: float | np.ndarray
    pixels: int
    channels_first: bool
    channels: tuple[str, ...]
    mpp: float = 1.0
    masks: Any = None
    members: np.ndarray = ABSENT
    places: np.ndarray = ABSENT
    range: np.ndarray = ABSENT
    name: str = "image"
    wide: float = 0.0

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of crops, channels, and their side twice."""
        n_channels = self.image.shape[0 if self.channels_first else 2]
        return len(self), n_channels * (2 if self.wide else 1), self.pixels, self.pixels

    @property
    def scale(self) -> np.ndarray:
        """µm per pixel of each crop as it is read, n."""
        return np.broadcast_to(np.asarray(self.width) * self.mpp / self.pixels, len(self))

    @property
    def inside(self) -> np.ndarray:
        """Which crops have their centre in the image, n, bool."""
        return np.asarray(((self.xy >= 0) & (self.xy < np.array(self._sides)[::-1])).all(1))

    @property
    def _sides(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.image.shape[1:] if self.channels_first else self.image.shape[:2]

    def take(self, rows: np.ndarray) -> Crops:
        """Return the crops of some rows (indices or bool)."""
        width = self.width[rows] if isinstance(self.width, np.ndarray) else self.width
        members = None if self.members is None else self.members[rows]
        return replace(self, xy=self.xy[rows], width=width, members=members)

    def matched(self, channels: Sequence[str], names: Mapping[str, str] | None, slide_name: str) -> Crops:
        """Return the crops with ``places`` of a model's channels, and ``range`` where it is not known yet.

        Parameters
        ----------
        channels
            Channels of the model. Names are compared without case.
        names
            The model's names of channels that the image calls otherwise, ``{"DAPI": "dapi"}``.
        slide_name
            Name of the slide, for errors.
        """
        places = match_channels(self.channels, list(channels), names, slide_name)
        found = self.take(np.flatnonzero(self.inside)).intensity() if self.range is None else self.range
        return replace(self, places=places, range=found)

    def batches(
        self, batch_size: int = 512, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (rows, crops n x C x p x p), one tile of the image after the other, so that each is read once."""
        rows = np.arange(len(self)) if rows is None else self._rows(rows)
        for places, found in self._cut(rows, batch_size):
            yield rows[places], self._beside(rows[places], found)

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the crops of some cells, n x C x p x p, in the order of ``rows``."""
        rows, out = self._rows(rows), np.empty(0)
        for places, found in self._cut(rows, 64):  # few enough to stay in the processor's cache until they are copied
            if not len(out):
                out = np.empty((len(rows), *found.shape[1:]), found.numpy().dtype)
            out[places] = found.numpy()
        return self._beside(rows, torch.from_numpy(out)) if len(out) else torch.empty(0, *self.shape[1:])

    def _beside(self, rows: np.ndarray, found: torch.Tensor) -> torch.Tensor:
        """Crops of some cells with their wider crops beside them, where there are any."""
        if not self.wide:
            return found
        wider = replace(self, width=self.width * self.wide, wide=0.0, masks=None, members=ABSENT)
        return torch.cat([found, wider.read(rows)], 1)

    def _rows(self, given: Any) -> np.ndarray:
        """Numbers of crops, of numbers or a mask."""
        rows = np.asarray(given)
        if rows.dtype == bool and rows.shape == (len(self),):
            return np.flatnonzero(rows)
        if rows.size == 0:
            return np.zeros(0, int)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < -len(self) or rows.max() >= len(self):
            raise ValueError(
                f"rows must be numbers 0 to {len(self) - 1}, or {len(self)} values True or False; they are {str(given)[:50]}."
                " Of names give data.obs_names.get_indexer(names)."
            )
        return rows

    def _cut(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (places in ``rows``, crops), one width after the other."""
        sizes = np.round(np.broadcast_to(self.width, len(self))[rows]).astype(int)
        arguments: dict[str, Any] = {"channels_first": self.channels_first, "batch_size": batch_size}
        for size in np.unique(sizes):
            same = np.flatnonzero(sizes == size)
            width = size if isinstance(self.width, np.ndarray) else self.width
            for part, found in cut(self.image, self.xy[rows[same]], width, self.pixels, **arguments):
                _io.check_finite(found.numpy(), self.name, self.channels)
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
        """Background and bright end of each channel, channels x 2: percentiles over evenly spaced cells."""
        along = np.lexsort(self.xy.T)  # the order of the table has no influence
        sample = replace(self, wide=0.0).read(
            along[np.unique(np.linspace(0, len(self) - 1, min(n, len(self))).astype(int))]
        )
        flat = sample.numpy().transpose(1, 0, 2, 3).reshape(sample.shape[1], -1)
        low, high = np.percentile(flat, [low, high], axis=1)
        return np.stack([low, np.maximum(high, low + 1e-6 + 1e-3 * np.abs(low))], 1)


def match_channels(
    have: Sequence[str], wanted: list[str], names: Mapping[str, str] | None, slide_name: str
) -> np.ndarray:
    """Return for each of a model's channels its place in the image, or -1. Names are compared without case."""
    names = names or {}
    if unknown := [name for name in names if name not in have]:
        raise KeyError(f"channels= names {unknown[0]!r}; the image of slide {slide_name!r} has {', '.join(have)}.")
    if unknown := [name for name in names.values() if name not in wanted]:
        raise KeyError(f"channels= maps to {unknown[0]!r}; the model has {', '.join(wanted)}.")
    called = [str(names.get(name, name)).lower() for name in have]
    if twice := [name for name in wanted if called.count(name.lower()) > 1]:
        several = [name for name, as_ in zip(have, called) if as_ == twice[0].lower()]
        raise ValueError(
            f"channels {', '.join(several)} of slide {slide_name!r} would all be the model's {twice[0]!r}. Map one of "
            "them with channels=, or rename the others with sdata.set_channel_names(...)."
        )
    places = np.array([called.index(name.lower()) if name.lower() in called else -1 for name in wanted], int)
    if (places < 0).all():
        raise KeyError(
            f"none of the channels of slide {slide_name!r} ({', '.join(have)}) is known to the model "
            f"({', '.join(wanted)}). Map them: channels={{{have[0]!r}: {wanted[0]!r}}}, or give modalities='genes'."
        )
    if (places < 0).any():
        missing = [name for name, place in zip(wanted, places) if place < 0]
        if left := [name for name, as_ in zip(have, called) if as_ not in [w.lower() for w in wanted]]:
            logger.warning(
                "slide %r has no channel %s: masked, and its %s left out. If they are the same, map them: channels={%r: %r}",
                slide_name, ", ".join(missing), ", ".join(left), left[0], missing[0],
            )  # fmt: skip
        else:
            logger.info("slide %r has no channel %s: masked", slide_name, ", ".join(missing))
    return places


def check_inside(crops: Any, name: str) -> np.ndarray:
    """Return ``crops.inside``. Refuse an image smaller than a crop, or without most of the cells; warn of cells outside."""
    height, width = crops._sides
    if min(height, width) < np.median(crops.width):
        raise ValueError(
            f"the image of slide {name!r} is {width} x {height} px, smaller than a crop ({np.median(crops.width):.0f} px)."
        )
    return _io.inside(crops.xy, (width, height), name, crops.name, "Those cells are used without it.")


def share_memory(slides: Sequence[Slide]) -> None:
    """Let the images of all slides keep their decoded chunks in one cache of fixed size."""
    decoded = _io.Decoded(SHARED_BYTES)
    for slide in slides:
        if slide.crops is not None and hasattr(slide.crops.image, "decoded"):
            slide.crops.image.decoded = decoded


def slide_crops(
    data: AnnData | SpatialData,
    slide: Slide,
    table: AnnData | None = None,
    *,
    crop_um: float | None,
    pixels: int,
    wide: float = 0.0,
    own_pixels: bool = False,
    as_uint8: bool = False,
    image_key: str | None = None,
) -> Crops:
    """Return the crops of all cells of one slide; ``crop_um=None`` fits each to its cell. ``wide``: see :class:`Crops`.

    ``as_uint8``: a picture (H&E) of any depth is read as uint8, as a model knows it.
    """
    found = _io.slide_image(data, slide, image_key=image_key, mpp=(crop_um or 10.0) / pixels)
    masks: Any = None
    if own_pixels or crop_um is None:
        if isinstance(data, AnnData):
            raise ValueError(
                "crops that fit their cell, or show it alone, need polygons or labels of a SpatialData; an AnnData has none."
            )
        masks = _io.masks(data, table, slide, found)
    if crop_um is None:
        box = masks.bounds
        width = MARGIN * np.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]).astype(float)
        usual = np.median(width[width > 0]) if (width > 0).any() else pixels
        width = np.clip(np.where(width > 0, width, usual), 4, 8 * usual)  # cells without area get the usual width
    else:
        width = crop_um / found.mpp
    if (seen := float(np.median(width))) < 0.4 * pixels:
        logger.warning(
            "image %r has %.3g µm per pixel: crops of %d pixels are enlarged from %.2g", found.name, found.mpp, pixels, seen
        )  # fmt: skip
    image, channels_first, factor = _io.open_image(found.source, found.channels_first, np.median(width) / pixels)
    n_channels = image.shape[0 if channels_first else 2]
    if as_uint8 and found.is_rgb(n_channels):
        image = _io.as_uint8(image, found.name)
    unnamed = found.channels in ((), ("0", "1", "2"))  # of an array; of a SpatialData whose reader gave no names
    channels = ("r", "g", "b")[:n_channels] if unnamed else found.channels
    width, xy = width / factor, found.xy / factor
    if crop_um is not None and abs(width / pixels - 1) < 0.02:  # close enough: resampling would only blur
        width = pixels
    members = np.arange(len(xy)) if own_pixels else ABSENT
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
        name=found.name,
        wide=wide,
    )
