"""Train the generator of morphology by genes: an autoencoder of images, and a flow from noise to the latents of all cells.

Beside the flow a linear map from genes to latents is fitted. How images are edited is chosen on held-out cells, transition by
transition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow._settings import progress, warn
from spatiaflow.metrics import energy_distance
from spatiaflow.models import _base
from spatiaflow.models.editor import Components, Edit, EditNetwork, MorphologyEditor, Surroundings, edited
from spatiaflow.models.flow import interpolate
from spatiaflow.models.morphology import EDITS, MorphologyConfig
from spatiaflow.models.preprocess import intensity_of
from spatiaflow.models.regression import Moments
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import far_band
from spatiaflow.models.transport import per_unit
from spatiaflow.train import morphology
from spatiaflow.train.fit import fit
from spatiaflow.train.morphology import MorphologyTraining, fitted_images, holding, source_stains
from spatiaflow.train.pairs import Pairs

GUIDANCE = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
STRENGTHS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
ALPHA = 100.0  # of the ridge regression from components and surroundings to latents
MIN_CELLS, MAX_CELLS = 20, 500  # held-out cells of a state by which edits are compared


def train_editor(
    slides: Sequence[Slide],
    pairs: Pairs,
    niche: np.ndarray,
    config: MorphologyConfig,
    *,
    validation: float = 0.1,
    max_epochs: int = 10,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> MorphologyEditor:
    """Train a generator of images by genes on all cells. Pairs only say which shift of genes makes a state of another.

    Parameters
    ----------
    slides
        Cells with counts, and with crops that are matched with ``config.channels``. A row of the pairs is a place among the cells
        of all slides, one slide after the other.
    pairs, niche, config, validation, about
        As in :func:`spatiaflow.train.morphology.train_morphology`.
    """
    shared = set.intersection(*(set(slide.genes) for slide in slides))
    slides = [slide.align([gene for gene in slides[0].genes if gene in shared]) for slide in slides]
    counts = sparse.vstack([slide.counts for slide in slides], format="csr")
    inside = np.concatenate([slide.crops.inside for slide in slides])
    band = np.concatenate([along > edge for along, edge in (far_band(slide.xy, validation) for slide in slides)])
    components = Components.fit(counts[~band], config.n_components, seed)
    config = replace(config, n_components=components.axes.shape[1])
    surroundings = components.surroundings(slides, config.n_neighbors, config.crop_um)
    kept = ~band[pairs.source] & ((pairs.share * ~band[pairs.target]).sum(1) > 0)
    if not kept.any() or not band[inside].any():
        raise ValueError(
            f"validation={validation:g} leaves {kept.sum()} pairs to train on (of {len(pairs)}) and {band[inside].sum()} cells "
            "to choose the epoch by; both are needed. Give another share, or more pairs."
        )
    expression = per_unit(counts, float(components.unit))
    shifts = state_shifts(pairs.within(~band), niche[kept], config.transitions, expression)
    used = np.flatnonzero(inside)
    run = {"config": replace(config, devices=1, precision="32-true"), "pairs": [*vars(pairs).values(), band]}
    with holding(checkpoint_dir, resume, slides, seed=seed, max_epochs=max_epochs, **run) as file:
        autoencoder, rebuilt, latents, place, _ = fitted_images(
            slides, used, band, config, file, max_epochs=max_epochs, seed=seed, device=device
        )
        network, history = fit_editor(
            latents, surroundings.rows(used), band[used], config, max_epochs=max_epochs, checkpoint_dir=checkpoint_dir,
            resume=resume, device=device, seed=seed,
        )  # fmt: skip
    linear = fit_linear(latents, surroundings.rows(used), ~band[used])
    model = MorphologyEditor(
        network=network, autoencoder=autoencoder, genes=slides[0].genes, components=components, linear=linear, shifts=shifts,
        intensity=intensity_of(slides, config.channels), history=history, card={},
    )  # fmt: skip
    cases = cases_of(pairs, niche, band, config.transitions, np.random.default_rng(seed))
    scores = choose(model, latents, surroundings, place, cases, device=device)
    scores |= {name: min(values) for name, values in history.items() if name.startswith("val_") and values}
    model.card = _base.model_card(
        slides, config=asdict(model.config), seed=seed, epochs=max_epochs, scores=scores,
        autoencoder_r2=dict(zip(config.channels, map(float, rebuilt))),
        source_stains=source_stains(slides, pairs.rows(kept), config.transitions, config.channels), **(about or {}),
    )  # fmt: skip
    return model


def state_shifts(
    pairs: Pairs, niche: np.ndarray, names: Sequence[str], expression: sparse.csr_matrix
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by how much log counts differ between the states of a transition, in each niche and (as "") in all of them.

    The shift is the mean of the paired targets less that of the paired sources, each cell once. Weights by confidence depend
    on depth: sure pairs have more counts. So the mean confidence only stands beside the shift.
    """
    shifts: dict[str, dict[str, dict[str, Any]]] = {}
    for i, name in enumerate(names):
        here = pairs.transition == i
        if not here.any():
            raise ValueError(f"{name} has no pair whose cells lie in the image.")
        shifts[name] = {}
        for one in ["", *sorted(set(niche[here]) - {""})]:
            own = pairs.rows(here & (niche == one) if one else here)
            source, target = np.unique(own.source), np.unique(own.target[own.share > 0])
            change = np.asarray(expression[target].mean(0) - expression[source].mean(0)).ravel()
            shifts[name][one] = {
                "genes": np.round(change, 5).tolist(),
                "confidence": round(float(own.confidence.mean()), 4),
            }
    return shifts


class CellBatches(Dataset):
    """Batches of cells. Item b depends only on the seed, the epoch and b."""

    def __init__(
        self, rows: np.ndarray, latents: Tensor, surroundings: Surroundings, n_batches: int, size: int, seed: int
    ):
        self.rows, self.latents, self.surroundings = rows, latents, surroundings
        self.n_batches, self.size, self.seed, self.epoch = n_batches, min(size, len(rows)), seed, 0

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        rng = np.random.default_rng([self.seed, self.epoch, b])
        rows = torch.from_numpy(rng.choice(self.rows, self.size, replace=False))
        given = self.surroundings.rows(rows)
        return {
            "source": self.latents[rows], "own": given.own, "around": given.around, "seed": int(rng.integers(2**31)),
        }  # fmt: skip


class EditTraining(MorphologyTraining):
    """Flow matching from noise to the latents of cells, with conditions dropped."""

    def losses(self, network: EditNetwork, b: dict) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the loss of the flow."""
        drop, target = network.config.drop if self.training else 0.0, b["source"]
        g = torch.Generator().manual_seed(b["seed"])
        noise = torch.randn(target.shape, generator=g).to(target)
        t, chance = (torch.rand(len(target), generator=g).to(target) for _ in range(2))
        condition = network.condition(Surroundings(b["own"], b["around"]), chance >= 2 * drop, chance >= drop)
        v = network(interpolate(noise, target, t[:, None]), t, condition)
        return {"flow": ((v - (target - noise)) ** 2).mean()}


def fit_editor(
    latents: Tensor, surroundings: Surroundings, band: np.ndarray, config: MorphologyConfig, *, max_epochs: int = 10,
    learning_rate: float = 1e-3, checkpoint_dir: Path | None = None, resume: bool = False,
    device: str | torch.device = "cpu", seed: int = 0,
) -> tuple[EditNetwork, dict]:  # fmt: skip
    """Fit the flow to cells that are not in ``band``. Return its averaged network of the best epoch, and the history."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EditNetwork(config)
    module = EditTraining(cast("Any", network), None, learning_rate=learning_rate)
    size, kind = config.batch_size, torch.device(device).type
    training, held_out = np.flatnonzero(~band), np.flatnonzero(band)
    n = max(morphology.MIN_BATCHES, -(-len(training) // size))
    fit(
        module, CellBatches(training, latents, surroundings, n, size, seed),
        CellBatches(held_out, latents, surroundings, 8, 4 * size, seed + 1), description="morphology",
        checkpoint_dir=checkpoint_dir, max_epochs=max_epochs, patience=max_epochs, monitor="val_loss", seed=seed,
        resume=resume, accelerator={"cuda": "gpu"}.get(kind, kind), devices=config.devices, precision=config.precision,
    )  # fmt: skip
    return cast("EditNetwork", module.average.module), module.history


def fit_linear(latents: Tensor, surroundings: Surroundings, training: np.ndarray) -> Tensor:
    """Return the ridge regression of latents on components, beside the surroundings, as its coefficients k x d."""
    x = torch.cat([surroundings.own, surroundings.around], 1).numpy()[training]
    (ridge,) = Moments.of([(x, latents.numpy()[training])]).ridges((ALPHA,))
    return torch.from_numpy(ridge.coefficients[: surroundings.own.shape[1]].copy())


class Case(NamedTuple):
    """What edits of a transition are compared by."""

    name: str
    source: np.ndarray  # rows of cells
    niche: np.ndarray  # of each
    target: np.ndarray  # rows of cells
    held_out: bool


def cases_of(
    pairs: Pairs, niche: np.ndarray, band: np.ndarray, transitions: Sequence[str], rng: np.random.Generator
) -> list[Case]:
    """Return what edits are compared by, of each transition between two states.

    These are cells of the band. Where it has too few of them, they are cells that were trained on.
    """
    cases = []
    for i, name in enumerate(transitions):
        for part in (band, ~band) if len(set(name.split(" -> "))) == 2 else ():
            here = np.flatnonzero((pairs.transition == i) & part[pairs.source])
            own = pairs.rows(here)
            target = np.unique(own.target[part[own.target] & (own.share > 0)])
            if min(len(here), len(target)) >= MIN_CELLS:
                some = np.sort(rng.permutation(len(here))[:MAX_CELLS])
                target = np.sort(rng.permutation(target)[:MAX_CELLS])
                cases.append(Case(name, own.source[some], niche[here[some]], target, part is band))
                break
    return cases


def choose(
    model: MorphologyEditor, latents: Tensor, surroundings: Surroundings, place: np.ndarray, cases: Sequence[Case], *,
    device: str | torch.device,
) -> dict[str, float]:  # fmt: skip
    """Set how a model edits: by the flow at some guidance, or by the linear map at some strength.

    Each transition is edited in the way that comes nearest to its real targets. What the settings already say is not changed. The
    score is the energy distance between the latents of edited sources and of real targets, divided by that of the sources as they
    are. Shifts of genes are edited in the way that has the best sum over transitions with held-out cells: transitions that change
    little decide little. A transition without cells to compare is edited by the flow. Returns the scores by name of the edit: of
    the sum, and the best two of each transition.
    """
    c = model.config
    if not cases:
        warn(
            f"fewer than {MIN_CELLS} cells of a state in every transition: how to edit cannot be chosen. The flow is used, with "
            f"guidance {GUIDANCE[3]:g}. Give more cells."
        )
        model.edits = {"": Edit("flow", GUIDANCE[3])}
        return {}
    if seen := [case.name for case in cases if not case.held_out]:
        warn(
            f"fewer than {MIN_CELLS} held-out cells of a state of {', '.join(seen)}: how to edit is chosen on cells that were "
            "trained on. Give a larger validation=."
        )
    network, scores = model.network.to(device), dict[str, dict[str, float]]()
    for name, source, niche, target, _ in progress(cases, "choosing the edit", unit="transition"):
        z, real = (latents[place[rows]] for rows in (source, target))
        change, given = torch.from_numpy(model.change(name, niche)), surroundings.rows(source).to(device)
        made = {"copy": z} | {f"linear {s:g}": z + s * change @ model.linear for s in STRENGTHS}
        for w in GUIDANCE if c.guidance is None else (c.guidance,):
            made[f"flow {w:g}"] = edited(network, z.to(device), given, [change.to(device)], guidance=w)[0].cpu()
        scores[name] = {edit: energy_distance(values.numpy(), real.numpy()) for edit, values in made.items()}
    network.cpu()
    held_out = [case.name for case in cases if case.held_out] or list(scores)
    total = {edit: sum(scores[name][edit] for name in held_out) for edit in next(iter(scores.values()))}
    model.edits = {name: best_of(some) for name, some in {"": total, **scores}.items()}
    unknown = replace(model.edits[""], kind="flow")  # a strength of the linear map does not hold for other transitions
    model.edits = dict.fromkeys(c.transitions, unknown) | model.edits
    out = {f"energy, {edit}": value / max(total["copy"], 1e-9) for edit, value in total.items()}
    for name, some in scores.items():
        chosen = model.edits[name]
        for edit in (f"flow {chosen.guidance:g}", f"linear {chosen.strength:g}"):
            out[f"energy, {name}, {edit}"] = some[edit] / max(some["copy"], 1e-9)
    return out


def best_of(scores: Mapping[str, float]) -> Edit:
    """Return the edit with the least score, with the best guidance of the flow and the best strength of the linear map."""
    best = {kind: min((e for e in scores if e.startswith(kind)), key=lambda e: scores[e]) for kind in EDITS}
    kind = min(best, key=lambda kind: scores[best[kind]])
    return Edit(kind, *(float(best[one].split()[1]) for one in ("flow", "linear")))
