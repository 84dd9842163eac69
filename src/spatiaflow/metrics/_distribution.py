"""Scores of predictive distributions: intervals, CRPS, energy score and PIT."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table


def interval_coverage(truth: Table, lower: Table, upper: Table) -> np.ndarray:
    """Share of observations inside their interval, ends included.

    Parameters
    ----------
    truth, lower, upper
        Arrays (n, genes).

    Returns
    -------
    Array (genes), in [0, 1]. A constant interval can have the right coverage too, so also see :func:`interval_score`.

    Raises
    ------
    ValueError
        Shapes differ, values are NaN or infinite, or ``lower`` exceeds ``upper``.

    Examples
    --------
    >>> sf.metrics.interval_coverage([[1.0], [5.0]], [[0.0], [0.0]], [[2.0], [2.0]])
    array([0.5])
    """
    truth, lower, upper = _intervals(truth, lower, upper)
    return ((truth >= lower) & (truth <= upper)).mean(0)


def interval_score(truth: Table, lower: Table, upper: Table, *, alpha: float = 0.1) -> np.ndarray:
    """Interval score of every observation: the width, plus ``2 / alpha`` times the distance outside. Lower is better.

    Proper for the central ``1 - alpha`` interval [Gneiting and Raftery 2007, eq. 43].

    Parameters
    ----------
    truth, lower, upper
        Arrays (n, genes).
    alpha
        Nominal probability outside of the interval; 0.1 for a 90 % interval.

    Returns
    -------
    Array (n, genes), in the unit of ``truth``; ``.mean(0)`` is the score of each gene.

    Raises
    ------
    ValueError
        Shapes differ, values are NaN or infinite, ``lower`` exceeds ``upper``, or ``alpha`` is not in (0, 1).

    Examples
    --------
    A width of 2, and for the second observation 20 times its distance of 3 to the interval:

    >>> sf.metrics.interval_score([[1.0], [5.0]], [[0.0], [0.0]], [[2.0], [2.0]])
    array([[ 2.],
           [62.]])
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1) (the probability outside of the interval), not {alpha!r}.")
    truth, lower, upper = _intervals(truth, lower, upper)
    outside = np.maximum(lower - truth, 0) + np.maximum(truth - upper, 0)
    return upper - lower + 2 / alpha * outside


def crps_ensemble(truth: Table, draws: ArrayLike, *, fair: bool = True) -> np.ndarray:
    """Continuous ranked probability score of draws, ``E|X - y| - E|X - X'| / 2``. Lower is better.

    Exact, and O(m log m) in the number of draws: the pairwise term is a weighted sum of the sorted draws.

    Parameters
    ----------
    truth
        Array (n, genes).
    draws
        Array (n_draws, n, genes).
    fair
        Average the pairwise term over distinct pairs: the expected score then does not depend on the number of draws.
        False scores the empirical distribution itself. A single draw is a point forecast: its absolute error.

    Returns
    -------
    Array (n, genes), in the unit of ``truth``; ``.mean(0)`` is the score of each gene.

    Raises
    ------
    ValueError
        Shapes do not fit, or values are NaN or infinite.

    Examples
    --------
    >>> draws = np.array([[[0.0]], [[2.0]]])
    >>> sf.metrics.crps_ensemble([[3.0]], draws)
    array([[1.]])
    >>> sf.metrics.crps_ensemble([[3.0]], draws, fair=False)
    array([[1.5]])
    """
    truth, draws = _arrays.ensemble(truth, draws)
    m = len(draws)
    # sum over pairs i < j of x_(j) - x_(i) = sum over i of (2 i - m + 1) x_(i), for i from 0
    weights = (2 * np.arange(m) - m + 1.0) / _pairs(m, fair)
    out = np.empty_like(truth)
    for rows in _arrays.rows_in_chunks(len(truth), m * truth.shape[1]):
        chunk = np.sort(draws[:, rows].astype(np.float64), axis=0)
        out[rows] = np.abs(chunk - truth[rows]).mean(0) - np.einsum("m,mng->ng", weights, chunk)
    return out


def crps_normal(truth: Table, mean: Table, std: Table) -> np.ndarray:
    """Continuous ranked probability score of normal distributions, in closed form. Lower is better.

    Parameters
    ----------
    truth, mean, std
        Arrays (n, genes); where ``std`` is 0 the score is the absolute error.

    Returns
    -------
    Array (n, genes), in the unit of ``truth``; ``.mean(0)`` is the score of each gene.

    Raises
    ------
    ValueError
        Shapes differ, values are NaN or infinite, or ``std`` is negative.

    Examples
    --------
    >>> sf.metrics.crps_normal([[1.0, 1.0]], [[1.0, 3.0]], [[1.0, 0.0]]).round(3)
    array([[0.234, 2.   ]])
    """
    truth, mean, std = _arrays.tables(truth=truth, mean=mean, std=std)
    if std.min() < 0:
        raise ValueError(f"std has negative values (minimum {std.min():g}).")
    z = np.divide(truth - mean, std, out=np.zeros_like(truth), where=std > 0)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    score = std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    return np.where(std > 0, score, np.abs(truth - mean))


def pit(truth: Table, draws: ArrayLike, *, seed: int = 0) -> np.ndarray:
    """Randomised probability integral transform. It is uniform on [0, 1] if the draws are right, also with zeros and ties.

    The value is the rank of the observation among its draws (ties broken at random) plus a uniform number, divided by
    ``n_draws + 1``. A U-shaped histogram means that the draws are too narrow, a hump that they are too wide, and a slope that
    they are biased.

    Parameters
    ----------
    truth
        Array (n, genes).
    draws
        Array (n_draws, n, genes).
    seed
        Seed of the randomisation.

    Returns
    -------
    Array (n, genes) in [0, 1].

    Raises
    ------
    ValueError
        Shapes do not fit, or values are NaN or infinite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth, draws = rng.poisson(1, (500, 2)), rng.poisson(1, (50, 500, 2))
    >>> round(float(sf.metrics.pit(truth, draws).mean()), 1)
    0.5
    """
    truth, draws = _arrays.ensemble(truth, draws)
    uniform = np.random.default_rng(seed).random(truth.shape)
    # one draw at a time: no array of the size of the draws
    below, tied = np.zeros(truth.shape), np.zeros(truth.shape)
    for draw in draws:
        below += draw < truth
        tied += draw == truth
    return (below + uniform * (tied + 1)) / (len(draws) + 1)


def energy_score(truth: Table, draws: ArrayLike, *, fair: bool = True) -> np.ndarray:
    """Energy score, the CRPS of all genes jointly: ``E||X - y|| - E||X - X'|| / 2``. Lower is better.

    It depends on the correlations between genes, which scores of single genes ignore.

    Parameters
    ----------
    truth
        Array (n, genes).
    draws
        Array (n_draws, n, genes), each draw joint over the genes. The cost is quadratic in ``n_draws``.
    fair
        As in :func:`crps_ensemble`.

    Returns
    -------
    Array (n), in the unit of ``truth``.

    Raises
    ------
    ValueError
        Shapes do not fit, or values are NaN or infinite.

    Examples
    --------
    >>> draws = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
    >>> sf.metrics.energy_score([[3.0, 0.0]], draws)
    array([1.])
    """
    truth, draws = _arrays.ensemble(truth, draws)
    m = len(draws)
    out = np.empty(len(truth))
    for rows in _arrays.rows_in_chunks(len(truth), m * truth.shape[1]):
        chunk = draws[:, rows].astype(np.float64)
        pairs = sum((np.linalg.norm(chunk[i + 1 :] - chunk[i], axis=-1).sum(0) for i in range(m - 1)), start=0.0)
        out[rows] = np.linalg.norm(chunk - truth[rows], axis=-1).mean(0) - pairs / _pairs(m, fair)
    return out


def _pairs(m: int, fair: bool) -> float:
    """What the sum over pairs i < j is divided by to give half the mean pairwise distance."""
    return max(1, m * (m - 1) if fair else m * m)


def _intervals(truth: Table, lower: Table, upper: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth, lower, upper = _arrays.tables(truth=truth, lower=lower, upper=upper)
    if (lower > upper).any():
        raise ValueError(f"lower exceeds upper in {int((lower > upper).sum())} places.")
    return truth, lower, upper
