"""Find pairs of cells in two states, and make training batches of their latents and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow._settings import logger, progress, warn
from spatiaflow.models.conditions import Context
from spatiaflow.models.transport import Coordinates, PairingConfig, matched

POOL = 4  # number of batches within which targets are exchanged
ALIKE = 0.3  # weight of the distance between sources: about half of them exchange targets; at .1 nearly all, at 1 hardly any
PROBLEMS = ("transition", "niche", "n_source", "n_target", "mass", "dropped", "marginal_error")


def pair_states(
    sides: Mapping[str, tuple[np.ndarray, np.ndarray]],
    niches: np.ndarray | None,
    coordinates: Coordinates,
    config: PairingConfig,
    *,
    batch: int,
    seed: int,
    device,
) -> tuple[pd.DataFrame, tuple[np.ndarray, np.ndarray, np.ndarray], pd.DataFrame]:
    """Pair the sources and targets of every transition within their niche.

    Parameters
    ----------
    sides
        Sources and targets of each transition, as rows of ``coordinates``.
    niches
        Niche of each row, "" if it is missing. If None, cells are paired over all rows.

    Returns
    -------
    Pairs (``source`` and ``target`` are rows), entries of the plans (row, column, share of the row's prescribed mass), and a
    table with one row per problem solved.
    """
    groups = [
        (name, niche, rows, columns)
        for name, pair in sides.items()
        for niche, rows, columns in _by_niche(name, *pair, niches, config.min_cells)
    ]
    found, notes, entries = [], [], []
    for i, (name, niche, rows, columns) in enumerate(progress(groups, "pairing", unit="group")):
        rng = np.random.default_rng([seed, 2, i])
        options = {"batch": batch, "seed": int(rng.integers(2**31)), "device": device}
        plan, confidence = matched(coordinates, rows, columns, config, **options)
        chosen = plan.draw(rng) if config.pairs == "sample" else plan.index[:, 0]
        pair = {"source": rows, "target": columns[chosen], "transition": name, "niche": niche}
        found.append(pd.DataFrame(pair | {"confidence": confidence}))
        share = (plan.share * np.minimum(1, plan.mass)[:, None]).ravel()
        entries.append((np.repeat(rows, plan.index.shape[1]), columns[plan.index].ravel(), share))
        notes.append((name, niche, len(rows), len(columns), plan.mass.mean(), plan.dropped.mean(), plan.marginal_error))
    row, column, share = (np.concatenate(v) for v in zip(*entries))
    problems = pd.DataFrame(notes, columns=list(PROBLEMS))
    return pd.concat(found, ignore_index=True), (row, column, share), problems


def _by_niche(
    name: str, rows: np.ndarray, columns: np.ndarray, niches: np.ndarray | None, min_cells: int
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (niche, sources, targets) of each niche with both states. If there is none, of the whole table."""
    if niches is None:
        return [("", rows, columns)]
    both = [n for n in np.intersect1d(niches[rows], niches[columns]) if n]
    parts = [(n, rows[niches[rows] == n], columns[niches[columns] == n]) for n in both]
    parts = [part for part in parts if min(len(part[1]), len(part[2])) >= min_cells]
    if not parts:
        warn(f"{name}: no niche holds {min_cells} cells of both states; they are paired over the whole table.")
        return [("", rows, columns)]
    if left := len(rows) - sum(len(part[1]) for part in parts):
        logger.warning(
            "%s: %d of %d sources are in niches without %d targets and stay unpaired", name, left, len(rows), min_cells
        )
    return parts


@dataclass
class Pairs:
    """Source cells with their rows of the transport plan."""

    source: np.ndarray  # n, rows of the context
    target: np.ndarray  # n x k, rows of the context
    share: np.ndarray  # n x k, sums to 1
    confidence: np.ndarray  # n
    transition: np.ndarray  # n, number of the transition in the model's vocabulary
    genes: np.ndarray  # n x genes, mean shift of the transition in the niche
    profile: np.ndarray  # n x features, mean shift of the transition in the niche
    group: np.ndarray  # n, one number for each transition and niche
    level: int = 0  # 0 cells, 1 tiles

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, which) -> Pairs:
        """Return a subset of the pairs."""
        fields = {name: getattr(self, name)[which] for name in self.__dataclass_fields__ if name != "level"}
        return Pairs(**fields, level=self.level)

    def within(self, rows: np.ndarray) -> Pairs:
        """Return the pairs whose source is among ``rows`` (bool). Targets outside ``rows`` are dropped."""
        share = self.share * rows[self.target]
        kept = rows[self.source] & (share.sum(1) > 0)
        out = self.rows(kept)
        out.share = share[kept] / share[kept].sum(1, keepdims=True)
        return out


def exchanged(source: Tensor, target: Tensor, context: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return a new target for each source, so that the images of a pair are similar (minibatch optimal transport).

    Sources exchange targets within their group. The cost is the squared distance of the latents (n x d), plus ``ALIKE`` times
    that of the sources' ``context`` (n x c), each divided by its mean. The second term keeps targets with similar sources
    (conditional optimal transport: Kerrigan, Migliorini and Smyth, 2024). The set of targets of a group does not change, so the
    flow still learns their distribution. Paths become shorter and straighter. They are learned faster and preserve more of the
    source.
    """
    place = np.arange(len(source))
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        if len(rows) < 2:
            continue
        alike = torch.from_numpy(np.ascontiguousarray(context[rows], np.float32))
        images, states = (torch.cdist(a, b) ** 2 for a, b in ((source[rows], target[rows]), (alike, alike)))
        images, states = (d / d.mean().clamp_min(1e-9) for d in (images, states))
        place[rows] = rows[linear_sum_assignment((images + ALIKE * states).numpy())[1]]
    return place


class PairBatches(Dataset):
    """Batches of pairs. Item b depends only on the seed, the epoch and b.

    Targets are drawn from the plan in each epoch, so a source is trained with many of its targets. Batches are parts of larger
    pools. Within a pool, sources exchange targets (see :func:`exchanged`) unless ``exchange`` is False.
    """

    def __init__(
        self, pairs: Pairs, latents: Tensor, place: np.ndarray, around: Context, n_batches: int, size: int, seed: int, *,
        exchange=True,
    ):  # fmt: skip
        self.pairs, self.latents, self.place, self.around = pairs, latents, place, around  # place: row of the latents
        self.n_batches, self.size, self.seed, self.epoch = n_batches, min(size, len(pairs)), seed, 0
        self.exchange, self.per_pool = exchange, max(1, min(POOL, len(pairs) // size))
        self._pool: Any = (None, None)  # the last pool that was drawn, and its rows

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        p, (pool, place) = self.pairs, divmod(b, self.per_pool)
        which, target = (rows[place * self.size : (place + 1) * self.size] for rows in self._drawn(pool))
        return {
            "source": self._latents(p.source[which]),
            "target": self._latents(target),
            "confidence": torch.from_numpy(p.confidence[which].astype(np.float32)),
            "conditions": self.around.conditions(
                p.source[which], p.transition[which], p.genes[which], p.profile[which], p.level
            ),
            "seed": int(np.random.default_rng([self.seed, self.epoch, b]).integers(2**31)),
        }

    def _drawn(self, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of a pool, and the row of each pair's target."""
        if self._pool[0] != (self.epoch, pool):
            rng, p = np.random.default_rng([self.seed, self.epoch, pool, 1]), self.pairs
            which = rng.permutation(len(p))[: self.per_pool * self.size]
            place = (rng.random((len(which), 1)) > p.share[which].cumsum(1)).sum(1).clip(max=p.share.shape[1] - 1)
            target = p.target[which, place]
            if self.exchange:
                source = p.source[which]
                found = exchanged(
                    self._latents(source), self._latents(target), self.around.cell[source], p.group[which]
                )
                target = target[found]
            self._pool = (self.epoch, pool), (which, target)
        return self._pool[1]

    def _latents(self, rows: np.ndarray) -> Tensor:
        return self.latents[torch.from_numpy(self.place[rows])]


def shares(plan: sparse.csr_matrix, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns and shares (n x k) of the entries of each row of a plan.

    Only entries in ``allowed`` (n x columns, bool) are used. The shares of a row sum to 1, or to 0 if no entry is left.
    """
    length = np.diff(plan.indptr)
    row = np.repeat(np.arange(len(length)), length)
    place = np.arange(plan.nnz) - np.repeat(plan.indptr[:-1], length)
    index, share = (np.zeros((len(length), int(length.max(initial=1))), kind) for kind in (int, float))
    index[row, place], share[row, place] = plan.indices, plan.data * allowed[row, plan.indices]
    total = share.sum(1, keepdims=True)
    return index, np.divide(share, total, out=np.zeros_like(share), where=total > 0)


def mean_shift(pairs: Pairs, values) -> np.ndarray:
    """Return the mean of ``values`` (n x d) over the targets minus that over the sources, weighted by confidence."""
    weight = pairs.confidence / max(pairs.confidence.sum(), 1e-12)
    change = np.zeros(values.shape[0])
    np.add.at(change, pairs.target.ravel(), (pairs.share * weight[:, None]).ravel())
    np.add.at(change, pairs.source, -weight)
    return change @ values


def stacked(parts: Sequence[Pairs]) -> Pairs:
    """Join the pairs of several tables."""
    if len(parts) == 1:
        return parts[0]
    k = max(part.target.shape[1] for part in parts)
    wide = [
        replace(
            part,
            target=np.pad(part.target, ((0, 0), (0, k - part.target.shape[1]))),
            share=np.pad(part.share, ((0, 0), (0, k - part.share.shape[1]))),
        )
        for part in parts
    ]
    fields = (name for name in Pairs.__dataclass_fields__ if name != "level")
    whole = {name: np.concatenate([getattr(part, name) for part in wide]) for name in fields}
    return Pairs(**whole, level=parts[0].level)


def with_shifts(
    pairs: Pairs, niche: np.ndarray, names: Sequence[str], expression, profile: np.ndarray
) -> tuple[Pairs, dict[str, dict[str, dict[str, list[float]]]]]:
    """Add the mean shifts of their transition and niche to the pairs. Also returns all shifts by transition and niche.

    Parameters
    ----------
    niche
        Niche of each pair, "" if it has none.
    names
        Names of the transitions.
    expression, profile
        Log counts (n x genes) and standardised morphology (n x features) of all rows.
    """
    n = len(pairs)
    pairs = replace(
        pairs, genes=np.zeros((n, expression.shape[1])), profile=np.zeros((n, profile.shape[1])), group=np.zeros(n, int)
    )
    shifts: dict[str, dict[str, dict[str, list[float]]]] = {}
    for i, name in enumerate(names):
        here = pairs.transition == i
        if not here.any():
            raise ValueError(f"{name} has no pair whose cells lie in the image.")
        shifts[name] = {}
        for one in ["", *sorted(set(niche[here]) - {""})]:  # "": all niches together
            which = np.flatnonzero(here & (niche == one) if one else here)
            pairs.group[which] = pairs.group.max() + 1
            pairs.genes[which], pairs.profile[which] = (mean_shift(pairs.rows(which), v) for v in (expression, profile))
            shifts[name][one] = {
                kind: np.round(getattr(pairs, kind)[which[0]], 5).tolist() for kind in ("genes", "profile")
            }
    return pairs, shifts
