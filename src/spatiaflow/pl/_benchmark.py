"""Methods over tasks, each on its own scale."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spatiaflow.pl._tissue import finish


def benchmark(
    data: pd.DataFrame,
    *,
    ours: str | list[str],
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw scores of several methods in several tasks, a row a task, with the spread over seeds and the ceiling.

    Better is to the right in every row. The best of the other methods is dark and named.

    Parameters
    ----------
    data
        A row a task and method: columns ``task``, ``metric``, ``method``, ``value``; optionally ``std`` (between seeds),
        ``ceiling`` (one value a task) and ``less`` (true where less is better; such rows run from right to left).
    ours
        Methods to set off from the others.
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
        A column is missing.
    ValueError
        No row is of a method in ``ours``.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"task": "genes", "metric": "Pearson r", "method": ["STFlow", "ridge"], "value": [0.4, 0.3]})
    >>> sf.pl.benchmark(scores, ours="STFlow")
    """
    import matplotlib.pyplot as plt

    if missing := [name for name in ("task", "metric", "method", "value") if name not in data]:
        raise KeyError(f"data has no column {missing[0]!r}; it has {', '.join(map(str, data.columns))}.")
    ours = [ours] if isinstance(ours, str) else list(ours)
    if not data["method"].isin(ours).any():
        raise ValueError(f"data has no method {ours[0]!r}; it has {', '.join(data['method'].unique()[:8])}.")
    color = sns.color_palette("colorblind")[0]
    tasks = list(dict.fromkeys(data["task"]))
    figure, axes = plt.subplots(
        len(tasks), 1, figsize=(7.1, 0.62 * len(tasks) + 0.2), squeeze=False, layout="constrained"
    )
    for ax, task in zip(axes[:, 0], tasks):
        rows = data[data["task"] == task].dropna(subset=["value"])
        value, std = (
            rows["value"].to_numpy(float),
            rows.get("std", pd.Series(0.0, rows.index)).fillna(0).to_numpy(float),
        )
        mine, less = rows["method"].isin(ours).to_numpy(), bool(rows.get("less", pd.Series(False, rows.index)).any())
        ax.axhline(0, color="0.85", lw=0.8, zorder=0)
        ax.errorbar(value[~mine], np.zeros((~mine).sum()), xerr=std[~mine], fmt="o", ms=4, lw=1, color="0.6")
        ax.errorbar(value[mine], np.zeros(mine.sum()), xerr=std[mine], fmt="D", ms=5, lw=1.2, color=color, zorder=4)
        if (~mine).any():
            best = np.flatnonzero(~mine)[(value[~mine].argmin if less else value[~mine].argmax)()]
            ax.plot(value[best], 0, "o", ms=4, color="0.25", zorder=3)
            ax.annotate(
                rows["method"].iloc[best], (value[best], 0), xytext=(0, -9), textcoords="offset points", ha="center", va="top",
                fontsize=5, color="0.35",
            )  # fmt: skip
        ceiling = rows["ceiling"].dropna() if "ceiling" in rows else rows["value"][:0]
        if len(ceiling):
            ax.axvline(ceiling.iloc[0], color="0.4", lw=0.8, ls=":")
        reach = np.r_[value - std, value + std, ceiling]
        margin = 0.08 * max(np.ptp(reach), 1e-3)
        ax.set_xlim(
            *([reach.max() + margin, reach.min() - margin] if less else [reach.min() - margin, reach.max() + margin])
        )
        ax.set(yticks=[], ylim=(-1, 1))
        ax.text(
            -0.01, 0.5, f"{task}\n{rows['metric'].iloc[0]}", transform=ax.transAxes, ha="right", va="center", fontsize=6
        )
        ax.tick_params(axis="x", labelsize=5, length=2, pad=1)
        sns.despine(ax=ax, left=True)
    handles = [Line2D([], [], ls="", marker="D", ms=5, color=color, label=", ".join(ours))]
    others = data.loc[~data["method"].isin(ours) & data["value"].notna(), "task"].value_counts().max()  # NaN: none
    for label, shade, least in (("best other", "0.25", 1), ("others", "0.6", 2)):
        if others >= least:
            handles.append(Line2D([], [], ls="", marker="o", ms=4, color=shade, label=label))
    if "std" in data:
        handles.append(Line2D([], [], color="0.6", lw=1, label="± std of seeds"))
    if "ceiling" in data and data["ceiling"].notna().any():
        handles.append(Line2D([], [], color="0.4", lw=0.8, ls=":", label="ceiling"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=6, frameon=False)
    return finish(figure, show, return_fig)
