"""STFlow: gene expression of all spots of a slide, jointly, from histology features by flow matching.

Huang et al., ICML 2025 (arXiv 2506.05361), written from the paper. The network of the paper is ``config="paper"``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from spatiaflow.models import _base
from spatiaflow.models.counts import (
    CountLaw,
    CountPrior,
    GaussianPrior,
    ImagePrior,
    ScalarZINB,
    Spread,
    ZeroPrior,
    log_normalize,
)
from spatiaflow.models.denoiser import Denoiser, DenoiserConfig, SlideTokens
from spatiaflow.models.field_flow import FieldFlows, Moves
from spatiaflow.models.flow import schedule
from spatiaflow.models.law import JointLaw
from spatiaflow.models.members import NAMES, SMOOTHED_OVER, SMOOTHING, Members
from spatiaflow.models.ood import OutOfDomain
from spatiaflow.models.regression import blocks, combine, own_spots, smooth
from spatiaflow.models.slide import ABSENT, Reordered, Slide
from spatiaflow.models.spatial import spatial_graph


@dataclass(frozen=True)
class STFlowConfig(_base.Config):
    """Everything that shapes an STFlow fit: ``"default"``, ``"paper"`` (the published configuration), or your own.

    Attributes
    ----------
    width, n_heads, n_layers, n_neighbors, ties, geometry, dropout, head_dropout, time_scale
        The network; see :class:`DenoiserConfig`. ``n_neighbors=0`` removes spatial context; ``geometry="distance"``
        removes direction.
    flow
        False trains the deterministic twin: the same network at t = 0 from a zero start, one pass.
    prior
        ``"zero"``, ``"gaussian"``, ``"zinb"`` (the paper's scalar one), ``"counts"`` (NB or ZINB for each gene) or
        ``"image"`` (ridge prediction, cross-fitted, plus noise).
    residual
        The network predicts the difference to the (cross-fitted) ridge prediction.
    weighted
        The loss weighs each gene by the inverse of its variance.
    stack
        Cross-fit one network for each fold, average them, and stack them with the simple models of
        :mod:`spatiaflow.models.members` on held-out slides. Flows from draws of the joint law's field are trained beside them
        (:mod:`spatiaflow.models.field_flow`). False: one network, held-out slides only decide when to stop.
    standardize
        ``"global"``, ``"slide"`` (each slide by its own mean and deviation; transductive) or ``"choose"`` (by
        leave-one-slide-out ridge).
    regions, regions_per_batch
        Contiguous regions drawn from each slide in an epoch, and how many make a batch.
    learning_rate, weight_decay, max_epochs, patience
        The optimiser (AdamW), the longest training, and the epochs without improvement after which it stops.
    devices, precision
        Passed to :class:`lightning.Trainer`.

    Examples
    --------
    Without spatial context:

    >>> from dataclasses import replace
    >>> alone = replace(sf.models.STFlowConfig.of("default"), n_neighbors=0)
    >>> model = sf.tl.train_stflow(adata, genes=3, config=alone, max_epochs=1)
    """

    width: int = 128
    n_heads: int = 4
    n_layers: int = 4
    n_neighbors: int = 8
    ties: str = "cut"
    geometry: str = "frames"
    dropout: float = 0.2
    head_dropout: float = 0.2
    time_scale: float = 1.0
    flow: bool = True
    prior: str = "zinb"
    residual: bool = False
    weighted: bool = False
    stack: bool = False
    standardize: str = "global"
    n_steps: int = 5
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    regions: int = 10
    regions_per_batch: int = 2
    max_epochs: int = 100
    patience: int = 20
    devices: int | str = 1
    precision: str = "32-true"

    def denoiser(self, n_features: int, n_genes: int) -> DenoiserConfig:
        """The network's configuration for given input and output widths."""
        names = [f.name for f in fields(DenoiserConfig) if f.name not in ("n_features", "n_genes")]
        return DenoiserConfig(n_features, n_genes, **{name: getattr(self, name) for name in names})


STFlowConfig.named = {
    "paper": STFlowConfig(),
    "default": STFlowConfig(
        width=64, n_layers=2, ties="whole", geometry="invariants", head_dropout=0.0, time_scale=1000.0, prior="counts",
        weighted=True, stack=True, standardize="choose", learning_rate=2e-3, weight_decay=0.05, max_epochs=60,
    ),
}  # fmt: skip


STACKS = ("weights", "rate_weights")  # of a measurement, and of what the depth of a spot does not explain


@dataclass
class Prediction:
    """What :meth:`STFlow.predict` returns; rows of all slides, one slide after the other."""

    mean: np.ndarray  # n x genes, log1p, of a measurement at the depth that the image shows
    rate: np.ndarray  # n x genes, share of a gene in the counts of a spot of any depth
    std: np.ndarray  # n x genes
    ood: np.ndarray  # n, in [0, 1]
    depth: np.ndarray  # n, predicted library size
    degenerate_share: float  # share of spots without a unique frame; 0 where the geometry needs none
    standardized_on: list[int]  # of each slide: its own spots that features were scaled by; 0: the training data
    n_glass: int  # rows that stand on no tissue


class STFlow(_base.Model):
    """A fitted predictor of expression from histology: networks, simple models, their stack, and the joint law.

    Made by :func:`spatiaflow.tl.train_stflow` or :func:`spatiaflow.models.load`.

    Attributes
    ----------
    genes
        Names of the predicted genes.
    encoder
        Provenance of the features it was trained on.
    skill
        Per-gene CRPS skill over the gene's marginal distribution on held-out training slides.
    law
        Joint law of the deviations from the mean, :class:`spatiaflow.models.law.JointLaw`.
    field_flows
        Flows that draws of the law's field pass through, :class:`spatiaflow.models.field_flow.FieldFlows`, or None;
        ``card["law"]`` says why. Slides of a new donor pass through them only if they were chosen by leaving donors out,
        which takes four.
    history
        Dict of lists, one entry an epoch.
    card
        Training data, settings and scores.

    Examples
    --------
    >>> path = model.save("stflow.safetensors")
    >>> sf.models.load(path).genes == model.genes
    True
    """

    verb = "sf.tl.predict_expression"

    def __init__(
        self, *, config: STFlowConfig, genes: list[str], encoder: dict, target_sum: float | None, networks: list[Denoiser],
        prior: Any, members: Members, law: JointLaw, arrays: dict[str, np.ndarray], standardize: str, pitch: float,
        history: dict, card: dict, field_flows: FieldFlows | None = None,
    ):  # fmt: skip
        self.config, self.genes, self.encoder, self.target_sum = config, list(genes), dict(encoder), target_sum
        self.networks, self.prior, self.members, self.law = networks, prior, members, law
        self.field_flows = field_flows
        # mean, theta, skill (genes); trusted (same donor, new donor x genes); level (members); weights and rate_weights (members
        # x genes, the network last); libraries (quantiles); three of the out-of-domain score
        self.arrays, self.history, self.card = arrays, history, card
        self.standardize, self.pitch = standardize, pitch
        for network in networks:
            network.eval()

    @property
    def skill(self) -> np.ndarray:
        return self.arrays["skill"]

    def trusted(self, new_donor: bool = True) -> np.ndarray:
        """Genes whose pattern is predicted, bool; at most one in ten is wrong, see :func:`spatiaflow.train.trust.trusted`."""
        return self.arrays["trusted"][int(new_donor)].astype(bool)

    def __repr__(self) -> str:
        return (
            f"STFlow: {len(self.genes)} genes from {self.encoder.get('n_features')} features of "
            f"{self.encoder.get('id')!r}, {len(self.networks)} network(s), median skill {np.median(self.skill):.3f}"
        )

    @cached_property
    def counting(self) -> CountLaw:
        """Between log expression, as it is predicted, and rates of counts."""
        return CountLaw(self.arrays["libraries"], self.target_sum, np.zeros(()))

    @cached_property
    def spread(self) -> Spread:
        """Of measured values around their mean."""
        return Spread(self.arrays["libraries"], self.target_sum)

    @cached_property
    def ood(self) -> OutOfDomain:
        """How far features are from the training data."""
        return OutOfDomain(*(self.arrays[f"ood_{name}"] for name in ("components", "references", "distances")))

    def ood_score(self, slide: Slide) -> np.ndarray:
        """How far each row's features are from the training data, n, float32 in [0, 1]: a quantile among the training rows."""
        self._check(slide)
        points = self.members.scaled(slide.features, "global").apply(lambda x: x @ self.ood.components)
        return self.ood.quantile(self.ood.at(points)).astype(np.float32)

    def donor_effect(self, new_donor: bool) -> str:
        """What uncertainty of a slide's level rests on: ``"same donor"``, ``"learned"`` or ``"prior, not learned"``."""
        return ("learned" if self.law.donors_learned else "prior, not learned") if new_donor else "same donor"

    @property
    def usual_depth(self) -> float:
        """Median library size of the training data; the mean where expression is log1p of raw counts."""
        return float((np.mean if self.target_sum is None else np.median)(self.arrays["libraries"]))

    def predict(
        self, slides: list[Slide], *, n_samples: int = 1, n_steps: int | None = None, new_donor: bool = True, seed: int = 0,
        batch_size: int = 512, device: str | torch.device = "cpu", progress: Callable[[list[Slide]], Iterable[Slide]] = iter,
    ) -> Prediction:  # fmt: skip
        """Predict every row of some slides (algorithm 1 of the paper).

        Parameters
        ----------
        slides
            With features as the encoder gave them. Noise belongs to the seed, the slide's name and the name of the row.
            Rows that stand on no tissue are given the training mean and change nothing for the others.
        n_samples
            Draws from the prior, of which the network's mean is taken.
        n_steps
            Evaluations of the network for each draw; the config's when None.
        new_donor
            Whether the donors of the slides are not in the training data.
        batch_size
            Tokens worked on at a time; changes memory, not the result.
        progress
            Wraps the list of slides in a progress bar.
        """
        for slide in slides:
            self._check(slide)
        self._check_samples(n_samples)
        theta, parts = self.law.marginal_theta(new_donor), []
        for slide in progress(slides):
            (expected, of_rates), degenerate = self._means(slide, STACKS, n_samples, n_steps, seed, batch_size, device)
            rate = self._rate(of_rates)
            if (flows := self._flows(new_donor)) is not None:
                self._move_means(flows, slide, rate, expected)
            parts.append((
                expected, rate, self.spread(expected, theta), self.ood_score(slide),
                np.exp(self.members.log_depth(slide)).astype(np.float32), degenerate,
            ))  # fmt: skip
        mean, rate, std, ood, depth = (np.concatenate([part[i] for part in parts]) for i in range(5))
        return Prediction(
            mean, rate, std, ood, depth, sum(part[5] for part in parts) / max(len(mean), 1),
            [own_spots(self.standardize, int(s.on_tissue.sum())) for s in slides],
            sum(int((~s.on_tissue).sum()) for s in slides),
        )  # fmt: skip

    def draws(
        self, slide: Slide, n_draws: int, *, depth: float | np.ndarray | None = None, new_donor: bool = True, seed: int = 0,
        batch_size: int = 512, device: str | torch.device = "cpu",
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yield joint draws of the log-normalised expression of a slide, n x genes each, float32; NaN on glass.

        Parameters
        ----------
        slide
            With features as the encoder gave them.
        depth
            Library size of the spots that are drawn, one or n; the median of the training data when None.
        new_donor
            Whether the slide's donor is not in the training data.

        Notes
        -----
        Noise belongs to the seed and the names of slide and rows: the order of rows and ``batch_size`` change nothing.
        """
        self._check(slide)
        order = _by_name(slide)
        out = np.full((len(slide), len(self.genes)), np.nan, np.float32)
        if not len(order):
            for _ in range(n_draws):
                yield out.copy()
            return
        (of_rates,), _ = self._means(slide.take(order), STACKS[1:], 1, None, seed, batch_size, device)
        log_mean = np.log(self._rate(of_rates))
        size = np.broadcast_to(np.asarray(self.usual_depth if depth is None else depth, np.float64), len(slide))[order]
        flows = self._flows(new_donor)
        moves = None if flows is None else self._moves(flows, slide, order, log_mean)
        for counts in self.law.draws(
            slide.name, slide.xy[order], log_mean, size, n_draws, new_donor=new_donor, seed=seed,
            move=None if moves is None else moves.of_draws(n_draws),
        ):  # fmt: skip
            values = out.copy()
            values[order] = log_normalize(counts, size, self.target_sum)
            yield values

    def _flows(self, new_donor: bool) -> FieldFlows | None:
        """Flows for a slide; what was judged within donors says nothing of a new one."""
        flows = self.field_flows
        return None if flows is None or (new_donor and not flows.for_new_donors) else flows

    def _moves(self, flows: FieldFlows, slide: Slide, order: np.ndarray, log_mean: np.ndarray) -> Moves:
        """How flows move draws of some rows of a slide."""
        scaled = self.members.scaled(Reordered(slide.features, order), self.standardize)
        return Moves(flows, scaled, slide.xy[order], log_mean)

    def _move_means(self, flows: FieldFlows, slide: Slide, rate: np.ndarray, expected: np.ndarray) -> None:
        """Move rates and mean log expression of all rows, n x genes, as flows move the mean of draws; in place."""
        if not len(order := _by_name(slide)):
            return
        by = self._moves(flows, slide, order, np.log(rate[order])).mean()
        for part in blocks(len(order)):
            rows, theta = order[part], self.arrays["theta"]
            rate[rows] *= np.exp(by[part])
            expected[rows] = self.counting.mean_at(
                np.log(self.counting.rate_at(expected[rows], theta)) + by[part], theta
            )

    def simple_prediction(self, features: np.ndarray, xy: np.ndarray | None = None) -> np.ndarray:
        """Ridge regression alone, for one slide, n x genes; smoothed over neighbours when positions are given."""
        base = self.members.scaled(features, self.standardize).apply(self.members.ridges[self.standardize].predict)
        return base if xy is None else smooth(base, spatial_graph(xy, SMOOTHED_OVER), SMOOTHING)

    def _check(self, slide: Slide) -> None:
        width = len(self.members.mean)
        if slide.features.shape[1] != width:
            raise ValueError(
                f"the model was trained on {width} features of encoder {self.encoder.get('id')!r}; slide {slide.name!r} has "
                f"{slide.features.shape[1]}."
            )

    def _check_samples(self, n_samples: int) -> None:
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, not {n_samples}.")
        if n_samples > 1 and (not self.config.flow or self.prior.deterministic):
            raise ValueError(
                f"n_samples={n_samples} needs a prior with noise; this model's prior ({self.config.prior!r}, "
                f"flow={self.config.flow}) is deterministic: every draw is the same. Use n_samples=1."
            )

    def _rate(self, expression: np.ndarray) -> np.ndarray:
        """Rates whose mean log expression, at the library sizes of the training data, is this; n x genes, float32."""
        out = np.empty(expression.shape, np.float32)
        for rows in blocks(len(out)):
            out[rows] = self.counting.rate_at(expression[rows], self.arrays["theta"])
        return out

    def _means(
        self, slide: Slide, stacks: tuple[str, ...], n_samples: int, n_steps: int | None, seed: int, batch_size: int,
        device: str | torch.device,
    ) -> tuple[np.ndarray, float]:  # fmt: skip
        """Log expression (stacks x n x genes) in the slide's order, the training mean on glass; rows without a unique frame."""
        a, weights = self.arrays, np.stack([self.arrays[name] for name in stacks])
        order = _by_name(slide)
        mean, degenerate = np.tile(a["mean"].astype(np.float32), (len(stacks), len(slide), 1)), [0.0]
        if not len(order):
            return mean, 0.0
        tissue = replace(slide, features=ABSENT).take(order)
        tissue = replace(tissue, features=cast("Any", Reordered(slide.features, order)))
        wanted = (a["level"] > 0) | (weights > 0).any((0, 2))

        def parts() -> Iterator[np.ndarray]:
            yield from self.members.predictions(
                tissue, lambda log_rate: self.counting.mean_at(log_rate, a["theta"]), wanted[:-1]
            )
            if wanted[-1]:
                values, degenerate[0] = self._network(tissue, n_samples, n_steps, seed, batch_size, device)
                yield values

        mean[:, order] = combine(parts(), a["mean"], a["level"], weights)
        if bad := int((~np.isfinite(mean)).any((0, 2)).sum()):
            raise ValueError(
                f"slide {slide.name!r}: the prediction is not finite in {bad} rows. Are features (obsm) on the scale of the "
                f"training data? The largest is {np.abs(slide.features).max():.3g}."
            )
        return mean, degenerate[0]

    def _network(
        self, slide: Slide, n_samples: int, n_steps: int | None, seed: int, batch_size: int, device: str | torch.device
    ) -> tuple[np.ndarray, float]:
        """Mean of the networks over draws from the prior, n x genes; rows without a unique frame."""
        x, base = self.members.scaled(slide.features, self.standardize), None
        if self.config.residual or self.config.prior == "image":
            base = x.apply(self.members.ridges[self.standardize].predict)
        network = self.networks[0].config
        tokens = SlideTokens(x, slide.xy, base, network, self.prior, self.config.residual, device, batch_size)
        times = schedule(n_steps or self.config.n_steps) if self.config.flow else [0.0]
        seeds = [[seed, zlib.crc32(slide.name.encode()), draw] for draw in range(n_samples)]
        return tokens.mean(self.networks, seeds, times), tokens.degenerate_share * len(x)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        groups = {"array": self.arrays, "members": self.members.tensors(), "law": self.law.tensors()}
        if self.field_flows is not None:
            groups["field_flows"] = self.field_flows.tensors()
        tensors = {
            f"{group}.{name}": torch.from_numpy(np.array(value))
            for group, found in groups.items()
            for name, value in found.items()
        }
        for i, network in enumerate(self.networks):
            tensors |= {f"network.{i}.{name}": value for name, value in network.state_dict().items()}
        prior = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self.prior).items()}
        description = {
            "config": asdict(self.config), "genes": self.genes, "encoder": self.encoder, "target_sum": self.target_sum,
            "n_networks": len(self.networks), "prior": prior, "standardize": self.standardize, "pitch": self.pitch,
            "members": NAMES, "history": self.history, "card": self.card,
        }  # fmt: skip
        return description, tensors

    @classmethod
    def from_state(cls, d: dict, tensors: dict[str, Tensor]) -> STFlow:
        """Rebuild a model from the description and tensors of its file."""
        if tuple(d.get("members", ())) != NAMES or "array.rate_weights" not in tensors:
            raise ValueError("its stack has other members than this version's, or none for rates; train it again")

        def under(start: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(start): v.numpy() for k, v in tensors.items() if k.startswith(start)}

        config, members = STFlowConfig(**d["config"]), Members.of(under("members."))
        networks = []
        for i in range(d["n_networks"]):
            network = Denoiser(config.denoiser(len(members.mean), len(d["genes"])))
            start = f"network.{i}."
            _base.fill(network, {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            networks.append(network)
        prior = {k: np.asarray(v) if isinstance(v, list) else v for k, v in d["prior"].items()}
        names = ("genes", "encoder", "target_sum", "standardize", "pitch", "history", "card")
        flows = under("field_flows.")
        return cls(
            config=config, networks=networks, prior=PRIORS[config.prior](**prior), members=members,
            law=JointLaw.of(under("law.")), arrays=under("array."), field_flows=FieldFlows.of(flows) if flows else None,
            **{name: d[name] for name in names},
        )  # fmt: skip


def _by_name(slide: Slide) -> np.ndarray:
    """Rows on tissue in the order of their names: noise goes by name, not by row."""
    order = np.argsort(slide.obs_names.astype(str), kind="stable")
    return order[slide.on_tissue[order]]


PRIORS = {"zero": ZeroPrior, "gaussian": GaussianPrior, "zinb": ScalarZINB, "counts": CountPrior, "image": ImagePrior}
