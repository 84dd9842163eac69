"""Generated cells beside their source cells and beside real cells of the target state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import resolve_seed
from spatiaflow.pl._crops import COLOURS
from spatiaflow.pl._profile import _label
from spatiaflow.pl._tissue import finish, scale_bar, violin


@verb
def transition(
    data: AnnData,
    targets: np.ndarray | None = None,
    *,
    n: int = 8,
    channels: Sequence[str] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.8),
    random_state: int | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw source cells, the images generated from them, and real cells of the target state.

    Each column is a cell, chosen at random. Of several doses all are drawn, and of several samples the first. The real targets in
    the last row are other cells, which do not belong to their column. All pictures have one contrast.

    Parameters
    ----------
    data
        Result of :func:`spatiaflow.tl.generate_morphology`.
    targets
        Images of real cells of the target state, n x channels x pixels x pixels, such as
        ``sf.pp.crops(sdata, crop_um=..., crop_pixels=...).read(rows)``.
    n
        Number of cells.
    channels
        Names of the channels to draw, at most 7. None: all.
    percentiles
        Percentiles of each channel over source cells and targets that are drawn black and in full colour.
    random_state
        Seed of the choice; None: ``settings.seed``.
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
        ``data`` holds no generated images, or a channel is unknown.
    TypeError
        ``data`` is not one AnnData.
    ValueError
        More channels than can be told apart, or targets of another shape.

    Examples
    --------
    >>> images = {"image_key": "fluorescence"}
    >>> made = sf.tl.generate_morphology(sdata, source="A", target="B", model="morphology-simulated-small", **images)
    >>> real = sf.pp.crops(sdata, crop_um=16, crop_pixels=32, **images).read(np.flatnonzero(sdata["table"].obs["state"] == "B"))
    >>> sf.pl.transition(made, real, n=4)
    """
    import matplotlib.pyplot as plt

    data = _io.unpack(data)[1]
    used, names, palette = _channels(data, channels)
    mpp, doses = float(data.uns["morphology"]["mpp"]), sorted(data.obs["dose"].unique())
    rng = np.random.default_rng(resolve_seed(random_state))
    kept = np.flatnonzero(data.obs["sample"] == 0)
    at = {dose: kept[(data.obs["dose"].iloc[kept] == dose).to_numpy()] for dose in doses}
    chosen = np.sort(rng.permutation(len(at[doses[0]]))[:n])
    rows = {"source": data.obsm["source"][at[doses[0]][chosen]]}
    for dose in doses:
        label = "generated" if len(doses) == 1 else f"dose {dose:.2g}"
        rows[label] = data.obsm["image"][at[dose][chosen]]
    if targets is not None:
        targets = np.asarray(targets)
        if targets.shape[1:] != data.obsm["image"].shape[1:]:
            raise ValueError(f"targets must be n x {data.obsm['image'].shape[1:]}; they are {targets.shape}.")
        rows["real targets"] = targets[np.sort(rng.permutation(len(targets))[:n])]
    low, high = _contrast(
        np.concatenate([rows["source"], rows.get("real targets", rows["source"])])[:, used], percentiles
    )

    size, reach = min(0.85, 6.3 / n), data.obsm["image"].shape[-1] * mpp / 2
    figure, axes = plt.subplots(
        len(rows), n, figsize=(size * n + 0.8, size * len(rows) + 0.5), squeeze=False, layout="constrained",
        gridspec_kw={"wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    for line, (name, images) in zip(axes, rows.items()):
        for ax, image in zip(line, images):
            ax.imshow(_coloured(image[used], low, high, palette), extent=(-reach, reach, reach, -reach))
            ax.set(xlim=(-reach, reach), ylim=(reach, -reach))
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
    scale_bar(axes[-1, 0])
    _legend(figure, names, palette, str(data.obs["transition"].iloc[0]))
    return finish(figure, show, return_fig)


def _channels(data: AnnData, channels: Sequence[str] | None) -> tuple[list[int], list[str], np.ndarray]:
    """Return places, names and colours (n x 3) of the channels to draw of a result of generate_morphology."""
    if "image" not in data.obsm or "morphology" not in data.uns:
        raise KeyError("obsm has no 'image'. Give the result of sf.tl.generate_morphology(...).")
    known = [*map(str, data.uns["morphology"]["channels"])]
    names = _io.names(channels, "channels") or known
    if missing := [name for name in names if name not in known]:
        raise KeyError(f"there is no channel {missing[0]!r}; there are {', '.join(known)}.")
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} channels are too many for one picture; choose up to {len(COLOURS)}.")
    used = [known.index(name) for name in names]
    few = len(known) <= len(COLOURS)
    colours = ["#FFFFFF"] if len(used) == 1 else [COLOURS[i] for i in used] if few else COLOURS[: len(used)]
    return used, names, np.array([to_rgb(colour) for colour in colours])


def _contrast(images: np.ndarray, percentiles: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return what is drawn black and in full colour in each channel (n x C x p x p)."""
    low, high = np.percentile(images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1), percentiles, axis=1)
    return low, np.maximum(high, low + 1e-9)


def _coloured(image: np.ndarray, low: np.ndarray, high: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return an image (C x p x p) as RGB (p x p x 3)."""
    light = np.clip((image - low[:, None, None]) / (high - low)[:, None, None], 0, 1)
    return np.clip(np.einsum("cyx,cr->yxr", light, palette), 0, 1)


def _legend(figure: Figure, names: Sequence[str], palette: np.ndarray, title: str) -> None:
    """Say above a figure what its colours are."""
    handles = [Patch(facecolor=c, edgecolor="0.3", linewidth=0.5, label=name) for c, name in zip(palette, names)]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), fontsize=6, frameon=False, handlelength=1,
        handleheight=1, title=title, title_fontsize=7,
    )  # fmt: skip


@verb
def morphology_dose(
    data: AnnData,
    *,
    cell: str | None = None,
    channels: Sequence[str] | None = None,
    percentiles: tuple[float, float] = (1.0, 99.8),
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw a cell under edits, towards states or by genes, at increasing doses.

    Each row is an edit, each column a dose; a dose of 0 is the cell as it is. Beside each row stands the change of the nuclear
    area from the lowest to the highest dose, as a mean over all cells. Of several samples the first is drawn and measured. All
    pictures have one contrast.

    Parameters
    ----------
    data
        Result of :func:`spatiaflow.tl.generate_morphology` with several doses; or several such results, one an edit, joined by
        ``anndata.concat(results, uns_merge="first", index_unique="-")``.
    cell
        Name of the source cell. None: the first.
    channels
        Names of the channels to draw, at most 7. None: all.
    percentiles
        Percentiles of each channel that are drawn black and in full colour.
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
        ``data`` holds no generated images, or a channel or the cell is unknown.
    TypeError
        ``data`` is not one AnnData.
    ValueError
        There is one dose only, edits differ in doses, the cell has not one image of each, or there are more channels than can
        be told apart.

    Examples
    --------
    >>> made = sf.tl.generate_morphology(
    ...     sdata, source="A", target="B", model="morphology-simulated-small", dose=[0.2, 0.6, 1], image_key="fluorescence"
    ... )
    >>> sf.pl.morphology_dose(made)
    """
    import matplotlib.pyplot as plt

    data = _io.unpack(data)[1]
    used, names, palette = _channels(data, channels)
    edits = [data[(data.obs["transition"] == one).to_numpy()] for one in data.obs["transition"].unique()]
    doses = sorted(data.obs["dose"].unique())
    if len(doses) < 2 or any(sorted(one.obs["dose"].unique()) != doses for one in edits):
        raise ValueError("every edit needs the same doses, two or more: generate_morphology(..., dose=[0, 0.5, 1]).")
    cell = str(data.obs["source_cell"].iloc[0]) if cell is None else cell
    lines = []
    for one in edits:
        here = ((one.obs["source_cell"] == cell) & (one.obs["sample"] == 0)).to_numpy()
        if not here.any():
            there = ", ".join(one.obs["source_cell"].unique()[:3])
            raise KeyError(f"no image was generated of the cell {cell!r}; there are {there}, ...")
        if sorted(one.obs["dose"][here]) != doses:
            raise ValueError(
                f"the cell {cell!r} has {here.sum()} images for {len(doses)} doses: rows were dropped, or results of cells with "
                "equal names were joined. Give the whole result of one sample."
            )
        lines.append(one.obsm["image"][np.flatnonzero(here)[np.argsort(one.obs["dose"][here])]][:, used])
    low, high = _contrast(np.concatenate(lines), percentiles)
    reach = data.obsm["image"].shape[-1] * float(data.uns["morphology"]["mpp"]) / 2
    figure, axes = plt.subplots(
        len(edits), len(doses), figsize=(0.85 * len(doses) + 2.6, 0.85 * len(edits) + 0.7), squeeze=False,
        layout="constrained", gridspec_kw={"wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    for line, one, images in zip(axes, edits, lines):
        for ax, image in zip(line, images):
            ax.imshow(_coloured(image, low, high, palette), extent=(-reach, reach, reach, -reach))
            ax.set_axis_off()
        line[0].text(
            -0.08, 0.5, one.obs["transition"].iloc[0], transform=line[0].transAxes, ha="right", va="center", fontsize=7
        )
        if "area_um2" in one.var_names:
            first = one[(one.obs["sample"] == 0).to_numpy()]
            area = first.to_df()["area_um2"].groupby(first.obs["dose"].to_numpy()).mean()
            change = f"area {100 * (area.iloc[-1] / area.iloc[0] - 1):+.0f} %"
            line[-1].text(1.08, 0.5, change, transform=line[-1].transAxes, ha="left", va="center", fontsize=6)
    for ax, dose in zip(axes[0], doses):
        ax.set_title(f"{dose:.2g}", fontsize=7, pad=2)
    scale_bar(axes[-1, 0])
    _legend(figure, names, palette, f"dose, {cell}")
    return finish(figure, show, return_fig)


@verb
def profile_shift(
    data: AnnData,
    *,
    source: pd.DataFrame,
    target: pd.DataFrame,
    features: Sequence[str] | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the morphology of generated cells between that of real sources and of real targets.

    Each is a violin with median and quartiles. All are measured on images in the same way. Of several doses each has a violin,
    and of several samples the first is drawn.

    Parameters
    ----------
    data
        Result of :func:`spatiaflow.tl.generate_morphology`.
    source, target
        Profiles of real cells of both states by :func:`spatiaflow.pp.image_profile`.
    features
        Features to draw. None: the six whose means differ most between source and target, in standard deviations.
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
        A feature is missing.
    TypeError
        ``data`` is not one AnnData.

    Examples
    --------
    >>> images = {"image_key": "fluorescence"}
    >>> made = sf.tl.generate_morphology(sdata, source="A", target="B", model="morphology-simulated-small", **images)
    >>> profile = sf.pp.image_profile(sf.pp.crops(sdata, crop_um=16, crop_pixels=32, **images))
    >>> state = sdata["table"].obs["state"].to_numpy()
    >>> sf.pl.profile_shift(made, source=profile[state == "A"], target=profile[state == "B"])
    """
    import matplotlib.pyplot as plt

    data = _io.unpack(data)[1]
    data = data[(data.obs["sample"] == 0).to_numpy()]
    shared = [name for name in data.var_names if name in source and name in target]
    features = _io.names(features, "features")
    if features is None:
        spread = pd.concat([source[shared], target[shared]]).std().replace(0, np.inf)
        change = (target[shared].mean() - source[shared].mean()).abs() / spread
        features = list(change.sort_values(ascending=False, kind="stable").index[:6])
    if missing := [name for name in features if name not in shared]:
        raise KeyError(f"there is no feature {missing[0]!r}; there are {', '.join(shared)}.")
    made = {f"dose {dose:.2g}": values for dose, values in data.to_df().groupby(data.obs["dose"].to_numpy())}
    made = made if len(made) > 1 else {"generated": data.to_df()}
    samples = {"source": source} | made | {"target": target}
    columns = min(3, len(features))
    lines = -(-len(features) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(2.3 * columns + 0.4, (0.5 + 0.25 * len(samples)) * lines),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(features) :]:
        ax.set_axis_off()
    for i, (ax, feature) in enumerate(zip(axes.flat, features)):
        whole = pd.concat([values[feature] for values in samples.values()]).dropna()
        low, high = whole.quantile([0.005, 0.995])
        for y, (name, values) in enumerate(samples.items()):
            own = values[feature].dropna().clip(low, high).to_numpy(float)
            violin(ax, y, own, "#56B4E9" if name in made else "0.8")
        labels = [f"{name} ({len(values):,})" for name, values in samples.items()]
        ax.set_yticks(range(len(labels)), labels if i % columns == 0 else [""] * len(labels), fontsize=6)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlabel(_label(feature, unit=True), fontsize=7)
        ax.tick_params(axis="x", labelsize=6, length=2)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
    return finish(figure, show, return_fig)
