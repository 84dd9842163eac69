"""Is the stated uncertainty the true one?"""

from __future__ import annotations

import numpy as np
import seaborn as sns
from anndata import AnnData
from matplotlib.figure import Figure
from scipy.stats import norm
from spatialdata import SpatialData

from spatiaflow import _io, metrics
from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish


@verb
def calibration(
    data: AnnData | SpatialData,
    *,
    key: str = "stflow",
    layer: str | None = None,
    draws: np.ndarray | None = None,
    table_key: str = "table",
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw coverage of central intervals, and error against stated standard deviation.

    Left: the share of measured values inside intervals of 10 to 95 %; on the diagonal they keep their promise. Without
    ``draws`` intervals are normal around the mean and cut at 0, which covers too much where most counts are 0; with them
    coverage is that of ranks, ties broken at random (:func:`spatiaflow.metrics.pit`). Right: root mean squared
    error in ten bins of the stated standard deviation.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.predict_expression` wrote into, with counts of the predicted genes.
    key
        Slot of the prediction.
    layer
        Layer with raw counts; None reads ``X``.
    draws
        Draws from the predictive distribution (n_draws, n_obs, n_genes): the layers of
        :func:`spatiaflow.tl.sample_expression`, at the measured depth.
    table_key
        Table of a SpatialData.
    show
        Show the figure; None: when matplotlib is interactive.
    return_fig
        Return the figure instead.

    Returns
    -------
    None, or with ``return_fig=True`` the :class:`matplotlib.figure.Figure`.

    Raises
    ------
    KeyError
        The slot or the counts of its genes are missing.
    ValueError
        ``draws`` are of another shape.

    Examples
    --------
    >>> sf.pl.calibration(adata)

    With draws of the predictive distribution:

    >>> adata.obs["total_counts"] = np.asarray(adata.X.sum(1)).ravel()
    >>> draws = sf.tl.sample_expression(adata, model=model, n_samples=50, depth="total_counts")
    >>> sf.pl.calibration(adata, draws=sf.get.draws(draws))
    """
    import matplotlib.pyplot as plt

    _, table = _io.unpack(data, table_key)
    predicted = _io.slot_as_anndata(table, key)
    truth = _io.log_expression(table, list(predicted.var_names), layer, key)
    mean, std = predicted.X, predicted.layers["std"]
    if draws is not None and np.shape(draws)[1:] != truth.shape:
        raise ValueError(f"draws must be (n_draws, {truth.shape[0]}, {truth.shape[1]}); they are {np.shape(draws)}.")
    levels = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    if draws is not None:  # by ranks with ties broken at random: zeros among counts would fill any interval
        off_centre = np.abs(metrics.pit(truth, draws) - 0.5)
    inside = []
    for level in levels:
        if draws is not None:
            inside.append(float(np.mean(off_centre <= level / 2)))
            continue
        reach = norm.ppf(0.5 + level / 2) * std
        inside.append(float(np.mean((truth >= np.maximum(mean - reach, 0)) & (truth <= mean + reach))))

    color = sns.color_palette("colorblind")[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(5.0, 2.4), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.6", lw=0.8, ls="--")
    left.plot(levels, inside, "o-", ms=3, lw=1, color=color)
    left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    left.set_xlabel("nominal coverage", fontsize=7)
    left.set_ylabel("observed coverage", fontsize=7)
    edges = np.unique(np.quantile(std, np.linspace(0, 1, 11)))
    which = np.clip(np.searchsorted(edges, std, side="right") - 1, 0, max(len(edges) - 2, 0))
    bins = [which == b for b in range(max(len(edges) - 1, 1)) if (which == b).any()]
    stated = [np.sqrt(np.mean(std[b] ** 2)) for b in bins]
    error = [np.sqrt(np.mean((truth[b] - mean[b]) ** 2)) for b in bins]
    top = 1.1 * max([*stated, *error])
    right.plot([0, top], [0, top], color="0.6", lw=0.8, ls="--")
    right.plot(stated, error, "o-", ms=3, lw=1, color=color)
    right.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    right.set_xlabel("stated std (log1p)", fontsize=7)
    right.set_ylabel("root mean squared error", fontsize=7)
    left.text(0.04, 0.96, f"n = {truth.size:,} values", transform=left.transAxes, ha="left", va="top", fontsize=6)
    for ax in (left, right):
        ax.tick_params(labelsize=6)
        sns.despine(ax=ax)
    return finish(figure, show, return_fig)
