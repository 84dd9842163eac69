"""Genes that a panel does not measure, and better values of those that it does."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed

N_BLOCKS, MIN_CELLS, MIN_SHARED = 5, 50, 5
MAX_INPUTS = 600  # genes that predictions read: of more, those of the largest variance; all count for the library size
MAX_SLOT = 2000  # genes: more are returned, not written into obsm


def impute_genes(
    data: AnnData | SpatialData,
    *,
    genes: list[str] | None = None,
    reference: AnnData | SpatialData | None = None,
    use_rep: str | None = None,
    check: bool = True,
    target_sum: float | None = None,
    layer: str | None = None,
    reference_layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    random_state: int | None = None,
    key_added: str = "imputed",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Impute genes that a panel does not measure from a reference, and say which of them to trust.

    A ridge regression on what query and reference share: a cell's other genes, those of its 5, 15 and 50 nearest neighbours
    (where both have positions), features of its image (``use_rep``), and random Fourier features of the principal components
    of both (Rahimi and Recht, 2007), which make it a kernel machine. Each of these branches is used only if it predicts
    blocks of the reference that were left out better. Genes that the data do measure are *denoised*: their prediction
    from all other genes is the mean of a gamma prior, which the counts update.

    Parameters
    ----------
    data
        Raw counts; positions if there are any.
    genes
        What to impute; when None all genes of the reference that ``data`` lack, or, without a reference, all of ``data``.
    reference
        Cells with raw counts of the genes: another slide or part of one, or dissociated cells. When None the data are
        their own reference, and only genes that they measure can be given.
    use_rep
        Slot of ``.obsm`` with features of each cell's image, in data and reference alike, such as those of
        ``embed_spatia(..., modalities="image")``. Features that have seen counts would give hidden genes away.
    check
        Judge neighbours and image once more in ``data``, on genes that it measures, hidden by turns: what lowers their
        correlation there is left out. It looks at all cells of the query at once (transductive; it is recorded).
    target_sum
        Values are log1p of counts per ``target_sum`` of the counts of all shared genes; their median over the reference
        when None.
    layer, reference_layer
        Layers with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart. Neighbours never cross slides; with three slides or more in the reference
        whole slides are left out to judge, else contiguous blocks.
    spatial_key
        Where positions are in an AnnData; any unit. Without it cells have no neighbours.
    random_state
        Seed of the Fourier features; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obsm[key_added]`` : float32 array (n_obs, n_genes), log1p of counts per ``target_sum``
    ``.obsm[f"{key_added}_std"]`` : same shape and unit, standard deviation under a negative binomial law of the cell's own
        library, with the dispersion of left-out blocks of the reference
    ``.uns[key_added]`` : dict with ``genes``, ``shared`` (genes whose counts make the library), ``reliability`` (correlation with measured values in left-out blocks),
        ``denoised`` (which genes the data measure), ``branches``, ``judged`` (mean correlation by set of branches),
        ``checked`` (what a branch added in ``data``), ``normalization`` and ``params``

    With more than 2,000 genes the result is an AnnData of its own, with these as ``.X``, ``.layers["std"]`` and ``.var``: it is
    returned for an AnnData, and is the table ``key_added`` on the same region in a SpatialData.

    Raises
    ------
    KeyError
        Genes that neither data nor reference have, a missing layer or slot.
    ValueError
        Data and reference share too few genes, counts are not raw, or the reference has too few cells.

    See Also
    --------
    spatiaflow.get.expression : the slot as an AnnData.
    """
    from spatiaflow.models.imputation import Imputer

    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.slot_name(key_added)
    _io.positive(target_sum=target_sum)
    data, table = _io.unpack(data, table_key, copy=copy)
    known = table if reference is None else _io.unpack(reference, table_key)[1]
    where = {
        "table_key": table_key, "shapes_key": shapes_key, "labels_key": labels_key, "library_key": library_key,
        "spatial_key": spatial_key,
    }  # fmt: skip
    if reference is None:
        layer_of_reference = layer
        reference = data
    else:
        layer_of_reference = reference_layer
    if known.n_obs < MIN_CELLS:
        raise ValueError(f"the reference has {known.n_obs} cells; at least {MIN_CELLS} are needed.")
    shared, wanted = _genes(table, known, genes)
    sections, others = (_io.sections(one, **where) for one in (data, reference))
    counts, theirs = _matrix(table, shared, layer), _matrix(known, shared, layer_of_reference)
    library, depth = (np.asarray(one.sum(1), dtype=np.float64).ravel() for one in (counts, theirs))
    inputs = _most_variable(theirs, depth, shared)
    spatial = all(xy is not None for _, _, xy in sections + others)
    if target_sum is None:
        target_sum = max(float(np.median(depth)), 1.0)
    images = [None, None]
    if use_rep is not None:
        images = [_io.features(one, use_rep, "Give use_rep= of a slot that both have.") for one in (table, known)]
        if images[0].shape[1] != images[1].shape[1]:
            raise ValueError(
                f"obsm[{use_rep!r}] has {images[0].shape[1]} columns in data and {images[1].shape[1]} in the reference."
            )
    columns = np.flatnonzero(np.isin(shared, inputs))
    targets = _matrix(known, wanted, layer_of_reference)
    query = [_cells(counts, library, columns, images[0], s, spatial) for s in sections]
    train = [_cells(theirs, depth, columns, images[1], s, spatial, targets) for s in others]
    logger.info("imputing %d genes from %d shared ones of %d cells", len(wanted), len(shared), known.n_obs)
    model = Imputer(
        train, _blocks(others, spatial), [shared[i] for i in columns], wanted, target_sum=target_sum, seed=seed
    )
    if check:
        model.adapt(query, seed=seed)
    uns = {
        "genes": wanted, "shared": shared, "reliability": model.reliability, "denoised": model.measured, "branches": list(model.branches),
        "judged": {"+".join(names): r for names, r in model.judged.items()}, "checked": model.checked,
        "normalization": {"target_sum": target_sum},
        "params": {
            "n_shared": len(shared), "n_reference": known.n_obs, "use_rep": use_rep or "", "transductive": check,
            "penalty": model.alpha, "random_state": seed, "spatial_key": spatial_key, "n_vars": table.n_vars,
            "spatiaflow": spatiaflow.__version__,
        },
    }  # fmt: skip
    mean, std = (np.zeros((table.n_obs, len(wanted)), np.float32) for _ in range(2))
    bar = progress(None, "imputing", total=table.n_obs, unit="cell")
    for (_, rows, _), cells in zip(sections, query):
        start = 0
        for m, s in model.predict(cells):
            at = rows[start : start + len(m)]
            mean[at], std[at], start = m, s, start + len(m)
            bar.update(len(m))
    bar.close()
    uns["params"]["seconds"] = time.perf_counter() - started
    if len(wanted) <= MAX_SLOT:
        _io.write(table, key_added, arrays={"": mean, "_std": std}, uns=uns)
        return data if copy else None
    return _own_table(data, table, key_added, mean, std, uns, copy)


def _genes(table: AnnData, known: AnnData, genes) -> tuple[list[str], list[str]]:
    """Genes that both measure, and those that are wanted."""
    there = set(known.var_names)
    shared = [str(g) for g in table.var_names if g in there]
    if len(shared) < MIN_SHARED:
        raise ValueError(
            f"data and reference share {len(shared)} of {table.n_vars} genes; at least {MIN_SHARED} are needed. Data have e.g. "
            f"{', '.join(table.var_names[:3])}, the reference {', '.join(known.var_names[:3])}: are the identifiers of one kind "
            "(symbols or Ensembl, human or mouse)?"
        )
    if genes is None:
        wanted = [str(g) for g in known.var_names if g not in set(shared)] if known is not table else shared
        if not wanted:
            raise ValueError("the reference has no gene that data lack; name those to denoise in genes=.")
        return shared, wanted
    wanted = [genes] if isinstance(genes, str) else [str(g) for g in genes]
    if unknown := [g for g in wanted if g not in there]:
        where = "data, and there is no reference=" if known is table else "the reference"
        raise KeyError(f"genes= names {len(unknown)} that are not in {where}, such as {unknown[0]!r}.")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError("genes= names no gene, or one of them twice.")
    return shared, wanted


def _matrix(table: AnnData, genes: list[str], layer: str | None) -> sparse.csr_matrix:
    return sparse.csr_matrix(_io.counts(table, genes, layer)[0], dtype=np.float32)


def _most_variable(counts: sparse.csr_matrix, library: np.ndarray, shared: list[str]) -> list[str]:
    if len(shared) <= MAX_INPUTS:
        return shared
    values = sparse.diags(np.median(library) / np.maximum(library, 1)) @ counts
    values = sparse.csr_matrix(values).log1p()
    mean, square = (np.asarray(v.mean(0)).ravel() for v in (values, values.multiply(values)))
    order = np.argsort(-(square - mean**2), kind="stable")
    return [shared[i] for i in order[:MAX_INPUTS]]


def _cells(counts, library, columns, image, section, spatial: bool, targets=None):
    from spatiaflow.models.imputation import CellTable

    _, rows, xy = section
    return CellTable(
        counts[rows][:, columns], library[rows], xy if spatial else None, None if image is None else image[rows],
        None if targets is None else targets[rows],
    )  # fmt: skip


def _blocks(sections: list, spatial: bool) -> list[np.ndarray]:
    """What is left out together: slides where there are three, contiguous bands of each, or random cells without positions."""
    if len(sections) > 2:
        return [np.full(len(rows), i % N_BLOCKS) for i, (_, rows, _) in enumerate(sections)]
    out = []
    for _, rows, xy in sections:
        place = np.random.default_rng(0).permutation(len(rows))
        if spatial:
            place = np.argsort(np.argsort(xy[:, np.argmax(np.ptp(xy, axis=0))], kind="stable"))
        out.append(place * N_BLOCKS // len(rows))
    return out


def _own_table(data, table: AnnData, key: str, mean, std, uns: dict, copy: bool):
    """The result as a table of its own."""
    var = {name: uns.pop(name) for name in ("reliability", "denoised")}
    out = AnnData(mean, obs=table.obs.copy(), var=pd.DataFrame(var, index=uns.pop("genes")), layers={"std": std})
    out.uns[key] = _io.storable(uns)
    if isinstance(data, AnnData):
        if uns["params"]["spatial_key"] in table.obsm:
            out.obsm[uns["params"]["spatial_key"]] = np.asarray(table.obsm[uns["params"]["spatial_key"]])
        return out
    out.uns["spatialdata_attrs"] = dict(table.uns["spatialdata_attrs"])
    data[key] = out
    return data if copy else None
