"""Training SPATIA: the encoders on single cells, then the context on fields of cells; losses that need no labels."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from spatiaflow._settings import logger
from spatiaflow.models._base import model_card
from spatiaflow.models.counts import log_likelihood
from spatiaflow.models.encoders._cell import published_mae
from spatiaflow.models.levels import joint_axes, standardised, usual_um
from spatiaflow.models.preprocess import in_vocabulary, intensity_of, spread, standard_of, usual_depth
from spatiaflow.models.slide import ABSENT, Slide
from spatiaflow.models.spatia import TRAINING, Spatia, SpatiaConfig, SpatiaNetwork
from spatiaflow.models.spatial import Graph
from spatiaflow.train.cells import Fields, ScatteredCells, SlideBatches, Standards
from spatiaflow.train.checkpoint import claim, identity
from spatiaflow.train.domain import fit_domains
from spatiaflow.train.fit import fit

MEMORY = 0.999  # of the moving average of weights


def train_spatia(
    slides: Sequence[Slide],
    config: SpatiaConfig,
    *,
    genes: Sequence[str] | None = None,
    channels: Mapping[str, str] | None = None,
    init: Spatia | None = None,
    validation: Sequence[str] | float = 0.1,
    max_epochs: int = 20,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    accelerator: str = "cpu",
    seed: int = 0,
) -> Spatia:
    """Fit a SPATIA to slides with crops, counts or both. The epoch is chosen by the loss on what is held out.

    Parameters
    ----------
    config
        Sizes and training settings. The vocabulary is filled in from the slides, or kept with ``init``.
    genes
        Vocabulary; all genes of all slides when None.
    channels
        Names of channels that the model calls otherwise.
    init
        A model to go on from. ``config`` has its sizes.
    validation
        Names of slides, or the share of each slide that is held out as one band with a gap beside it.
    """
    backbone = None
    if isinstance(config.backbone, str):
        published, backbone = published_mae(config.backbone)
        config = replace(config, backbone=published)
    if init is None:
        config = with_vocabulary(config, slides, genes, channels)
    ready = [in_vocabulary(slide, config, channels) for slide in slides]
    ready = [slide if slide.crops is None else slide.take(slide.crops.inside) for slide in ready]
    training, held_out = hold_out(ready, validation, 2 * config.anchor_um)
    target_sum = usual_depth(training) if init is None else init.target_sum
    standards = {slide.name: standard_of(slide, target_sum) for slide in ready}  # of whole slides
    network = initial_network(config, training, standards, target_sum, init=init, backbone=backbone, seed=seed)
    if config.context == "means" and init is None:
        fit_axes(network, training, standards, target_sum)
    logger.info("training SPATIA on %d cells of %d slide(s), %s", sum(map(len, training)), len(ready), accelerator)
    run: dict = {"config": replace(config, devices=1, precision="32-true", num_workers=0), "target_sum": target_sum}
    run |= {"init": init and init.sha256, "max_epochs": max_epochs, "seed": seed}
    with (
        nullcontext()
        if checkpoint_dir is None
        else claim(checkpoint_dir, resume, **run, **identity([*training, *held_out]))
    ):
        history, scores = fit_spatia(
            network, training, held_out, standards, target_sum, max_epochs=max_epochs, checkpoint_dir=checkpoint_dir,
            resume=resume, accelerator=accelerator, seed=seed,
        )  # fmt: skip
    settings = {name: getattr(config, name) for name in TRAINING}
    card = model_card(
        slides, config=settings | {"max_epochs": max_epochs, "validation": validation}, seed=seed,
        epochs=len(history.get("epoch", [])), scores=scores, intensity=intensity_of(training, config.channels),
        modalities=[name for name, there in (("image", config.channels), ("genes", config.genes)) if there],
    )  # fmt: skip
    model = Spatia(network=network, target_sum=target_sum, history=history, card=card)
    model.domains = fit_domains(model, training)
    return model


def with_vocabulary(
    config: SpatiaConfig,
    slides: Sequence[Slide],
    genes: Sequence[str] | None = None,
    channels: Mapping[str, str] | None = None,
) -> SpatiaConfig:
    """The configuration with the genes, channels and pitch of the slides."""
    measured, names = distinct(g for slide in slides for g in slide.genes), channels or {}
    if genes is not None and (unknown := sorted(set(genes) - set(measured))):
        raise ValueError(f"genes= names {len(unknown)} that no slide measures, such as {unknown[0]!r}.")
    if config.context == "means":
        if not measured:
            raise ValueError("context='means' averages genes, and no slide has counts; use context='attention'.")
        config = replace(config, niche_um=config.niche_um or usual_um(slides))
        logger.info("niches are means over %.3g µm", config.niche_um)
    seen = [slide.crops.channels for slide in slides if slide.crops is not None]
    return replace(
        config,
        genes=distinct(genes or measured),
        channels=distinct(str(names.get(name, name)).lower() for found in seen for name in found),
        pitch_um=float(np.median([slide.pitch for slide in slides])),
    )


def distinct(names: Iterable[str]) -> list[str]:
    """Names in order of first appearance."""
    return list(dict.fromkeys(names))


def hold_out(slides: Sequence[Slide], validation: Sequence[str] | float, gap: float) -> tuple[list[Slide], list[Slide]]:
    """Split into training and validation: by name, or a band of each slide with a gap (µm) beside it."""
    if not isinstance(validation, float):
        return [s for s in slides if s.name not in validation], [s for s in slides if s.name in validation]
    training, held_out = zip(*(slide.hold_out(validation, gap) for slide in slides))
    return list(training), list(held_out)


def averaged(average: Tensor, current: Tensor, n: Tensor | int) -> Tensor:
    """Exponential moving average of weights after ``n`` steps; it forgets faster in the first steps."""
    return average + (current - average) * (9 / (torch.as_tensor(n) + 10)).clamp_min(1 - MEMORY)


class _Training(L.LightningModule):
    """One training step. Every loss has a name, a weight that may be 0, and an entry in the history.

    A moving average of the weights is validated and kept.
    """

    def __init__(self, network: SpatiaNetwork, weights: dict[str, float], target_sum: float, learning_rate=5e-4):
        super().__init__()
        self.network, self.target_sum, self.learning_rate = network, target_sum, learning_rate
        self.average = AveragedModel(network, avg_fn=averaged, use_buffers=True).requires_grad_(False)
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.history: dict[str, list[float]] = {}

    def configure_optimizers(self):
        net, rate = self.network, self.learning_rate
        groups = [
            # a scale on its own, in units of 1 and without decay
            {"params": [net.log_theta], "lr": 10 * rate, "weight_decay": 0.0},
            # begins from nothing; the others from principal components
            {"params": list(net.image.parameters()) if net.image else [], "lr": 2 * rate},
        ]
        known = {p for group in groups for p in group["params"]}
        groups.append({"params": [p for p in self.parameters() if p not in known]})
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, weight_decay=0.02)
        rates = [g["lr"] for g in optimizer.param_groups]
        steps = max(int(self.trainer.estimated_stepping_batches), 16)  # OneCycleLR fails on 10
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def misfit(self, embedding: Tensor, level: str, b: dict, which: Tensor) -> Tensor:
        """Nats a gene of counts under the negative binomial of a level; what genes have more on a slide is its own."""
        net, counts = self.used, b["counts"]
        log_rate = net.log_rates(embedding, level) + (b["standard"][:, 2] - net.gene.standard[2])
        mean = counts.sum(1, keepdim=True).clamp_min(1) * torch.exp(log_rate.clamp(-15, 3))
        log_p = log_likelihood(counts, mean.clamp_min(1e-6), net.theta)
        return -(log_p * which).sum() / which.sum().clamp_min(1)

    @property
    def used(self) -> SpatiaNetwork:
        """What is trained or, in validation, the average of what was."""
        return self.network if self.training else cast("SpatiaNetwork", self.average.module)

    @abstractmethod
    def losses(self, b: dict, g: torch.Generator) -> dict[str, Tensor]:
        """Every loss whose weight is not 0."""

    def _step(self, b: dict, stage: str) -> Tensor:
        torch.manual_seed(b["seed"])  # dropout and masks belong to the batch, so that a resumed run repeats them
        losses = self.losses(b, torch.Generator().manual_seed(b["seed"]))
        total: Any = sum(self.weights[name] * value for name, value in losses.items())
        for name, value in {"loss": total, **losses}.items():
            self.log(f"{stage}_{name}", value.detach(), on_step=False, on_epoch=True, batch_size=len(b["measured"]))
        return total

    def training_step(self, b: dict, _):
        return self._step(b, "train")

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.network)

    def validation_step(self, b: dict, _):
        self._step(b, "val")

    def transfer_batch_to_device(self, b: dict, device, _):
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()}


class CellTraining(_Training):
    """Losses of single cells: they train the encoders and their fusion."""

    NAMES = ("genes", "image_to_genes", "reconstruction", "contrast")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_temperature = torch.nn.Parameter(torch.tensor(np.log(0.1), dtype=torch.float32))

    def losses(self, b: dict, g: torch.Generator) -> dict[str, Tensor]:
        """Every loss whose weight is not 0 and whose data are there."""
        net, c, on, measured, out, image = self.used, self.network.config, self.weights, b["measured"], {}, None
        n, device = len(measured), measured.device
        if "crops" in b:
            present = b["present"]
            if self.training and len(c.channels) > 1:  # channels go missing, so that they may
                kept = present & (torch.rand(present.shape, generator=g).to(device) > 0.1)
                present = torch.where(kept.any(1, keepdim=True), kept, present)
            image = net.image(b["crops"], present, b["scale"])
            if "reconstruction" in on:
                some = slice(None, None, 4 if "counts" in b else 1)  # it is dear, and not what teaches most
                out["reconstruction"] = net.image.reconstruction(b["crops"][some], present[some])
        if "counts" not in b:
            return out
        counts = b["counts"]
        hidden = torch.rand(counts.shape, generator=g) < torch.rand((n, 1), generator=g)
        seen = measured & ~hidden.to(device)
        genes = net.gene_tokens(counts, seen, measured, self.target_sum, b["standard"])
        if "genes" in on:
            out["genes"] = self.misfit(net.fuse(image, genes, n), "cell", b, measured)
        if image is not None and "image_to_genes" in on:
            out["image_to_genes"] = self.misfit(net.fuse(image, None, n), "cell", b, measured)
        if image is not None and "contrast" in on:
            logit = net.match(image, "image") @ net.match(genes, "genes").T / self.log_temperature.exp().clamp(0.02, 1)
            target = torch.arange(n, device=device)
            out["contrast"] = (F.cross_entropy(logit, target) + F.cross_entropy(logit.T, target)) / 2
        return out


def nearest_hidden(absent: Tensor, around: Graph) -> tuple[Tensor, Tensor]:
    """For each cell the nearest of those around it that are absent (n, bool), itself first, and whether there is one."""
    index = around.index.to(absent.device)
    hidden = absent[index] & around.mask.to(absent.device)  # n x k, nearest first
    return index.gather(1, hidden.int().argmax(1, keepdim=True))[:, 0], hidden.any(1)


class ContextTraining(_Training):
    """Counts of hidden cells from their surroundings: trains the niche and tissue levels.

    A hidden cell predicts its own counts, any other cell those of the nearest hidden cell. So the levels learn what the
    cells around are like, and how much a cell tells about its surroundings.
    """

    NAMES = ("niche", "tissue")

    def losses(self, b: dict, g: torch.Generator) -> dict[str, Tensor]:
        """Every loss whose weight is not 0."""
        absent = (torch.rand(len(b["cells"]), generator=g) < 0.25).to(b["cells"].device)
        cells = torch.where(absent[:, None], self.used.hidden_cell, b["cells"])
        target, found = nearest_hidden(absent, b["around"].neighbors)
        asked, which = b | {"counts": b["counts"][target]}, found[:, None] & b["measured"]
        levels = zip(self.NAMES, self.used.context(cells, b["around"]))
        return {name: self.misfit(x, name, asked, which) for name, x in levels if name in self.weights}


def initial_network(
    config: SpatiaConfig, slides: Sequence[Slide], standards: Standards, target_sum: float, *, init: Spatia | None,
    backbone: dict[str, Tensor] | None, seed: int,
) -> SpatiaNetwork:  # fmt: skip
    """The network that training begins with: that of ``init``, or a new one with the weights of a published backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SpatiaNetwork(config)
    if backbone is not None:
        network.image.mae.load_state_dict(backbone)
    if init is None:
        start_genes(network, slides, standards, target_sum)
    else:
        network.load_state_dict(init.network.state_dict())
    return network


def start_genes(
    network: SpatiaNetwork, slides: Sequence[Slide], standards: Standards, target_sum: float, n: int = 4000
) -> None:
    """Start predicted rates at each gene's mean share of the library, and encoder and decoder at principal components.

    From evenly spaced cells of each slide; a gene counts where it is measured.
    """
    slides = [s for s in slides if s.counts is not None]
    if network.gene is None or not slides:
        return
    n_genes = len(network.config.genes)
    cells, excess, expected = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
    mean_standard: Any = 0.0
    parts = []
    for s in slides:
        counts = s.counts[spread(len(s), n)].toarray()
        standard: Any = standards[s.name]
        values = np.log1p(counts * (target_sum / np.maximum(counts.sum(1, keepdims=True), 1)))
        parts.append(((values - standard[0]) / standard[1] * s.measured).clip(-5, 5))
        cells += len(counts) * s.measured
        mean_standard = mean_standard + len(counts) * s.measured * standard
        rate = counts.sum(1, keepdims=True) * counts.sum(0) / max(counts.sum(), 1)
        excess += ((counts - rate) ** 2 - rate).sum(0)  # = rate^2 / theta in expectation
        expected += (rate**2).sum(0)
    mean_standard = np.where(cells > 0, mean_standard / np.maximum(cells, 1), [[0.0], [1.0], [0.0]])
    # the model will explain differences between cells, so the remaining dispersion is smaller
    theta = np.clip(3 * expected / np.maximum(excess, 1e-3 * expected + 1e-12), 0.3, 30)
    z = np.concatenate(parts)
    axes: Any = np.linalg.svd(z[np.random.default_rng(0).permutation(len(z))[:n]], full_matrices=False)[2]
    d = min(network.config.width, len(axes))
    # rotated, so that no dimension is one component: scaling every dimension to unit variance, as linear probes do, would
    # otherwise whiten the components and drown the first in the last
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0]
    axes = torch.from_numpy((axes[:d].T @ turn).astype(np.float32))  # genes x d
    with torch.no_grad():
        network.gene.usual_size.fill_(np.log1p(target_sum))
        network.gene.standard.copy_(torch.from_numpy(mean_standard))
        network.gene.direction[:, :d] = axes * n_genes**0.5
        network.rates.weight[:, :d] = 0.3 * axes  # the decoder, shrunk: rare counts are noisy
        network.rates.bias.copy_(torch.from_numpy(mean_standard[2].clip(-15, 0)))
        network.log_theta.copy_(torch.from_numpy(np.log(np.expm1(theta))))


def fit_axes(
    network: SpatiaNetwork, slides: Sequence[Slide], standards: Standards, target_sum: float, n: int = 4000
) -> None:
    """Fit the axes of the components that means are made of, to evenly spaced cells of all slides together."""
    some = [slide.take(spread(len(slide), n)) for slide in slides if slide.counts is not None]
    found = joint_axes(
        [standardised(slide, target_sum, standards[slide.name]) for slide in some], network.axes.shape[1]
    )
    network.axes[:, : found.shape[1]] = torch.from_numpy(found.astype(np.float32))


def fit_spatia(
    network: SpatiaNetwork,
    slides: Sequence[Slide],
    validation: Sequence[Slide],
    standards: Standards,
    target_sum: float,
    *,
    max_epochs: int = 20,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    accelerator: str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Train the encoders, then the context on their embeddings. Return the history, and each loss at the best epochs."""
    config, everything, n_cells = network.config, [*slides, *validation], sum(map(len, slides))
    weights = config.loss_weights
    history: dict[str, list[float]] = {}
    scores: dict[str, float] = {}

    held_out: SlideBatches
    batches: SlideBatches

    def stage(name, training, batches, held_out, max_epochs, **more):
        module = training(network, {k: weights[k] for k in training.NAMES}, target_sum, config.learning_rate)
        fit(
            module, batches, held_out, description=f"SPATIA, {name}", max_epochs=max_epochs, patience=max_epochs,
            checkpoint_dir=None if checkpoint_dir is None else checkpoint_dir / name, monitor="val_loss", seed=seed,
            resume=resume, accelerator=accelerator, devices=config.devices, precision=config.precision, **more,
        )  # fmt: skip
        network.load_state_dict(module.average.module.state_dict())
        for key, values in module.history.items():
            history.setdefault(key, values)
        best = int(np.argmin(module.history["val_loss"]))
        scores.update({k: module.history[f"val_{k}"][best] for k in training.NAMES if f"val_{k}" in module.history})

    if any(weights[name] > 0 for name in CellTraining.NAMES):
        n = config.batches_per_epoch or max(32, -(-n_cells // 256))
        held_out = ScatteredCells(validation, standards, config, max(2, min(16, n // 4)), seed=seed + 1, augment=False)
        batches = ScatteredCells(slides, standards, config, n, seed=seed)
        stage("cells", CellTraining, batches, held_out, max_epochs, workers=config.num_workers)
    learned = config.context == "attention" and config.genes
    if learned and any(weights[name] > 0 for name in ContextTraining.NAMES):
        n = config.batches_per_epoch or max(16, -(-n_cells // 512))
        with tempfile.TemporaryDirectory() as folder:
            views = [
                cell_views(network, slide, standards[slide.name], target_sum, Path(folder) / str(i))
                for i, slide in enumerate(everything)
            ]
            held_out = Fields(
                validation, standards, views[len(slides) :], config, max(2, min(16, n // 4)), seed=seed + 1
            )
            trained = network.contextual()
            for p in network.parameters():
                p.requires_grad_(p in trained)
            network.train()  # embedding left it in the mode of inference, and the trainer keeps what it finds
            batches = Fields(slides, standards, views[: len(slides)], config, n, seed=seed)
            stage("context", ContextTraining, batches, held_out, -(-max_epochs // 2))  # it converges sooner
            network.requires_grad_(True)
    return history, scores


def cell_views(
    network: SpatiaNetwork, slide: Slide, standard: np.ndarray | None, target_sum: float, folder: Path
) -> list[np.ndarray]:
    """Cell embeddings of a slide from both modalities, from the image and from the genes, half precision, on disk."""
    folder.mkdir()
    model = Spatia(network=network, target_sum=target_sum, history={}, card={})
    views = [slide]
    if slide.crops is not None and slide.counts is not None:
        views += [replace(slide, counts=ABSENT), replace(slide, crops=ABSENT)]
    out = []
    for i, view in enumerate(views):
        device = next(network.parameters()).device
        found = model.embed(view, standard, device=device, levels=("cell",))["cell"]
        np.save(folder / f"{i}.npy", found.astype(np.float16))
        out.append(np.load(folder / f"{i}.npy", mmap_mode="r"))
    return out
