"""What the image of a cell is generated from, besides its own image: its surroundings, and the transition it undergoes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatiaflow.models.orientation import turned_offsets
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import spatial_graph


@dataclass
class Conditions:
    """What is known of each cell whose image is generated. Every tensor has one row a cell."""

    cell: Tensor  # n x d: the source cell's embedding
    niche: Tensor  # n x d
    tissue: Tensor  # n x d
    neighbors: Tensor  # n x k x (d + 2): embeddings of its neighbours, and their offsets in crops
    transition: Tensor  # n, place in the vocabulary
    genes: Tensor  # n x genes: mean shift of the transition
    profile: Tensor  # n x features: mean shift of the transition
    level: Tensor  # n: 0 a cell, 1 a tile

    def rows(self, which: Any) -> Conditions:
        """Return some of the cells."""
        return Conditions(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def to(self, device: str | torch.device) -> Conditions:
        """Return the conditions on a device."""
        return Conditions(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def turned(self, turns: np.ndarray) -> Conditions:
        """Return the conditions around images that are :func:`turned <spatiaflow.models.orientation.turned>`."""
        who, where = self.neighbors[..., :-2], self.neighbors[..., -2:]
        return replace(self, neighbors=torch.cat([who, turned_offsets(where, turns)], -1))


@dataclass
class Context:
    """Embeddings of all cells of all slides, one slide after the other, and which cells lie where around each."""

    cell: np.ndarray  # n x d
    niche: np.ndarray  # n x d
    tissue: np.ndarray  # n x d
    neighbors: np.ndarray  # n x k, rows; a cell with fewer repeats itself
    offset: np.ndarray  # n x k x 2 (x, y), in crops

    @classmethod
    def of(cls, slides: Sequence[Slide], k: int, crop_um: float) -> Context:
        """Return the context of slides whose features are the embeddings of cell, niche and tissue side by side."""
        embeddings = np.concatenate([slide.features for slide in slides])
        n, first = len(embeddings), 0
        near, offset = np.tile(np.arange(n)[:, None], (1, k)), np.zeros((n, k, 2), np.float32)
        for slide in slides:
            graph = spatial_graph(slide.xy, k, ties="cut", scale=crop_um)
            m, here = graph.index.shape[1], slice(first, first + len(slide))
            near[here, :m] = first + graph.index.numpy()
            offset[here, :m] = graph.offset.numpy()
            first += len(slide)
        return cls(*np.split(embeddings, 3, axis=1), near, offset)  # type: ignore[call-arg]

    def turn(self, rows: np.ndarray, turns: np.ndarray) -> None:
        """Turn what lies around some cells as their images were turned."""
        self.offset[rows] = turned_offsets(torch.from_numpy(self.offset[rows]), turns).numpy()

    def conditions(
        self, source: np.ndarray, transition: np.ndarray, genes: np.ndarray, profile: np.ndarray, level: int
    ) -> Conditions:
        """Return the conditions of the cells in the rows ``source``.

        Parameters
        ----------
        transition
            Place of the transition of each in the vocabulary, n.
        genes, profile
            Mean shifts of the transition, n x genes and n x features.
        level
            0 cells, 1 tiles.
        """
        arrays = (
            self.cell[source], self.niche[source], self.tissue[source],
            np.concatenate([self.cell[self.neighbors[source]], self.offset[source]], 2), transition, genes, profile,
            np.full(len(source), level),
        )  # fmt: skip
        kinds = {"i": np.int64, "f": np.float32}
        return Conditions(*(torch.from_numpy(np.ascontiguousarray(v, kinds[v.dtype.kind])) for v in arrays))
