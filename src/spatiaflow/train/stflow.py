"""Fitting STFlow: folds, networks, stack, and the joint law."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from spatiaflow import metrics
from spatiaflow._settings import logger
from spatiaflow.models import _base
from spatiaflow.models._base import model_card
from spatiaflow.models.counts import CountPrior, ImagePrior, draw_counts, library_quantiles, log_normalize
from spatiaflow.models.denoiser import Denoiser, SlideTokens
from spatiaflow.models.field_flow import FieldFlow
from spatiaflow.models.flow import interpolate, sample, schedule
from spatiaflow.models.law import MIN_DONORS, JointLaw
from spatiaflow.models.members import NAMES, NETWORK, SMOOTHED_OVER, SMOOTHING, Members
from spatiaflow.models.ood import OutOfDomain
from spatiaflow.models.regression import combine, cross_fitted, fit_stack, gene_pearson, given_depth, smooth
from spatiaflow.models.slide import ABSENT, Slide
from spatiaflow.models.spatial import Graph
from spatiaflow.models.stflow import PRIORS, STFlow, STFlowConfig
from spatiaflow.train.batches import Regions, WholeSlides
from spatiaflow.train.checkpoint import FINISHED, claim, read_weights
from spatiaflow.train.field_flow import fit_field_flow
from spatiaflow.train.fit import fit
from spatiaflow.train.law import HeldOut, fit_law
from spatiaflow.train.law_scores import choose_law
from spatiaflow.train.members import Choices, counts_of, expression, fit_members
from spatiaflow.train.trust import trusted

MAX_FOLDS = 5
CALIBRATION_DRAWS = 8  # of the prior, for the network's held-out mean
CRPS_DRAWS = 64
PERCEPTRON_EPOCHS = 60
N_BANDS = 4  # that a single training slide is cut into, where its prediction must not have seen it
FLOW_SPOTS = 250  # least, that a flow from draws of the field learns from
PRIOR_DONORS = 4  # a few donors do not say who predicts the next: rates of counts are then trusted alike
RATES_ALIKE = np.array([*("NB" in name for name in NAMES), False]) / sum("NB" in name for name in NAMES)


class FlowMatching(L.LightningModule):
    """Endpoint regression along the straight path: loss = MSE(f(y_t, t), y_1)."""

    def __init__(self, denoiser: Denoiser, config: STFlowConfig, weight: np.ndarray):
        super().__init__()
        self.denoiser, self.config = denoiser, config
        self.history: dict[str, list[float]] = {}
        self.register_buffer("weight", torch.as_tensor(weight, dtype=torch.float32))  # genes, mean 1

    def configure_optimizers(self):
        p = self.config
        return torch.optim.AdamW(self.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay, fused=True)

    def endpoint(self, b: dict, y_t, t):
        graph = Graph(b["index"], b["mask"], ABSENT)
        out = self.denoiser(b["features"], y_t, t, graph, b["edges"])
        return out + b["base"] if self.config.residual else out

    def loss(self, prediction, y):
        return (self.weight * (prediction - y) ** 2).mean()

    def training_step(self, b: dict, _):
        t = b["t"] if self.config.flow else torch.zeros_like(b["t"])
        y_t = interpolate(b["start"], b["y"], t[:, None]) if self.config.flow else b["start"]
        loss = self.loss(self.endpoint(b, y_t, t), b["y"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(t))
        return loss

    def validation_step(self, b: dict, _):
        times = schedule(self.config.n_steps) if self.config.flow else [0.0]
        y = sample(lambda y_t, t: self.endpoint(b, y_t, torch.full_like(b["t"], t)), b["start"], times)
        r = np.nanmean(gene_pearson(b["y"].cpu().numpy(), y.float().cpu().numpy()))
        self.log("val_loss", self.loss(y, b["y"]), batch_size=1)
        self.log("val_pearson", float(r), batch_size=1)


def train_stflow(
    slides: list[Slide],
    config: STFlowConfig,
    *,
    encoder: dict,
    target_sum: float | None = 1e4,
    validation: list[str] | float | None = None,
    max_epochs: int | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    accelerator: str = "cpu",
    seed: int = 0,
) -> STFlow:
    """Fit an STFlow to slides with raw features, and counts of the genes to predict; every choice is made inside them.

    Parameters
    ----------
    encoder
        Provenance of the features.
    target_sum
        Expression is log1p of counts per ``target_sum`` of the library; None: log1p of raw counts.
    validation
        Names of slides to hold out, a fraction of each, or None: each slide in turn; rows of one label where slides have them.
    """
    n_epochs = max_epochs or config.max_epochs
    run: dict = {"target_sum": target_sum, "validation": validation, "seed": seed}
    options: dict = {"checkpoint_dir": checkpoint_dir, "resume": resume, "accelerator": accelerator}
    if checkpoint_dir is None:
        return _fit_stflow(slides, config, encoder, n_epochs, **run, **options)
    with claim(
        checkpoint_dir, resume, config=config, genes=slides[0].genes, max_epochs=n_epochs,
        slides=tuple(s.name for s in slides), donors=tuple(s.donor for s in slides),
        data=[value for s in slides for value in (s.xy, s.features, s.counts.toarray(), s.library)],
        folds=tuple(None if s.labels is None else tuple(s.labels) for s in slides), **run,
    ):  # fmt: skip
        return _fit_stflow(slides, config, encoder, n_epochs, **run, **options)


def _fit_stflow(
    slides: list[Slide], config: STFlowConfig, encoder: dict, n_epochs: int, *, target_sum: float | None, validation: Any,
    checkpoint_dir: Path | None, resume: bool, accelerator: str, seed: int,
) -> STFlow:  # fmt: skip
    genes, library = list(slides[0].genes), np.concatenate([s.library for s in slides])
    groups, held_out = _folds(slides, validation, config, seed)
    choices = Choices.of(
        slides, groups, config.standardize, target_sum, library_quantiles(library), stacked=config.stack
    )
    # between tissues features shift; a slide's own z-scores would hide that from the out-of-domain score
    ood = OutOfDomain.fit(
        [np.concatenate([(s.features - choices.mean) / choices.std for s in group]) for group in groups]
    )
    y = np.concatenate([expression(s, target_sum) for s in slides])
    pitch = float(np.median([s.pitch for s in slides]))
    task = _Task(config, choices, n_epochs, _loss_weight(y, config), _residual_std(groups, choices), pitch)
    networks: list[Denoiser] = []
    flows: list[FieldFlow | None] = []
    folds: list[dict] = []
    history: dict[str, Any] = {}
    n_donors = len({s.donor for f in held_out for s in groups[f]})
    judged = n_donors == 1 or n_donors >= MIN_DONORS  # fewer donors do not say whether a flow helps on the next
    for f in held_out:
        rest = [group for i, group in enumerate(groups) if i != f]
        fold = _Fold(rest, groups[f], task, seed + f)
        where = None if checkpoint_dir is None else Path(checkpoint_dir) / f"fold_{f}"
        network, log = _fit_network(
            fold, f"STFlow {len(networks) + 1}/{len(held_out)}", seed + f, where, resume,
            max_epochs=n_epochs, patience=config.patience, accelerator=accelerator, devices=config.devices,
            precision=config.precision,
        )  # fmt: skip
        for name, values in ({"fold": [f] * len(log.get("epoch", []))} | log).items():
            history.setdefault(name, []).extend(values)
        networks.append(network)
        flows.append(fold.field_flow(seed + f) if config.stack and judged else None)
        folds.append(fold.predict(network, seed))
    oof = {name: np.concatenate([fold[name] for fold in folds], axis=-2 if name == "parts" else 0) for name in folds[0]}
    level, weights = _stacks(oof, choices) if config.stack and len(oof["y"]) > 1 else _network_alone(len(genes))
    prediction, of_rates = np.empty((2, *oof["y"].shape), oof["y"].dtype)
    for rows in _slides_of(oof):
        prediction[rows], of_rates[rows] = combine(oof["parts"][:, rows], oof["mean"][rows][0], level, weights)
    out_of_fold = _out_of_fold(oof, of_rates, choices)
    law = fit_law(out_of_fold, task.pitch)
    law_card, field_flows = choose_law(
        out_of_fold, law, _of_slides(flows, folds, oof), target_sum=target_sum, new_donor=n_donors > 1, seed=seed,
    )  # fmt: skip
    arrays = {  # skill and trust are of the stack alone: flows were chosen on the same slides
        "mean": y.mean(0), "level": level, "weights": weights[0], "rate_weights": weights[1],
        "libraries": choices.counting.libraries, "theta": choices.theta, "skill": _skill(oof, prediction, law, choices, y, seed),
        "trusted": trusted(oof["y"], of_rates, oof["library"], oof["slide"], oof["donor"]),
        **{f"ood_{name}": value for name, value in vars(ood).items()},
    }  # fmt: skip
    found = dict(zip((*NAMES, NETWORK), oof["parts"])) if config.stack else {NETWORK: oof["parts"][-1]}
    scores = {name: _mean_pearson(oof, value) for name, value in (found | {"model": prediction}).items()}
    logger.info("held-out Pearson inside the training slides: %s", ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    used = np.any(weights, axis=(0, 2))
    by_slide = used[:-1][[", slide" in name for name in NAMES]].any() or (used[-1] and choices.mode == "slide")
    card = model_card(
        slides, config=asdict(config), seed=seed, epochs=len(history.get("epoch", [])), scores=scores, n_genes=len(genes),
        target_sum=target_sum, standardize=choices.mode, transductive=bool(by_slide or field_flows),
        donors=sorted({s.donor for s in slides}), donors_learned=law.donors_learned, law=law_card,
    )  # fmt: skip
    return STFlow(
        config=config, genes=genes, encoder=encoder, target_sum=target_sum, networks=networks,
        prior=_prior(slides, task), members=_members(slides, task, seed), law=law, field_flows=field_flows,
        arrays={k: np.asarray(v, np.float64) for k, v in arrays.items()}, standardize=choices.mode,
        pitch=task.pitch, history=history, card=card,
    )  # fmt: skip


@dataclass(frozen=True)
class _Task:
    """What all folds have in common."""

    config: STFlowConfig
    choices: Choices
    max_epochs: int
    weight: np.ndarray  # of each gene in the loss
    residual_std: np.ndarray  # of cross-fitted ridge regression, genes
    pitch: float  # µm


def _network_alone(n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of level, and of expression and rates, that take the network alone."""
    alone = np.append(np.zeros(len(NAMES)), 1.0)
    return alone, np.broadcast_to(alone[:, None], (2, len(alone), n_genes))


def _stacks(oof: dict[str, np.ndarray], choices: Choices) -> tuple[np.ndarray, np.ndarray]:
    """Weights of level (members), and of the patterns of expression and of rates (2 x members x genes).

    Measured expression varies with the depth of its spot. One stack predicts this too, as far as images show the depth. The other
    is fitted to what the depth does not explain, so that rates are those of spots of any one depth.
    """
    y, parts, n_donors = oof["y"], oof["parts"], len(np.unique(oof["donor"]))
    strength = PRIOR_DONORS / n_donors if n_donors > 1 else 0.0
    level, weights = fit_stack(y, parts, oof["mean"], oof["slide"], RATES_ALIKE, strength)
    if choices.target_sum is None:  # of raw counts: differences in depth belong to the expression
        return level, np.stack([weights, weights])
    y, parts = y.copy(), parts.copy()
    for rows in _slides_of(oof):
        y[rows] = given_depth(y[rows], oof["library"][rows])
        for part in parts:  # one at a time: residuals are in float64
            part[rows] = given_depth(part[rows], oof["library"][rows])
    _, of_rates = fit_stack(y, parts, np.zeros_like(y), oof["slide"], RATES_ALIKE, strength)
    return level, np.stack([weights, of_rates])


def _loss_weight(y: np.ndarray, config: STFlowConfig) -> np.ndarray:
    variance = y.var(0) + 1e-6
    return (1 / variance) / (1 / variance).mean() if config.weighted else np.ones(y.shape[1])


def _parts(slides: list[Slide], choices: Choices) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scaled features and expression of each slide, for the ridge regression."""
    return [(choices.scaled(slide).features, expression(slide, choices.target_sum)) for slide in slides]


def _residual_std(groups: list[list[Slide]], choices: Choices) -> np.ndarray:
    parts = [_parts(group, choices) for group in groups]
    truth = np.concatenate([y for group in parts for _, y in group])
    return np.sqrt(np.mean((np.concatenate(sum(cross_fitted(parts, choices.alpha), [])) - truth) ** 2, 0))


def _groups(slides: list[Slide], seed: int) -> list[list[Slide]]:
    """Slides in at most MAX_FOLDS groups: by label or donor where there are several; one or two slides are cut into bands."""
    donors = list(dict.fromkeys(s.donor for s in slides))
    if slides[0].labels is not None:
        labels = sorted({label for s in slides for label in s.labels})
        cut = [[s.take(s.labels == label, f"{s.name}:{label}") for s in slides] for label in labels]
        pieces = [kept for part in cut if (kept := [s for s in part if len(s) > 1])]
    elif len(donors) > 1:
        pieces = [[s for s in slides if s.donor == donor] for donor in donors]
    else:
        if len(slides) < 3:
            slides = [band for s in slides for band in s.bands(min(4 // len(slides), max(1, len(s) // 2)))]
        pieces = [[s] for s in slides]
    order = np.random.default_rng(seed).permutation(len(pieces)) if len(pieces) > MAX_FOLDS else range(len(pieces))
    n = min(MAX_FOLDS, len(pieces))
    return [[s for i in list(order)[g::n] for s in pieces[i]] for g in range(n)]


def _folds(slides: list[Slide], validation, config: STFlowConfig, seed: int) -> tuple[list[list[Slide]], list[int]]:
    """Return groups of slides, and which of them are held out in turn."""
    if validation is None:
        groups = _groups(slides, seed)
        if len(groups) < 2:
            raise ValueError("one spot is not enough to train on; at least 2 spots (4 for sensible folds) are needed.")
        return groups, list(range(len(groups))) if config.stack else [
            int(np.random.default_rng(seed).integers(len(groups)))
        ]
    if isinstance(validation, float):
        pieces = [s.bands(max(2, round(1 / validation))) for s in slides]
        last = [p.pop(int(np.random.default_rng([seed, i]).integers(len(p)))) for i, p in enumerate(pieces)]
        rest = [band for p in pieces for band in p]
    else:
        last = [s for s in slides if s.name in validation]
        rest = [s for s in slides if s.name not in validation]
    groups = _groups(rest, seed) if len(rest) > 1 else [rest]
    return [*groups, last], [len(groups)]


def _prior(slides: list[Slide], task: _Task):
    config, target_sum = task.config, task.choices.target_sum
    if config.prior == "counts":
        counts, library = np.concatenate([counts_of(s) for s in slides]), np.concatenate([s.library for s in slides])
        return CountPrior.fit(counts, library, target_sum)
    return ImagePrior(0.5 * task.residual_std) if config.prior == "image" else PRIORS[config.prior]()


def _members(slides: list[Slide], task: _Task, seed: int) -> Members:
    epochs = min(task.max_epochs, PERCEPTRON_EPOCHS)
    return fit_members(slides, task.choices, stacked=task.config.stack, max_epochs=epochs, seed=seed)


class _Fold:
    """Training and held-out slides of one fold, each with the simple prediction of models that never saw it."""

    def __init__(self, rest: list[list[Slide]], held_out: list[Slide], task: _Task, seed: int):
        c = task.choices
        self.task, self.rest, self.raw_held_out = task, rest, held_out
        raw = [s for group in rest for s in group]
        self.members = _members(raw, task, seed)
        self.training, self.held_out = [c.scaled(s) for s in raw], [c.scaled(s) for s in held_out]
        self.training_y, self.held_out_y = ([expression(s, c.target_sum) for s in some] for some in (raw, held_out))
        self.mean = np.concatenate(self.training_y).mean(0)
        self.training_base = sum(cross_fitted([_parts(group, c) for group in rest], c.alpha), [])
        self.held_out_base = [self.members.ridges[c.mode].predict(s.features) for s in self.held_out]
        self.prior = _prior(raw, task)

    def field_flow(self, seed: int) -> FieldFlow | None:
        """A flow from draws of the field around a smoothed ridge regression; None where spots are few or show no field."""
        c = self.task.choices
        groups = [[c.scaled(s) for s in group] for group in self.rest]
        if len(groups) == 1:
            groups = [[s] for s in groups[0]] if len(groups[0]) > 1 else [[s] for s in groups[0][0].bands(N_BANDS)]
        slides = sum(groups, [])
        if sum(map(len, slides)) < FLOW_SPOTS:
            return None
        parts = [[(s.features, expression(s, c.target_sum)) for s in group] for group in groups]
        simple = sum(cross_fitted(parts, c.alpha), [])
        smoothed = [smooth(one, s.graph(SMOOTHED_OVER), SMOOTHING) for one, s in zip(simple, slides)]
        known = [
            _held_out(HeldOut(s.name, s.donor, s.xy, counts_of(s), s.library, ABSENT, s.features), one, c)
            for s, one in zip(slides, smoothed)
        ]
        law = fit_law(known, self.task.pitch)
        return fit_field_flow(known, law, seed) if law.factors.any() and law.field_sd.any() else None

    def predict(self, network: Denoiser, seed: int) -> dict[str, np.ndarray]:
        """Out-of-fold predictions of simple models and network, and what they are compared with."""
        config, c = self.task.config, self.task.choices
        n_draws = 1 if not config.flow or self.prior.deterministic else CALIBRATION_DRAWS
        times = schedule(config.n_steps) if config.flow else [0.0]
        wanted, rows = np.full(len(NAMES), config.stack), []
        for i, (raw, s, y, base) in enumerate(
            zip(self.raw_held_out, self.held_out, self.held_out_y, self.held_out_base)
        ):
            tokens = SlideTokens(s.features, s.xy, base, network.config, self.prior, config.residual, "cpu", 512)
            drawn = tokens.mean([network.eval()], [[seed, i, d] for d in range(n_draws)], times)
            simple = self.members.predictions(raw, lambda log_rate: c.counting.mean_at(log_rate, c.theta), wanted)
            rows.append({
                "parts": np.stack([np.broadcast_to(p, y.shape) for p in (*simple, drawn)]), "y": y, "counts": counts_of(s),
                "library": s.library, "xy": s.xy, "features": s.features if config.stack else s.features[:, :0],
                "mean": np.broadcast_to(self.mean, y.shape), "slide": np.full(len(s), s.name),
                "donor": np.full(len(s), s.donor),
            })  # fmt: skip
        return {k: np.concatenate([r[k] for r in rows], axis=-2 if k == "parts" else 0) for k in rows[0]}


def _fit_network(fold: _Fold, description, seed, where, resume, **options):
    """Train one network; a finished one in ``where`` is taken from there when resuming."""
    config, weight = fold.task.config, fold.task.weight
    torch.manual_seed(seed)
    n_features, n_genes = fold.training[0].features.shape[1], len(fold.mean)
    module = FlowMatching(Denoiser(config.denoiser(n_features, n_genes)), config, weight)
    with torch.no_grad():  # start at the training mean
        for layer in module.denoiser.layers:
            layer.head[4].bias.copy_(torch.as_tensor(0.0 * fold.mean if config.residual else fold.mean))
    if where is not None:
        finished = where / FINISHED
        if resume and finished.exists():
            known, tensors = read_weights(finished, module.denoiser.state_dict())
            module.denoiser.load_state_dict(tensors)
            return module.denoiser, known["history"]
        where.mkdir(parents=True, exist_ok=True)
    fit(
        module, Regions(fold.training, fold.training_y, fold.training_base, config, fold.prior, seed),
        WholeSlides(fold.held_out, fold.held_out_y, fold.held_out_base, config, fold.prior, seed),
        monitor="val_loss", seed=seed, description=description, checkpoint_dir=where, resume=resume, **options,
    )  # fmt: skip
    if where is not None:
        _base.save(finished, "Denoiser", {"history": module.history}, module.denoiser.state_dict())
    return module.denoiser, module.history


def _slides_of(oof: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Rows of each held-out slide, bool."""
    return [oof["slide"] == name for name in np.unique(oof["slide"])]


def _held_out(slide: HeldOut, of_rates: np.ndarray, choices: Choices) -> HeldOut:
    """A slide with the rates whose mean log expression, n x genes, was predicted without it."""
    library = slide.library
    if choices.target_sum is None:  # expression is of raw counts: differences in depth belong to it
        library = np.full(len(library), choices.counting.libraries.mean())
    return replace(slide, library=library, log_mean=np.log(choices.counting.rate_at(of_rates, choices.theta)))


def _out_of_fold(oof: dict[str, np.ndarray], of_rates: np.ndarray, choices: Choices) -> list[HeldOut]:
    """Held-out slides with the rates that the stack predicts of them."""
    out = []
    for rows in _slides_of(oof):
        name, donor = (str(oof[key][rows][0]) for key in ("slide", "donor"))
        xy, counts, library, features = (oof[key][rows] for key in ("xy", "counts", "library", "features"))
        out.append(_held_out(HeldOut(name, donor, xy, counts, library, ABSENT, features), of_rates[rows], choices))
    return out


def _of_slides(flows: list[FieldFlow | None], folds: list[dict], oof: dict[str, np.ndarray]) -> list[FieldFlow]:
    """The flow that never saw it, for each held-out slide; none where a fold has no flow."""
    of = {name: flow for flow, fold in zip(flows, folds) if flow is not None for name in np.unique(fold["slide"])}
    names = np.unique(oof["slide"])
    return [of[name] for name in names] if len(of) == len(names) else []


def _skill(oof, prediction, law: JointLaw, choices: Choices, y: np.ndarray, seed: int) -> np.ndarray:
    """CRPS skill of single spots over each gene's own distribution, on slides not trained on."""
    rng, counting = np.random.default_rng(seed), choices.counting
    theta = law.marginal_theta(new_donor=len(np.unique(oof["donor"])) > 1)
    rate = counting.rate_at(prediction, choices.theta)
    size = rng.choice(counting.libraries, (CRPS_DRAWS, len(rate)))
    draws = np.stack(
        [log_normalize(draw_counts(n[:, None] * rate, theta, 0, rng), n, choices.target_sum) for n in size]
    )
    marginal = np.quantile(y, (np.arange(CRPS_DRAWS) + 0.5) / CRPS_DRAWS, axis=0)[:, None]
    own = metrics.crps_ensemble(oof["y"], draws).mean(0)
    reference = metrics.crps_ensemble(oof["y"], np.broadcast_to(marginal, draws.shape), fair=False).mean(0)
    return np.where(reference > 1e-9, 1 - own / np.maximum(reference, 1e-9), 0.0)  # a constant gene shows no skill


def _mean_pearson(oof, prediction) -> float:
    rows = _slides_of(oof)
    return float(np.mean([np.nanmean(gene_pearson(oof["y"][r], prediction[r])) for r in rows]))
