"""What each sample is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like, to_hex
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow.get import niche_composition
from spatiaflow.get._niches import columns_of_cells
from spatiaflow.pl._tissue import finish

GAP = 0.6  # between conditions, in bars


@verb
def composition(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    groupby: str = "niche",
    by: str | None = None,
    condition: str | None = None,
    counts: bool = False,
    table_key: str = "table",
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw which share of each sample's cells lies in each niche: a stacked bar for each sample.

    The number of cells is above each bar. Colours are those of ``.uns[f"{groupby}_colors"]``, as in scanpy. Where there are none,
    they are chosen and kept there.

    Parameters
    ----------
    data
        One object, or a list or dict of objects, whose niches :func:`spatiaflow.tl.cluster_niches` found together.
    groupby
        Categorical column of ``.obs`` with the niches, or with any other groups.
    by
        Column of ``.obs`` that names the sample of each cell; None: each object is a sample, called by its key or place.
    condition
        Column of ``.obs`` that names the condition of each sample. Samples of one condition stand side by side.
    counts
        Draw numbers of cells instead of shares.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into.
    show
        Show the figure; None: when matplotlib is interactive.
    return_fig
        Return the figure instead.

    Returns
    -------
    None, or with ``return_fig=True`` the :class:`matplotlib.figure.Figure`. Sets where it is missing:

    ``.uns[f"{groupby}_colors"]`` : list of str, the colour of each category

    Raises
    ------
    KeyError
        A column is missing.
    ValueError
        The list or dict is empty, no cell has a niche, or a sample has cells of several conditions.

    See Also
    --------
    spatiaflow.get.niche_composition : the numbers.

    Examples
    --------
    >>> tissue = {f"mouse {i}": sf.datasets.simulated_tissue(200, seed=i) for i in range(3)}
    >>> sf.pl.composition(tissue, groupby="niche")
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    _io.text(groupby=groupby, by=by, condition=condition)
    values = niche_composition(data, by=by, key=groupby, counts=counts, table_key=table_key)
    if values.empty:
        raise ValueError(f"no cell has a value in obs[{groupby!r}]{'' if by is None else f' and obs[{by!r}]'}.")
    conditions = _conditions(data, groupby, by, condition, table_key)
    values = values.loc[[name for names in conditions.values() for name in names]]
    place = np.arange(len(values)) + GAP * np.repeat(np.arange(len(conditions)), [len(n) for n in conditions.values()])
    if ax is None:
        _, ax = plt.subplots(figsize=(max(2.4, 0.3 * (place[-1] + 1) + 1.5), 2.4), layout="constrained")
    colors, bottom = _colors(data, groupby, list(values.columns), table_key), np.zeros(len(values))
    for name, color in zip(values.columns, colors):
        height = values[name].to_numpy(float)
        ax.bar(place, height, 0.84, bottom, color=color, edgecolor="white", lw=0.4, label=name)
        bottom += height
    upright = len(place) > 8
    for x, top, n in zip(place, bottom, [values.attrs["n_cells"][name] for name in values.index]):
        ax.annotate(
            f"{n:,}", (x, top), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=5, color="0.35",
            rotation=90 if upright else 0,
        )  # fmt: skip
    ax.set_xticks(place, values.index, fontsize=6, rotation=90 if max(map(len, values.index)) > 5 else 0)
    _name_conditions(ax, conditions, place)
    ax.tick_params(axis="y", labelsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("cells" if counts else "share of cells", fontsize=7)
    ax.set_ylim(0, 1 if not counts else None)
    ax.set_xlim(place[0] - 0.6, place[-1] + 0.6)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(  # in the order of the bars, the first at the bottom
        handles[::-1], labels[::-1], title=groupby, fontsize=6, title_fontsize=6, frameon=False, loc="center left",
        bbox_to_anchor=(1, 0.5), handlelength=1, handleheight=1,
    )  # fmt: skip
    sns.despine(ax=ax, bottom=True)
    return finish(cast("Figure", ax.figure), show, return_fig)


def _conditions(data, groupby: str, by: str | None, condition: str | None, table_key: str) -> dict[str, list[str]]:
    """Names of the samples of each condition, both in the order of their categories."""
    _, sample, group = columns_of_cells(data, [groupby, by, by if condition is None else condition], table_key)
    if condition is None:
        return {"": [name for name in sample.cat.categories if (sample == name).any()]}
    n = pd.crosstab(sample, group)
    if mixed := list(n.index[(n > 0).sum(axis=1) > 1]):
        names = _io.listing(n.columns[n.loc[mixed[0]] > 0])
        raise ValueError(
            f"sample {mixed[0]!r} has cells of several values of obs[{condition!r}]: {names}. A sample has one condition. "
            "Name the column of samples by by=."
        )
    return {name: list(n.index[n[name] > 0]) for name in n.columns}


def _name_conditions(ax: Axes, conditions: Mapping[str, Sequence[str]], place: np.ndarray) -> None:
    """Write the name of each condition over its bars, with a line."""
    if len(conditions) < 2 and "" in conditions:
        return
    start = 0
    for name, samples in conditions.items():
        left, right = place[start] - 0.42, place[start + len(samples) - 1] + 0.42
        start += len(samples)
        across = ax.get_xaxis_transform()
        ax.plot([left, right], [1.13, 1.13], transform=across, color="0.35", lw=0.8, clip_on=False)
        ax.text((left + right) / 2, 1.15, name, transform=across, ha="center", va="bottom", fontsize=7)


def _colors(data, groupby: str, names: Sequence[str], table_key: str) -> list[str]:
    """Return the colour of each group by ``.uns[f"{groupby}_colors"]``; where an object has none, they are kept there."""
    import seaborn as sns
    from scanpy.plotting import palettes

    key, tables = f"{groupby}_colors", [_io.unpack(one, table_key)[1] for one in _io.objects_of(data).values()]
    usual = (
        list(sns.color_palette("colorblind", len(names)))
        if len(names) <= 10
        else next(
            (p for p in (palettes.default_20, palettes.default_28, palettes.default_102) if len(p) >= len(names)), None
        )
    )
    found = dict(zip(names, map(to_hex, usual or sns.color_palette("husl", len(names)))))
    lacking: list[tuple[AnnData, list[str]]] = []
    for table in tables:
        column = table.obs[groupby]
        known = [str(one) for one in column.cat.categories] if isinstance(column.dtype, pd.CategoricalDtype) else []
        stored = list(table.uns.get(key, []))
        if known and len(stored) >= len(known) and all(map(is_color_like, stored)):
            found |= {name: to_hex(color) for name, color in zip(known, stored)}
        elif known and not table.is_view:
            lacking.append((table, known))
    for table, known in lacking:
        table.uns[key] = [found[name] for name in known]
    return [found[name] for name in names]
