"""Gaussian random fields at given positions, exact where spots are few and by FFT where they are many."""

from __future__ import annotations

import numpy as np
from scipy import fft, sparse
from scipy.linalg import cholesky
from scipy.spatial.distance import cdist

MAX_DENSE = 1500  # spots; a Cholesky factor of them takes 18 MB and .1 s
# of the grid of the FFT: covariances of spots .1 (.25) of a range apart are wrong by at most .053 (.019)
CELLS_PER_RANGE = 6
MAX_GRID = 2**24  # cells


def kernel(distance: np.ndarray, length: float) -> np.ndarray:
    """Exponential correlation exp(-d / length)."""
    return np.exp(-distance / length)


class Fields:
    """Draws independent fields of variance 1 with correlation :func:`kernel` at fixed positions.

    Up to ``max_dense`` positions the draw is exact (Cholesky). Above, fields are drawn on a periodic grid by FFT (Dietrich and
    Newsam 1997, circulant embedding) and interpolated; the variance that interpolation loses comes back as white noise.

    Parameters
    ----------
    xy
        Positions, n x 2, µm.
    length
        Range of the kernel, µm.
    """

    def __init__(self, xy: np.ndarray, length: float, max_dense: int = MAX_DENSE):
        self.n, self.factor = len(xy), None
        if self.n <= max_dense:
            covariance = kernel(cdist(xy, xy), length)
            covariance.flat[:: self.n + 1] += 1e-8
            self.factor = cholesky(covariance, lower=True).astype(np.float32)
        else:
            self._embed(np.asarray(xy, np.float64) - np.min(xy, 0), length)

    def _embed(self, xy: np.ndarray, length: float) -> None:
        """Square roots of the grid's eigenvalues, and the interpolation from the grid to the positions."""
        extent, step = np.ptp(xy, axis=0), length / CELLS_PER_RANGE
        padded = extent + 5 * length  # a lag and its wrap-around then share less than exp(-5)
        step = max(step, float(np.sqrt(np.prod(padded) / MAX_GRID)))
        self.shape = tuple(fft.next_fast_len(int(np.ceil(side / step)) + 2) for side in padded)
        lag = [np.minimum(np.arange(m), m - np.arange(m)) * step for m in self.shape]
        spectrum = fft.fft2(kernel(np.hypot(lag[0][:, None], lag[1][None]), length)).real
        spectrum = np.maximum(spectrum, 0)  # the embedding is positive but for rounding and the cut at half the period
        spectrum *= np.prod(self.shape) / spectrum.sum()  # variance 1
        self.root = np.sqrt(spectrum / np.prod(self.shape)).astype(np.float32)
        cell = np.floor(xy / step).astype(np.int64)
        part = xy / step - cell
        corners = [(i, j) for i in (0, 1) for j in (0, 1)]
        weights = np.stack([np.abs(1 - i - part[:, 0]) * np.abs(1 - j - part[:, 1]) for i, j in corners], 1)
        columns = np.stack([(cell[:, 0] + i) * self.shape[1] + cell[:, 1] + j for i, j in corners], 1)
        rows = np.arange(0, 4 * self.n + 1, 4)
        self.interpolate = sparse.csr_matrix(
            (weights.astype(np.float32).ravel(), columns.ravel(), rows), (self.n, int(np.prod(self.shape)))
        )
        between = kernel(step * cdist(corners, corners), length)
        kept = np.einsum("na,ab,nb->n", weights, between, weights)
        self.lost = np.sqrt(np.maximum(1 - kept, 0)).astype(np.float32)

    def draw(self, rng: np.random.Generator, n_fields: int) -> np.ndarray:
        """Draw ``n_fields`` independent fields, n x n_fields, float32."""
        noise = rng.standard_normal((self.n, n_fields), dtype=np.float32)
        if self.factor is not None:
            return self.factor @ noise
        noise *= self.lost[:, None]
        white = np.empty((*self.shape, 2), np.float32)  # filled in place for each pair of fields
        for first in range(0, n_fields, 2):  # real and imaginary part are two fields
            rng.standard_normal(dtype=np.float32, out=white)
            grid = white.view(np.complex64)[..., 0]
            grid *= self.root
            pair = self.interpolate @ fft.fft2(grid, overwrite_x=True).ravel()
            noise[:, first : first + 2] += pair.view(np.float32).reshape(self.n, 2)[:, : n_fields - first]
        return noise
