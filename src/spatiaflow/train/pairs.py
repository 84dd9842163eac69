"""Pairs of cells as training sees them: what each is conditioned on, and batches of both images' latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow.models.morphology import Conditions
from spatiaflow.models.orientation import turned_offsets

POOL = 4  # batches among which targets are exchanged
ALIKE = 0.3  # about half of the sources exchange theirs then; a tenth: nearly all, 1: hardly any


@dataclass
class Context:
    """Embeddings of all cells, and who lies where around each; rows are those of the table."""

    cell: np.ndarray  # n x d
    niche: np.ndarray  # n x d
    tissue: np.ndarray  # n x d
    neighbors: np.ndarray  # n x k, rows; a cell that has fewer repeats itself
    offset: np.ndarray  # n x k x 2 (x, y), in crops

    def turn(self, rows: np.ndarray, turns: np.ndarray) -> None:
        """Turn what lies around some cells as their images were."""
        self.offset[rows] = turned_offsets(torch.from_numpy(self.offset[rows]), turns).numpy()


@dataclass
class Pairs:
    """Sources with their rows of the transport plan."""

    source: np.ndarray  # n, rows of the table
    target: np.ndarray  # n x k, rows of the table
    share: np.ndarray  # n x k, sums to 1
    confidence: np.ndarray  # n
    transition: np.ndarray  # n
    genes: np.ndarray  # n x genes, shift of its transition and niche
    profile: np.ndarray  # n x features
    group: np.ndarray  # n, one number for each transition and niche
    level: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, which) -> Pairs:
        """Some of the pairs."""
        fields = (getattr(self, name)[which] for name in self.__dataclass_fields__ if name != "level")
        return Pairs(*fields, self.level)

    def within(self, rows: np.ndarray) -> Pairs:
        """Pairs whose source is among ``rows`` (bool by row of the table), with those of their targets that are."""
        share = self.share * rows[self.target]
        kept = rows[self.source] & (share.sum(1) > 0)
        out = self.rows(kept)
        out.share = share[kept] / share[kept].sum(1, keepdims=True)
        return out


def conditions(pairs: Pairs, which: np.ndarray, around: Context) -> Conditions:
    """Conditions of some pairs."""
    source = pairs.source[which]
    arrays = (
        around.cell[source], around.niche[source], around.tissue[source],
        np.concatenate([around.cell[around.neighbors[source]], around.offset[source]], 2), pairs.transition[which],
        pairs.genes[which], pairs.profile[which], np.full(len(which), pairs.level),
    )  # fmt: skip
    kinds = {"i": np.int64, "f": np.float32}
    return Conditions(*(torch.from_numpy(np.ascontiguousarray(v, kinds[v.dtype.kind])) for v in arrays))


def exchanged(source: Tensor, target: Tensor, context: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For each source the place of a target, so that images lie near each other: minibatch optimal transport.

    Sources exchange targets within their group; what an exchange costs is the squared distance of the latents (n x d), and
    ``ALIKE`` times that of the sources' ``context`` (n x c), each over its mean, so that targets stay with sources that are
    alike (conditional optimal transport: Kerrigan, Migliorini and Smyth, 2024). The targets of a group remain the same, and
    so does what a flow learns of them as a whole; shorter, straighter paths are learned faster and keep more of the source.
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
    """Item b of an epoch depends on the seed, the epoch and b alone.

    Targets are drawn anew from the plan each time, so that a source is shown the variety of its targets. Batches are slices of
    pools, in which sources have :func:`exchanged` their targets unless ``exchange`` is off.
    """

    def __init__(
        self, pairs: Pairs, latents: Tensor, place: np.ndarray, around: Context, n_batches: int, size: int, seed: int, *,
        exchange=True,
    ):  # fmt: skip
        self.pairs, self.latents, self.place, self.around = pairs, latents, place, around  # place: of a row's latents
        self.n_batches, self.size, self.seed, self.epoch = n_batches, min(size, len(pairs)), seed, 0
        self.exchange, self.per_pool, self._pool = exchange, max(1, min(POOL, len(pairs) // size)), (None, None)

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
            "conditions": conditions(p, which, self.around),
            "seed": int(np.random.default_rng([self.seed, self.epoch, b]).integers(2**31)),
        }

    def _drawn(self, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a pool, and the row of each one's target."""
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
    """Entries of each row of a plan side by side: columns and shares (n x k), which sum to 1, or to 0 where none is left.

    ``allowed`` (n x columns, bool) says which may be taken.
    """
    length = np.diff(plan.indptr)
    row = np.repeat(np.arange(len(length)), length)
    place = np.arange(plan.nnz) - np.repeat(plan.indptr[:-1], length)
    index, share = (np.zeros((len(length), int(length.max(initial=1))), kind) for kind in (int, float))
    index[row, place], share[row, place] = plan.indices, plan.data * allowed[row, plan.indices]
    total = share.sum(1, keepdims=True)
    return index, np.divide(share, total, out=np.zeros_like(share), where=total > 0)


def mean_shift(pairs: Pairs, values) -> np.ndarray:
    """Mean of the targets less mean of the sources, in ``values`` (n x d, dense or sparse); pairs weigh by confidence."""
    weight = pairs.confidence / max(pairs.confidence.sum(), 1e-12)
    change = np.zeros(values.shape[0])
    np.add.at(change, pairs.target.ravel(), (pairs.share * weight[:, None]).ravel())
    np.add.at(change, pairs.source, -weight)
    return change @ values
