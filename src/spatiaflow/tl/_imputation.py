"""Genes that a panel does not measure, and better values of those that it does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed
from spatiaflow.tl._cells import file_of

if TYPE_CHECKING:
    from spatiaflow.models import Imputer

MIN_CELLS, MIN_SHARED = 50, 5
MAX_INPUTS = 600  # genes that predictions read: of more, those of the largest variance; all count for the library size
FEW = 500  # reference cells; with fewer the standard error of a correlation, 1 / sqrt(n), is above .045
MAX_SLOT = 2000  # genes: more are returned, not written into obsm


def train_imputation(
    data: AnnData | SpatialData | list[AnnData | SpatialData],
    *,
    genes: list[str] | None = None,
    use_rep: str | None = None,
    target_sum: float | None = None,
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    random_state: int | None = None,
) -> Imputer:
    """Learn how the genes of a panel, those of neighbours and images go together, to impute whichever of them are missing.

    What :func:`impute_genes` learns from a reference, without its kernel, and for any choice of genes: sums over cells, which say
    how each gene follows from any of the others. No cell is kept.

    Parameters
    ----------
    data
        Raw counts; positions if there are any. One object or a list.
    genes
        Panel of the model; when None all genes that the slides share (at most 600: those of the largest variance).
    use_rep, target_sum, layer, table_key, shapes_key, labels_key, library_key, spatial_key, random_state
        As in :func:`impute_genes`.

    Returns
    -------
    :class:`spatiaflow.models.Imputer`, with ``.reliability`` (of each gene from all others, in left-out blocks), ``.judged``,
    ``.card`` and ``.save(path)``.

    Raises
    ------
    KeyError
        Genes, a layer or a slot are missing.
    ValueError
        Counts are not raw, or there are too few cells or genes.

    Examples
    --------
    >>> model = sf.tl.train_imputation(sdata)
    >>> panel = adata[:, :50].copy()
    >>> sf.tl.impute_genes(panel, model=model)
    >>> panel.obsm["imputed"].shape
    (79, 10)
    """
    objects = list(data) if isinstance(data, list | tuple) else [data]
    tables = [_io.unpack(one, table_key)[1] for one in objects]
    shared = _io.shared_genes(tables)
    if genes is not None:
        if unknown := [g for g in genes if g not in shared]:
            raise KeyError(f"genes= names {len(unknown)} that not all slides measure, such as {unknown[0]!r}.")
        shared = [str(g) for g in genes]
    where = {"shapes_key": shapes_key, "labels_key": labels_key, "library_key": library_key, "spatial_key": spatial_key}
    reference = _Cells.of(objects, tables, shared, layer, use_rep, table_key=table_key, **where)
    if reference.n < MIN_CELLS or len(shared) < MIN_SHARED:
        raise ValueError(
            f"{reference.n} cells and {len(shared)} shared genes; at least {MIN_CELLS} and {MIN_SHARED} are needed."
        )
    if len(shared) > MAX_INPUTS:
        shared = _most_variable(reference.counts, reference.library, shared)
        reference = _Cells.of(objects, tables, shared, layer, use_rep, table_key=table_key, **where)
    boxes = {
        name: {"n_obs": len(rows)} | ({} if xy is None else {"box": [*xy.min(0), *xy.max(0)]})
        for name, rows, xy in reference.sections
    }
    return reference.imputer(
        shared, shared, target_sum=target_sum, branches=("genes", "neighbors", "image"), seed=resolve_seed(random_state),
        card={"data": boxes, "use_rep": use_rep or "", "spatiaflow": spatiaflow.__version__},
    )  # fmt: skip


def impute_genes(
    data: AnnData | SpatialData,
    *,
    genes: list[str] | None = None,
    reference: AnnData | SpatialData | None = None,
    model: Imputer | str | Path | None = None,
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
    """Impute genes that a panel does not measure, from a reference or a trained model, and say which of them to trust.

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
        What to impute; when None all genes of the reference or model that ``data`` lack, or, without either, all of ``data``.
    reference
        Cells with raw counts of the genes: another slide or part of one, or dissociated cells.
    model
        Instead of a reference a model of :func:`train_imputation`, its path, or the name of weights that
        :func:`spatiaflow.datasets.weights` lists ("imputation-pancreas-small"). It has no kernel, and normalises by an
        estimate of the library: a reference serves better. Without both the data are their own reference, and only genes
        that they measure can be given.
    use_rep
        Slot of ``.obsm`` with features of each cell's image, in data and reference alike, such as those of
        ``embed_spatia(..., modalities="image")``. Features that have seen counts would give hidden genes away.
    check
        Judge neighbours and image once more in ``data``, on genes that it measures, hidden by turns: what lowers their
        correlation there is left out. It looks at all cells of the query at once (transductive; it is recorded).
    target_sum
        Values are log1p of counts per ``target_sum`` of the counts of all shared genes (with a model: of all its genes, whose
        share in them is known from its reference); their median over the reference when None.
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
    ``.uns[key_added]`` : dict with ``genes``, ``shared`` (genes whose counts make the library) and ``library_share`` (of
        them in the library: 1 but with a model), ``reliability`` (correlation with measured values in left-out blocks),
        ``denoised`` (whose own counts were used; of more than 600 shared genes those of the largest variance),
        ``branches``, ``judged`` (mean correlation by set of branches), ``checked`` (what a branch added in ``data``),
        ``normalization`` and ``params``

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
    spatiaflow.pl.imputation : imputed beside measured values.

    Examples
    --------
    Four genes that one half of a slide does not measure, from the other half:

    >>> table = sdata["table"]
    >>> panel = table[150:, table.var["driver"] != "morphology"].copy()
    >>> sf.tl.impute_genes(panel, reference=table[:150].copy())
    >>> panel.uns["imputed"]["genes"].tolist()
    ['MORPH1', 'MORPH2', 'MORPH3', 'MORPH4']
    """
    from spatiaflow import models

    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.slot_name(key_added)
    _io.positive(target_sum=target_sum)
    if reference is not None and model is not None:
        raise ValueError("give a reference or a model, not both.")
    data, table = _io.unpack(data, table_key, copy=copy)
    where = {
        "table_key": table_key, "shapes_key": shapes_key, "labels_key": labels_key, "library_key": library_key,
        "spatial_key": spatial_key,
    }  # fmt: skip
    if model is not None:
        model = model if isinstance(model, models.Imputer) else models.load(file_of(model))
        if not isinstance(model, models.Imputer):
            raise TypeError(f"model must be an Imputer, not a {type(model).__name__}.")
        if target_sum is not None:
            raise ValueError("target_sum= is the model's; leave it out.")
        shared, wanted = _genes(table, model.inputs, genes, "the model")
        sha256 = model.sha256
        model = model.restricted(shared, wanted)
        query = _Cells.of([data], [table], shared, layer, use_rep, inputs=model.inputs, **where)
        if model.design.n_image != (0 if use_rep is None else query.image.shape[1]):
            named = model.card.get("use_rep") or None
            raise ValueError(f"the model was trained with use_rep={named!r}; give features of the same kind.")
        if model.design.spatial and not query.spatial:
            raise KeyError(f"the model looks at neighbors, and obsm has no {spatial_key!r}; give spatial_key=...")
        share, n_reference = float(model.share[model.seen].sum()), model.evidence.total.n
        query.library = query.library / share
    else:
        known = table if reference is None else _io.unpack(reference, table_key, name="reference")[1]
        if known.n_obs < MIN_CELLS:
            raise ValueError(f"the reference has {known.n_obs} cells; at least {MIN_CELLS} are needed.")
        shared, wanted = _genes(
            table,
            known.var_names,
            genes,
            "data, and there is neither reference= nor model=" if known is table else "the reference",
        )
        if reference is None:
            source = _Cells.of([data], [table], shared, layer, use_rep, **where)
        else:
            source = _Cells.of(
                [reference], [known], shared, reference_layer, use_rep, argument="reference_layer", **where
            )
        inputs = _most_variable(source.counts, source.library, shared)
        query = _Cells.of([data], [table], shared, layer, use_rep, inputs=inputs, **where)
        named = {"data": query} if reference is None else {"data": query, "the reference": source}
        for name, cells in named.items():
            if not cells.spatial:
                logger.info("%s: no obsm[%r], so nothing is learned of neighbors", name, spatial_key)
        query.spatial = source.spatial = query.spatial and source.spatial
        if reference is not None and (n := _in_both(table, query, known, source)):
            logger.warning(
                "%d of %d cells of data are in the reference too, by name and number of counts: what is imputed for them was "
                "seen there, and scores on them would be too high", n, query.n,
            )  # fmt: skip
        if use_rep is not None and query.image.shape[1] != source.image.shape[1]:
            raise ValueError(
                f"obsm[{use_rep!r}] has {query.image.shape[1]} columns in data and {source.image.shape[1]} in the reference."
            )
        logger.info("imputing %d genes from %d shared ones of %d cells", len(wanted), len(shared), source.n)
        if source.n < FEW:
            logger.warning(
                "%d reference cells are few: reliability, a correlation in left-out blocks of them, is off by %.2f or more",
                source.n, source.n**-0.5,
            )  # fmt: skip
        model = source.imputer(inputs, wanted, target_sum=target_sum, seed=seed)
        share, n_reference, sha256 = 1.0, source.n, ""
    cells = query.cells(model.inputs)
    if check:
        model.adapt(cells, seed=seed)
    uns = {
        "genes": wanted, "shared": shared, "library_share": share, "reliability": model.reliability, "denoised": model.measured,
        "branches": list(model.branches), "judged": {"+".join(names): r for names, r in model.judged.items()},
        "checked": model.checked, "normalization": {"target_sum": model.target_sum},
        "params": {
            "model_sha256": sha256,
            "n_shared": len(shared), "n_reference": n_reference, "use_rep": use_rep or "", "transductive": check,
            "penalty": model.alpha, "random_state": seed, "spatial_key": spatial_key, "n_vars": table.n_vars,
            "spatiaflow": spatiaflow.__version__,
        },
    }  # fmt: skip
    mean, std = (np.zeros((table.n_obs, len(wanted)), np.float32) for _ in range(2))
    bar = progress(None, "imputing", total=table.n_obs, unit="cell")
    for (_, rows, _), one in zip(query.sections, cells):
        start = 0
        for m, s in model.predict(one):
            at = rows[start : start + len(m)]
            mean[at], std[at], start = m, s, start + len(m)
            bar.update(len(m))
    bar.close()
    uns["params"]["seconds"] = time.perf_counter() - started
    if len(wanted) <= MAX_SLOT:
        _io.write(table, key_added, arrays={"": mean, "_std": std}, uns=uns)
        return data if copy else None
    return _own_table(data, table, key_added, mean, std, uns, copy)


@dataclass
class _Cells:
    """Cells of some objects as one list of sections, in the shared genes."""

    tables: list[AnnData]
    layer: str | None
    genes: list[str]
    counts: sparse.csr_matrix  # n x genes
    library: np.ndarray  # n
    sections: list[tuple[str, np.ndarray, np.ndarray | None]]
    image: np.ndarray | None
    spatial: bool

    @classmethod
    def of(cls, objects, tables, shared, layer, use_rep, *, inputs=None, argument="layer", **where) -> _Cells:
        """Counts of the shared genes (of ``inputs`` where given: zero where they are not shared), places and features."""
        found = [_io.counts(t, shared, layer, argument=argument)[0] for t in tables]
        parts = [sparse.csr_matrix(x, dtype=np.float32) for x in found]
        counts, sections, start = sparse.vstack(parts, format="csr"), [], 0
        library = np.asarray(counts.sum(1), dtype=np.float64).ravel()
        for one, table in zip(objects, tables):
            sections += [(name, start + rows, xy) for name, rows, xy in _io.sections(one, **where)]
            start += table.n_obs
        genes = shared
        if inputs is not None:
            place = {gene: i for i, gene in enumerate(shared)}
            at = np.array([place.get(gene, -1) for gene in inputs])
            chosen = sparse.csr_matrix(
                (np.ones((at >= 0).sum(), np.float32), (at[at >= 0], np.flatnonzero(at >= 0))),
                (len(shared), len(inputs)),
            )
            counts, genes = sparse.csr_matrix(counts @ chosen), inputs
        image = None
        if use_rep is not None:
            image = np.concatenate(
                [_io.features(t, use_rep, "Give use_rep= of a slot that both have.") for t in tables]
            )
        return cls(tables, layer, genes, counts, library, sections, image, all(xy is not None for _, _, xy in sections))

    @property
    def n(self) -> int:
        return len(self.library)

    def cells(self, inputs: list[str], wanted: list[str] | None = None) -> list:
        """A :class:`spatiaflow.models.design.CellTable` for each section."""
        from spatiaflow.models.design import CellTable

        place = {gene: i for i, gene in enumerate(self.genes)}
        counts, targets = self.counts[:, [place[g] for g in inputs]], None
        if wanted is not None:
            parts = [sparse.csr_matrix(_io.counts(t, wanted, self.layer)[0], dtype=np.float32) for t in self.tables]
            targets = sparse.vstack(parts, format="csr")
        return [
            CellTable(
                counts[rows], self.library[rows], xy if self.spatial else None, None if self.image is None else self.image[rows],
                None if targets is None else targets[rows],
            )
            for _, rows, xy in self.sections
        ]  # fmt: skip

    def imputer(self, inputs: list[str], wanted: list[str], *, target_sum: float | None, **options) -> Imputer:
        """Fit to these cells."""
        from spatiaflow.models.design import left_out
        from spatiaflow.models.imputation import Imputer

        per = target_sum or max(float(np.median(self.library)), 1.0)
        cells = self.cells(inputs, wanted)
        return Imputer(cells, left_out(cells), inputs, wanted, target_sum=per, **options)


def _genes(table: AnnData, there, genes, where: str) -> tuple[list[str], list[str]]:
    """Genes that both measure, and those that are wanted."""
    known = set(there)
    shared = [str(g) for g in table.var_names if g in known]
    if len(shared) < MIN_SHARED:
        raise ValueError(
            f"data and {where} share {len(shared)} of {table.n_vars} genes; at least {MIN_SHARED} are needed. Data have e.g. "
            f"{', '.join(table.var_names[:3])}, {where} {', '.join(list(there)[:3])}: are the identifiers of one kind "
            "(symbols or Ensembl, human or mouse)?"
        )
    if genes is None:
        wanted = [str(g) for g in there if g not in set(shared)] if there is not table.var_names else shared
        if not wanted:
            raise ValueError(f"{where} has no gene that data lack; name those to denoise in genes=.")
        return shared, wanted
    wanted = [genes] if isinstance(genes, str) else [str(g) for g in genes]
    if unknown := [g for g in wanted if g not in known]:
        alike = {str(g).lower(): str(g) for g in there}.get(str(unknown[0]).lower())
        hint = f" Is it {alike!r}?" if alike else ""
        raise KeyError(f"genes= names {len(unknown)} that are not in {where}, such as {unknown[0]!r}.{hint}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError("genes= names no gene, or one of them twice.")
    return shared, wanted


def _in_both(table: AnnData, query: _Cells, known: AnnData, source: _Cells) -> int:
    """Cells of data that the reference has too, by name and number of counts; 0 where most that share a name differ."""
    at = known.obs_names.get_indexer(table.obs_names)
    named = (at >= 0) & (query.library > 0)
    n = int((named & (query.library == source.library[at])).sum())
    return n if 2 * n > named.sum() else 0


def _most_variable(counts: sparse.csr_matrix, library: np.ndarray, shared: list[str]) -> list[str]:
    if len(shared) <= MAX_INPUTS:
        return shared
    values = sparse.diags(np.median(library) / np.maximum(library, 1)) @ counts
    values = sparse.csr_matrix(values).log1p()
    mean, square = (np.asarray(v.mean(0)).ravel() for v in (values, values.multiply(values)))
    order = np.argsort(-(square - mean**2), kind="stable")
    return [shared[i] for i in order[:MAX_INPUTS]]


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
