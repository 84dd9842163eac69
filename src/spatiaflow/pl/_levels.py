"""Embeddings on the tissue: what each level sees, and which neighbours a cell attends to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow.models.slide import Slide
from spatiaflow.pl._tissue import finish, scale_bar, tissue_panel

EMBEDDING_HELP = "Run sf.tl.embed_spatia(data) first, or give key=..."


@verb
def levels(
    data: AnnData | SpatialData,
    *,
    levels: Sequence[str] | str = ("cell", "niche", "tissue"),
    n_components: int = 2,
    key: str = "X_spatia",
    library_id: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the first principal components of each level of an embedding on the tissue.

    Each panel states the component's share of the level's variance. A component's sign is arbitrary. Colours run from its
    2nd to its 98th percentile.

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
    spatial_key
        Slot of the positions of an AnnData.
    mpp
        µm per unit of the positions, where the data do not state it.
    show
        Show the figure; None shows it when matplotlib is interactive.
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

    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.at_least_one(n_components=n_components)
    _, table = _io.unpack(data, table_key)
    levels = _io.names(levels, "levels") or []
    values = [_io.features(table, Key.obsm.level(key, level), EMBEDDING_HELP) for level in levels]
    slide = _io.one_slide(_io.places(data, where), library_id)
    aspect = np.clip(np.ptp(slide.xy[:, 1]) / max(np.ptp(slide.xy[:, 0]), 1e-9), 0.3, 3)
    figure, axes = plt.subplots(
        n_components, len(levels), figsize=(7.1 / 3 * len(levels), n_components * (7.1 / 3 * aspect + 0.25)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    background = _io.background(data, table, slide)
    for column, (level, x) in enumerate(zip(levels, values)):
        for row, (component, share) in enumerate(zip(*_components(x[slide.rows], n_components))):
            low, high = np.percentile(component, [2, 98])
            tissue_panel(
                axes[row, column], slide, component, vmin=low, vmax=max(high, low + 1e-9), background=background,
                title=f"{level}, component {row + 1} ({share:.0%})",
            )  # fmt: skip
    scale_bar(axes[-1, 0])
    return finish(figure, show, return_fig)


@verb
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
    spatial_key: str = "spatial",
    mpp: float | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the attention of a cell: a darker neighbour weighs more in the cell's niche embedding.

    Weights are means over heads and layers and sum to 1, the cell's own among them. They show where the model looks, not
    what causes what.

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
    spatial_key
        Slot of the positions of an AnnData.
    mpp
        µm per unit of the positions, where the data do not state it.
    show
        Show the figure; None shows it when matplotlib is interactive.
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

    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.positive(radius_um=radius_um)
    _, table = _io.unpack(data, table_key)
    slot = Key.obsp.attention(key)
    if slot not in table.obsp:
        raise KeyError(f"obsp has no {slot!r}. Run sf.tl.embed_spatia(data, attention=True) first.")
    _io.text(cell=cell, color=color)
    if cell not in table.obs_names:
        raise KeyError(f"obs_names has no {cell!r}; it has {', '.join(map(repr, table.obs_names[:3]))}, ...")
    if color is not None and color not in table.obs:
        raise KeyError(f"obs has no {color!r}; it has {', '.join(map(repr, table.obs.columns[:12]))}.")
    row = table.obs_names.get_loc(cell)
    slide = next(s for s in _io.places(data, where) if row in set(s.rows))
    here = slide.xy[np.flatnonzero(slide.rows == row)[0]]
    part = slide.take(np.linalg.norm(slide.xy - here, axis=1) <= radius_um)
    weight = np.asarray(table.obsp[slot][row, part.rows].todense()).ravel()

    size = (5.6 if color else 3.0, 2.7)
    figure, axes = plt.subplots(1, 2 if color else 1, figsize=size, squeeze=False, layout="constrained")
    title = cell if len(cell) <= 24 else f"...{cell[-21:]}"
    points = tissue_panel(axes[0, 0], part, weight, vmin=0, vmax=max(weight.max(), 1e-9), cmap="cividis_r", title=title)
    bar = figure.colorbar(points, ax=axes[0, 0], shrink=0.7, pad=0.02, aspect=18)
    bar.set_label("attention", fontsize=6)
    bar.ax.tick_params(labelsize=6, length=2)
    bar.outline.set_visible(False)
    if color:
        _groups_panel(axes[0, 1], part, table.obs[color].iloc[part.rows], color)
    for ax in axes[0]:
        ax.plot(*here, "o", ms=9, mfc="none", mec="black", mew=1.0)
    scale_bar(axes[0, 0])
    return finish(figure, show, return_fig)


def _components(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """First principal components (n x cells) and their shares of the variance; components that do not exist are left out."""
    from sklearn.decomposition import PCA

    with np.errstate(divide="ignore", invalid="ignore"):  # what does not vary has no shares
        pca = PCA(min(n, *x.shape), random_state=0)
        components = pca.fit_transform(x.astype(np.float64)).T
    return components, np.nan_to_num(pca.explained_variance_ratio_)


def _groups_panel(ax: Axes, slide: Slide, values: pd.Series, title: str) -> None:
    """Draw the group of each cell, with a legend."""
    import seaborn as sns
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    group = values.astype("category").cat.remove_unused_categories()
    names = list(group.cat.categories)
    palette = sns.color_palette("colorblind", len(names))
    limits = {"vmin": -0.5, "vmax": len(names) - 0.5}
    tissue_panel(ax, slide, group.cat.codes, cmap=ListedColormap(palette), title=title, **limits)
    handles = [Line2D([], [], marker="o", ls="", ms=4, color=c, label=n) for n, c in zip(names, palette)]
    ax.legend(handles=handles, fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
