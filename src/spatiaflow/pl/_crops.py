"""A gallery of cells, one row per group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import resolve_seed
from spatiaflow.pl._tissue import finish, scale_bar

# light colours of Okabe and Ito for a black background, distinct with any colour vision: blue, orange, green, purple,
# yellow, red
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#FFFFFF")
SAMPLE, SAMPLE_PIXELS = 12, 512  # windows around cells whose pixels set the contrast


@verb
def crops(
    data: AnnData | SpatialData,
    groupby: str | None = None,
    *,
    groups: Sequence[str] | None = None,
    n: int = 8,
    crop_um: float = 25.0,
    channels: Sequence[str] | str | None = None,
    outline: bool | None = None,
    percentiles: tuple[float, float] = (1.0, 99.8),
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    random_state: int | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw randomly chosen cells of each group as they look in the image.

    Channels are added in colours that are distinct with any colour vision. The contrast of a channel is the same in all
    crops of a slide. One channel is drawn in grey, an H&E picture as it is. Only parts of the image are read.

    Parameters
    ----------
    data
        Object with an image, as for :func:`spatiaflow.pp.encode_patches`.
    groupby
        Column of ``.obs``, one row per group; None draws one row of all cells.
    groups
        Groups to draw, in this order; None draws all.
    n
        Cells of each group.
    crop_um
        Width of a crop, µm.
    channels
        Names of the channels to draw, at most 7; None draws all.
    outline
        Draw the outline of the cell's polygon or label; None draws it where the data have them.
    percentiles
        Percentiles of a channel that are drawn black and in full colour, over the pixels around some cells of the slide.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData; ``image_key`` may be omitted where one image shares the cells' coordinate system.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when the data do not state it.
    random_state
        Seed of the choice; None: ``settings.seed``.
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
        The column, a group, a channel or the image is missing.
    ValueError
        More than 7 channels, no cell in the image, or an outline of cells without masks.

    Examples
    --------
    >>> sf.pl.crops(sdata, "cell_type", n=4, image_key="fluorescence")
    """
    import matplotlib.pyplot as plt

    where = _io.Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.positive(crop_um=crop_um)
    _io.at_least_one(n=n)
    if outline and isinstance(data, AnnData):
        raise ValueError("outline=True needs polygons or labels of a SpatialData; an AnnData has none.")
    groups = _io.names(groups, "groups")
    _, table = _io.unpack(data, table_key)
    slides = _io.places(data, where, missing=True)
    found = [_Pictures(data, table, slide, image_key, channels, crop_um, percentiles) for slide in slides]
    rows = _choose(table, found, groupby, groups, n, np.random.default_rng(resolve_seed(random_state)))
    outline = isinstance(data, SpatialData) if outline is None else outline

    columns = max(len(members) for members in rows.values())
    margin = 0.15 + 0.055 * max(len(name) for name in rows)  # inches for the names of the groups
    size = min(0.85, (7.1 - margin) / columns)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + margin, size * len(rows) + 0.4), squeeze=False, layout="constrained",
        gridspec_kw={"wspace": 0.02, "hspace": 0.02},
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    # cells near each other are read one after the other
    places = [(*member, ax) for line, members in zip(axes, rows.values()) for member, ax in zip(members, line)]
    for pictures, row, ax in sorted(places, key=lambda place: (found.index(place[0]), place[0].tile(place[1]))):
        pictures.draw(ax, row, outline)
    for line, name in zip(axes, rows):
        line[0].text(-0.08, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
    scale_bar(axes[-1, 0])
    if groupby is not None:
        figure.supylabel(groupby, fontsize=7)
    if legend := found[0].legend():
        figure.legend(
            handles=[Patch(facecolor=colour, edgecolor="0.3", linewidth=0.5, label=name) for name, colour in legend],
            loc="outside upper center", ncols=len(legend), fontsize=6, frameon=False, handlelength=1, handleheight=1,
        )  # fmt: skip
    return finish(figure, show, return_fig)


def _choose(table, found, groupby, groups, n, rng) -> dict:
    """Choose rows: group -> [(pictures of the slide, row in the slide)], whole crops before those that the border cuts."""
    owner, row_of = np.full(table.n_obs, -1), np.full(table.n_obs, -1)
    whole = np.zeros(table.n_obs, bool)
    for i, pictures in enumerate(found):
        rows = pictures.slide.rows
        inside, uncut = pictures.inside()
        owner[rows[inside]], row_of[rows[inside]], whole[rows] = i, np.flatnonzero(inside), uncut
    if not (owner >= 0).any():
        raise ValueError("no cell lies in its image. Check the transformations of cells and image, or mpp=.")
    if groupby is None:
        members = {"": np.arange(table.n_obs)}
    else:
        column = _io.groups(table, groupby)
        if missing := [name for name in groups or [] if name not in column.cat.categories]:
            raise KeyError(
                f"obs[{groupby!r}] has no group {missing[0]!r}; it has {', '.join(map(str, column.cat.categories))}."
            )
        names = column.cat.categories if groups is None else groups
        members = {str(name): np.flatnonzero(column == name) for name in names}
    chosen = {}
    for name, rows in members.items():
        rows = rng.permutation(rows[owner[rows] >= 0])
        rows = rows[np.argsort(~whole[rows], kind="stable")][:n]
        if len(rows):
            chosen[name] = [(found[owner[row]], int(row_of[row])) for row in rows]
    return chosen


class _Pictures:
    """The image of a slide, with its channels, colours and contrast."""

    def __init__(self, data, table, slide, image_key, channels, crop_um, percentiles):
        image = _io.slide_image(data, slide, image_key=image_key)
        self.slide, self.percentiles = slide, percentiles
        self.pixels, first, factor = _io.open_image(image.source, image.channels_first)
        self.xy, self.mpp, self.first = image.xy / factor, image.mpp * factor, first
        self.shape = self.pixels.shape if first else (self.pixels.shape[2], *self.pixels.shape[:2])  # c, y, x
        self.half = crop_um / 2 / self.mpp
        names = list(image.channels) or [str(c) for c in range(self.shape[0])]
        self.is_rgb = image.is_rgb(self.shape[0]) and channels is None
        if self.is_rgb:
            self.pixels = _io.as_uint8(self.pixels, image.name)
        channels = _io.names(channels, "channels") or names
        if missing := [name for name in channels if str(name) not in names]:
            raise KeyError(f"image {image.name!r} has no channel {missing[0]!r}; it has {', '.join(names)}.")
        if len(channels) > len(COLOURS) and not self.is_rgb:
            raise ValueError(
                f"{len(channels)} channels are too many for one picture; choose up to {len(COLOURS)} with channels= from "
                f"{', '.join(names)}."
            )
        self.names, self.used = [str(name) for name in channels], [names.index(str(name)) for name in channels]
        self.source = data, table, slide, image

    def inside(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows whose centre lies in the image, and rows whose crop does as a whole."""
        size = np.array(self.shape[:0:-1])
        centre = ((self.xy >= 0) & (self.xy < size)).all(1)
        return centre, ((self.xy >= self.half) & (self.xy <= size - self.half)).all(1)

    def tile(self, row: int) -> tuple[int, int]:
        x, y = self.xy[row] // 2048
        return int(y), int(x)

    def window(self, row: int, half: float) -> np.ndarray:
        """Pixels x0, y0, x1, y1 around a cell, within the image."""
        x, y = self.xy[row]
        box = np.floor([x - half, y - half]), np.ceil([x + half, y + half])
        return np.clip(np.concatenate(box).astype(int), 0, self.shape[:0:-1] * 2)

    def read(self, window) -> np.ndarray:
        """Channels (C x y x x) of a window."""
        x0, y0, x1, y1 = window
        key = (slice(None), slice(y0, y1), slice(x0, x1)) if self.first else (slice(y0, y1), slice(x0, x1), slice(None))
        part = np.asarray(self.pixels[key])
        part = part if self.first else part.transpose(2, 0, 1)
        _io.check_finite(part[self.used], self.source[3].name, tuple(self.names))
        return part

    def legend(self) -> list[tuple[str, str]]:
        if self.is_rgb:
            return []
        if len(self.names) == 1:
            return [(self.names[0], "#FFFFFF")]
        # a channel keeps its colour whichever others are drawn, where the image has few
        numbers = self.used if self.shape[0] <= len(COLOURS) else range(len(self.used))
        return [(name, COLOURS[number]) for name, number in zip(self.names, numbers)]

    def colour(self, part: np.ndarray) -> np.ndarray:
        """Picture (y x x x 3, in [0, 1]) of channels."""
        if self.is_rgb:
            return part[:3].transpose(1, 2, 0) / 255
        from matplotlib.colors import to_rgb

        palette = np.array([to_rgb(colour) for _, colour in self.legend()])
        low, high = (limit[:, None, None] for limit in self.contrast)
        light = np.clip((part[self.used].astype(float) - low) / (high - low), 0, 1)
        return np.clip(np.einsum("cyx,cr->yxr", light, palette), 0, 1)

    @cached_property
    def masks(self):
        return _io.masks(*self.source)

    @cached_property
    def contrast(self) -> tuple[np.ndarray, np.ndarray]:
        """Percentiles of each channel, over windows around cells spread over the slide."""
        rows = np.flatnonzero(self.inside()[0])
        rows = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(int)]
        parts = [self.read(self.window(row, SAMPLE_PIXELS / 2))[self.used].reshape(len(self.used), -1) for row in rows]
        low, high = np.percentile(np.concatenate(parts, 1), self.percentiles, axis=1)
        return low, np.maximum(high, low + 1e-9)

    def draw(self, ax, row: int, outline: bool) -> None:
        """Draw a crop in µm from the middle of the cell; beyond the border of the image it stays empty."""
        window = self.window(row, self.half)
        x0, y0, x1, y1 = ((window - np.tile(self.xy[row], 2)) * self.mpp).tolist()
        ax.imshow(self.colour(self.read(window)), extent=(x0, x1, y1, y0), interpolation="nearest")
        if outline:
            (mask,) = self.masks.inside(np.array([row]), window[None])
            edge = np.pad(mask, 1)
            at = [np.linspace(a - self.mpp / 2, b + self.mpp / 2, k) for a, b, k in
                  ((x0, x1, edge.shape[1]), (y0, y1, edge.shape[0]))]  # fmt: skip
            ax.contour(*at, edge, levels=[0.5], colors="black" if self.is_rgb else "white", linewidths=0.5)
        reach = self.half * self.mpp
        ax.set_xlim(-reach, reach)
        ax.set_ylim(reach, -reach)
