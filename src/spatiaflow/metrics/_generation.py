"""Scores of generated observations: distances between samples, recovery of a shift, and memorisation."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table

MAX_FRECHET = 64  # features: with more, a covariance needs more images than are usually generated


def energy_distance(a: Table, b: Table) -> float:
    """Energy distance of two samples, ``2 E|a - b| - E|a - a'| - E|b - b'|``, without bias.

    Parameters
    ----------
    a, b
        Samples, n x features and m x features, in comparable units (standardise them by the real sample).

    Returns
    -------
    0 on average where both come from one distribution (single values may lie below 0), else above [Székely and Rizzo 2013].

    Raises
    ------
    ValueError
        Fewer than two rows, NaN, or different numbers of features.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(2, 500, 3))
    >>> sf.metrics.energy_distance(a, b) < 0.1 < sf.metrics.energy_distance(a, b + 1)
    True
    """
    a, b = _samples(a, b)
    return float(2 * _mean_distance(a, b) - _mean_distance(a) - _mean_distance(b))


def kernel_distance(a: Table, b: Table, *, degree: int = 3) -> float:
    """Kernel inception distance (KID) of features of images: squared maximum mean discrepancy, without bias.

    Parameters
    ----------
    a, b
        Features, n x d and m x d.
    degree
        Of the polynomial kernel (x.y / d + 1)^degree.

    Returns
    -------
    0 on average where both come from one distribution (single values may lie below 0), else above [Bińkowski et al. 2018].

    Raises
    ------
    ValueError
        Fewer than two rows, NaN, or different numbers of features.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(2, 500, 3))
    >>> sf.metrics.kernel_distance(a, b) < 0.1 < sf.metrics.kernel_distance(a, b + 1)
    True
    """
    a, b = _samples(a, b)

    def mean(x: np.ndarray, y: np.ndarray | None = None) -> float:
        total = 0.0
        other = x if y is None else y
        for rows in _arrays.rows_in_chunks(len(x), len(other)):
            kernel = (x[rows] @ other.T / x.shape[1] + 1) ** degree
            total += kernel.sum()
        if y is not None:
            return total / (len(x) * len(y))
        return (total - (((x**2).sum(1) / x.shape[1] + 1) ** degree).sum()) / (len(x) * (len(x) - 1))

    return float(mean(a) + mean(b) - 2 * mean(a, b))


def frechet_distance(a: Table, b: Table) -> float:
    """Fréchet distance (FID) of features of images. Assumes that each sample is normal.

    Parameters
    ----------
    a, b
        Features, n x d and m x d.

    Returns
    -------
    ``|mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2))``. The bias is upwards and grows as samples get smaller, so compare
    only values of equal n.

    Raises
    ------
    ValueError
        More than 64 features, or fewer than ten rows a feature: the covariances would be noise.

    Examples
    --------
    >>> a = np.random.default_rng(0).normal(size=(500, 3))
    >>> round(sf.metrics.frechet_distance(a, a + [3, 4, 0]), 3)
    25.0
    """
    a, b = _samples(a, b)
    d = a.shape[1]
    if d > MAX_FRECHET or min(len(a), len(b)) < 10 * d:
        raise ValueError(
            f"a Fréchet distance of {d} features needs at most {MAX_FRECHET} of them and {10 * d} rows a side; there are "
            f"{len(a)} and {len(b)}. metrics.kernel_distance does without."
        )
    one, other = np.cov(a.T).reshape(d, d), np.cov(b.T).reshape(d, d)
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric
    value, vector = np.linalg.eigh(one)
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one) + np.trace(other) - 2 * cross)


def feature_distances(a: Table, b: Table) -> np.ndarray:
    """Wasserstein distance of each feature of two samples.

    Parameters
    ----------
    a, b
        Samples, n x features and m x features.

    Returns
    -------
    Array (features), in the units of the features.

    Raises
    ------
    ValueError
        Fewer than two rows, NaN, or different numbers of features.

    Examples
    --------
    >>> a = np.random.default_rng(0).normal(size=(100, 2))
    >>> sf.metrics.feature_distances(a, a + [0, 3]).round(3)
    array([0., 3.])
    """
    from scipy.stats import wasserstein_distance

    a, b = _samples(a, b)
    return np.array([wasserstein_distance(x, y) for x, y in zip(a.T, b.T)])


def effect_recovery(source: Table, generated: Table, target: Table) -> dict[str, float]:
    """Return the share of the true shift from source to target that the generated cells show.

    Parameters
    ----------
    source, generated, target
        Profiles, rows cells, columns features in comparable units (standardise them by the source).

    Returns
    -------
    Dict with ``share``, the length of the generated shift along the true shift, relative to the true shift (1: all, 0: none);
    ``cosine`` between the two shifts; and ``left``, the length of their difference relative to the true shift.

    Raises
    ------
    ValueError
        NaN, different numbers of features, or a true shift of 0.

    Examples
    --------
    Half of the shift, in the right direction:

    >>> source = np.random.default_rng(0).normal(size=(100, 4))
    >>> found = sf.metrics.effect_recovery(source, source + 0.5, source + 1)
    >>> {name: round(value, 3) for name, value in found.items()}
    {'share': 0.5, 'cosine': 1.0, 'left': 0.5}
    """
    generated = _samples(generated, target)[0]
    source, target = _samples(source, target)
    true, shown = target.mean(0) - source.mean(0), generated.mean(0) - source.mean(0)
    length = np.linalg.norm(true)
    if length == 0:
        raise ValueError("source and target have the same mean: there is no shift to recover.")
    cosine = true @ shown / max(length * np.linalg.norm(shown), 1e-300)
    left = np.linalg.norm(shown - true) / length
    return {"share": float(true @ shown / length**2), "cosine": float(cosine), "left": float(left)}


def memorised(generated: Table, training: Table, held_out: Table, *, quantile: float = 0.01) -> float:
    """Share of generated observations that are closer to a training observation than held-out ones usually are.

    Parameters
    ----------
    generated, training, held_out
        Features (rows are observations) of generated images, of training images, and of real images that were held out.
    quantile
        A generated observation counts if its distance to the nearest training observation is below this quantile of the
        distances of held-out observations.

    Returns
    -------
    About ``quantile`` if nothing is copied, 1 if everything is.

    Raises
    ------
    ValueError
        Fewer than two rows, NaN, or different numbers of features.

    Examples
    --------
    >>> training, held_out, generated = np.random.default_rng(0).normal(size=(3, 500, 4))
    >>> sf.metrics.memorised(training, training, held_out)
    1.0
    >>> sf.metrics.memorised(generated, training, held_out) < 0.05
    True
    """
    from scipy.spatial import cKDTree

    generated = _samples(generated, training)[0]
    training, held_out = _samples(training, held_out)
    tree = cKDTree(training)
    usual = np.quantile(tree.query(held_out)[0], quantile)
    return float((tree.query(generated)[0] < usual).mean())


def _samples(a: Table, b: Table) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(a, pd.DataFrame) and isinstance(b, pd.DataFrame) and not a.columns.equals(b.columns):
        if len(a.columns) != len(b.columns):
            raise ValueError(f"the samples have {len(a.columns)} and {len(b.columns)} features.")
        one, other = next((x, y) for x, y in zip(a.columns, b.columns) if x != y)
        raise ValueError(
            f"the samples have other features, or another order of them ({one!r} and {other!r} in one place); take the same of "
            "both: b[a.columns]."
        )
    a, b = _arrays.table(a, "the first sample"), _arrays.table(b, "the second sample")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the samples have {a.shape[1]} and {b.shape[1]} features.")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"the samples have {len(a)} and {len(b)} rows; two are needed.")
    return a, b


def _mean_distance(a: np.ndarray, b: np.ndarray | None = None) -> float:
    """Mean Euclidean distance of pairs from two samples, or of different rows of one."""
    from scipy.spatial.distance import cdist

    other = a if b is None else b
    total = sum(cdist(a[rows], other).sum() for rows in _arrays.rows_in_chunks(len(a), len(other)))
    return total / (len(a) * (len(other) - (b is None)))
