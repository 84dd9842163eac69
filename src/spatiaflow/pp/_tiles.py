"""Tiles of tissue: the sum of the counts of the cells inside."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow.models.slide import Slide


@verb
@_io.each_object
def tiles(
    data: AnnData | SpatialData,
    *,
    tile_um: float = 50.0,
    groupby: str | None = None,
    pool: str | Sequence[str] | None = None,
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    key_added: str | None = None,
) -> AnnData:
    """Pool cells over a square grid. A tile of about 50 µm is a niche, one of about 200 µm a piece of tissue.

    Every cell belongs to exactly one tile. The counts of a tile are the sum over its cells. There are no tiles without cells.

    Parameters
    ----------
    data
        Cells with counts and positions; or a list or dict of such objects.
    tile_um
        Side of a tile, µm.
    groupby
        Column of ``.obs``. The shares of its groups among the cells of a tile are written to ``.obsm[groupby]``, for
        :func:`spatiaflow.tl.pair_transitions`.
    pool
        Slots of ``.obsm`` (embeddings, morphology). The mean over the cells of a tile is written under the same name.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Slot of the positions of an AnnData, and µm per pixel of them where ``.uns["spatial"]`` does not say.
    key_added
        Also keep the tiles in the SpatialData, as a table of this name on points at their centres
        (``f"{key_added}_points"``), so that verbs take them with ``table_key=``.

    Returns
    -------
    AnnData, tiles x genes: ``X`` (CSR, summed counts), ``.obs["library_id"]``, ``["n_cells"]``, ``.obsm["spatial"]`` (centre,
    in the unit of the cells' own positions) and ``.uns["tiles"]`` with ``params`` and ``members``, the row of the tile of each
    cell (-1 for cells that are on no slide); with ``groupby`` ``.obsm[groupby]``, tiles x groups, with the names in
    ``.uns["tiles"][groupby]``. The images of an AnnData's slides are kept in ``.uns["spatial"]``, so that
    ``pp.crops(tiles, crop_um=tile_um, library_key="library_id")`` works.

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
    where, started = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp), time.perf_counter()
    _io.positive(tile_um=tile_um)
    (_io.element_name if isinstance(data, SpatialData) else _io.slot_name)(key_added)
    _io.slot_name(groupby, "groupby")
    pool = _io.names(pool, "pool")
    _, table = _io.unpack(data, table_key)
    slides = _io.places(data, where, partial=True)
    for slide in slides:  # they become keys of uns["spatial"], and names of points
        (_io.slot_name if key_added is None else _io.element_name)(slide.name, f"the slide in {library_key or 'uns'}")
    counts = sparse.csr_matrix(_io.counts(table, None, layer)[0])
    members, places = _grid(slides, tile_um, table.n_obs)
    names = [f"{slide.name}_{x}_{y}" for slide, place in zip(slides, places) for x, y in place]
    libraries = np.repeat([slide.name for slide in slides], list(map(len, places)))
    known = np.flatnonzero(members >= 0)
    sums = sparse.csr_matrix((np.ones(len(known), counts.dtype), (members[known], known)), (len(names), table.n_obs))
    obs = pd.DataFrame(
        {"library_id": pd.Categorical(libraries), "n_cells": np.bincount(members[known], minlength=len(names))},
        index=names,
    )
    out = AnnData(sparse.csr_matrix(sums @ counts), obs=obs, var=table.var[[]].copy())
    xy = [(place + 0.5) * tile_um for place in places]
    out.obsm[Key.obsm.spatial] = np.concatenate([one / slide.mpp for one, slide in zip(xy, slides)])
    out.uns[Key.uns.spatial] = _images(table if isinstance(data, AnnData) else None, slides)
    out.uns["tiles"] = {"members": members}
    if groupby is not None:
        state = _io.groups(table, groupby)
        one = state.cat.codes.to_numpy()[:, None] == np.arange(len(state.cat.categories))
        out.obsm[groupby] = (sums @ one).astype(np.float32) / obs["n_cells"].to_numpy(np.float32)[:, None]
        out.uns["tiles"][groupby] = [*map(str, state.cat.categories)]
    for key in pool or ():
        if key not in table.obsm:
            raise KeyError(f"obsm has no {key!r} to pool; it has {', '.join(map(repr, table.obsm)) or 'nothing'}.")
        mean, columns = (
            _mean(sums, _io.matrix(table, key).astype(np.float64)),
            getattr(table.obsm[key], "columns", None),
        )
        out.obsm[key] = mean if columns is None else pd.DataFrame(mean, index=names, columns=columns)
        for name in {key, key.rsplit("_", 1)[0]} & set(table.uns):  # how it was made
            out.uns[name] = deepcopy(table.uns[name])
    params = _io.provenance(started, tile_um=float(tile_um), groupby=groupby, pool=[*(pool or ())], layer=layer)
    out.uns["tiles"]["params"] = _io.storable(params)
    if key_added is not None:
        which = np.repeat(np.arange(len(slides)), list(map(len, places)))
        _io.keep(data, key_added, out, slides, which, np.concatenate(xy))
    return out


def _grid(slides: Sequence[Slide], tile_um: float, n_obs: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the tile of each row (n_obs; -1: none), and the column and row of each slide's tiles on the grid."""
    members, places, n = np.full(n_obs, -1), [], 0
    for slide in slides:
        cell = np.floor(slide.xy / tile_um).astype(
            int
        )  # from the origin, so that the grid does not move with the cells
        place, which = np.unique(cell, axis=0, return_inverse=True)
        members[slide.rows] = n + which.ravel()
        places.append(place)
        n += len(place)
    return members, places


def _images(table: AnnData | None, slides: Sequence[Slide]) -> dict[str, dict]:
    """Return ``.uns["spatial"]`` with the scale of every slide, and with the images that a table holds."""
    images, out = {} if table is None else _io.libraries(table), {}
    for slide in slides:
        known = deepcopy(images.get(slide.name, {}))
        known["metadata"] = known.get("metadata", {}) | {"microns_per_pixel": slide.mpp}
        out[slide.name] = {part: value for part, value in known.items() if value}
    return out


def _mean(sums: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Return the mean over the cells of each tile (tiles x d). Cells without a value do not count."""
    known = np.isfinite(values)
    n, total = sums @ known.astype(float), sums @ np.where(known, values, 0)
    return np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0).astype(np.float32)
