"""Niches: groups of cells whose surroundings are alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, resolve_seed, warn
from spatiaflow.tl._embedding import check_alike, embedding, made_by, pooled
from spatiaflow.tl._labels import rows_of, unpacked

if TYPE_CHECKING:
    from spatiaflow.models.niches import Niches
    from spatiaflow.models.slide import Slide

FEWEST_GENES = 10  # halves of fewer are no two views of a tissue
CLOSE, FAR, UNSTABLE = 0.05, 0.15, 0.3  # differences of agreement, and agreement, that are worth a warning
APART = 0.3  # mixing of a sample that is worth a warning: halves of a slide have .4 and more (benchmarks/LOG.md)
COVERED = 0.8  # share of the genes of a model, below which carried niches get worse (benchmarks/LOG.md)
N_KEPT = 1000  # cells whose log odds go with a model


@verb
def cluster_niches(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    n_clusters: int | None = None,
    max_clusters: int = 12,
    niche_um: float | None = None,
    use_rep: str | None = None,
    model: AnnData | SpatialData | None = None,
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    random_state: int | None = None,
    key_added: str = "niche",
    copy: bool = False,
) -> AnnData | SpatialData | list | dict | None:
    """Cluster cells by the genes of the cells around them, all samples together.

    Genes are standardised slide by slide and reduced to principal components, which are averaged around each cell at three
    scales. A Gaussian mixture with one covariance is fitted to these averages: from all genes, and from each half of six
    random splits of the genes. A cell's niche is the consensus of the thirteen. How sure the halves are of it is its
    confidence. Without ``n_clusters`` the number is the one, of at least three, on which the halves agree best. No label and
    no trained model is needed.

    Parameters
    ----------
    data
        Cells with positions and raw counts. Slides of one object, and objects of a list or dict, are clustered together:
        niche "0" is the same in all of them.
    n_clusters
        Number of niches; chosen when None.
    max_clusters
        Largest number that is tried when ``n_clusters`` is None.
    niche_um
        Standard deviation of the Gaussian that averages, in µm; averages of half and of twice as much stand beside. None:
        half the distance to the 45th neighbour of the median cell, about 40 µm in mouse cortex.
    use_rep
        Cluster this embedding in ``.obsm`` instead, such as ``"X_spatia_niche"``, by mixtures that start from thirteen seeds. It
        cannot be halved, so ``n_clusters`` must be given.
    model
        An object in which this function has written niches (under ``key_added``): they are carried to ``data``.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not state it. For
        a SpatialData, µm per unit of its coordinate system.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` what was given. Sets:

    ``.obs[key_added]`` : categories "0", "1", ..., the largest first
    ``.obs[f"{key_added}_confidence"]`` : float in [0, 1], mean probability of the niche by the twelve halves of the genes; with
        ``use_rep`` by twelve starts
    ``.uns[key_added]`` : dict with ``stability``, ``shift``, ``params`` and ``model`` (arrays that carry the niches to other
        samples). ``stability`` is a dict of arrays: ``n_clusters`` tried, ``agreement`` (adjusted Rand index of two halves of
        the genes, mean over six splits) and its standard ``error``; empty where the number was given. ``shift`` is a dict:
        ``samples`` (their names), ``mixing`` (of each, 0 to 1: share of other samples among the 30 nearest cells, over the share
        by chance; with ``model`` the samples of the model are others too) and ``separation`` (mean silhouette of the niches);
        one sample has no mixing, and with ``use_rep`` it is empty

    Raises
    ------
    KeyError
        The embedding, a layer or an element is missing, or ``model`` holds no niches.
    ValueError
        Counts are not raw, the scale is unknown, fewer than ten genes are shared by all objects, there are too few cells,
        ``use_rep`` comes without ``n_clusters``, or embeddings are not finite or were made by different models.

    Warns
    -----
    UserWarning
        The number chosen is the largest tried, another is nearly as stable, two niches are far more stable (a hierarchy), no
        number is stable, or a sample hardly mixes with the others.

    See Also
    --------
    spatiaflow.pl.niche_stability : draw how stable each number is.

    Examples
    --------
    >>> sf.tl.cluster_niches(sdata, n_clusters=3, key_added="found_niche")
    >>> sdata["table"].obs["found_niche"].cat.categories.tolist()
    ['0', '1', '2']
    """
    started, seed = time.perf_counter(), resolve_seed(random_state)
    where = _io.Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.at_least_one(None, n_clusters=n_clusters)
    _io.at_least_one(max_clusters=max_clusters)
    _io.positive(None, niche_um=niche_um)
    _io.slot_name(key_added)
    objects, tables = unpacked(data, table_key, copy=copy)
    known = None if model is None else _stored(model, table_key, key_added, use_rep, tables)
    if known and niche_um not in (None, known.niche_um):
        raise ValueError(f"model holds niches of niche_um={known.niche_um:g}, which niche_um= cannot change.")
    numbers = _numbers(n_clusters, max_clusters, use_rep, known, sum(table.n_obs for table in tables))
    if use_rep is None:
        slides = _slides(objects, tables, where, layer, known)
        found, agreement = (known, {}) if known else _found(slides, numbers, niche_um, seed)
        probability, support, scores = _of_slides(found, slides, tables)
        for i, one in enumerate(_io.objects_of(objects).values()):
            _io.remember(one, [slide for j, slide in slides if j == i], mpp, spatial_key)
    else:
        from spatiaflow.models.niches import niches_of_embedding

        x, agreement = pooled(tables, use_rep).astype(np.float64), {}
        found = known or niches_of_embedding(x, numbers[0], seed)
        probability, support = found.of_embedding(x)
    shift: dict = {}
    if use_rep is None and len(found) > 1:
        shift, cells = _shift(_io.objects_of(objects), slides, tables, probability, scores, found)
        found = found if known else replace(found, cells=cells)
    if known is None:  # the largest is "0"
        order = np.argsort(-np.bincount(probability.argmax(1), minlength=len(found)), kind="stable")
        found, probability, support = found.take(order), probability[:, order], support[:, order]
    _warn_of(agreement, len(found), max_clusters)
    _warn_of_shift(shift)
    params = _io.provenance(
        started, random_state=seed, n_clusters=len(found), use_rep=use_rep or "", niche_um=found.niche_um, n_objects=len(tables),
        carried=known is not None, clustering_sha256=_io.fingerprint(found.intercept),
    )  # fmt: skip
    for table, rows in zip(tables, rows_of(tables)):
        code = probability[rows].argmax(1)
        niche = pd.Categorical.from_codes(code, [str(i) for i in range(len(found))])
        _io.write(
            table, key_added, obs={"": niche, Key.obs.confidence(""): np.take_along_axis(support[rows], code[:, None], 1)[:, 0]},
            uns={"stability": _curve(agreement), "shift": shift, "model": _arrays(found), "params": params},
        )  # fmt: skip
    return objects if copy else None


def _numbers(
    n_clusters: int | None, max_clusters: int, use_rep: str | None, known: Niches | None, n_cells: int
) -> list[int]:
    """Numbers of niches to try."""
    if known is not None:
        if n_clusters not in (None, len(known)) or bool(known.genes) == (use_rep is not None):
            made = "genes: leave out use_rep=" if known.genes else "an embedding: give its use_rep="
            raise ValueError(f"model holds {len(known)} niches of {made}, and n_clusters= cannot change their number.")
        return [len(known)]
    if n_clusters is None and use_rep is not None:
        raise ValueError(
            "the number of niches is chosen by halves of the genes, and an embedding has none: give n_clusters= beside use_rep=, "
            "or leave use_rep= out."
        )
    if n_clusters is None and max_clusters < 3:
        raise ValueError(f"max_clusters must be at least 3, not {max_clusters}; n_clusters= may be 1 or 2.")
    tried = [n_clusters] if n_clusters else [n for n in range(2, max_clusters + 1) if n <= max(3, n_cells // 10)]
    if n_cells < 2 * max(tried[-1], 2):
        raise ValueError(f"data have too few cells ({n_cells}): two per niche are needed, and at least four.")
    return tried


def _slides(
    objects, tables: Sequence[AnnData], where: _io.Where, layer: str | None, known: Niches | None
) -> list[tuple[int, Slide]]:
    """All slides, each with the number of its object: in the genes that all share, or in those of ``known`` niches."""
    from spatiaflow._slides import gather
    from spatiaflow._slides.gather import check_together

    advice = "Halves of them are compared. To cluster an embedding give use_rep= and n_clusters=."
    genes = known.genes if known else sorted(_io.shared_genes(tables, FEWEST_GENES, advice))
    out, covered = [], {}
    for i, (name, one) in enumerate(_io.objects_of(objects).items()):
        with _io.named(name):
            if known:
                covered[name] = _coverage(known, tables[i])
            out += [
                (i, slide.align(genes)) for slide in gather(one, where, need=["counts"], layer=layer, together=False)
            ]
    if few := {name: share for name, share in covered.items() if share < COVERED}:
        whose = "" if list(few) == [""] else f" of objects {', '.join(map(repr, few))}"
        warn(
            f"var_names{whose} hold {min(few.values()):.0%} of the {len(genes)} genes of the niches of model; the others count "
            "as average, and niches get worse. Cluster all samples together instead, on the genes that they share."
        )
    check_together([replace(slide, name=f"{slide.name} of object {i}") for i, slide in out])
    return out


def _found(
    slides: Sequence[tuple[int, Slide]], numbers: Sequence[int], niche_um: float | None, seed: int
) -> tuple[Niches, dict[int, np.ndarray]]:
    """Niches of some slides, and the agreement of every number tried."""
    from spatiaflow.models.levels import usual_um
    from spatiaflow.models.niches import niches_of_genes
    from spatiaflow.models.preprocess import usual_depth

    alone = [slide for _, slide in slides]
    if niche_um is None:
        niche_um = usual_um(alone)
        logger.info("niches are averages over %.3g, %.3g and %.3g µm", 0.5 * niche_um, niche_um, 2 * niche_um)
    return niches_of_genes(alone, numbers, niche_um=niche_um, target_sum=usual_depth(alone), seed=seed)


def _of_slides(
    found: Niches, slides: Sequence[tuple[int, Slide]], tables: Sequence[AnnData]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability of every niche, that by halves of the genes alone, and log odds, each rows of all tables x niches."""
    out, rows = np.empty((3, sum(table.n_obs for table in tables), len(found))), rows_of(tables)
    for i, slide in slides:
        out[:, rows[i].start + slide.rows] = found.of_slide(slide)
    return out[0], out[1], out[2]


def _shift(
    objects: Mapping, slides: Sequence[tuple[int, Slide]], tables: Sequence[AnnData], probability: np.ndarray,
    scores: np.ndarray, found: Niches,
) -> tuple[dict, np.ndarray]:  # fmt: skip
    """What ``uns`` says of the shift between samples, and the log odds of some cells that later samples are compared with."""
    from spatiaflow.models import mixing
    from spatiaflow.models.preprocess import spread

    rows, objects_of_slides = rows_of(tables), [i for i, _ in slides]
    names = [
        slide.name if len(tables) == 1 else name if objects_of_slides.count(i) == 1 else f"{name}, {slide.name}"
        for (i, slide), name in ((one, list(objects)[one[0]]) for one in slides)
    ]
    known = np.empty((0, len(found))) if found.cells is None else found.cells
    taken, xy, sample = [], [np.full((len(known), 2), np.inf)], [np.full(len(known), len(slides))]
    for j, (i, slide) in enumerate(slides):
        some = np.lexsort(slide.xy.T)[spread(len(slide), mixing.MOST // (len(slides) + (found.cells is not None)))]
        taken.append(rows[i].start + slide.rows[some])
        xy.append(slide.xy[some])
        sample.append(np.full(len(some), j))
    cells = np.concatenate(taken)
    kept = np.concatenate([one[spread(len(one), max(1, N_KEPT // len(taken)))] for one in taken])
    niche = np.concatenate([known.argmax(1), probability[cells].argmax(1)])
    x = mixing.in_spreads(np.concatenate([known, scores[cells]]), niche)
    out: dict = {"separation": mixing.separation(x, niche)}
    if len(slides) > 1 or len(known):
        mixed = mixing.mixing(x, np.concatenate(sample), np.concatenate(xy), 2 * found.niche_um)
        out |= {"samples": np.array(names, dtype=object), "mixing": mixed[: len(slides)]}
    return out, scores[kept]


def _warn_of_shift(shift: Mapping) -> None:
    """Warn where samples do not mix."""
    apart = {name: value for name, value in zip(shift.get("samples", ()), shift.get("mixing", ())) if value < APART}
    if apart:
        listed = ", ".join(f"{name!r} ({value:.2f})" for name, value in list(apart.items())[:5])
        warn(
            f"samples that hardly mix with the others in what tells niches apart: {listed}; 1 is full mixing. Their niches may "
            "come from staining, depth or panel, or be theirs alone. Look at sf.pl.composition(data), and compare like with like."
        )


def _coverage(known: Niches, table: AnnData) -> float:
    """Share of the genes of known niches that a table measures; at least half."""
    have = len(set(known.genes) & set(map(str, table.var_names)))
    if have < max(FEWEST_GENES, len(known.genes) / 2):
        raise ValueError(
            f"var_names hold {have} of the {len(known.genes)} genes of the niches of model; half are needed."
        )
    return have / len(known.genes)


def _curve(agreement: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """What ``uns`` says of the stability of each number."""
    if len(agreement) < 2:
        return {}
    splits = np.stack(list(agreement.values()))
    error = splits.std(1, ddof=1) / splits.shape[1] ** 0.5
    return {"n_clusters": np.array(list(agreement)), "agreement": splits.mean(1), "error": error}


def _warn_of(agreement: Mapping[int, np.ndarray], chosen: int, max_clusters: int) -> None:
    """Warn where the choice of a number is doubtful."""
    if len(agreement) < 2:
        return
    mean = {n: float(values.mean()) for n, values in agreement.items()}
    best, look = mean[chosen], "Look at sf.pl.niche_stability(data), and choose n_clusters= yourself."
    if best < UNSTABLE:
        warn(f"no number of niches is stable: halves of the genes agree best on {chosen}, by {best:.2f} of 1. {look}")
    elif mean[2] > best + FAR:
        warn(
            f"halves of the genes agree far better on 2 niches ({mean[2]:.2f}) than on {chosen} ({best:.2f}): these may be "
            f"parts of two. {look}"
        )
    elif close := [n for n in mean if n not in (2, chosen) and mean[n] > best - CLOSE]:
        listed = ", ".join(f"{n} ({mean[n]:.2f})" for n in close)
        warn(f"{chosen} niches are chosen (agreement {best:.2f}), but nearly as stable: {listed}. {look}")
    if chosen == max_clusters:
        warn(
            f"{chosen} niches, the largest number tried, are the most stable: there may be more. Give a larger max_clusters=, or "
            "choose n_clusters= yourself."
        )


def _arrays(found: Niches) -> dict:
    """Niches as what a file can hold."""
    return {
        "weights": found.weights.astype(np.float32), "intercept": found.intercept, "genes": np.array(found.genes, dtype=object),
        "niche_um": found.niche_um, "target_sum": found.target_sum,
    } | ({} if found.cells is None else {"cells": found.cells.astype(np.float32)})  # fmt: skip


def _check_embedding(made: str, use_rep: str, width: int, known: AnnData, tables: Sequence[AnnData]) -> None:
    """Refuse another embedding than that of the niches of model; warn where nothing tells whether it is the same."""
    if made != use_rep:
        raise ValueError(f"model holds niches of obsm[{made!r}], not of {use_rep!r}. Give use_rep={made!r}.")
    widths = [width, *(embedding(table, use_rep).shape[1] for table in tables)]
    check_alike([known, *tables], use_rep, widths, "model and data")
    if not made_by(known, use_rep)["embedding_sha256"]:
        warn(
            f"nothing tells whether obsm[{use_rep!r}] of data was computed as that of model. Niches are carried only by the same "
            "axes: principal components of the new samples alone are others. Embed all samples together."
        )


def _stored(
    model: AnnData | SpatialData, table_key: str, key: str, use_rep: str | None, tables: Sequence[AnnData]
) -> Niches:
    """Niches that an earlier call has written into an object."""
    from spatiaflow.models.niches import Niches

    if not isinstance(model, AnnData | SpatialData):
        raise ValueError(f"model must be an AnnData or SpatialData that holds niches, not {type(model).__name__}.")
    table = _io.unpack(model, table_key, name="model")[1]
    stored = _io.entry(table, key).get("model") if key in table.uns else None
    if not isinstance(stored, Mapping):
        found = [
            name
            for name, one in table.uns.items()
            if isinstance(one, Mapping) and isinstance(one.get("model"), Mapping)
        ]
        there = f" It has niches under {_io.listing(found)}: pass key_added={found[0]!r}." if found else ""
        raise KeyError(
            f"uns of model has no niches under {key!r}.{there} Or run sf.tl.cluster_niches(model, key_added={key!r}) first."
        )
    made = str(_io.entry(table, key).get("params", {}).get("use_rep", ""))
    if use_rep and made:
        _check_embedding(made, use_rep, np.shape(stored["weights"])[2], table, tables)
    genes = tuple(map(str, stored["genes"]))
    weights, intercept = (np.asarray(stored[name], np.float64) for name in ("weights", "intercept"))
    cells = np.asarray(stored["cells"], np.float64) if "cells" in stored else None
    return Niches(weights, intercept, genes, float(stored["niche_um"]), float(stored["target_sum"]), cells)
