"""The network of STFlow: from histology features, noisy expression and time to expression, by local attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models.flow import sample, time_features
from spatiaflow.models.slide import ABSENT
from spatiaflow.models.spatial import GEOMETRY, GatedMLP, Graph, LocalAttention, degenerate_share, spatial_graph


@dataclass
class DenoiserConfig:
    """Hyper-parameters of the denoiser; the defaults are the paper's."""

    n_features: int
    n_genes: int
    width: int = 128
    n_heads: int = 4
    n_layers: int = 4
    n_neighbors: int = 8
    ties: str = "cut"
    geometry: str = "frames"
    dropout: float = 0.2
    head_dropout: float = 0.2  # on the predicted genes themselves
    time_scale: float = 1.0


class Layer(nn.Module):
    """Local attention, gated feed-forward, and the head that replaces the expression the next layer compares."""

    def __init__(self, c: DenoiserConfig):
        super().__init__()
        self.attention = LocalAttention(c.width, c.n_heads, GEOMETRY[c.geometry][1], c.n_genes, c.dropout)
        self.context = GatedMLP(2 * c.width, c.width, c.width)
        self.feed_forward = GatedMLP(c.width, 4 * c.width, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Sequential(
            nn.Linear(c.width, c.width),
            nn.GELU(),
            nn.LayerNorm(c.width),
            nn.Dropout(c.dropout),
            nn.Linear(c.width, c.n_genes),
            nn.Dropout(c.head_dropout),
        )

    def forward(self, h: Tensor, y: Tensor, graph: Graph, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Update all tokens."""
        return self.update(h, y, *self.attention.keys(h, y), graph.index, graph.mask, geometry)

    def forward_in_place(
        self, h: Tensor, y: Tensor, graph: Graph, geometry: Tensor, scratch: list[Tensor], rows: int
    ) -> None:
        """Do the same ``rows`` tokens at a time, into ``h`` and ``y``; keys and values go into ``scratch``."""
        key, value = scratch
        parts = [slice(s, s + rows) for s in range(0, len(h), rows)]
        for p in parts:
            key[p], value[p] = self.attention.keys(h[p], y[p])
        for p in parts:  # other tokens are seen through their keys and values only
            h[p], y[p] = self.update(h[p], y[p], key, value, graph.index[p], graph.mask[p], geometry[p])

    def update(
        self, h: Tensor, y: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor, geometry: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = h + self.dropout(self.context(self.attention.attend(h, y, key, value, index, mask, geometry)))
        h = h + self.dropout(self.feed_forward(h))
        return h, self.head(h)


class Denoiser(nn.Module):
    """Predict the endpoint y_1 of the flow from histology features, noisy expression y_t and time t."""

    layers: Any  # ModuleList of Layer

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.image = nn.Linear(config.n_features, config.width)
        self.time = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))

    def edges(self, graph: Graph) -> Tensor:
        """Raw edge features of a graph, n x k x frames x f."""
        return GEOMETRY[self.config.geometry][0](graph)

    def forward(self, features: Tensor, y: Tensor, t: Tensor, graph: Graph, edges: Tensor) -> Tensor:
        """Return the predicted endpoint.

        Parameters
        ----------
        features, y
            n x n_features and n x n_genes.
        t
            Time of every token, n.
        graph, edges
            From :func:`~spatiaflow.models.spatial.spatial_graph` and :meth:`edges`.
        """
        tau = self.time(time_features(t, scale=self.config.time_scale))
        return self.decode(
            self.image(features) + tau, y, graph, [layer.attention.geometry(edges) for layer in self.layers]
        )

    def decode(self, h: Tensor, y: Tensor, graph: Graph, geometry: list[Tensor], rows: int = 0) -> Tensor:
        """Run the layers on tokens ``h`` with geometry embedded beforehand; the mean of their gene heads.

        ``rows`` > 0 works through that many tokens at a time (inference only; ``h`` is overwritten), with the same
        result in the memory of one layer.
        """
        total = torch.zeros_like(y)
        if rows:
            c, y = self.layers[0].attention, y.clone()
            scratch = [h.new_empty(len(h), c.n_heads, m) for m in (c.score.inner.out_features, c.head)]
        for layer, embedded in zip(self.layers, geometry):
            if rows:
                layer.forward_in_place(h, y, graph, embedded, scratch, rows)
            else:
                h, y = layer(h, y, graph, embedded)
            total = total.add_(y) if rows else total + y
        return total / len(self.layers)


class SlideTokens:
    """One slide made ready for the networks: image tokens, graph and embedded geometry are computed once for all steps."""

    def __init__(
        self, x: np.ndarray, xy: np.ndarray, base: np.ndarray, networks: list[Denoiser], prior: Any, residual: bool,
        device: str | torch.device, rows: int,
    ):  # fmt: skip
        p = networks[0].config
        self.networks, self.prior, self.residual, self.rows, self.n = networks, prior, residual, rows, len(x)
        self.device = torch.device(device)
        # neighbours in space become neighbours in memory: tokens are worked on in square tiles of about `rows`
        tile = np.floor((xy - xy.min(0)) / max(np.sqrt(np.ptp(xy, axis=0).prod() / len(xy) * rows), 1e-9))
        self.order = np.lexsort([xy[:, 1], tile[:, 1], tile[:, 0]]) if len(xy) > rows else np.arange(len(xy))
        self.base = base
        with torch.inference_mode():
            self.graph = spatial_graph(xy[self.order], p.n_neighbors, ties=p.ties)
            self.degenerate_share = degenerate_share(self.graph) if p.geometry == "frames" else 0.0
            self.tokens = []  # of each network: image tokens, geometry of each layer
            for network in networks:
                network.to(self.device)
                self.tokens.append(self._prepare(network, x))
            self.graph = Graph(self.graph.index.to(self.device), self.graph.mask.to(self.device), ABSENT)

    def _prepare(self, network: Denoiser, x: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        k, width = self.graph.index.shape[1], network.config.width
        h = torch.empty(self.n, width, device=self.device)
        geometry = [torch.empty(self.n, k, width // 2, device=self.device) for _ in network.layers]
        for s in range(0, self.n, self.rows):
            part = slice(s, s + self.rows)
            h[part] = network.image(torch.from_numpy(x[self.order[part]]).to(self.device))
            edges = network.edges(Graph(self.graph.index[part], self.graph.mask[part], self.graph.offset[part]))
            for layer, out in zip(network.layers, geometry):
                out[part] = layer.attention.geometry(edges.to(self.device))
        return h, geometry

    def run(self, rng: np.random.Generator, times: list[float]) -> np.ndarray:
        """Draw once from the prior and integrate; the mean over networks, n x genes in the slide's own order."""
        start = self.prior.sample(self.n, self.base.shape[1], rng, self.base)[self.order]
        total = np.zeros_like(start)
        with torch.inference_mode():
            y_0 = torch.from_numpy(start).to(self.device)
            residual = torch.from_numpy(self.base[self.order]).to(self.device) if self.residual else 0
            for network, (image, geometry) in zip(self.networks, self.tokens):

                def endpoint(
                    y: Tensor,
                    t: float,
                    network: Denoiser = network,
                    image: Tensor = image,
                    geometry: list[Tensor] = geometry,
                ) -> Tensor:
                    time = torch.tensor([t], device=self.device)
                    h = image + network.time(time_features(time, scale=network.config.time_scale))
                    return network.decode(h, y, self.graph, geometry, self.rows) + residual

                total += sample(endpoint, y_0, times).cpu().numpy()
        out = np.empty_like(total)
        out[self.order] = total / len(self.networks)
        return out
