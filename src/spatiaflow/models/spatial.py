"""Spatial graph, invariant edge features, and local attention. STFlow and SPATIA share them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn import functional as F

TIE_TOLERANCE = 1e-3  # in pitches: spots whose distances differ by less belong to the same shell


@dataclass
class Graph:
    """Neighbours of each token within its slide, and their relative positions."""

    index: Tensor  # n x k, int64; padding refers to the token itself
    mask: Tensor  # n x k, bool; False is padding
    offset: Tensor  # n x k x 2, float64: neighbour minus token, in units of the slide's pitch

    def __len__(self) -> int:
        return len(self.index)


def spatial_graph(xy: np.ndarray, n_neighbors: int, *, ties: str = "whole", scale: float | None = None) -> Graph:
    """Return the nearest-neighbour graph of one slide.

    Parameters
    ----------
    xy
        Positions, n x 2, in any unit of length. They are float64, so that differences are exact before they become float32.
    n_neighbors
        Neighbours per token, fewer if the slide has fewer tokens. The token itself is not counted.
    ties
        ``"whole"`` takes all neighbours of the last distance shell, at most ``4 * n_neighbors``. On regular spot arrays the
        neighbours then do not depend on orientation. ``"cut"`` takes exactly ``n_neighbors``.
    scale
        Length by which offsets are divided. If None, the slide's pitch (the median distance to the nearest neighbour).
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
        # with duplicated positions the token itself may not come first, so it is removed by index
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
    """Return rows of points that cover a slide and are at least ``spacing`` apart.

    Points are taken in the order of their distance to the slide's centroid, so the result depends neither on the order of rows
    nor on the slide's orientation. Time is linear in the number of points for a given density of anchors.
    """
    xy = np.asarray(xy, dtype=np.float64)
    tree, free, chosen = cKDTree(xy), np.ones(len(xy), bool), []
    for i in np.argsort(np.linalg.norm(xy - xy.mean(0), axis=1), kind="stable"):
        if free[i]:
            chosen.append(i)
            free[tree.query_ball_point(xy[i], spacing)] = False
    return np.sort(np.array(chosen, dtype=np.int64))


def anchor_graph(xy: np.ndarray, anchor_xy: np.ndarray, n_anchors: int, scale: float) -> Graph:
    """Return the graph from each point to its nearest anchors. ``index`` holds rows of anchors; offsets are in ``scale``."""
    k = min(n_anchors, len(anchor_xy))
    index = cKDTree(anchor_xy).query(xy, k=[*range(1, k + 1)], workers=-1)[1]
    offset = (np.asarray(anchor_xy)[index] - np.asarray(xy)[:, None]) / scale
    return Graph(torch.from_numpy(index), torch.ones(index.shape, dtype=torch.bool), torch.from_numpy(offset))


def join(graphs: list[Graph]) -> Graph:
    """Join the graphs of several slides into one. No edge connects two slides."""
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
    """Return edge features (n x k x 1 x 4) that do not change under rotation, reflection and translation.

    The first feature is the distance in pitches. For m = 1, 2, 3 follows the direction of the edge relative to the whole
    neighbourhood, Re(exp(i m theta_ij) conj(M_im)) with M_im = sum_j w(d_ij) exp(i m theta_ij). It is not divided by abs(M_im).
    If the neighbourhood has no preferred direction, the feature then goes to zero instead of amplifying rounding errors.
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
    """Return the edge features (n x k x 4 x 3) of the paper: offsets in the four frames of the local covariance, and distance.

    They are invariant only if the two eigenvalues of the covariance differ and no tie of distances is cut.
    """
    count = graph.mask.sum(1).clamp_min(1)[:, None, None]
    offset = graph.offset * graph.mask[..., None]
    centred = (offset - offset.sum(1, keepdim=True) / count) * graph.mask[..., None]
    _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred / count)
    x, y = (centred @ axes).unbind(-1)
    distance = offset.norm(dim=-1)
    return torch.stack([torch.stack([sx * x, sy * y, distance], -1) for sx in (1, -1) for sy in (1, -1)], 2).float()


def degenerate_share(graph: Graph, tolerance: float = 0.05) -> float:
    """Return the share of tokens whose local covariance has nearly equal eigenvalues; :func:`frames` is not invariant there."""
    if not graph.index.shape[1]:
        return 0.0
    count = graph.mask.sum(1).clamp_min(1)[:, None, None]
    offset = graph.offset * graph.mask[..., None]
    centred = (offset - offset.sum(1, keepdim=True) / count) * graph.mask[..., None]
    small, large = torch.linalg.eigvalsh(centred.transpose(1, 2) @ centred / count).unbind(-1)
    return float((large - small <= tolerance * large).double().mean())


GEOMETRY = {"invariants": (invariants, 4), "frames": (frames, 3), "distance": (lambda g: invariants(g)[..., :1], 1)}


class GatedMLP(nn.Module):
    """Linear, gate (SiLU of one half times the other half), LayerNorm, Linear."""

    def __init__(self, n_in: int, hidden: int, n_out: int):
        super().__init__()
        self.inner = nn.Linear(n_in, hidden)
        self.norm = nn.LayerNorm(hidden // 2)
        self.outer = nn.Linear(hidden // 2, n_out)

    def gate(self, x: Tensor) -> Tensor:
        """Return the output before the last linear layer."""
        a, b = self.inner(x).chunk(2, -1)
        return self.norm(F.silu(a) * b)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.gate(x))


class LocalAttention(nn.Module):
    """Additive attention of each token to its spatial neighbours.

    For each head, logit_ij = MLP([q_i, k_j, e_ij, y_j - y_i]), with the same MLP for all heads. The output is
    [sum_j a_ij v_j, sum_j a_ij e_ij]. The first layer of the MLP is linear. So queries, keys, geometry and signals ``y`` are
    projected once per token or edge, and only their sums are computed per edge. The differences y_j - y_i are never stored.
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

        :meth:`weigh` and :meth:`attend` apply the last linear layer, because it commutes with the mean over frames and with
        the weighted sum over neighbours. The result does not depend on the flow's time, so prediction computes it once per slide.
        """
        return self.edge.gate(edges).mean(2)

    def keys(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Project tokens and their signals ``y`` to keys (n x heads x hidden) and values (n x heads x head)."""
        k, v = self._qkv(h, slice(1, 3)).unbind(1)
        _, w_k, _, w_y = self._weights(y)
        return k @ w_k.T + (y @ w_y.T)[:, None], v

    def weigh(self, h: Tensor, y: Tensor, key: Tensor, index: Tensor, mask: Tensor, geometry: Tensor) -> Tensor:
        """Return the attention of tokens ``h`` (some or all) to their neighbours, n x k x heads."""
        n, k = index.shape
        w_q, _, w_e, w_y = self._weights(y)
        query = self._qkv(h, slice(0, 1))[:, 0] @ w_q.T + (self.score.inner.bias - y @ w_y.T)[:, None]
        e = self.edge.outer(geometry).view(n, k, self.n_heads, self.head)
        pre = F.linear(e, w_e)  # n x k x heads x hidden
        pre += key.index_select(0, index.reshape(-1)).view(n, k, self.n_heads, -1)
        pre += query[:, None]
        a, b = pre.chunk(2, -1)
        # in place if no gradient is needed, which saves memory
        gated = F.silu(a) * b if torch.is_grad_enabled() else F.silu(a, inplace=True).mul_(b)
        logit = self._project(gated).masked_fill(~mask[..., None], -torch.inf)
        return torch.nan_to_num(logit.softmax(1))  # without neighbours softmax gives NaN; the attention is 0

    def attend(
        self, h: Tensor, y: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor, geometry: Tensor
    ) -> Tensor:
        """Attend from tokens ``h`` (some or all) to the keys and values of all tokens. Returns n x 2 width."""
        n, k = index.shape
        heads, d = self.n_heads, self.head
        if not k:
            return h.new_zeros(n, 2 * heads * d)
        weight = self.dropout(self.weigh(h, y, key, index, mask, geometry))
        values = (weight[..., None] * value.index_select(0, index.reshape(-1)).view(n, k, heads, d)).sum(1)
        # sum_j a_ij e_ij commutes with the last layer of the edge embedding, and is cheaper before it
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
        """Apply LayerNorm and Linear to one number by three reductions, without storing the normalised array."""
        norm, outer = self.score.norm, self.score.outer
        w = norm.weight * outer.weight[0]
        flat = gated.flatten(0, -2)
        dot, mean = (flat @ w).view(gated.shape[:-1]), gated.mean(-1)
        variance = (torch.linalg.vector_norm(gated, dim=-1) ** 2 / len(w) - mean**2).clamp_min(0)
        return (dot - mean * w.sum()) * torch.rsqrt(variance + norm.eps) + (norm.bias @ outer.weight[0] + outer.bias)


def far_band(xy: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """Return positions along the longer side (n), and where the band at its far end with this share of the points begins."""
    along = xy[:, int(np.argmax(np.ptp(xy, axis=0)))]
    return along, float(np.quantile(along, 1 - share))
