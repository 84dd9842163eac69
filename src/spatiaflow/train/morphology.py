"""Training the generator of morphology: pairs of cells as batches, and losses that weigh them by confidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from spatiaflow.models.flow import interpolate
from spatiaflow.models.morphology import (
    Conditions,
    MorphologyConfig,
    MorphologyNetwork,
    Surrogate,
    sliced_wasserstein,
    start,
)
from spatiaflow.train.fit import claim, fit

LOSSES = {"flow": 1.0, "alignment": 0.1, "contrast": 0.1}
MARGIN = 0.1


@dataclass
class Surroundings:
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
    level: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def within(self, rows: np.ndarray) -> Pairs:
        """Pairs whose source is among ``rows`` (bool by row of the table), with those of their targets that are."""
        share = self.share * rows[self.target]
        kept = rows[self.source] & (share.sum(1) > 0)
        share = share[kept] / share[kept].sum(1, keepdims=True)
        fields = (getattr(self, name)[kept] for name in ("confidence", "transition", "genes", "profile"))
        return Pairs(self.source[kept], self.target[kept], share, *fields, self.level)


def conditions(pairs: Pairs, which: np.ndarray, around: Surroundings, turns: np.ndarray | None = None) -> Conditions:
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


def oriented(target: Tensor, source: Tensor) -> Tensor:
    """Each target in that of its eight orientations which is nearest to its source: a cell has no up."""
    flat = [turned(target, np.full(len(target), k)) for k in range(8)]
    distance = torch.stack([((one - source) ** 2).flatten(1).sum(1) for one in flat])
    return torch.stack(flat)[distance.argmin(0), torch.arange(len(target))]


class PairBatches(Dataset):
    """Item b of an epoch depends on the seed, the epoch and b alone.

    Targets are drawn anew from the plan each time, so that a source is shown the variety of its targets; both images are turned
    alike.
    """

    def __init__(
        self,
        pairs: Pairs,
        images,
        image_of: np.ndarray,
        around: Surroundings,
        n_batches: int,
        size: int,
        seed: int,
        *,
        augment=True,
    ):
        self.pairs, self.images, self.image_of, self.around = pairs, images, image_of, around
        self.n_batches, self.size, self.seed, self.epoch, self.augment = n_batches, size, seed, 0, augment

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        rng = np.random.default_rng([self.seed, self.epoch, b])
        p = self.pairs
        which = rng.choice(len(p), min(self.size, len(p)), replace=False)
        place = (rng.random((len(which), 1)) > p.share[which].cumsum(1)).sum(1).clip(max=p.share.shape[1] - 1)
        target = p.target[which, place]
        source, target = (self._read(rows) for rows in (p.source[which], target))
        turns = rng.integers(0, 8, len(which)) if self.augment else np.zeros(len(which), int)
        source = turned(source, turns)
        return {
            "source": source,
            "target": oriented(target, source),
            "confidence": torch.from_numpy(p.confidence[which].astype(np.float32)),
            "conditions": conditions(p, which, self.around, turns),
            "seed": int(rng.integers(2**31)),
        }

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(self.images[self.image_of[rows]], np.float32))


@torch.no_grad()
def _moving_average(average: list[Tensor], current: list[Tensor], n: Tensor, decay: float = 0.995) -> None:
    """Exponential moving average whose memory grows with the steps taken, so that a short training is not lost in it."""
    torch._foreach_lerp_(average, current, 1 - min(decay, (1 + float(n)) / (10 + float(n))))


class MorphologyTraining(L.LightningModule):
    """Confidence-weighted flow matching, alignment of morphology, contrast of conditions; every loss has a name and a weight."""

    def __init__(
        self,
        network: MorphologyNetwork,
        surrogate: Surrogate | None,
        weights: dict[str, float],
        *,
        weighted=True,
        learning_rate=5e-4,
    ):
        super().__init__()
        self.network, self.surrogate, self.weighted, self.learning_rate = network, surrogate, weighted, learning_rate
        self.average = AveragedModel(network, multi_avg_fn=_moving_average)
        if surrogate is not None:
            surrogate.requires_grad_(False)
        self.weights, self.history = {name: weight for name, weight in weights.items() if weight > 0}, {}
        if surrogate is None:
            self.weights.pop("alignment", None)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = max(int(self.trainer.estimated_stepping_batches), 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def losses(self, network: MorphologyNetwork, b: dict) -> dict[str, Tensor]:
        """Every loss whose weight is not 0."""
        c, control, target = network.config, b["source"], b["target"]
        g = torch.Generator().manual_seed(b["seed"])
        n = len(control)
        x0 = start(control, torch.randn(control.shape, generator=g).to(control), c)
        t = torch.rand(n, generator=g).to(control)
        kept = torch.rand(n, generator=g) >= (c.drop if self.training else 0)
        x_t, u = interpolate(x0, target, t[:, None, None, None]), target - x0
        condition, around = network.condition(b["conditions"], kept.to(control.device))
        v = network(x_t, t, control, condition, around)
        misfit = ((v - u) ** 2).flatten(1).mean(1)
        weight = b["confidence"] / b["confidence"].mean().clamp_min(1e-8) if self.weighted else torch.ones_like(misfit)
        out = {"flow": (weight * misfit).mean()}
        if "alignment" in self.weights:
            endpoint = x_t + (1 - t)[:, None, None, None] * v
            read = (
                self.surrogate.reliability * self.surrogate(x) for x in (endpoint, target)
            )  # no more than it can tell
            out["alignment"] = sliced_wasserstein(*read, g)
        if "contrast" in self.weights:
            out["contrast"] = self._contrast(network, b, x_t, t, u, misfit, g)
        return out

    def _contrast(self, network, b, x_t, t, u, misfit, g) -> Tensor:
        """A velocity under the conditions of another transition should fit worse, by a margin."""
        transition = b["conditions"].transition.cpu()
        other = torch.randperm(len(transition), generator=g)
        which = (transition != transition[other]).nonzero()[:, 0][: len(transition) // 4]
        if not len(which):
            return misfit.sum() * 0
        condition, around = network.condition(b["conditions"].rows(other[which].to(u.device)))
        wrong = network(x_t[which], t[which], b["source"][which], condition, around)
        return F.relu(misfit[which] - ((wrong - u[which]) ** 2).flatten(1).mean(1) + MARGIN).mean()

    def _step(self, network, b: dict, stage: str) -> Tensor:
        losses = self.losses(network, b)
        total = sum(self.weights.get(name, 0.0) * value for name, value in losses.items())
        for name, value in {"loss": total, **losses}.items():
            self.log(f"{stage}_{name}", value.detach(), on_step=False, on_epoch=True, batch_size=len(b["source"]))
        return total

    def training_step(self, b: dict, _):
        return self._step(self.network, b, "train")

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.network)

    def validation_step(self, b: dict, _):
        self._step(self.average.module, b, "val")

    def transfer_batch_to_device(self, b: dict, device, _):
        return {k: v.to(device) if isinstance(v, Tensor | Conditions) else v for k, v in b.items()}


def fit_surrogate(
    images,
    profile: np.ndarray,
    held_out: np.ndarray,
    *,
    max_epochs: int = 15,
    batch_size: int = 128,
    seed: int = 0,
    device="cpu",
) -> tuple[Surrogate, np.ndarray]:
    """Fit a network that reads standardised morphology (n x features) off images; returns it and R2 on those held out."""
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Surrogate(images.shape[1], profile.shape[1]).to(device)
    steps = max_epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 2), pct_start=0.2)
    y = torch.from_numpy(np.asarray(profile, np.float32)).to(device)

    def read(rows):
        return torch.from_numpy(np.asarray(images[rows], np.float32)).to(device)

    for _ in range(max_epochs):
        for rows in np.array_split(rng.permutation(train), -(-len(train) // batch_size)):
            loss = F.smooth_l1_loss(network(turned(read(rows), rng.integers(0, 8, len(rows)))), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        found = torch.cat([network(read(rows)) for rows in np.array_split(test, -(-len(test) // 512))])
    truth = y[test]
    r2 = 1 - ((found - truth) ** 2).mean(0) / truth.var(0, unbiased=False).clamp_min(1e-9)
    network.reliability.copy_(r2.clamp(0, 1))
    return network, r2.cpu().numpy()


def fit_morphology(
    training: Pairs, validation: Pairs, images, image_of, around: Surroundings, config: MorphologyConfig,
    surrogate: Surrogate | None, *, losses: dict[str, float] | None = None, weighted: bool = True, max_epochs: int = 20,
    batch_size: int = 64, batches_per_epoch: int | None = None, learning_rate: float = 5e-4,
    checkpoint_dir: Path | None = None, resume=False, accelerator="cpu", devices=1, precision="32-true", seed: int = 0,
) -> tuple[MorphologyNetwork, dict]:  # fmt: skip
    """Fit a generator to pairs; returns its averaged network and the history."""
    if checkpoint_dir is not None:
        claim(
            checkpoint_dir, resume, config=config, losses=losses, weighted=weighted, max_epochs=max_epochs, seed=seed,
            batch_size=batch_size, batches_per_epoch=batches_per_epoch, learning_rate=learning_rate,
            pairs=[v for p in (training, validation) for v in (p.source, p.target, p.confidence)],
            around=[around.cell, around.offset],
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MorphologyNetwork(config)
    module = MorphologyTraining(
        network, surrogate, LOSSES | (losses or {}), weighted=weighted, learning_rate=learning_rate
    )
    n = batches_per_epoch or max(16, -(-len(training) // batch_size))
    arguments = (images, image_of, around)
    fit(
        module, PairBatches(training, *arguments, n, batch_size, seed),
        PairBatches(validation, *arguments, max(2, min(16, n // 4)), batch_size, seed + 1, augment=False),
        description="morphology", checkpoint_dir=checkpoint_dir, max_epochs=max_epochs, patience=max_epochs, monitor="val_loss",
        seed=seed, resume=resume, accelerator=accelerator, devices=devices, precision=precision,
    )  # fmt: skip
    return module.average.module, module.history
