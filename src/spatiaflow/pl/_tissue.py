"""A panel of tissue: true aspect, origin as in the image, µm scale bar, points in their true size."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import Collection, EllipseCollection, PolyCollection
from matplotlib.figure import Figure

from spatiaflow.models.slide import square_corners

SEQUENTIAL = "viridis"
BARS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # µm


def tissue_panel(ax: Axes, slide, values, *, vmin, vmax, cmap=SEQUENTIAL, background=None, title="", side=None):
    """Draw one value a spot and return the collection; coordinates are µm. Spots are circles, or squares of ``side``."""
    x, y = slide.xy.T
    if background is not None:
        image, scale, (left, upper) = background
        height, width = image.shape[:2]
        ax.imshow(
            image,
            extent=(left, left + width * scale, upper + height * scale, upper),
            alpha=0.45,
            interpolation="bilinear",
            zorder=0,
        )
    size, drawn = 0.92 * slide.pitch, {"array": np.asarray(values, float), "cmap": cmap, "rasterized": True}
    points: Collection = (
        EllipseCollection(
            size, size, 0, units="xy", offsets=slide.xy, offset_transform=ax.transData, linewidths=0, **drawn
        )
        if side is None
        else PolyCollection(list(square_corners(slide.xy, side)), linewidths=0, antialiased=False, **drawn)
    )
    points.set_clim(vmin, vmax)
    ax.add_collection(points)
    margin = max(slide.pitch, 0.02 * max(np.ptp(x), np.ptp(y)))
    ax.set_xlim(x.min() - margin, x.max() + margin)
    ax.set_ylim(y.max() + margin, y.min() - margin)  # y runs down, as in the image
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=7, pad=3)
    return points


def scale_bar(ax: Axes) -> float:
    """Draw a µm scale bar below the lower left corner and return its length."""
    x0, x1 = ax.get_xlim()
    y1, y0 = ax.get_ylim()
    length = max([bar for bar in BARS if bar <= 0.3 * (x1 - x0)], default=BARS[0])
    y = y1 + 0.03 * (y1 - y0)
    ax.plot([x0, x0 + length], [y, y], color="black", lw=1.5, solid_capstyle="butt", clip_on=False, gid="scale bar")
    label = f"{length / 1000:g} mm" if length >= 1000 else f"{length} µm"
    ax.text(x0 + length / 2, y + 0.02 * (y1 - y0), label, ha="center", va="top", fontsize=6, clip_on=False)
    ax.set(xlim=(x0, x1), ylim=(y1, y0))  # the bar lies outside, and the panel is as large as the others
    return float(length)


def violin(ax: Axes, y: float, values: np.ndarray, colour="0.8") -> None:
    """Draw a lying violin at height ``y``, with median and quartiles."""
    if len(values) > 4 and np.ptp(values) > 0:
        found: Any = ax.violinplot(values, [y], orientation="horizontal", widths=0.85, showextrema=False)
        (body,) = found["bodies"]
        body.set(facecolor=colour, edgecolor="none", alpha=1)
    if len(values):
        quartiles = np.quantile(values, [0.25, 0.5, 0.75])
        ax.plot(quartiles[[0, 2]], [y, y], color="0.35", lw=1.5, solid_capstyle="butt")
        ax.plot(quartiles[1], y, "o", ms=2.5, color="black")


def finish(figure: Figure, show: bool | None, return_fig: bool):
    """Show or return a figure, as scanpy does."""
    import matplotlib.pyplot as plt

    if return_fig:
        return figure
    if show or (show is None and plt.isinteractive()):
        plt.show()
    return None
