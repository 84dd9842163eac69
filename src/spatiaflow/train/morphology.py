"""Train the generator of morphology: an autoencoder of images, then a flow between latents, weighted by confidence."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from spatiaflow import _files
from spatiaflow._runs import IMAGES
from spatiaflow._settings import progress
from spatiaflow.models import _base
from spatiaflow.models.autoencoder import Autoencoder
from spatiaflow.models.conditions import Conditions, Context
from spatiaflow.models.flow import interpolate
from spatiaflow.models.morphology import (
    MorphologyConfig,
    MorphologyFlow,
    MorphologyNetwork,
    Surrogate,
    sliced_wasserstein,
    start,
)
from spatiaflow.models.orientation import canonical, turned
from spatiaflow.models.preprocess import intensity_of, scaled, stain_levels
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import far_band
from spatiaflow.models.transport import per_unit
from spatiaflow.train.checkpoint import claim, identity
from spatiaflow.train.fit import fit
from spatiaflow.train.pairs import PairBatches, Pairs, with_shifts

MARGIN, ALIGNED_FROM = 0.1, 0.75
MAX_STEPS = 3000  # of the autoencoder
MIN_BATCHES = 200  # of an epoch; a few pairs fill it by drawing targets anew
MORE_IMAGES = 20_000  # of any cells, which the autoencoder also sees


def train_morphology(
    slides: Sequence[Slide],
    pairs: Pairs,
    niche: np.ndarray,
    config: MorphologyConfig,
    *,
    profile: np.ndarray,
    validation: float = 0.1,
    max_epochs: int = 10,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> MorphologyFlow:
    """Train a generator of images on pairs of cells.

    Parameters
    ----------
    slides
        Cells with counts, with crops that are matched with ``config.channels``, and with features: the embeddings of cell, niche
        and tissue side by side. A row of the pairs is a place among the cells of all slides, one slide after the other.
    pairs
        Sources and targets, all inside the image.
    niche
        Niche of each pair, "" where there is none.
    config
        Settings, with the names of channels, transitions and features of the profile.
    profile
        Standardised morphology of all cells, n x features.
    validation
        Share of each slide that is held out as a band, to choose the epoch.
    about
        What else the card says.
    """
    shared = set.intersection(*(set(slide.genes) for slide in slides))
    genes = [gene for gene in slides[0].genes if gene in shared]
    counts = sparse.vstack([slide.align(genes).counts for slide in slides], format="csr")
    expression = per_unit(counts, float(np.median(np.asarray(counts.sum(1)).ravel().clip(1))))
    pairs, shifts = with_shifts(pairs, niche, config.transitions, expression, np.nan_to_num(profile))
    config = replace(config, n_embedding=slides[0].features.shape[1] // 3, n_genes=pairs.genes.shape[1])
    around = Context.of(slides, config.n_neighbors, config.crop_um)
    inside = np.concatenate([slide.crops.inside for slide in slides])
    others = np.random.default_rng(seed).permutation(np.flatnonzero(inside))[:MORE_IMAGES]
    used = np.union1d(np.union1d(pairs.source, pairs.target), others)
    band = np.concatenate([along > edge for along, edge in (far_band(slide.xy, validation) for slide in slides)])
    training, held_out = pairs.within(~band), pairs.within(band)
    if not len(training) or not len(held_out):
        raise ValueError(
            f"validation={validation:g} leaves {len(training)} pairs to train on and {len(held_out)} to choose the epoch by "
            f"(of {len(pairs)}); both are needed. Give another share, or more pairs."
        )
    options: dict[str, Any] = {"seed": seed, "device": device}
    run = {
        "config": replace(config, devices=1, precision="32-true"), "pairs": [*vars(pairs).values(), band], "profile": profile,
    }  # fmt: skip
    with holding(checkpoint_dir, resume, slides, seed=seed, max_epochs=max_epochs, **run) as file:
        autoencoder, rebuilt, latents, place, turns = fitted_images(
            slides, used, band, config, file, max_epochs=max_epochs, **options
        )
        around.turn(used, turns)
        surrogate, r2 = None, np.zeros(0)
        if config.profile:
            known = np.isfinite(profile[used]).all(1)
            surrogate, r2 = fit_surrogate(latents, profile[used], known & ~band[used], known & band[used], **options)
        network, history = fit_morphology(
            training, held_out, latents, place, around, config, surrogate, max_epochs=max_epochs,
            checkpoint_dir=checkpoint_dir, resume=resume, device=device, seed=seed,
        )  # fmt: skip
    card = _base.model_card(
        slides, config=asdict(config), seed=seed, epochs=max_epochs,
        scores={name: values[-1] for name, values in history.items() if name.startswith("val_") and len(values)},
        autoencoder_r2=dict(zip(config.channels, map(float, rebuilt))),
        surrogate_r2=dict(zip(config.profile, map(float, r2))),
        source_stains=source_stains(slides, training, config.transitions, config.channels), **(about or {}),
    )  # fmt: skip
    return MorphologyFlow(
        network=network, autoencoder=autoencoder, surrogate=surrogate, shifts=shifts,
        intensity=intensity_of(slides, config.channels), history=history, card=card,
    )  # fmt: skip


def source_stains(
    slides: Sequence[Slide], pairs: Pairs, transitions: Sequence[str], channels: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Return how bright the images of the sources of each transition are: 5, 50 and 95 % quantiles of each channel's mean."""
    found = {}
    for i, name in enumerate(transitions):
        levels = stain_levels(slides, pairs.source[pairs.transition == i])
        if len(levels):
            ends = np.quantile(levels, (0.05, 0.5, 0.95), axis=0).T
            found[name] = dict(zip(channels, np.round(ends.astype(float), 4).tolist()))
    return found


@contextmanager
def holding(checkpoint_dir: Path | None, resume: bool, slides: Sequence[Slide], **run) -> Iterator[Path]:
    """Hold the folder of a run, or a temporary one, and return the file there that images may be written to."""
    held: Any = nullcontext()
    where: Any = tempfile.TemporaryDirectory()
    if checkpoint_dir is not None:
        held, where = claim(checkpoint_dir, resume, **run, **identity(slides)), nullcontext(checkpoint_dir)
    with held, where as folder:
        file = Path(folder) / IMAGES
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)


def fitted_images(
    slides: Sequence[Slide], used: np.ndarray, band: np.ndarray, config: MorphologyConfig, file: Path, *, max_epochs: int,
    seed: int, device: str | torch.device,
) -> tuple[Autoencoder, np.ndarray, Tensor, np.ndarray, np.ndarray]:  # fmt: skip
    """Fit an autoencoder to the images of the rows ``used``, but for those in ``band`` (bool, of all rows).

    Returns it, R2 of each channel on those in the band, the latents of ``used``, the place of each row among them or -1, and
    the turn of each of ``used``.
    """
    images, place = scaled_images(slides, used, file)
    autoencoder, rebuilt = fit_autoencoder(
        images,
        ~band[used],
        band[used],
        config.n_latent,
        n_steps=min(MAX_STEPS, 300 * max_epochs),
        seed=seed,
        device=device,
    )
    latents, turns = encoded(images, autoencoder)
    return autoencoder, rebuilt, latents, place, turns


def scaled_images(slides: Sequence[Slide], rows: np.ndarray, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the images of some rows to disk as float16, background -1 and bright end 1.

    Returns them (n x C x p x p) and the place of each row of the slides among them, or -1.
    """
    place, first = np.full(sum(map(len, slides)), -1), 0
    place[rows] = np.arange(len(rows))
    crops = slides[0].crops
    shape = (len(rows), len(crops.places), crops.pixels, crops.pixels)
    out = np.lib.format.open_memmap(file, "w+", np.float16, shape)
    _files.reserve(file)
    for slide in slides:
        here, crops = place[first : first + len(slide)], slide.crops
        first += len(slide)
        for some, found in crops.batches(512, np.flatnonzero((here >= 0) & crops.inside)):
            out[here[some]] = 2 * scaled(found, crops.range, crops.places).numpy() - 1
    return out, place


@torch.no_grad()
def _moving_average(average: list[Tensor], current: list[Tensor], n: Tensor, decay: float = 0.999) -> None:
    """Exponential moving average whose memory grows with the steps, so that it also follows a short training."""
    torch._foreach_lerp_(average, current, 1 - min(decay, (1 + float(n)) / (10 + float(n))))


class MorphologyTraining(L.LightningModule):
    """Confidence-weighted flow matching, alignment of morphology, contrast of conditions."""

    def __init__(self, network: MorphologyNetwork, surrogate: Surrogate | None, *, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate
        self.surrogate: Any = surrogate
        self.average = AveragedModel(network, multi_avg_fn=cast("Any", _moving_average))
        if surrogate is not None:
            surrogate.requires_grad_(False)
        self.history: dict[str, list[float]] = {}
        self.weights = {name: weight for name, weight in network.config.losses.items() if weight > 0}
        if surrogate is None:
            self.weights.pop("alignment", None)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = max(int(self.trainer.estimated_stepping_batches), 16)  # OneCycleLR fails on 10
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def losses(self, network: MorphologyNetwork, b: dict) -> dict[str, Tensor]:
        """Return every loss whose weight is not 0."""
        c, control, target = network.config, b["source"], b["target"]
        g = torch.Generator().manual_seed(b["seed"])
        n = len(control)
        x0 = start(control, torch.randn(control.shape, generator=g).to(control), c)
        t = torch.rand(n, generator=g).to(control)
        kept = torch.rand(n, generator=g) >= (c.drop if self.training else 0)
        x_t, u = interpolate(x0, target, t[:, None]), target - x0
        v = network(x_t, t, control, network.condition(b["conditions"], kept.to(control.device)))
        misfit = ((v - u) ** 2).mean(1)
        weight = b["confidence"] / b["confidence"].mean().clamp_min(1e-8) if c.weighted else torch.ones_like(misfit)
        out = {"flow": (weight * misfit).mean()}
        if "alignment" in self.weights:
            # early on the endpoint is a mean over many targets, whose morphology varies less than theirs
            late = (t >= ALIGNED_FROM).nonzero()[:, 0]
            endpoint = x_t[late] + (1 - t[late])[:, None] * v[late]
            # a feature counts as far as the surrogate can read it
            ours, theirs = (self.surrogate.reliability * self.surrogate(x) for x in (endpoint, target[late]))
            out["alignment"] = sliced_wasserstein(ours, theirs, g) if len(late) else misfit.sum() * 0
        if "contrast" in self.weights:
            out["contrast"] = self._contrast(network, b, control, x_t, t, u, misfit, g)
        return out

    def _contrast(self, network, b, control, x_t, t, u, misfit, g) -> Tensor:
        """Return by how much the conditions of another transition do not fit worse by a margin."""
        transition = b["conditions"].transition.cpu()
        other = torch.randperm(len(transition), generator=g)
        which = (transition != transition[other]).nonzero()[:, 0][: len(transition) // 4]
        if not len(which):
            return misfit.sum() * 0
        condition = network.condition(b["conditions"].rows(other[which].to(u.device)))
        wrong = network(x_t[which], t[which], control[which], condition)
        return F.relu(misfit[which] - ((wrong - u[which]) ** 2).mean(1) + MARGIN).mean()

    def _step(self, network, b: dict, stage: str) -> Tensor:
        losses = self.losses(network, b)
        total: Any = sum(self.weights.get(name, 0.0) * value for name, value in losses.items())
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


def fit_autoencoder(
    images,
    training: np.ndarray,
    held_out: np.ndarray,
    n_latent: int,
    *,
    n_steps: int = 3000,
    batch_size: int = 64,
    seed: int = 0,
    device="cpu",
) -> tuple[Autoencoder, np.ndarray]:
    """Fit an autoencoder to images (n x C x p x p). Return it, and R2 of each channel on the held-out images.

    ``training`` and ``held_out`` (n, bool) choose images; some may be in neither.
    """
    train, test = np.flatnonzero(training), np.flatnonzero(held_out)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Autoencoder(images.shape[1], n_latent, images.shape[-1]).to(device)
    batch_size = min(batch_size, len(train))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(n_steps, 16), pct_start=0.1)
    g = torch.Generator().manual_seed(seed)

    def read(rows):
        x = torch.from_numpy(np.asarray(images[rows], np.float32))
        return turned(x, canonical(x)).to(device, memory_format=torch.channels_last)

    def moments(x, over):
        mean, std = (getattr(x, name)(over, keepdim=True) for name in ("mean", "std"))
        return mean, std.clamp_min(1e-6)

    some = rng.choice(train, min(2048, len(train)), replace=False)
    network.pixel_mean, network.pixel_std = moments(read(some), (0, 2, 3))
    for _ in progress(range(n_steps), "autoencoder", unit="step"):
        noise = torch.randn(batch_size, n_latent, generator=g).to(device)
        loss = network.loss(read(rng.choice(train, batch_size, replace=False)), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():  # what is kept here must stay an ordinary tensor
        network.latent_mean, network.latent_std = moments(network.encode(read(some)), 0)
        misfit, spread = (np.zeros(images.shape[1]) for _ in range(2))
        middle = read(test[:2048]).mean((0, 2, 3), keepdim=True)
        for rows in np.array_split(test[:2048], -(-len(test[:2048]) // 256)):
            x = read(rows)
            misfit += ((network.decode(network.encode(x)) - x) ** 2).sum((0, 2, 3)).cpu().numpy()
            spread += ((x - middle) ** 2).sum((0, 2, 3)).cpu().numpy()
    return network, 1 - misfit / spread.clip(1e-9)


@torch.no_grad()
def encoded(images, autoencoder: Autoencoder) -> tuple[Tensor, np.ndarray]:
    """Return latents (n x d) of images (n x C x p x p), and the turn of each into its canonical orientation."""
    latents, turns = [], []
    device = autoencoder.latent_mean.device
    for start_row in range(0, len(images), 512):
        x = torch.from_numpy(np.asarray(images[start_row : start_row + 512], np.float32))
        turns.append(canonical(x))
        latents.append(autoencoder.encode(turned(x, turns[-1]).to(device)).cpu())
    return torch.cat(latents), np.concatenate(turns)


def fit_surrogate(
    latents: Tensor, profile: np.ndarray, training: np.ndarray, held_out: np.ndarray, *, max_epochs: int = 30,
    batch_size: int = 128, seed: int = 0, device="cpu",
) -> tuple[Surrogate, np.ndarray]:  # fmt: skip
    """Fit a network that reads standardised morphology (n x features) off latents. Return it, and R2 on held-out cells.

    ``training`` and ``held_out`` (n, bool) choose cells; some may be in neither.
    """
    train, test = np.flatnonzero(training), np.flatnonzero(held_out)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Surrogate(latents.shape[1], profile.shape[1]).to(device)
    steps = max_epochs * -(-len(train) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 16), pct_start=0.2)
    x, y = latents.to(device), torch.from_numpy(np.asarray(profile, np.float32)).to(device)
    for _ in range(max_epochs):
        for rows in np.array_split(rng.permutation(train), -(-len(train) // batch_size)):
            loss = F.smooth_l1_loss(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.inference_mode():
        found, truth = network(x[test]), y[test]
    r2 = 1 - ((found - truth) ** 2).mean(0) / truth.var(0, unbiased=False).clamp_min(1e-9)
    network.reliability.copy_(r2.clamp(0, 1))
    return network, r2.cpu().numpy()


def fit_morphology(
    training: Pairs, validation: Pairs, latents: Tensor, place: np.ndarray, around: Context, config: MorphologyConfig,
    surrogate: Surrogate | None, *, max_epochs: int = 10, learning_rate: float = 1e-3, checkpoint_dir: Path | None = None,
    resume: bool = False, device: str | torch.device = "cpu", seed: int = 0,
) -> tuple[MorphologyNetwork, dict]:  # fmt: skip
    """Fit the flow to pairs, whose rows' latents are at ``place``. Return its averaged network and the history."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MorphologyNetwork(config)
    module = MorphologyTraining(network, surrogate, learning_rate=learning_rate)
    size, kind = config.batch_size, torch.device(device).type
    n, arguments = max(MIN_BATCHES, -(-len(training) // size)), (latents, place, around)
    fit(
        module, PairBatches(training, *arguments, n, size, seed, exchange=config.exchange),
        PairBatches(validation, *arguments, 8, size, seed + 1, exchange=config.exchange),
        description="morphology", checkpoint_dir=checkpoint_dir, max_epochs=max_epochs, patience=max_epochs, monitor="val_loss",
        seed=seed, resume=resume, accelerator={"cuda": "gpu"}.get(kind, kind), devices=config.devices,
        precision=config.precision,
    )  # fmt: skip
    return cast("MorphologyNetwork", module.average.module), module.history
