"""STFlow: gene expression of all spots of a slide, jointly, from histology features by flow matching.

Huang et al., ICML 2025 (arXiv 2506.05361), written from the paper. The network of the paper is ``config="paper"``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models import _base
from spatiaflow.models.counts import CountLaw, CountPrior, GaussianPrior, ImagePrior, ScalarZINB, ZeroPrior
from spatiaflow.models.flow import sample, schedule, time_features
from spatiaflow.models.ood import OutOfDomain, inflation
from spatiaflow.models.regression import Ridge, combine, own_spots, smooth, standardize
from spatiaflow.models.slide import ABSENT, Slide
from spatiaflow.models.spatial import GEOMETRY, GatedMLP, Graph, LocalAttention, degenerate_share, spatial_graph


@dataclass
class DenoiserConfig:
    """Hyper-parameters of the denoiser; the defaults are the paper's."""

    n_features: int
    n_genes: int
    width: int = 128
    n_heads: int = 4
    n_layers: int = 4
    n_neighbors: int = 8
    ties: str = "cut"
    geometry: str = "frames"
    dropout: float = 0.2
    head_dropout: float = 0.2  # on the predicted genes themselves
    time_scale: float = 1.0


class Layer(nn.Module):
    """Local attention, gated feed-forward, and the head that replaces the expression the next layer compares."""

    def __init__(self, c: DenoiserConfig):
        super().__init__()
        self.attention = LocalAttention(c.width, c.n_heads, GEOMETRY[c.geometry][1], c.n_genes, c.dropout)
        self.context = GatedMLP(2 * c.width, c.width, c.width)
        self.feed_forward = GatedMLP(c.width, 4 * c.width, c.width)
        self.dropout = nn.Dropout(c.dropout)
        self.head = nn.Sequential(
            nn.Linear(c.width, c.width),
            nn.GELU(),
            nn.LayerNorm(c.width),
            nn.Dropout(c.dropout),
            nn.Linear(c.width, c.n_genes),
            nn.Dropout(c.head_dropout),
        )

    def forward(self, h: Tensor, y: Tensor, graph: Graph, geometry: Tensor) -> tuple[Tensor, Tensor]:
        """Update all tokens."""
        return self.update(h, y, *self.attention.keys(h, y), graph.index, graph.mask, geometry)

    def forward_in_place(
        self, h: Tensor, y: Tensor, graph: Graph, geometry: Tensor, scratch: list[Tensor], rows: int
    ) -> None:
        """Do the same ``rows`` tokens at a time, into ``h`` and ``y``; keys and values go into ``scratch``."""
        key, value = scratch
        parts = [slice(s, s + rows) for s in range(0, len(h), rows)]
        for p in parts:
            key[p], value[p] = self.attention.keys(h[p], y[p])
        for p in parts:  # other tokens are seen through their keys and values only
            h[p], y[p] = self.update(h[p], y[p], key, value, graph.index[p], graph.mask[p], geometry[p])

    def update(
        self, h: Tensor, y: Tensor, key: Tensor, value: Tensor, index: Tensor, mask: Tensor, geometry: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = h + self.dropout(self.context(self.attention.attend(h, y, key, value, index, mask, geometry)))
        h = h + self.dropout(self.feed_forward(h))
        return h, self.head(h)


class Denoiser(nn.Module):
    """Predict the endpoint y_1 of the flow from histology features, noisy expression y_t and time t."""

    layers: Any  # ModuleList of Layer

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        self.config = config
        self.image = nn.Linear(config.n_features, config.width)
        self.time = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))

    def edges(self, graph: Graph) -> Tensor:
        """Raw edge features of a graph, n x k x frames x f."""
        return GEOMETRY[self.config.geometry][0](graph)

    def forward(self, features: Tensor, y: Tensor, t: Tensor, graph: Graph, edges: Tensor) -> Tensor:
        """Return the predicted endpoint.

        Parameters
        ----------
        features, y
            n x n_features and n x n_genes.
        t
            Time of every token, n.
        graph, edges
            From :func:`~spatiaflow.models.spatial.spatial_graph` and :meth:`edges`.
        """
        tau = self.time(time_features(t, scale=self.config.time_scale))
        return self.decode(
            self.image(features) + tau, y, graph, [layer.attention.geometry(edges) for layer in self.layers]
        )

    def decode(self, h: Tensor, y: Tensor, graph: Graph, geometry: list[Tensor], rows: int = 0) -> Tensor:
        """Run the layers on tokens ``h`` with geometry embedded beforehand; the mean of their gene heads.

        ``rows`` > 0 works through that many tokens at a time (inference only; ``h`` is overwritten), with the same
        result in the memory of one layer.
        """
        total = torch.zeros_like(y)
        if rows:
            c, y = self.layers[0].attention, y.clone()
            scratch = [h.new_empty(len(h), c.n_heads, m) for m in (c.score.inner.out_features, c.head)]
        for layer, embedded in zip(self.layers, geometry):
            if rows:
                layer.forward_in_place(h, y, graph, embedded, scratch, rows)
            else:
                h, y = layer(h, y, graph, embedded)
            total = total.add_(y) if rows else total + y
        return total / len(self.layers)


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
        Cross-fit one network for each training slide, average them, and stack them with mean, ridge and smoothed
        ridge on held-out slides. False: one network, held-out slides only decide when to stop.
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


@dataclass
class Prediction:
    """What :meth:`STFlow.predict` returns; rows of all slides, one slide after the other."""

    mean: np.ndarray  # n x genes, log1p
    std: np.ndarray  # n x genes
    ood: np.ndarray  # n, in [0, 1]
    between_share: float  # share of the between-draw in the total variance
    degenerate_share: float  # share of spots without a unique frame; 0 where the geometry needs none
    standardized_on: list[int]  # of each slide: its own spots that features were scaled by; 0: the training data
    n_glass: int  # rows that stand on no tissue


class STFlow(_base.Model):
    """A fitted predictor of expression from histology: networks, simple models, their stack, and the predictive law.

    Made by :func:`spatiaflow.tl.train_stflow` or :func:`spatiaflow.models.load`.

    Attributes
    ----------
    genes
        Names of the predicted genes.
    encoder
        Provenance of the features it was trained on.
    skill
        Per-gene CRPS skill over the gene's marginal distribution on held-out training slides; at or below 0 the gene
        is not to be trusted.
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
        prior: Any, ridge: Ridge, arrays: dict[str, np.ndarray], standardize: str, pitch: float, history: dict, card: dict,
    ):  # fmt: skip
        self.config, self.genes, self.encoder, self.target_sum = config, list(genes), dict(encoder), target_sum
        self.networks, self.prior, self.ridge, self.standardize, self.pitch = networks, prior, ridge, standardize, pitch
        # feature_mean, feature_std (F); mean, theta, pi, spread, between, skill (genes); level (3) and weights (3 x genes) of
        # ridge, smoothed ridge and network; libraries; inflation (4); three of the out-of-domain score
        self.arrays, self.history, self.card = arrays, history, card
        for network in networks:
            network.eval()

    @property
    def skill(self) -> np.ndarray:
        return self.arrays["skill"]

    def __repr__(self) -> str:
        return (
            f"STFlow: {len(self.genes)} genes from {self.encoder.get('n_features')} features of "
            f"{self.encoder.get('id')!r}, {len(self.networks)} network(s), median skill {np.median(self.skill):.3f}"
        )

    @cached_property
    def law(self) -> CountLaw:
        """The predictive distribution of counts."""
        return CountLaw(self.arrays["libraries"], self.target_sum, self.arrays["pi"])

    @cached_property
    def ood(self) -> OutOfDomain:
        """How far features are from the training data."""
        return OutOfDomain(*(self.arrays[f"ood_{name}"] for name in ("components", "references", "distances")))

    def predict(
        self, slides: list[Slide], *, n_samples: int = 1, n_steps: int | None = None, seed: int = 0, batch_size: int = 512,
        device: str | torch.device = "cpu", progress: Callable[[list[Slide]], Iterable[Slide]] = iter,
    ) -> Prediction:  # fmt: skip
        """Predict every row of some slides (algorithm 1 of the paper).

        Parameters
        ----------
        slides
            With features as the encoder gave them. Noise belongs to the seed, the slide's name and the name of the row.
            Rows that stand on no tissue are given the training mean and change nothing for the others.
        n_samples
            Draws from the prior.
        n_steps
            Evaluations of the network for each draw; the config's when None.
        batch_size
            Tokens worked on at a time; changes memory, not the result.
        progress
            Wraps the list of slides in a progress bar.
        """
        width = len(self.arrays["feature_mean"])
        for slide in slides:
            if slide.features.shape[1] != width:
                raise ValueError(
                    f"the model was trained on {width} features of encoder {self.encoder.get('id')!r}; slide {slide.name!r} has "
                    f"{slide.features.shape[1]}."
                )
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, not {n_samples}.")
        if n_samples > 1 and (not self.config.flow or self.prior.deterministic):
            raise ValueError(
                f"n_samples={n_samples} needs a prior with noise; this model's prior ({self.config.prior!r}, "
                f"flow={self.config.flow}) is deterministic: every draw is the same. Use n_samples=1."
            )
        times = schedule(n_steps or self.config.n_steps) if self.config.flow else [0.0]
        parts = []
        for slide in progress(slides):
            order = np.argsort(slide.obs_names.astype(str), kind="stable")  # noise goes by name, not by row
            one = self._predict_slide(slide.take(order), times, n_samples, seed, batch_size, device)
            back = np.argsort(order)
            parts.append((one[0][back], one[1][back], one[2][back], *one[3:]))
        mean, variance, ood, between, degenerate = zip(*parts)
        n_rows, total = sum(map(len, mean)), sum(float(v.sum()) for v in variance)
        return Prediction(
            np.concatenate(mean), np.sqrt(np.concatenate(variance)), np.concatenate(ood), sum(between) / max(total, 1e-12),
            sum(degenerate) / n_rows, [own_spots(self.standardize, int(s.on_tissue.sum())) for s in slides],
            sum(int((~s.on_tissue).sum()) for s in slides),
        )  # fmt: skip

    def _predict_slide(
        self, slide: Slide, times: list[float], n_samples: int, seed: int, batch_size: int, device: str | torch.device
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
        """Mean, variance and out-of-domain score; the sum of the between-draw variance; rows without a unique frame."""
        a, tissue, degenerate = self.arrays, slide.on_tissue, 0.0
        mean = np.tile(a["mean"].astype(np.float32), (len(slide), 1))
        between = np.zeros(mean.shape)
        if tissue.any():
            mean[tissue], between[tissue], degenerate = self._mean(
                slide if tissue.all() else slide.take(tissue), times, n_samples, seed, batch_size, device
            )
        distance = self.ood(standardize(slide.features, a["feature_mean"], a["feature_std"], "global"))
        relative = self.ood.relative(distance)
        # std^2 = between-draw + residual variance; one draw takes the between-draw variance seen in validation
        between = np.broadcast_to(a["between"], mean.shape) if n_samples == 1 else between * a["weights"][2] ** 2
        expected = self.law.std_at(mean, a["theta"]) ** 2 * a["spread"]
        middle = np.median(relative[tissue] if tissue.any() else relative)
        inflated = expected * inflation(a["inflation"], relative, middle)[:, None]
        variance = (np.maximum(inflated - a["between"], 0.05 * inflated) + between).astype(np.float32)
        ood = self.ood.quantile(distance).astype(np.float32)
        return mean, variance, ood, float(between.sum()), degenerate

    def _mean(
        self, slide: Slide, times: list[float], n_samples: int, seed: int, batch_size: int, device: str | torch.device
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean and between-draw variance of a slide without glass; rows without a unique frame."""
        a, degenerate = self.arrays, 0.0
        x = standardize(slide.features, a["feature_mean"], a["feature_std"], self.standardize)
        base = self.ridge.predict(x)
        total, squares = np.zeros((2, len(x), len(self.genes)))
        if np.any(a["weights"][2]):
            tokens = SlideTokens(x, slide.xy, base, self, device, batch_size)
            for draw in range(n_samples):
                rng = np.random.default_rng([seed, zlib.crc32(slide.name.encode()), draw])
                y = tokens.run(rng, times)
                total += y
                squares += y**2
            degenerate = tokens.degenerate_share * len(x)
            del tokens
        network = (total / n_samples).astype(np.float32)
        between = (
            np.maximum(squares / n_samples - network.astype(np.float64) ** 2, 0) * n_samples / max(n_samples - 1, 1)
        )
        parts = [base, smooth(base, slide.graph(8), self.ridge.smoothing), network]
        return combine(np.stack(parts), a["mean"], a["level"], a["weights"]), between, degenerate

    def simple_prediction(self, features: np.ndarray, xy: np.ndarray | None = None) -> np.ndarray:
        """Ridge regression alone, for one slide; smoothed over neighbours when positions are given."""
        a = self.arrays
        base = self.ridge.predict(standardize(features, a["feature_mean"], a["feature_std"], self.standardize))
        return base if xy is None else smooth(base, spatial_graph(xy, 8), self.ridge.smoothing)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        tensors = {f"array.{name}": torch.from_numpy(np.array(value)) for name, value in self.arrays.items()}
        tensors |= {"ridge.coefficients": torch.from_numpy(self.ridge.coefficients)}
        tensors |= {"ridge.intercept": torch.from_numpy(self.ridge.intercept)}
        for i, network in enumerate(self.networks):
            tensors |= {f"network.{i}.{name}": value for name, value in network.state_dict().items()}
        prior = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self.prior).items()}
        description = {
            "config": asdict(self.config), "genes": self.genes, "encoder": self.encoder, "target_sum": self.target_sum,
            "n_networks": len(self.networks), "prior": prior, "standardize": self.standardize, "pitch": self.pitch,
            "ridge": [self.ridge.alpha, self.ridge.smoothing], "history": self.history, "card": self.card,
        }  # fmt: skip
        return description, tensors

    @classmethod
    def from_state(cls, d: dict, tensors: dict[str, Tensor]) -> STFlow:
        """Rebuild a model from the description and tensors of its file."""
        config = STFlowConfig(**d["config"] if "config" in d else d["preset"])  # version 0.1.0 called it a preset
        arrays = {
            k.removeprefix("array.").replace("familiarity_", "ood_"): v.numpy()
            for k, v in tensors.items()
            if k.startswith("array.")
        }
        networks = []
        for i in range(d["n_networks"]):
            network = Denoiser(config.denoiser(len(arrays["feature_mean"]), len(d["genes"])))
            start = f"network.{i}."
            _base.fill(network, {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            networks.append(network)
        prior = {k: np.asarray(v) if isinstance(v, list) else v for k, v in d["prior"].items()}
        ridge = Ridge(tensors["ridge.coefficients"].numpy(), tensors["ridge.intercept"].numpy(), *d["ridge"])
        names = ("genes", "encoder", "target_sum", "standardize", "pitch", "history", "card")
        return cls(
            config=config, networks=networks, prior=PRIORS[config.prior](**prior), ridge=ridge, arrays=arrays,
            **{name: d[name] for name in names},
        )  # fmt: skip


class SlideTokens:
    """One slide made ready for the networks: image tokens, graph and embedded geometry are computed once for all steps."""

    def __init__(
        self, x: np.ndarray, xy: np.ndarray, base: np.ndarray, model: Any, device: str | torch.device, rows: int
    ):
        p = model.config
        self.model, self.rows, self.n = model, rows, len(x)
        self.device = torch.device(device)
        # neighbours in space become neighbours in memory: tokens are worked on in square tiles of about `rows`
        tile = np.floor((xy - xy.min(0)) / max(np.sqrt(np.ptp(xy, axis=0).prod() / len(xy) * rows), 1e-9))
        self.order = np.lexsort([xy[:, 1], tile[:, 1], tile[:, 0]]) if len(xy) > rows else np.arange(len(xy))
        self.base = base
        with torch.inference_mode():
            self.graph = spatial_graph(xy[self.order], p.n_neighbors, ties=p.ties)
            self.degenerate_share = degenerate_share(self.graph) if p.geometry == "frames" else 0.0
            self.tokens = []  # of each network: image tokens, geometry of each layer
            for network in model.networks:
                network.to(self.device)
                self.tokens.append(self._prepare(network, x))
            self.graph = Graph(self.graph.index.to(self.device), self.graph.mask.to(self.device), ABSENT)

    def _prepare(self, network: Denoiser, x: np.ndarray) -> tuple[Tensor, list[Tensor]]:
        k, width = self.graph.index.shape[1], network.config.width
        h = torch.empty(self.n, width, device=self.device)
        geometry = [torch.empty(self.n, k, width // 2, device=self.device) for _ in network.layers]
        for s in range(0, self.n, self.rows):
            part = slice(s, s + self.rows)
            h[part] = network.image(torch.from_numpy(x[self.order[part]]).to(self.device))
            edges = network.edges(Graph(self.graph.index[part], self.graph.mask[part], self.graph.offset[part]))
            for layer, out in zip(network.layers, geometry):
                out[part] = layer.attention.geometry(edges.to(self.device))
        return h, geometry

    def run(self, rng: np.random.Generator, times: list[float]) -> np.ndarray:
        """Draw once from the prior and integrate; the mean over networks, n x genes in the slide's own order."""
        model = self.model
        start = model.prior.sample(self.n, len(model.genes), rng, self.base)[self.order]
        total = np.zeros_like(start)
        with torch.inference_mode():
            y_0 = torch.from_numpy(start).to(self.device)
            residual = torch.from_numpy(self.base[self.order]).to(self.device) if model.config.residual else 0
            for network, (image, geometry) in zip(model.networks, self.tokens):

                def endpoint(
                    y: Tensor,
                    t: float,
                    network: Denoiser = network,
                    image: Tensor = image,
                    geometry: list[Tensor] = geometry,
                ) -> Tensor:
                    time = torch.tensor([t], device=self.device)
                    h = image + network.time(time_features(time, scale=model.config.time_scale))
                    return network.decode(h, y, self.graph, geometry, self.rows) + residual

                total += sample(endpoint, y_0, times).cpu().numpy()
        out = np.empty_like(total)
        out[self.order] = total / len(model.networks)
        return out


PRIORS = {"zero": ZeroPrior, "gaussian": GaussianPrior, "zinb": ScalarZINB, "counts": CountPrior, "image": ImagePrior}
