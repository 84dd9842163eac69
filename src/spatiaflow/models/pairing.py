"""Pair the cells of two states by entropic optimal transport, and say how far each pair can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.spatial.distance import pdist


@dataclass
class Plan:
    """Rows of a transport plan from n sources to m targets, of each its largest entries."""

    index: np.ndarray  # n x k, targets, the largest entry first
    share: np.ndarray  # n x k, of the row's mass
    mass: np.ndarray  # n, transported over prescribed
    entropy: np.ndarray  # n, of the row, over the logarithm of the targets it could choose from
    mean: np.ndarray  # n x d, of the whole row's targets, in coordinates ``at``
    marginal_error: (
        float  # relative L1 of both marginals, the worst of the problems solved; NaN where they may give way
    )

    @property
    def dropped(self) -> np.ndarray:
        """Share of each row's mass beyond the entries kept."""
        return 1 - self.share.sum(1)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A target of each source, drawn from its row."""
        edge = self.share.cumsum(1)
        place = (rng.random((len(edge), 1)) * edge[:, -1:] > edge).sum(1).clip(max=edge.shape[1] - 1)
        return self.index[np.arange(len(edge)), place]


def transport(
    x: np.ndarray,
    y: np.ndarray,
    *,
    at: np.ndarray | None = None,
    epsilon: float = 0.05,
    rho: float | None = 0.5,
    top_k: int = 32,
    batch: int = 5000,
    n_rounds: int = 1,
    seed: int = 0,
    device: str = "cpu",
) -> Plan:
    """Entropic optimal transport from points ``x`` (n x d) to ``y`` (m x d), uniform masses.

    The cost is the squared distance over its median within the targets, so that ``epsilon`` and ``rho`` mean the same on
    any data. ``rho`` weighs the Kullback-Leibler divergence of the marginals from the uniform ones; None holds them.
    Above ``batch`` points a side random parts of both are paired, ``n_rounds`` times, and the rows averaged: no matrix is
    larger than ``batch`` squared. ``at`` (m x d, by default ``y``) are the coordinates that the plan's means are taken in.
    """
    rng, n, m = np.random.default_rng(seed), len(x), len(y)
    at = y if at is None else at
    unit = _median_cost(y, rng)
    parts = []
    for _ in range(n_rounds if max(n, m) > batch else 1):
        sides = [np.array_split(rng.permutation(size), -(-size // batch)) for size in (n, m)]
        for i in range(max(map(len, sides))):
            rows, columns = (side[i % len(side)] for side in sides)
            parts.append((rows, columns, _solve(x[rows], y[columns], at[columns], unit, epsilon, rho, top_k, device)))
    return _merge(n, top_k, parts)


def _median_cost(y: np.ndarray, rng, n: int = 1000) -> float:
    """Median squared distance between different targets, from some of them."""
    distance = pdist(np.asarray(y[rng.permutation(len(y))[:n]], np.float64), "sqeuclidean")
    return max(float(np.median(distance)), 1e-12) if len(distance) else 1.0


def _solve(x, y, at, unit, epsilon, rho, top_k, device) -> Plan:
    """Solve one dense problem."""
    import ot

    x, y, at = (torch.from_numpy(np.asarray(v, np.float64)).to(device) for v in (x, y, at))
    n, m = len(x), len(y)
    # far beyond what epsilon carries, and exp(-cost / epsilon) would be 0 for a whole row
    cost = (torch.cdist(x, y) ** 2 / unit).clamp_max(600 * epsilon)
    a, b = (torch.full((size,), 1 / size, dtype=cost.dtype, device=cost.device) for size in (n, m))
    if rho is None:
        plan = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=5000, stopThr=1e-4 / max(n, m), warn=False)
    else:
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, cost, epsilon, rho, method="sinkhorn_translation_invariant", numItermax=2000, stopThr=1e-7
        )
    mass = plan.sum(1)
    error = torch.nan if rho is not None else torch.maximum((mass - a).abs().sum(), (plan.sum(0) - b).abs().sum())
    share = plan / mass.clamp_min(1e-300)[:, None]
    best = share.topk(min(top_k, m), dim=1)
    entropy = -torch.xlogy(share, share).sum(1) / max(np.log(m), 1e-12)
    rows = best.indices, best.values, mass * n, entropy, share @ at
    return Plan(*(v.cpu().numpy() for v in rows), float(error))


def _merge(n: int, top_k: int, parts: list[tuple[np.ndarray, np.ndarray, Plan]]) -> Plan:
    """Average the rows of several problems (rows, columns, plan), each row weighted by its mass."""
    d = parts[0][2].mean.shape[1]
    seen, mass, sums, found = np.zeros(n), np.zeros(n), np.zeros((n, d + 1)), []
    for rows, columns, plan in parts:
        seen[rows] += 1
        mass[rows] += plan.mass
        sums[rows] += plan.mass[:, None] * np.column_stack([plan.mean, plan.entropy])
        entries = np.repeat(rows, plan.index.shape[1]), columns[plan.index].ravel()
        found.append((*entries, (plan.share * plan.mass[:, None]).ravel()))
    row, column, value = (np.concatenate(v) for v in zip(*found))
    # a target that a source met in several rounds counts once
    whole = sparse.csr_matrix((value / mass.clip(1e-300)[row], (row, column)), (n, int(column.max()) + 1)).tocoo()
    order = np.lexsort([-whole.data, whole.row])  # within each row the largest first
    row, column, value = whole.row[order], whole.col[order], whole.data[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    k = min(top_k, int(place.max()) + 1)
    index, share = np.zeros((n, k), int), np.zeros((n, k))
    index[row[place < k], place[place < k]] = column[place < k]
    share[row[place < k], place[place < k]] = value[place < k]
    sums /= mass.clip(1e-300)[:, None]
    error = max(plan.marginal_error for *_, plan in parts)
    return Plan(index, share, mass / seen, sums[:, d], sums[:, :d], error)


def agreement(one: Plan, other: Plan, at: np.ndarray) -> np.ndarray:
    """How alike the matches of two plans are, n, in [0, 1].

    Cosine between what both plans assign to a source on average, as seen from the middle of the targets: 1 where both point
    the same way, 0 where they have nothing in common. ``at``: coordinates of the targets that both took their means in.
    """
    a, b = (plan.mean - at.mean(0) for plan in (one, other))
    return np.clip((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)).clip(1e-300), 0, 1)
