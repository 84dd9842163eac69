"""Conformal intervals: their coverage holds on a new slide, for any distribution of the errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table


def conformal_factor(truth: Table, mean: Table, std: Table, group: ArrayLike, *, alpha: float = 0.1) -> np.ndarray:
    """Return the multiple of the standard deviation that covers ``1 - alpha`` of the observations of a new group.

    The interval is ``mean ± factor * std``. Errors of one slide are correlated, so slides are exchangeable and observations are
    not. Every group has the same weight, and the new group is counted with infinite errors [Lee, Barber and Willett 2023,
    section 3.1]. The only assumption is that the new slide is drawn as the others were.

    Parameters
    ----------
    truth, mean, std
        Arrays (n, genes) of slides that the model was not fitted to: measured values, predictions, and their standard
        deviation.
    group
        Slide of every row (n). With blocks of tissue (:func:`spatial_blocks`) instead, the coverage holds for new blocks of the
        same slides, and not for a new slide.
    alpha
        Nominal probability outside of the interval.

    Returns
    -------
    Array (genes).

    Raises
    ------
    ValueError
        Fewer than ``ceil(1 / alpha) - 1`` groups, shapes differ, values are not finite, a standard deviation is not above 0,
        or ``alpha`` is not in (0, 1).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth, slide = rng.normal(size=(900, 2)), np.repeat(np.arange(9), 100)
    >>> sf.metrics.conformal_factor(truth, 0 * truth, 0 * truth + 1, slide).shape
    (2,)
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1) (the probability outside of the interval), not {alpha!r}.")
    truth, mean, std = _arrays.tables(truth=truth, mean=mean, std=std)
    if not (std > 0).all():
        raise ValueError("std must be above 0 everywhere: no multiple of 0 covers the truth.")
    names, place = _arrays.labels(group, len(truth), "group")
    size = np.bincount(place)
    needed = int(np.ceil(1 / alpha - 1e-9)) - 1
    if len(names) < needed:
        raise ValueError(
            f"{len(names)} group(s) are too few: intervals of {1 - alpha:.0%} that hold on a new slide need {needed} slides. By "
            "blocks, group=sf.metrics.spatial_blocks(xy, 500), they hold on new blocks of these slides instead."
        )
    score = np.abs(truth - mean) / std
    order = score.argsort(0)
    below = (1 / ((len(names) + 1) * size))[place][order].cumsum(0)  # the new group is the rest, at infinity
    first = (below < 1 - alpha - 1e-9).sum(0, keepdims=True)
    return np.take_along_axis(np.take_along_axis(score, order, 0), first, 0)[0]
