"""Types of cells from labelled cells, by their embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, resolve_seed, warn
from spatiaflow.tl._embedding import check_alike, pooled

if TYPE_CHECKING:
    from spatiaflow.models.levels import Standardised
    from spatiaflow.models.slide import Slide

# objects, their tables, where things are in each, and the layer with counts
Side = tuple[Any, Sequence[AnnData], Sequence[_io.Where], str | None]
UNKNOWN = "unknown"
MISSING = ("", "nan", "None", "<NA>")  # what text makes of a missing value
MANY_DIFFER = 0.2  # share of cells whose label depends on how genes are standardised
MANY_SHALLOW = 0.25  # share of cells with fewer counts than nearly all labelled cells
UNNAMED = (UNKNOWN, "na", "n/a", "unassigned", "unlabeled", "unlabelled", "-1")  # what cells without a label are called
MANY_GENES = 1000  # more are reduced to components


@verb
def annotate(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    labels: str,
    reference: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping | None = None,
    use_rep: Sequence[str] | str = ("X", "X_spatia"),
    method: str = "linear",
    threshold: float = 0.5,
    scaling: str = "slide",
    layer: str | None = None,
    reference_layer: str | None = None,
    table_key: str = "table",
    library_key: str | None = None,
    random_state: int | None = None,
    key_added: str = "annotation",
    copy: bool = False,
) -> AnnData | SpatialData | list | dict | None:
    """Carry labels from some cells to the others, by their genes and their embeddings.

    A linear probe (logistic regression, in which all classes weigh alike) or nearest neighbours. Penalty (by macro-F1) and
    temperature, which calibrates the confidence, are chosen on held-out labelled cells: whole slides where three or more are
    known, random folds otherwise.

    Parameters
    ----------
    data
        Needs counts and ``.obsm["X_spatia"]``, or what ``use_rep`` names; without ``reference`` also ``.obs[labels]`` with
        missing values to fill in. Labels of the objects of a list or dict are pooled.
    labels
        Column of ``.obs`` with the labels, of ``reference`` when it is given.
    reference
        Labelled cells, embedded by the same model; one object or several.
    use_rep
        What cells are told apart by, side by side: ``"X"``, the genes, and embeddings in ``.obsm``. Genes are those that all
        objects measure, standardised (``scaling``). More than 1,000, and those for ``"knn"``, are reduced to 50 components.
    method
        ``"linear"`` or ``"knn"``.
    threshold
        Cells with a lower confidence are called "unknown".
    scaling
        How genes are standardised. ``"slide"``: by the cells of each slide, which takes out how slides differ, but needs slides
        of like composition. ``"reference"``: by the labelled slides together, for sorted cells and small regions.
    layer, reference_layer
        Layers with raw counts; None reads ``X``.
    table_key
        Table of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides of the labelled cells apart; None: each object is a slide.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` what was given. Sets:

    ``.obs[key_added]`` : categories, the labels and "unknown"; cells that had a label keep it. A label such as "Unknown",
        "NA", "unassigned" or "-1" is none. Without counts, genes tell nothing of a cell, so it is "unknown"
    ``.obs[f"{key_added}_confidence"]`` : float in [0, 1], calibrated; 1 where the label was given
    ``.uns[key_added]`` : dict with ``classes``, ``held_out_accuracy`` and ``held_out_macro_f1`` (on labelled cells that
        the probe did not see) and ``params``

    Raises
    ------
    KeyError
        An embedding, the layer or the labels are missing.
    ValueError
        Fewer than two classes are labelled, counts are not raw, fewer than two genes are shared, or the embeddings were made
        by different models.

    Examples
    --------
    Labels are known on the left half of the slide:

    >>> table = sdata["table"]
    >>> table.obs["known"] = table.obs["cell_type"].where(table.obsm["spatial"][:, 0] < 90)
    >>> sf.tl.annotate(sdata, labels="known")
    >>> table.uns["annotation"]["classes"].tolist()
    ['endothelial', 'epithelial', 'fibroblast', 'lymphocyte']
    """
    from sklearn.metrics import accuracy_score, f1_score

    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.one_of(("linear", "knn"), method=method)
    _io.one_of(("slide", "reference"), scaling=scaling)
    _io.slot_name(key_added)
    _io.share(threshold=threshold)
    _io.text(library_key=library_key)
    sources: Sequence[AnnData]
    objects, tables = unpacked(data, table_key, copy=copy)
    for table in tables if library_key is not None else ():
        if library_key not in table.obs:
            raise KeyError(f"obs has no {library_key!r}; it has {_io.listing(table.obs.columns)}.")
    where = _io.Where(table_key, library_key=library_key)
    sides: list[Side] = [(objects, tables, [where] * len(tables), layer)]
    if reference is not None:
        known, sources = unpacked(reference, table_key, argument="reference")
        there = [_io.where_in_reference(one, where) for one in _io.objects_of(known).values()]
        sides.append((known, sources, there, reference_layer))
    use_rep, sources = _io.names(use_rep, "use_rep") or [], sides[-1][1]
    given, names = rows, y = _labelled(sources, labels)
    genes = _genes(sides, method, scaling) if "X" in use_rep else None
    values = _features(sides, use_rep, [] if genes is None else genes.values)
    x, known = values[0], values[-1]
    if genes is not None:
        rows, y = rows[genes.depth[-1][rows] > 0], y[genes.depth[-1][rows] > 0]
    order = np.argsort(known[rows] @ np.random.default_rng(0).normal(size=known.shape[1]), kind="stable")
    rows, y = rows[order], y[order]  # folds do not depend on the order of rows
    if len(classes := np.unique(y)) < 2:
        raise ValueError(
            f"labelled cells with counts are of {len(classes)} class(es) of obs[{labels!r}]; two are needed."
        )
    make, temperature, held_out = _probe(known[rows], y, _groups(sources, library_key, rows), method, seed)
    probe = make().fit(known[rows], y)
    probability = _sharpened(probe.predict_proba(x), temperature)
    confidence, chosen = probability.max(1), classes[probability.argmax(1)].astype(object)
    if genes is not None:
        confidence[genes.depth[0] == 0] = 0.0
        other = chosen
        if reference is not None:
            other = probe.predict(_features(sides[:1], use_rep, [genes.by_reference])[0])
        _warn_of_genes(genes, rows, float((other != chosen)[genes.depth[0] > 0].mean()))
    chosen[(confidence < threshold) | (confidence == 0)] = UNKNOWN
    if reference is None:
        chosen[given], confidence[given] = names, 1.0
    guess = classes[held_out.argmax(1)]
    params = _io.provenance(
        started, random_state=seed, labels=labels, use_rep=use_rep, method=method, threshold=threshold,
        scaling=scaling, temperature=temperature, n_labelled=len(rows), n_objects=len(tables),
    )  # fmt: skip
    for table, part in zip(tables, rows_of(tables)):
        _io.write(
            table, key_added,
            obs={"": pd.Categorical(chosen[part], [*np.unique(names), UNKNOWN]), Key.obs.confidence(""): confidence[part]},
            uns={
                "classes": list(classes), "held_out_accuracy": float(accuracy_score(y, guess)),
                "held_out_macro_f1": float(f1_score(y, guess, average="macro")), "params": params,
            },
        )  # fmt: skip
    return objects if copy else None


def unpacked(data, table_key: str, *, copy: bool = False, argument: str = "data") -> tuple[object, list[AnnData]]:
    """The objects (copies with ``copy``) in the form given, and their tables."""
    found = {}
    for name, one in _io.objects_of(data).items():
        with _io.named(name, argument):
            found[name] = _io.unpack(one, table_key, copy=copy)
    objects, tables = [one for one, _ in found.values()], [table for _, table in found.values()]
    if isinstance(data, Mapping):
        return dict(zip(data, objects)), tables
    return objects if isinstance(data, list | tuple) else objects[0], tables


def gene_slides(sides: Sequence[Side]) -> tuple[list[list[tuple[np.ndarray, Slide]]], float]:
    """For each side its slides in the genes that all tables share, with their rows among those of its tables; usual depth."""
    from spatiaflow._slides import gather
    from spatiaflow.models.preprocess import usual_depth

    everything = [table for _, tables, *_ in sides for table in tables]
    names = [
        f"object {name!r} of {argument}" if name else argument
        for argument, (objects, *_) in zip(("data", "reference"), sides) for name in _io.objects_of(objects)
    ]  # fmt: skip
    genes = sorted(_io.shared_genes(everything, 2, "To use an embedding alone give use_rep=.", names))
    found: list[list[tuple[np.ndarray, Slide]]] = [[] for _ in sides]
    for argument, side, (objects, tables, wheres, layer) in zip(("layer", "reference_layer"), found, sides):
        for (name, one), part, where in zip(_io.objects_of(objects).items(), rows_of(tables), wheres):
            with _io.named(name, "data" if argument == "layer" else "reference"):
                slides = gather(one, where, need=["counts"], layer=layer, scaled=False, argument=argument)
            side += [(part.start + slide.rows, slide.align(genes)) for slide in slides]
    return found, usual_depth([slide for side in found for _, slide in side])


@dataclass(frozen=True)
class Genes:
    """Genes of cells as features."""

    values: list[np.ndarray]  # of each side, rows of its tables x features
    depth: list[np.ndarray]  # of each side, counts of the shared genes
    by_reference: np.ndarray  # of the data, standardised by the labelled slides


def _genes(sides: Sequence[Side], method: str, scaling: str) -> Genes:
    """Standardised genes of each side, or their components where they are many or distances are to be measured."""
    from spatiaflow.models.levels import joint_axes, standardised
    from spatiaflow.models.preprocess import pooled_standard, standard_of

    slides, target_sum = gene_slides(sides)
    labelled = [slide for _, slide in slides[-1]]
    standards = [cast("np.ndarray", standard_of(slide, target_sum)) for slide in labelled]
    usual = pooled_standard(standards, [*map(len, labelled)])

    def scaled(side: list, standard: np.ndarray | None) -> list[tuple[np.ndarray, Standardised]]:
        return [(rows, standardised(slide, target_sum, standard, highest=10.0)) for rows, slide in side]

    found = [scaled(side, usual if scaling == "reference" else None) for side in slides]
    n_genes = len(labelled[0].genes)
    axes = np.eye(n_genes)
    if method == "knn" or n_genes > MANY_GENES:
        axes = joint_axes([z for side in found for _, z in side], 50)
    sizes = [sum(table.n_obs for table in tables) for _, tables, *_ in sides]

    def rows_of_side(side: list, n: int) -> tuple[np.ndarray, np.ndarray]:
        values, depth = np.empty((n, axes.shape[1]), np.float32), np.empty(n)
        for rows, z in side:
            values[rows], depth[rows] = z @ axes, z.depth
        return values, depth

    made = [rows_of_side(side, n) for side, n in zip(found, sizes)]
    by_reference = rows_of_side(scaled(slides[0], usual), sizes[0])[0]
    return Genes([values for values, _ in made], [depth for _, depth in made], by_reference)


def _features(sides: Sequence[Side], use_rep: Sequence[str], genes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What cells are told apart by, rows of all tables x features, for the data and for the reference if there is one."""
    out: list[list[np.ndarray]] = [[] for _ in sides]
    for slot in use_rep:
        blocks = genes
        if slot != "X":
            blocks = [pooled(tables, slot, argument) for argument, (_, tables, *_) in zip(("data", "reference"), sides)]
            firsts = [tables[0] for _, tables, *_ in sides]
            check_alike(firsts, slot, [block.shape[1] for block in blocks], "data and the reference")
        for side, block in zip(out, blocks):
            side.append(block)
    return [np.hstack(side) for side in out]


def _warn_of_genes(genes: Genes, labelled: np.ndarray, differ: float) -> None:
    """Warn of cells whose genes tell less than those of the labelled cells, and of slides of another composition.

    ``differ``: share of the cells that get another label when they are standardised by the labelled slides.
    """
    depth, known = genes.depth[0], genes.depth[-1][labelled]
    if empty := int((depth == 0).sum()):
        warn(f"{empty} cells have no counts of the genes that all objects share: without a label, {UNKNOWN!r}.")
    shallow = float((depth[depth > 0] < np.quantile(known, 0.01)).mean()) if (depth > 0).any() else 0.0
    if shallow > MANY_SHALLOW:
        warn(
            f"{shallow:.0%} of the cells have fewer counts than 99% of the labelled cells (median {np.median(depth):.4g}, of "
            f"labelled cells {np.median(known):.4g}): their confidence is too high."
        )
    if differ > MANY_DIFFER:
        warn(
            f"{differ:.0%} of the cells get another label when genes are standardised by the labelled slides instead of by their "
            "own: data and reference differ in which cells they hold, or in depth, panel or platform. For sorted cells or a "
            "small region give scaling='reference', or annotate the whole slide."
        )


def rows_of(tables: Sequence[AnnData]) -> list[slice]:
    """Rows of each table among the rows of all."""
    ends = np.cumsum([0, *(table.n_obs for table in tables)])
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def _labelled(tables: Sequence[AnnData], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label among the rows of all tables, and their labels."""
    _io.text(labels=labels)
    if not any(labels in table.obs for table in tables):
        raise KeyError(f"obs has no {labels!r}; it has {', '.join(map(repr, tables[0].obs.columns[:12]))}.")
    columns = [table.obs[labels].astype(object) if labels in table.obs else [None] * table.n_obs for table in tables]
    given = pd.Series(np.concatenate([np.asarray(column, dtype=object) for column in columns]))
    called = given.map(_io.label)
    unnamed = called.str.lower().isin(UNNAMED)
    if found := sorted(set(called[unnamed]) - {UNKNOWN}):
        logger.warning(
            "%d cells of obs[%r] called %s are taken to have no label. If it is one, rename it", called.isin(found).sum(), labels,
            _io.listing(found),
        )  # fmt: skip
    rows = np.flatnonzero(given.notna() & ~unnamed & ~called.isin(MISSING))
    y = called.iloc[rows].to_numpy(object)
    if (n := len(np.unique(y))) < 2:
        raise ValueError(f"obs[{labels!r}] names {n} class(es); at least two are needed.")
    if 2 * n > len(y):
        raise ValueError(
            f"obs[{labels!r}] has {n} classes for {len(y)} labelled cells. At least two cells a class are needed, and "
            "numbers are no classes."
        )
    return rows, y


def _groups(tables: Sequence[AnnData], library_key: str | None, rows: np.ndarray) -> np.ndarray:
    """Slide of each of some rows: its table, or its table and library. A reference without the column is one slide."""
    names = []
    for i, table in enumerate(tables):
        there = library_key is not None and library_key in table.obs
        own = table.obs[library_key].astype(str) if there else [""] * table.n_obs
        names += [f"{i}:{name}" for name in own]
    return np.array(names)[rows]


def _probe(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, method: str, seed: int
) -> tuple[Callable, float, np.ndarray]:
    """Maker of the probe of highest macro-F1, its temperature, and its probabilities (n x classes) of held-out cells."""
    from sklearn.metrics import f1_score

    classes, folds, score = np.unique(y), _folds(y, groups, seed), -np.inf
    best: Any = None
    for make in _candidates(method, len(y)):
        held_out = _held_out(make, x, y, folds)
        found = f1_score(y, classes[held_out.argmax(1)], average="macro")
        if found > score:
            best, score = (make, _temperature(held_out, np.searchsorted(classes, y)), held_out), found
    return best


def _held_out(make: Callable, x: np.ndarray, y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Probabilities of the classes (n x classes) of each cell, by a probe that has not seen its fold."""
    classes = np.unique(y)
    out = np.zeros((len(y), len(classes)))
    for train, test in folds:
        fitted = make().fit(x[train], y[train])
        out[np.ix_(test, np.searchsorted(classes, fitted.classes_))] = fitted.predict_proba(x[test])
    return out


def _candidates(method: str, n: int) -> list[Callable]:
    """Makers of classifiers to choose from."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "knn":
        return [lambda k=k: KNeighborsClassifier(k, metric="cosine") for k in (5, 15, 45) if k < n / 2] or [
            lambda: KNeighborsClassifier(1)
        ]
    return [
        lambda c=c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000, class_weight="balanced"))
        for c in (3e-3, 1e-2, 3e-2, 1e-1)
    ]


def _folds(y: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Slides in turn where there are three or more, else five random folds with every class in each where possible."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    if len(np.unique(groups)) >= 3:
        return list(GroupKFold(min(5, len(np.unique(groups)))).split(y, groups=groups))
    rare = np.unique(y, return_counts=True)[1].min()
    if rare >= 2:
        return list(StratifiedKFold(int(min(5, rare)), shuffle=True, random_state=seed).split(y, y))
    return list(KFold(min(5, len(y)), shuffle=True, random_state=seed).split(y))


def _temperature(probability: np.ndarray, truth: np.ndarray) -> float:
    """Temperature of highest likelihood on held-out cells."""
    tried = np.geomspace(0.25, 8, 41)
    score = [np.log(_sharpened(probability, t)[np.arange(len(truth)), truth] + 1e-9).mean() for t in tried]
    return float(tried[int(np.argmax(score))])


def _sharpened(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at a temperature, n x classes."""
    logits = np.log(probability + 1e-9) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)
