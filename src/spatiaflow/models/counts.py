"""Counts of molecules: normalisation, negative binomial fits, priors of the flow, and the predictive law.

Parametrisation throughout: mean and inverse dispersion ``theta`` (variance mean + mean^2 / theta), with probability
``pi`` of an extra zero. scvi-tools' ``total_count`` is theta and its ``logits`` are log(mean / theta).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

MAX_THETA = 1e4  # above it a negative binomial is a Poisson to any precision that matters here


def log_normalize(counts: Any, library: np.ndarray, target_sum: float | None = 1e4) -> Any:
    """Return log1p of counts per ``target_sum`` of each row's library, or log1p of raw counts when it is None.

    Sparse counts stay sparse (CSR).
    """
    if sparse.issparse(counts):
        scale = np.ones(counts.shape[0]) if target_sum is None else target_sum / np.maximum(library, 1)
        return sparse.csr_matrix(sparse.diags(scale.astype(np.float32)) @ counts, dtype=np.float32).log1p()
    if target_sum is None:
        return np.log1p(counts).astype(np.float32)
    return np.log1p(counts * (target_sum / np.maximum(library, 1))[:, None]).astype(np.float32)


def log_likelihood(counts: Tensor, mean: Tensor, theta: Tensor, pi: Tensor | None = None) -> Tensor:
    """Log-probability of counts under NB(mean, theta), zero-inflated by ``pi`` when given."""
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


def fit_counts(counts: np.ndarray, library: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit NB and ZINB with a log-library offset to every gene by maximum likelihood and keep the better by AIC.

    Parameters
    ----------
    counts
        n x genes.
    library
        Total counts of each row, n.

    Returns
    -------
    rate, theta, pi : arrays of length genes; the mean of a row is its library times ``rate``; ``pi`` is 0 where the
    plain NB has the lower AIC.
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
    """Draw zero-inflated negative binomial counts, elementwise, as a Poisson with a gamma-distributed mean."""
    counts = rng.poisson(rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta))
    return np.where(rng.random(mean.shape) < pi, 0, counts) if np.any(pi) else counts


@dataclass
class ZeroPrior:
    """Start of the flow at zero expression. Deterministic: all draws are alike."""

    deterministic = True

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return np.zeros((n, n_genes), np.float32)


@dataclass
class GaussianPrior:
    """Standard normal start, in log1p units."""

    deterministic = False

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return rng.standard_normal((n, n_genes), dtype=np.float32)


@dataclass
class ScalarZINB:
    """The paper's prior: one zero-inflated negative binomial for all genes, then log1p.

    The defaults are the released code's (scvi-tools ``total_count=1, logits=0.1, zi_logits=0``): theta 1, NB mean
    exp(0.1) = 1.105, pi 0.5.
    """

    mean: float = float(np.exp(0.1))
    theta: float = 1.0
    pi: float = 0.5
    deterministic = False

    @classmethod
    def from_logits(cls, total_count: float = 1.0, logits: float = 0.1, zi_logits: float = 0.0) -> ScalarZINB:
        """Make the prior from scvi-tools' parameters."""
        return cls(total_count * float(np.exp(logits)), total_count, 1 / (1 + float(np.exp(-zi_logits))))

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        return np.log1p(draw_counts(np.full((n, n_genes), self.mean), self.theta, self.pi, rng)).astype(np.float32)


@dataclass
class CountPrior:
    """A negative binomial (ZINB where AIC prefers it) for each gene, fitted to training counts with library offset.

    A draw takes one library size from the training distribution for each spot, then counts, then normalises them.
    """

    rate: np.ndarray  # genes
    theta: np.ndarray
    pi: np.ndarray
    libraries: np.ndarray  # quantiles of the training libraries
    target_sum: float | None
    deterministic = False

    @classmethod
    def fit(cls, counts: np.ndarray, library: np.ndarray, target_sum: float | None = 1e4) -> CountPrior:
        """Fit to counts (n x genes) and libraries (n) of training slides."""
        chosen = np.random.default_rng(0).permutation(len(counts))[:20_000]
        return cls(*fit_counts(counts[chosen], library[chosen]), library_quantiles(library), target_sum)

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        library = rng.choice(self.libraries, n)
        counts = draw_counts(library[:, None] * self.rate, self.theta, self.pi, rng)
        return log_normalize(counts, library, self.target_sum)


@dataclass
class ImagePrior:
    """Start at a simple prediction from the image plus normal noise of stated size (0 makes it deterministic)."""

    noise: np.ndarray  # genes, standard deviation in log1p units

    @property
    def deterministic(self) -> bool:
        return not np.any(self.noise)

    def sample(self, n: int, n_genes: int, rng: np.random.Generator, base: Any = None) -> np.ndarray:
        noise = rng.standard_normal((n, n_genes), dtype=np.float32) * self.noise.astype(np.float32)
        return np.maximum(base + noise, 0).astype(np.float32)


def library_quantiles(library: np.ndarray, n: int = 256) -> np.ndarray:
    """Return ``n`` evenly spaced quantiles of library sizes: their distribution in a fixed, small size."""
    return np.maximum(np.quantile(library, (np.arange(n) + 0.5) / n), 1.0)


class CountLaw:
    """Predictive distribution of log-normalised expression: counts are NB (or ZINB) around the predicted mean.

    Library sizes are those of training; ``pi`` is one for each gene, or one for all. One table gives mean and standard
    deviation of log1p for every rate and dispersion; a prediction (mean, std) is turned into the rate and dispersion that
    have just these moments.
    """

    def __init__(self, libraries: np.ndarray, target_sum: float | None, pi: np.ndarray, n_draws: int = 2048):
        self.libraries, self.target_sum, self.pi = np.asarray(libraries), target_sum, np.asarray(pi)
        rng = np.random.default_rng(0)
        library = rng.choice(self.libraries, n_draws)
        depth = float(np.mean(self.libraries))
        self.thetas = np.geomspace(0.05, 1000, 20)
        self.rates = np.geomspace(1e-3, 3e4, 80) / depth
        self.mean, self.std = np.empty((2, len(self.thetas), len(self.rates)))
        for i, theta in enumerate(self.thetas):
            gamma = rng.gamma(theta, 1 / theta, n_draws)
            counts = rng.poisson(np.minimum(self.rates[:, None] * (library * gamma), 1e9))
            y = log_normalize(counts.T, library, target_sum)  # draws x rates
            self.mean[i], self.std[i] = np.maximum.accumulate(y.mean(0)), y.std(0)

    def std_at(self, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Standard deviation of log1p expression at a mean (n x genes) for dispersions (genes)."""
        out = np.empty_like(mean, dtype=np.float64)
        for g, (t, pi) in enumerate(zip(theta, np.broadcast_to(self.pi, len(theta)))):
            m, s = self._row(t)
            inner = np.maximum(mean[:, g], 0) / (1 - pi)
            s = np.interp(inner, m, s)
            out[:, g] = np.sqrt((1 - pi) * (s**2 + inner**2) - ((1 - pi) * inner) ** 2)
        return out

    def rate_at(self, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Rate (fraction of the library) whose expected log1p expression is ``mean``."""
        out = np.empty_like(mean, dtype=np.float64)
        for g, (t, pi) in enumerate(zip(theta, np.broadcast_to(self.pi, len(theta)))):
            m, _ = self._row(t)
            out[:, g] = np.exp(np.interp(np.maximum(mean[:, g], 0) / (1 - pi), m, np.log(self.rates)))
        return out

    def fit_theta(self, mean: np.ndarray, counts: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Dispersion of every gene that makes held-out counts most likely around held-out predictions."""
        c = torch.as_tensor(np.asarray(counts), dtype=torch.float64)
        size = torch.as_tensor(library, dtype=torch.float64)[:, None]
        if self.target_sum is None:  # raw counts: depth is part of the dispersion
            size = torch.full_like(size, float(np.mean(self.libraries)))
        pi = torch.as_tensor(self.pi).clamp_min(1e-12)
        score = []
        for theta in self.thetas:
            rate = torch.as_tensor(self.rate_at(mean, np.full(mean.shape[1], theta)))
            score.append(log_likelihood(c, size * rate, torch.tensor(theta, dtype=torch.float64), pi).mean(0))
        return self.thetas[torch.stack(score).argmax(0).numpy()]

    def sample(self, mean: np.ndarray, std: np.ndarray, n_draws: int, seed: int = 0) -> np.ndarray:
        """Draw log-normalised expression (n_draws x n x genes) with the given mean and std (n x genes each)."""
        rng = np.random.default_rng(seed)
        out = np.empty((n_draws, *mean.shape), np.float32)
        library = rng.choice(self.libraries, (n_draws, len(mean)))
        for g, pi in enumerate(self.pi):
            inner = np.maximum(mean[:, g], 0) / (1 - pi)
            wanted = np.sqrt(np.maximum((std[:, g] ** 2 + mean[:, g] ** 2) / (1 - pi) - inner**2, 0))
            rates = np.stack([np.exp(np.interp(inner, m, np.log(self.rates))) for m in self.mean])
            spread = np.stack([np.interp(inner, m, s) for m, s in zip(self.mean, self.std)])  # thetas x n, falling
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
