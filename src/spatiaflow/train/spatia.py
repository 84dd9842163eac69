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
from spatiaflow.models.spatia import Spatia, SpatiaConfig, SpatiaNetwork, Surroundings, relative_scale, scaled
from spatiaflow.train.fit import claim, fit

# the likelihoods are nats a gene, of which training moves some hundredths; the others move by tenths and by ones
LOSSES = {"genes": 1.0, "image_to_genes": 1.0, "reconstruction": 0.05, "contrast": 0.02, "niche": 1.0, "tissue": 0.5}


@dataclass
class CellSlide:
    """Cells of one slide as training sees them."""

    library_id: str
    xy: np.ndarray  # n x 2, µm
    counts: sparse.csr_matrix | object | None  # [rows] -> CSR, rows x genes of the vocabulary
    measured: np.ndarray  # genes, bool: on this slide's panel
    crops: object | None  # .read(rows) -> n x slide channels x p x p
    channels: np.ndarray  # for each channel of the model, its place on this slide, or -1
    intensity: np.ndarray | None  # slide channels x 2: background and bright end
    tissue: str = ""

    def __len__(self) -> int:
        return len(self.xy)

    def spread(self, n: int) -> np.ndarray:
        """Rows of at most n evenly spaced cells."""
        return np.unique(np.linspace(0, len(self) - 1, min(n, len(self))).astype(int))

    def take(self, rows: np.ndarray) -> CellSlide:
        """Some of the cells."""
        crops = None if self.crops is None else self.crops.take(rows)
        counts = self.counts
        if counts is not None:
            counts = counts[rows] if sparse.issparse(counts) else counts.take(rows)
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
    patches far apart for the tissue level, at the price of one small region. Tissues, and slides within a tissue, are drawn
    with probability proportional to the square root of their cells, so that large ones do not drown the others.
    """

    def __init__(
        self, slides, config, n_batches, *, fields=2, patches=3, cells=96, field_um=300.0, seed=0, augment=True
    ):
        self.slides, self.config, self.n_batches, self.augment = slides, config, n_batches, augment
        self.patches, self.cells, self.fields, self.field_um = patches, cells, fields, field_um
        self.seed, self.epoch = seed, 0
        self.trees = [cKDTree(s.xy) for s in slides]
        cells_of = np.array([len(s) for s in slides], float)
        tissue = np.array([s.tissue for s in slides])
        share = np.zeros(len(slides))
        for name in np.unique(tissue):
            same = tissue == name
            share[same] = np.sqrt(cells_of[same].sum()) * np.sqrt(cells_of[same]) / np.sqrt(cells_of[same]).sum()
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
                part["scale"] = relative_scale(slide.crops, rows, c)
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
        self.log_temperature = torch.nn.Parameter(torch.tensor(np.log(0.1), dtype=torch.float32))

    def configure_optimizers(self):
        dispersion = [self.network.log_theta]  # a scale on its own, in units of 1 and without decay
        others = [p for p in self.parameters() if p is not self.network.log_theta]
        groups = [{"params": others}, {"params": dispersion, "lr": 10 * self.learning_rate, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.02)
        rates = [g["lr"] for g in optimizer.param_groups]
        steps = max(int(self.trainer.estimated_stepping_batches), 2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
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
            image = net.image(b["crops"], present, b["scale"])
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
            out["genes"] = misfit(both, "cell", measured)
        if "image_to_genes" in on and from_image is not None:
            out["image_to_genes"] = misfit(from_image, "cell", measured)
        if "contrast" in on and image is not None and genes is not None:
            logit = net.match(image, "image") @ net.match(genes, "genes").T / self.log_temperature.exp().clamp(0.02, 1)
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


def start_genes(network: SpatiaNetwork, slides: list[CellSlide], target_sum: float, n: int = 4000) -> None:
    """Start the predicted rates at each gene's mean share of the library, and the gene encoder at principal components.

    From evenly spaced cells of each slide; a gene counts where it is measured. From random weights the
    encoder is slow to learn what a principal component tells.
    """
    n_genes = len(network.config.genes)
    total, size, cells, sums, squares, excess, expected = (np.zeros(n_genes) for _ in range(7))
    values = []
    for s in slides:
        if s.counts is None:
            continue
        counts = s.counts[s.spread(n)].toarray()
        value = np.log1p(counts * (target_sum / np.maximum(counts.sum(1, keepdims=True), 1)))
        values.append((value, s.measured))
        total += counts.sum(0)
        size += counts.sum() * s.measured
        cells += len(counts) * s.measured
        sums += value.sum(0)
        squares += (value**2).sum(0)
        rate = counts.sum(1, keepdims=True) * counts.sum(0) / max(counts.sum(), 1)
        excess += ((counts - rate) ** 2 - rate).sum(0)  # = rate^2 / theta in expectation
        expected += (rate**2).sum(0)
    mean = sums / np.maximum(cells, 1)
    spread = np.sqrt(np.maximum(squares / np.maximum(cells, 1) - mean**2, 0))
    with torch.no_grad():
        network.rates.bias.copy_(torch.from_numpy(np.log((total + 0.5) / np.maximum(size, 1)).clip(-15, 0)))
        # what cells differ by will be explained; the dispersion left is smaller
        theta = np.clip(3 * expected / np.maximum(excess, 1e-3 * expected + 1e-12), 0.3, 30)
        network.log_theta.copy_(torch.from_numpy(np.log(np.expm1(theta))))
        if network.gene is not None:
            network.gene.usual_size.fill_(np.log1p(target_sum))
            network.gene.centre.copy_(torch.from_numpy(mean))
            spread = np.where(spread < 1e-3, 1.0, spread)
            network.gene.spread.copy_(torch.from_numpy(spread))
            z = np.concatenate([(v - mean) / spread * measured for v, measured in values]).clip(-5, 5)
            _, singular, axes = np.linalg.svd(z[np.random.default_rng(0).permutation(len(z))[:n]], full_matrices=False)
            d = min(network.gene.direction.shape[1], len(axes))
            # half-way to whitened, so that the first few do not drown the others
            scale = (singular[:d] / singular[0] + 1e-3) ** -0.5 * n_genes / singular[0] * len(z[:n]) ** 0.5
            network.gene.direction[:, :d] = torch.from_numpy((axes[:d].T * scale).astype(np.float32))


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
    workers: int = 0,
    seed: int = 0,
    backbone: dict[str, Tensor] | None = None,
) -> Spatia:
    """Fit a SPATIA to training slides; the epoch is chosen by the loss on validation slides."""
    if checkpoint_dir is not None:
        everything = [*slides, *validation]
        claim(
            checkpoint_dir, resume, config=config, target_sum=target_sum, losses=losses, max_epochs=max_epochs, seed=seed,
            batches_per_epoch=batches_per_epoch, learning_rate=learning_rate, init=init and init.sha256,
            slides=tuple(s.library_id for s in everything),
            data=[v for s in everything for v in (s.xy, s.intensity)],
            counts=[s.counts[s.spread(4000)] for s in everything if s.counts is not None],
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SpatiaNetwork(config)
        if backbone is not None:
            network.image.mae.load_state_dict(backbone)
        module = SpatiaTraining(network, LOSSES | (losses or {}), target_sum, learning_rate)
    if init is None:
        start_genes(network, slides, target_sum)
    else:
        network.load_state_dict(init.network.state_dict())
    n_cells = sum(map(len, slides))
    n_batches = batches_per_epoch or max(32, -(-n_cells // 512))
    training = CellRegions(slides, config, n_batches, seed=seed)
    held_out = CellRegions(validation, config, max(2, min(8, n_batches // 4)), seed=seed + 1, augment=False)
    fit(
        module, training, held_out, max_epochs=max_epochs, patience=max_epochs, monitor="val_loss", seed=seed,
        description="SPATIA", checkpoint_dir=checkpoint_dir, resume=resume, accelerator=accelerator, devices=devices,
        precision=precision, workers=workers,
    )  # fmt: skip
    return Spatia(network=network, target_sum=target_sum, history=module.history, card=card)
