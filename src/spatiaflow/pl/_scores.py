"""Scores of genes beside baselines."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish


@verb
def gene_scores(
    data: pd.DataFrame,
    *,
    ceiling: pd.Series | np.ndarray | None = None,
    ylabel: str = "Pearson r",
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw a score of every gene for several methods, sorted by the first method.

    Parameters
    ----------
    data
        Genes x methods, e.g. ``pd.DataFrame({"STFlow": metrics.pearson(...), "ridge": ...}, index=genes)``.
    ceiling
        What noise allows for each gene (:func:`spatiaflow.metrics.noise_ceiling`), drawn as a line above; an
        array in the order of ``data``, or a Series by gene.
    ylabel
        Label of the score.
    ax
        Axes to draw into.
    show
        Show the figure; None: when matplotlib is interactive.
    return_fig
        Return the figure instead.

    Returns
    -------
    None, or with ``return_fig=True`` the :class:`matplotlib.figure.Figure`.

    Raises
    ------
    TypeError
        ``data`` is not a DataFrame of genes x methods.
    ValueError
        ``ceiling`` has another length.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"STFlow": [0.6, 0.4], "ridge": [0.5, 0.4]}, index=["ERBB2", "GNAS"])
    >>> sf.pl.gene_scores(scores)
    """
    import matplotlib.pyplot as plt

    if not isinstance(data, pd.DataFrame) or not data.shape[1]:
        raise TypeError("gene_scores draws a DataFrame of genes x methods.")
    if ceiling is not None and not isinstance(ceiling, pd.Series):
        if np.shape(ceiling) != (len(data),):
            raise ValueError(
                f"ceiling must have one value for each of {len(data)} genes; its shape is {np.shape(ceiling)}."
            )
        ceiling = pd.Series(np.asarray(ceiling), index=data.index)
    scores = data.sort_values(data.columns[0], ascending=False)
    if ax is None:
        _, ax = plt.subplots(figsize=(max(3.5, 0.125 * len(scores) + 0.9), 2.4), layout="constrained")
    position = np.arange(len(scores))
    ax.axhline(0, color="0.7", lw=0.6, zorder=0)
    if ceiling is not None:
        ax.plot(
            position, cast("pd.Series", ceiling).reindex(scores.index), "_", color="0.4", ms=5, label="noise ceiling"
        )
    palette, markers = sns.color_palette("colorblind", scores.shape[1]), "osD^vPX*"
    for i, method in reversed(list(enumerate(scores.columns))):
        label = f"{method} ({scores[method].mean():.2f})"
        ax.plot(position, scores[method], markers[i % 8], ms=4 if i == 0 else 3, color=palette[i], label=label, lw=0)
    ax.set_xticks(position, scores.index, rotation=90, fontsize=5)
    ax.tick_params(axis="y", labelsize=6)
    ax.set_ylabel(ylabel, fontsize=7)
    ax.set_xlim(-0.8, len(scores) - 0.2)
    handles, labels = ax.get_legend_handles_labels()
    figure = cast("Figure", ax.figure)
    columns = max(1, int(figure.get_figwidth() / 1.5))  # above the axes, where no mark is
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0, "ncols": columns}
    ax.legend(handles[::-1], labels[::-1], fontsize=6, frameon=False, **place)
    sns.despine(ax=ax)
    return finish(figure, show, return_fig)
