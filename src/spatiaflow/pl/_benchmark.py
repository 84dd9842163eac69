"""Scores of methods, one row per task."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spatiaflow._process import verb
from spatiaflow.pl._tissue import finish


@verb
def benchmark(
    data: pd.DataFrame,
    *,
    ours: str | list[str],
    show: bool | None = None,
    return_fig: bool = False,
) -> Figure | None:
    """Draw scores of several methods in several tasks, one row per task, with the spread over seeds and the ceiling.

    Each row has its own scale, on which better is to the right. The best of the other methods is drawn dark, with its name.

    Parameters
    ----------
    data
        One row per task and method. Columns ``task``, ``metric``, ``method``, ``value``; optionally ``std`` (between seeds),
        ``ceiling`` (one value per task) and ``less`` (True where less is better; the axis of this task is reversed).
    ours
        Methods to highlight.
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
    TypeError
        ``data`` is not a DataFrame.
    ValueError
        No row has a method in ``ours``.

    Examples
    --------
    >>> import pandas as pd
    >>> scores = pd.DataFrame({"task": "genes", "metric": "Pearson r", "method": ["STFlow", "ridge"], "value": [0.4, 0.3]})
    >>> sf.pl.benchmark(scores, ours="STFlow")
    """
    import matplotlib.pyplot as plt

    if not isinstance(data, pd.DataFrame):
        raise TypeError(f"data must be one DataFrame with a row per task and method, not {type(data).__name__}.")
    if missing := [name for name in ("task", "metric", "method", "value") if name not in data]:
        raise KeyError(f"data has no column {missing[0]!r}; it has {', '.join(map(str, data.columns))}.")
    ours = [ours] if isinstance(ours, str) else list(ours)
    if not data["method"].isin(ours).any():
        raise ValueError(f"data has no method {ours[0]!r}; it has {', '.join(data['method'].unique()[:8])}.")
    tasks = list(dict.fromkeys(data["task"]))
    size = (7.1, 0.62 * len(tasks) + 0.2)
    figure, axes = plt.subplots(len(tasks), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, task in zip(axes[:, 0], tasks):
        _task(ax, data[data["task"] == task].dropna(subset=["value"]), task, ours)
    handles = _handles(data, ours)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=6, frameon=False)
    return finish(figure, show, return_fig)


def _task(ax: Axes, rows: pd.DataFrame, task: str, ours: list[str]) -> None:
    """Draw one task."""
    value = rows["value"].to_numpy(float)
    std = rows.get("std", pd.Series(0.0, rows.index)).fillna(0).to_numpy(float)
    mine, less = rows["method"].isin(ours).to_numpy(), bool(rows.get("less", pd.Series(False, rows.index)).any())
    ax.axhline(0, color="0.85", lw=0.8, zorder=0)
    ax.errorbar(value[~mine], np.zeros((~mine).sum()), xerr=std[~mine], fmt="o", ms=4, lw=1, color="0.6")
    ax.errorbar(value[mine], np.zeros(mine.sum()), xerr=std[mine], fmt="D", ms=5, lw=1.2, color=_color(), zorder=4)
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
    low, high = reach.min() - margin, reach.max() + margin
    ax.set(yticks=[], ylim=(-1, 1), xlim=(high, low) if less else (low, high))
    label = f"{task}\n{rows['metric'].iloc[0]}"
    ax.text(-0.01, 0.5, label, transform=ax.transAxes, ha="right", va="center", fontsize=6)
    ax.tick_params(axis="x", labelsize=5, length=2, pad=1)
    sns.despine(ax=ax, left=True)


def _handles(data: pd.DataFrame, ours: list[str]) -> list[Line2D]:
    """Entries of the legend, of what is drawn only."""
    out = [Line2D([], [], ls="", marker="D", ms=5, color=_color(), label=", ".join(ours))]
    others = data.loc[~data["method"].isin(ours) & data["value"].notna(), "task"].value_counts().max()  # NaN: none
    for label, shade, least in (("best other", "0.25", 1), ("others", "0.6", 2)):
        if others >= least:
            out.append(Line2D([], [], ls="", marker="o", ms=4, color=shade, label=label))
    if "std" in data:
        out.append(Line2D([], [], color="0.6", lw=1, label="± std of seeds"))
    if "ceiling" in data and data["ceiling"].notna().any():
        out.append(Line2D([], [], color="0.4", lw=0.8, ls=":", label="ceiling"))
    return out


def _color() -> tuple[float, float, float]:
    return sns.color_palette("colorblind")[0]
