"""Impute genes that a panel does not measure, and denoise those that it does."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io, datasets
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, resolve_seed, warn
from spatiaflow._slides import gather
from spatiaflow.models.slide import ABSENT, Slide
from spatiaflow.tl._trust import warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models import Imputer

MIN_CELLS, MIN_SHARED = 50, 5
MAX_INPUTS = 600  # genes that predictions read: of more, those of the largest variance; all count for the library size
FEW = 500  # reference cells; with fewer the standard error of a correlation, 1 / sqrt(n), is above .045
MUCH_LOWER = 0.5  # of the reliability in the reference: below it a warning
MAX_SLOT = 2000  # genes: more are returned, not written into obsm


@verb
def train_imputation(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | dict[str, AnnData | SpatialData],
    *,
    genes: str | Sequence[str] | None = None,
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
    """Train a model that imputes any missing genes of a panel.

    The model learns how each gene of the panel follows from the other genes of the cell, of its neighbours, and from its image.
    It keeps sums over cells and, from 8,000 cells on, three networks; no cell. It does what :func:`impute_genes` does with a
    reference, without the kernel.

    Parameters
    ----------
    data
        Raw counts, with positions if there are any. One object, or a list or dict of objects.
    genes
        Panel of the model. None takes all genes that the slides share (at most 600, those of the largest variance).
    use_rep, target_sum, layer, table_key, shapes_key, labels_key, library_key, spatial_key, random_state
        As in :func:`impute_genes`.

    Returns
    -------
    :class:`spatiaflow.models.Imputer`, with ``.reliability`` (correlation of each gene in held-out blocks, hidden with a fifth
    of the genes), ``.validation_scores``, ``.card`` and ``.save(path)``.

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
    from spatiaflow.train.imputer import train_imputer

    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key)
    _io.positive(None, target_sum=target_sum)
    shared = _io.shared_genes([_io.unpack(one, table_key)[1] for one in _io.objects_of(data).values()])
    if (genes := _io.names(genes, "genes")) is not None:
        known = set(shared)
        if unknown := [g for g in genes if g not in known]:
            raise KeyError(f"genes= names {len(unknown)} that not all slides measure, such as {unknown[0]!r}.")
        shared = genes
    slides = _filled(_slides(data, where, shared, layer, use_rep))
    n_cells = sum(map(len, slides))
    if n_cells < MIN_CELLS or len(shared) < MIN_SHARED:
        raise ValueError(
            f"{n_cells} cells and {len(shared)} shared genes; at least {MIN_CELLS} and {MIN_SHARED} are needed."
        )
    if len(shared) > MAX_INPUTS:  # the library is the sum over the genes of the model
        shared = _most_variable(slides, shared)
        slides = _filled(_slides(data, where, shared, layer, use_rep))
    branches, seed = ("genes", "neighbors", "image", "network"), resolve_seed(random_state)
    return train_imputer(
        slides, shared, shared, target_sum=target_sum, branches=branches, seed=seed, use_rep=use_rep, panel=True
    )


@verb
@_io.each_object
def impute_genes(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | dict[str, AnnData | SpatialData],
    *,
    genes: str | Sequence[str] | None = None,
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
    """Impute genes that a panel does not measure, from a reference or a trained model, with a reliability for each gene.

    Each gene is predicted by ridge regression on four groups of columns (branches): the other genes of the cell, those of its
    5, 15 and 50 nearest neighbours (where data and reference have positions), features of its image (``use_rep``), and
    random Fourier features of the principal components of both (Rahimi and Recht, 2007), which approximate a kernel. With
    8,000 reference cells and at most 2,000 genes, three perceptrons on the same columns without the kernel are trained, each
    without a third of the reference, and the mean with them is taken. A branch, and these networks, are used only if they
    improve the prediction of held-out blocks of the reference. Genes that the data measure are *denoised*: the ridge's
    prediction from all other genes is the mean of a gamma prior, which the counts update.

    Parameters
    ----------
    data
        Raw counts, with positions if there are any. One object, or a list or dict of objects; each is imputed by itself.
    genes
        Genes to impute. None: all genes of the reference or model that ``data`` lack, or, without either, all genes of ``data``.
        The genes of one call share one penalty and one set of branches, so values depend somewhat on which are named together.
    reference
        Cells with raw counts of the genes: another slide, a part of one, or dissociated cells.
    model
        A model of :func:`train_imputation`, its path, or the name of weights that :func:`spatiaflow.datasets.weights` lists
        ("imputation-pancreas-small"). It takes the place of the reference. It has no kernel and estimates the library size, so
        a reference is more accurate. With neither, ``data`` are their own reference, and only their own genes can be denoised.
    use_rep
        Slot of ``.obsm`` with features of each cell's image, in data and reference, such as those of
        ``embed_spatia(..., modalities="image")``. Do not use features that were computed from counts: they contain the
        hidden genes.
    check
        Check in ``data`` too. Genes that the data measure are hidden in turn. Neighbours, image and networks are dropped where
        they lower the correlation of these genes. The reliability of all genes is lowered by the ratio of the correlation
        that hidden genes reach to the one that the reference promised for them. The check uses all cells of ``data`` at once
        (``uns[key_added]["params"]["transductive"]``). False takes both from the reference alone.
    target_sum
        Values are log1p of counts per ``target_sum`` counts of the shared genes. None takes the median of these counts over the
        reference. A model has its own, and refers to all of its genes.
    layer, reference_layer
        Layers with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart. Neighbours never cross slides. With three or more slides in the reference,
        whole slides are held out for validation; with fewer, contiguous blocks, or random cells where there are no positions.
        Name the donors of dissociated cells here. If cells of one donor are on both sides, the reliability may be too high.
    spatial_key
        Positions in ``.obsm`` of an AnnData, in any unit. Without them cells have no neighbours.
    random_state
        Seed of the Fourier features and of the networks; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obsm[key_added]`` : float32 array (n_obs, n_genes), log1p of counts per ``target_sum``; NaN for cells without counts
    ``.obsm[f"{key_added}_std"]`` : same shape and unit, standard deviation under a negative binomial law at the cell's own
        library size, with the dispersion found in held-out blocks of the reference
    ``.uns[key_added]`` : dict with ``genes``, ``shared`` (genes whose counts make the library), ``library_share`` (their share in
        the library; below 1 only with a model), ``reliability_reference`` (correlation with measured values in held-out blocks
        of the reference), ``reliability`` (the same, lowered where hidden genes of ``data`` were predicted worse than the
        reference promised), ``denoised`` (genes whose own counts were used; at most 600, those of the largest variance),
        ``branches``, ``validation_scores`` (mean correlation for each set of branches), ``checked`` (what a branch added in
        ``data``), ``normalization`` and ``params``

    With more than 2,000 genes the result is an AnnData of its own, with these values in ``.X``, ``.layers["std"]`` and ``.var``.
    For an AnnData it is returned. In a SpatialData it becomes the table ``key_added`` on the same region.

    Raises
    ------
    KeyError
        A gene is neither in data nor in the reference, or a layer or slot is missing.
    ValueError
        Data and reference share too few genes, counts are not raw, or the reference has too few cells.

    Warns
    -----
    UserWarning
        Hidden genes of ``data`` reach less than half of the correlation that the reference promised: it may be of another
        tissue, or genes may be named wrongly. Or the median library differs from the reference's by a factor of three, or
        data have half of the model's genes or fewer.

    See Also
    --------
    spatiaflow.get.expression : the slot as an AnnData.
    spatiaflow.pl.imputation : imputed values beside measured ones.

    Examples
    --------
    One half of a slide lacks four genes. They are imputed from the other half:

    >>> table = sdata["table"]
    >>> panel = table[150:, table.var["driver"] != "morphology"].copy()
    >>> sf.tl.impute_genes(panel, reference=table[:150].copy())
    >>> panel.uns["imputed"]["genes"].tolist()
    ['MORPH1', 'MORPH2', 'MORPH3', 'MORPH4']
    """
    started, seed = time.perf_counter(), resolve_seed(random_state)
    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key)
    _io.slot_name(key_added)
    _io.positive(None, target_sum=target_sum)
    data, table = _io.unpack(data, table_key, copy=copy)
    if isinstance(data, SpatialData) and key_added in data and "std" not in getattr(data[key_added], "layers", ()):
        raise ValueError(f"the SpatialData has an element called {key_added!r}: choose another key_added=.")
    if model is None:
        source, shared, wanted = _source(data, table, reference, genes, where)
        argument = "layer" if reference is None else "reference_layer"
        there = where if reference is None else _io.where_in_reference(reference, where)
        known = _slides(source, there, shared, layer if reference is None else reference_layer, use_rep, argument)
        query = known if reference is None else _slides(data, where, shared, layer, use_rep)
        query, known = _comparable(query, known, spatial_key, use_rep)
        trained, imputer = None, _fitted(known, shared, wanted, target_sum, seed)
        share = 1.0
    else:
        if reference is not None or target_sum is not None:
            raise ValueError(
                "give a reference or a model, not both." if reference is not None else
                "target_sum= is that of the model. Leave it out."
            )  # fmt: skip
        trained = cast("Imputer", datasets.resolve(model, "Imputer"))
        shared, wanted = _genes(table, trained.inputs, genes, "the model")
        imputer = trained.restricted(shared, wanted)
        query = _slides(data, where, shared, layer, use_rep)
        _check_query(query, imputer, use_rep, spatial_key)
        share = float(imputer.share[imputer.seen].sum())
        query = [replace(slide, library=slide.library / share) for slide in query]
    warn_of_difference(
        genes=None if trained is None else (int(imputer.seen.sum()), len(imputer.seen)), depth=_depths(query, imputer)
    )
    if check:
        imputer.adapt(_filled(query), seed=seed)
    reliability = _in_query(imputer)
    mean, std = _predict(imputer, query, table.n_obs)
    scores = {"+".join(names): r for names, r in imputer.validation_scores.items()}
    uns = {
        "genes": wanted, "shared": shared, "library_share": share, "reliability": reliability,
        "reliability_reference": imputer.reliability,
        "denoised": imputer.measured, "branches": list(imputer.branches), "validation_scores": scores,
        "checked": imputer.checked, "normalization": {"target_sum": imputer.target_sum},
        "params": _io.provenance(
            started, model=trained, random_state=seed, n_shared=len(shared), n_reference=imputer.sums.n, use_rep=use_rep or "",
            transductive=check, penalty=imputer.alpha, spatial_key=spatial_key, n_vars=table.n_vars, n_obs=table.n_obs,
        ),
    }  # fmt: skip
    if len(wanted) > MAX_SLOT:
        return _own_table(data, table, key_added, mean, std, uns, copy)
    _io.write(table, key_added, arrays={"": mean, Key.obsm.std(""): std}, uns=uns)
    return data if copy else None


def _slides(
    data: AnnData | SpatialData | Sequence | dict, where: _io.Where, shared: list[str], layer: str | None,
    use_rep: str | None, argument: str = "layer",
) -> list[Slide]:  # fmt: skip
    """Slides of the data; the library of a cell is the count of the shared genes. All have positions, or none has."""
    need = ("counts",) if use_rep is None else ("counts", "features")
    found = gather(data, where, need=need, layer=layer, use_rep=use_rep, scaled=False, argument=argument)
    spatial = all(slide.xy is not None for slide in found)
    out = []
    for slide in found:
        library = np.asarray(slide.align(shared).counts.sum(1), dtype=np.float64).ravel()
        out.append(replace(slide, library=library, xy=slide.xy if spatial else ABSENT))
    return out


def _filled(slides: list[Slide]) -> list[Slide]:
    """The slides without cells that have no counts of the shared genes: these teach nothing, and are no test."""
    return [slide.take(slide.library > 0) if (slide.library <= 0).any() else slide for slide in slides]


def _source(
    data: AnnData | SpatialData, table: AnnData, reference: AnnData | SpatialData | None, genes: str | Sequence[str] | None,
    where: _io.Where,
) -> tuple[AnnData | SpatialData, list[str], list[str]]:  # fmt: skip
    """Object to learn from, genes that it shares with the table, and genes that are wanted."""
    known = table
    if reference is not None:
        known = _io.unpack(reference, _io.where_in_reference(reference, where).table_key, name="reference")[1]
    if known.n_obs < MIN_CELLS:
        raise ValueError(f"the reference has {known.n_obs} cells; at least {MIN_CELLS} are needed.")
    name = "data, and there is neither reference= nor model=" if reference is None else "the reference"
    return data if reference is None else reference, *_genes(table, known.var_names, genes, name)


def _genes(
    table: AnnData, known: Collection[str], genes: str | Sequence[str] | None, where: str
) -> tuple[list[str], list[str]]:
    """Genes that table and source both measure, and genes that are wanted."""
    names = set(known)
    shared = [str(g) for g in table.var_names if g in names]
    if len(shared) < MIN_SHARED:
        raise ValueError(
            f"data and {where} share {len(shared)} of {table.n_vars} genes; at least {MIN_SHARED} are needed. Data have e.g. "
            f"{', '.join(table.var_names[:3])}, {where} {', '.join(list(known)[:3])}: are the identifiers of one kind "
            "(symbols or Ensembl, human or mouse)?"
        )
    if genes is None:
        both = set(shared)
        wanted = shared if known is table.var_names else [str(g) for g in known if g not in both]
        if not wanted:
            raise ValueError(f"{where} has no gene that data lack. Name the genes to denoise in genes=.")
        _io.check_spelling([list(map(str, table.var_names)), wanted])
        return shared, wanted
    wanted = list(_io.names(genes, "genes") or ())
    if unknown := [g for g in wanted if g not in names]:
        alike = {str(g).lower(): str(g) for g in known}.get(str(unknown[0]).lower())
        hint = f" Is it {alike!r}?" if alike else ""
        raise KeyError(f"genes= names {len(unknown)} that are not in {where}, such as {unknown[0]!r}.{hint}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError("genes= names no gene, or one of them twice.")
    return shared, wanted


def _comparable(
    query: list[Slide], known: list[Slide], spatial_key: str, use_rep: str | None
) -> tuple[list[Slide], list[Slide]]:
    """Query and reference without the positions that only one of them has; warn of cells that are in both."""
    named = {"data": query} if query is known else {"data": query, "the reference": known}
    for name, slides in named.items():
        if slides[0].xy is None:
            logger.info("%s: no obsm[%r], so neighbors are not used", name, spatial_key)
    if query is known:
        return query, known
    if n := _in_both(query, known):
        logger.warning(
            "%d of %d cells of data are in the reference too, by name and number of counts. Values imputed for them were "
            "seen there, and scores on them would be too high.", n, sum(map(len, query)),
        )  # fmt: skip
    widths = [0 if use_rep is None else slides[0].features.shape[1] for slides in (query, known)]
    if widths[0] != widths[1]:
        raise ValueError(f"obsm[{use_rep!r}] has {widths[0]} columns in data and {widths[1]} in the reference.")
    if query[0].xy is None or known[0].xy is None:
        query, known = ([replace(slide, xy=None) for slide in slides] for slides in (query, known))
    return query, known


def _fitted(known: list[Slide], shared: list[str], wanted: list[str], target_sum: float | None, seed: int) -> Imputer:
    """An imputer for one query, kernel included."""
    from spatiaflow.train.imputer import train_imputer

    known = _filled(known)
    n = sum(map(len, known))
    logger.info("imputing %d genes from %d shared ones of %d cells", len(wanted), len(shared), n)
    if n < FEW:
        logger.warning(
            "%d reference cells are few: reliability is a correlation in held-out blocks of them, with a standard error of "
            "%.2f or more.", n, n**-0.5,
        )  # fmt: skip
    return train_imputer(known, _most_variable(known, shared), wanted, target_sum=target_sum, seed=seed)


def _check_query(query: list[Slide], imputer: Imputer, use_rep: str | None, spatial_key: str) -> None:
    """Refuse a query without the features or positions that the model reads."""
    if imputer.design.n_image != (0 if use_rep is None else query[0].features.shape[1]):
        named = imputer.card.get("use_rep") or None
        raise ValueError(f"the model was trained with use_rep={named!r}. Give features of the same kind.")
    if imputer.design.spatial and query[0].xy is None:
        raise KeyError(f"the model reads neighbors, and obsm has no {spatial_key!r}. Give spatial_key=...")


def _predict(imputer: Imputer, query: list[Slide], n_obs: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in the order of the table, n_obs x genes; NaN for cells without counts."""
    mean, std = (np.zeros((n_obs, len(imputer.genes)), np.float32) for _ in range(2))
    with progress(None, "imputing", total=n_obs, unit="cell") as bar:
        for slide in query:
            start = 0
            for m, s in imputer.predict(slide):
                at = slide.rows[start : start + len(m)]
                mean[at], std[at], start = m, s, start + len(m)
                bar.update(len(m))
    empty = np.concatenate([slide.rows[slide.library == 0] for slide in query])
    if len(empty):
        warn(
            f"{len(empty)} cells have no counts of the shared genes: nothing can be imputed there, and their values are NaN."
        )
        mean[empty] = std[empty] = np.nan
    return mean, std


def _depths(query: list[Slide], imputer: Imputer) -> tuple[float, float]:
    """Median library of the query, and of the reference cells."""
    own, known = np.concatenate([slide.library for slide in query]), np.concatenate(imputer.libraries)
    return float(np.median(own)), float(np.median(known))


def _in_query(imputer: Imputer) -> np.ndarray:
    """Reliability of every gene, lowered to what genes that the query measures reached when they were hidden."""
    ratio, error, promised, achieved = imputer.transfer()
    if ratio + 2 * error < MUCH_LOWER:
        warn(
            f"imputation is less reliable here than in the reference: genes that data measure, hidden and imputed, reach a "
            f"median correlation of {achieved:.2f}; the reference promised {promised:.2f}. The reliability of all genes is "
            f"lowered to {ratio:.2f} of it. Is the reference of the same tissue, and are the names of genes right?"
        )
    out = ratio * imputer.reliability
    if (known := imputer.measured).any() and len(imputer.achieved):
        own = imputer.achieved[imputer.own[known] - 1]  # what is known of the gene itself
        out[known] = np.where(np.isfinite(own), np.minimum(np.maximum(own, 0), imputer.reliability[known]), out[known])
    return out.astype(np.float32)


def _in_both(query: list[Slide], known: list[Slide]) -> int:
    """Cells that both have, by name and number of counts; 0 where most cells that share a name differ."""
    there, here = (
        pd.Series(np.concatenate([s.library for s in slides]), np.concatenate([s.obs_names for s in slides]))
        for slides in (known, query)
    )
    here = here[here > 0]
    here = here[here.index.isin(there.index)]
    n = int((here.to_numpy() == there.loc[here.index].to_numpy()).sum())
    return n if 2 * n > len(here) else 0


def _most_variable(slides: list[Slide], shared: list[str]) -> list[str]:
    """At most 600 genes, those of the largest variance of log1p counts per median library."""
    if len(shared) <= MAX_INPUTS:
        return shared
    counts = sparse.vstack([slide.align(shared).counts for slide in slides], format="csr")
    library = np.concatenate([slide.library for slide in slides])
    values = sparse.csr_matrix(sparse.diags(np.median(library) / np.maximum(library, 1)) @ counts).log1p()
    mean, square = (np.asarray(v.mean(0)).ravel() for v in (values, values.multiply(values)))
    order = np.argsort(-(square - mean**2), kind="stable")
    return [shared[i] for i in order[:MAX_INPUTS]]


def _own_table(
    data: AnnData | SpatialData, table: AnnData, key: str, mean: np.ndarray, std: np.ndarray, uns: dict, copy: bool
) -> AnnData | SpatialData | None:
    """The result as a table of its own."""
    var = {name: uns.pop(name) for name in ("reliability", "reliability_reference", "denoised")}
    out = AnnData(mean, obs=table.obs.copy(), var=pd.DataFrame(var, index=uns.pop("genes")), layers={"std": std})
    out.uns[key] = _io.storable(uns)
    if isinstance(data, AnnData):
        if uns["params"]["spatial_key"] in table.obsm:
            out.obsm[uns["params"]["spatial_key"]] = _io.owned(table.obsm[uns["params"]["spatial_key"]])
        return out
    out.uns["spatialdata_attrs"] = deepcopy(table.uns["spatialdata_attrs"])
    data[key] = out
    return data if copy else None
