"""How many niches are there?"""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from matplotlib.figure import Figure
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish


@verb
def niche_stability(
    data: AnnData | SpatialData,
    *,
    key: str = "niche",
    table_key: str = "table",
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw how well two halves of the genes agree on each number of niches.

    1 is perfect agreement, 0 that of chance. Bars are standard errors over six random splits of the genes. The number that was
    taken is filled. Numbers within a standard error of each other cannot be told apart: choose by what you need.

    Parameters
    ----------
    data
        Object that :func:`spatiaflow.tl.cluster_niches` wrote into, without ``n_clusters``.
    key
        Slot of the niches.
    table_key
        Table of a SpatialData.
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
        There is no curve: the niches are missing, or their number was given.

    Examples
    --------
    >>> sf.tl.cluster_niches(sdata, max_clusters=4, key_added="found_niche")
    >>> fig = sf.pl.niche_stability(sdata, key="found_niche", return_fig=True)
    """
    import matplotlib.pyplot as plt
    import seaborn as sns

    table = _io.unpack(data, table_key)[1]
    stored = _io.entry(table, key)
    if "n_clusters" not in stored.get("stability", {}):
        raise KeyError(
            f"uns has no stability of numbers under {key!r}. Run sf.tl.cluster_niches(data) without n_clusters=."
        )
    number, agreement, error = (np.asarray(stored["stability"][name]) for name in ("n_clusters", "agreement", "error"))
    taken = number == int(stored["params"]["n_clusters"])
    figure, ax = plt.subplots(figsize=(3.2, 2.3), layout="constrained")
    color = sns.color_palette("colorblind")[0]
    ax.errorbar(number, agreement, error, fmt="o-", ms=4, lw=1, color=color, mfc="white", capsize=2)
    ax.plot(number[taken], agreement[taken], "o", ms=5, color=color, zorder=3)
    ax.annotate(
        f"{number[taken][0]} niches, {agreement[taken][0]:.2f}", (number[taken][0], agreement[taken][0] + error[taken][0]),
        xytext=(4, 4), textcoords="offset points", fontsize=6,
    )  # fmt: skip
    ax.set_xticks(number)
    ax.set_ylim(min(0, float((agreement - error).min()) - 0.05), max(1.0, float((agreement + error).max()) + 0.1))
    ax.set_xlabel("number of niches", fontsize=7)
    ax.set_ylabel("agreement of halves of the genes", fontsize=7)
    ax.tick_params(labelsize=6)
    sns.despine(ax=ax)
    return finish(figure, show, return_fig)
