"""Correlation and error of each gene, and agreement of the correlations between genes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table


def pearson(truth: Table, prediction: Table, *, library: ArrayLike | None = None) -> np.ndarray | pd.DataFrame:
    """Pearson correlation of every gene.

    A gene with a constant *prediction* scores 0, because none of its variation was predicted. A gene with a constant *truth*
    scores NaN, because there is nothing to predict. Average with :func:`numpy.nanmean`, and report how many genes were NaN.

    Parameters
    ----------
    truth, prediction
        Arrays (n, genes).
    library
        Slide of every row (n). None pools all rows, so differences between slides count too.

    Returns
    -------
    Array (genes), or with ``library`` a DataFrame of slides x genes, columns numbered as in ``truth``.

    Raises
    ------
    ValueError
        Shapes differ, or values are NaN or infinite.

    Examples
    --------
    A gene that does not vary has nothing to predict:

    >>> truth = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    >>> sf.metrics.pearson(truth, truth)
    array([ 1., nan])
    """
    truth, prediction = _arrays.tables(truth=truth, prediction=prediction)
    return _by_slide(_pearson, truth, prediction, library)


def spearman(truth: Table, prediction: Table, *, library: ArrayLike | None = None) -> np.ndarray | pd.DataFrame:
    """Spearman rank correlation of every gene, ties at their mean rank; constants as in :func:`pearson`.

    Parameters
    ----------
    truth, prediction
        Arrays (n, genes).
    library
        Slide of every row (n); rows are ranked within their slide. None pools all rows.

    Returns
    -------
    Array (genes), or with ``library`` a DataFrame of slides x genes.

    Raises
    ------
    ValueError
        Shapes differ, or values are NaN or infinite.

    Examples
    --------
    >>> sf.metrics.spearman([[1.0], [2.0], [3.0]], [[1.0], [10.0], [100.0]])
    array([1.])
    """
    truth, prediction = _arrays.tables(truth=truth, prediction=prediction)
    return _by_slide(lambda x, y: _pearson(rankdata(x, axis=0), rankdata(y, axis=0)), truth, prediction, library)


def rmse(truth: Table, prediction: Table, *, library: ArrayLike | None = None) -> np.ndarray | pd.DataFrame:
    """Root mean squared error of every gene, in the unit of ``truth``.

    Parameters
    ----------
    truth, prediction
        Arrays (n, genes).
    library
        Slide of every row (n). None pools all rows.

    Returns
    -------
    Array (genes), or with ``library`` a DataFrame of slides x genes.

    Raises
    ------
    ValueError
        Shapes differ, or values are NaN or infinite.

    Examples
    --------
    >>> sf.metrics.rmse([[0.0, 1.0], [0.0, 2.0]], [[3.0, 1.0], [3.0, 2.0]])
    array([3., 0.])
    """
    truth, prediction = _arrays.tables(truth=truth, prediction=prediction)
    return _by_slide(lambda x, y: np.sqrt(((x - y) ** 2).mean(0)), truth, prediction, library)


def gene_correlation_agreement(truth: Table, prediction: Table) -> dict[str, float]:
    """Compare the correlations between genes in a prediction with those in the truth.

    Uses the upper triangles of the two gene-gene Pearson matrices. Genes that are constant in ``truth`` are not used. A gene that
    is constant in ``prediction`` has the correlation 0 with every other gene.

    Parameters
    ----------
    truth, prediction
        Arrays (n, genes), at least 3 of the genes varying.

    Returns
    -------
    dict with ``"pearson"``, the correlation between the two triangles, and ``"rmse"``, their root mean squared
    difference.

    Raises
    ------
    ValueError
        Shapes differ, values are NaN or infinite, or fewer than 3 genes vary in ``truth``.

    Examples
    --------
    >>> expression = np.log1p(sdata["table"].X.toarray())
    >>> agreement = sf.metrics.gene_correlation_agreement(expression, expression)
    >>> round(agreement["pearson"], 3), round(agreement["rmse"], 3)
    (1.0, 0.0)
    """
    truth, prediction = _arrays.tables(truth=truth, prediction=prediction)
    varies = ~constant(truth)
    if varies.sum() < 3:
        raise ValueError(f"only {int(varies.sum())} genes vary in truth; their correlations need at least 3.")
    upper = np.triu_indices(int(varies.sum()), k=1)
    measured, predicted = (unit(values[:, varies]) for values in (truth, prediction))
    measured, predicted = (measured.T @ measured)[upper], (predicted.T @ predicted)[upper]
    return {
        "pearson": float(_pearson(measured[:, None], predicted[:, None])[0]),
        "rmse": float(np.sqrt(np.mean((measured - predicted) ** 2))),
    }


def constant(values: np.ndarray) -> np.ndarray:
    """Columns that do not vary beyond rounding."""
    return np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(0)


def unit(values: np.ndarray) -> np.ndarray:
    """Columns centred and scaled to unit norm; a constant column becomes 0."""
    flat = constant(values)
    centred = values - values.mean(0)
    centred[:, flat] = 0
    return centred / np.where(flat, 1, np.linalg.norm(centred, axis=0))


def _pearson(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    r = np.clip((unit(truth) * unit(prediction)).sum(0), -1, 1)
    return np.where(constant(truth), np.nan, r)


def _by_slide(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    truth: np.ndarray,
    prediction: np.ndarray,
    library: ArrayLike | None,
) -> np.ndarray | pd.DataFrame:
    if library is None:
        return score(truth, prediction)
    names, codes = _arrays.labels(library, len(truth), "library")
    rows = (codes == code for code in range(len(names)))
    return pd.DataFrame([score(truth[chosen], prediction[chosen]) for chosen in rows], index=names)
