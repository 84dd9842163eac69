"""Cells as the generator of morphology sees them: images, embeddings and neighbours of a whole table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData

from spatiaflow import _io
from spatiaflow.models.spatia import scaled
from spatiaflow.models.spatial import far_band, spatial_graph
from spatiaflow.tl import _cells
from spatiaflow.train.pairs import Context

LEVELS = ("cell", "niche", "tissue")


@dataclass
class CellImages:
    """All cells of a table: images, embeddings, positions."""

    table: AnnData
    parts: list
    embedding: dict[str, np.ndarray]
    channels: tuple[str, ...]
    intensity: dict[str, list[float]]
    crop_um: float

    @classmethod
    def of(
        cls, data, use_rep, crop_um, crop_pixels, *, table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp,
    ):  # fmt: skip
        _, table = _io.unpack(data, table_key)
        embedding = {
            level: _io.features(table, f"{use_rep}_{level}", "Run sf.tl.embed_spatia(data) first, or give use_rep=...")
            for level in LEVELS
        }
        slides = _io.slides(
            data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
            spatial_key=spatial_key, mpp=mpp,
        )  # fmt: skip
        parts = _cells.parts(
            data, table, slides, modalities=("image",), crop_um=crop_um, crop_pixels=crop_pixels, layer=None,
            image_key=image_key,
        )  # fmt: skip
        _cells.share_memory(parts)
        channels = tuple(dict.fromkeys(str(c).lower() for part in parts for c in part.crops.channels))
        ready = [_cells.cell_slide(part, [], list(channels), None, part.slide.name) for part in parts]
        return cls(table, parts, embedding, channels, _cells.intensity_of(ready, list(channels)), crop_um)

    @property
    def boxes(self) -> dict:
        return {
            p.slide.name: {"n_obs": len(p.slide.rows), "box_um": [*p.slide.xy.min(0), *p.slide.xy.max(0)]}
            for p in self.parts
        }

    @property
    def slide_of(self) -> np.ndarray:
        """Place of each row's slide among the slides; -1 for rows that stand on none."""
        out = np.full(self.table.n_obs, -1)
        for i, part in enumerate(self.parts):
            out[part.slide.rows] = i
        return out

    @property
    def positions(self) -> np.ndarray:
        """µm, n x 2; rows of the table that stand on no slide are NaN."""
        out = np.full((self.table.n_obs, 2), np.nan)
        for part in self.parts:
            out[part.slide.rows] = part.slide.xy
        return out

    @property
    def inside(self) -> np.ndarray:
        """Rows of the table whose cell lies in its image."""
        out = np.zeros(self.table.n_obs, bool)
        for part in self.parts:
            out[part.slide.rows[part.inside]] = True
        return out

    def far(self, share: float) -> np.ndarray:
        """Rows at the far end of each slide's longer side."""
        out = np.zeros(self.table.n_obs, bool)
        for part in self.parts:
            along, edge = far_band(part.slide.xy, share)
            out[part.slide.rows] = along > edge
        return out

    def surroundings(self, k: int):
        """Embeddings, and the ``k`` nearest cells of each."""
        n = self.table.n_obs
        near, offset = np.tile(np.arange(n)[:, None], (1, k)), np.zeros((n, k, 2), np.float32)
        for part in self.parts:
            xy, rows = part.slide.xy, part.slide.rows
            graph = spatial_graph(xy, k, ties="cut", scale=self.crop_um)
            m = np.arange(graph.index.shape[1])
            near[rows[:, None], m] = rows[graph.index.numpy()]
            offset[rows[:, None], m] = graph.offset.numpy()
        return Context(*(self.embedding[level] for level in LEVELS), near, offset)

    def images(self, rows: np.ndarray, path: Path):
        """Scaled images of some rows, from about -1 to 1, on disk as float16; and the place of each row, or -1."""
        place = np.full(self.table.n_obs, -1)
        place[rows] = np.arange(len(rows))
        p = self.parts[0].crops.pixels
        out = np.lib.format.open_memmap(path, "w+", np.float16, (len(rows), len(self.channels), p, p))
        for part in self.parts:
            which = np.flatnonzero((place[part.slide.rows] >= 0) & part.inside)
            for some, crops in part.crops.batches(512, which):
                out[place[part.slide.rows[some]]] = self.scaled(crops, part, self.intensity)
        return out, place

    def scaled(self, crops, part, intensity: dict) -> np.ndarray:
        """Crops in the order of the channels: background -1, bright end 1."""
        order = _cells.match_channels(part.crops.channels, list(self.channels), None, part.slide.name)
        table = np.array([intensity[name.lower()] for name in map(str, part.crops.channels)])
        return (2 * scaled(crops, table, order) - 1).numpy()


def model_of(table: AnnData, use_rep: str) -> str:
    """Which model made the embeddings, where it is known."""
    return str(table.uns.get(use_rep, {}).get("params", {}).get("model_sha256", ""))


def unscaled(x: torch.Tensor, intensity: dict, channels: list[str], dtype) -> np.ndarray:
    """Images in the scale of the slide's own, and in its type."""
    low, high = np.array([intensity[name] for name in channels]).T[:, :, None, None]
    values = (x.numpy() + 1) / 2 * (high - low) + low
    if np.issubdtype(dtype, np.integer):
        return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)
    return values.astype(np.float32)
