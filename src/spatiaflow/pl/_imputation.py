"""Imputed genes beside measured ones, and the reliability of all imputed genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import seaborn as sns
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io, metrics
from spatiaflow._process import verb
from spatiaflow.models.slide import Slide
from spatiaflow.pl._tissue import finish, scale_bar, tissue_panel


@verb
def imputation(
    data: AnnData | SpatialData,
    genes: str | Sequence[str],
    *,
    truth: AnnData | SpatialData | None = None,
    key: str = "imputed",
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    library_id: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw imputed genes on the tissue, beside measured values if there are any, and the reliability of all genes.

    Each gene has one row. It shows measured and imputed values on one colour scale, and the mean of the measured values in each
    tenth of the imputed ones. Points on the diagonal mean that imputation is right on average. A gene without measured
    values is drawn with the standard deviation of its imputed values instead. The last row shows the reliability of every
    gene, against its correlation with measured values or sorted. Denoised genes are not compared with measured values,
    because they were computed from them.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.impute_genes` wrote into, or the AnnData that it returned.
    genes
        One gene or several.
    truth
        Raw counts of the genes in the same cells (``obs_names``), if they were measured but hidden. None takes those of ``data``.
    key
        Slot of the imputation.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, library_id
        Column of ``.obs`` that tells slides apart, and the slide to draw (None: the first).
    spatial_key, mpp
        Positions in ``.obsm`` of an AnnData, and µm per unit of them where the data do not state it.
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
        The slot, a gene, the slide, or a cell in ``truth`` is missing.
    ValueError
        ``genes`` is empty.

    Examples
    --------
    >>> sf.tl.impute_genes(sdata, genes=["STATE1"])
    >>> sf.pl.imputation(sdata, "STATE1")
    """
    import matplotlib.pyplot as plt

    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.text(key=key)
    data, table = _io.unpack(data, table_key)
    genes = list(_io.names(genes, "genes") or ())
    own = _io.own_result(data, table, key)
    held, imputed = (table, _io.slot_as_anndata(table, key)) if own is None else (own, own)
    if missing := [gene for gene in genes if gene not in imputed.var_names]:
        raise KeyError(f"uns[{key!r}]['genes'] has no {missing[0]!r}; it has {', '.join(imputed.var_names[:8])}, ...")
    slide = _io.one_slide(_io.places(data, where), library_id)
    slide = slide.take(np.isfinite(np.asarray(imputed.X[slide.rows])).all(1))  # cells without counts have no values
    truth = None if truth is None else _io.unpack(truth, table_key, name="truth")[1]
    counts = table if truth is None else truth
    there = [gene for gene in imputed.var_names if gene in counts.var_names]
    if table is own:  # it holds no counts
        there, table, truth = ([], table, None) if truth is None else (there, truth[_io.same_cells(truth, table)], None)
    measured = dict(zip(there, _io.log_expression(table, there, layer, key, truth, held).T)) if there else {}
    compared = [gene for gene in genes if gene in measured and not imputed.var.loc[gene, "denoised"]]
    aspect = np.ptp(slide.xy[:, 1]) / max(np.ptp(slide.xy[:, 0]), 1e-9)
    height = 2.1 * np.clip(aspect, 0.6, 1.5)  # of a map, inches
    width = np.clip(height / max(aspect, 1e-9), 0.9, 2.1)
    widths = [width + 0.5, width + 0.5, 1.6][: 3 if compared else 2]  # with a bar of colours
    heights = [height + 0.3] * len(genes) + [1.8]
    figure = plt.figure(figsize=(sum(widths) + 0.3, sum(heights) + 0.1), layout="constrained")
    grid = figure.add_gridspec(len(heights), len(widths), height_ratios=heights, width_ratios=widths)
    per: Any = _io.target_sum(held, key)
    unit = f"log1p of counts per {per:.0f}" if per >= 100 else f"log1p of counts per {per:.2g}"
    for i, gene in enumerate(genes):
        known = measured[gene][slide.rows] if gene in measured else None
        axes = [figure.add_subplot(grid[i, column]) for column in range(3 if gene in compared else 2)]
        _row(axes, slide, imputed[slide.rows], gene, known, unit)
    scale_bar(axes[0])
    _reliability(figure.add_subplot(grid[-1, :]), imputed, measured, genes, slide.rows)
    return finish(figure, show, return_fig)


def _row(axes: list[Axes], slide: Slide, imputed: AnnData, gene: str, known: np.ndarray | None, unit: str) -> None:
    """Maps of one gene, and imputed against measured values where there is a third panel."""
    g, figure = imputed.var_names.get_loc(gene), axes[0].figure
    found = np.asarray(imputed.X[:, g])
    top = max(float(np.quantile(found if known is None else np.r_[found, known], 0.99)), 1e-3)
    what = "denoised" if imputed.var["denoised"].iloc[g] else "imputed"
    panels = [(what, found, top, "viridis")]
    if known is not None:
        panels.insert(0, ("measured", known, top, "viridis"))
    elif "std" in imputed.layers:
        std = np.asarray(imputed.layers["std"][:, g])
        panels.append(("std", std, float(np.quantile(std, 0.99)), "magma"))
    shared: list[Axes] = []  # axes on the scale of the values
    for ax, (name, values, high, colors) in zip(axes, panels):
        points = tissue_panel(ax, slide, values, vmin=0, vmax=high, cmap=colors, title=f"{gene}, {name}")
        shared = [ax] if name == "std" else [*shared, ax]
        if name == what:
            trust = f"reliability {imputed.var['reliability'].iloc[g]:.2f}"
            ax.text(1, -0.03, trust, transform=ax.transAxes, ha="right", va="top", fontsize=6)
        if name != "measured":
            bar = figure.colorbar(points, ax=shared, shrink=0.7, pad=0.02, aspect=18)
            bar.ax.tick_params(labelsize=6, length=2)
            bar.outline.set_visible(False)
            bar.set_label(f"std, {unit}" if name == "std" else unit, fontsize=6)
    if len(panels) < 2:
        axes[1].remove()
    if len(axes) > 2:
        _against(axes[2], found, cast("np.ndarray", known))


def _against(ax: Axes, found: np.ndarray, known: np.ndarray) -> None:
    """Draw the mean of measured values in tenths of the imputed ones, with the standard error."""
    color = sns.color_palette("colorblind")[0]
    parts = [p for p in np.array_split(np.argsort(found, kind="stable"), 10) if len(p)]
    x, y = (np.array([v[p].mean() for p in parts]) for v in (found, known))
    error = np.array([known[p].std() / np.sqrt(len(p)) for p in parts])
    top = 1.08 * max(x.max(), (y + error).max(), 1e-3)
    ax.plot([0, top], [0, top], color="0.6", lw=0.8, ls="--")
    ax.errorbar(x, y, error, fmt="o", ms=3, lw=1, color=color)
    r = metrics.pearson(known[:, None], found[:, None])[0]
    ax.text(0.04, 0.96, f"r = {r:.2f}\nn = {len(known):,}", transform=ax.transAxes, va="top", fontsize=6)
    ax.set(xlim=(0, top), ylim=(0, top), aspect="equal")
    ax.set_xlabel("imputed, mean per decile", fontsize=6)
    ax.set_ylabel("measured, mean", fontsize=6)
    ax.tick_params(labelsize=6)
    sns.despine(ax=ax)


def _reliability(
    ax: Axes, imputed: AnnData, measured: dict[str, np.ndarray], named: list[str], rows: np.ndarray
) -> None:
    """Draw the reliability of every gene against its correlation, or sorted where nothing was measured."""
    reliability, colors = imputed.var["reliability"], sns.color_palette("colorblind")
    there = [gene for gene in imputed.var_names if gene in measured and not imputed.var.loc[gene, "denoised"]]
    if there:
        found = np.asarray(imputed[rows, there].X)
        y, x = metrics.pearson(np.stack([measured[g][rows] for g in there], 1), found), reliability[there].to_numpy()
        low = min(0.0, np.nanmin(y), x.min())
        ax.plot([low, 1], [low, 1], color="0.6", lw=0.8, ls="--")
        ax.set(
            xlim=(low - 0.02, max(x.max(), np.nanmax(y)) + 0.05), ylim=(low - 0.02, max(x.max(), np.nanmax(y)) + 0.05)
        )
        ax.set_ylabel("r with measured values", fontsize=6)
        ax.set_xlabel("reliability", fontsize=6)
        place = dict(zip(there, zip(x, y)))
    else:
        order = reliability.sort_values(ascending=False)
        x, y = np.arange(len(order)), order.to_numpy()
        ax.set_ylabel("reliability", fontsize=6)
        ax.set_xlabel("genes, sorted by reliability", fontsize=6)
        cast("Any", ax.xaxis.get_major_locator()).set_params(integer=True)
        place = {g: (i, v) for i, (g, v) in enumerate(order.items())}
    ax.plot(x, y, "o", ms=3, color=colors[0], alpha=0.7, mew=0, rasterized=True)
    for gene in named:
        if gene in place:
            ax.plot(*place[gene], "o", ms=4, color=colors[3])
            ax.annotate(gene, place[gene], xytext=(4, 2), textcoords="offset points", fontsize=6)
    ax.tick_params(labelsize=6)
    sns.despine(ax=ax)
