"""Spatial graph, invariant edge geometry, and the local attention that every model of tissue here shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

TIE_TOLERANCE = 1e-3  # of the pitch: spots closer than this in distance belong to one shell


@dataclass
class Graph:
    """Neighbours of every token inside its own slide, and where they lie."""

    index: Tensor  # n x k, int64; padding points at the token itself
    mask: Tensor  # n x k, bool; False is padding
    offset: Tensor  # n x k x 2, float64: neighbour minus token, in units of the slide's pitch

    def __len__(self) -> int:
        return len(self.index)


def spatial_graph(xy: np.ndarray, n_neighbors: int, *, ties: str = "whole", scale: float | None = None) -> Graph:
    """Return the nearest-neighbour graph of one slide.

    Parameters
    ----------
    xy
        Positions, n x 2, any length unit; float64, so that differences are exact before they are cast.
    n_neighbors
        Neighbours a token; fewer where the slide has fewer tokens. The token itself is never among them.
    ties
        ``"whole"`` takes every neighbour of the last distance shell, which makes the neighbour set independent of
        orientation on lattices (at most ``4 * n_neighbors``); ``"cut"`` takes exactly ``n_neighbors``.
    scale
        Length that offsets are divided by; the slide's pitch when None.
    """
    xy = np.asarray(xy, dtype=np.float64)
    n = len(xy)
    k = min(n_neighbors, n - 1)
    if k < 1:
        empty = torch.zeros(n, 0)
        return Graph(empty.long(), empty.bool(), torch.zeros(n, 0, 2, dtype=torch.float64))
    reach = k if ties == "cut" else min(2 * k, n - 1)
    tree = cKDTree(xy)
    while True:
        distance, index = tree.query(xy, k=reach + 1, workers=-1)
        # with duplicated positions the token need not come first: take itself out by index
        itself = index == np.arange(n)[:, None]
        itself[~itself.any(1), -1] = True
        distance, index = distance[~itself].reshape(n, reach), index[~itself].reshape(n, reach)
        nearest = distance[:, 0][distance[:, 0] > 0]
        scale = scale or (float(np.median(nearest)) if len(nearest) else 1.0)
        keep = distance <= distance[:, k - 1 : k] + (TIE_TOLERANCE * scale if ties == "whole" else 0)
        if ties == "cut":
            keep[:] = True
        if not keep[:, -1].any() or reach >= min(4 * k, n - 1) or ties == "cut":
            break
        reach = min(2 * reach, 4 * k, n - 1)
    width = int(keep.sum(1).max())
    index, keep = np.where(keep, index, np.arange(n)[:, None])[:, :width], keep[:, :width]
    offset = (xy[index] - xy[:, None]) / scale
    return Graph(torch.from_numpy(index), torch.from_numpy(keep), torch.from_numpy(offset))


def anchors(xy: np.ndarray, spacing: float) -> np.ndarray:
    """Rows of points that cover a slide, none nearer than ``spacing`` to another; depends on the geometry alone.

    Points are taken in the order of their distance to the slide's centroid, so neither the order of rows nor the
    orientation of the slide matters. Linear in the number of points for a given density of anchors.
    """
    xy = np.asarray(xy, dtype=np.float64)
    tree, free, chosen = cKDTree(xy), np.ones(len(xy), bool), []
    for i in np.argsort(np.linalg.norm(xy - xy.mean(0), axis=1), kind="stable"):
        if free[i]:
            chosen.append(i)
            free[tree.query_ball_point(xy[i], spacing)] = False
    return np.sort(np.array(chosen, dtype=np.int64))


def anchor_graph(xy: np.ndarray, anchor_xy: np.ndarray, n_anchors: int, scale: float) -> Graph:
    """Graph from every point to its nearest anchors; ``index`` counts anchors, offsets are in units of ``scale``."""
    k = min(n_anchors, len(anchor_xy))
    index = cKDTree(anchor_xy).query(xy, k=[*range(1, k + 1)], workers=-1)[1]
    offset = (np.asarray(anchor_xy)[index] - np.asarray(xy)[:, None]) / scale
    return Graph(torch.from_numpy(index), torch.ones(index.shape, dtype=torch.bool), torch.from_numpy(offset))


def join(graphs: list[Graph]) -> Graph:
    """Put the graphs of several slides side by side; no edge crosses from one to another."""
    width = max(g.index.shape[1] for g in graphs)
    start = np.cumsum([0, *(len(g) for g in graphs)])
    index = [F.pad(g.index, (0, width - g.index.shape[1]), value=-1) for g in graphs]
    own = [torch.arange(len(g))[:, None] for g in graphs]
    return Graph(
        torch.cat([torch.where(i < 0, o, i) + int(s) for i, o, s in zip(index, own, start)]),
        torch.cat([F.pad(g.mask, (0, width - g.mask.shape[1])) for g in graphs]),
        torch.cat([F.pad(g.offset, (0, 0, 0, width - g.offset.shape[1])) for g in graphs]),
    )


def invariants(graph: Graph) -> Tensor:
    """Edge features (n x k x 1 x 4) exact under rotation, reflection and translation, on lattices too.

    The distance in pitches, and for m = 1, 2, 3 the direction of the edge relative to the whole neighbourhood,
    Re(exp(i m theta_ij) conj(M_im)) with M_im = sum_j w(d_ij) exp(i m theta_ij). Not divided by abs(M_im): where the
    neighbourhood has no direction the feature fades to zero instead of amplifying rounding.
    """
    distance = graph.offset.norm(dim=-1)
    unit = torch.view_as_complex(graph.offset / distance.clamp_min(1e-12)[..., None])
    weight = torch.exp(-(distance**2) / 4.5) * graph.mask  # sigma = 1.5 pitches
    out, turned = [distance], torch.ones_like(unit)
    for _ in range(3):
        turned = turned * unit
        moment = (weight * turned).sum(1, keepdim=True)
        out.append((turned * moment.conj()).real)
    return torch.stack(out, -1).float()[:, :, None]


def frames(graph: Graph) -> Tensor:
    """Edge features (n x k x 4 x 3) of the paper: offsets in the four frames of the local covariance, and distance.

    Invariant only where the covariance's two eigenvalues differ and no tie of distances is cut.
    """
    count = graph.mask.sum(1).clamp_min(1)[:, None, None]
    offset = graph.offset * graph.mask[..., None]
    centred = (offset - offset.sum(1, keepdim=True) / count) * graph.mask[..., None]
    _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred / count)
    x, y = (centred @ axes).unbind(-1)
    distance = offset.norm(dim=-1)
    return torch.stack([torch.stack([sx * x, sy * y, distance], -1) for sx in (1, -1) for sy in (1, -1)], 2).float()


def degenerate_share(graph: Graph, tolerance: float = 0.05) -> float:
    """Share of tokens whose local covariance has (nearly) equal eigenvalues, where :func:`frames` is not invariant."""
    if not graph.index.shape[1]:
        return 0.0
    count = graph.mask.sum(1).clamp_min(1)[:, None, None]
    offset = graph.offset * graph.mask[..., None]
    centred = (offset - offset.sum(1, keepdim=True) / count) * graph.mask[..., None]
    small, large = torch.linalg.eigvalsh(centred.transpose(1, 2) @ centred / count).unbind(-1)
    return float((large - small <= tolerance * large).double().mean())


GEOMETRY = {"invariants": (invariants, 4), "frames": (frames, 3), "distance": (lambda g: invariants(g)[..., :1], 1)}


class GatedMLP(nn.Module):
    """Linear, gate (SiLU of one half times the other), LayerNorm, Linear."""

    def __init__(self, n_in: int, hidden: int, n_out: int):
        super().__init__()
        self.inner = nn.Linear(n_in, hidden)
        self.norm = nn.LayerNorm(hidden // 2)
        self.outer = nn.Linear(hidden // 2, n_out)

    def gate(self, x: Tensor) -> Tensor:
        """The part before the last linear layer."""
        a, b = self.inner(x).chunk(2, -1)
        return self.norm(F.silu(a) * b)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.gate(x))


class LocalAttention(nn.Module):
    """Additive attention of each token over its spatial neighbours.

    logit_ij = MLP([q_i, k_j, e_ij, y_j - y_i]) for each head, with one MLP for all heads; output
    [sum_j a_ij v_j, sum_j a_ij e_ij]. The MLP's first layer is linear, so queries, keys, geometry and signals ``y`` are
    each projected once per token or edge and only added per edge: the difference y_j - y_i is never formed.
    """

    def __init__(self, width: int, n_heads: int, n_edge: int, n_signal: int, dropout: float = 0.0):
        super().__init__()
        self.n_heads, self.head = n_heads, width // n_heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.edge = GatedMLP(n_edge, width, width)
        self.score = GatedMLP(3 * self.head + n_signal, width, 1)
        self.dropout = nn.Dropout(dropout)

    def geometry(self, edges: Tensor) -> Tensor:
        """Embed edge features (n x k x frames x f) to n x k x width/2, averaged over frames.

        The last linear layer is left to :meth:`forward`: it commutes with the mean over frames and with the weighted
        sum over neighbours. Independent of the flow's time, so at inference it is computed once a slide.
        """
        return self.edge.gate(edges).mean(2)

    def keys(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens, and the signals they show to others, to keys (n x heads x hidden) and values."""
        k, v = self._qkv(h, slice(1, 3)).unbind(1)
        _, w_k, _, w_y = self._weights(y)
        return k @ w_k.T + (y @ w_y.T)[:, None], v

    def weigh(self, h: Tensor, y: Tensor, key: Tensor, index: Tensor, mask: Tensor, geometry: Tensor) -> Tensor:
        """Attention of tokens ``h`` (some or all) over their neighbours, n x k x heads."""
        n, k = index.shape
        w_q, _, w_e, w_y = self._weights(y)
        query = self._qkv(h, slice(0, 1))[:, 0] @ w_q.T + (self.score.inner.bias - y @ w_y.T)[:, None]
        e = self.edge.outer(geometry).view(n, k, self.n_heads, self.head)
        pre = F.linear(e, w_e)  # n x k x heads x hidden
        pre += key.index_select(0, index.reshape(-1)).view(n, k, self.n_heads, -1)
        pre += query[:, None]
        a, b = pre.chunk(2, -1)
        # in place where no gradient needs the input again
        gated = F.silu(a) * b if torch.is_grad_enabled() else F.silu(a, inplace=True).mul_(b)
        logit = self._project(gated).masked_fill(~mask[..., None], -torch.inf)
        return torch.nan_to_num(logit.softmax(1))  # a token without neighbours attends to nothing

    def attend(
        self, h: Tensor, y: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor, geometry: Tensor
    ) -> Tensor:
        """Attend from tokens ``h`` (some or all) to the keys and values of all; n x 2 width."""
        n, k = index.shape
        heads, d = self.n_heads, self.head
        if not k:
            return h.new_zeros(n, 2 * heads * d)
        weight = self.dropout(self.weigh(h, y, key, index, mask, geometry))
        values = (weight[..., None] * value.index_select(0, index.reshape(-1)).view(n, k, heads, d)).sum(1)
        # sum_j a_ij e_ij: the sum commutes with the edge embedding's last layer, so it is taken first
        summed = torch.bmm(weight.transpose(1, 2), geometry)  # n x heads x width/2
        w, bias = self.edge.outer.weight.view(heads, d, -1), self.edge.outer.bias.view(heads, d)
        edges = torch.einsum("nhc,hdc->nhd", summed, w) + weight.sum(1)[..., None] * bias
        return torch.cat([values.flatten(1), edges.flatten(1)], 1)

    def _qkv(self, h: Tensor, which: slice) -> Tensor:
        rows = slice(which.start * h.shape[1], which.stop * h.shape[1])
        x = F.linear(self.norm(h), self.qkv.weight[rows], self.qkv.bias[rows])
        return x.view(len(h), which.stop - which.start, self.n_heads, self.head)

    def _weights(self, y: Tensor) -> tuple[Tensor, ...]:
        d = self.head
        return self.score.inner.weight.split([d, d, d, y.shape[1]], 1)

    def _project(self, gated: Tensor) -> Tensor:
        """LayerNorm then Linear to one number, without writing the normalised array: three reductions."""
        norm, outer = self.score.norm, self.score.outer
        w = norm.weight * outer.weight[0]
        flat = gated.flatten(0, -2)
        dot, mean = (flat @ w).view(gated.shape[:-1]), gated.mean(-1)
        variance = (torch.linalg.vector_norm(gated, dim=-1) ** 2 / len(w) - mean**2).clamp_min(0)
        return (dot - mean * w.sum()) * torch.rsqrt(variance + norm.eps) + (norm.bias @ outer.weight[0] + outer.bias)


def far_band(xy: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """Places along the longer side (n), and where the far band with this share of the points begins."""
    along = xy[:, int(np.argmax(np.ptp(xy, axis=0)))]
    return along, float(np.quantile(along, 1 - share))
