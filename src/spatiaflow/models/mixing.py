"""How well samples mix among their niches, and how far niches lie apart.

Both are measured in log odds of the niches, in units of the spread of cells within a niche. So they see what tells niches
apart, and nothing else.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

N_NEAR = 30  # neighbours whose samples are counted
MOST = 3000  # cells that are compared, all samples together
CHUNK = 500  # cells whose distances are in memory at a time


def in_spreads(scores: np.ndarray, niche: np.ndarray) -> np.ndarray:
    """Log odds (n x niches) as coordinates in which cells of a niche have unit covariance, as in linear discriminant analysis."""
    sums = np.zeros((scores.shape[1], scores.shape[1]))
    np.add.at(sums, niche, scores)
    centre = sums / np.maximum(np.bincount(niche, minlength=len(sums)), 1)[:, None]
    within = scores - centre[niche]
    variance, axes = np.linalg.eigh(within.T @ within / len(scores))
    kept = variance > 1e-6 * variance.max()
    return scores @ axes[:, kept] / np.sqrt(variance[kept])


def mixing(x: np.ndarray, sample: np.ndarray, xy: np.ndarray, reach: float) -> np.ndarray:
    """Share of other samples among the 30 nearest cells, over the share by chance; one mean for each sample, at most 1.

    Parameters
    ----------
    x, sample
        Embedding (n x d) and number of the sample of each cell, 0, 1, ...
    xy, reach
        Positions (n x 2, µm; missing: no position). Cells of the same sample within ``reach`` of a cell are no neighbours of it:
        they are alike because they have the same surroundings.
    """
    size, ratio = np.bincount(sample), np.empty(len(x))
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        own = sample[part, None] == sample
        around = own & (cdist(xy[part], xy) <= reach)
        around[np.arange(len(around)), np.arange(start, start + len(around))] = True
        left = len(x) - around.sum(1)
        k = min(N_NEAR, int(left.min()))
        near = np.argpartition(np.where(around, np.inf, cdist(x[part], x)), k - 1, 1)[:, :k]
        chance = (len(x) - size[sample[part]]) / left
        ratio[part] = (sample[near] != sample[part, None]).mean(1) / chance
    return np.minimum(np.bincount(sample, ratio) / size, 1.0)


def separation(x: np.ndarray, niche: np.ndarray) -> float:
    """Mean silhouette of the niches in an embedding; NaN where all cells lie in one, or each in its own."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(x, niche)) if 1 < len(np.unique(niche)) < len(x) else np.nan
