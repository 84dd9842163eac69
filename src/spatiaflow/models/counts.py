"""Molecule counts: normalisation, negative binomial fits, priors of the flow, and the predictive distribution.

All functions use the mean and the inverse dispersion ``theta`` (variance = mean + mean^2 / theta), and the probability ``pi``
of an extra zero. In scvi-tools, theta is ``total_count`` and log(mean / theta) is ``logits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.special import digamma, gammaln
from torch import Tensor

MAX_THETA = 1e4  # above this value a negative binomial is practically a Poisson distribution
EXACT, MAX_COUNT, COUNT_STEP = 128, 1e10, 0.02  # counts in sums: one by one below, and then in steps of their logarithm
MEAN_STEP = 0.07  # of the logarithm of means between which moments are interpolated


def log_normalize(counts: Any, library: np.ndarray, target_sum: float | None = 1e4) -> Any:
    """Return log1p of counts per ``target_sum`` of each row's library. If ``target_sum`` is None, log1p of raw counts.

    Sparse counts stay sparse (CSR).
    """
    if sparse.issparse(counts):
        scale = np.ones(counts.shape[0]) if target_sum is None else target_sum / np.maximum(library, 1)
        return sparse.csr_matrix(sparse.diags(scale.astype(np.float32)) @ counts, dtype=np.float32).log1p()
    if target_sum is None:
        return np.log1p(counts).astype(np.float32)
    return np.log1p(counts * (target_sum / np.maximum(library, 1))[:, None]).astype(np.float32)


def log_likelihood(counts: Tensor, mean: Tensor, theta: Tensor, pi: Tensor | None = None) -> Tensor:
    """Return the log-probability of counts under NB(mean, theta). If ``pi`` is given, with zero inflation."""
    log_p = (
        torch.lgamma(counts + theta)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1)
        + theta * (torch.log(theta) - torch.log(theta + mean))
        + torch.xlogy(counts, mean / (theta + mean))
    )
    if pi is None:
        return log_p
    zero = torch.log(pi + (1 - pi) * torch.exp(log_p))
    return torch.where(counts == 0, zero, torch.log1p(-pi) + log_p)


def log_variance(theta: np.ndarray) -> np.ndarray:
    """Variance of log rate that a lognormal rate needs, for counts to be fitted best by this inverse dispersion.

    The gamma distribution closest to a lognormal one in likelihood has the same mean logarithm:
    log theta - digamma(theta) = variance / 2.
    """
    return 2 * (np.log(theta) - digamma(theta))


def theta_of(variance: np.ndarray) -> np.ndarray:
    """Inverse dispersion that :func:`log_variance` gives this variance, at most MAX_THETA."""
    theta = np.geomspace(MAX_THETA, 1e-3, 2000)
    return np.exp(np.interp(np.maximum(variance, 0), log_variance(theta), np.log(theta)))


def fit_counts(counts: np.ndarray, library: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit NB and ZINB to each gene by maximum likelihood, with the log library as offset, and keep the one with lower AIC.

    Parameters
    ----------
    counts
        n x genes.
    library
        Total counts of each row, n.

    Returns
    -------
    rate, theta, pi : one value per gene. The mean of a row is its library times ``rate``. ``pi`` is 0 for genes where the plain
    NB has the lower AIC.
    """
    c = torch.as_tensor(np.asarray(counts), dtype=torch.float64)
    size = torch.as_tensor(np.maximum(np.asarray(library), 1), dtype=torch.float64)[:, None]
    start_rate = torch.log((c.sum(0) + 0.5) / size.sum())
    fits = []
    for inflated in (False, True):
        parameters = torch.stack([start_rate, torch.zeros_like(start_rate), torch.full_like(start_rate, -2.0)])
        parameters = parameters[: 3 if inflated else 2].clone().requires_grad_()

        def loss_per_gene(p: Tensor = parameters, inflated: bool = inflated) -> Tensor:
            theta = torch.exp(p[1]).clamp(1e-3, MAX_THETA)
            pi = torch.sigmoid(p[2].clamp(-12, 12)) if inflated else None
            return -log_likelihood(c, size * torch.exp(p[0]), theta, pi).mean(0)

        optimizer = torch.optim.LBFGS([parameters], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

        def closure(optimizer: Any = optimizer, loss_per_gene: Any = loss_per_gene) -> Any:
            optimizer.zero_grad()
            total = loss_per_gene().sum()
            total.backward()
            return total

        optimizer.step(closure)
        with torch.no_grad():
            fits.append((parameters.detach(), 2 * len(c) * loss_per_gene() + 2 * (3 if inflated else 2)))
    (nb, nb_aic), (zinb, zinb_aic) = fits
    better = zinb_aic < nb_aic
    rate = torch.where(better, zinb[0], nb[0]).exp()
    theta = torch.where(better, zinb[1], nb[1]).exp().clamp(1e-3, MAX_THETA)
    pi = torch.where(better, torch.sigmoid(zinb[2].clamp(-12, 12)), 0.0)
    return rate.numpy(), theta.numpy(), pi.numpy()


def draw_counts(
    mean: np.ndarray, theta: float | np.ndarray, pi: float | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw zero-inflated negative binomial counts for each element, as Poisson counts with a gamma-distributed mean."""
    counts = rng.poisson(rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta))
    return np.where(rng.random(mean.shape) < pi, 0, counts) if np.any(pi) else counts


@dataclass
class ZeroPrior:
    """Start the flow at zero expression. All draws are equal."""

    deterministic = True

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return np.zeros((n, n_genes), np.float32)


@dataclass
class GaussianPrior:
    """Start the flow at standard normal noise, in log1p units."""

    deterministic = False

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return rng.standard_normal((n, n_genes), dtype=np.float32)


@dataclass
class ScalarZINB:
    """The paper's prior: one zero-inflated negative binomial for all genes, then log1p.

    The defaults are those of the authors' code (scvi-tools ``total_count=1, logits=0.1, zi_logits=0``): theta 1, NB mean
    exp(0.1) = 1.105, pi 0.5.
    """

    mean: float = float(np.exp(0.1))
    theta: float = 1.0
    pi: float = 0.5
    deterministic = False

    @classmethod
    def from_logits(cls, total_count: float = 1.0, logits: float = 0.1, zi_logits: float = 0.0) -> ScalarZINB:
        """Return the prior with the given parameters of scvi-tools."""
        return cls(total_count * float(np.exp(logits)), total_count, 1 / (1 + float(np.exp(-zi_logits))))

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return np.log1p(draw_counts(np.full((n, n_genes), self.mean), self.theta, self.pi, rng)).astype(np.float32)


@dataclass
class CountPrior:
    """One distribution per gene, fitted to training counts by :func:`fit_counts`.

    A draw takes a library size from the training slides for each spot, draws counts, and normalises them.
    """

    rate: np.ndarray  # genes
    theta: np.ndarray
    pi: np.ndarray
    libraries: np.ndarray  # quantiles of the training libraries
    target_sum: float | None
    deterministic = False

    @classmethod
    def fit(cls, counts: np.ndarray, library: np.ndarray, target_sum: float | None = 1e4) -> CountPrior:
        """Fit to counts (n x genes) and library sizes (n) of training slides."""
        chosen = np.random.default_rng(0).permutation(len(counts))[:20_000]
        return cls(*fit_counts(counts[chosen], library[chosen]), library_quantiles(library), target_sum)

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        library = rng.choice(self.libraries, n)
        counts = draw_counts(library[:, None] * self.rate, self.theta, self.pi, rng)
        return log_normalize(counts, library, self.target_sum)


@dataclass
class ImagePrior:
    """Start the flow at a simple prediction from the image plus normal noise. Without noise, all draws are equal."""

    noise: np.ndarray  # genes, standard deviation in log1p units

    @property
    def deterministic(self) -> bool:
        return not np.any(self.noise)

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        noise = rng.standard_normal((n, n_genes), dtype=np.float32) * self.noise.astype(np.float32)
        return np.maximum(base + noise, 0).astype(np.float32)


def library_quantiles(library: np.ndarray, n: int = 256) -> np.ndarray:
    """Return ``n`` evenly spaced quantiles of library sizes, a compact form of their distribution."""
    return np.maximum(np.quantile(library, (np.arange(n) + 0.5) / n), 1.0)


class CountLaw:
    """Predictive distribution of log-normalised expression: NB or ZINB counts around the predicted mean.

    Library sizes are those of the training slides. ``pi`` holds one value per gene, or one for all genes. A table gives the mean
    and standard deviation of log1p expression for each rate and dispersion. A prediction (mean, std) is converted to the rate and
    dispersion that have these moments.
    """

    def __init__(self, libraries: np.ndarray, target_sum: float | None, pi: np.ndarray, n_draws: int = 2048):
        self.libraries, self.target_sum, self.pi = np.asarray(libraries), target_sum, np.asarray(pi)
        self.rates, self.thetas, self.mean, self.std = _drawn_moments(
            self.libraries.tobytes(), self.libraries.dtype.str, target_sum, n_draws
        )

    def std_at(self, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Return the standard deviation of log1p expression for a mean (n x genes) and dispersions (genes)."""
        out = np.empty_like(mean, dtype=np.float64)
        for g, (t, pi) in enumerate(zip(theta, np.broadcast_to(self.pi, len(theta)))):
            m, s = self._row(t)
            inner = np.maximum(mean[:, g], 0) / (1 - pi)
            s = np.interp(inner, m, s)
            out[:, g] = np.sqrt((1 - pi) * (s**2 + inner**2) - ((1 - pi) * inner) ** 2)
        return out

    def mean_at(self, log_rate: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Return the expected log1p expression of log rates (n x genes), without zero inflation; float32."""
        out, known = np.empty(log_rate.shape, np.float32), np.log(self.rates)
        for g, t in enumerate(theta):
            out[:, g] = np.interp(log_rate[:, g], known, self._row(t)[0])
        return out

    def rate_at(self, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Return the rate (fraction of the library) whose expected log1p expression is ``mean``."""
        out = np.empty_like(mean, dtype=np.float64)
        for g, (t, pi) in enumerate(zip(theta, np.broadcast_to(self.pi, len(theta)))):
            m, _ = self._row(t)
            out[:, g] = np.exp(np.interp(np.maximum(mean[:, g], 0) / (1 - pi), m, np.log(self.rates)))
        return out

    def fit_theta(self, mean: np.ndarray, counts: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Return the dispersion of each gene under which held-out counts are most likely, given held-out predictions."""
        c = torch.as_tensor(np.asarray(counts), dtype=torch.float64)
        size = torch.as_tensor(library, dtype=torch.float64)[:, None]
        if self.target_sum is None:  # raw counts: differences in depth are part of the dispersion
            size = torch.full_like(size, float(np.mean(self.libraries)))
        pi = torch.as_tensor(self.pi).clamp_min(1e-12)
        score = []
        for theta in self.thetas:
            rate = torch.as_tensor(self.rate_at(mean, np.full(mean.shape[1], theta)))
            score.append(log_likelihood(c, size * rate, torch.tensor(theta, dtype=torch.float64), pi).mean(0))
        return self.thetas[torch.stack(score).argmax(0).numpy()]

    def sample(self, mean: np.ndarray, std: np.ndarray, n_draws: int, seed: int = 0) -> np.ndarray:
        """Draw log-normalised expression (n_draws x n x genes) with the given mean and std (both n x genes)."""
        rng = np.random.default_rng(seed)
        out = np.empty((n_draws, *mean.shape), np.float32)
        library = rng.choice(self.libraries, (n_draws, len(mean)))
        for g, pi in enumerate(np.broadcast_to(self.pi, mean.shape[1])):
            inner = np.maximum(mean[:, g], 0) / (1 - pi)
            wanted = np.sqrt(np.maximum((std[:, g] ** 2 + mean[:, g] ** 2) / (1 - pi) - inner**2, 0))
            rates = np.stack([np.exp(np.interp(inner, m, np.log(self.rates))) for m in self.mean])
            spread = np.stack([np.interp(inner, m, s) for m, s in zip(self.mean, self.std)])  # thetas x n, decreasing
            row = np.abs(spread - wanted).argmin(0)
            rate, theta = np.take_along_axis(rates, row[None], 0)[0], self.thetas[row]
            counts = draw_counts(library * rate, theta, pi, rng)
            out[:, :, g] = log_normalize(counts.reshape(-1, 1), library.reshape(-1), self.target_sum).reshape(
                library.shape
            )
        return out

    def _row(self, theta: float) -> tuple[np.ndarray, np.ndarray]:
        i = int(np.abs(np.log(self.thetas) - np.log(theta)).argmin())
        return self.mean[i], self.std[i]


@lru_cache(maxsize=64)
def _drawn_moments(libraries: bytes, dtype: str, target_sum: float | None, n_draws: int) -> tuple[np.ndarray, ...]:
    """Rates, inverse dispersions, and for each pair of them the mean and standard deviation of log1p expression in draws."""
    known, rng = np.frombuffer(libraries, dtype), np.random.default_rng(0)
    library = rng.choice(known, n_draws)
    thetas = np.geomspace(0.05, 1000, 20)
    rates = np.geomspace(1e-3, 3e4, 80) / float(np.mean(known))
    mean, std = np.empty((2, len(thetas), len(rates)))
    for i, theta in enumerate(thetas):
        gamma = rng.gamma(theta, 1 / theta, n_draws)
        counts = rng.poisson(np.minimum(rates[:, None] * (library * gamma), 1e9))
        y = log_normalize(counts.T, library, target_sum)  # draws x rates
        mean[i], std[i] = np.maximum.accumulate(y.mean(0)), y.std(0)
    return rates, thetas, mean, std


class Spread:
    """Standard deviation of log-normalised NB counts as a function of their mean.

    Unlike the table of :class:`CountLaw` it is found without random numbers, by sums over counts and the library sizes of the
    training slides. So a map of it has no other grain than the map of the mean.
    """

    def __init__(self, libraries: np.ndarray, target_sum: float | None):
        libraries = np.asarray(libraries)
        self.thetas, self.mean, self.std = _summed_moments(libraries.tobytes(), libraries.dtype.str, target_sum)

    def __call__(self, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Standard deviation at a mean (n x genes) and dispersions (genes), interpolated between those of the table; float32."""
        out, known = np.empty(mean.shape, np.float32), np.log(self.thetas)
        place = np.interp(np.log(theta), known, np.arange(len(known)))
        for g, at in enumerate(place):
            i = min(int(at), len(known) - 2)
            low, high = (np.interp(mean[:, g], self.mean[j], self.std[j]) for j in (i, i + 1))
            out[:, g] = low + (at - i) * (high - low)
        return out


@lru_cache(maxsize=64)
def _summed_moments(libraries: bytes, dtype: str, target_sum: float | None) -> tuple[np.ndarray, ...]:
    """Inverse dispersions, and for each of them the mean and standard deviation of log1p expression at many rates."""
    sizes = np.frombuffer(libraries, dtype)
    scale = np.ones(len(sizes)) if target_sum is None else target_sum / np.maximum(sizes, 1)
    rates = np.geomspace(1e-3, 3e4, 160) / float(np.mean(sizes))
    wanted = np.log(rates[:, None] * sizes)
    known = np.arange(wanted.min() - MEAN_STEP, wanted.max() + MEAN_STEP, MEAN_STEP)
    thetas = np.geomspace(0.05, 1000, 40)
    mean, std = np.empty((2, len(thetas), len(rates)))
    for i, theta in enumerate(thetas):
        moments = log_moments(float(theta), np.exp(known), scale)
        first, variance = (np.stack([np.interp(x, known, v) for x, v in zip(wanted.T, m.T)], 1) for m in moments)
        mean[i], std[i] = first.mean(1), np.sqrt(variance.mean(1) + first.var(1))  # over library sizes
    return thetas, mean, std


def log_moments(theta: float, mean: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of log1p(scale x count) for NB counts, both means x scales.

    Counts are summed one by one below EXACT, and then on a grid that is even in their logarithm.
    """
    edges = (EXACT - 0.5) * np.exp(np.arange(0, np.log(MAX_COUNT / EXACT), COUNT_STEP))
    counts = np.r_[np.arange(EXACT), np.sqrt(edges[:-1] * edges[1:])]
    log_p = gammaln(counts + theta) - gammaln(counts + 1) + np.log(np.r_[np.ones(EXACT), np.diff(edges)])
    log_p = log_p + counts * np.log(mean / (theta + mean))[:, None]
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.log1p(counts[:, None] * scale)
    first = p @ y
    return first, np.maximum(p @ y**2 - first**2, 0)
