"""Fitting the joint law to held-out predictions, by moments of the ratios of counts to their means.

For two different counts of a slide, E[z_ig z_jh] = exp(C_gh(d_ij)) - 1, where z = count / mean - 1 and C is the covariance of log
rates. Counting noise is independent, so pairs do not see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.optimize import minimize_scalar, nnls
from scipy.spatial.distance import cdist

from spatiaflow.models.counts import MAX_THETA, log_likelihood, log_variance, theta_of
from spatiaflow.models.fields import kernel
from spatiaflow.models.law import DONOR_SD, MIN_DONORS, JointLaw

LAGS = (0.5, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 10.0, 14.0)  # edges, in pitches
SHORT, LONG = (1.0, 1.5, 2.0, 3.0), (4.0, 6.0, 9.0, 14.0)  # ranges tried, in pitches
NEAR = 4  # lags that tell how genes go together
MAX_SPOTS = 2000  # of a window in which pairs are counted
N_FACTORS = 6
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


def fit_law(slides: list[HeldOut], pitch: float) -> JointLaw:
    """Fit the joint law to slides that were predicted without themselves."""
    means = [s.library[:, None] * np.exp(s.log_mean) for s in slides]
    levels = np.stack([_level(s.counts, mean) for s, mean in zip(slides, means)])
    means = [mean * np.exp(level) for mean, level in zip(means, levels)]
    theta = fit_theta(np.concatenate([s.counts for s in slides]), np.concatenate(means))
    extra = log_variance(theta)  # of log rate in a single spot, field and nugget included
    windows = [w for s, mean in zip(slides, means) for w in _windows(s, mean, theta)]
    lengths, field = _field(windows, pitch)
    field = field * np.minimum(1, extra / np.maximum(field.sum(0), 1e-12))
    moments = _Moments.of(windows, pitch, lengths)
    factors = _factors(windows, pitch, lengths, field)
    nugget = _nugget(moments, field, np.maximum(extra - field.sum(0), 0), factors)
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
        c, m = (torch.from_numpy(np.ascontiguousarray(a[:, g], np.float64)) for a in (counts, np.maximum(mean, 1e-9)))

        def loss(log_theta: float, c: torch.Tensor = c, m: torch.Tensor = m) -> float:
            return -float(log_likelihood(c, m, torch.tensor(np.exp(log_theta), dtype=torch.float64)).sum())

        out[g] = np.exp(minimize_scalar(loss, bounds=(np.log(0.02), np.log(MAX_THETA)), method="bounded").x)
    return out


def _level(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
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


@dataclass(frozen=True)
class _Moments:
    """Products of ratios by lag (lag 0: the same spot), and what kernels of variance 1 would give.

    Centring a window takes the mean of its field away; ``kernels`` are centred alike.
    """

    cross: np.ndarray  # lags x genes x genes
    weight: np.ndarray  # lags x genes x genes
    kernels: np.ndarray  # lags x ranges x genes
    bias: np.ndarray  # lags x genes, of counting noise by centring

    @classmethod
    def of(cls, windows: list[_Window], pitch: float, lengths: np.ndarray) -> _Moments:
        n_genes, n_lags = windows[0].z.shape[1], len(LAGS)
        cross, weight = np.zeros((2, n_lags, n_genes, n_genes))
        kernels, bias = np.zeros((n_lags, len(lengths), n_genes)), np.zeros((n_lags, n_genes))
        for window in windows:
            w, zw = window.w, window.w * window.z
            total = w.sum(0)
            shares = w / total
            lag = np.digitize(window.distance, np.array(LAGS) * pitch)
            np.fill_diagonal(lag, 0)
            lag[(lag == 0) & ~np.eye(len(lag), dtype=bool)] = n_lags  # positions closer than any lag
            correlations = [kernel(window.distance, length) for length in lengths]
            around = [k @ shares for k in correlations]
            overall = [(shares * a).sum(0) for a in around]
            for b in range(n_lags):
                pairs = (lag == b).astype(np.float64)
                p_w = pairs @ w
                den = w.T @ p_w
                cross[b] += zw.T @ (pairs @ zw)
                weight[b] += den
                own = np.diag(den)
                for r, k in enumerate(correlations):
                    near = (w * ((pairs * k) @ w)).sum(0) - 2 * (w * around[r] * p_w).sum(0)
                    kernels[b, r] += near + overall[r] * own
                bias[b] -= own / total
        own = np.maximum(np.einsum("bgg->bg", weight), 1e-12)
        return cls(cross / np.maximum(weight, 1e-12), weight, kernels / own[:, None], bias / own)

    @property
    def diagonal(self) -> np.ndarray:
        """Products of a gene with itself, without the bias of counting noise, lags x genes."""
        return np.einsum("bgg->bg", self.cross) - self.bias

    def solve(self) -> np.ndarray:
        """Non-negative variance of every kernel, ranges x genes."""
        weight = np.sqrt(np.einsum("bgg->bg", self.weight))[1:]
        return np.stack(
            [
                nnls(self.kernels[1:, :, g] * weight[:, g, None], self.diagonal[1:, g] * weight[:, g])[0]
                for g in range(weight.shape[1])
            ],
            1,
        )

    def pooled(self) -> tuple[np.ndarray, float]:
        """Variance of every kernel that all genes have in common, and the misfit."""
        weight = np.einsum("bgg->bg", self.weight)[1:]
        weight = weight / weight.sum(0)
        x = (self.kernels[1:] * weight[:, None]).sum(2) / np.sqrt(weight.sum(1))[:, None]
        y = (self.diagonal[1:] * weight).sum(1) / np.sqrt(weight.sum(1))
        found, residual = nnls(x[np.isfinite(y)], y[np.isfinite(y)])
        return found, float(residual)


def _field(windows: list[_Window], pitch: float) -> tuple[np.ndarray, np.ndarray]:
    """Ranges, µm, and the variance of log rate that each gene has in each, ranges x genes."""
    best = min(
        (
            (_Moments.of(windows, pitch, np.array(pair) * pitch).pooled()[1], pair)
            for pair in product(SHORT, LONG)
        ),
        key=lambda found: found[0],
    )[1]  # fmt: skip
    lengths = np.array(best) * pitch
    moments = _Moments.of(windows, pitch, lengths)
    single, common = moments.solve(), moments.pooled()[0][:, None]
    shrink, halves = np.full(2, 0.5), _halves(windows)
    if halves:  # what differs between genes and not between halves of the tissue
        one, two = (_Moments.of(half, pitch, lengths).solve() for half in halves)
        noise, spread = ((one - two) ** 2).mean(1) / 4, ((single - common) ** 2).mean(1)
        shrink = np.clip(1 - noise / np.maximum(spread, 1e-12), 0.1, 1)
    ratio = common + shrink[:, None] * (single - common)  # variance of the ratio; now of its logarithm
    total = np.maximum(ratio.sum(0), 1e-12)
    return lengths, ratio / total * np.log1p(total)


def _halves(windows: list[_Window]) -> list[list[_Window]]:
    return [windows[::2], windows[1::2]] if len(windows) > 1 else []


def _factors(windows: list[_Window], pitch: float, lengths: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Correlation between genes from neighbouring spots, as factors (genes x at most N_FACTORS)."""

    def correlation(some: list[_Window]) -> np.ndarray:
        m = _Moments.of(some, pitch, lengths)
        near = slice(1, 1 + NEAR)
        cross = (m.cross[near] * m.weight[near]).sum(0) / m.weight[near].sum(0)
        variance = np.expm1(field)
        own = (np.einsum("brg,rg->bg", m.kernels, variance)[near] * np.einsum("bgg->bg", m.weight)[near]).sum(0)
        own = own / np.einsum("bgg->bg", m.weight)[near].sum(0)
        own = np.maximum(own, max(0.3 * float(np.median(own)), 1e-6))
        return cross / np.sqrt(np.outer(own, own))

    found, n_genes = np.clip(np.nan_to_num(correlation(windows)), -1, 1), field.shape[1]
    off = ~np.eye(n_genes, dtype=bool)
    trust, halves = 0.5, _halves(windows)
    if halves:
        r = np.corrcoef(correlation(halves[0])[off], correlation(halves[1])[off])[0, 1]
        trust = float(np.clip(2 * r / (1 + r), 0, 1)) if np.isfinite(r) and r > -1 else 0.0
    target = np.where(off, np.sqrt(trust) * found, 1.0)
    communality, factors = np.full(n_genes, 0.5), np.zeros((n_genes, 0))
    for _ in range(50):  # principal factors
        np.fill_diagonal(target, communality)
        values, axes = np.linalg.eigh((target + target.T) / 2)
        kept = np.argsort(-values)[: min(N_FACTORS, max(1, n_genes // 3))]
        factors = axes[:, kept] * np.sqrt(np.maximum(values[kept], 0))
        size = (factors**2).sum(1)
        communality = np.clip(size, 0.05, 0.9)
    return factors * np.sqrt(np.minimum(1, 0.9 / np.maximum(size, 1e-12)))[:, None]


def _nugget(moments: _Moments, field: np.ndarray, room: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Variance of log rate in single spots that genes share: the share of what a gene has room for that agrees best."""
    off = ~np.eye(len(room), dtype=bool)
    correlation = factors @ factors.T
    at = np.einsum("rg,rg->g", moments.kernels[0], np.expm1(field))
    expected = np.sqrt(np.outer(np.maximum(at, 0), np.maximum(at, 0))) * correlation
    shape = np.sqrt(np.outer(room, room)) * correlation
    weight = moments.weight[0]
    share = (weight * (moments.cross[0] - expected) * shape)[off].sum() / max((weight * shape**2)[off].sum(), 1e-12)
    return float(np.clip(share, 0, 1)) * room


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
