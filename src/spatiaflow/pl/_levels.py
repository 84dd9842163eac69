"""Embeddings on the tissue: what each level sees, and whom a cell attends to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow.pl._tissue import finish, scale_bar, tissue_panel

EMBEDDING_HELP = "Run sf.tl.embed_spatia(data) first, or give key=..."


def levels(
    data: AnnData | SpatialData,
    *,
    levels: Sequence[str] = ("cell", "niche", "tissue"),
    n_components: int = 2,
    key: str = "X_spatia",
    library_id: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the levels of an embedding on the tissue, as their first principal components.

    The share of the level's variance is written in each panel. A component's sign is arbitrary; colours run from its 2nd
    to its 98th percentile.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.embed_spatia` wrote into.
    levels
        Levels, one a column.
    n_components
        Components, one a row.
    key
        Slot of the embedding, without the level.
    library_id
        Slide to draw; the first when None.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    mpp
        µm per unit of the positions, where the data do not say.
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
        A level or the slide is missing.

    Examples
    --------
    >>> fig = sf.pl.levels(sdata, return_fig=True)
    >>> fig.savefig("levels.png", dpi=100)
    """
    import matplotlib.pyplot as plt

    _, table = _io.unpack(data, table_key)
    levels = [levels] if isinstance(levels, str) else list(levels)
    values = [_io.features(table, f"{key}_{level}", EMBEDDING_HELP) for level in levels]
    slide = _slide(data, library_id, table_key, shapes_key, labels_key, library_key, mpp)
    aspect = np.clip(np.ptp(slide.xy[:, 1]) / max(np.ptp(slide.xy[:, 0]), 1e-9), 0.3, 3)
    figure, axes = plt.subplots(
        n_components, len(levels), figsize=(7.1 / 3 * len(levels), n_components * (7.1 / 3 * aspect + 0.25)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, (level, x) in enumerate(zip(levels, values)):
        centred = x[slide.rows].astype(np.float64)
        centred -= centred.mean(0)
        _, singular, directions = np.linalg.svd(centred.T @ centred)
        share = singular / max(singular.sum(), 1e-12)
        for row in range(n_components):
            component = centred @ directions[row]
            low, high = np.percentile(component, [2, 98])
            title = f"{level}, component {row + 1} ({share[row]:.0%})"
            tissue_panel(
                axes[row, column], slide, component, vmin=low, vmax=max(high, low + 1e-9),
                background=_io.background(data, table, slide), title=title,
            )  # fmt: skip
    scale_bar(axes[-1, 0])
    return finish(figure, show, return_fig)


def attention(
    data: AnnData | SpatialData,
    cell: str,
    *,
    color: str | None = None,
    radius_um: float = 60.0,
    key: str = "X_spatia",
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw whom a cell attends to: itself and its neighbours, the darker the more they weigh in its niche embedding.

    Weights are means over heads and layers and sum to 1. They say where the model looks, not what causes what.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.embed_spatia` wrote into with ``attention=True``.
    cell
        Its name in ``.obs_names``.
    color
        Categorical column of ``.obs``: a second panel shows it for the same cells.
    radius_um
        How far around the cell to draw.
    key
        Slot of the embedding.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    mpp
        µm per unit of the positions, where the data do not say.
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
        The cell, the column, or ``.obsp[f"{key}_attention"]`` is missing.

    Examples
    --------
    >>> sf.tl.embed_spatia(sdata, modalities="image", image_key="fluorescence", attention=True)
    >>> sf.pl.attention(sdata, "cell_150", color="cell_type")
    """
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    _, table = _io.unpack(data, table_key)
    slot = f"{key}_attention"
    if slot not in table.obsp:
        raise KeyError(f"obsp has no {slot!r}; run sf.tl.embed_spatia(data, attention=True) first.")
    if cell not in table.obs_names:
        raise KeyError(f"obs_names has no {cell!r}; it has {', '.join(map(repr, table.obs_names[:3]))}, ...")
    if color is not None and color not in table.obs:
        raise KeyError(f"obs has no {color!r}; it has {', '.join(map(repr, table.obs.columns[:12]))}.")
    row = table.obs_names.get_loc(cell)
    found = _io.slides(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key, mpp=mpp
    )
    slide = next(s for s in found if row in set(s.rows))
    here = slide.xy[np.flatnonzero(slide.rows == row)[0]]
    near = np.flatnonzero(np.linalg.norm(slide.xy - here, axis=1) <= radius_um)
    part = slide.take(near)
    weight = np.asarray(table.obsp[slot][row, part.rows].todense()).ravel()

    figure, axes = plt.subplots(
        1, 2 if color else 1, figsize=(5.6 if color else 3.0, 2.7), squeeze=False, layout="constrained"
    )
    title = cell if len(cell) <= 24 else f"...{cell[-21:]}"
    points = tissue_panel(axes[0, 0], part, weight, vmin=0, vmax=max(weight.max(), 1e-9), cmap="cividis_r", title=title)
    bar = figure.colorbar(points, ax=axes[0, 0], shrink=0.7, pad=0.02, aspect=18)
    bar.set_label("attention", fontsize=6)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    if color:
        group = table.obs[color].astype("category").iloc[part.rows].cat.remove_unused_categories()
        names = list(group.cat.categories)
        palette = sns.color_palette("colorblind", len(names))
        tissue_panel(
            axes[0, 1],
            part,
            group.cat.codes,
            vmin=-0.5,
            vmax=len(names) - 0.5,
            cmap=ListedColormap(palette),
            title=color,
        )
        handles = [Line2D([], [], marker="o", ls="", ms=4, color=c, label=n) for n, c in zip(names, palette)]
        axes[0, 1].legend(handles=handles, fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for ax in axes[0]:
        ax.plot(*here, "o", ms=9, mfc="none", mec="black", mew=1.0)
    scale_bar(axes[0, 0])
    return finish(figure, show, return_fig)


def _slide(data, library_id, table_key, shapes_key, labels_key, library_key, mpp):
    found = _io.slides(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key, mpp=mpp
    )
    return _io.one_slide(found, library_id)
