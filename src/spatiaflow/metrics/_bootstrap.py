"""Intervals of scores by bootstrap over blocks of tissue, because neighbouring spots are not independent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from spatiaflow._settings import logger
from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table
from spatiaflow.metrics._correlation import unit


def spatial_blocks(xy: ArrayLike, size: float, *, library: ArrayLike | None = None) -> np.ndarray:
    """Cut slides into square blocks.

    Parameters
    ----------
    xy
        Positions (n, 2), µm.
    size
        Side of a block, µm. Use several times the distance over which errors are correlated.
    library
        Slide of every row (n). No block spans two slides. None: all rows are of one slide.

    Returns
    -------
    Array (n) of int, the block of every row, numbered from 0 without gaps.

    Raises
    ------
    ValueError
        Positions are not finite, or ``size`` is not positive.

    Examples
    --------
    >>> sf.metrics.spatial_blocks([[10, 10], [20, 40], [70, 10]], 50)
    array([0, 0, 1])
    """
    xy = np.asarray(xy, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise ValueError(f"xy must hold finite positions (n, 2); its shape is {xy.shape}.")
    if not size > 0:
        raise ValueError(f"size must be above 0 (the side of a block in µm), not {size!r}.")
    _, slide = _arrays.labels(np.zeros(len(xy)) if library is None else library, len(xy), "library")
    corner = np.full((slide.max(initial=0) + 1, 2), np.inf)
    np.minimum.at(corner, slide, xy)
    cell = np.floor((xy - corner[slide]) / size).astype(int)
    return np.unique(np.column_stack([slide, cell]), axis=0, return_inverse=True)[1].reshape(-1)


def bootstrap_blocks(
    statistic: Callable[[np.ndarray], float],
    blocks: ArrayLike,
    *,
    library: ArrayLike | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return a statistic and its 95 % interval, by bootstrap over blocks.

    Pass slides or donors as ``blocks`` for a bootstrap over slides or donors.

    Parameters
    ----------
    statistic
        Function of row numbers (int array, with repeats) that returns a float.
    blocks
        Block of every row (n), as :func:`spatial_blocks` gives.
    library
        Slide of every row (n). Blocks are resampled within their slide. None resamples all blocks together.
    n_boot
        Number of resamples.
    seed
        Seed of the resamples.

    Returns
    -------
    The statistic of all rows, and the 2.5 and 97.5 % quantiles over resamples.

    Raises
    ------
    ValueError
        A slide has fewer than 2 blocks, or ``n_boot`` is less than 1.

    Examples
    --------
    The mean library size, its interval by blocks of 60 µm:

    >>> library = adata.X.sum(1)
    >>> blocks = sf.metrics.spatial_blocks(adata.obsm["spatial"], 60)
    >>> mean, low, high = sf.metrics.bootstrap_blocks(lambda rows: library[rows].mean(), blocks)
    >>> low < mean < high
    True
    """
    blocks, slides = _strata(blocks, library)
    members = [np.flatnonzero(blocks == block) for block in range(blocks.max() + 1)]
    weights = np.hstack(list(_resamples(slides, n_boot, seed)))
    order = np.concatenate(slides)
    values = [statistic(np.concatenate([np.tile(members[b], w) for b, w in zip(order, row) if w])) for row in weights]
    return float(statistic(np.arange(len(blocks)))), *_interval(values)


def paired_pearson_difference(
    truth: Table,
    first: Table,
    second: Table,
    blocks: ArrayLike,
    *,
    library: ArrayLike | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the difference of mean per-gene Pearson correlation, ``first`` minus ``second``, with its 95 % interval.

    The score is the mean over slides of the mean over genes. Constant genes are treated as in :func:`pearson`: a gene that is
    constant in the truth of a slide is not part of its mean. Blocks are resampled within slides, the same ones for both
    predictions.

    Parameters
    ----------
    truth, first, second
        Arrays (n, genes).
    blocks
        Block of every row (n), as :func:`spatial_blocks` gives.
    library
        Slide of every row (n). None: all rows are of one slide.
    n_boot
        Number of resamples.
    seed
        Seed of the resamples.

    Returns
    -------
    The difference, and the 2.5 and 97.5 % quantiles over resamples. ``first`` is better where the interval is above 0.

    Raises
    ------
    ValueError
        Shapes differ, values are NaN or infinite, a slide has fewer than 2 blocks, or nothing varies in its truth.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth = rng.normal(size=(400, 3))
    >>> good, poor = (truth + noise * rng.normal(size=truth.shape) for noise in (0.5, 2))
    >>> difference, low, high = sf.metrics.paired_pearson_difference(truth, good, poor, np.arange(400) // 20)
    >>> 0 < low < difference < high
    True
    """
    truth, first, second = _arrays.tables(truth=truth, first=first, second=second)
    blocks, slides = _strata(blocks, library, n=len(truth))
    total, resampled = 0.0, np.zeros(n_boot)
    for members, weights in zip(slides, _resamples(slides, n_boot, seed)):
        rows = np.isin(blocks, members)
        block = np.searchsorted(members, blocks[rows])
        sums = _block_sums(truth[rows], first[rows], second[rows], block, len(members))
        by_gene = _difference(np.ones((1, len(members))), sums)
        if undefined := int(np.isnan(by_gene).sum()):
            logger.warning("%d of %d genes are constant in the truth of a slide and left out", undefined, by_gene.size)
        if undefined == by_gene.size:
            raise ValueError("every gene is constant in the truth of a slide, so no correlation is defined there.")
        total += np.nanmean(by_gene) / len(slides)
        for chunk in _arrays.rows_in_chunks(n_boot, sums.shape[1] * truth.shape[1]):
            resampled[chunk] += np.nanmean(_difference(weights[chunk], sums), axis=1) / len(slides)
    return float(total), *_interval(resampled)


def _strata(blocks: ArrayLike, library: ArrayLike | None, n: int | None = None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Blocks numbered from 0, and for every slide the numbers of its blocks, ascending."""
    n = len(np.asarray(blocks)) if n is None else n
    names, slide = _arrays.labels(np.zeros(n) if library is None else library, n, "library")
    _, block = _arrays.labels(blocks, n, "blocks")
    pairs = np.unique(np.column_stack([slide, block]), axis=0)
    if len(pairs) > block.max() + 1:
        raise ValueError(
            "a block holds rows of two slides; make blocks with spatial_blocks(xy, size, library=library)."
        )
    slides = [pairs[pairs[:, 0] == s, 1] for s in range(len(names))]
    for name, members in zip(names, slides):
        if len(members) < 2:
            where = "the data have" if library is None else f"slide {name!r} has"
            raise ValueError(f"{where} a single block; a bootstrap over blocks needs several: make them smaller.")
    return block, slides


def _resamples(slides: list[np.ndarray], n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """For every slide, how often each of its blocks is drawn: (n_boot, blocks of the slide)."""
    if n_boot < 1:
        raise ValueError(f"n_boot must be at least 1, not {n_boot}.")
    rng = np.random.default_rng(seed)
    for members in slides:
        yield rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=n_boot)


def _block_sums(
    truth: np.ndarray, first: np.ndarray, second: np.ndarray, block: np.ndarray, n_blocks: int
) -> np.ndarray:
    """Sufficient statistics of both correlations, (blocks, 9, genes); centred first, so that little cancels."""
    x, y, z = unit(truth), unit(first), unit(second)
    member = sparse.csr_matrix((np.ones(len(x)), (block, np.arange(len(x)))), shape=(n_blocks, len(x)))
    terms = (np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z)
    return np.stack([member @ term for term in terms], axis=1)


def _difference(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Pearson of the first minus that of the second, (resamples, genes)."""
    n, x, y, z, xx, yy, zz, xy, xz = np.moveaxis(np.tensordot(weights, sums, axes=1), 1, 0)

    def variance(square: np.ndarray, single: np.ndarray) -> np.ndarray:
        left = square - single**2 / n
        return np.where(left > 1e-12 * square, left, 0)

    def correlation(product: np.ndarray, single: np.ndarray, square: np.ndarray) -> np.ndarray:
        spread = np.sqrt(variance(xx, x) * variance(square, single))
        return np.divide(product - x * single / n, spread, out=np.zeros_like(spread), where=spread > 0)

    difference = correlation(xy, y, yy) - correlation(xz, z, zz)
    return np.where(variance(xx, x) > 0, difference, np.nan)


def _interval(values: np.ndarray | Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
