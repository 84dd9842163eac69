"""Open images of any size and read parts of them, decoding each chunk once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spatiaflow._io._files import open_file

CACHE_BYTES = 512 * 2**20  # decoded chunks that neighbouring tiles share


class Decoded:
    """Decoded chunks of one or several images. The least recently used are dropped first."""

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.chunks: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict:  # another process decodes for itself
        return {"budget": self.budget, "used": 0, "chunks": OrderedDict()}

    def get(self, key: tuple) -> np.ndarray | None:
        """Return a chunk, or None."""
        if key in self.chunks:
            self.chunks.move_to_end(key)
        return self.chunks.get(key)

    def put(self, key: tuple, chunk: np.ndarray) -> None:
        """Keep a chunk, and drop others that do not fit any more."""
        self.chunks[key] = chunk
        self.used += chunk.nbytes
        while self.used > self.budget and len(self.chunks) > 1:
            self.used -= self.chunks.popitem(last=False)[1].nbytes


class Chunks:
    """A chunked array (dask, Zarr) whose decoded chunks are cached. It is sliced like the array."""

    def __init__(self, array: Any, channels_first: bool):
        self.array, self.shape, self.ndim, self.dtype = array, array.shape, array.ndim, array.dtype
        self.axes = (1, 2) if channels_first else (0, 1)
        self.edges = [_edges(array.chunks[axis], array.shape[axis]) for axis in self.axes]
        self.decoded = Decoded(CACHE_BYTES)

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        wanted = [key[axis] for axis in self.axes]
        spans = [
            range(np.searchsorted(edges, s.start, "right") - 1, np.searchsorted(edges, s.stop, "left"))
            for edges, s in zip(self.edges, wanted)
        ]
        shape = [len(range(*s.indices(length))) for s, length in zip(key, self.shape)]
        out, inner, here = np.empty(shape, self.dtype), list(key), [slice(None)] * self.ndim
        for i in spans[0]:
            for j in spans[1]:
                for axis, edges, k, s in zip(self.axes, self.edges, (i, j), wanted):
                    first, last = max(s.start, edges[k]), min(s.stop, edges[k + 1])
                    inner[axis] = slice(first - edges[k], last - edges[k])
                    here[axis] = slice(first - s.start, last - s.start)
                out[tuple(here)] = self._chunk(i, j)[tuple(inner)]
        return out

    def _chunk(self, i: int, j: int) -> np.ndarray:
        if (known := self.decoded.get((self, i, j))) is not None:
            return known
        key = [slice(None)] * self.ndim
        for axis, edges, k in zip(self.axes, self.edges, (i, j)):
            key[axis] = slice(int(edges[k]), int(edges[k + 1]))
        try:
            chunk = np.asarray(self.array[tuple(key)])
        except Exception as error:  # each codec has errors of its own
            where = " and ".join(
                f"{name} {s.start}-{s.stop}" for name, s in zip("yx", (key[axis] for axis in self.axes))
            )
            raise OSError(f"the pixels {where} of an image could not be read; its file is damaged: {error}") from error
        self.decoded.put((self, i, j), chunk)
        return chunk


def parts(image: Any) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield an image (c x y x x) chunk by chunk: x and y of the chunk's corner, and its values."""
    edges = getattr(image, "edges", [(0, length) for length in image.shape[1:]])
    for y0, y1 in pairwise(edges[0]):
        for x0, x1 in pairwise(edges[1]):
            yield int(x0), int(y0), np.asarray(image[:, y0:y1, x0:x1])


def _edges(chunks: int | tuple[int, ...], size: int) -> np.ndarray:
    """Borders of the chunks along an axis; small ones are read several at a time."""
    edges = np.arange(0, size, chunks) if isinstance(chunks, int | np.integer) else np.cumsum([0, *chunks])[:-1]
    kept = [0]
    for edge in edges[1:]:
        if edge - kept[-1] >= 256:
            kept.append(int(edge))
    return np.array([*kept, size])


def open_image(source: Any, channels_first: bool, shrink: float = 1.0) -> tuple[Any, bool, float]:
    """Open an image lazily where its format allows.

    Parameters
    ----------
    source
        Path or array-like.
    channels_first
        Of an array-like.
    shrink
        How much coarser the image may be. A lower level of a pyramidal TIFF, or a coarser decoding of a JPEG (down to 1/8),
        is faster to read.

    Returns
    -------
    The array-like (c x y x or y x c), whether channels come first, and how many pixels of the source a pixel covers.
    """
    factor = 1.0
    if isinstance(source, str | Path):
        source, channels_first, factor = open_file(Path(source), shrink)
    if source.ndim == 2:
        source = source[None] if channels_first else source[..., None]
    source = _as_stored(source)
    return (Chunks(source, channels_first) if hasattr(source, "chunks") else source), channels_first, factor


def _as_stored(array: Any) -> Any:
    """Return the Zarr array behind a dask array that reads it unchanged: without dask it is read three times faster."""
    name = str(getattr(array, "name", ""))
    found = [*array.dask.layers.get(f"original-{name}", {}).values()] if name.startswith("from-zarr") else []
    return found[0] if len(found) == 1 and getattr(found[0], "shape", None) == array.shape else array
