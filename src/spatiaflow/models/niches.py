"""Niches: mixtures of the niche level, their number by agreement of halves of the genes, and a consensus of all halves.

The niche level of each half of the genes is clustered by a Gaussian mixture with one covariance for all niches. Two halves of
one split share no gene, so they agree only on niches that are in the tissue: the number on which halves agree best is chosen.
Halves and all genes are brought to one numbering. A cell's niche is the one of highest probability, one half from all genes and
one half the mean of the halves; how sure the halves are of it is its confidence.
A mixture with one covariance tells its components apart by linear functions. A model is therefore one weight for each gene,
scale and niche, and carries its niches to other slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spatiaflow.models.levels import SCALES, gaussian_means, joint_axes, standardised
from spatiaflow.models.slide import Slide

N_SPLITS = 6  # of the genes: twelve halves
N_RUNS = 2 * N_SPLITS + 1  # the halves, and all genes
N_REDUCED = 15  # components of a niche level that a mixture is fitted to, on one scale
MAX_FIT = 10_000  # cells that mixtures are fitted to
FEWEST = 3  # niches that are chosen: two halves agree on two parts of almost any tissue, or on none


@dataclass(frozen=True)
class Niches:
    """An ensemble of linear functions that tell niches apart: the last sees all genes, the others one half each.

    Attributes
    ----------
    weights
        runs x scales x genes (or columns of an embedding) x niches.
    intercept
        runs x niches.
    genes
        Names; empty for niches of an embedding.
    niche_um
        Standard deviation of the middle scale, µm.
    target_sum
        Counts that cells are normalised to.
    cells
        Log odds of some of the cells that the niches were found in, n x niches: what new samples are compared with.
    """

    weights: np.ndarray
    intercept: np.ndarray
    genes: tuple[str, ...] = ()
    niche_um: float = 0.0
    target_sum: float = 1.0
    cells: np.ndarray | None = None

    def __len__(self) -> int:
        return self.intercept.shape[1]

    def of_slide(self, slide: Slide) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability of each niche for every cell, that by the halves alone, and log odds by all genes, each n x niches."""
        z = standardised(slide.align(self.genes), self.target_sum)
        logit: Any = self.intercept[:, None]
        for i, scale in enumerate(SCALES):
            weights = self.weights[:, i].transpose(1, 0, 2).reshape(len(self.genes), -1)
            values = (z @ weights).astype(np.float32)
            means = np.concatenate([v for _, v in gaussian_means(slide.xy, values, [scale * self.niche_um])])
            logit = logit + means.reshape(len(slide), *self.intercept.shape).transpose(1, 0, 2)
        return *_consensus(logit), logit[-1] - logit[-1].mean(1, keepdims=True)

    def of_embedding(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each niche for every row, and that by all runs but the last, each n x niches."""
        return _consensus(np.einsum("nd,rdk->rnk", x, self.weights[:, 0]) + self.intercept[:, None])

    def take(self, order: np.ndarray) -> Niches:
        """With the niches in another order: ``order`` (niches), or one of each run (runs x niches)."""
        order = np.broadcast_to(order, self.intercept.shape)
        runs = np.arange(len(order))[:, None]
        weights = self.weights.transpose(0, 3, 1, 2)[runs, order].transpose(0, 2, 3, 1)
        cells = None if self.cells is None else self.cells[:, order[-1]]
        return replace(self, weights=weights, intercept=self.intercept[runs, order], cells=cells)


def niches_of_genes(
    slides: Sequence[Slide], numbers: Sequence[int], *, niche_um: float, target_sum: float, seed: int
) -> tuple[Niches, dict[int, np.ndarray]]:
    """The niches of some slides, which have the same genes, and the agreement of each split for each number tried.

    Parameters
    ----------
    numbers
        Numbers of niches to try. The one of highest agreement is taken, of at least three where there is a choice.
    """
    slides = _ordered(slides)
    genes = tuple(sorted(slides[0].genes))
    slides = [slide.align(genes) for slide in slides]
    parts = [standardised(slide, target_sum) for slide in slides]
    rng = np.random.default_rng(seed)
    chosen = _sample([len(slide) for slide in slides], rng)
    sigmas = [niche_um * scale for scale in SCALES]
    halves = [half for _ in range(N_SPLITS) for half in np.array_split(rng.permutation(len(genes)), 2)]
    runs = []
    for seen in [*map(np.sort, halves), np.arange(len(genes))]:
        found = joint_axes([part.take(seen) for part in parts])
        axes = np.zeros((len(genes), found.shape[1]))
        axes[seen] = found
        level = np.concatenate([
            mean for slide, part, rows in zip(slides, parts, chosen)
            for _, mean in gaussian_means(slide.xy, part @ axes, sigmas, rows)
        ])  # fmt: skip
        runs.append((axes, Reduced.of(level)))
    fits = {k: [reduced.mixture(k, seed) for _, reduced in runs] for k in numbers}
    agreement = {k: _agreement([fit.label for fit in found[:-1]]) for k, found in fits.items()}
    best = max((k for k in numbers if k >= FEWEST or len(numbers) == 1), key=lambda k: agreement[k].mean())
    weights = [
        np.einsum("gc,sck->sgk", axes, fit.slope.reshape(len(SCALES), -1, best))
        for (axes, _), fit in zip(runs, fits[best])
    ]
    intercept = np.stack([fit.intercept for fit in fits[best]])
    model = Niches(np.stack(weights), intercept, genes, niche_um, target_sum)
    return model.take(_aligned([fit.label for fit in fits[best]], best)), agreement


def niches_of_embedding(x: np.ndarray, n: int, seed: int) -> Niches:
    """The niches of an embedding: a consensus of mixtures that start elsewhere."""
    x = x[np.lexsort(x.T[::-1])]
    (rows,) = _sample([len(x)], np.random.default_rng(seed))
    reduced = Reduced.of(x[rows])
    fits = [reduced.mixture(n, seed + i) for i in range(N_RUNS)]
    model = Niches(np.stack([fit.slope for fit in fits])[:, None], np.stack([fit.intercept for fit in fits]))
    return model.take(_aligned([fit.label for fit in fits], n))


@dataclass(frozen=True)
class Fit:
    """A mixture as linear functions of what was reduced, and the niche of each cell that it was fitted to."""

    slope: np.ndarray  # d x niches
    intercept: np.ndarray  # niches
    label: np.ndarray  # n


@dataclass(frozen=True)
class Reduced:
    """The first principal components of an embedding, all in units of the first one's deviation."""

    x: np.ndarray  # n x 15
    centre: np.ndarray  # d
    axes: np.ndarray  # d x 15

    @classmethod
    def of(cls, x: np.ndarray) -> Reduced:
        """Reduce an embedding, n x d."""
        from sklearn.decomposition import PCA

        pca = PCA(min(N_REDUCED, *x.shape), svd_solver="full").fit(x)
        axes = pca.components_.T / max(float(np.sqrt(pca.explained_variance_[0])), 1e-12)
        return cls((x - pca.mean_) @ axes, pca.mean_, axes)

    def mixture(self, n: int, seed: int) -> Fit:
        """A mixture of ``n`` components with one covariance."""
        from sklearn.mixture import GaussianMixture

        fit = GaussianMixture(n, covariance_type="tied", reg_covar=1e-3, n_init=3, random_state=seed).fit(self.x)
        toward = fit.precisions_ @ fit.means_.T  # 15 x niches
        slope = self.axes @ toward
        intercept = np.log(fit.weights_) - 0.5 * (fit.means_.T * toward).sum(0) - self.centre @ slope
        return Fit(slope, intercept, fit.predict(self.x))


def _agreement(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Adjusted Rand index of the two halves of each split."""
    from sklearn.metrics import adjusted_rand_score

    return np.array([adjusted_rand_score(a, b) for a, b in zip(labels[::2], labels[1::2])])


def _aligned(labels: Sequence[np.ndarray], n: int) -> np.ndarray:
    """For each run which of its clusters is which niche, runs x niches, by the run that agrees best with the others."""
    from scipy.optimize import linear_sum_assignment

    one = [np.eye(n)[label] for label in labels]
    orders = np.array([[linear_sum_assignment(-(a.T @ b))[1] for b in one] for a in one])  # runs x runs x niches
    agreed = [sum((a * b[:, order]).sum() for b, order in zip(one, row)) for a, row in zip(one, orders)]
    return orders[int(np.argmax(agreed))]


def _ordered(slides: Sequence[Slide]) -> list[Slide]:
    """Slides and their rows in an order that does not depend on the one they came in."""
    slides = [slide.take(np.lexsort(slide.xy.T)) for slide in slides]
    return sorted(slides, key=lambda slide: (len(slide), *slide.xy[0], *slide.xy[-1], *slide.counts.sum(0).flat))


def _sample(sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Rows that mixtures are fitted to: of each slide in proportion to its cells."""
    share = min(1.0, MAX_FIT / sum(sizes))
    return [np.sort(rng.permutation(n)[: max(1, round(share * n))]) for n in sizes]


def _consensus(logit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability of the last run and of the mean of the others, and that mean, from runs x n x niches."""
    p = np.exp(logit - logit.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    others = p[:-1].mean(0)
    return (p[-1] + others) / 2, others
