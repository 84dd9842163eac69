"""What imputation regresses on: columns of a cell's own genes, its neighbours', a kernel of both, and its image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from spatiaflow.models.counts import log_normalize
from spatiaflow.models.spatial import spatial_graph

NEAR = (5, 15, 50)  # neighbours whose genes are averaged
BRANCHES = ("genes", "neighbors", "kernel", "image")
N_COMPONENTS, N_KERNEL, BANDWIDTH = 30, 1500, 0.9
CHUNK, N_BLOCKS = 4096, 5


@dataclass
class CellTable:
    """Cells of one slide (or one dissociated sample) as arrays."""

    counts: sparse.csr_matrix  # n x inputs
    library: np.ndarray  # n, total counts of the genes that the query measures too
    xy: np.ndarray | None = None  # n x 2; None: dissociated
    image: np.ndarray | None = None  # n x d
    targets: sparse.csr_matrix | None = None  # n x genes

    def __len__(self) -> int:
        return self.counts.shape[0]


def neighbor_means(xy: np.ndarray, sizes: tuple[int, ...] = NEAR) -> list[sparse.csr_matrix]:
    """Matrices (n x n) that average over the nearest cells, without the cell itself; fewer where there are not so many."""
    out = []
    for k in sizes:
        graph = spatial_graph(xy, k)
        mask, index = graph.mask.numpy(), graph.index.numpy()
        count = mask.sum(1)
        weight = np.repeat(1 / np.maximum(count, 1), count).astype(np.float32)
        out.append(sparse.csr_matrix((weight, index[mask], np.r_[0, np.cumsum(count)]), (len(xy), len(xy))))
    return out


def left_out(cells: list[CellTable]) -> list[np.ndarray]:
    """Block of every cell, to be left out together: slides where there are three, else contiguous bands of each.

    Cells without positions are taken at random.
    """
    if len(cells) > 2:
        return [np.full(len(one), i % N_BLOCKS) for i, one in enumerate(cells)]
    out = []
    for one in cells:
        place = np.random.default_rng(0).permutation(len(one))
        if one.xy is not None:
            place = np.argsort(np.argsort(one.xy[:, np.argmax(np.ptp(one.xy, axis=0))], kind="stable"))
        out.append(place * N_BLOCKS // len(one))
    return out


@dataclass
class Design:
    """Columns of the regression: what they are, how they are centred and scaled; fitted to reference cells alone.

    Columns of expression are divided by the square root of their deviation, between leaving genes as they are, where the
    abundant rule, and standardising them, where the noise of rare ones does.
    """

    inputs: list[str]
    target_sum: float
    branch: np.ndarray  # columns, index into BRANCHES
    gene: np.ndarray  # columns, index into inputs, -1 where a column is not of one gene
    centre: np.ndarray = field(repr=False)  # columns without the kernel
    scale: np.ndarray = field(repr=False)
    components: np.ndarray | None = field(default=None, repr=False)  # inputs x components, scaled
    directions: np.ndarray | None = field(default=None, repr=False)  # 2 components x kernel features
    phase: np.ndarray | None = field(default=None, repr=False)
    spatial: bool = False
    n_image: int = 0

    @classmethod
    def fit(
        cls, cells: list[CellTable], inputs: list[str], target_sum: float, *, kernel: bool = True, seed: int = 0
    ) -> Design:
        """Centre, scale and components of some cells."""
        spatial = all(c.xy is not None for c in cells)
        n_image = cells[0].image.shape[1] if all(c.image is not None for c in cells) else 0
        g = len(inputs)
        branch, gene = cls.layout(g, spatial, n_image)
        design = cls(inputs, target_sum, branch, gene, None, None, spatial=spatial, n_image=n_image)
        n = total = square = cross = 0
        for one in cells:
            for x in design.raw(one):
                x = x.astype(np.float64)
                n, total, square = n + len(x), total + x.sum(0), square + (x**2).sum(0)
                cross = cross + x[:, 1 : g + 1].T @ x[:, 1 : g + 1]
        design.centre = total / n
        std = np.sqrt(np.maximum(square / n - design.centre**2, 0))
        flat = std < 1e-4
        expression = gene >= 0
        design.scale = np.where(expression, np.sqrt(np.maximum(std, 1e-4)), std)
        typical = np.median(design.scale[1 : g + 1][~flat[1 : g + 1]]) if (~flat[1 : g + 1]).any() else 1.0
        # neighbours' means and images are steadier than a cell's own genes, and there are more of them
        design.scale *= np.where(branch == 1, 1 / 0.3, np.where(expression, 1.0, 1 / (0.5 * typical)))
        design.scale[branch == 3] *= 2.0
        design.scale[flat] = np.inf  # a column that does not vary says nothing
        if kernel:
            mean = design.centre[1 : g + 1]
            values, axes = np.linalg.eigh(cross / n - np.outer(mean, mean))
            m = min(N_COMPONENTS, g)
            size = max(float(np.sqrt(max(values[-1], 1e-12))), 1e-6)
            rng = np.random.default_rng(seed)
            design.components = (axes[:, ::-1][:, :m] / (size * np.sqrt(6))).astype(np.float32)
            design.directions = (BANDWIDTH * rng.normal(size=((1 + spatial) * m, N_KERNEL))).astype(np.float32)
            design.phase = rng.uniform(0, 2 * np.pi, N_KERNEL).astype(np.float32)
            design.branch = np.r_[branch, np.repeat(2, N_KERNEL)]
            design.gene = np.r_[gene, np.repeat(-1, N_KERNEL)]
        return design

    @staticmethod
    def layout(g: int, spatial: bool, n_image: int) -> tuple[np.ndarray, np.ndarray]:
        """Branch and gene of every column: log library, own genes, neighbours' genes, image."""
        n_near = len(NEAR) if spatial else 0
        branch = np.r_[0, np.repeat(0, g), np.repeat(1, n_near * g), np.repeat(3, n_image)]
        return branch, np.r_[-1, np.tile(np.arange(g), 1 + n_near), np.repeat(-1, n_image)]

    def raw(self, cells: CellTable) -> Iterator[np.ndarray]:
        """Columns as they are, chunk by chunk of cells: log library, own genes, neighbours' genes, image."""
        own = log_normalize(cells.counts, cells.library, self.target_sum)
        means = neighbor_means(cells.xy) if self.spatial else []
        for s in range(0, len(cells), CHUNK):
            rows = slice(s, min(s + CHUNK, len(cells)))
            parts = [np.log(np.maximum(cells.library[rows], 1))[:, None], own[rows].toarray()]
            parts += [(m[rows] @ own).toarray() for m in means]
            yield np.hstack([*parts, *([cells.image[rows]] if self.n_image else [])]).astype(np.float32)

    def columns(self, cells: CellTable) -> Iterator[np.ndarray]:
        """Scaled columns with the kernel's, chunk by chunk of cells."""
        g = len(self.inputs)
        for raw in self.raw(cells):
            x = (raw - self.centre.astype(np.float32)) / self.scale.astype(np.float32)
            if self.components is not None:
                z = [(raw[:, 1 : g + 1] - self.centre[1 : g + 1].astype(np.float32)) @ self.components]
                if self.spatial:
                    at = 1 + g * (1 + NEAR.index(15))
                    z.append((raw[:, at : at + g] - self.centre[at : at + g].astype(np.float32)) @ self.components)
                kernel = np.cos(np.hstack(z) @ self.directions + self.phase)
                x = np.hstack([x, (0.3 * kernel).astype(np.float32)])
            yield x

    def taken(self, branches: tuple[str, ...]) -> np.ndarray:
        """Columns of some branches, bool."""
        return np.isin(self.branch, [BRANCHES.index(b) for b in branches])
