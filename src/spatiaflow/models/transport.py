"""Entropic optimal transport between the cells of two states, with a confidence for each pair."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.spatial.distance import pdist

from spatiaflow.models import _base
from spatiaflow.models.spatial import spatial_graph

# The confidence is always computed from a wide, unbalanced plan, whatever plan the pairs are drawn from. In a narrow plan the few
# targets that are near by chance would count as evidence, so small and large groups could not be compared. In a balanced plan
# every source transports all its mass, so sources without a counterpart would not show.
CONFIDENCE_EPSILON, CONFIDENCE_RHO = 0.25, 0.5
N_AROUND = 30  # number of nearest cells that make up the composition around a cell


@dataclass
class PairingConfig(_base.Config):
    """Settings of :func:`spatiaflow.tl.pair_transitions`.

    Attributes
    ----------
    epsilon
        Entropic regularisation, in units of the median cost within the target state.
    unbalanced
        Weight of the Kullback-Leibler divergence of both marginals from uniform ones, in the unit of ``epsilon``. Sources
        without a counterpart lose mass. If None, the plan is balanced: every source and every target of a niche is used fully,
        so the pairs show the whole difference between the two states there. The confidence does not depend on this setting.
    confidence
        ``"mass"``: min(1, transported mass / prescribed mass) times the agreement between the matches from two binomial halves
        of the counts. For comparison: ``"entropy"``, 1 - entropy of the row / log of the number of targets, and ``"peak"``, the
        largest entry of the row of the plan, which decreases with the number of cells.
    pairs
        ``"sample"`` draws each source's target from its row of the plan, which keeps the variety of the targets.
        ``"argmax"`` takes the largest entry, so many sources may share a target.
    min_cells
        Minimum number of cells of each state in a niche. Niches with fewer are not paired.
    min_share
        For tiles: minimum share of a state among the cells of a tile. Tiles with less do not have the state.
    n_components
        Number of principal components of expression, fitted to the cells of both states.
    top_k
        Number of entries of each row of the plan that are stored.
    n_rounds
        With more than ``batch_size`` cells per state, each source is paired with this many random parts of the targets.

    Examples
    --------
    >>> sf.models.PairingConfig(unbalanced=None).epsilon
    0.05
    """

    epsilon: float = 0.05
    unbalanced: float | None = 0.5
    confidence: str = "mass"
    pairs: str = "sample"
    min_cells: int = 5
    min_share: float = 0.05
    n_components: int = 50
    top_k: int = 32
    n_rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("epsilon", "unbalanced"):
            if (value := getattr(self, name)) is not None and not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}.")
        if self.epsilon is None:
            raise ValueError("epsilon must be a positive number, not None.")
        for name in ("min_cells", "n_components", "top_k", "n_rounds"):
            if (value := getattr(self, name)) != int(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        for name, known in (("confidence", ("mass", "entropy", "peak")), ("pairs", ("sample", "argmax"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}.")


PairingConfig.named = {"default": PairingConfig()}


@dataclass
class Plan:
    """The largest entries of each row of a transport plan from n sources to m targets."""

    index: np.ndarray  # n x k, targets, the largest entry first
    share: np.ndarray  # n x k, shares of the row's mass
    mass: np.ndarray  # n, transported mass / prescribed mass
    entropy: np.ndarray  # n, entropy of the row / log of the number of its possible targets
    mean: np.ndarray  # n x d, mean of the whole row's targets, in the coordinates ``at``
    marginal_error: float  # largest relative L1 error of both marginals over the problems solved; NaN if unbalanced

    @property
    def dropped(self) -> np.ndarray:
        """Share of each row's mass that is not among the kept entries."""
        return 1 - self.share.sum(1)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a target for each source from its row."""
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
    device: str | torch.device = "cpu",
) -> Plan:
    """Solve entropic optimal transport from points ``x`` (n x d) to ``y`` (m x d) with uniform masses.

    The cost is the squared distance divided by its median within the targets, so ``epsilon`` and ``rho`` mean the same on any
    data. ``rho`` weights the Kullback-Leibler divergence of the marginals from uniform ones. If it is None, the marginals are
    fixed. With more than ``batch`` points per side, random parts of both sides are paired ``n_rounds`` times and the rows are
    averaged, so no matrix is larger than ``batch`` x ``batch``. ``at`` (m x d, by default ``y``) are the coordinates of the means
    in :attr:`Plan.mean`.
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


def _median_cost(y: np.ndarray, rng: np.random.Generator, n: int = 1000) -> float:
    """Return the median squared distance between targets, estimated from a random subset of them."""
    distance = pdist(np.asarray(y[rng.permutation(len(y))[:n]], np.float64), "sqeuclidean")
    return max(float(np.median(distance)), 1e-12) if len(distance) else 1.0


def _solve(
    x: Any, y: Any, at: Any, unit: float, epsilon: float, rho: float | None, top_k: int, device: str | torch.device
) -> Plan:
    """Solve one dense problem."""
    import ot

    x, y, at = (torch.from_numpy(np.asarray(v, np.float64)).to(device) for v in (x, y, at))
    n, m = len(x), len(y)
    # such a cost transports nothing; without the limit exp(-cost / epsilon) would be 0 for a whole row
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
    index, mass_share, transported, spread, mean = (v.cpu().numpy() for v in rows)
    return Plan(index, mass_share, transported, spread, mean, float(error))


def _merge(n: int, top_k: int, parts: list[tuple[np.ndarray, np.ndarray, Plan]]) -> Plan:
    """Average the rows of several problems (rows, columns, plan), weighted by their mass."""
    d = parts[0][2].mean.shape[1]
    seen, mass, sums, found = np.zeros(n), np.zeros(n), np.zeros((n, d + 1)), []
    for rows, columns, plan in parts:
        seen[rows] += 1
        mass[rows] += plan.mass
        sums[rows] += plan.mass[:, None] * np.column_stack([plan.mean, plan.entropy])
        entries = np.repeat(rows, plan.index.shape[1]), columns[plan.index].ravel()
        found.append((*entries, (plan.share * plan.mass[:, None]).ravel()))
    row, column, value = (np.concatenate(v) for v in zip(*found))
    # entries of the same source and target from several rounds are summed
    whole = sparse.csr_matrix((value / mass.clip(1e-300)[row], (row, column)), (n, int(column.max()) + 1)).tocoo()
    order = np.lexsort([-whole.data, whole.row])  # the largest entry of each row first
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
    """Return how similar the matches of two plans are: n values in [0, 1].

    This is the cosine between the mean targets of a source in both plans, relative to the mean of all targets. It is 1 if both
    have the same direction, and 0 if they are unrelated. ``at`` (m x d) are the coordinates of the targets in which both plans
    computed their means.
    """
    a, b = (plan.mean - at.mean(0) for plan in (one, other))
    return np.clip((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)).clip(1e-300), 0, 1)


@dataclass
class StateShares:
    """Share of each state in each row of a table: 0 or 1 for a cell, a value between them for a tile."""

    groupby: str  # name of the column or slot, for error messages
    names: list[str]
    share: np.ndarray  # n x states
    min_share: float
    order: np.ndarray  # n, rows sorted by name, so that random draws do not depend on the order of the table

    def place(self, state: str) -> int:
        """Return the column of a state."""
        if state not in self.names:
            near = difflib.get_close_matches(state, self.names, 3, 0.4) or self.names[:8]
            raise ValueError(f"{self.groupby!r} has no state {state!r}; did you mean {', '.join(map(repr, near))}?")
        return self.names.index(state)

    def has(self, state: str) -> np.ndarray:
        """Return the rows (n, bool) with enough of a state."""
        return self.share[:, self.place(state)] >= self.min_share

    def is_source(self, source: str, target: str) -> np.ndarray:
        """Return the rows (n, bool) with enough of the source state and little of the target state."""
        return self.has(source) if source == target else self.has(source) & ~self.has(target)

    def sides(self, source: str, target: str, seed: Sequence[int], min_cells: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of sources and of targets. If both states are the same, two random halves of its rows."""
        order = self.order
        rows, columns = order[self.is_source(source, target)[order]], order[self.has(target)[order]]
        if source == target:
            rows = np.random.default_rng(seed).permutation(rows)
            rows, columns = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        for state, found in ((source, rows), (target, columns)):
            if len(found) < min_cells:
                raise ValueError(
                    f"{source} -> {target}: {len(found)} rows of state {state!r} are fewer than min_cells={min_cells}."
                )
        return rows, columns


@dataclass
class Coordinates:
    """Coordinates in which cells are compared: blocks of n x d, each multiplied by the square root of its weight."""

    fixed: list[np.ndarray]
    expression: np.ndarray | None = None  # n x components
    halves: list[np.ndarray] = field(default_factory=list)  # expression from each of two binomial halves of the counts

    def between(self, rows: np.ndarray, columns: np.ndarray, half: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates of sources and targets, scaled so that each block has total variance 1 within the targets."""
        first = self.expression if half is None else self.halves[half]
        x, y = [], []
        for block in self.fixed if first is None else [first, *self.fixed]:
            a, b = block[rows], block[columns]
            scale = max(np.sqrt(b.var(0).sum()), 1e-9)
            x.append(a / scale)
            y.append(b / scale)
        return np.hstack(x), np.hstack(y)


def expression(
    counts: sparse.csr_matrix, weight: float, *, n_components: int, halved: bool, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return principal components (n x components) of log counts (n x genes), also of two binomial halves of the counts."""
    from sklearn.decomposition import PCA

    unit = max(float(np.median(np.asarray(counts.sum(1)))), 1.0)
    values = per_unit(counts, unit)
    n = min(n_components, min(values.shape) - 1)
    # not scanpy's pca: it does not keep the projection, which is needed for the halves
    pca = PCA(n, svd_solver="covariance_eigh" if values.shape[1] <= 3000 else "arpack", random_state=seed).fit(values)
    halves = []
    if halved:
        half = counts.copy()
        half.data = np.random.default_rng([seed, 3]).binomial(counts.data.astype(np.int64), 0.5).astype(np.float64)
        halves = [np.sqrt(weight) * pca.transform(per_unit(part, unit)) for part in (half, counts - half)]
    return np.sqrt(weight) * pca.transform(values), halves


def per_unit(counts: sparse.csr_matrix, unit: float) -> sparse.csr_matrix:
    """Return log1p of counts per ``unit``, in float64. The components of nearly equal cells need this precision."""
    total = np.asarray(counts.sum(1)).ravel().clip(1)
    return sparse.csr_matrix(sparse.diags(unit / total) @ counts).log1p()


def composition(share: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Return the mean share of each state (n x states) among the nearest cells of each position (n x 2)."""
    return share[spatial_graph(xy, N_AROUND, ties="cut").index.numpy()].mean(1)


def matched(
    coordinates: Coordinates,
    rows: np.ndarray,
    columns: np.ndarray,
    config: PairingConfig,
    *,
    batch: int,
    seed: int,
    device: str | torch.device,
) -> tuple[Plan, np.ndarray]:
    """Return the plan from the sources to the targets of one group, and the confidence of each source."""
    x, y = coordinates.between(rows, columns)
    options: dict[str, Any] = {
        "top_k": config.top_k,
        "batch": batch,
        "n_rounds": config.n_rounds,
        "device": device,
        "seed": seed,
    }
    plan = transport(x, y, epsilon=config.epsilon, rho=config.unbalanced, **options)
    if config.confidence == "entropy":
        return plan, np.clip(1 - plan.entropy, 0, 1)
    if config.confidence == "peak":
        return plan, plan.share[:, 0] * plan.mass / len(rows)
    options |= {"epsilon": CONFIDENCE_EPSILON, "rho": CONFIDENCE_RHO}
    confidence = np.minimum(1, transport(x, y, **options).mass)
    if coordinates.halves:
        halves = []
        for half in range(2):
            a, b = coordinates.between(rows, columns, half)
            halves.append(transport(a, b, at=y, **options))
        confidence = confidence * agreement(halves[0], halves[1], y)
    return plan, confidence
