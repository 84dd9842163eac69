"""Layers of SPATIA: attention between modalities, over neighbouring cells, and over anchors in the tissue around."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models.spatial import (
    GatedMLP,
    Graph,
    LocalAttention,
    anchor_graph,
    anchors,
    invariants,
    spatial_graph,
)  # fmt: skip

if TYPE_CHECKING:
    from spatiaflow.models.spatia import SpatiaConfig


class CrossAttention(nn.Module):
    """Tokens of one modality look at those of the other; what comes back is added with a fixed weight."""

    def __init__(self, c: SpatiaConfig, weight: float):
        super().__init__()
        self.weight = weight
        self.norm, self.other_norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attention = nn.MultiheadAttention(c.width, c.n_heads, c.dropout, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)  # starts with each modality on its own
        self.feed_forward = GatedMLP(c.width, 2 * c.width, c.width)

    def forward(self, tokens: Tensor, other: Tensor) -> Tensor:
        """Tokens n x t x d, other n x s x d; returns n x t x d."""
        if self.weight == 0:
            return tokens
        other = self.other_norm(other)
        seen = self.attention(self.norm(tokens), other, other, need_weights=False)[0]
        return tokens + self.weight * (seen + self.feed_forward(seen))


class Residual(nn.Module):
    """A small perceptron beside the identity. At first it adds the same to every row."""

    def __init__(self, d: int):
        super().__init__()
        first, last = nn.Linear(d, d), nn.Linear(d, d)
        self.layers = nn.Sequential(first, nn.SiLU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ContextLayer(nn.Module):
    """Local attention of tokens over others around them, and a gated feed-forward."""

    def __init__(self, c: SpatiaConfig):
        super().__init__()
        self.attention = LocalAttention(c.width, c.n_heads, 4, 0, c.dropout)
        self.context = GatedMLP(2 * c.width, 2 * c.width, c.width)
        self.feed_forward = GatedMLP(c.width, 4 * c.width, c.width)
        self.norm, self.dropout = nn.LayerNorm(c.width), nn.Dropout(c.dropout)

    def forward(self, h: Tensor, others: Tensor, graph: Graph, rows: int | None = None) -> Tensor:
        """Update tokens ``h`` (n x d) by ``others`` (m x d, may be ``h`` itself), ``rows`` tokens at a time."""
        out = []
        for x, key, value, index, mask, geometry in self._parts(h, others, graph, rows):
            seen = self.attention.attend(x, x.new_zeros(len(x), 0), key, value, index, mask, geometry)
            x = x + self.dropout(self.context(seen))
            out.append(x + self.dropout(self.feed_forward(self.norm(x))))
        return torch.cat(out)

    def weights(self, h: Tensor, others: Tensor, graph: Graph, rows: int | None = None) -> Tensor:
        """Attention over neighbours, mean of the heads, n x k."""
        return torch.cat([
            self.attention.weigh(x, x.new_zeros(len(x), 0), key, index, mask, geometry).mean(-1)
            for x, key, _, index, mask, geometry in self._parts(h, others, graph, rows)
        ])  # fmt: skip

    def _parts(self, h: Tensor, others: Tensor, graph: Graph, rows: int | None) -> Iterator[tuple[Tensor, ...]]:
        rows = rows or max(len(h), len(others), 1)
        none = h.new_zeros(len(others), 0)  # the flow's noisy signal: there is none here
        projected = [self.attention.keys(o, y) for o, y in zip(others.split(rows), none.split(rows))]
        key, value = (torch.cat(p) for p in zip(*projected))
        for s in range(0, len(h), rows):
            p = slice(s, s + rows)
            part = Graph(graph.index[p], graph.mask[p], graph.offset[p])
            geometry = self.attention.geometry(invariants(part).to(h.device))
            yield h[p], key, value, part.index.to(h.device), part.mask.to(h.device), geometry


@dataclass
class Surroundings:
    """The spatial structure of a slide (or a region): who sees whom; computed once."""

    neighbors: Graph  # the cell itself first, then the nearest
    nearest: Tensor  # n, the anchor nearest to each cell
    tissue: Graph  # cells to anchors
    n_anchors: int

    @classmethod
    def of(cls, xy: np.ndarray, c: SpatiaConfig) -> Surroundings:
        """Surroundings of cells at positions ``xy`` (n x 2, µm)."""
        chosen = anchors(xy, c.anchor_um)
        tissue = anchor_graph(xy, xy[chosen], c.tissue_anchors, c.anchor_um)
        around = spatial_graph(xy, c.niche_neighbors, scale=c.pitch_um)
        n = len(around)
        itself = Graph(torch.arange(n)[:, None], torch.ones(n, 1, dtype=torch.bool), around.offset.new_zeros(n, 1, 2))
        parts = (torch.cat(pair, 1) for pair in zip(*((g.index, g.mask, g.offset) for g in (itself, around))))
        return cls(Graph(*parts), tissue.index[:, 0], tissue, len(chosen))
