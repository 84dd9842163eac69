"""Pairs of a transition on the tissue."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import warn
from spatiaflow.pl._tissue import SEQUENTIAL, finish, scale_bar, tissue_panel, violin


@verb
def pairs(
    data: AnnData | SpatialData,
    transition: str | None = None,
    *,
    n: int = 100,
    library_id: str | None = None,
    key: str = "transition",
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw pairs of cells on the tissue, and the confidence of the pairs in each niche.

    Left: all cells in grey, and lines from sources (dots) to their targets, coloured by confidence. The pairs are evenly spaced
    over the tissue. Right: the distribution of confidence in each niche, with median and quartiles.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.pair_transitions` wrote into.
    transition
        Such as "A -> B". May be None where there is only one.
    n
        Largest number of pairs that are drawn.
    library_id
        The slide. None: the first.
    key
        ``key_added`` of :func:`spatiaflow.tl.pair_transitions`.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Slot of the positions of an AnnData, and µm per unit of the positions where the data do not say.
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
        There are no pairs, or no such transition or slide.
    ValueError
        Several transitions and none is named, no pair lies on the slide, or all name rows that the table no longer has.

    Warns
    -----
    UserWarning
        Rows were dropped since they were paired. Their pairs are not drawn.

    Examples
    --------
    >>> sf.pl.pairs(sdata)
    """
    import matplotlib.pyplot as plt

    _io.at_least_one(n=n)
    _, table = _io.unpack(data, table_key)
    if Key.uns.pairs(key) not in table.uns:
        raise KeyError(
            f"uns has no {Key.uns.pairs(key)!r}; run sf.tl.pair_transitions(data, transitions=..., groupby=...) first."
        )
    found = table.uns[Key.uns.pairs(key)]
    known = list(dict.fromkeys(found["transition"]))
    if transition is None and len(known) > 1:
        raise ValueError(f"there are {len(known)} transitions: give one of {', '.join(map(repr, known))}.")
    if transition is not None and transition not in known:
        raise KeyError(f"there is no transition {transition!r}; there are {', '.join(map(repr, known))}.")
    transition = transition or known[0]
    found = found[found["transition"] == transition]
    where = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    slide = _io.one_slide(_io.places(data, where), library_id)
    place = np.full(table.n_obs, -1)
    place[slide.rows] = np.arange(len(slide.rows))
    found = _of_known_rows(table, found, transition)
    ends = np.stack([place[table.obs_names.get_indexer(found[side])] for side in ("source", "target")], 1)
    here = (ends >= 0).all(1)
    if not here.any():
        raise ValueError(f"no pair of {transition!r} lies on slide {slide.name!r}.")
    found, ends = found[here], ends[here]
    order = np.lexsort(slide.xy[ends[:, 0]].T)  # from side to side
    drawn = order[np.unique(np.linspace(0, len(order) - 1, min(n, len(order))).astype(int))]
    sure = found["confidence"].to_numpy(float)
    limit = max(float(sure.max()), 1e-9)

    figure, axes = plt.subplots(
        1, 2, figsize=(6.2, 2.9), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1.0]}
    )
    tissue_panel(axes[0], slide, np.full(len(slide.xy), 0.2), vmin=0, vmax=1, cmap="Greys", title=transition)
    drawn = drawn[np.argsort(sure[drawn], kind="stable")]  # the highest confidence on top
    lines = LineCollection(slide.xy[ends[drawn]], array=sure[drawn], cmap=SEQUENTIAL, linewidths=0.7, alpha=0.9)
    lines.set_clim(0, limit)
    axes[0].add_collection(lines)
    x, y = slide.xy[ends[drawn, 0]].T
    axes[0].scatter(x, y, s=5, c=sure[drawn], cmap=SEQUENTIAL, vmin=0, vmax=limit, linewidths=0, zorder=3)
    bar = figure.colorbar(lines, ax=axes[0], shrink=0.7, pad=0.02, aspect=18)
    bar.set_label("confidence", fontsize=6)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    scale_bar(axes[0])
    _by_niche(axes[1], found, limit)
    return finish(figure, show, return_fig)


def _of_known_rows(table: AnnData, found: pd.DataFrame, transition: str) -> pd.DataFrame:
    """Pairs whose source and target are rows of the table: rows may have been dropped since they were paired."""
    known = found["source"].isin(table.obs_names) & found["target"].isin(table.obs_names)
    if known.all():
        return found
    gone = (
        f"{int((~known).sum())} of {len(found)} pairs of {transition!r} name rows that obs_names no longer has (first: "
        f"{found.loc[~known, ['source', 'target']].iloc[0].tolist()})"
    )
    again = "Run sf.tl.pair_transitions(data, ...) once more to pair the rows that are left."
    if not known.any():
        raise ValueError(f"{gone}. {again}")
    warn(f"{gone}; they are not drawn. {again}")
    return found[known]


def _by_niche(ax: Axes, found: pd.DataFrame, limit: float) -> None:
    """Draw a horizontal violin for each niche, with median and quartiles."""
    names = sorted(found["niche"].unique())
    for y, name in enumerate(names):
        violin(ax, y, found.loc[found["niche"] == name, "confidence"].to_numpy(float))
    labels = [f"{name or 'whole table'} ({(found['niche'] == name).sum():,})" for name in names]
    ax.set_yticks(range(len(names)), labels, fontsize=6)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, limit * 1.02)
    ax.set_xlabel("confidence", fontsize=7)
    ax.tick_params(axis="x", labelsize=6, length=2)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
