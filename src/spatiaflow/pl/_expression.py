"""Measured, predicted and uncertain: the same gene side by side on the tissue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io, metrics
from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish, scale_bar, tissue_panel


@verb
def expression(
    data: AnnData | SpatialData,
    genes: str | Sequence[str],
    *,
    key: str = "stflow",
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
    """Draw measured and predicted expression and its standard deviation on the tissue, a row a gene.

    Measured and predicted share one colour scale; the panel gives their Pearson correlation over the slide's spots.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.predict_expression` wrote into. Counts are optional: without them the measured
        panel is left out.
    genes
        One gene or several.
    key
        Slot of the prediction.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, library_id
        Column of ``.obs`` that tells slides apart, and the slide to draw (the first when None).
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when the data do not say.
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
        The slot, a gene or the slide is missing.
    ValueError
        ``genes`` is empty.

    Examples
    --------
    >>> sf.pl.expression(adata, ["TYPE_epithelial1", "NICHE_gland1"])
    """
    import matplotlib.pyplot as plt

    _, table = _io.unpack(data, table_key)
    genes = list(_io.names(genes, "genes") or ())
    predicted = _io.slot_as_anndata(table, key)
    missing = [gene for gene in genes if gene not in predicted.var_names]
    if missing:
        raise KeyError(f"uns[{key!r}]['genes'] has no {missing[0]!r}; it has {', '.join(predicted.var_names[:8])}, ...")
    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    slide = _io.one_slide(_io.places(data, where), library_id)
    has_truth = all(gene in table.var_names for gene in genes)
    columns = ["measured"] * has_truth + ["predicted"] + ["std"] * ("std" in predicted.layers)
    per = _io.target_sum(table, key)
    unit = "log1p counts" if per is None else f"log1p per {per / 1000:g}k" if per >= 1000 else f"log1p per {per:g}"
    truth: Any = _io.log_expression(table, genes, layer, key)[slide.rows] if has_truth else None
    background, side = _io.background(data, table, slide), _io.entry(table, "grid").get("step_um")

    aspect = np.clip(np.ptp(slide.xy[:, 1]) / max(np.ptp(slide.xy[:, 0]), 1e-9), 0.3, 3)
    width = 7.1 / 3 * len(columns)
    figure, axes = plt.subplots(
        len(genes), len(columns), figsize=(width, len(genes) * (7.1 / 3 * 0.82 * aspect + 0.35)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, gene in zip(axes, genes):
        g = predicted.var_names.get_loc(gene)
        values = {"predicted": predicted.X[slide.rows, g]}
        if has_truth:
            values["measured"] = truth[:, genes.index(gene)]
        if "std" in columns:
            values["std"] = predicted.layers["std"][slide.rows, g]
        shared = np.concatenate([values[c] for c in columns if c != "std"])
        top = max(float(np.quantile(shared, 0.995)), 1e-3)
        trusted = bool(predicted.var["trusted"].iloc[g]) if "trusted" in predicted.var else True
        for ax, column in zip(row, columns):
            limit = (0, top)
            if column == "std":  # at least a factor of two, so that colours do not enlarge small differences
                low, high = np.quantile(values["std"], [0.005, 0.995])
                limit = (min(low, high / 2), high + 1e-6)
            cmap = "viridis" if column != "std" else "magma"
            title = f"{gene}, {column}" + ("" if trusted or column != "predicted" else " (untrusted)")
            points = tissue_panel(
                ax, slide, values[column], vmin=limit[0], vmax=limit[1], cmap=cmap, background=background, title=title,
                side=side,
            )  # fmt: skip
            if column == "predicted" and has_truth:
                r = metrics.pearson(values["measured"][:, None], values["predicted"][:, None])[0]
                ax.text(0.98, 0.02, f"r = {r:.2f}", transform=ax.transAxes, ha="right", va="bottom", fontsize=7,
                        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
            if column != "measured":
                bar = figure.colorbar(points, ax=ax, shrink=0.7, pad=0.02, aspect=18)
                bar.ax.tick_params(labelsize=6, length=2)
                bar.outline.set_visible(False)
                bar.set_label(unit if column == "predicted" else f"std, {unit}", fontsize=6)
    scale_bar(axes[-1, 0])
    if f"{key}_ood" in table.obs and (share := (table.obs[f"{key}_ood"].to_numpy()[slide.rows] > 0.99).mean()) > 0.05:
        note = f"{share:.0%} of the spots look unlike the training data (ood > 0.99)"
        figure.supxlabel(note, fontsize=6, color="0.3")
    return finish(figure, show, return_fig)
