"""Pairs of cells as training sees them: what each is conditioned on, and batches of both images, turned alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from spatiaflow.models.morphology import Conditions

POOL = 32  # batches among which targets are exchanged
MIDDLE = 0.15  # of the side of an image: standard deviation of the window in which its long axis is looked for
ALIKE = 0.3  # about half of the sources exchange theirs then; a tenth: nearly all, 1: hardly any


@dataclass
class Context:
    """Embeddings of all cells, and who lies where around each; rows are those of the table."""

    cell: np.ndarray  # n x d
    niche: np.ndarray  # n x d
    tissue: np.ndarray  # n x d
    neighbors: np.ndarray  # n x k, rows; a cell that has fewer repeats itself
    offset: np.ndarray  # n x k x 2 (x, y), in crops


@dataclass
class Pairs:
    """Sources with their rows of the transport plan; images by row of ``image_of``."""

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


def conditions(pairs: Pairs, which: np.ndarray, around: Context, turns: np.ndarray | None = None) -> Conditions:
    """Conditions of some pairs; ``turns`` (n, 0 to 7) turn the neighbours as :func:`turned` turns the image."""
    source = pairs.source[which]
    offset = around.offset[source] if turns is None else turned_offsets(around.offset[source], turns)
    arrays = (
        around.cell[source], around.niche[source], around.tissue[source],
        np.concatenate([around.cell[around.neighbors[source]], offset], 2), pairs.transition[which], pairs.genes[which],
        pairs.profile[which], np.full(len(which), pairs.level),
    )  # fmt: skip
    kinds = {"i": np.int64, "f": np.float32}
    return Conditions(*(torch.from_numpy(np.ascontiguousarray(v, kinds[v.dtype.kind])) for v in arrays))


def turned(x: Tensor, turns: np.ndarray) -> Tensor:
    """Images (n x C x p x p) each turned by a multiple of 90 degrees (turns % 4) and mirrored (turns >= 4)."""
    out = torch.empty_like(x)
    for k in np.unique(turns):
        which = torch.from_numpy(turns == k)
        one = torch.rot90(x[which], int(k) % 4, (2, 3))
        out[which] = one.flip(3) if k >= 4 else one
    return out


def turned_offsets(offset: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Offsets (n x k x 2; x, y) of what lies around images that :func:`turned` turns."""
    out = offset.copy()
    for _ in range(3):
        again = turns % 4 > 0
        out[again] = np.stack([out[again, :, 1], -out[again, :, 0]], -1)
        turns = np.where(again, turns - 1, turns)
    out[turns >= 4, :, 0] *= -1
    return out


def upright(images: Tensor) -> np.ndarray:
    """Turn of each image (n x C x p x p) that brings the long axis of what lies in its middle between 0 and 45 degrees."""
    x = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1] - 0.5  # 1 x p, and p x 1 for y
    x, y = x[None], -x[:, None]
    middle = (-(x**2 + y**2) / (2 * MIDDLE**2)).exp()
    axis = middle * (x**2 - y**2 + 2 * x * y + 1e-3 * x)  # the last term tells one end of the axis from the other
    flat = images.mean(1, keepdim=True)
    found = [(turned(flat, np.full(len(flat), k)) * axis).flatten(1).sum(1) for k in range(8)]
    return torch.stack(found).argmax(0).numpy()


def oriented(target: Tensor, source: Tensor) -> Tensor:
    """Each target in that of its eight orientations in which it lies as its source does: a cell has no up.

    By the long axis, and not by the distance of the images: a larger nucleus covers a smaller one whichever way it lies, and
    targets that lie anyhow are round on average, which is what a flow learns first.
    """
    back = upright(source)
    back = np.where(back < 4, -back % 4, back)  # a reflection is its own inverse
    return turned(turned(target, upright(target)), back)


def exchanged(source: Tensor, target: Tensor, context: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For each source the place of a target, so that images lie near each other: minibatch optimal transport.

    Sources exchange targets within their group; what an exchange costs is the distance of the images, both upright, and
    ``ALIKE`` times that of the sources' ``context`` (n x d), each over its mean, so that targets stay with sources that are
    alike (conditional optimal transport: Kerrigan, Migliorini and Smyth, 2024). The targets of a group remain the same, and
    so does what a flow learns of them as a whole; shorter, straighter paths are learned faster and keep more of the source.
    """

    def coarse(x):
        return F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1)

    place = np.arange(len(source))
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        if len(rows) < 2:
            continue
        images = torch.cdist(*(coarse(turned(x[rows], upright(x[rows]))) for x in (source, target)))
        states = torch.cdist(*(torch.from_numpy(np.ascontiguousarray(context[rows], np.float32)),) * 2)
        images, states = (d / d.mean().clamp_min(1e-9) for d in (images**2, states**2))
        place[rows] = rows[linear_sum_assignment((images + ALIKE * states).numpy())[1]]
    return place


class PairBatches(Dataset):
    """Item b of an epoch depends on the seed, the epoch and b alone.

    Targets are drawn anew from the plan each time, so that a source is shown the variety of its targets; both images are turned
    alike. Batches are slices of pools, in which sources have :func:`exchanged` their targets unless ``exchange`` is off.
    """

    def __init__(
        self,
        pairs: Pairs,
        images,
        image_of: np.ndarray,
        around: Context,
        n_batches: int,
        size: int,
        seed: int,
        *,
        augment=True,
        exchange=True,
    ):
        self.pairs, self.images, self.image_of, self.around = pairs, images, image_of, around
        self.n_batches, self.size, self.seed, self.epoch, self.augment = n_batches, size, seed, 0, augment
        self.exchange, self.per_pool, self._pool = exchange, max(1, min(POOL, len(pairs) // size)), (None, None)

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        rng, p = np.random.default_rng([self.seed, self.epoch, b]), self.pairs
        pool, place = divmod(b, self.per_pool)
        which, target = (rows[place * self.size : (place + 1) * self.size] for rows in self._drawn(pool))
        source, target = self._read(p.source[which]), self._read(target)
        turns = rng.integers(0, 8, len(which)) if self.augment else np.zeros(len(which), int)
        source = turned(source, turns)
        return {
            "source": source,
            "target": oriented(target, source),
            "confidence": torch.from_numpy(p.confidence[which].astype(np.float32)),
            "conditions": conditions(p, which, self.around, turns),
            "seed": int(rng.integers(2**31)),
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
                found = exchanged(self._read(source), self._read(target), self.around.cell[source], p.group[which])
                target = target[found]
            self._pool = (self.epoch, pool), (which, target)
        return self._pool[1]

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.images[self.image_of[rows]], np.float32))


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
