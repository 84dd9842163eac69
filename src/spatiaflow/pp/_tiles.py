"""Tiles of tissue: the counts of the cells inside, summed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io


def tiles(
    data: AnnData | SpatialData,
    *,
    tile_um: float = 50.0,
    groupby: str | None = None,
    pool: list[str] | None = None,
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    key_added: str | None = None,
) -> AnnData:
    """Pool cells over a square grid: a niche (about 50 µm) or a piece of tissue (about 200 µm) a row.

    Every cell belongs to exactly one tile, and a tile's counts are the sum of its cells'. Tiles without cells are left
    out.

    Parameters
    ----------
    data
        Cells with counts and positions.
    tile_um
        Side of a tile, µm.
    groupby
        Column of ``.obs``: the shares of its groups among a tile's cells are kept in ``.obsm[groupby]``, for
        :func:`spatiaflow.tl.pair_transitions`.
    pool
        Slots of ``.obsm`` (embeddings, morphology) whose mean over a tile's cells is kept under the same name.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say.
    key_added
        Also keep the tiles in a SpatialData, as a table of this name on points at their centres (``f"{key_added}_points"``),
        so that verbs take them by ``table_key=``.

    Returns
    -------
    AnnData, tiles x genes: ``X`` (CSR, summed counts), ``.obs["library_id"]``, ``["n_cells"]``, ``.obsm["spatial"]`` (centre,
    in the unit of the cells' own positions) and ``.uns["tiles"]`` with ``tile_um`` and ``members``, the tile of each cell
    (its row; -1 for rows of the table that stand on no slide); with ``groupby`` ``.obsm[groupby]``, tiles x groups, whose names
    are ``.uns["tiles"][groupby]``. The images of an AnnData's slides are kept in
    ``.uns["spatial"]``, so that ``pp.crops(tiles, crop_um=tile_um, library_key="library_id")`` cuts them.

    With ``key_added`` a SpatialData is also written into. Sets:

    ``data[key_added]`` : the same, as a table
    ``data[f"{key_added}_points"]`` : the tiles' centres; with several slides ``f"{key_added}_{slide}"``, one for each

    Raises
    ------
    KeyError
        ``groupby`` is no column, or a slot of ``pool`` is missing.
    ValueError
        Counts are not raw, the scale is unknown, or ``key_added`` is given with an AnnData or taken by another element.

    Examples
    --------
    >>> tiles = sf.pp.tiles(sdata, tile_um=50, groupby="cell_type")
    >>> tiles.shape
    (16, 60)
    >>> tiles.uns["tiles"]["cell_type"]
    ['fibroblast', 'epithelial', 'lymphocyte', 'endothelial']
    """
    _io.positive(tile_um=tile_um)
    _io.slot_name(key_added)
    _, table = _io.unpack(data, table_key)
    slides = _io.slides(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
        spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    counts = sparse.csr_matrix(_io.counts(table, None, layer)[0])
    members, centres, names, libraries = np.full(table.n_obs, -1), [], [], []
    for slide in slides:
        cell = np.floor(slide.xy / tile_um).astype(
            int
        )  # a grid from the origin, so that it does not move with the cells
        place, which = np.unique(cell, axis=0, return_inverse=True)
        members[slide.rows] = len(names) + which.ravel()
        centres.append((place + 0.5) * tile_um / slide.mpp)
        names += [f"{slide.name}_{x}_{y}" for x, y in place]
        libraries += [slide.name] * len(place)
    known = np.flatnonzero(members >= 0)
    sums = sparse.csr_matrix((np.ones(len(known), counts.dtype), (members[known], known)), (len(names), table.n_obs))
    obs = pd.DataFrame(
        {"library_id": pd.Categorical(libraries), "n_cells": np.bincount(members[known], minlength=len(names))},
        index=names,
    )

    out = AnnData(sparse.csr_matrix(sums @ counts), obs=obs, var=table.var[[]].copy())
    out.obsm["spatial"] = np.concatenate(centres)
    images = table.uns.get("spatial", {}) if isinstance(data, AnnData) else {}
    out.uns["spatial"] = {}
    for slide in slides:
        known = dict(images.get(slide.name, {}))
        known["metadata"] = dict(known.get("metadata", {})) | {"microns_per_pixel": slide.mpp}
        out.uns["spatial"][slide.name] = known
    out.uns["tiles"] = {"tile_um": float(tile_um), "members": members, "spatiaflow": spatiaflow.__version__}
    if groupby is not None:
        state = _io.groups(table, groupby)
        one = state.cat.codes.to_numpy()[:, None] == np.arange(len(state.cat.categories))
        out.obsm[groupby] = (sums @ one).astype(np.float32) / obs["n_cells"].to_numpy(np.float32)[:, None]
        out.uns["tiles"][groupby] = [*map(str, state.cat.categories)]
    for key in pool or ():
        if key not in table.obsm:
            raise KeyError(f"obsm has no {key!r} to pool; it has {', '.join(map(repr, table.obsm)) or 'nothing'}.")
        mean, columns = _mean(sums, np.asarray(table.obsm[key], np.float64)), getattr(table.obsm[key], "columns", None)
        out.obsm[key] = mean if columns is None else pd.DataFrame(mean, index=names, columns=columns)
        for name in {key, key.rsplit("_", 1)[0]} & set(table.uns):  # how it was made
            out.uns[name] = table.uns[name]
    if key_added is not None:
        which = np.repeat(np.arange(len(slides)), [len(c) for c in centres])
        _io.keep(data, key_added, out, slides, which, np.concatenate([c * s.mpp for c, s in zip(centres, slides)]))
    return out


def _mean(sums: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Mean over each tile's cells (tiles x d); a cell without a value says nothing of its tile."""
    known = np.isfinite(values)
    n, total = sums @ known.astype(float), sums @ np.where(known, values, 0)
    return np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0).astype(np.float32)
