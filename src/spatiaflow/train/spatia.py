"""Training SPATIA: contiguous regions of cells as batches, and losses that need no labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from spatiaflow.models.counts import log_likelihood
from spatiaflow.models.spatia import Spatia, SpatiaConfig, SpatiaNetwork, Surroundings, scaled
from spatiaflow.train.fit import claim, fit

# the likelihoods are nats a gene, of which training moves some hundredths; the others move by tenths and by ones
LOSSES = {"genes": 1.0, "image_to_genes": 1.0, "reconstruction": 0.05, "contrast": 0.02, "niche": 1.0, "tissue": 0.5}


@dataclass
class CellSlide:
    """Cells of one slide as training sees them."""

    library_id: str
    xy: np.ndarray  # n x 2, µm
    counts: sparse.csr_matrix | None  # n x genes of the vocabulary
    measured: np.ndarray  # genes, bool: on this slide's panel
    crops: object | None  # .read(rows) -> n x slide channels x p x p
    channels: np.ndarray  # for each channel of the model, its place on this slide, or -1
    intensity: np.ndarray | None  # slide channels x 2: background and bright end

    def __len__(self) -> int:
        return len(self.xy)

    def take(self, rows: np.ndarray) -> CellSlide:
        """Some of the cells."""
        crops = None if self.crops is None else self.crops.take(rows)
        counts = None if self.counts is None else self.counts[rows]
        return replace(self, xy=self.xy[rows], counts=counts, crops=crops)


def hold_out(slides: list[CellSlide], validation, gap: float) -> tuple[list[CellSlide], list[CellSlide]]:
    """Split into training and validation: by name, or a band of each slide with a gap (µm) beside it."""
    if not isinstance(validation, float):
        return [s for s in slides if s.library_id not in validation], [s for s in slides if s.library_id in validation]
    training, held_out = [], []
    for s in slides:
        along = s.xy[:, int(np.argmax(np.ptp(s.xy, axis=0)))]
        edge = np.quantile(along, 1 - validation)
        gap_here = min(gap, 0.1 * np.ptp(along))
        held_out.append(s.take(np.flatnonzero(along > edge)))
        training.append(s.take(np.flatnonzero(along <= edge - gap_here)))
    return training, held_out


def augmented(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn and mirror each crop; change gain, gamma and background of each channel, alike for a whole region."""
    n, c = x.shape[:2]
    which = torch.from_numpy(rng.integers(0, 8, n))
    for k in range(8):
        turned = torch.rot90(x[which == k], k % 4, (2, 3))
        x[which == k] = turned.flip(3) if k >= 4 else turned
    gain, gamma, shift = (
        torch.from_numpy(v.astype(np.float32)).view(1, c, 1, 1)
        for v in (rng.lognormal(0, 0.25, c), rng.lognormal(0, 0.2, c), rng.normal(0, 0.04, c))
    )
    return x.clamp_min(0) ** gamma * gain + shift


class CellRegions(Dataset):
    """Batches of cells from one field; item b of an epoch depends on the seed, the epoch and b alone.

    A batch is a few contiguous patches of cells scattered over a field of ``field_um``: neighbours for the niche level,
    patches far apart for the tissue level, at the price of one small region. Slides are drawn with probability
    proportional to the square root of their cells, so that a large one does not drown the others.
    """

    def __init__(
        self, slides, config, n_batches, *, fields=2, patches=3, cells=96, field_um=300.0, seed=0, augment=True
    ):
        self.slides, self.config, self.n_batches, self.augment = slides, config, n_batches, augment
        self.patches, self.cells, self.fields, self.field_um = patches, cells, fields, field_um
        self.seed, self.epoch = seed, 0
        self.trees = [cKDTree(s.xy) for s in slides]
        share = np.sqrt([len(s) for s in slides])
        self.share = share / share.sum()

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        rng = np.random.default_rng([self.seed, self.epoch, b])
        return self.batch([self._field(rng) for _ in range(self.fields)], rng)

    def _field(self, rng) -> tuple[int, np.ndarray]:
        which = int(rng.choice(len(self.slides), p=self.share))
        slide, tree = self.slides[which], self.trees[which]
        first = int(rng.integers(len(slide)))
        around = tree.query_ball_point(slide.xy[first], self.field_um)
        centres = np.append(rng.choice(around, self.patches - 1), first)
        k = min(self.cells, len(slide))
        return which, np.unique(tree.query(slide.xy[centres], k=[*range(1, k + 1)])[1])

    def batch(self, chosen: list[tuple[int, np.ndarray]], rng) -> dict:
        """Gather regions: crops, counts, panels, and the spatial structure of each."""
        c, parts = self.config, []
        for which, rows in chosen:
            slide = self.slides[which]
            part = {"measured": torch.from_numpy(np.tile(slide.measured, (len(rows), 1)))}
            if slide.counts is not None:
                part["counts"] = torch.from_numpy(slide.counts[rows].toarray().astype(np.float32))
            if slide.crops is not None:
                x = scaled(slide.crops.read(rows), slide.intensity, slide.channels)
                part["crops"] = augmented(x, rng) if self.augment else x
                part["present"] = torch.from_numpy(np.tile(slide.channels >= 0, (len(rows), 1)))
            parts.append(part)
        out = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        around = [Surroundings.of(self.slides[which].xy[rows], c) for which, rows in chosen]
        return out | {"around": around, "sizes": [len(rows) for _, rows in chosen], "seed": int(rng.integers(2**31))}


class SpatiaTraining(L.LightningModule):
    """One training step; every loss has a name, a weight that may be 0, and a line in the history."""

    def __init__(self, network: SpatiaNetwork, weights: dict[str, float], target_sum: float, learning_rate=1e-3):
        super().__init__()
        self.network, self.weights, self.target_sum, self.learning_rate = network, weights, target_sum, learning_rate
        self.history = {}
        d = network.config.width
        self.project = torch.nn.ModuleDict({k: torch.nn.Linear(d, d) for k in ("image", "genes")})
        self.log_temperature = torch.nn.Parameter(torch.tensor(np.log(0.1), dtype=torch.float32))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.02)
        steps = max(int(self.trainer.estimated_stepping_batches), 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def losses(self, b: dict) -> dict[str, Tensor]:
        """Every loss whose weight is not 0 and whose data are there."""
        net, c, on = self.network, self.network.config, {k for k, w in self.weights.items() if w > 0}
        device = self.log_temperature.device
        g = torch.Generator().manual_seed(b["seed"])
        n, out, image, genes = sum(b["sizes"]), {}, None, None
        measured = b["measured"]
        if "crops" in b:
            present = b["present"]
            if self.training and len(c.channels) > 1:  # a channel goes missing for a whole batch, so that it may
                drop = torch.rand(len(c.channels), generator=g).to(device) < 0.1
                present = present & ~drop if (present & ~drop).any(1).all() else present
            image = net.image(b["crops"], present)
            if "reconstruction" in on:
                some = slice(None, None, 4)  # it is dear, and neighbours look alike
                out["reconstruction"] = net.image.reconstruction(b["crops"][some], present[some])
        if "counts" in b:
            counts, size = b["counts"], b["counts"].sum(1)
            hidden = (torch.rand(counts.shape, generator=g) < torch.rand((n, 1), generator=g)).to(device) & measured
            seen = measured & ~hidden
            visible = (counts * seen).sum(1)
            # normalised by what is visible, so that hidden counts leave no trace
            scale = self.target_sum / visible.clamp_min(1) * (seen.sum(1) / measured.sum(1).clamp_min(1))
            genes = net.gene(torch.log1p(counts * seen * scale[:, None]), seen, torch.log1p(visible))

        def misfit(embedding, level, which):
            mean = size[:, None].clamp_min(1) * torch.exp(net.log_rates(embedding, level).clamp(-15, 3))
            log_p = log_likelihood(counts, mean.clamp_min(1e-6), net.theta)
            return -(log_p * which).sum() / which.sum().clamp_min(1)

        both = net.fuse(image, genes, n)
        from_image = net.fuse(image, None, n) if image is not None and "counts" in b else None
        from_genes = net.fuse(None, genes, n) if image is not None and genes is not None else None
        if "genes" in on and genes is not None:
            out["genes"] = misfit(both, "cell", hidden)
        if "image_to_genes" in on and from_image is not None:
            out["image_to_genes"] = misfit(from_image, "cell", measured)
        if "contrast" in on and image is not None and genes is not None:
            a = F.normalize(self.project["image"](image.mean(1)), dim=1)
            e = F.normalize(self.project["genes"](genes.mean(1)), dim=1)
            logit = a @ e.T / self.log_temperature.exp().clamp(0.02, 1)
            target = torch.arange(n, device=device)
            out["contrast"] = (F.cross_entropy(logit, target) + F.cross_entropy(logit.T, target)) / 2
        if on & {"niche", "tissue"} and genes is not None:
            absent = torch.rand(n, generator=g).to(device) < 0.25
            levels = []
            for around, part in zip(b["around"], torch.arange(n, device=device).split(b["sizes"])):
                view = [v for v in (both, from_image, from_genes, both) if v is not None]
                cells = view[int(torch.randint(len(view), (1,), generator=g))][part]
                cells = torch.where(absent[part, None], net.hidden_cell, cells)
                levels.append(net.context(cells, around))
            which = absent[:, None] & measured
            for name, embedding in zip(("niche", "tissue"), (torch.cat(x) for x in zip(*levels))):
                if name in on:
                    out[name] = misfit(embedding, name, which)
        return out

    def _step(self, b: dict, stage: str) -> Tensor:
        losses = self.losses(b)
        total = sum(self.weights[name] * value for name, value in losses.items())
        for name, value in {"loss": total, **losses}.items():
            self.log(f"{stage}_{name}", value.detach(), on_step=False, on_epoch=True, batch_size=sum(b["sizes"]))
        return total

    def training_step(self, b: dict, _):
        torch.manual_seed(b["seed"])  # dropout and masks belong to the batch, so that a resumed run repeats them
        return self._step(b, "train")

    def validation_step(self, b: dict, _):
        torch.manual_seed(b["seed"])
        self._step(b, "val")

    def transfer_batch_to_device(self, b: dict, device, _):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()}


def start_rates(network: SpatiaNetwork, slides: list[CellSlide]) -> None:
    """Start the predicted rates at each gene's mean share of the library."""
    total, size = np.zeros(len(network.config.genes)), np.zeros(len(network.config.genes))
    for s in slides:
        if s.counts is not None:
            total += np.asarray(s.counts.sum(0)).ravel()
            size += s.counts.sum() * s.measured
    with torch.no_grad():
        network.rates.bias.copy_(torch.from_numpy(np.log((total + 0.5) / np.maximum(size, 1)).clip(-15, 0)))


def fit_spatia(
    slides: list[CellSlide],
    config: SpatiaConfig,
    *,
    card: dict,
    target_sum: float,
    losses: dict[str, float] | None = None,
    validation: list[CellSlide],
    init: Spatia | None = None,
    max_epochs: int = 20,
    batches_per_epoch: int | None = None,
    learning_rate: float = 1e-3,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    accelerator: str = "cpu",
    devices: int | str = 1,
    precision: str = "32-true",
    seed: int = 0,
) -> Spatia:
    """Fit a SPATIA to training slides; the epoch is chosen by the loss on validation slides."""
    if checkpoint_dir is not None:
        claim(
            checkpoint_dir, resume, config=config, target_sum=target_sum, losses=losses, max_epochs=max_epochs, seed=seed,
            batches_per_epoch=batches_per_epoch, learning_rate=learning_rate, init=init and init.sha256,
            slides=tuple(s.library_id for s in [*slides, *validation]),
            data=[v for s in [*slides, *validation] for v in (s.xy, s.counts, s.intensity)],
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SpatiaNetwork(config)
        module = SpatiaTraining(network, LOSSES | (losses or {}), target_sum, learning_rate)
    if init is None:
        start_rates(network, slides)
    else:
        network.load_state_dict(init.network.state_dict())
    n_cells = sum(map(len, slides))
    n_batches = batches_per_epoch or max(32, -(-n_cells // 512))
    training = CellRegions(slides, config, n_batches, seed=seed)
    held_out = CellRegions(validation, config, max(2, min(8, n_batches // 4)), seed=seed + 1, augment=False)
    fit(
        module, training, held_out, max_epochs=max_epochs, patience=max_epochs, monitor="val_loss", seed=seed,
        description="SPATIA", checkpoint_dir=checkpoint_dir, resume=resume, accelerator=accelerator, devices=devices,
        precision=precision,
    )  # fmt: skip
    return Spatia(network=network, target_sum=target_sum, history=module.history, card=card)
