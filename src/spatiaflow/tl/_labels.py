"""Names for cells from their embeddings: niches without labels, types from labelled cells."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import resolve_seed

MAX_FIT = 20_000  # cells that mixtures are fitted to
UNKNOWN = "unknown"
EMBEDDING_HELP = "Run sf.tl.embed_spatia(data) first, or give use_rep=..."


def cluster_niches(
    data: AnnData | SpatialData,
    *,
    n_clusters: int | None = None,
    use_rep: str = "X_spatia_niche",
    max_clusters: int = 12,
    table_key: str = "table",
    random_state: int | None = None,
    key_added: str = "niche",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Cluster cells by their surroundings.

    A Gaussian mixture over the principal components of the niche embedding. Without ``n_clusters`` their number is the
    one of lowest Bayesian information criterion; no label is looked at.

    Parameters
    ----------
    data
        Needs ``.obsm[use_rep]``, from :func:`embed_spatia`.
    n_clusters
        Number of niches; chosen when None.
    use_rep
        Embedding.
    max_clusters
        Most that are tried when ``n_clusters`` is None.
    table_key
        Table of a SpatialData.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obs[key_added]`` : categories "0", "1", ..., the largest first
    ``.obs[f"{key_added}_confidence"]`` : float in [0, 1], probability of the niche under the mixture
    ``.uns[key_added]`` : dict with ``bic`` of every number tried and ``params``

    Raises
    ------
    KeyError
        The embedding is missing.
    ValueError
        It has values that are not finite, or fewer cells than clusters.

    Examples
    --------
    >>> sf.tl.cluster_niches(sdata, n_clusters=3, key_added="found_niche")
    >>> sdata["table"].obs["found_niche"].cat.categories.tolist()
    ['0', '1', '2']
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.at_least_one(n_clusters=n_clusters, max_clusters=max_clusters)
    data, table = _io.unpack(data, table_key, copy=copy)
    x = _io.features(table, use_rep, EMBEDDING_HELP).astype(np.float64)
    tried = [n_clusters] if n_clusters else list(range(1, max_clusters + 1))
    if len(x) < 2 * max(tried[0], 2):
        raise ValueError(f"{len(x)} cells are too few: two for each niche are needed, and four at least.")
    x = PCA(min(15, *x.shape), random_state=seed).fit_transform(x)
    x = x / max(x[:, 0].std(), 1e-12)
    sample = np.random.default_rng(seed).permutation(len(x))[:MAX_FIT]
    best, bic = None, []
    for n in [n for n in tried if 2 * n <= len(x)]:
        mixture = GaussianMixture(n, covariance_type="diag", reg_covar=1e-3, n_init=3, random_state=seed).fit(x[sample])
        bic.append(mixture.bic(x[sample]))
        best = mixture if bic[-1] == min(bic) else best
    probability = best.predict_proba(x)
    order = np.argsort(-np.bincount(probability.argmax(1), minlength=best.n_components), kind="stable")
    names = [str(i) for i in range(best.n_components)]
    chosen = pd.Categorical.from_codes(np.argsort(order)[probability.argmax(1)], names)
    params = {
        "n_clusters": best.n_components, "use_rep": use_rep, "random_state": seed,
        "spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    _io.write(
        table, key_added, obs={"": chosen, "_confidence": probability.max(1)},
        uns={"bic": dict(zip(map(str, tried), bic)), "params": params},
    )  # fmt: skip
    return data if copy else None


def annotate(
    data: AnnData | SpatialData,
    *,
    labels: str,
    reference: AnnData | SpatialData | None = None,
    use_rep: str = "X_spatia",
    method: str = "linear",
    threshold: float = 0.5,
    table_key: str = "table",
    library_key: str | None = None,
    random_state: int | None = None,
    key_added: str = "annotation",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Carry labels from some cells to the others, by their embeddings.

    A linear probe (logistic regression) or nearest neighbours. Penalty and the temperature that makes confidence honest
    are chosen on held-out labelled cells: whole slides where ``library_key`` tells three or more apart, folds else.

    Parameters
    ----------
    data
        Needs ``.obsm[use_rep]``; without ``reference`` also ``.obs[labels]``, where missing values are to be filled.
    labels
        Column of ``.obs`` with the labels, of ``reference`` when it is given.
    reference
        Labelled cells, embedded by the same model.
    use_rep
        Embedding.
    method
        ``"linear"`` or ``"knn"``.
    threshold
        Cells whose confidence is lower are called "unknown".
    table_key
        Table of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides of the labelled cells apart.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obs[key_added]`` : categories, the labels and "unknown"; cells that had a label keep it
    ``.obs[f"{key_added}_confidence"]`` : float in [0, 1], calibrated; 1 where the label was given
    ``.uns[key_added]`` : dict with ``classes``, ``held_out_accuracy`` and ``held_out_macro_f1`` (on labelled cells that
        the probe did not see) and ``params``

    Raises
    ------
    KeyError
        The embedding or the labels are missing.
    ValueError
        Fewer than two classes are labelled, or the embeddings were made by different models.

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
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a confidence between 0 and 1, not {threshold!r}.")
    data, table = _io.unpack(data, table_key, copy=copy)
    source = table if reference is None else _io.unpack(reference, table_key)[1]
    x, known = _io.features(table, use_rep, EMBEDDING_HELP), _io.features(source, use_rep, EMBEDDING_HELP)
    if reference is not None:
        _same_model(table, source, use_rep)
        if x.shape[1] != known.shape[1]:
            raise ValueError(
                f"obsm[{use_rep!r}] has {x.shape[1]} columns in data and {known.shape[1]} in the reference; embed both alike."
            )
    if labels not in source.obs:
        raise KeyError(f"obs has no {labels!r}; it has {', '.join(map(repr, source.obs.columns[:12]))}.")
    given = source.obs[labels].astype(object)
    rows = np.flatnonzero(
        given.notna() & ~given.isin([UNKNOWN, "", "nan", "None", "<NA>"])
    )  # what text makes of a missing value
    y = given.iloc[rows].astype(str).to_numpy()
    if len(classes := np.unique(y)) < 2:
        raise ValueError(f"obs[{labels!r}] names {len(classes)} class(es); at least two are needed.")
    if 2 * len(classes) > len(y):
        raise ValueError(
            f"obs[{labels!r}] has {len(classes)} classes for {len(y)} labelled cells; two cells a class are needed at least, and "
            "numbers are no classes."
        )
    groups = source.obs[library_key].astype(str).to_numpy()[rows] if library_key else None
    folds = _folds(y, groups, seed)
    best, score = None, -np.inf
    for make in _candidates(method, len(rows)):
        held_out = np.zeros((len(y), len(classes)))
        for train, test in folds:
            fitted = make().fit(known[rows[train]], y[train])
            held_out[np.ix_(test, np.searchsorted(classes, fitted.classes_))] = fitted.predict_proba(known[rows[test]])
        temperature, likelihood = _temperature(held_out, np.searchsorted(classes, y))
        if likelihood > score:
            best, score = (make, temperature, held_out), likelihood
    make, temperature, held_out = best
    probability = _sharpened(make().fit(known[rows], y).predict_proba(x), temperature)
    confidence, chosen = probability.max(1), classes[probability.argmax(1)].astype(object)
    chosen[confidence < threshold] = UNKNOWN
    if reference is None:
        chosen[rows], confidence[rows] = y, 1.0
    params = {
        "labels": labels, "use_rep": use_rep, "method": method, "threshold": threshold, "temperature": temperature,
        "random_state": seed, "n_labelled": len(rows), "spatiaflow": spatiaflow.__version__,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    guess = classes[held_out.argmax(1)]
    _io.write(
        table, key_added, obs={"": pd.Categorical(chosen, [*classes, UNKNOWN]), "_confidence": confidence},
        uns={
            "classes": list(classes), "held_out_accuracy": float(accuracy_score(y, guess)),
            "held_out_macro_f1": float(f1_score(y, guess, average="macro")), "params": params,
        },
    )  # fmt: skip
    return data if copy else None


def _candidates(method: str, n: int) -> list:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "knn":
        return [lambda k=k: KNeighborsClassifier(k, metric="cosine") for k in (5, 15, 45) if k < n / 2] or [
            lambda: KNeighborsClassifier(1)
        ]
    return [
        lambda c=c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)) for c in (1e-3, 1e-2, 1e-1)
    ]


def _folds(y: np.ndarray, groups: np.ndarray | None, seed: int) -> list:
    """Slides in turn where there are three or more, else five random folds with every class in each where possible."""
    from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

    if groups is not None and len(np.unique(groups)) >= 3:
        return list(GroupKFold(min(5, len(np.unique(groups)))).split(y, groups=groups))
    rare = np.unique(y, return_counts=True)[1].min()
    if rare >= 2:
        return list(StratifiedKFold(int(min(5, rare)), shuffle=True, random_state=seed).split(y, y))
    return list(KFold(min(5, len(y)), shuffle=True, random_state=seed).split(y))


def _temperature(probability: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Temperature of highest likelihood on held-out cells, and that likelihood."""
    tried = np.geomspace(0.25, 8, 41)
    score = [np.log(_sharpened(probability, t)[np.arange(len(truth)), truth] + 1e-9).mean() for t in tried]
    return float(tried[int(np.argmax(score))]), float(max(score))


def _sharpened(probability: np.ndarray, temperature: float) -> np.ndarray:
    logits = np.log(probability + 1e-9) / temperature
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def _same_model(table, source, use_rep: str) -> None:
    """Refuse embeddings of different models, where it is known which model made them."""
    found = []
    for one in (table, source):
        key = next((k for k in one.uns if use_rep.startswith(k) and "params" in one.uns[k]), None)
        params = one.uns[key]["params"] if key else {}
        found.append((params.get("model_sha256"), [*map(str, params.get("levels", []))] if use_rep == key else []))
    if None not in (found[0][0], found[1][0]) and found[0] != found[1]:
        raise ValueError(
            f"obsm[{use_rep!r}] of data and of reference were made by different models, or of other levels; run "
            "sf.tl.embed_spatia on both with the same model= and levels=."
        )
