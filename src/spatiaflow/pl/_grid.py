"""What of a bare image was taken for tissue."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow.models.slide import square_corners
from spatiaflow.pl._tissue import finish, scale_bar


@verb
def tissue(
    data: AnnData,
    *,
    groupby: str | None = None,
    library_key: str | None = None,
    library_id: str | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw the squares of :func:`spatiaflow.pp.grid` on the whole picture: what was taken for tissue, and what was left out.

    Parameters
    ----------
    data
        A grid.
    groupby
        Column of ``.obs`` that colours the squares, such as ``"annotation"``. None: all have one colour.
    library_key, library_id
        Column of ``.obs`` that tells slides apart, and the slide to draw (the first when None).
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
        ``data`` is no grid, or has no column ``groupby``.
    TypeError
        ``data`` is several objects.

    Examples
    --------
    >>> sf.pl.tissue(sf.pp.grid(sdata, image_key="he", step_um=50))
    """
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.collections import PolyCollection

    _, data = _io.unpack(data, "table")
    if _io.entry(data, "grid").get("step_um") is None:
        raise KeyError("uns has no 'grid': make one with sf.pp.grid(image).")
    slide = _io.one_slide(_io.places(data, _io.Where(library_key=library_key)), library_id)
    step = float(data.uns["grid"]["step_um"])
    found = _io.background(data, data, slide)
    image, scale, _ = found if found is not None else (np.full((1, 1, 3), 255, np.uint8), float(np.ptp(slide.xy)), ())
    height, width = image.shape[0] * scale, image.shape[1] * scale
    figure, ax = plt.subplots(figsize=(3.5, 3.5 * float(np.clip(height / width, 0.3, 2)) + 0.3), layout="constrained")
    ax.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    groups = None if groupby is None else _io.groups(data, groupby).iloc[slide.rows]
    names = ["" if groups is None else "none", *([] if groups is None else groups.cat.categories)]
    codes = np.full(len(slide), -1) if groups is None else groups.cat.codes.to_numpy()
    colours = sns.color_palette("colorblind", len(names))
    for code, (name, colour) in enumerate(
        zip(names, [colours[0] if groups is None else (0.5, 0.5, 0.5), *colours]), -1
    ):
        rows = codes == code
        if not rows.any():
            continue
        squares = PolyCollection(
            list(square_corners(slide.xy[rows], step)),
            facecolors=(*colour, 0.25),
            edgecolors=(*colour, 0.9),
            linewidths=0.3,
        )
        ax.add_collection(squares)
        if groups is not None:
            ax.plot([], [], "s", color=colour, ms=4, label=str(name))
    if groups is not None:
        ax.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.set_aspect("equal")
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(f"{slide.name}: {len(slide):,} squares of {step:g} µm", fontsize=7, pad=3)
    scale_bar(ax)
    return finish(figure, show, return_fig)
