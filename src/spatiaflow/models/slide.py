"""The one container that every model, trainer, benchmark and test works on: the spots or cells of one slide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from torch import Tensor

    from spatiaflow.models.spatial import Graph


MIN_TISSUE = 0.05  # share of a patch: spots under tissue have .08 and more, glass 0 (benchmarks/glass.py)
LEVELS = ("cell", "niche", "tissue")  # of SPATIA's embeddings
ABSENT: Any = None  # a slide without this array; whoever calls gather() says which arrays it needs


class StoredRows(Protocol):
    """Counts that stay on disk and are read by rows, as :class:`spatiaflow._io.StoredCounts`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix: ...

    def take(self, rows: np.ndarray) -> StoredRows: ...

    def named(self, columns: np.ndarray, n_genes: int) -> StoredRows: ...


class Rows(Protocol):
    """A matrix that gives some of its rows as an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Reordered:
    """Some rows of an array in an order of their own, copied when they are read."""

    values: np.ndarray  # n x d
    order: np.ndarray  # m

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return self.values[self.order[rows]]


class CropReader(Protocol):
    """Crops that are cut when they are read, as :class:`spatiaflow.pp.Crops`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    channels: tuple[str, ...]
    image: Any
    xy: np.ndarray
    pixels: int
    places: np.ndarray
    range: np.ndarray

    def __len__(self) -> int: ...

    @property
    def inside(self) -> np.ndarray: ...

    @property
    def scale(self) -> np.ndarray: ...

    def read(self, rows: np.ndarray) -> Tensor: ...

    def batches(self, batch_size: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]: ...

    def matched(self, channels: Sequence[str], names: Mapping[str, str] | None, slide_name: str) -> CropReader: ...

    def take(self, rows: np.ndarray) -> CropReader: ...


@dataclass(frozen=True, eq=False)
class Slide:
    """The spots or cells of one slide as arrays. Row i of every array is ``obs_names[i]``.

    Attributes
    ----------
    name
        Name of the slide, unique among the slides of one call.
    obs_names
        Names of the spots or cells, n, unique.
    xy
        Positions, n x 2, float64, µm. None: dissociated cells.
    counts
        Raw counts, n x genes, CSR or stored on disk.
    library
        Counts of all genes measured, also of those that ``genes`` leaves out, n.
    genes
        Names of the columns of ``counts``.
    measured
        Which of ``genes`` the slide's panel measures, bool. The counts of the others are unknown, not zero.
    features
        Numbers of each row, n x d: an encoder's, or an embedding.
    crops
        Images of the cells, read when they are needed.
    labels
        A label of each row, n.
    tissue
        Name of the tissue. Tissues are drawn evenly in training.
    donor
        Name of the donor; "" where it is not known.
    tissue_share
        Share of the patch around each row that is tissue, n; NaN where it is not known.
    rows, mpp, element, coordinate_system
        Where the slide comes from: rows of the table, µm per unit of the stored positions, and the SpatialData element and
        coordinate system of the positions.

    Examples
    --------
    >>> slide = sf.models.Slide("a", ["c1", "c2"], xy=[[0, 0], [30, 0]])
    >>> slide
    Slide 'a': 2 rows, 0 genes; xy
    >>> slide.pitch
    30.0
    """

    name: str
    obs_names: np.ndarray
    xy: np.ndarray = ABSENT
    counts: sparse.csr_matrix = ABSENT  # or StoredRows
    library: np.ndarray = ABSENT
    genes: tuple[str, ...] = ()
    measured: np.ndarray = ABSENT
    features: np.ndarray = ABSENT  # or Reordered
    crops: CropReader = ABSENT
    labels: np.ndarray = ABSENT
    tissue: str = ""
    donor: str = ""
    tissue_share: np.ndarray = ABSENT
    rows: np.ndarray = ABSENT
    mpp: float = 1.0
    element: str | None = None
    coordinate_system: str | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # a frozen dataclass parses its input once, here
        n = len(self.obs_names)
        set_field(self, "obs_names", np.asarray(self.obs_names))
        set_field(self, "genes", tuple(self.genes))
        if self.xy is not None:
            set_field(self, "xy", np.asarray(self.xy, np.float64))
            if self.xy.shape != (n, 2):
                raise ValueError(f"slide {self.name!r}: xy must be {n} x 2; its shape is {self.xy.shape}.")
        if sparse.issparse(self.counts) and self.counts.shape != (n, len(self.genes)):
            raise ValueError(
                f"slide {self.name!r}: counts must be {n} rows x {len(self.genes)} genes; their shape is {self.counts.shape}."
            )
        if len(set(self.genes)) < len(self.genes):
            raise ValueError(f"slide {self.name!r}: genes names one of them twice.")
        if self.measured is None:
            set_field(self, "measured", np.ones(len(self.genes), bool))
        if self.measured.shape != (len(self.genes),):
            raise ValueError(f"slide {self.name!r}: measured must have one value for each of {len(self.genes)} genes.")
        for field in ("library", "features", "crops", "labels", "tissue_share", "rows", "counts"):
            values = getattr(self, field)
            found = n if values is None else values.shape[0] if hasattr(values, "shape") else len(values)
            if found != n:
                raise ValueError(f"slide {self.name!r}: {field} must have {n} rows, as obs_names; it has {found}.")
        if self.library is not None and not (np.asarray(self.library) >= 0).all():
            raise ValueError(f"slide {self.name!r}: library sizes must not be negative or NaN.")

    def __len__(self) -> int:
        return len(self.obs_names)

    def __repr__(self) -> str:
        names = ("xy", "counts", "library", "features", "crops", "labels")
        has = ", ".join(name for name in names if getattr(self, name) is not None)
        return f"Slide {self.name!r}: {len(self)} rows, {len(self.genes)} genes; {has}"

    @cached_property
    def pitch(self) -> float:
        """Median distance to the nearest other position, µm; 1 where there is none."""
        return 1.0 if self.xy is None else pitch(self.xy)

    @property
    def on_tissue(self) -> np.ndarray:
        """Which rows stand on tissue, bool; also those of which it is not known."""
        if self.tissue_share is None:
            return np.ones(len(self), bool)
        return ~(self.tissue_share < MIN_TISSUE)

    @property
    def box(self) -> dict:
        """What a model's card says of a slide: rows, and the corners of its box in µm."""
        corners = {} if self.xy is None else {"box_um": [*self.xy.min(0), *self.xy.max(0)]}
        return {"n_obs": len(self)} | corners

    def take(self, rows: np.ndarray, name: str | None = None) -> Slide:
        """Some of the rows (indices or bool), as a slide of its own."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        parts: dict[str, Any] = {}
        for field in ("obs_names", "xy", "library", "features", "labels", "tissue_share", "rows"):
            values = getattr(self, field)
            parts[field] = None if values is None else values[rows]
        counts = self.counts
        if counts is not None:
            counts = counts[rows] if sparse.issparse(counts) else counts.take(rows)
        crops = None if self.crops is None else self.crops.take(rows)
        return replace(self, name=name or self.name, counts=counts, crops=crops, **parts)

    def align(self, genes: Sequence[str]) -> Slide:
        """The slide with the columns ``genes``. Genes that it lacks are masked in ``measured``; ``library`` stays."""
        genes = tuple(genes)
        if genes == self.genes:
            return self
        place = {gene: i for i, gene in enumerate(genes)}
        columns = np.array([place.get(gene, -1) for gene in self.genes], int)
        measured = np.zeros(len(genes), bool)
        measured[columns[(columns >= 0) & self.measured]] = True
        counts = self.counts
        if sparse.issparse(counts):
            coo = counts.tocoo()
            known = columns[coo.col] >= 0
            entries = coo.data[known], (coo.row[known], columns[coo.col[known]])
            counts = sparse.csr_matrix(entries, (counts.shape[0], len(genes)))
        elif counts is not None:
            counts = counts.named(columns, len(genes))
        return replace(self, counts=counts, genes=genes, measured=measured)

    def bands(self, n: int) -> list[Slide]:
        """Cut the slide into ``n`` contiguous bands of equal size along its longer side."""
        order = np.argsort(self._along, kind="stable")
        return [self.take(np.sort(part), f"{self.name}:{i}") for i, part in enumerate(np.array_split(order, n))]

    def hold_out(self, share: float, gap: float = 0.0) -> tuple[Slide, Slide]:
        """Split into training rows and the far band with ``share`` of the rows, with at most ``gap`` µm between them."""
        along = self._along
        edge = float(np.quantile(along, 1 - share))
        gap = min(gap, 0.1 * float(np.ptp(along)))
        far = along > edge
        far = far if far.any() else along >= edge  # the last column of an array may hold more than ``share``
        return self.take((along <= edge - gap) & ~far), self.take(far)

    def log_normalized(self, target_sum: float | None = 1e4) -> sparse.csr_matrix:
        """log1p of counts per ``target_sum`` of each row's library, n x genes, CSR; None: log1p of raw counts."""
        from spatiaflow.models.counts import log_normalize

        return log_normalize(self.counts, self.library, target_sum)

    def graph(self, k: int, *, ties: str = "whole", scale: float | None = None) -> Graph:
        """The spatial graph of ``k`` neighbours, see :func:`spatiaflow.models.spatial.spatial_graph`."""
        from spatiaflow.models.spatial import spatial_graph

        return spatial_graph(self.xy, k, ties=ties, scale=scale)

    @property
    def _along(self) -> np.ndarray:
        """Positions along the longer side of the slide, n."""
        if self.xy is None:
            raise ValueError(f"slide {self.name!r} has no positions.")
        return self.xy[:, int(np.argmax(np.ptp(self.xy, axis=0)))]


def square_corners(xy: np.ndarray, side: float) -> np.ndarray:
    """Corners of squares around points, n x 4 x 2, in turn."""
    return xy[:, None] + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2


def pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest distinct neighbour; 1 for a single position."""
    distinct = np.unique(xy, axis=0)
    if len(distinct) < 2:
        return 1.0
    return float(np.median(cKDTree(distinct).query(distinct, k=2)[0][:, 1]))
