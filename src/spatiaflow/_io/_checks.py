"""Checks of positions and counts: what cannot be, and hints at a wrong scale, at slides or at panels taken for one."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.spatial import cKDTree

from spatiaflow._io._scales import XENIUM_MPP
from spatiaflow._io._tables import counts as counts_of
from spatiaflow._io._tables import entry
from spatiaflow._settings import warn
from spatiaflow.models.slide import Slide

SLIDE_COLUMNS = (
    "library_id",
    "library",
    "sample",
    "sample_id",
    "section",
    "slide",
    "slide_id",
    "mouse",
    "donor",
    "batch",
    "fov",
)
BATCH_COLUMNS = ("dataset", "dataset_id", "study", "donor_id", "assay", "technology", "platform", "panel")
EXPECTED = 20.0  # counts of a gene, by the depth of a batch, that chance does not leave out
PARTS = (64, 16)  # consecutive parts of a table: the more, the better their edges fit a block, and the fewer the genes
SMALLEST = 1 / 16  # share of the rows: a smaller block of rows without some genes may be a border of the tissue
TOTALS = (
    "total_counts",
    "n_counts",
    "n_umi",
    "ncount_",
    "transcript_counts",
)  # columns of counts of all genes, or how they begin
FEW = 50  # genes: of so many the sum is no measure of depth, unless the panel has no more
CUT = 0.8  # share of the counts of all genes; less is lost by no filter of rare genes
JOIN = (
    'An outer join writes 0 for genes that were not measured, which counts as a measured 0: join with join="inner", give the '
    "samples as a list, or leave out those genes or rows."
)
HEXAGONAL = (100.0,)  # Visium
# legacy ST and its denser array, DBiT-seq, Stereo-seq bins, Visium HD bins
SQUARE = (200.0, 141.0, 100.0, 50.0, 25.0, 20.0, 16.0, 10.0, 8.0, 2.0)
CLOSE = 0.4  # of the median distance to the nearest cell: closer cells of one slide touch
SPACING = (3.0, 60.0)  # µm between neighbouring cells
AREA = (10.0, 3000.0)  # µm² of a cell


def check_positions(
    slide: Slide, table: AnnData, library_key: str | None, missing: bool, area: np.ndarray | None
) -> None:
    """Refuse positions that are not finite unless they may be ``missing``, and warn of what they hint at.

    ``area``: µm² of the cells, where they are known.
    """
    bad = ~np.isfinite(slide.xy).all(1)
    if bad.any() and not missing:
        raise ValueError(
            f"{int(bad.sum())} positions of slide {slide.name!r} are NaN or infinite "
            f"(first: {table.obs_names[slide.rows[np.argmax(bad)]]!r}); drop those rows."
        )
    points = check_separate(slide, table, library_key)
    check_scale(slide, points, area, any("params" in entry(table, name) for name in ("tiles", "grid")))


def check_separate(slide: Slide, table: AnnData, library_key: str | None) -> np.ndarray:
    """Return the distinct positions, and warn where several slides may lie over one another."""
    bad = ~np.isfinite(slide.xy).all(1)
    points = np.unique(slide.xy[~bad], axis=0)
    distinct, known = len(points), int((~bad).sum())
    if distinct < known:
        hint = "" if library_key else "; if several slides share this table, give library_key="
        warn(f"{known - distinct} positions of slide {slide.name!r} are duplicates of others{hint}.")
    if library_key is None and (column := _column_of_slides(slide, table, ~bad)) is not None:
        warn(
            f"obs[{column!r}] seems to tell several slides apart that lie over one another here; if so, give "
            f"library_key={column!r}."
        )
    return points


def _column_of_slides(slide: Slide, table: AnnData, known: np.ndarray) -> str | None:
    """A column of obs that seems to tell slides apart.

    By its name, because its groups alone are regular arrays, or because cells of one group keep a distance that others do not.
    """
    xy, rows = slide.xy[known], slide.rows[known]
    if len(rows) < 32:
        return None
    regular = Lattice(np.unique(xy, axis=0)).regular
    close = _close_pairs(xy)
    for name in table.obs.columns:
        column = table.obs[name].iloc[rows]
        if pd.api.types.is_float_dtype(column.dtype):
            continue
        codes, groups = pd.factorize(column)
        parts = [xy[codes == i] for i in range(len(groups))] if 2 <= len(groups) <= 50 else []
        if len(parts) < 2:
            continue
        if str(name).lower() in SLIDE_COLUMNS and any(_overlap(one, parts[0]) for one in parts[1:]):
            return name
        within = (np.bincount(codes[codes >= 0]) / len(codes)) ** 2  # of the pairs, if cells lay anywhere
        if within.sum() * len(close) >= 20 and (codes[close[:, 0]] == codes[close[:, 1]]).sum() < 2:
            return name
        named = not pd.api.types.is_numeric_dtype(column.dtype)
        if (
            named
            and not regular
            and all(len(part) >= 16 and Lattice(np.unique(part, axis=0)).regular for part in parts)
        ):
            return name
    return None


def _close_pairs(xy: np.ndarray) -> np.ndarray:
    """Pairs of cells (n x 2) much closer than neighbours are, as cells of one slide hardly ever and of two slides often are."""
    rows = np.linspace(0, len(xy) - 1, min(len(xy), 20_000)).astype(int)  # evenly spread
    distance, near = (both[:, 1] for both in cKDTree(xy).query(xy[rows], k=2))
    close = distance < CLOSE * np.median(distance)
    return np.stack([rows[close], near[close]], 1)


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the boxes of two sets of points share more than half of the smaller one."""
    low, high = np.maximum(first.min(0), second.min(0)), np.minimum(first.max(0), second.max(0))
    area = min(np.ptp(first, axis=0).prod(), np.ptp(second, axis=0).prod())
    return bool((high > low).all() and (high - low).prod() > 0.5 * area)


def check_measured(table: AnnData, counts: sparse.csr_matrix, library_key: str | None) -> None:
    """Warn of genes without any count in a whole batch: an outer join writes 0 where a gene was not measured.

    Batches are told by columns of obs. Without one, rows of a batch follow each other.

    Parameters
    ----------
    counts
        Counts of the table, n_obs x n_vars.
    library_key
        A column of obs that tells batches apart, besides those of usual names.
    """
    regions = entry(table, "spatialdata_attrs").get("region_key")
    for name in table.obs.columns:
        if name not in (library_key, regions) and str(name).lower() not in (*SLIDE_COLUMNS, *BATCH_COLUMNS):
            continue
        codes, groups = pd.factorize(table.obs[name])
        if not 2 <= len(groups) <= 50:
            continue
        known = np.flatnonzero(codes >= 0)
        of = sparse.csr_matrix((np.ones(len(known)), (codes[known], known)), (len(groups), table.n_obs))
        total = (of @ counts).toarray()
        for group, own in zip(groups, total):
            missing, _ = _missing(own, total.sum(0) - own)
            if missing.sum() >= max(3, 0.01 * table.n_vars):
                _warn_of_join(table, missing, f"obs[{name!r}] {str(group)!r}")
                return
    for n_parts in PARTS:
        if table.n_obs >= 2 * n_parts and (found := _unmeasured_rows(counts, n_parts)) is not None:
            missing, first, last = found
            names = table.obs_names
            _warn_of_join(table, missing, f"{last - first + 1} rows from {names[first]!r} to {names[last]!r}")
            return


def _warn_of_join(table: AnnData, missing: np.ndarray, where: str) -> None:
    """Warn of ``missing`` genes (bool) of the rows that ``where`` describes."""
    first = table.var_names[np.argmax(missing)]
    warn(
        f"{int(missing.sum())} genes (first: {first!r}) have no count in {where}, and many elsewhere. Were samples joined? {JOIN}"
    )


def _missing(own: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genes that have counts in other rows and, against all chance, none in their own; and the counts to expect of each.

    ``own``, ``others``: counts of each gene in some rows, and in all others. The depth of the rows is judged by the genes that
    they do have.
    """
    expected = others * (own.sum() / max(others[own > 0].sum(), 1))
    return (own == 0) & (expected >= EXPECTED), expected


def _unmeasured_rows(counts: sparse.csr_matrix, n_parts: int) -> tuple[np.ndarray, int, int] | None:
    """Genes that whole blocks of rows did not measure, and the first and last row of the first block; None without any.

    Genes that were not measured are absent from the very same parts of the table, and present in all others, also right
    beside. Genes that belong to a region or a type of cell differ in where they are absent, become rare before they are, and
    others of their kind have a few counts there.
    """
    n = counts.shape[0]
    part = np.arange(n) * n_parts // n
    total = (sparse.csr_matrix((np.ones(n), (part, np.arange(n))), (n_parts, n)) @ counts).toarray()
    empty = total == 0
    n_empty = empty.sum(0)
    # improbable: in as many parts others have many counts
    genes = np.flatnonzero((n_empty >= SMALLEST * n_parts) & (total.sum(0) * n_empty >= EXPECTED * (n_parts - n_empty)))
    packed = np.packbits(empty[:, genes], axis=0).T
    _, pattern, size = np.unique(packed, axis=0, return_inverse=True, return_counts=True)
    for one in np.argsort(-size, kind="stable")[:20]:
        alike = genes[pattern.ravel() == one]
        parts = empty[:, alike[0]]
        own = total[parts].sum(0)
        missing, expected = _missing(own, total[~parts].sum(0))
        rare = (own > 0) & (expected >= EXPECTED) & (own < 0.1 * expected)
        enough = missing[alike].sum() >= max(5, 0.01 * (expected >= EXPECTED).sum())
        if enough and missing.sum() > rare.sum() and _begins_at_once(total[:, alike], total[:, own > 0].sum(1), parts):
            seen = np.flatnonzero(np.asarray(counts[:, np.flatnonzero(missing)].sum(1)).ravel())
            inside = int(np.argmax(parts[part]))
            after = int(np.searchsorted(seen, inside))
            first = int(seen[after - 1]) + 1 if after else 0
            return missing, first, int(seen[after]) - 1 if after < len(seen) else n - 1
    return None


def _begins_at_once(total: np.ndarray, depth: np.ndarray, absent: np.ndarray) -> bool:
    """Whether genes (counts, parts x genes) are as frequent beside the parts in which they are ``absent`` as elsewhere.

    ``depth``: counts of other genes in each part. A part next to an absent one may lie in the block to a large share, so the
    one after it is judged.
    """
    rate = (total / total.sum(0)).mean(1) / np.maximum(depth, 1)
    near = np.convolve(absent, np.ones(3), "same") > 0
    beside = (np.convolve(absent, np.ones(5), "same") > 0) & ~near
    return not beside.any() or rate[beside].mean() > 0.5 * rate[~absent].mean()


def check_library(tables: list[AnnData], layer: str | None, fix: str) -> None:
    """Warn of tables that were cut to some of their genes: the library size, a sum over all genes, is no longer known.

    ``fix``: the call that needs no such cut.
    """
    for table in tables:
        if hint := _sign_of_a_cut(table, layer):
            warn(
                f"the table has {table.n_vars:,} genes, and {hint}. The library size is the sum over all genes: if the table was "
                "cut to some of them, expression is a share of these and too high. Keep all genes in the table, and name those "
                f"to predict: {fix}."
            )
            return


def _sign_of_a_cut(table: AnnData, layer: str | None) -> str:
    """What hints at genes that a table had and lost; "" where nothing does."""
    rows = np.unique(np.linspace(0, table.n_obs - 1, 1000).astype(int))
    own = np.asarray(counts_of(table, None, layer, rows)[0].sum(1), float).ravel()
    for name in table.obs.columns:
        if not str(name).lower().startswith(TOTALS) or not pd.api.types.is_numeric_dtype(table.obs[name]):
            continue
        total = table.obs[name].to_numpy(np.float64, na_value=np.nan)[rows]
        known = np.isfinite(total) & (total > 0)
        if known.any() and (share := own[known].sum() / total[known].sum()) < CUT:
            return f"they have {share:.0%} of the counts in obs[{name!r}]"
    if table.raw is not None and table.n_vars < 0.5 * table.raw.n_vars:
        return f"its raw has {table.raw.n_vars:,}"
    if "highly_variable" in table.var and table.var["highly_variable"].eq(True).all():
        return "var['highly_variable'] is True for all"
    return "so few tell the depth only if the panel measures no others" if table.n_vars <= FEW else ""


def check_scale(slide: Slide, points: np.ndarray, area: np.ndarray | None, is_grid: bool) -> None:
    """Warn of a scale that no cell and no array of spots can have.

    Parameters
    ----------
    points
        Distinct positions of the slide, µm, n x 2.
    area
        Areas of its cells, µm², where they are known.
    is_grid
        The table holds tiles of :func:`spatiaflow.pp.tiles` or squares of :func:`spatiaflow.pp.grid`, which know their size.
    """
    if len(points) < 16 or is_grid:
        return
    advice, found = None, Lattice(points)
    step = found.step
    if found.regular:
        pitches = HEXAGONAL if found.hexagonal else SQUARE
        closest = min(pitches, key=lambda known: abs(np.log(known / step)))
        if abs(step / closest - 1) > 0.15:
            kind = "spots on a hexagonal array (Visium)" if found.hexagonal else "spots on a square array"
            advice = (
                f"its spots are {step:.4g} µm apart, but {kind} have a pitch of {', '.join(f'{p:g}' for p in pitches)} µm "
                f"({closest:g} would need mpp={slide.mpp * closest / step:.4g})"
            )
    elif not SPACING[0] <= step <= SPACING[1]:
        fits = _fitting(slide.mpp, step, SPACING, 1)
        advice = f"neighbours are {step:.3g} µm apart, but cells lie {SPACING[0]:g} to {SPACING[1]:g} µm apart ({fits})"
    elif area is not None and not AREA[0] <= (size := float(np.nanmedian(area))) <= AREA[1]:
        fits = _fitting(slide.mpp, size, AREA, 2)
        advice = f"its cells have {size:,.4g} µm² (median), but cells have {AREA[0]:g} to {AREA[1]:,g} µm² ({fits})"
    if advice:
        warn(f"slide {slide.name!r}: at {slide.mpp:g} µm per pixel {advice}. Check mpp.")


def _fitting(mpp: float, found: float, limits: tuple[float, float], power: int) -> str:
    """The scale that would fit, an instrument's before others."""
    for known in (1.0, XENIUM_MPP, 0.12028, 0.18, 0.5, 0.25):
        if limits[0] <= found * (known / mpp) ** power <= limits[1]:
            return f"mpp={known:g} would fit"
    return f"mpp={mpp * ((limits[0] * limits[1]) ** 0.5 / found) ** (1 / power):.2g} would fit"


class Lattice:
    """Whether distinct points (n x 2) form an array of spots, printed ones jittered, and which.

    Attributes
    ----------
    step
        Median distance of a point to its nearest neighbour.
    regular
        Whether they form an array.
    hexagonal
        Whether a point has six nearest neighbours; a square array has four.
    """

    def __init__(self, points: np.ndarray):
        near = cKDTree(points).query(points, k=min(7, len(points)))[0][:, 1:]
        nearest = near[:, 0]
        self.step = float(np.median(nearest))
        low, lower, upper, high = np.percentile(nearest, [10, 20, 80, 90])
        self.regular = bool(upper - lower < 0.17 * self.step and high - low < 0.25 * self.step)
        self.hexagonal = bool(near.shape[1] == 6 and np.median(near[:, 5]) < 1.2 * self.step)
