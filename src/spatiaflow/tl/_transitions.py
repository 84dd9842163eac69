"""Pairs of cells (or tiles) of two states: who of the target state is most like each source, and how sure that is."""

from __future__ import annotations

import difflib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed, settings
from spatiaflow.models.pairing import Plan, agreement, transport
from spatiaflow.models.spatial import spatial_graph

# Confidence is judged on wide plans that may refuse mass, however pairs are drawn: at the width that these are drawn with, what
# few targets happen to be near would count as evidence, and a group of 20 cells would be surer, or less sure, than one of 5,000;
# and a balanced plan has no mass to tell a source without a counterpart by.
CONFIDENCE_EPSILON, CONFIDENCE_RHO = 0.25, 0.5
CONFIDENCES = ("mass", "entropy", "peak")


def pair_transitions(
    data: AnnData | SpatialData,
    *,
    transitions: list[tuple[str, str]],
    groupby: str,
    niche_key: str | None = None,
    cost: dict[str, float] | None = None,
    epsilon: float = 0.05,
    unbalanced: float | None = 0.5,
    confidence: str = "mass",
    pairs: str = "sample",
    min_cells: int = 5,
    min_share: float = 0.05,
    n_components: int = 50,
    top_k: int = 32,
    n_rounds: int = 1,
    layer: str | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    random_state: int | None = None,
    key_added: str = "transition",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Pair cells of one state with cells of another by optimal transport, with a confidence for each pair.

    What is observed are two states in one tissue, not a cell before and after: a pair says which cell of the target state is
    most like the source, given that all of one population are to be matched to the other. It is no lineage and no cause.

    Parameters
    ----------
    data
        Cells with counts; or tiles of :func:`spatiaflow.pp.tiles` made with ``groupby=``.
    transitions
        Pairs (source state, target state). ("A", "A") is the negative control: half of the cells of A, drawn at random, with
        the other half.
    groupby
        Column of ``.obs`` with states. For tiles the slot of ``.obsm`` with the shares of states: a tile is a source where
        its share of A is at least ``min_share`` and that of B lower, a target where its share of B is.
    niche_key
        Column of ``.obs``: cells are paired within their niche. Where no niche holds both states they are paired over the
        whole table, with a warning.
    cost
        What cells are compared by, and its weight: ``"genes"`` (principal components of expression), ``"composition"``
        (shares of the states among the 30 nearest cells) and slots of ``.obsm``, such as ``"morphology"`` or
        ``"X_spatia_niche"``. Each is scaled so that its spread within the target state is 1. By default genes alone.
    epsilon
        Entropic regularisation, over the median cost within the target state.
    unbalanced
        Weight of the Kullback-Leibler divergence of both marginals from uniform ones, in the same unit: sources
        without a counterpart lose mass. None: balanced, every source and every target of a niche is used in full, so
        that the pairs show the whole difference of the two states there. Confidence is judged by a plan of its own either way.
    confidence
        ``"mass"``: min(1, transported mass / prescribed mass) times the agreement of the matches found from two binomial
        halves of the counts. For comparison ``"entropy"`` (1 - entropy of the row / log of the number of targets) and
        ``"peak"`` (largest entry of the row of the plan, which shrinks with the number of cells).
    pairs
        ``"sample"`` draws each source's target from its row of the plan, which keeps the variety of the targets;
        ``"argmax"`` takes the largest entry, many to one.
    min_cells
        Fewest cells of either state in a niche; niches with fewer are left out.
    min_share
        For tiles, see ``groupby``.
    n_components
        Principal components of expression, fitted to the cells of both states.
    top_k
        Entries of each row of the plan that are stored.
    n_rounds
        Above ``batch_size`` cells a side, how often each source is paired with another part of the targets.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, spatial_key, mpp
        As everywhere; positions are read for ``"composition"`` alone.
    batch_size
        Cells a side that one problem may have, 5,000 by default: what is larger is solved in parts.
    device
        Where to solve; ``settings.device`` when None.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Beginning of the slots' names.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obsp[f"{key_added}_plan"]`` : CSR (n_obs, n_obs), float32, rows sources, columns targets; of each source and transition
        the ``top_k`` largest shares, which sum to the transported part of its prescribed mass less what was dropped
    ``.uns[f"{key_added}s"]`` : DataFrame with one row a source and transition: ``source`` and ``target`` (names of
        ``.obs_names``), ``transition`` ("A -> B"), ``niche`` ("" where paired over the whole table), ``confidence`` in [0, 1]
    ``.uns[f"{key_added}_plan"]`` : dict with ``problems`` (DataFrame: one row a transition and niche, numbers of cells, mean
        transported mass, mean share of it beyond ``top_k``, relative error of the marginals or NaN where they may give way)
        and ``params``

    Raises
    ------
    KeyError
        ``groupby``, ``niche_key`` or a slot of ``cost`` is missing.
    ValueError
        A state is unknown, a transition has fewer than ``min_cells`` on a side, or counts are not raw.

    Notes
    -----
    SPATIA's transitions (its section on generation) with the cost scaled, mass that may be refused, and targets
    drawn rather than the largest taken.

    Examples
    --------
    >>> sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    >>> sdata["table"].uns["transitions"].columns.tolist()
    ['source', 'target', 'transition', 'niche', 'confidence']
    """
    started, seed, target = time.perf_counter(), resolve_seed(random_state), settings.torch_device(device)
    _io.positive(epsilon=epsilon, unbalanced=unbalanced)
    _io.at_least_one(
        min_cells=min_cells, n_components=n_components, top_k=top_k, n_rounds=n_rounds, batch_size=batch_size
    )
    _io.slot_name(key_added)
    _io.one_of(CONFIDENCES, confidence=confidence)
    _io.one_of(("sample", "argmax"), pairs=pairs)
    data, table = _io.unpack(data, table_key, copy=copy)
    wanted = _transitions(transitions)
    states = _States.of(table, groupby, min_share, min_cells)
    niches = _niches(table, niche_key)
    sides = [states.sides(*one, np.random.default_rng([seed, 1])) for one in wanted]
    cost = {"genes": 1.0} if cost is None else cost
    if not isinstance(cost, Mapping):
        raise ValueError(f"cost must be a dict of names and weights, such as {{'genes': 1.0}}, not {cost!r}.")
    sides = _comparable(table, sides, cost, layer, min_cells, wanted)
    used = _by_name(table, np.unique(np.concatenate([rows for pair in sides for rows in pair])))

    def places():
        return _io.slides(
            data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
            spatial_key=spatial_key, mpp=mpp,
        )  # fmt: skip

    views = _coordinates(table, used, cost, states, places, layer, n_components, confidence == "mass", seed)
    options = {"rho": unbalanced, "top_k": top_k, "batch": batch_size or 5000, "n_rounds": n_rounds, "device": target}
    problems = [
        (f"{a} -> {b}", niche, *rows)
        for (a, b), pair in zip(wanted, sides)
        for niche, *rows in _groups(f"{a} -> {b}", *pair, niches, min_cells)
    ]
    found, notes, entries = [], [], []
    for i, (name, niche, rows, columns) in enumerate(progress(problems, "pairing", unit="group")):
        rng = np.random.default_rng([seed, 2, i])
        plan, sure = _pair(views, rows, columns, epsilon, confidence, options | {"seed": int(rng.integers(2**31))})
        chosen = plan.draw(rng) if pairs == "sample" else plan.index[:, 0]
        pair = {"source": table.obs_names[rows], "target": table.obs_names[columns[chosen]]}
        found.append(pd.DataFrame(pair | {"transition": name, "niche": niche, "confidence": sure}))
        value = (plan.share * np.minimum(1, plan.mass)[:, None]).ravel()
        entries.append((np.repeat(rows, plan.index.shape[1]), columns[plan.index].ravel(), value))
        notes.append((name, niche, len(rows), len(columns), plan.mass.mean(), plan.dropped.mean(), plan.marginal_error))
    row, column, value = (np.concatenate(v) for v in zip(*entries))
    columns = ["transition", "niche", "n_source", "n_target", "mass", "dropped", "marginal_error"]
    params = {
        "transitions": [f"{a} -> {b}" for a, b in wanted], "groupby": groupby, "niche_key": niche_key or "",
        "cost": {k: float(v) for k, v in cost.items()}, "epsilon": epsilon, "unbalanced": unbalanced or 0.0,
        "confidence": confidence, "pairs": pairs,
        "min_share": min_share, "n_components": n_components, "top_k": top_k, "random_state": seed,
        "spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    n, keep = table.n_obs, value > 0
    plan = sparse.csr_matrix((value[keep].astype(np.float32), (row[keep], column[keep])), (n, n))
    table.obsp[f"{key_added}_plan"] = plan
    pairs_found = pd.concat(found, ignore_index=True)
    order = [pairs_found["transition"].map({name: i for i, name in enumerate(params["transitions"])}).to_numpy()]
    order = np.lexsort([table.obs_names.get_indexer(pairs_found["source"]), *order])
    table.uns[f"{key_added}s"] = pairs_found.iloc[order].reset_index(drop=True)
    table.uns[f"{key_added}_plan"] = {"problems": pd.DataFrame(notes, columns=columns), "params": params}
    logger.info("wrote obsp['%s_plan'], uns['%ss'] (%d pairs)", key_added, key_added, len(table.uns[f"{key_added}s"]))
    return data if copy else None


def _by_name(table: AnnData, rows: np.ndarray | None = None) -> np.ndarray:
    """Rows in the order of their names."""
    rows = np.arange(table.n_obs) if rows is None else rows
    return rows[np.argsort(table.obs_names.to_numpy().astype(str)[rows], kind="stable")]


def _comparable(table, sides, cost, layer, floor: int, wanted) -> list:
    """Leave out rows that have nothing to be compared by: no counts, or a value that is missing."""
    keep = np.ones(table.n_obs, bool)
    if cost.get("genes"):
        keep &= np.asarray(_io.counts(table, None, layer)[0].sum(1)).ravel() > 0
    for name in cost:
        if name not in ("genes", "composition") and name in table.obsm:
            keep &= np.isfinite(np.asarray(table.obsm[name], float)).all(1)
    known = np.unique(np.concatenate([rows for pair in sides for rows in pair]))
    if missing := int((~keep[known]).sum()):
        warnings.warn(
            f"{missing} rows have no counts, or no value in {', '.join(map(repr, cost))}, and are left out.",
            UserWarning,
            stacklevel=3,
        )
    sides = [[rows[keep[rows]] for rows in pair] for pair in sides]
    for (source, target), pair in zip(wanted, sides):
        if min(map(len, pair)) < floor:
            raise ValueError(
                f"{source} -> {target}: fewer than min_cells={floor} rows of a state have anything to compare."
            )
    return sides


def targets_of(table: AnnData, params: dict) -> dict[str, np.ndarray]:
    """Rows of the targets of each transition of a call of :func:`pair_transitions`."""
    states = _States.of(table, params["groupby"], params["min_share"], 1)
    rng = [params["random_state"], 1]
    return {name: states.sides(*name.split(" -> "), np.random.default_rng(rng))[1] for name in params["transitions"]}


def sources_of(table: AnnData, groupby: str, min_share: float, source: str, target: str) -> np.ndarray:
    """Which rows (n, bool) hold enough of the source state and little of the target state, as in :func:`pair_transitions`."""
    states = _States.of(table, groupby, min_share, 1)
    a, b = (states.share[:, states.place(state)] >= states.min_share for state in (source, target))
    return a & ~b if source != target else a


def _transitions(given) -> list[tuple[str, str]]:
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(v, str) for v in given):
        given = [given]
    wanted = [tuple(map(str, one)) if isinstance(one, tuple | list) and len(one) == 2 else None for one in given]
    if not wanted or None in wanted:
        raise ValueError(f'transitions must be pairs of states, such as [("A", "B")], not {given!r}.')
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"transitions names a pair twice: {wanted}.")
    return wanted


@dataclass
class _States:
    """Shares of states: one of a cell, several of a tile."""

    groupby: str
    names: list[str]
    share: np.ndarray  # n x states
    min_share: float
    floor: int
    order: np.ndarray  # rows by name: what is drawn does not depend on the order of the table

    @classmethod
    def of(cls, table: AnnData, groupby: str, min_share: float, floor: int) -> _States:
        if groupby not in table.obs and groupby in table.obsm and groupby in table.uns.get("tiles", {}):
            names, share = table.uns["tiles"][groupby], np.asarray(table.obsm[groupby])
        else:
            state, min_share = _io.groups(table, groupby), 0.5
            names = state.cat.categories
            share = (state.cat.codes.to_numpy()[:, None] == np.arange(len(names))).astype(float)
        return cls(groupby, [*map(str, names)], share, min_share, floor, _by_name(table))

    def place(self, state: str) -> int:
        """Its column."""
        if state not in self.names:
            near = difflib.get_close_matches(state, self.names, 3, 0.4) or self.names[:8]
            raise ValueError(f"{self.groupby!r} has no state {state!r}; did you mean {', '.join(map(repr, near))}?")
        return self.names.index(state)

    def sides(self, source: str, target: str, rng) -> tuple[np.ndarray, np.ndarray]:
        """Rows of sources and of targets."""
        a, b = (self.share[:, self.place(state)] >= self.min_share for state in (source, target))
        if source == target:
            rows = rng.permutation(self.order[a[self.order]])
            rows, columns = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        else:
            rows, columns = self.order[(a & ~b)[self.order]], self.order[b[self.order]]
        for state, found in ((source, rows), (target, columns)):
            if len(found) < self.floor:
                raise ValueError(
                    f"{source} -> {target}: {len(found)} rows of state {state!r} are fewer than min_cells={self.floor}."
                )
        return rows, columns


def _niches(table: AnnData, niche_key: str | None) -> np.ndarray | None:
    """Niche of every row as text; "" where it is missing."""
    if niche_key is None:
        return None
    niche = _io.groups(table, niche_key)
    if (missing := int(niche.isna().sum())) == len(niche):
        raise ValueError(f"obs[{niche_key!r}] is missing in every row.")
    if missing:
        warnings.warn(
            f"{missing} rows have no niche in obs[{niche_key!r}] and are left out.", UserWarning, stacklevel=3
        )
    return niche.astype(object).where(niche.notna(), "").astype(str).to_numpy()


def _groups(name: str, rows: np.ndarray, columns: np.ndarray, niches: np.ndarray | None, floor: int) -> list:
    """(niche, sources, targets) for every niche that holds both states; the whole table where none does."""
    if niches is None:
        return [("", rows, columns)]
    both = [n for n in np.intersect1d(niches[rows], niches[columns]) if n]
    parts = [(n, rows[niches[rows] == n], columns[niches[columns] == n]) for n in both]
    parts = [part for part in parts if min(len(part[1]), len(part[2])) >= floor]
    if not parts:
        warnings.warn(
            f"{name}: no niche holds {floor} cells of both states; they are paired over the whole table.",
            UserWarning,
            stacklevel=3,
        )
        return [("", rows, columns)]
    if left := len(rows) - sum(len(part[1]) for part in parts):
        logger.warning(
            "%s: %d of %d sources are in niches without %d targets and stay unpaired", name, left, len(rows), floor
        )
    return parts


@dataclass
class _Views:
    """Coordinates of rows: as they are, and from two halves of their counts."""

    place: np.ndarray  # n_obs, place of each row in the arrays, or -1
    whole: list[np.ndarray]
    halves: list[list[np.ndarray]]

    def both(self, blocks: list[np.ndarray], rows, columns) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of sources and targets, every block scaled by its spread within the targets."""
        x, y = [], []
        for block in blocks:
            a, b = block[self.place[rows]], block[self.place[columns]]
            scale = max(np.sqrt(b.var(0).sum()), 1e-9)
            x.append(a / scale)
            y.append(b / scale)
        return np.hstack(x), np.hstack(y)


def _pair(views: _Views, rows, columns, epsilon, confidence, options) -> tuple[Plan, np.ndarray]:
    """Plan of one group, and the confidence of its rows."""
    x, y = views.both(views.whole, rows, columns)
    plan = transport(x, y, epsilon=epsilon, **options)
    if confidence == "entropy":
        return plan, np.clip(1 - plan.entropy, 0, 1)
    if confidence == "peak":
        return plan, plan.share[:, 0] * plan.mass / len(rows)
    judged = options | {"epsilon": CONFIDENCE_EPSILON, "rho": CONFIDENCE_RHO}
    wide = transport(x, y, **judged)
    sure = np.minimum(1, wide.mass)
    if views.halves:
        halves = []
        for blocks in views.halves:
            a, b = views.both(blocks, rows, columns)
            halves.append(transport(a, b, at=y, **judged))
        sure = sure * agreement(*halves, y)
    return plan, sure


def _coordinates(table, used, cost, states, places, layer, n_components, halved, seed) -> _Views:
    """What rows are compared by, each block times the square root of its weight."""
    cost = {name: float(weight) for name, weight in cost.items() if weight}
    if not cost or min(cost.values()) < 0:
        raise ValueError(f"cost needs a positive weight, such as {{'genes': 1.0}}; it is {cost}.")
    place = np.full(table.n_obs, -1)
    place[used] = np.arange(len(used))
    fixed = [
        np.sqrt(weight) * _slot(table, name, states, places)[used] for name, weight in cost.items() if name != "genes"
    ]
    if "genes" not in cost:
        return _Views(place, fixed, [])
    weight = np.sqrt(cost["genes"])
    counts = sparse.csr_matrix(_io.counts(table[used], None, layer)[0])
    unit = max(float(np.median(np.asarray(counts.sum(1)))), 1.0)
    from sklearn.decomposition import PCA

    values = _normalised(counts, unit)
    n = min(n_components, min(values.shape) - 1)
    pca = PCA(n, svd_solver="covariance_eigh" if values.shape[1] <= 3000 else "arpack", random_state=seed).fit(values)
    halves = []
    if halved:
        half = counts.copy()
        half.data = np.random.default_rng([seed, 3]).binomial(counts.data.astype(np.int64), 0.5).astype(np.float64)
        halves = [[weight * pca.transform(_normalised(part, unit)), *fixed] for part in (half, counts - half)]
    return _Views(place, [weight * pca.transform(values), *fixed], halves)


def _normalised(counts: sparse.csr_matrix, unit: float) -> sparse.csr_matrix:
    """log1p of counts per ``unit``."""
    total = np.asarray(counts.sum(1)).ravel().clip(1)
    return sparse.csr_matrix(sparse.diags(unit / total) @ counts).log1p()


def _slot(table, name: str, states: _States, places) -> np.ndarray:
    """A block that cells are compared by: composition around them, or a slot of obsm, standardised."""
    if name == "composition":
        out = np.zeros(states.share.shape)
        for slide in places():
            near = spatial_graph(slide.xy, 30, ties="cut").index.numpy()
            out[slide.rows] = states.share[slide.rows[near]].mean(1)
        return out
    values = table.obsm.get(name)
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy(float)
        spread = np.nanstd(values, 0)
        return (values - np.nanmean(values, 0)) / np.where(spread > 0, spread, 1)
    if name not in table.obsm or not np.issubdtype(np.asarray(values).dtype, np.number):
        return _io.features(table, name, "cost= takes 'genes', 'composition' and slots of obsm.")
    return np.asarray(values, np.float64)
