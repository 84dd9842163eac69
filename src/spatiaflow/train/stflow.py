"""Fitting STFlow: folds, networks, stack, and the calibration of its uncertainty."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
from scipy.optimize import minimize

from spatiaflow import metrics
from spatiaflow._settings import logger
from spatiaflow.models import _base
from spatiaflow.models._base import model_card
from spatiaflow.models.counts import CountLaw, CountPrior, ImagePrior, library_quantiles, log_normalize
from spatiaflow.models.flow import interpolate, sample, schedule
from spatiaflow.models.ood import OutOfDomain, inflation
from spatiaflow.models.regression import (
    choose_ridge,
    combine,
    cross_fitted,
    fit_ridge,
    fit_stack,
    gene_pearson,
    smooth,
    standardize,
)
from spatiaflow.models.slide import ABSENT, Slide
from spatiaflow.models.spatial import Graph
from spatiaflow.models.stflow import (
    PRIORS,
    Denoiser,
    SlideTokens,
    STFlow,
    STFlowConfig,
)
from spatiaflow.train.batches import Regions, WholeSlides
from spatiaflow.train.checkpoint import FINISHED, claim, read_weights
from spatiaflow.train.fit import fit

MAX_FOLDS = 5
CALIBRATION_DRAWS = 8
SMOOTHED_OVER = 8  # neighbours


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
        Names of slides to hold out, a fraction of each, or None: each slide in turn.
    """
    n_epochs = max_epochs or config.max_epochs
    run: dict = {"target_sum": target_sum, "validation": validation, "seed": seed}
    options: dict = {"checkpoint_dir": checkpoint_dir, "resume": resume, "accelerator": accelerator}
    if checkpoint_dir is None:
        return _fit_stflow(slides, config, encoder, n_epochs, **run, **options)
    with claim(
        checkpoint_dir, resume, config=config, genes=slides[0].genes, max_epochs=n_epochs, slides=tuple(s.name for s in slides),
        data=[value for s in slides for value in (s.xy, s.features, s.counts.toarray(), s.library)], **run,
    ):  # fmt: skip
        return _fit_stflow(slides, config, encoder, n_epochs, **run, **options)


def _fit_stflow(
    slides: list[Slide], config: STFlowConfig, encoder: dict, n_epochs: int, *, target_sum: float | None, validation: Any,
    checkpoint_dir: Path | None, resume: bool, accelerator: str, seed: int,
) -> STFlow:  # fmt: skip
    genes = list(slides[0].genes)
    features = np.concatenate([s.features for s in slides]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    std = np.where(std < 1e-6, 1.0, std)
    scaled = {
        m: [replace(s, features=standardize(s.features, mean, std, m)) for s in slides] for m in ("global", "slide")
    }
    training, mode = slides, _choose_standardization(scaled, config, target_sum)
    slides = scaled[mode]
    groups, held_out = _folds(slides, validation, config, seed)
    # between tissues features shift; a slide's own z-scores would hide that from the out-of-domain score
    apart, _ = _folds(scaled["global"], validation, config, seed)
    ood, distances = OutOfDomain.fit([np.concatenate([s.features for s in group]) for group in apart])
    parts = [_parts(group, target_sum) for group in groups]
    alpha, smoothing, _ = choose_ridge(parts, [_graphs(group) for group in groups])

    y, counts = (
        np.concatenate(v) for v in ([_expression(s, target_sum) for s in slides], [_counts(s) for s in slides])
    )
    library = np.concatenate([s.library for s in slides])
    variance = y.var(0) + 1e-6
    weight = (1 / variance) / (1 / variance).mean() if config.weighted else np.ones(len(genes))
    full_counts = CountPrior.fit(counts, library, target_sum)  # also gives the predictive law its zero inflation
    ridge = fit_ridge(_parts(slides, target_sum), alpha, smoothing)
    truth = np.concatenate([expression for group in parts for _, expression in group])
    residual_std = np.sqrt(np.mean((np.concatenate(sum(cross_fitted(parts, alpha), [])) - truth) ** 2, 0))
    prior = _prior(config, full_counts, residual_std)

    networks: list[Denoiser] = []
    folds: list[dict] = []
    history: dict[str, Any] = {}
    for f in held_out:
        rest = [group for i, group in enumerate(groups) if i != f]
        fold = _Fold(rest, groups[f], alpha, config, target_sum, residual_std)
        where = None if checkpoint_dir is None else Path(checkpoint_dir) / f"fold_{f}"
        network, log = _fit_network(
            fold, config, weight, f"STFlow {len(networks) + 1}/{len(held_out)}", seed + f, where, resume,
            max_epochs=n_epochs, patience=config.patience, accelerator=accelerator, devices=config.devices,
            precision=config.precision,
        )  # fmt: skip
        for name, values in ({"fold": [f] * len(log.get("epoch", []))} | log).items():
            history.setdefault(name, []).extend(values)
        networks.append(network)
        folds.append(fold.predict(network, smoothing, seed))
    oof = {name: np.concatenate([fold[name] for fold in folds], axis=-2 if name == "parts" else 0) for name in folds[0]}

    n_genes = len(genes)
    level, weights = np.array([0.0, 0.0, 1.0]), np.repeat([[0.0], [0.0], [1.0]], n_genes, 1)  # the network alone
    if config.stack and len(oof["y"]) > 1:
        level, weights = fit_stack(oof["y"], oof["parts"], oof["mean"], oof["group"])
    prediction = combine(oof["parts"], oof["mean"], level, weights, oof["group"])
    arrays = {
        "feature_mean": mean, "feature_std": std, "mean": y.mean(0), "level": level, "weights": weights,
        "between": oof["between"].mean(0) * weights[2] ** 2, "libraries": library_quantiles(library), "pi": full_counts.pi,
        **{f"ood_{name}": value for name, value in vars(ood).items()},
    }  # fmt: skip
    relative = ood.relative(np.concatenate([distances[f] for f in held_out]))
    arrays |= _calibrate(oof, prediction, arrays, target_sum, relative, y, seed)
    found = dict(zip(("ridge", "smoothed ridge", "network"), oof["parts"])) | {"model": prediction}
    scores = {name: _mean_pearson(oof, value) for name, value in found.items()}
    logger.info("held-out Pearson inside the training slides: %s", ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    card = model_card(
        slides, config=asdict(config), seed=seed, epochs=len(history.get("epoch", [])), scores=scores, n_genes=n_genes,
        target_sum=target_sum, standardize=mode, transductive=mode == "slide",
    )  # fmt: skip
    return STFlow(
        config=config, genes=genes, encoder=encoder, target_sum=target_sum, networks=networks, prior=prior, ridge=ridge,
        arrays={k: np.asarray(v, np.float64) for k, v in arrays.items()}, standardize=mode,
        pitch=float(np.median([s.pitch for s in training])), history=history, card=card,
    )  # fmt: skip


def _expression(slide: Slide, target_sum: float | None) -> np.ndarray:
    """Log-normalised expression, n x genes."""
    return log_normalize(_counts(slide), slide.library, target_sum)


def _counts(slide: Slide) -> np.ndarray:
    """Counts, n x genes, float64."""
    return slide.counts.toarray().astype(np.float64)


def _parts(slides: list[Slide], target_sum: float | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features and expression of each slide, for the regressions."""
    return [(slide.features, _expression(slide, target_sum)) for slide in slides]


def _graphs(slides: list[Slide]) -> list[Graph]:
    return [slide.graph(SMOOTHED_OVER) for slide in slides]


def _choose_standardization(scaled: dict[str, list[Slide]], config: STFlowConfig, target_sum: float | None) -> str:
    if config.standardize != "choose":
        return config.standardize
    if len(scaled["global"]) < 3:
        return "global"
    scores = {}
    for mode, slides in scaled.items():
        groups = _groups(slides, 0)
        scores[mode] = choose_ridge([_parts(g, target_sum) for g in groups], [_graphs(g) for g in groups])[2]
    best = max(scores, key=lambda mode: scores[mode])
    found = ", ".join(f"{mode!r} {score:.3f}" for mode, score in scores.items())
    logger.info("standardize=%r is used: held-out Pearson of ridge regression is %s", best, found)
    return best


def _groups(slides: list[Slide], seed: int) -> list[list[Slide]]:
    """Slides in at most MAX_FOLDS groups; one or two slides are cut into contiguous bands first."""
    if len(slides) < 3:
        slides = [band for s in slides for band in s.bands(min(4 // len(slides), max(1, len(s) // 2)))]
    order = np.random.default_rng(seed).permutation(len(slides)) if len(slides) > MAX_FOLDS else range(len(slides))
    n = min(MAX_FOLDS, len(slides))
    return [[slides[i] for i in list(order)[g::n]] for g in range(n)]


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


def _prior(config: STFlowConfig, counts: CountPrior, residual_std: np.ndarray):
    if config.prior == "counts":
        return counts
    return ImagePrior(0.5 * residual_std) if config.prior == "image" else PRIORS[config.prior]()


class _Fold:
    """Training and held-out slides of one fold, each with the simple prediction of models that never saw it."""

    def __init__(
        self, rest: list[list[Slide]], held_out: list[Slide], alpha: float, config: STFlowConfig, target_sum: float | None,
        residual_std: np.ndarray,
    ):  # fmt: skip
        self.config, self.training, self.held_out = config, [s for group in rest for s in group], held_out
        groups = [_parts(group, target_sum) for group in rest]
        parts = [part for group in groups for part in group]
        self.ridge = fit_ridge(parts, alpha)
        self.training_y = [y for _, y in parts]
        self.held_out_y = [_expression(s, target_sum) for s in held_out]
        self.mean = np.concatenate(self.training_y).mean(0)
        self.training_base = sum(cross_fitted(groups, alpha), [])
        self.held_out_base = [self.ridge.predict(s.features) for s in held_out]
        counts: Any = None
        if config.prior == "counts":
            counts = CountPrior.fit(
                np.concatenate([_counts(s) for s in self.training]),
                np.concatenate([s.library for s in self.training]),
                target_sum,
            )
        self.prior = _prior(config, counts, residual_std)

    def predict(self, network: Denoiser, smoothing: float, seed: int) -> dict[str, np.ndarray]:
        """Out-of-fold predictions of ridge, smoothed ridge and network, and the network's between-draw variance."""
        stand_in = SimpleNamespace(
            config=self.config, networks=[network.eval()], prior=self.prior, genes=range(len(self.mean))
        )
        n_draws = 1 if not self.config.flow or self.prior.deterministic else CALIBRATION_DRAWS
        times = schedule(self.config.n_steps) if self.config.flow else [0.0]
        rows = []
        for i, (s, y, base) in enumerate(zip(self.held_out, self.held_out_y, self.held_out_base)):
            tokens = SlideTokens(s.features, s.xy, base, stand_in, "cpu", 512)
            draws = np.stack([tokens.run(np.random.default_rng([seed, i, d]), times) for d in range(n_draws)])
            parts = np.stack([base, smooth(base, s.graph(SMOOTHED_OVER), smoothing), draws.mean(0)])
            rows.append({
                "parts": parts, "between": draws.var(0, ddof=1) if n_draws > 1 else np.zeros_like(y), "y": y,
                "counts": _counts(s), "library": s.library, "features": s.features,
                "mean": np.broadcast_to(self.mean, y.shape), "group": np.full(len(s), s.name),
            })  # fmt: skip
        return {k: np.concatenate([r[k] for r in rows], axis=-2 if k == "parts" else 0) for k in rows[0]}


def _fit_network(fold: _Fold, config: STFlowConfig, weight, description, seed, where, resume, **options):
    """Train one network; a finished one in ``where`` is taken from there when resuming."""
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


def _calibrate(oof, prediction, arrays, target_sum, relative, y, seed) -> dict[str, np.ndarray]:
    """Dispersion, spread and skill of every gene, from predictions of slides not trained on."""
    law = CountLaw(arrays["libraries"], target_sum, arrays["pi"])
    theta = law.fit_theta(prediction, oof["counts"], oof["library"])
    expected = np.maximum(law.std_at(prediction, theta) ** 2, 1e-6)
    slides = [oof["group"] == name for name in np.unique(oof["group"])]
    spread, widening, factor = fit_spread((oof["y"] - prediction) ** 2, expected, relative, slides)
    draws = law.sample(prediction, np.sqrt(expected * spread * factor[:, None]), 64, seed)
    marginal = np.quantile(y, (np.arange(64) + 0.5) / 64, axis=0)[:, None]
    own = metrics.crps_ensemble(oof["y"], draws).mean(0)
    reference = metrics.crps_ensemble(oof["y"], np.broadcast_to(marginal, draws.shape), fair=False).mean(0)
    skill = np.where(reference > 1e-9, 1 - own / np.maximum(reference, 1e-9), 0.0)  # a constant gene shows no skill
    return {"theta": theta, "spread": spread, "inflation": widening, "skill": skill}


def fit_spread(
    error: np.ndarray, expected: np.ndarray, relative: np.ndarray, slides: list[np.ndarray], rounds: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors on the variance of a count law, one for each gene and one for each spot, that match held-out errors.

    Parameters
    ----------
    error, expected
        Squared held-out errors and the law's variance, n x genes.
    relative
        :meth:`~spatiaflow.models.ood.OutOfDomain.relative` distance of each row.
    slides
        Rows of each slide (bool, n); slides count equally.

    Returns
    -------
    spread (genes), parameters of :func:`~spatiaflow.models.ood.inflation` (4), and the inflation of each row (n)
    """
    factor = np.ones(len(error))
    for _ in range(rounds):  # each given the other
        mean_error = np.mean([(error[s] / factor[s, None]).mean(0) for s in slides], 0)
        spread = np.clip(mean_error / np.mean([expected[s].mean(0) for s in slides], 0), 0.05, 20)
        # over all genes of a spot together: single genes near zero would make the ratio explode
        ratio = error.sum(1) / (expected * spread).sum(1)
        widening = _fit_inflation([ratio[s] for s in slides], [relative[s] for s in slides])
        for s in slides:
            factor[s] = inflation(widening, relative[s])
    return spread, widening, factor


def _fit_inflation(ratio: list[np.ndarray], relative: list[np.ndarray], strength: float = 0.1) -> np.ndarray:
    """Gaussian likelihood in the scale, with a weak prior for a standard deviation in proportion to distance (slopes of 2).

    A few slides of one donor say nothing about another; without the prior no widening would be learned. The many spots
    of a slide do say what distance means inside it: their prior is a hundred times weaker.
    """
    medians = [np.median(z) for z in relative]

    def loss(p):
        fit = 0.5 * strength * ((p[1] - 2) ** 2 + 0.01 * (p[2] - 2) ** 2)
        for r, z, m in zip(ratio, relative, medians):
            log_factor = p[0] + p[1] * m + p[2] * (z - m)
            fit += np.mean(r * np.exp(-log_factor) + log_factor)
        return fit

    return np.append(minimize(loss, [0.0, 2.0, 2.0], bounds=[(-3, 3), (0, 8), (0, 8)]).x, min(medians))


def _mean_pearson(oof, prediction) -> float:
    names = np.unique(oof["group"])
    return float(
        np.mean([np.nanmean(gene_pearson(oof["y"][oof["group"] == n], prediction[oof["group"] == n])) for n in names])
    )
