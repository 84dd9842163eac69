"""Clusters of cells by their own genes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import logger, resolve_seed, warn
from spatiaflow.tl._embedding import pooled
from spatiaflow.tl._labels import gene_slides, rows_of, unpacked

RESOLUTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0)
N_PARTS, PART = 5, 0.8  # random parts of the cells that are clustered again
TOLERANCE = 0.1  # below the best stability
MAX_TRIED = 20_000  # cells on which resolutions are compared
N_NEIGHBORS = 15
FEWEST = 20  # cells


@verb
def cluster_cells(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    resolution: float | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    table_key: str = "table",
    library_key: str | None = None,
    random_state: int | None = None,
    key_added: str = "cell_cluster",
    copy: bool = False,
) -> AnnData | SpatialData | list | dict | None:
    """Cluster cells by their own genes, all samples together.

    Genes are standardised slide by slide, so each slide should hold most types of cells. They are reduced to 30 principal
    components, which keep their scale. Leiden's method clusters the graph of 15 neighbours. Without ``resolution`` the finest
    one is taken that is nearly as stable as the most stable: clusters of random parts of the cells agree with those of all
    cells to within .1 of the best adjusted Rand index.

    Parameters
    ----------
    data
        Cells with raw counts. Objects of a list or dict are clustered together.
    resolution
        Resolution of Leiden's method; chosen when None.
    use_rep
        Cluster the components of this embedding in ``.obsm`` instead, such as ``"X_spatia_cell"``.
    layer
        Layer with raw counts; None reads ``X``.
    table_key
        Table of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` what was given. Sets:

    ``.obs[key_added]`` : categories "0", "1", ..., the largest first; missing for cells without counts
    ``.uns[key_added]`` : dict with ``params`` and ``stability``, a dict of arrays: ``resolution`` tried, ``n_clusters`` found,
        ``agreement`` (adjusted Rand index of parts and all cells, mean over five parts) and its standard ``error``; empty
        where the resolution was given

    Raises
    ------
    KeyError
        The embedding or a layer is missing.
    ValueError
        Counts are not raw, fewer than two genes are shared by all objects, there are fewer than 20 cells, or embeddings are
        not finite or were made by different models.

    See Also
    --------
    cluster_niches : cluster cells by what is around them.

    Examples
    --------
    >>> sf.tl.cluster_cells(sdata, resolution=0.5)
    >>> sdata["table"].obs["cell_cluster"].cat.categories[0]
    '0'
    """
    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.positive(None, resolution=resolution)
    _io.slot_name(key_added)
    objects, tables = unpacked(data, table_key, copy=copy)
    if (n := sum(table.n_obs for table in tables)) < FEWEST:
        raise ValueError(f"data have too few cells ({n}): at least {FEWEST} are needed.")
    if use_rep is None:
        x, filled = _components(objects, tables, _io.Where(table_key, library_key=library_key), layer)
    else:
        x, filled = _reduced(pooled(tables, use_rep)), np.ones(n, bool)
    x = x[filled]
    order = np.lexsort(x.T[::-1])  # the result does not depend on the order of rows
    stability: dict[str, np.ndarray] = {}
    if resolution is None:
        stability = _stability(x[order], seed)
        stable = stability["agreement"] >= stability["agreement"].max() - TOLERANCE
        resolution = float(stability["resolution"][stable].max())
        logger.info("resolution %g is the finest that is stable", resolution)
    label = np.empty(len(x), int)
    label[order] = _leiden(x[order], (resolution,), seed)[0]
    n_clusters = label.max() + 1
    rank = np.argsort(np.argsort(-np.bincount(label), kind="stable"))  # the largest is "0"
    codes = np.full(n, -1)
    codes[filled] = rank[label]
    params = _io.provenance(
        started, random_state=seed, resolution=float(resolution), n_clusters=int(n_clusters), use_rep=use_rep or "",
        n_objects=len(tables), clustering_sha256=_io.fingerprint(codes),
    )  # fmt: skip
    for table, rows in zip(tables, rows_of(tables)):
        cluster = pd.Categorical.from_codes(codes[rows], [str(i) for i in range(n_clusters)])
        _io.write(table, key_added, obs={"": cluster}, uns={"stability": stability, "params": params})
    return objects if copy else None


def _components(
    objects, tables: Sequence[AnnData], where: _io.Where, layer: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Components of the genes that all objects share, rows of all tables x components, and which rows have counts."""
    from spatiaflow.models.levels import joint_axes, standardised

    (slides,), target_sum = gene_slides([(objects, tables, [where] * len(tables), layer)])
    parts = [standardised(slide, target_sum, highest=10.0) for _, slide in slides]
    axes, n = joint_axes(parts), sum(table.n_obs for table in tables)
    out, filled = np.empty((n, axes.shape[1])), np.empty(n, bool)
    for (rows, _), part in zip(slides, parts):
        out[rows], filled[rows] = part @ axes, part.depth > 0
    if not filled.all():
        warn(f"{(~filled).sum()} cells have no counts of the genes that all objects share: they have no cluster.")
    if filled.sum() < FEWEST:
        raise ValueError(f"data have {filled.sum()} cells with counts; at least {FEWEST} are needed.")
    return out, filled


def _reduced(x: np.ndarray) -> np.ndarray:
    """The first 30 principal components of an embedding; they keep their scale."""
    from sklearn.decomposition import PCA

    return PCA(min(30, *x.shape), svd_solver="full").fit_transform(x.astype(np.float64))


def _stability(x: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """How well clusters of parts of the cells agree with those of all, for every resolution."""
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    x = x[np.sort(rng.permutation(len(x))[:MAX_TRIED])]
    whole = _leiden(x, RESOLUTIONS, seed)
    agreement = np.empty((N_PARTS, len(RESOLUTIONS)))
    for i in range(N_PARTS):
        part = np.sort(rng.permutation(len(x))[: int(PART * len(x))])
        found = _leiden(x[part], RESOLUTIONS, seed + i)
        agreement[i] = [adjusted_rand_score(a[part], b) for a, b in zip(whole, found)]
    n_clusters = np.array([label.max() + 1 for label in whole])
    agreement[:, n_clusters == 1] = -1.0  # one cluster agrees with itself, and says nothing
    return {
        "resolution": np.array(RESOLUTIONS), "n_clusters": n_clusters, "agreement": agreement.mean(0),
        "error": agreement.std(0, ddof=1) / N_PARTS**0.5,
    }  # fmt: skip


def _leiden(x: np.ndarray, resolutions: Sequence[float], seed: int) -> list[np.ndarray]:
    """Clusters of the rows at each resolution."""
    import scanpy as sc

    cells = AnnData(x.astype(np.float32))
    sc.pp.neighbors(cells, n_neighbors=min(N_NEIGHBORS, len(x) - 1), use_rep="X", random_state=seed)
    out = []
    for resolution in resolutions:
        sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, random_state=seed)
        out.append(cells.obs["leiden"].cat.codes.to_numpy().astype(int))
    return out
