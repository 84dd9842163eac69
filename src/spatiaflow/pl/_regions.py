"""Means of regions, and differences between them, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish

NEEDED = ("region", "mean", "lower", "upper", "trusted")
MAX_PANELS, MAX_ROWS = 12, 100
UNTRUSTED = "0.6"


@verb
def regions(
    data: pd.DataFrame,
    *,
    genes: Sequence[str] | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw means of regions or differences between them as dots, with the interval of each as a line.

    With several regions there is one panel for each gene or set of genes, and a row for each region. With one region, or one
    difference, all genes are rows of one panel, in the order of their means. What is not trusted is hollow and grey. Differences
    have a line at zero: an interval that excludes it says that the regions differ.

    Parameters
    ----------
    data
        Table of :func:`spatiaflow.tl.summarize_expression`, or some rows of it. Samples have colours.
    genes
        Genes or sets to draw, in this order; all of them when None.
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
        A column is missing, or a gene has no row.
    TypeError
        ``data`` is not a DataFrame.
    ValueError
        There are no rows, more than 12 genes with several regions each, more than 100 rows in a panel, or several rows for one
        region, gene and sample.

    Examples
    --------
    >>> x = adata.obsm["spatial"][:, 0]
    >>> adata.obs["side"] = np.where(x > np.median(x), "right", "left")
    >>> table = sf.tl.summarize_expression(adata, model=model, groupby="side", n_samples=20)
    >>> sf.pl.regions(table)
    """
    import matplotlib.pyplot as plt

    kind = _check(data)
    names = _io.names(genes, "genes") or list(dict.fromkeys(data[kind]))
    if missing := [name for name in names if name not in set(data[kind])]:
        raise KeyError(f"data has no {kind} {missing[0]!r} (genes); it has {_io.listing(data[kind].unique())}.")
    data = data[data[kind].isin(names)]
    samples = list(dict.fromkeys(data["sample"])) if "sample" in data else [""]
    rows = list(dict.fromkeys(data["region"]))
    panels = [(name, data[data[kind] == name], "region") for name in names]
    if len(rows) == 1:
        order = data.groupby(kind)["mean"].mean().sort_values(ascending=False).index
        panels = [(rows[0], data, kind)]
        rows = list(names if genes is not None else order)
    if len(panels) > MAX_PANELS or len(rows) > MAX_ROWS:
        raise ValueError(
            f"data has {len(names)} genes or sets and {len(rows)} rows each; a figure shows {MAX_PANELS} panels of at most "
            f"{MAX_ROWS} rows. Name some with genes=."
        )
    n_columns = min(2, len(panels))
    n_lines = -(-len(panels) // n_columns)
    height = len(rows) * (0.07 + 0.08 * len(samples)) + 0.32
    size = (3.54, n_lines * height + 0.5)
    figure, axes = plt.subplots(n_lines, n_columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for ax, (title, part, column) in zip(axes.flat, panels):
        _panel(ax, part, column, rows, samples, difference=_is_difference(data), title=title)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel(_label(data), fontsize=7)
    if handles := _handles(data, samples):
        figure.legend(
            handles=handles, loc="outside upper center", ncols=min(len(handles), 3), fontsize=6, frameon=False
        )
    return finish(figure, show, return_fig)


def _check(data: pd.DataFrame) -> str:
    """Refuse what is no table of regions; return the column that names genes or sets."""
    if not isinstance(data, pd.DataFrame):
        raise TypeError(f"data must be one DataFrame, of sf.tl.summarize_expression, not {type(data).__name__}.")
    kind = "gene_set" if "gene_set" in data else "gene"
    if missing := [name for name in (*NEEDED, kind) if name not in data]:
        raise KeyError(
            f"data has no column {missing[0]!r}; it has {_io.listing(data.columns)}. Give the table of "
            "sf.tl.summarize_expression."
        )
    if not len(data):
        raise ValueError("data has no rows.")
    keys = [name for name in ("sample", "region", kind) if name in data]
    if (twice := data.duplicated(keys)).any():
        row = data.loc[twice, keys].iloc[0].tolist()
        raise ValueError(f"data has several rows of {', '.join(map(repr, row))}; draw one table at a time.")
    return kind


def _is_difference(data: pd.DataFrame) -> bool:
    return bool(data.attrs.get("contrast"))


def _label(data: pd.DataFrame) -> str:
    """What the axis shows, as far as the table says so."""
    what = "difference of mean log1p expression" if _is_difference(data) else "mean log1p expression"
    return f"{what}, {data.attrs['level']:.0%} interval" if "level" in data.attrs else what


def _panel(
    ax: Axes, data: pd.DataFrame, column: str, rows: list[str], samples: list[str], *, difference: bool, title: str
) -> None:
    """Draw one panel: a row for each region or gene, from top to bottom, and in it one dot for each sample."""
    if difference:
        ax.axvline(0, color="0.4", lw=0.8, zorder=0)
    offsets = (np.arange(len(samples)) + 0.5) / len(samples) * 0.7 - 0.35 if len(samples) > 1 else np.zeros(1)
    for sample, offset, colour in zip(samples, offsets, _colours(samples)):
        part = data[data["sample"] == sample] if "sample" in data else data
        for trusted, shade, face in ((True, colour, colour), (False, UNTRUSTED, "white")):
            own = part[part["trusted"].astype(bool) == trusted]
            y = [rows.index(name) + offset for name in own[column]]
            ax.hlines(y, own["lower"], own["upper"], color=shade, lw=1.1, zorder=2)
            edge = colour if len(samples) > 1 else shade
            ax.plot(own["mean"], y, "o", ms=3.6, mec=edge, mfc=face, mew=0.9, zorder=3)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(labelsize=6, length=2)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", color="0.93", lw=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.06)
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(title, fontsize=7, pad=3)
    sns.despine(ax=ax, left=True)


def _colours(samples: list[str]) -> list:
    return sns.color_palette("colorblind", len(samples))


def _handles(data: pd.DataFrame, samples: list[str]) -> list[Line2D]:
    """Entries of the legend: samples, and what is not trusted."""
    dot: dict[str, Any] = {"marker": "o", "ms": 3.6, "lw": 1.1, "mew": 0.9}
    out = []
    if len(samples) > 1:
        out = [Line2D([], [], color=c, label=name, **dot) for name, c in zip(samples, _colours(samples))]
    if not data["trusted"].astype(bool).all():
        out.append(Line2D([], [], color=UNTRUSTED, mfc="white", label="not trusted", **dot))
    return out
