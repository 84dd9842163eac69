"""Niche and tissue levels by construction: principal components of genes, averaged over the tissue around each cell.

The components are those of genes that are standardised slide by slide, so that capture and composition of a slide shift
nothing, and their axes are fitted to all slides jointly. Averages are Gaussian, at three scales, and include the cell itself.
Components keep their scale: neither they nor their averages are standardised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds
from scipy.spatial import cKDTree

from spatiaflow.models.counts import log_normalize
from spatiaflow.models.preprocess import spread, standard_of
from spatiaflow.models.slide import Slide

N_COMPONENTS = 30
SCALES = (0.5, 1.0, 2.0)  # of the averages, side by side
N_AROUND = 45  # effective neighbours of the middle scale: 40 um in mouse cortex
TISSUE = 4.0  # the tissue level's scale over the niche level's
REACH = 3.0  # standard deviations at which a Gaussian is cut
BIN = 0.25  # standard deviations: cells closer than this are averaged before they are weighed
CHUNK = 4096  # cells whose surroundings are in memory at a time


def usual_um(slides: Sequence[Slide]) -> float:
    """Standard deviation (µm) of a Gaussian that holds about 45 effective neighbours of the median cell.

    A Gaussian over cells of density d has 4 pi d sigma^2 effective neighbours, and a disc with as many has the radius 2 sigma.
    """
    halves = []
    for slide in slides:
        k = min(N_AROUND, len(slide) - 1)
        if k < 1:
            continue
        rows = spread(len(slide), 5000)
        distance = cKDTree(slide.xy).query(slide.xy[rows], k=[k + 1])[0]
        halves.append(float(np.median(distance)) / 2 * (N_AROUND / k) ** 0.5)
    return max(float(np.median(halves)), 1e-6) if halves else 1.0


def gaussian_means(
    xy: np.ndarray, values: np.ndarray, sigmas: Sequence[float], rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows, and the Gaussian means of all cells' values around them: rows x (sigmas x columns of ``values``).

    Cells within a quarter of a standard deviation of each other are summed first and weighed at their centroid, so that time
    and memory do not grow with the square of the radius.

    Parameters
    ----------
    xy, values
        Positions (n x 2, µm) and values (n x d).
    sigmas
        Standard deviations, µm.
    rows
        Cells whose surroundings are averaged; all when None.
    """
    rows = np.arange(len(xy)) if rows is None else rows
    sources = [_binned(xy, values, BIN * sigma) for sigma in sigmas]
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        here, out = cKDTree(xy[part]), []
        for sigma, (tree, count, total) in zip(sigmas, sources):
            near = here.sparse_distance_matrix(tree, REACH * sigma, output_type="coo_matrix").tocoo()
            weight = sparse.csr_matrix((np.exp(-0.5 * (near.data / sigma) ** 2), (near.row, near.col)), near.shape)
            out.append((weight @ total) / (weight @ count)[:, None])
        yield part, np.hstack(out)


def gaussian_levels(xy: np.ndarray, values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian means of values around every cell at three scales, n x (3 x columns of ``values``), float32."""
    return np.concatenate([v for _, v in gaussian_means(xy, values, [sigma * s for s in SCALES])]).astype(np.float32)


def _binned(xy: np.ndarray, values: np.ndarray, side: float) -> tuple[cKDTree, np.ndarray, np.ndarray]:
    """Tree of the centroids of the occupied squares of a side, and the number of cells and the sum of values of each."""
    square = np.floor((xy - xy.min(0)) / side).astype(np.int64)
    _, member = np.unique(square[:, 0] * (square[:, 1].max() + 1) + square[:, 1], return_inverse=True)
    member = member.ravel()
    sums = sparse.csr_matrix((np.ones(len(xy)), (member, np.arange(len(xy)))))
    count = np.asarray(sums.sum(1)).ravel()
    return cKDTree((sums @ xy) / count[:, None]), count, sums @ values


@dataclass(frozen=True)
class Standardised:
    """Standardised genes of a slide, n x genes, without a dense array: what can be done with them is to multiply them.

    Attributes
    ----------
    values
        log1p of normalised counts, n x genes, CSR.
    centre, inverse
        Mean of each gene, and 1 over its standard deviation; 0 for genes that the slide does not measure.
    depth
        Counts of each cell, n. Cells without any tell nothing, so they stand at the mean.
    """

    values: sparse.csr_matrix
    centre: np.ndarray
    inverse: np.ndarray
    depth: np.ndarray

    def __len__(self) -> int:
        return self.values.shape[0]

    def __matmul__(self, axes: np.ndarray) -> np.ndarray:
        scaled = self.inverse[:, None] * axes
        return self.values @ scaled - np.outer(self.depth > 0, self.centre @ scaled)

    def transposed(self, weights: np.ndarray) -> np.ndarray:
        """Transpose (genes x n) times weights (n x d)."""
        return self.inverse[:, None] * (self.values.T @ weights - np.outer(self.centre, (self.depth > 0) @ weights))

    def take(self, genes: np.ndarray) -> Standardised:
        """Some of the genes."""
        return Standardised(self.values[:, genes], self.centre[genes], self.inverse[genes], self.depth)


def standardised(
    slide: Slide, target_sum: float, standard: np.ndarray | None = None, *, highest: float | None = None
) -> Standardised:
    """Genes of a slide, standardised.

    Parameters
    ----------
    standard
        See :func:`spatiaflow.models.preprocess.gene_standard`; that of the slide's own cells when None.
    highest
        Standard deviations above the mean at which values are cut, so that a rare gene is no axis of its own. Averages over
        many cells do not need it.
    """
    standard = cast("np.ndarray", standard_of(slide, target_sum)) if standard is None else standard
    centre, deviation = standard[:2].astype(np.float64)
    counts = slide.counts[np.arange(len(slide))]
    depth = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
    values = log_normalize(counts, depth, target_sum)
    if highest is not None:
        values.data = np.minimum(values.data, (centre + highest * deviation).astype(np.float32)[values.indices])
    return Standardised(values, centre, slide.measured / deviation, depth)


def joint_axes(parts: Sequence[Standardised], n_components: int = N_COMPONENTS) -> np.ndarray:
    """Principal axes of the genes of all slides together, genes x components; the largest entry of each is positive."""
    ends, n_genes = np.cumsum([0, *map(len, parts)]), parts[0].values.shape[1]
    n, k = int(ends[-1]), min(n_components, int(ends[-1]), n_genes)

    def forward(v: np.ndarray) -> np.ndarray:
        return np.concatenate([part @ v.reshape(n_genes, -1) for part in parts])

    def backward(u: np.ndarray) -> np.ndarray:
        u = u.reshape(n, -1)
        return np.sum([part.transposed(u[a:b]) for part, a, b in zip(parts, ends, ends[1:])], axis=0)

    if min(n, n_genes) <= 2 * k:  # as many as there are: no iteration finds them sooner
        found = np.linalg.svd(forward(np.eye(n_genes)), full_matrices=False)[2][:k]
    else:
        z = LinearOperator(
            (n, n_genes), dtype=np.float64, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward
        )
        start = np.random.default_rng(0).normal(size=min(n, n_genes))
        found = svds(z, k, v0=start, return_singular_vectors="vh")[2][::-1]
    return (found * np.sign(found[np.arange(len(found)), np.abs(found).argmax(1)])[:, None]).T
