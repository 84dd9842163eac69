"""Fitting the joint law to held-out predictions, by moments of the ratios of counts to their means.

For two different counts of a slide, E[z_ig z_jh] = exp(C_gh(d_ij)) - 1, where z = count / mean - 1 and C is the covariance of log
rates. Counting noise is independent, so pairs do not see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize_scalar, nnls
from scipy.spatial.distance import cdist
from scipy.special import gammaln

from spatiaflow.models.counts import MAX_THETA, log_variance, theta_of
from spatiaflow.models.fields import kernel
from spatiaflow.models.law import DONOR_SD, MIN_DONORS, JointLaw
from spatiaflow.models.slide import ABSENT

LAGS = (0.5, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 10.0, 14.0)  # edges, in pitches
SHORT, LONG = (1.0, 1.5, 2.0, 3.0), (4.0, 6.0, 9.0, 14.0)  # ranges tried, in pitches
NEAR = 4  # lags that tell how genes go together
MAX_SPOTS = 2000  # of a window in which pairs are counted
N_FACTORS = 6
MAX_GENES = 500  # whose correlation is fitted, those with most information; others vary on their own
PRIOR_SLIDES = 8  # weight of the mean of all genes in the variance between slides


@dataclass(frozen=True)
class HeldOut:
    """Counts of a slide, and what was predicted without it."""

    name: str
    donor: str
    xy: np.ndarray  # n x 2, µm
    counts: np.ndarray  # n x genes
    library: np.ndarray  # n
    log_mean: np.ndarray  # n x genes, log of the predicted rate
    features: np.ndarray = ABSENT  # n x F, scaled

    def take(self, rows: np.ndarray) -> HeldOut:
        """Some of its rows."""
        arrays = (self.xy, self.counts, self.library, self.log_mean, self.features)
        return HeldOut(self.name, self.donor, *(a if a is ABSENT else a[rows] for a in arrays))


def fit_law(slides: list[HeldOut], pitch: float) -> JointLaw:
    """Fit the joint law to slides that were predicted without themselves."""
    means = [s.library[:, None] * np.exp(s.log_mean) for s in slides]
    levels = np.stack([level_of(s.counts, mean) for s, mean in zip(slides, means)])
    means = [mean * np.exp(level) for mean, level in zip(means, levels)]
    theta = fit_theta(np.concatenate([s.counts for s in slides]), np.concatenate(means))
    extra = log_variance(theta)  # of log rate in a single spot, field and nugget included
    windows = [w for s, mean in zip(slides, means) for w in _windows(s, mean, theta)]
    moments, field = _field(windows, pitch)
    lengths, field = moments.lengths, field * np.minimum(1, extra / np.maximum(field.sum(0), 1e-12))
    genes = np.sort(np.argsort(-moments.weight[0], kind="stable")[:MAX_GENES])
    factors = _factors(windows, pitch, moments, field, genes)
    nugget = _nugget(windows, pitch, moments, field, np.maximum(extra - field.sum(0), 0), factors, genes)
    slide, donor, learned = _between(slides, levels, means, theta, windows, lengths, field)
    rest = theta_of(extra - field.sum(0) - nugget)
    return JointLaw(
        theta=rest, lengths=lengths, field_sd=np.sqrt(field), nugget_sd=np.sqrt(nugget), slide_sd=np.sqrt(slide),
        donor_sd=np.sqrt(donor), factors=factors, donors_learned=learned,
    )  # fmt: skip


def fit_theta(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Inverse dispersion of each gene under which counts (n x genes) are most likely, given their means."""
    out = np.empty(counts.shape[1])
    for g in range(len(out)):
        c, m = np.ascontiguousarray(counts[:, g], np.float64), np.maximum(mean[:, g], 1e-9)
        values, times = np.unique(c, return_counts=True)  # few, and the gamma function is slow
        n = len(c)

        def loss(log_theta: float, c=c, m=m, values=values, times=times, n=n) -> float:
            """Negative log-likelihood without what does not depend on theta."""
            theta = np.exp(log_theta)
            known = times @ gammaln(values + theta) - n * gammaln(theta) + n * theta * log_theta
            return -float(known - (theta + c) @ np.log(theta + m))

        out[g] = np.exp(minimize_scalar(loss, bounds=(np.log(0.02), np.log(MAX_THETA)), method="bounded").x)
    return out


def level_of(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Log of how much more a slide has of each gene than was predicted; half a count keeps it finite."""
    return np.log((counts.sum(0) + 0.5) / (mean.sum(0) + 0.5))


@dataclass(frozen=True)
class _Window:
    """A contiguous part of a slide: positions, ratios less 1, and their weights (inverse variances)."""

    distance: np.ndarray  # n x n
    z: np.ndarray  # n x genes, weighted mean 0
    w: np.ndarray  # n x genes


def _windows(slide: HeldOut, mean: np.ndarray, theta: np.ndarray) -> list[_Window]:
    """The slide, or parts of it where it is large."""
    n_parts, out = -(-len(slide.xy) // MAX_SPOTS), []
    axis = int(np.argmax(np.ptp(slide.xy, axis=0)))
    for rows in np.array_split(np.argsort(slide.xy[:, axis], kind="stable"), n_parts)[:5]:
        m = np.maximum(mean[rows], 1e-6)
        w = m / (1 + m / theta)
        z = slide.counts[rows] / m - 1
        out.append(_Window(cdist(slide.xy[rows], slide.xy[rows]), z - (w * z).sum(0) / w.sum(0), w))
    return out


def _lags(window: _Window, pitch: float) -> np.ndarray:
    """Lag of each pair of spots, n x n: 0 the same spot, then by LAGS; the last are too close or too far apart."""
    lag = np.digitize(window.distance, np.array(LAGS) * pitch)
    lag[lag == 0] = len(LAGS)  # positions closer than any lag
    np.fill_diagonal(lag, 0)
    return lag


@dataclass(frozen=True)
class _Moments:
    """Products of a gene's ratios by lag, and what kernels of variance 1 would give.

    Centring a window takes the mean of its field away; ``kernels`` are centred alike, and ``products`` are without what
    counting noise becomes by it. Sums add over windows.
    """

    lengths: np.ndarray  # ranges, µm
    sums: np.ndarray  # of weighted products, lags x genes
    weight: np.ndarray  # lags x genes
    kernel_sums: np.ndarray  # the same of kernels, lags x ranges x genes

    @classmethod
    def of(cls, window: _Window, pitch: float, lengths: np.ndarray) -> _Moments:
        shape = len(LAGS), window.z.shape[1]
        sums, weight = np.zeros((2, *shape))
        kernel_sums = np.zeros((shape[0], len(lengths), shape[1]))
        w, zw, lag = window.w, window.w * window.z, _lags(window, pitch)
        total = w.sum(0)
        correlations = [kernel(window.distance, length) for length in lengths]
        around = [k @ (w / total) for k in correlations]
        overall = [(w / total * a).sum(0) for a in around]
        for b in range(len(LAGS)):
            pairs = (lag == b).astype(np.float64)
            p_w = pairs @ w
            weight[b] = own = (w * p_w).sum(0)
            sums[b] = (zw * (pairs @ zw)).sum(0) + own / total
            for r, k in enumerate(correlations):
                near = (w * ((pairs * k) @ w)).sum(0) - 2 * (w * around[r] * p_w).sum(0)
                kernel_sums[b, r] = near + overall[r] * own
        return cls(lengths, sums, weight, kernel_sums)

    @classmethod
    def joined(cls, parts: list[_Moments]) -> _Moments:
        """Of several windows together."""
        first, *others = parts
        sums, weight, kernel_sums = first.sums.copy(), first.weight.copy(), first.kernel_sums.copy()
        for other in others:
            sums += other.sums
            weight += other.weight
            kernel_sums += other.kernel_sums
        return cls(first.lengths, sums, weight, kernel_sums)

    def having(self, ranges: list[int]) -> _Moments:
        """With some of the ranges."""
        return _Moments(self.lengths[ranges], self.sums, self.weight, np.take(self.kernel_sums, ranges, 1))

    @property
    def products(self) -> np.ndarray:
        """Mean products, lags x genes."""
        return self.sums / np.maximum(self.weight, 1e-12)

    @property
    def kernels(self) -> np.ndarray:
        """What kernels of variance 1 would give, lags x ranges x genes."""
        return self.kernel_sums / np.maximum(self.weight, 1e-12)[:, None]

    def solve(self) -> np.ndarray:
        """Non-negative variance of every kernel, ranges x genes."""
        root = np.sqrt(self.weight)[1:]
        x, y = self.kernels[1:] * root[:, None], self.products[1:] * root
        return np.stack([nnls(x[:, :, g], y[:, g])[0] for g in range(root.shape[1])], 1)

    def pooled(self) -> tuple[np.ndarray, float]:
        """Variance of every kernel that all genes have in common, and the misfit."""
        weight = self.weight[1:] / np.maximum(self.weight[1:].sum(0), 1e-12)
        root = np.sqrt(weight.sum(1))
        seen = root > 0
        x, y = (self.kernels[1:] * weight[:, None]).sum(2)[seen], (self.products[1:] * weight).sum(1)[seen]
        found, residual = nnls(x / root[seen, None], y / root[seen])
        return found, float(residual)


def _cross(
    windows: list[_Window], pitch: float, genes: np.ndarray, lags: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean product of the ratios of two genes over pairs of spots with some lags, and its weight; genes x genes."""
    products, weight = np.zeros((2, len(genes), len(genes)))
    for window in windows:
        w, pairs = window.w[:, genes], np.isin(_lags(window, pitch), lags).astype(np.float64)
        zw = w * window.z[:, genes]
        products += zw.T @ (pairs @ zw)
        weight += w.T @ (pairs @ w)
    return products / np.maximum(weight, 1e-12), weight


def _field(windows: list[_Window], pitch: float) -> tuple[_Moments, np.ndarray]:
    """Moments with the two ranges that fit best, and the variance of log rate that each gene has in each, ranges x genes."""
    tried = np.array(SHORT + LONG) * pitch  # each once; pairs are made of them
    parts = [_Moments.of(window, pitch, tried) for window in windows]
    every = _Moments.joined(parts)
    pairs = [[i, len(SHORT) + j] for i, j in product(range(len(SHORT)), range(len(LONG)))]
    misfit = np.array([every.having(pair).pooled()[1] for pair in pairs])
    # without a short field all short ranges fit alike: the first is taken
    best = pairs[int(np.argmax(misfit <= misfit.min() * (1 + 1e-6)))]
    moments = every.having(best)
    single, common, shrink = moments.solve(), moments.pooled()[0][:, None], np.full(2, 0.5)
    if halves := _halves(parts):  # what differs between genes and not between halves of the tissue
        one, two = (_Moments.joined(half).having(best).solve() for half in halves)
        noise, spread = ((one - two) ** 2).mean(1) / 4, ((single - common) ** 2).mean(1)
        shrink = np.clip(1 - noise / np.maximum(spread, 1e-12), 0.1, 1)
    ratio = common + shrink[:, None] * (single - common)  # variance of the ratio; now of its logarithm
    total = np.maximum(ratio.sum(0), 1e-12)
    return moments, ratio / total * np.log1p(total)


def _halves(windows: list) -> list[list]:
    """Every other of the windows, or of what was found in them, and the rest; nothing of a single one."""
    return [windows[::2], windows[1::2]] if len(windows) > 1 else []


def _factors(
    windows: list[_Window], pitch: float, moments: _Moments, field: np.ndarray, genes: np.ndarray
) -> np.ndarray:
    """Correlation between genes from neighbouring spots, as factors (genes x at most N_FACTORS); 0 for other genes."""
    near, n = tuple(range(1, 1 + NEAR)), len(genes)
    weight = moments.weight[1 : 1 + NEAR, genes]
    own = (np.einsum("brg,rg->bg", moments.kernels, np.expm1(field))[1 : 1 + NEAR, genes] * weight).sum(0)
    own = own / np.maximum(weight.sum(0), 1e-12)
    scale = np.sqrt(np.maximum(own, max(0.3 * float(np.median(own)), 1e-6)))

    def correlation(some: list[_Window]) -> np.ndarray:
        return _cross(some, pitch, genes, near)[0] / np.outer(scale, scale)

    found, off = np.clip(correlation(windows), -1, 1), ~np.eye(n, dtype=bool)
    trust, halves = 0.5, _halves(windows)
    if halves:
        one, two = (correlation(half)[off] for half in halves)
        r = float(np.corrcoef(one, two)[0, 1]) if n > 1 and one.std() > 0 and two.std() > 0 else 0.0
        trust = max(2 * r / (1 + r), 0.0) if r > -1 else 0.0
    target, communality = np.where(off, np.sqrt(trust) * found, 1.0), np.full(n, 0.5)
    for _ in range(50):  # principal factors
        np.fill_diagonal(target, communality)
        values, axes = np.linalg.eigh((target + target.T) / 2)
        kept = np.argsort(-values)[: min(N_FACTORS, max(1, n // 3))]
        factors = axes[:, kept] * np.sqrt(np.maximum(values[kept], 0))
        size = (factors**2).sum(1)
        communality = np.clip(size, 0.05, 0.9)
    out = np.zeros((field.shape[1], factors.shape[1]))
    out[genes] = factors * np.sqrt(np.minimum(1, 0.9 / np.maximum(size, 1e-12)))[:, None]
    return out


def _nugget(
    windows: list[_Window], pitch: float, moments: _Moments, field: np.ndarray, room: np.ndarray, factors: np.ndarray,
    genes: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Variance of log rate in single spots that genes share: the share of what a gene has room for that agrees best."""
    off, correlation = ~np.eye(len(genes), dtype=bool), factors[genes] @ factors[genes].T
    at = np.sqrt(np.maximum(np.einsum("rg,rg->g", moments.kernels[0], np.expm1(field))[genes], 0))
    shape = np.sqrt(np.outer(room[genes], room[genes])) * correlation
    products, weight = _cross(windows, pitch, genes, (0,))
    share = (weight * (products - np.outer(at, at) * correlation) * shape)[off].sum()
    return float(np.clip(share / max((weight * shape**2)[off].sum(), 1e-12), 0, 1)) * room


def _between(slides, levels, means, theta, windows, lengths, field):
    """Variance between slides of one donor and between donors, genes; and whether the latter was learned."""
    noise = []
    for s, mean in zip(slides, means):
        total = np.maximum(mean.sum(0), 1e-9)
        counting = (mean + mean**2 / theta).sum(0) / total**2
        some = np.random.default_rng(0).permutation(len(s.xy))[:1000]
        distance = cdist(s.xy[some], s.xy[some])
        whole = sum(v * kernel(distance, length).mean() for v, length in zip(field, lengths))
        noise.append(counting + whole)
    donors = np.array([s.donor for s in slides])
    names = np.unique(donors)
    squares, weights = [], []
    for name in names:
        inside = levels[donors == name]
        if len(inside) > 2:  # one far slide shall not widen everything
            squares.append((1.4826 * np.median(np.abs(inside - np.median(inside, 0)), 0)) ** 2)
        elif len(inside) == 2:
            squares.append((inside[0] - inside[1]) ** 2 / 2)
        weights.append(len(inside) - 1)
    known = [w for w in weights if w]
    noise = np.mean(noise, 0)
    excess = np.maximum(np.average(squares, axis=0, weights=known) - noise, 0) if squares else np.full(len(theta), 0.01)
    n = sum(known)
    slide = (n * excess + PRIOR_SLIDES * excess.mean()) / (n + PRIOR_SLIDES)
    centre = np.stack([levels[donors == name].mean(0) for name in names])
    learned = len(names) >= MIN_DONORS
    donor = np.maximum(slide, DONOR_SD**2)
    if learned:
        between = np.maximum((centre**2).mean(0) - noise, 0)
        donor = np.maximum(slide, (len(names) * between + PRIOR_SLIDES * between.mean()) / (len(names) + PRIOR_SLIDES))
    return slide, donor, learned
