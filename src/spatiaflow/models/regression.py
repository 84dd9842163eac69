"""Ridge regression on histology features, alone and smoothed over neighbours: what every network is compared and stacked with.

All functions work on parts: a part is the features (n x F) and the expression (n x genes) of one slide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from scipy.optimize import nnls

from spatiaflow.models.slide import Rows
from spatiaflow.models.spatial import Graph

ALPHAS = tuple(float(a) for a in np.geomspace(1, 1e6, 13))
SMOOTHING = (0.0, 0.25, 0.5, 0.75, 1.0)
MIN_SPOTS = 20  # on tissue, to scale a slide by itself
ROWS = 4096  # whose features are scaled at a time

Part = tuple[np.ndarray, np.ndarray]  # features n x F, expression n x genes


class Scaled:
    """Features of one slide as models take them, made for some rows at a time: never a second copy of all.

    Parameters
    ----------
    features
        n x F, of the slide without glass; an array, or anything that gives some of its rows as one.
    mean, std
        Of the training data, F.
    mode
        ``"slide"`` scales a slide of 20 spots or more by its own mean and deviation. Not by median and MAD: texture features
        have long tails that carry signal, and with median and MAD the correlation on her2st falls by a third
        (benchmarks/glass.py).
    """

    def __init__(self, features: Rows, mean: np.ndarray, std: np.ndarray, mode: str):
        self.features, self.mean, self.std = features, mean, std
        if own_spots(mode, len(features)):
            self.mean = self._average(lambda x: x)
            own = np.sqrt(self._average(lambda x: (x - self.mean) ** 2))
            self.std = np.where(own < 1e-6, 1.0, own)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return ((self.features[rows] - self.mean) / self.std).astype(np.float32)

    def apply(self, model: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What a model of single rows (b x F to b x k) gives for all of them, n x k."""
        out: Any = None
        for rows in blocks(len(self)):
            found = model(self[rows])
            out = np.empty((len(self), *found.shape[1:]), found.dtype) if out is None else out
            out[rows] = found
        return out

    def _average(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        total = sum(function(self.features[rows].astype(np.float64)).sum(0) for rows in blocks(len(self)))
        return np.asarray(total) / len(self)


def blocks(n: int) -> list[slice]:
    """Consecutive rows of ``n``, :data:`ROWS` at a time; one empty block of none."""
    return [slice(start, start + ROWS) for start in range(0, max(n, 1), ROWS)]


def standardize(features: np.ndarray, mean: np.ndarray, std: np.ndarray, mode: str) -> np.ndarray:
    """Features of one slide without glass, scaled as :class:`Scaled` does, n x F."""
    return Scaled(features, mean, std, mode)[:]


def own_spots(mode: str, n: int) -> int:
    """How many of the ``n`` spots of a slide on tissue its features are scaled by; 0: by the training data."""
    return n if mode == "slide" and n >= MIN_SPOTS else 0


def smooth(values: np.ndarray, graph: Graph, weight: float) -> np.ndarray:
    """Mix every row with the mean of its spatial neighbours: (1 - weight) own + weight neighbours."""
    index, mask = graph.index.numpy(), graph.mask.numpy()
    if not weight or not index.shape[1]:
        return values
    share = mask / np.maximum(mask.sum(1, keepdims=True), 1)
    around = np.zeros_like(values)
    for j in range(index.shape[1]):  # one neighbour at a time: never n x k x genes
        around += share[:, j : j + 1].astype(values.dtype) * values[index[:, j]]
    alone = ~mask.any(1)
    around[alone] = values[alone]
    return (1 - weight) * values + weight * around


def gene_pearson(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Pearson correlation of every column; 0 where the prediction is constant, NaN where the truth is."""
    a, b = y - y.mean(0), prediction - prediction.mean(0)
    norm_a, norm_b = np.sqrt((a**2).sum(0)), np.sqrt((b**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(0) / (norm_a * norm_b)
    return np.where(norm_a < 1e-9, np.nan, np.where(norm_b < 1e-9, 0.0, r))


def given_depth(values: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Residuals of every column on the log depth within one slide, ... x n x genes; depth (library sizes) has length n."""
    x = np.stack([np.ones(len(depth)), np.log(np.maximum(depth, 1))], 1)
    return values - x @ (np.linalg.pinv(x) @ values)


@dataclass
class Moments:
    """Sums that a ridge regression needs; they add over slides, so leaving slides out costs no pass over the data."""

    n: float
    x: np.ndarray  # F
    y: np.ndarray  # genes
    xx: np.ndarray  # F x F
    xy: np.ndarray  # F x genes

    @classmethod
    def of(cls, parts: list[Part]) -> Moments:
        """Sum over all rows of some parts."""
        sums = []
        for features, expression in parts:
            x, y = features.astype(np.float64), expression.astype(np.float64)
            sums.append(cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y))
        return sum(sums[1:], sums[0])

    def __add__(self, other: Moments) -> Self:
        return type(self)(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __sub__(self, other: Moments) -> Self:
        return type(self)(*(a - b for a, b in zip(vars(self).values(), vars(other).values())))

    def ridges(self, alphas: tuple[float, ...]) -> list[Ridge]:
        """Ridge regressions with unpenalised intercept, one eigendecomposition for all penalties."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        values, axes = np.linalg.eigh(self.xx - self.n * np.outer(mean_x, mean_x))
        projected = axes.T @ (self.xy - self.n * np.outer(mean_x, mean_y))
        out = []
        for alpha in alphas:
            coefficients = axes @ (projected / (np.maximum(values, 0) + alpha)[:, None])
            intercept = mean_y - mean_x @ coefficients
            out.append(Ridge(coefficients.astype(np.float32), intercept.astype(np.float32), alpha))
        return out


@dataclass
class Ridge:
    """Ridge regression from standardised features to log expression, and how much its predictions are smoothed."""

    coefficients: np.ndarray = field(repr=False)  # F x genes
    intercept: np.ndarray = field(repr=False)  # genes
    alpha: float = 0.0

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Unsmoothed prediction, n x genes."""
        return features @ self.coefficients + self.intercept


def fit_ridge(parts: list[Part], alpha: float) -> Ridge:
    """Fit to all rows of some parts."""
    (ridge,) = Moments.of(parts).ridges((alpha,))
    return ridge


def choose_ridge(groups: list[list[Part]], graphs: list[list[Graph]]) -> tuple[float, float, float]:
    """Choose penalty and smoothing by holding out one group of parts at a time.

    Parameters
    ----------
    groups
        Parts that are held out together.
    graphs
        The neighbours of each part's rows, for smoothing.

    Returns
    -------
    Penalty, smoothing, and the mean Pearson correlation that they reach.
    """
    scores, moments = np.zeros((len(ALPHAS), len(SMOOTHING))), [Moments.of(group) for group in groups]
    for i, held_out in enumerate(groups):
        ridges = _sum(moments, but=i).ridges(ALPHAS)
        for (features, expression), graph in zip(held_out, graphs[i]):
            for a, ridge in enumerate(ridges):
                raw = ridge.predict(features)
                for w, weight in enumerate(SMOOTHING):
                    scores[a, w] += np.nanmean(gene_pearson(expression, smooth(raw, graph, weight)))
    best_alpha, best_weight = np.unravel_index(np.argmax(scores), scores.shape)
    best = float(scores[best_alpha, best_weight] / sum(len(group) for group in groups))
    return ALPHAS[best_alpha], SMOOTHING[best_weight], best


def cross_fitted(groups: list[list[Part]], alpha: float) -> list[list[np.ndarray]]:
    """Predict every part by a ridge that was fitted on the other groups (on its own, when there is only one)."""
    moments, out = [Moments.of(group) for group in groups], []
    for i, held_out in enumerate(groups):
        (ridge,) = (_sum(moments, but=i) if len(groups) > 1 else moments[0]).ridges((alpha,))
        out.append([ridge.predict(features) for features, _ in held_out])
    return out


def _sum(moments: list[Moments], but: int) -> Moments:
    rest = [m for j, m in enumerate(moments) if j != but]
    return sum(rest[1:], rest[0])


def fit_stack(
    y: np.ndarray, parts: np.ndarray, mean: np.ndarray, groups: np.ndarray, prior: np.ndarray | None = None,
    strength: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Non-negative weights that combine several predictions; what a slide's mean is and what varies inside it apart.

    A slide of another donor shifts all its spots alike; weights fitted to that shift would misjudge who predicts the
    pattern inside slides. Slides count equally, each in units of its own spread.

    Parameters
    ----------
    y
        Held-out truth, n x genes.
    parts
        Held-out predictions, parts x n x genes.
    mean
        Training mean that each row's predictions were made with, n x genes.
    groups
        Slide of each row; the shrinkage of per-gene weights to common ones is the one that predicts held-out slides
        best.
    prior, strength
        Weights that the common ones are drawn to, and how strongly: 1 is as much as the data.

    Returns
    -------
    level : array of length parts, for slide means around the training mean; their sum is at most 1
    weights : array, parts x genes, for deviations from the slide's mean
    """
    names, n_parts = np.unique(groups), len(parts)
    rows = [groups == name for name in names]
    typical = np.mean([y[r].std(0) for r in rows], 0)
    scales = [np.maximum(y[r].std(0) + 0.1 * typical, 1e-3) for r in rows]
    target, inputs, level_target, level_inputs = [], [], [], []  # of each slide
    for r, scale in zip(rows, scales):
        centre, unit = parts[:, r].mean(1, dtype=np.float64), np.sqrt(r.sum()) * scale
        inputs.append((parts[:, r] - centre[:, None]) / unit)
        target.append((y[r] - y[r].mean(0, dtype=np.float64)) / unit)
        level_inputs.append(((centre - mean[r][0]) / scale).T)
        level_target.append((y[r].mean(0) - mean[r][0]) / scale)
    level = _bounded(np.concatenate(level_inputs), np.concatenate(level_target))
    # sums of products are all that the weights need; each slide adds its own
    prior = np.full(n_parts, 1 / n_parts) if prior is None else prior
    products = [(np.einsum("png,qng->gpq", x, x), np.einsum("png,ng->gp", x, t)) for x, t in zip(inputs, target)]

    def solve(which: Sequence[int], shrinkage: float) -> np.ndarray:
        xx, xz = (sum(products[i][k] for i in which) for k in (0, 1))
        pull = strength * np.trace(xx.sum(0)) / n_parts
        common = _nnls(xx.sum(0) + pull * np.eye(n_parts), xz.sum(0) + pull * prior)
        if np.isinf(shrinkage):
            return np.repeat(common[:, None], y.shape[1], 1)
        pull = shrinkage * len(which)
        return np.stack([_nnls(a + pull * np.eye(n_parts), b + pull * common) for a, b in zip(xx, xz)], 1)

    everything, choices = range(len(names)), (0.01, 0.1, 1.0, np.inf)
    if len(names) == 1:
        return level, solve(everything, np.inf)
    error = np.zeros(len(choices))
    for held_out in everything:
        for c, shrinkage in enumerate(choices):
            weights = solve([i for i in everything if i != held_out], shrinkage)
            error[c] += ((target[held_out] - np.einsum("pg,png->ng", weights, inputs[held_out])) ** 2).sum()
    return level, solve(everything, choices[int(error.argmin())])


def _nnls(xx: np.ndarray, xz: np.ndarray) -> np.ndarray:
    """Non-negative least squares from sums of products; a hint of a ridge keeps members apart that agree."""
    root = np.linalg.cholesky(xx + (1e-6 * np.trace(xx) / len(xx) + 1e-12) * np.eye(len(xx)))
    return nnls(root.T, np.linalg.solve(root, xz))[0]


def _bounded(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Non-negative weights with a sum of at most 1: no prediction of a level lies outside what the members say."""
    found, _ = nnls(x, z)
    if found.sum() <= 1:
        return found
    heavy = 1e3 * max(float(np.abs(x).max()), 1e-6) * np.sqrt(len(x))
    found, _ = nnls(np.vstack([x, np.full(x.shape[1], heavy)]), np.append(z, heavy))  # on the edge: the sum is 1
    return found / max(found.sum(), 1.0)


def combine(
    parts: Iterable[np.ndarray], mean: np.ndarray, level: np.ndarray, weights: np.ndarray
) -> np.ndarray:  # fmt: skip
    """Apply weights of :func:`fit_stack` to the predictions (each n x genes) of one slide; expression is never negative.

    With several sets of weights (sets x members x genes) there are as many results (sets x n x genes).
    """
    out: Any = 0.0
    for part, of_level, of_pattern in zip(parts, level, np.moveaxis(weights, -2, 0).astype(np.float32)):
        centre = part.mean(0, keepdims=True, dtype=np.float64)
        out = out + (part - centre.astype(np.float32)) * of_pattern[..., None, :]
        out += (of_level * (centre - mean)).astype(np.float32)
    return np.maximum(out + mean.astype(np.float32), 0)
