"""The best correlation that a prediction can reach, given the sampling noise of counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from spatiaflow.metrics import _arrays
from spatiaflow.metrics._arrays import Table
from spatiaflow.metrics._correlation import constant, pearson


def noise_ceiling(
    counts: Table,
    *,
    genes: ArrayLike | None = None,
    target_sum: float | None = 1e4,
    n_repeats: int = 10,
    seed: int = 0,
) -> np.ndarray:
    """Estimate the highest Pearson correlation that a prediction of each gene can reach, by binomial thinning of the counts.

    Each count is split by Binomial(count, 1/2) into two halves. The halves are independent samples of the tissue at half the
    depth. Both are normalised and correlated. The mean correlation r over ``n_repeats`` splits is corrected to full depth by the
    Spearman-Brown formula, ``2 r / (1 + r)``. This is the share of the variance that is not sampling noise. A prediction without
    error correlates with the measurement by its square root.

    The result is an estimate, not a bound, and it tends to be too high. Differences of depth between spots are in both
    halves and count as signal. log1p is not linear in depth, which adds up to .05 below 1,000 counts per spot. Genes that were
    chosen for their variance in the same counts were partly chosen for their noise, so choose genes on other slides.

    Parameters
    ----------
    counts
        Raw counts (n, all genes) of one slide. The library size is the sum over all columns.
    genes
        Numbers of the columns to report. None reports all.
    target_sum
        Counts per spot that a library is scaled to before log1p; None takes log1p of the raw counts.
    n_repeats
        Number of random splits.
    seed
        Seed of the splits.

    Returns
    -------
    Array (len(genes)) in [0, 1]; NaN for a gene whose counts, normalised, do not vary.

    Raises
    ------
    TypeError
        ``genes`` are not column numbers.
    ValueError
        Counts are negative, not integer, NaN or infinite, or there is no such column.

    Examples
    --------
    >>> ceiling = sf.metrics.noise_ceiling(adata.X, genes=[0, 1])
    >>> ceiling.shape
    (2,)
    """
    if type(counts).__name__ == "AnnData":
        raise TypeError("counts must be an array or a sparse matrix: give .X or a layer of the AnnData.")
    counts = sparse.csr_matrix(counts)
    data = counts.data
    if not np.isfinite(data).all() or (data < 0).any() or (data != np.round(data)).any():
        raise ValueError(
            "counts must be raw counts, non-negative integers; X looks normalised. If they are in a layer, pass it."
        )
    if n_repeats < 1:
        raise ValueError(f"n_repeats must be at least 1, not {n_repeats}.")
    genes = np.arange(counts.shape[1]) if genes is None else np.asarray(genes)
    if not np.issubdtype(genes.dtype, np.integer):
        raise TypeError("genes are column numbers here; of names, give [var_names.get_loc(name) for name in names].")
    if genes.size and not (0 <= genes.min() and genes.max() < counts.shape[1]):
        raise ValueError(f"genes are column numbers from 0 to {counts.shape[1] - 1}; some are not.")
    if target_sum is not None and not target_sum > 0:
        raise ValueError(f"target_sum must be positive, not {target_sum}.")
    rng, data = np.random.default_rng(seed), data.astype(np.int64)

    def normalised(values: np.ndarray) -> np.ndarray:
        # scanpy.pp.normalize_total would normalise all genes to give some of them, twice a repeat
        thinned = sparse.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
        chosen = thinned[:, genes].toarray().astype(np.float64)
        if target_sum is not None:
            chosen *= target_sum / np.maximum(np.asarray(thinned.sum(1), dtype=np.float64), 1)
        return np.log1p(chosen)

    r = np.zeros(len(genes))
    for _ in range(n_repeats):
        half = rng.binomial(data, 0.5)
        # a half in which the gene is constant, mostly because it is empty, agrees with nothing
        r += np.nan_to_num(pearson(normalised(half), normalised(data - half))) / n_repeats
    r = np.clip(r, 0, 1)
    return np.where(constant(_arrays.table(normalised(data), "counts")), np.nan, np.sqrt(2 * r / (1 + r)))
