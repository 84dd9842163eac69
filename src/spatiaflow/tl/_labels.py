"""Types of cells from labelled cells, by their embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, resolve_seed

if TYPE_CHECKING:
    from spatiaflow.models.levels import Standardised

Side = tuple[Any, Sequence[AnnData], Sequence[_io.Where]]  # objects, their tables, and where things are in each
UNKNOWN = "unknown"
MISSING = ("", "nan", "None", "<NA>")  # what text makes of a missing value
UNNAMED = (UNKNOWN, "na", "n/a", "unassigned", "unlabeled", "unlabelled", "-1")  # what cells without a label are called
MANY_GENES = 1000  # more are reduced to components
EMBEDDING_HELP = "Run sf.tl.embed_spatia(data) first, or give use_rep=..."


@verb
def annotate(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    labels: str,
    reference: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping | None = None,
    use_rep: Sequence[str] | str = ("X", "X_spatia"),
    method: str = "linear",
    threshold: float = 0.5,
    layer: str | None = None,
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
        objects measure, standardised slide by slide. More than 1,000, and those for ``"knn"``, are reduced to 50 components.
    method
        ``"linear"`` or ``"knn"``.
    threshold
        Cells with a lower confidence are called "unknown".
    layer
        Layer with raw counts; None reads ``X``.
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
        "NA", "unassigned" or "-1" is none
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
    _io.slot_name(key_added)
    _io.share(threshold=threshold)
    _io.text(library_key=library_key)
    objects, tables = unpacked(data, table_key, copy=copy)
    for table in tables if library_key is not None else ():
        if library_key not in table.obs:
            raise KeyError(f"obs has no {library_key!r}; it has {_io.listing(table.obs.columns)}.")
    where = _io.Where(table_key, library_key=library_key)
    sides = [(objects, tables, [where] * len(tables))]
    if reference is not None:
        known, sources = unpacked(reference, table_key)
        sides.append((known, sources, [_io.where_in_reference(one, where) for one in _io.objects_of(known).values()]))
    use_rep, sources = _io.names(use_rep, "use_rep") or [], sides[-1][1]
    values = _features(sides, use_rep, method, layer)
    x, known = values[0], values[-1]
    rows, y = _labelled(sources, labels)
    classes = np.unique(y)
    make, temperature, held_out = _probe(known[rows], y, _groups(sources, library_key, rows), method, seed)
    probability = _sharpened(make().fit(known[rows], y).predict_proba(x), temperature)
    confidence, chosen = probability.max(1), classes[probability.argmax(1)].astype(object)
    chosen[confidence < threshold] = UNKNOWN
    if reference is None:
        chosen[rows], confidence[rows] = y, 1.0
    guess = classes[held_out.argmax(1)]
    params = _io.provenance(
        started, random_state=seed, labels=labels, use_rep=use_rep, method=method, threshold=threshold,
        temperature=temperature, n_labelled=len(rows), n_objects=len(tables),
    )  # fmt: skip
    for table, part in zip(tables, rows_of(tables)):
        _io.write(
            table, key_added,
            obs={"": pd.Categorical(chosen[part], [*classes, UNKNOWN]), Key.obs.confidence(""): confidence[part]},
            uns={
                "classes": list(classes), "held_out_accuracy": float(accuracy_score(y, guess)),
                "held_out_macro_f1": float(f1_score(y, guess, average="macro")), "params": params,
            },
        )  # fmt: skip
    return objects if copy else None


def unpacked(data, table_key: str, *, copy: bool = False) -> tuple[object, list[AnnData]]:
    """The objects (copies with ``copy``) in the form given, and their tables."""
    found = {name: _io.unpack(one, table_key, copy=copy) for name, one in _io.objects_of(data).items()}
    objects, tables = [one for one, _ in found.values()], [table for _, table in found.values()]
    if isinstance(data, Mapping):
        return dict(zip(data, objects)), tables
    return objects if isinstance(data, list | tuple) else objects[0], tables


def gene_values(sides: Sequence[Side], layer: str | None) -> list[list[tuple[np.ndarray, Standardised]]]:
    """For each side its slides: rows among those of all its tables, and the genes that all tables share, standardised."""
    from spatiaflow._slides import gather
    from spatiaflow.models.levels import standardised
    from spatiaflow.models.preprocess import usual_depth

    genes = sorted(set.intersection(*(set(map(str, table.var_names)) for _, tables, _ in sides for table in tables)))
    if len(genes) < 2:
        raise ValueError(
            f"var_names of all objects share {len(genes)} genes; at least two are needed. To use an embedding alone give "
            "use_rep=."
        )
    found = [
        [
            (part.start + slide.rows, slide.align(genes))
            for one, part, where in zip(_io.objects_of(objects).values(), rows_of(tables), wheres)
            for slide in gather(one, where, need=["counts"], layer=layer, scaled=False)
        ]
        for objects, tables, wheres in sides
    ]
    target_sum = usual_depth([slide for side in found for _, slide in side])
    return [[(rows, standardised(slide, target_sum, highest=10.0)) for rows, slide in side] for side in found]


def _features(sides: Sequence[Side], use_rep: Sequence[str], method: str, layer: str | None) -> list[np.ndarray]:
    """What cells are told apart by, rows of all tables x features, for the data and for the reference if there is one."""
    out: list[list[np.ndarray]] = [[] for _ in sides]
    for slot in use_rep:
        if slot == "X":
            blocks = _genes(sides, method, layer)
        else:
            blocks = [pooled(tables, slot) for _, tables, _ in sides]
            _check_alike([tables[0] for _, tables, _ in sides], slot, blocks, "data and the reference")
        for side, block in zip(out, blocks):
            side.append(block)
    return [np.hstack(side) for side in out]


def _genes(sides: Sequence[Side], method: str, layer: str | None) -> list[np.ndarray]:
    """Standardised genes of each side, or their components where they are many or distances are to be measured."""
    from spatiaflow.models.levels import joint_axes

    found = gene_values(sides, layer)
    n_genes = found[0][0][1].values.shape[1]
    axes = np.eye(n_genes)
    if method == "knn" or n_genes > MANY_GENES:
        axes = joint_axes([z for side in found for _, z in side], 50)
    out = [np.empty((sum(table.n_obs for table in tables), axes.shape[1]), np.float32) for _, tables, _ in sides]
    for block, side in zip(out, found):
        for rows, z in side:
            block[rows] = z @ axes
    return out


def rows_of(tables: Sequence[AnnData]) -> list[slice]:
    """Rows of each table among the rows of all."""
    ends = np.cumsum([0, *(table.n_obs for table in tables)])
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def pooled(tables: Sequence[AnnData], use_rep: str) -> np.ndarray:
    """Embeddings of all tables, one after the other."""
    found = [_io.features(table, use_rep, EMBEDDING_HELP) for table in tables]
    _check_alike(tables, use_rep, found, "the objects of data")
    return np.concatenate(found)


def _labelled(tables: Sequence[AnnData], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label among the rows of all tables, and their labels."""
    _io.text(labels=labels)
    if not any(labels in table.obs for table in tables):
        raise KeyError(f"obs has no {labels!r}; it has {', '.join(map(repr, tables[0].obs.columns[:12]))}.")
    columns = [table.obs[labels].astype(object) if labels in table.obs else [None] * table.n_obs for table in tables]
    given = pd.Series(np.concatenate([np.asarray(column, dtype=object) for column in columns]))
    called = given.astype(str).str.strip()
    unnamed = called.str.lower().isin(UNNAMED)
    if found := sorted(set(called[unnamed]) - {UNKNOWN}):
        logger.warning(
            "%d cells of obs[%r] called %s are taken to have no label. If it is one, rename it", called.isin(found).sum(), labels,
            _io.listing(found),
        )  # fmt: skip
    rows = np.flatnonzero(given.notna() & ~unnamed & ~called.isin(MISSING))
    y = given.iloc[rows].astype(str).to_numpy()
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


def _check_alike(tables: Sequence[AnnData], use_rep: str, values: Sequence[np.ndarray], whose: str) -> None:
    """Refuse embeddings of different width, or of different models where it is known which model made them."""
    widths = [x.shape[1] for x in values]
    found = []
    for table in tables:
        key = next((k for k in table.uns if use_rep.startswith(k) and "params" in _io.entry(table, k)), None)
        params = table.uns[key]["params"] if key else {}
        if "model_sha256" in params:
            levels = [*map(str, params.get("levels", []))] if use_rep == key else []
            modalities = sorted(map(str, params.get("modalities", [])))
            found.append((params["model_sha256"], levels, modalities, str(params.get("scaling", ""))))
    if any(one != found[0] for one in found[1:]):
        raise ValueError(
            f"obsm[{use_rep!r}] of {whose} was made by different models, or of other levels, modalities or scaling. Run "
            "sf.tl.embed_spatia on all of them with the same model=, levels=, modalities= and scaling=."
        )
    if len(set(widths)) > 1:
        raise ValueError(f"obsm[{use_rep!r}] of {whose} has {' and '.join(map(str, widths))} columns; embed all alike.")
