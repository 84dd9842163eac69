"""Fitting STFlow: folds, networks, stack, and the calibration of its uncertainty."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import torch
from scipy.optimize import minimize

from spatiaflow import metrics
from spatiaflow._settings import logger
from spatiaflow.models import _base
from spatiaflow.models.counts import CountLaw, CountPrior, ImagePrior, library_quantiles
from spatiaflow.models.familiarity import Familiarity, inflation
from spatiaflow.models.flow import interpolate, sample, schedule
from spatiaflow.models.simple import (
    SlideData,
    blocks,
    choose_ridge,
    combine,
    cross_fitted,
    fit_ridge,
    fit_stack,
    gene_pearson,
    slide_graph,
    smooth,
)  # fmt: skip
from spatiaflow.models.spatial import Graph
from spatiaflow.models.stflow import (
    PRIORS,
    Denoiser,
    Preset,
    SlideTokens,
    STFlow,
    standardize,
)  # fmt: skip
from spatiaflow.train.fit import claim, fit
from spatiaflow.train.regions import Regions, WholeSlides

MAX_FOLDS = 5
CALIBRATION_DRAWS = 8


class FlowMatching(L.LightningModule):
    """Endpoint regression along the straight path: loss = MSE(f(y_t, t), y_1)."""

    def __init__(self, denoiser: Denoiser, preset: Preset, weight: np.ndarray):
        super().__init__()
        self.denoiser, self.preset, self.history = denoiser, preset, {}
        self.register_buffer("weight", torch.as_tensor(weight, dtype=torch.float32))  # genes, mean 1

    def configure_optimizers(self):
        p = self.preset
        return torch.optim.AdamW(self.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay, fused=True)

    def endpoint(self, b: dict, y_t, t):
        graph = Graph(b["index"], b["mask"], None)
        out = self.denoiser(b["features"], y_t, t, graph, b["edges"])
        return out + b["base"] if self.preset.residual else out

    def loss(self, prediction, y):
        return (self.weight * (prediction - y) ** 2).mean()

    def training_step(self, b: dict, _):
        t = b["t"] if self.preset.flow else torch.zeros_like(b["t"])
        y_t = interpolate(b["start"], b["y"], t[:, None]) if self.preset.flow else b["start"]
        loss = self.loss(self.endpoint(b, y_t, t), b["y"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(t))
        return loss

    def validation_step(self, b: dict, _):
        times = schedule(self.preset.n_steps) if self.preset.flow else [0.0]
        y = sample(lambda y_t, t: self.endpoint(b, y_t, torch.full_like(b["t"], t)), b["start"], times)
        r = np.nanmean(gene_pearson(b["y"].cpu().numpy(), y.float().cpu().numpy()))
        self.log("val_loss", self.loss(y, b["y"]), batch_size=1)
        self.log("val_pearson", float(r), batch_size=1)


def fit_stflow(
    slides: list[SlideData],
    *,
    genes: list[str],
    encoder: dict,
    target_sum: float | None,
    preset: Preset,
    pitch: float,
    card: dict,
    validation: list[str] | float | None = None,
    max_epochs: int | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    accelerator: str = "cpu",
    devices: int | str = 1,
    precision: str = "32-true",
    seed: int = 0,
) -> STFlow:
    """Fit an STFlow to training slides (raw features, log-normalised expression); every choice is made inside them."""
    if checkpoint_dir is not None:
        claim(
            checkpoint_dir, resume, preset=preset, genes=tuple(genes), target_sum=target_sum, validation=repr(validation),
            max_epochs=max_epochs or preset.max_epochs, seed=seed, slides=tuple(s.name for s in slides),
            data=[value for s in slides for value in (s.xy, s.features, s.counts, s.library)],
        )  # fmt: skip
    features = np.concatenate([s.features for s in slides]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    std = np.where(std < 1e-6, 1.0, std)
    scaled = {
        m: [_with(s, features=standardize(s.features, mean, std, m)) for s in slides] for m in ("global", "slide")
    }
    mode = _choose_standardization(scaled, preset)
    slides = scaled[mode]
    groups, held_out = _folds(slides, validation, preset, seed)
    # between tissues features shift; a slide's own z-scores would hide that from the out-of-domain flag
    apart, _ = _folds(scaled["global"], validation, preset, seed)
    familiarity, distances = Familiarity.fit([np.concatenate([s.features for s in group]) for group in apart])
    alpha, smoothing, _ = choose_ridge(groups)

    y, counts, library = (np.concatenate([getattr(s, n) for s in slides]) for n in ("y", "counts", "library"))
    variance = y.var(0) + 1e-6
    weight = (1 / variance) / (1 / variance).mean() if preset.weighted else np.ones(len(genes))
    full_counts = CountPrior.fit(counts, library, target_sum)  # also gives the predictive law its zero inflation
    ridge = fit_ridge(slides, alpha, smoothing)
    residual_std = np.sqrt(np.mean((np.concatenate(sum(cross_fitted(groups, alpha), [])) - _truth(groups)) ** 2, 0))
    prior = _prior(preset, full_counts, residual_std)

    networks, folds, history = [], [], {}
    for f in held_out:
        rest = [group for i, group in enumerate(groups) if i != f]
        fold = _Fold(rest, groups[f], alpha, preset, target_sum, residual_std)
        where = None if checkpoint_dir is None else Path(checkpoint_dir) / f"fold_{f}"
        network, log = _fit_network(
            fold, preset, weight, f"STFlow {len(networks) + 1}/{len(held_out)}", seed + f, where, resume,
            max_epochs=max_epochs or preset.max_epochs, patience=preset.patience, accelerator=accelerator,
            devices=devices, precision=precision,
        )  # fmt: skip
        for name, values in ({"fold": [f] * len(log.get("epoch", []))} | log).items():
            history.setdefault(name, []).extend(values)
        networks.append(network)
        folds.append(fold.predict(network, smoothing, seed))
    oof = {name: np.concatenate([fold[name] for fold in folds], axis=-2 if name == "parts" else 0) for name in folds[0]}

    n_genes = len(genes)
    level, weights = np.array([0.0, 0.0, 1.0]), np.repeat([[0.0], [0.0], [1.0]], n_genes, 1)  # the network alone
    if preset.stack and len(oof["y"]) > 1:
        level, weights = fit_stack(oof["y"], oof["parts"], oof["mean"], oof["group"])
    prediction = combine(oof["parts"], oof["mean"], level, weights, oof["group"])
    arrays = {
        "feature_mean": mean, "feature_std": std, "mean": y.mean(0), "level": level, "weights": weights,
        "between": oof["between"].mean(0) * weights[2] ** 2, "libraries": library_quantiles(library), "pi": full_counts.pi,
        **{f"familiarity_{name}": value for name, value in vars(familiarity).items()},
    }  # fmt: skip
    relative = familiarity.relative(np.concatenate([distances[f] for f in held_out]))
    arrays |= _calibrate(oof, prediction, arrays, target_sum, relative, y, seed)
    parts = dict(zip(("ridge", "smoothed ridge", "network"), oof["parts"])) | {"model": prediction}
    scores = {name: _mean_pearson(oof, value) for name, value in parts.items()}
    logger.info("held-out Pearson inside the training slides: %s", ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    card = card | {"standardize": mode, "transductive": mode == "slide", "scores": scores, "seed": seed}
    return STFlow(
        preset=preset, genes=genes, encoder=encoder, target_sum=target_sum, networks=networks, prior=prior, ridge=ridge,
        arrays={k: np.asarray(v, np.float64) for k, v in arrays.items()}, standardize=mode, pitch=pitch, history=history,
        card=card,
    )  # fmt: skip


def _choose_standardization(scaled: dict[str, list[SlideData]], preset: Preset) -> str:
    if preset.standardize != "choose":
        return preset.standardize
    if len(scaled["global"]) < 3:
        return "global"
    scores = {mode: choose_ridge(_groups(slides, 0))[2] for mode, slides in scaled.items()}
    logger.info("standardisation by leave-one-slide-out ridge: %s", scores)
    return max(scores, key=scores.get)


def _groups(slides: list[SlideData], seed: int) -> list[list[SlideData]]:
    """Slides in at most MAX_FOLDS groups; one or two slides are cut into contiguous blocks first."""
    if len(slides) < 3:
        slides = [block for s in slides for block in blocks(s, min(4 // len(slides), max(1, len(s) // 2)))]
    order = np.random.default_rng(seed).permutation(len(slides)) if len(slides) > MAX_FOLDS else range(len(slides))
    n = min(MAX_FOLDS, len(slides))
    return [[slides[i] for i in list(order)[g::n]] for g in range(n)]


def _folds(slides, validation, preset, seed) -> tuple[list[list[SlideData]], list[int]]:
    """Return groups of slides, and which of them are held out in turn."""
    if validation is None:
        groups = _groups(slides, seed)
        if len(groups) < 2:
            raise ValueError("one spot is not enough to train on; at least 2 spots (4 for sensible folds) are needed.")
        return groups, list(range(len(groups))) if preset.stack else [
            int(np.random.default_rng(seed).integers(len(groups)))
        ]
    if isinstance(validation, float):
        pieces = [blocks(s, max(2, round(1 / validation))) for s in slides]
        last = [p.pop(int(np.random.default_rng([seed, i]).integers(len(p)))) for i, p in enumerate(pieces)]
        rest = [block for p in pieces for block in p]
    else:
        last = [s for s in slides if s.name in validation]
        rest = [s for s in slides if s.name not in validation]
    groups = _groups(rest, seed) if len(rest) > 1 else [rest]
    return [*groups, last], [len(groups)]


def _with(slide: SlideData, **changes) -> SlideData:
    return SlideData(**(vars(slide) | changes))


def _truth(groups) -> np.ndarray:
    return np.concatenate([s.y for group in groups for s in group])


def _prior(preset: Preset, counts: CountPrior, residual_std: np.ndarray):
    if preset.prior == "counts":
        return counts
    return ImagePrior(0.5 * residual_std) if preset.prior == "image" else PRIORS[preset.prior]()


class _Fold:
    """Training and held-out slides of one fold, each with the simple prediction of models that never saw it."""

    def __init__(self, rest, held_out, alpha, preset, target_sum, residual_std):
        self.preset, training = preset, [s for group in rest for s in group]
        self.ridge = fit_ridge(training, alpha)
        self.mean = np.concatenate([s.y for s in training]).mean(0)
        bases = sum(cross_fitted(rest, alpha), [])
        self.training = [_with(s, base=base) for s, base in zip(training, bases)]
        self.held_out = [_with(s, base=self.ridge.predict(s.features)) for s in held_out]
        counts = None
        if preset.prior == "counts":
            counts = CountPrior.fit(
                np.concatenate([s.counts for s in training]), np.concatenate([s.library for s in training]), target_sum
            )
        self.prior = _prior(preset, counts, residual_std)

    def predict(self, network: Denoiser, smoothing: float, seed: int) -> dict[str, np.ndarray]:
        """Out-of-fold predictions of ridge, smoothed ridge and network, and the network's between-draw variance."""
        stand_in = SimpleNamespace(
            preset=self.preset, networks=[network.eval()], prior=self.prior, genes=range(len(self.mean))
        )
        n_draws = 1 if not self.preset.flow or self.prior.deterministic else CALIBRATION_DRAWS
        times = schedule(self.preset.n_steps) if self.preset.flow else [0.0]
        rows = []
        for i, s in enumerate(self.held_out):
            tokens = SlideTokens(s.features, s.xy, s.base, stand_in, "cpu", 512)
            draws = np.stack([tokens.run(np.random.default_rng([seed, i, d]), times) for d in range(n_draws)])
            parts = np.stack([s.base, smooth(s.base, slide_graph(s), smoothing), draws.mean(0)])
            between = draws.var(0, ddof=1) if n_draws > 1 else np.zeros_like(s.y)
            rows.append({
                "parts": parts, "between": between, "y": s.y, "counts": s.counts, "library": s.library,
                "features": s.features, "mean": np.broadcast_to(self.mean, s.y.shape),
                "group": np.full(len(s), s.name),
            })  # fmt: skip
        return {k: np.concatenate([r[k] for r in rows], axis=-2 if k == "parts" else 0) for k in rows[0]}


def _fit_network(fold: _Fold, preset, weight, description, seed, where, resume, **options):
    """Train one network; a finished one in ``where`` is taken from there when resuming."""
    torch.manual_seed(seed)
    n_features, n_genes = fold.training[0].features.shape[1], fold.training[0].y.shape[1]
    module = FlowMatching(Denoiser(preset.denoiser(n_features, n_genes)), preset, weight)
    with torch.no_grad():  # start at the training mean
        for layer in module.denoiser.layers:
            layer.head[4].bias.copy_(torch.as_tensor(0.0 * fold.mean if preset.residual else fold.mean))
    if where is not None:
        finished = where / "finished.safetensors"
        if resume and finished.exists():
            try:
                description, tensors = _base.read(finished)
                module.denoiser.load_state_dict(tensors)
                return module.denoiser, description["history"]
            except ValueError:
                logger.warning("%s is damaged: its network is finished again from the last checkpoint", finished)
        where.mkdir(parents=True, exist_ok=True)
    fit(
        module, Regions(fold.training, preset, fold.prior, seed), WholeSlides(fold.held_out, preset, fold.prior, seed),
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
        :meth:`~spatiaflow.models.familiarity.Familiarity.relative` distance of each row.
    slides
        Rows of each slide (bool, n); slides count equally.

    Returns
    -------
    spread (genes), parameters of :func:`~spatiaflow.models.familiarity.inflation` (4), and the inflation of each row (n)
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
