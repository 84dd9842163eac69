"""Which genes can be trusted: their pattern is predicted on slides that were held out, and would be on another one."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from spatiaflow.models.law import MIN_DONORS
from spatiaflow.models.regression import given_depth

MAX_ERROR = 0.1  # share of trusted genes whose pattern may be wrong
DONOR_SHIFT = 0.1  # sd of a gene's partial correlation between donors, where fewer than MIN_DONORS were seen
DONOR_LOSS = 0.4  # share of a partial correlation within a donor that remains on a new one (benchmarks/LOG.md)
EFFECTIVE = 0.25  # independent spots in a spot, since neighbours are alike


def partial(y: np.ndarray, prediction: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Pearson correlation of each gene given log depth, both n x genes; 0 where one of the two is constant."""
    a, b = (given_depth(np.asarray(values, np.float64), depth) for values in (y, prediction))
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(size > 1e-9, (a * b).sum(0) / np.maximum(size, 1e-9), 0.0)


def trusted(
    y: np.ndarray, prediction: np.ndarray, depth: np.ndarray, slides: np.ndarray, donors: np.ndarray
) -> np.ndarray:
    """Genes whose partial correlation on another slide is above 0 with a probability of at least 90 %.

    Parameters
    ----------
    y, prediction
        Held-out truth and prediction, n x genes.
    depth, slides, donors
        Library size, slide and donor of each row.

    Returns
    -------
    bool, 2 x genes: on a slide of one of these donors, and on a slide of a new donor. Below four donors the spread between
    donors is a stated prior, and from one donor alone only large correlations are trusted on another.
    """
    names = np.unique(slides)
    rows = [slides == name for name in names]
    z = np.stack([np.arctanh(np.clip(partial(y[r], prediction[r], depth[r]), -0.99, 0.99)) for r in rows])
    noise = np.array([1 / max(EFFECTIVE * r.sum() - 4, 1) for r in rows])
    needed = norm.ppf(1 - MAX_ERROR)
    mean, error = np.average(z, axis=0, weights=1 / noise), 1 / (1 / noise).sum()
    spread = max(float(np.mean(z.var(0, ddof=1) - noise.mean())), 0.0) if len(z) > 1 else DONOR_SHIFT**2
    same = mean > needed * np.sqrt(error + spread * (1 + 1 / len(z)))
    donor = np.array([donors[r][0] for r in rows])
    known = np.unique(donor)
    centre = np.stack([z[donor == d].mean(0) for d in known])
    shift = DONOR_SHIFT**2
    if len(known) >= MIN_DONORS:
        shift = max(float(np.mean(centre.var(0, ddof=1))) - error * len(z) / len(known), 0.0)
    kept = centre.mean(0) * (1.0 if len(known) > 1 else DONOR_LOSS)
    new = kept > needed * np.sqrt(error + shift * (1 + 1 / len(known)))
    return np.stack([same, new])
