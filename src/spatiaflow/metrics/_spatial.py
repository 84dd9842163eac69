"""Spatial autocorrelation of genes, and its agreement between truth and prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table
from spatiaflow.metrics._correlation import constant, pearson, spearman


def morans_i(values: Table, xy: ArrayLike, *, k: int = 6, graph: Table | None = None) -> np.ndarray:
    """Moran's I of every gene on one slide.

    Parameters
    ----------
    values
        Array (n, genes).
    xy
        Positions (n, 2), any unit.
    k
        Number of nearest neighbours of each position. Every row of weights sums to 1.
    graph
        Sparse weights (n, n) that replace the ``k`` neighbours. They are not normalised.

    Returns
    -------
    Array (genes); NaN for a constant gene. Under no autocorrelation its expectation is ``-1 / (n - 1)``.

    Raises
    ------
    ValueError
        Shapes do not fit, values are NaN or infinite, or there are not more than ``k`` positions.

    Examples
    --------
    A gradient and noise:

    >>> rng = np.random.default_rng(0)
    >>> xy = rng.uniform(size=(400, 2))
    >>> gradient, noise = sf.metrics.morans_i(np.stack([xy[:, 0], rng.normal(size=400)], 1), xy)
    >>> bool(gradient > 0.9 > 0.1 > noise)
    True
    """
    values = _arrays.table(values, "values")
    return _morans_i(values, _weights(len(values), xy, k, graph))


def morans_agreement(
    truth: Table, prediction: Table, xy: ArrayLike, *, k: int = 6, graph: Table | None = None
) -> dict[str, float]:
    """Compare the spatial autocorrelation of each gene in a prediction with that in the truth, on one slide.

    Predictions are smoother than counts. This lowers the agreement of the values of I, but not that of their order, so look
    at both. Genes that are constant in ``truth`` are not used. A constant prediction has I = 0.

    Parameters
    ----------
    truth, prediction
        Arrays (n, genes).
    xy
        Positions (n, 2), any unit.
    k, graph
        As in :func:`morans_i`.

    Returns
    -------
    dict with ``"pearson"`` and ``"spearman"`` between the genes' I in truth and prediction, and
    ``"mean_abs_difference"`` of I.

    Raises
    ------
    ValueError
        Shapes do not fit, values are NaN or infinite, fewer than 3 genes vary, or positions are not more than ``k``.

    Examples
    --------
    >>> truth = np.log1p(adata.X.toarray())
    >>> agreement = sf.metrics.morans_agreement(truth, truth, adata.obsm["spatial"])
    >>> agreement["mean_abs_difference"]
    0.0
    """
    truth, prediction = _arrays.tables(truth=truth, prediction=prediction)
    varies = ~constant(truth)
    if varies.sum() < 3:
        raise ValueError(f"only {int(varies.sum())} genes vary in truth; agreement over genes needs at least 3.")
    weights = _weights(len(truth), xy, k, graph)
    measured, predicted = (_morans_i(values[:, varies], weights)[:, None] for values in (truth, prediction))
    predicted = np.nan_to_num(predicted)
    return {
        "pearson": float(pearson(measured, predicted)[0]),
        "spearman": float(spearman(measured, predicted)[0]),
        "mean_abs_difference": float(np.abs(measured - predicted).mean()),
    }


def _weights(n: int, xy: ArrayLike, k: int, graph: Any) -> sparse.csr_matrix:
    if graph is not None:
        graph = sparse.csr_matrix(graph, dtype=np.float64)
        if graph.shape != (n, n):
            raise ValueError(f"graph must be ({n}, {n}), one row a position; it is {graph.shape}.")
        if graph.sum() == 0:
            raise ValueError("graph has no weights: nothing is next to anything.")
        return graph
    from sklearn.neighbors import kneighbors_graph

    xy = np.asarray(xy, dtype=np.float64)
    if xy.shape != (n, 2) or not np.isfinite(xy).all():
        raise ValueError(f"xy must hold finite positions ({n}, 2); its shape is {xy.shape}.")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    if n <= k:
        raise ValueError(f"{k} neighbours need more than {k} positions; there are {n}.")
    # a position is not its own neighbour, also where others lie at the same place
    return sparse.csr_matrix(kneighbors_graph(xy, k, include_self=False)) / k


def _morans_i(values: np.ndarray, weights: sparse.csr_matrix) -> np.ndarray:
    from scanpy.metrics import morans_i as of_graph  # takes a second to import

    # one gene at a time: scanpy runs a table in parallel, and numba then raises the thread limit of the whole process
    columns = np.ascontiguousarray(values.T)
    return np.array([np.nan if flat else of_graph(weights, x) for flat, x in zip(constant(values), columns)])
