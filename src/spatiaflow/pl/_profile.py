"""Morphology of groups of cells: a map of all features, and the distribution of those that differ most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import logger
from spatiaflow.pl._tissue import finish, violin


@verb
def profile(
    data: AnnData | SpatialData,
    groupby: str,
    *,
    features: Sequence[str] | None = None,
    key: str = "morphology",
    table_key: str = "table",
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the morphology of groups of cells.

    Above: the median of each feature in each group, as a robust z-score over all cells (from their median and interquartile
    range). Below: the distribution of some features in their units, with median and quartiles, between the 0.5 and 99.5 %
    quantiles of all cells.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.pp.morphology_profile` wrote into.
    groupby
        Column of ``.obs``; at most 50 groups.
    features
        Features whose distribution is drawn. None: the three whose ranks vary most between groups, without pairs that are
        correlated by more than 0.8.
    key
        Slot of the morphology.
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
        The slot, the column or a feature is missing.
    ValueError
        Too many groups, or no cell with both a group and morphology.

    Examples
    --------
    >>> sf.pl.profile(sdata, "cell_type", features=["area_um2", "eccentricity"])
    """
    import matplotlib.pyplot as plt

    _, table = _io.unpack(data, table_key)
    values, group = _io.morphology(table, key), _io.groups(table, groupby)
    known = values.notna().all(axis=1).to_numpy() & group.notna().to_numpy()
    if not known.any():
        raise ValueError(f"no cell has both obs[{groupby!r}] and values in obsm[{key!r}].")
    if not known.all():
        logger.info("%d cells without morphology or group are left out", int((~known).sum()))
    values, group = values[known], group[known].cat.remove_unused_categories()
    chosen = _io.names(features, "features") or _most_different(values, group)
    if missing := [name for name in chosen if name not in values]:
        raise KeyError(f"obsm[{key!r}] has no {missing[0]!r}; it has {', '.join(values)}.")

    names = list(group.cat.categories)
    labels = [f"{name} ({count:,})" for name, count in group.value_counts().reindex(names).items()]
    rows = -(-len(chosen) // 3)
    heights = [0.16 * len(names), *[max(1.1, 0.15 * len(names))] * rows]
    figure = plt.figure(figsize=(7.1, sum(heights) + 1.5 + 0.45 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, min(3, max(1, len(chosen))), height_ratios=heights)
    _heatmap(figure.add_subplot(grid[0, :]), values, group, labels)
    for i, feature in enumerate(chosen):
        ax = figure.add_subplot(grid[1 + i // 3, i % 3])
        _violins(ax, values[feature], group, labels if i % 3 == 0 else None)
    figure.supylabel(groupby, fontsize=7)
    return finish(figure, show, return_fig)


def _most_different(values: pd.DataFrame, group: pd.Series, n: int = 3) -> list[str]:
    """Return the features with the largest share of the variance of ranks between groups, and no near copies."""
    ranks = pd.DataFrame({name: rankdata(column) for name, column in values.items()}, index=values.index)
    mean = ranks.groupby(group, observed=True).mean()
    size = group.value_counts().reindex(mean.index)
    between = (mean - ranks.mean()).pow(2).mul(size, axis=0).sum() / len(ranks)
    explained = (between / ranks.var(ddof=0).replace(0, np.inf)).sort_values(ascending=False, kind="stable")
    correlation = ranks.corr().abs()
    chosen: list[str] = []
    for name in explained.index:
        if len(chosen) < n and not (correlation.loc[name, chosen] > 0.8).any():
            chosen.append(name)
    return chosen


def _heatmap(ax: Axes, values: pd.DataFrame, group: pd.Series, labels: list[str]) -> None:
    """Draw groups x features, z-score of the median: blue below the median cell, red above."""
    low, middle, high = (values.quantile(q) for q in (0.25, 0.5, 0.75))
    spread = ((high - low) / 1.349).replace(0, np.nan)
    scores = ((values.groupby(group, observed=True).median() - middle) / spread).fillna(0).to_numpy()
    limit = max(0.5, np.ceil(2 * np.quantile(abs(scores), 0.98)) / 2)
    image = ax.imshow(scores, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    ax.set_yticks(range(len(labels)), labels, fontsize=6)
    ax.set_xticks(range(values.shape[1]), [_label(name, unit=False) for name in values], rotation=90, fontsize=6)
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=12, fraction=0.03, extend="both")
    bar.set_label("median, z-score", fontsize=6)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)


def _violins(ax: Axes, values: pd.Series, group: pd.Series, labels: list[str] | None) -> None:
    """Draw a horizontal violin for each group, with median and quartiles."""
    low, high = values.quantile([0.005, 0.995])
    margin = 0.02 * (high - low) or 1.0
    names = list(group.cat.categories)
    for y, name in enumerate(names):
        violin(ax, y, values[group == name].clip(low, high).to_numpy(float))
    ax.axvline(values.median(), color="0.6", lw=0.6, zorder=0)
    ax.set_xlim(low - margin, high + margin)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), labels or [""] * len(names), fontsize=6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=6, length=2)
    ax.set_xlabel(_label(values.name, unit=True), fontsize=7)
    sns.despine(ax=ax, left=True)


def _label(name: str, *, unit: bool) -> str:
    """Make a label of a column's name: ``area_um2`` is area (µm²)."""
    for suffix, size in (("_um2", "µm²"), ("_um", "µm")):
        if name.endswith(suffix):
            return name.removesuffix(suffix).replace("_", " ") + unit * f" ({size})"
    is_stain = name.startswith(("hematoxylin_", "eosin_"))
    has_unit = name.endswith(("_mean", "_std"))
    return name.replace("_", " ") + unit * has_unit * (" (optical density)" if is_stain else " (image units)")
