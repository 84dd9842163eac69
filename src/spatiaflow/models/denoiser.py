"""The network of STFlow: from histology features, noisy expression and time to expression, by local attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models.flow import sample, time_features
from spatiaflow.models.slide import Rows
from spatiaflow.models.spatial import GEOMETRY, GatedMLP, Graph, LocalAttention, degenerate_share, spatial_graph

GEOMETRY_BYTES = 9e8  # of embedded edges that are kept between steps; those of further layers are computed in each


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

    def forward_in_parts(
        self, h: Tensor, y: Tensor, parts: list[Part], geometry: Tensor | None, into: tuple[Tensor, Tensor]
    ) -> None:
        """Do the same a part at a time. Keys and values, and without ``geometry`` embedded edges, are made for each part."""
        for p in parts:
            key, value = self.attention.keys(h[p.seen], y[p.seen])
            embedded = self.attention.geometry(p.edges) if geometry is None else geometry[p.rows]
            into[0][p.rows], into[1][p.rows] = self.update(h[p.rows], y[p.rows], key, value, p.index, p.mask, embedded)

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

    def decode(self, h: Tensor, y: Tensor, graph: Graph, geometry: list[Tensor]) -> Tensor:
        """Run the layers on tokens ``h`` with geometry embedded beforehand; the mean of their gene heads."""
        total = torch.zeros_like(y)
        for layer, embedded in zip(self.layers, geometry):
            h, y = layer(h, y, graph, embedded)
            total = total + y
        return total / len(self.layers)

    def decode_parts(self, h: Tensor, y: Tensor, parts: list[Part], geometry: list[Tensor | None]) -> Tensor:
        """Do the same layer by layer, a part at a time, in the memory of two states of the tokens; overwrites ``h``."""
        total, now, after = torch.zeros_like(y), (h, y), (torch.empty_like(h), torch.empty_like(y))
        for i, (layer, embedded) in enumerate(zip(self.layers, geometry)):
            layer.forward_in_parts(*now, parts, embedded, after)
            total += after[1]
            now, after = after, (now[0], torch.empty_like(y) if i == 0 else now[1])  # the caller keeps its y
        return total.div_(len(self.layers))


@dataclass
class Part:
    """Some tokens of a slide, neighbours in memory, and what they see of it."""

    rows: slice
    seen: Tensor  # their neighbours; a token with too few refers to itself
    index: Tensor  # n x k, places in ``seen``
    mask: Tensor  # n x k
    edges: Tensor  # raw edge features, n x k x frames x f


class SlideTokens:
    """One slide made ready for the networks: graph and edge features are computed once for all networks, steps and draws.

    Parameters
    ----------
    x
        Scaled features, n x F, read some rows at a time.
    xy
        Positions, n x 2.
    base
        Simple prediction, n x genes; None where neither prior nor ``residual`` reads it.
    config
        Of the networks.
    rows
        Tokens worked on at a time.
    """

    def __init__(
        self, x: Rows, xy: np.ndarray, base: np.ndarray | None, config: DenoiserConfig, prior: Any, residual: bool,
        device: str | torch.device, rows: int,
    ):  # fmt: skip
        self.x, self.base, self.prior, self.residual = x, base, prior, residual
        self.config, self.n, self.device = config, len(x), torch.device(device)
        # neighbours in space become neighbours in memory: tokens are worked on in square tiles of about `rows`
        tile = np.floor((xy - xy.min(0)) / max(np.sqrt(np.ptp(xy, axis=0).prod() / len(xy) * rows), 1e-9))
        self.order = np.lexsort([xy[:, 1], tile[:, 1], tile[:, 0]]) if len(xy) > rows else np.arange(len(xy))
        with torch.inference_mode():
            graph = spatial_graph(xy[self.order], config.n_neighbors, ties=config.ties)
            self.degenerate_share = degenerate_share(graph) if config.geometry == "frames" else 0.0
            self.parts = [self._part(graph, slice(s, s + rows)) for s in range(0, self.n, rows)]
            self.edges = graph.mask.shape

    def _part(self, graph: Graph, rows: slice) -> Part:
        own = Graph(graph.index[rows], graph.mask[rows], graph.offset[rows])
        seen, index = torch.unique(own.index, return_inverse=True)
        edges = GEOMETRY[self.config.geometry][0](own)
        seen, index, mask, edges = (value.to(self.device) for value in (seen, index, own.mask, edges))
        return Part(rows, seen, index, mask, edges)

    def mean(self, networks: list[Denoiser], seeds: list[list[int]], times: list[float]) -> np.ndarray:
        """Mean of the networks' endpoints over draws from the prior, n x genes in the slide's own order.

        Parameters
        ----------
        seeds
            Of each draw.
        times
            At which the network is evaluated on the way from the draw to its endpoint.
        """
        total: Any = 0
        with torch.inference_mode():
            residual = None
            if self.residual and self.base is not None:
                residual = torch.from_numpy(self.base[self.order]).to(self.device)
            for network in networks:  # one at a time: the tokens of the others take no memory
                image, geometry = self._prepare(network.to(self.device))
                for seed in seeds:
                    total = self._endpoint(network, image, geometry, self._start(seed), times, residual).add_(total)
                del image, geometry
            out = np.empty(total.shape, np.float32)
            out[self.order] = total.cpu().numpy() / (len(networks) * len(seeds))
        return out

    def _prepare(self, network: Denoiser) -> tuple[Tensor, list[Tensor | None]]:
        """Image tokens, and the embedded geometry of each layer; None of those for which there is no room."""
        h = torch.empty(self.n, self.config.width, device=self.device)
        shape = (*self.edges, self.config.width // 2)
        kept = network.layers[: int(GEOMETRY_BYTES // max(4 * np.prod(shape), 1))]
        geometry: list = [torch.empty(shape, device=self.device) for _ in kept]
        for p in self.parts:
            h[p.rows] = network.image(torch.from_numpy(self.x[self.order[p.rows]]).to(self.device))
            for layer, out in zip(kept, geometry):
                out[p.rows] = layer.attention.geometry(p.edges)
        return h, geometry + [None] * (len(network.layers) - len(kept))

    def _start(self, seed: list[int]) -> Tensor:
        """A draw from the prior."""
        n_genes = self.config.n_genes
        start = self.prior.sample(self.n, n_genes, np.random.default_rng(seed), self.base)
        return torch.from_numpy(start[self.order]).to(self.device)

    def _endpoint(
        self, network: Denoiser, image: Tensor, geometry: list, start: Tensor, times: list[float], residual: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Where the network takes a start."""

        def endpoint(y: Tensor, t: float) -> Tensor:
            time = network.time(time_features(torch.tensor([t], device=self.device), scale=self.config.time_scale))
            found = network.decode_parts(image + time, y, self.parts, geometry)
            return found if residual is None else found.add_(residual)

        return sample(endpoint, start, times)
