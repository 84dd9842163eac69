"""Pairs of cells (or tiles) of two states: which cell of the target state is most like each source, and how sure that is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, resolve_seed, settings, warn

if TYPE_CHECKING:
    from spatiaflow.models.transport import Coordinates, PairingConfig, StateShares

Sides = dict[str, tuple[np.ndarray, np.ndarray]]  # rows of sources and of targets, by transition


@verb
@_io.each_object
def pair_transitions(
    data: AnnData | SpatialData,
    *,
    transitions: list[tuple[str, str]],
    groupby: str,
    niche_key: str | None = None,
    cost: dict[str, float] | None = None,
    config: PairingConfig | str | None = None,
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

    A tissue shows two states at one time, not one cell before and after. A pair says which cell of the target state is most
    like the source, when one population as a whole is matched to the other. It is no lineage and no cause.

    Parameters
    ----------
    data
        Cells with counts, or tiles of :func:`spatiaflow.pp.tiles` made with ``groupby=``; or a list or dict of such objects,
        each of which is paired on its own.
    transitions
        Pairs (source state, target state). ("A", "A") is the negative control: a random half of the cells of A is paired with
        the other half.
    groupby
        Column of ``.obs`` with states. For tiles the slot of ``.obsm`` with the shares of states: a tile is a source where
        its share of A is at least ``config.min_share`` and that of B is lower, and a target where its share of B is.
    niche_key
        Column of ``.obs``. Cells are paired within their niche; where no niche holds both states, over the whole table, with
        a warning.
    cost
        What cells are compared by, and its weight: ``"genes"`` (principal components of expression), ``"composition"``
        (shares of the states among the 30 nearest cells) and slots of ``.obsm``, such as ``"morphology"`` or
        ``"X_spatia_niche"``. Each is scaled so that its spread within the target state is 1. None: genes only.
    config
        Settings of the transport and of the confidence: a :class:`spatiaflow.models.PairingConfig`. None: the defaults.
    layer
        Layer with raw counts; None reads ``X``.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, spatial_key, mpp
        Column of ``.obs`` with the slides, slot of the positions, and µm per unit of them. Positions are read only for
        ``"composition"``.
    batch_size
        Largest number of cells a side that is solved at once, 5,000 when None. Larger problems are solved in parts.
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
    None, or with ``copy=True`` what was given. Sets:

    ``.obsp[f"{key_added}_plan"]`` : CSR (n_obs, n_obs), float32, rows sources, columns targets; of each source and transition
        the ``top_k`` largest shares, which sum to the transported part of its prescribed mass, less the dropped entries
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
    These are SPATIA's transitions (its section on generation), with a scaled cost, with mass that may be refused, and with
    targets drawn from the plan instead of its largest entry.

    Examples
    --------
    >>> sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    >>> sdata["table"].uns["transitions"].columns.tolist()
    ['source', 'target', 'transition', 'niche', 'confidence']
    """
    from spatiaflow.models.transport import PairingConfig
    from spatiaflow.train.pairs import pair_states

    where = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    started, seed, config = time.perf_counter(), resolve_seed(random_state), PairingConfig.of(config)
    _io.at_least_one(None, batch_size=batch_size)
    _io.slot_name(key_added)
    data, table = _io.unpack(data, table_key, copy=copy)
    wanted, cost = _transitions(transitions), _cost(cost)
    states, niches = state_shares(table, groupby, config.min_share), _niches(table, niche_key)
    sides = {f"{a} -> {b}": states.sides(a, b, [seed, 1], config.min_cells) for a, b in wanted}
    sides = _comparable(table, sides, cost, layer, library_key, config.min_cells)
    used = _by_name(table, np.unique(np.concatenate([rows for pair in sides.values() for rows in pair])))
    place = np.full(table.n_obs, -1)
    place[used] = np.arange(len(used))
    pairs, (row, column, share), problems = pair_states(
        {name: (place[rows], place[columns]) for name, (rows, columns) in sides.items()},
        None if niches is None else niches[used],
        _coordinates(data, where, table, used, cost, states, layer, config, seed),
        config,
        batch=batch_size or 5000,
        seed=seed,
        device=settings.torch_device(device),
    )
    names = list(sides)
    source = used[pairs["source"].to_numpy()]
    order = np.lexsort([source, pd.Index(names).get_indexer(pairs["transition"])])
    for side in ("source", "target"):
        pairs[side] = table.obs_names[used[pairs[side].to_numpy()]]
    entries, kept = (used[row], used[column]), share > 0
    table.obsp[Key.obsp.plan(key_added)] = sparse.csr_matrix(
        (share[kept].astype(np.float32), (entries[0][kept], entries[1][kept])), (table.n_obs, table.n_obs)
    )
    table.uns[Key.uns.pairs(key_added)] = pairs.iloc[order].reset_index(drop=True)
    table.uns[Key.uns.plan(key_added)] = {
        "problems": problems,
        "params": _io.provenance(
            started, random_state=seed, transitions=names, groupby=groupby, niche_key=niche_key or "", cost=cost,
            **(asdict(config) | {"unbalanced": config.unbalanced or 0.0}),
        ),
    }  # fmt: skip
    logger.info("wrote obsp[%r], uns[%r] (%d pairs)", Key.obsp.plan(key_added), Key.uns.pairs(key_added), len(pairs))
    return data if copy else None


def targets_of(table: AnnData, params: Mapping) -> dict[str, np.ndarray]:
    """Return the rows of the targets of each transition of a call of :func:`pair_transitions`."""
    states = state_shares(table, params["groupby"], params["min_share"])
    seed = [params["random_state"], 1]
    return {name: states.sides(*name.split(" -> "), seed)[1] for name in params["transitions"]}  # type: ignore[call-arg]


def state_shares(table: AnnData, groupby: str, min_share: float) -> StateShares:
    """Return the states of cells, or the shares of states in tiles."""
    from spatiaflow.models.transport import StateShares

    _io.text(groupby=groupby)
    if groupby not in table.obs and groupby in table.obsm and groupby in _io.entry(table, "tiles"):
        names, share = table.uns["tiles"][groupby], np.asarray(table.obsm[groupby])
    else:
        state, min_share = _io.groups(table, groupby), 0.5
        names = state.cat.categories
        share = (state.cat.codes.to_numpy()[:, None] == np.arange(len(names))).astype(float)
    return StateShares(groupby, [*map(str, names)], share, min_share, _by_name(table))


def _by_name(table: AnnData, rows: np.ndarray | None = None) -> np.ndarray:
    """Return rows in the order of their names."""
    rows = np.arange(table.n_obs) if rows is None else rows
    return rows[np.argsort(table.obs_names.to_numpy().astype(str)[rows], kind="stable")]


def _transitions(given) -> list[tuple[str, str]]:
    """Return transitions as a list of pairs, after a check."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(v, str) for v in given):
        given = [given]
    wanted: list[Any] = [
        tuple(map(str, one)) if isinstance(one, tuple | list) and len(one) == 2 else None
        for one in (given if isinstance(given, list | tuple) else [given])
    ]
    if not wanted or None in wanted:
        raise ValueError(f'transitions must be pairs of states, such as [("A", "B")], not {given!r}.')
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"transitions names a pair twice: {wanted}.")
    if arrows := [state for pair in wanted for state in pair if " -> " in state]:
        raise ValueError(f"a state cannot be called {arrows[0]!r}, since ' -> ' stands between two: rename it.")
    return wanted


def _cost(given: Mapping[str, float] | None) -> dict[str, float]:
    """Return the terms of the cost that have a weight, after a check."""
    given = {"genes": 1.0} if given is None else given
    if not isinstance(given, Mapping):
        raise ValueError(f"cost must be a dict of names and weights, such as {{'genes': 1.0}}, not {given!r}.")
    weighs = all(isinstance(weight, Real) and 0 <= weight < np.inf for weight in given.values())
    cost = {str(name): float(weight) for name, weight in given.items() if weight} if weighs else {}
    if not cost:
        raise ValueError(f"cost needs a positive weight, such as {{'genes': 1.0}}; it is {dict(given)}.")
    return cost


def _comparable(
    table: AnnData, sides: Sides, cost: dict[str, float], layer: str | None, library_key: str | None, min_cells: int
) -> Sides:
    """Leave out rows without counts, and rows without a value in a slot of the cost."""
    keep = np.ones(table.n_obs, bool)
    if "genes" in cost:
        counts = sparse.csr_matrix(_io.counts(table, None, layer)[0])
        _io.check_measured(table, counts, library_key)
        keep &= np.asarray(counts.sum(1)).ravel() > 0
    for name in cost:
        if name not in ("genes", "composition") and name in table.obsm:
            keep &= np.isfinite(_io.matrix(table, name)).all(1)
    known = np.unique(np.concatenate([rows for pair in sides.values() for rows in pair]))
    if missing := int((~keep[known]).sum()):
        warn(f"{missing} rows have no counts, or no value in {', '.join(map(repr, cost))}, and are left out.")
    out = {}
    for name, (rows, columns) in sides.items():
        out[name] = rows[keep[rows]], columns[keep[columns]]
        if min(map(len, out[name])) < min_cells:
            raise ValueError(f"{name}: fewer than min_cells={min_cells} rows of a state have anything to compare.")
    return out


def _niches(table: AnnData, niche_key: str | None) -> np.ndarray | None:
    """Return the niche of every row as text, "" where it is missing."""
    if niche_key is None:
        return None
    niche = _io.groups(table, niche_key)
    if (missing := int(niche.isna().sum())) == len(niche):
        raise ValueError(f"obs[{niche_key!r}] is missing in every row.")
    if missing:
        warn(f"{missing} rows have no niche in obs[{niche_key!r}] and are left out.")
    return _io.as_text(niche)


def _coordinates(
    data, where: Where, table: AnnData, used: np.ndarray, cost: dict[str, float], states: StateShares, layer: str | None,
    config: PairingConfig, seed: int,
) -> Coordinates:  # fmt: skip
    """Return what the rows ``used`` are compared by."""
    from spatiaflow.models.transport import Coordinates, composition, expression

    fixed = []
    for name, weight in cost.items():
        if name == "composition":
            values = np.zeros(states.share.shape)
            for slide in _io.places(data, where):
                values[slide.rows] = composition(states.share[slide.rows], slide.xy)
        elif name != "genes":
            values = _slot(table, name)
        else:
            continue
        fixed.append(np.sqrt(weight) * values[used])
    if "genes" not in cost:
        return Coordinates(fixed)
    counts = sparse.csr_matrix(_io.counts(table[used], None, layer)[0])
    options: dict[str, Any] = {"n_components": config.n_components, "halved": config.confidence == "mass", "seed": seed}
    return Coordinates(fixed, *expression(counts, cost["genes"], **options))


def _slot(table: AnnData, name: str) -> np.ndarray:
    """Return a slot of obsm as an array; a DataFrame, whose columns have units, is standardised."""
    values = table.obsm.get(name)
    if isinstance(values, pd.DataFrame):
        return standardised(values)
    if name not in table.obsm:
        return _io.features(table, name, "cost= takes 'genes', 'composition' and slots of obsm.")
    return _io.matrix(table, name).astype(np.float64)


def standardised(frame: pd.DataFrame) -> np.ndarray:
    """Return the columns of a DataFrame with mean 0 and standard deviation 1; NaN stays."""
    values = frame.to_numpy(float)
    spread = np.nanstd(values, 0)
    return (values - np.nanmean(values, 0)) / np.where(spread > 0, spread, 1)
