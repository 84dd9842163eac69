"""SPATIA: embeddings of cells, niches and tissue that fuse cell images, genes and spatial context.

SPATIA (arXiv 2507.04704), written from the paper: masked autoencoding of images, a transformer over genes,
bidirectional cross-attention between the two, then attention over neighbouring cells and over the tissue around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from spatiaflow.models import _base
from spatiaflow.models.encoders._cell import GeneEncoder, ImageEncoder
from spatiaflow.models.fusion import ContextLayer, CrossAttention, Residual, Surroundings
from spatiaflow.models.levels import N_COMPONENTS, TISSUE, gaussian_levels, standardised
from spatiaflow.models.ood import Domain
from spatiaflow.models.preprocess import full, in_vocabulary, relative_scale, scaled, standard_of
from spatiaflow.models.slide import LEVELS, Slide

# The likelihoods are nats per gene and change by some hundredths in training; the other losses change by tenths and ones.
LOSSES = {"genes": 1.0, "image_to_genes": 1.0, "reconstruction": 0.05, "contrast": 0.02, "niche": 1.0, "tissue": 0.5}
TRAINING = ("losses", "learning_rate", "batches_per_epoch", "devices", "precision", "num_workers")


@dataclass
class SpatiaConfig(_base.Config):
    """Sizes of SPATIA, and training settings that are rarely changed.

    Attributes
    ----------
    genes, channels
        Vocabulary; :func:`spatiaflow.tl.train_spatia` fills it in. A model without images has no channels.
    crop_um, crop_pixels, patch_pixels
        Side of a cell's crop on the tissue and in pixels, and of the vision transformer's patches.
    wide
        Width of a second crop around each cell over that of the first, such as 3, with as many pixels: it shows the
        surroundings. 0: none. Images then take about twice as long to read. On the pancreas it helped the cell level little,
        and not beside the niche level.
    adaptive
        Each crop fits its cell, ``crop_um`` is the usual width, and the model is told the scale of each crop.
    backbone
        A published ViT-MAE in place of the small one: its name, such as ``"facebook/vit-mae-base"``, or a folder. A trained
        model holds its configuration instead.
    width, n_heads, dropout
        Of every transformer and of every embedding.
    stem_width
        Channels of the first convolutions before the vision transformer; 0: its patch embedding is linear.
    image_layers, gene_layers, gene_latents
        Depth of the encoders, and number of tokens that the genes are summarised in.
    genes_to_image, image_to_gene
        Weights of the two cross-attentions; at 0 an encoder's output passes unchanged.
    niche_layers, niche_neighbors
        Local attention over neighbouring cells.
    tissue_layers, tissue_anchors, anchor_um
        Attention over niche tokens pooled around anchors that are ``anchor_um`` apart. With 32 anchors 100 µm apart a cell
        sees about 350 µm around it.
    context
        ``"attention"``: the niche and tissue levels are learned, by the layers above. ``"means"``: they are Gaussian means of
        30 components of genes around each cell, at three scales each, and the components stand beside the learned fusion
        in the cell level (:mod:`spatiaflow.models.levels`). Means group cells better. Cells without genes have those that
        their image predicts.
    niche_um
        Standard deviation of the middle scale of the niche's means, filled in by :func:`spatiaflow.tl.train_spatia` from the
        density of cells. The tissue's is four times as large.
    pitch_um
        Unit of distances: the distance of neighbouring cells in the training data.
    losses
        Weights of losses that differ from the defaults; 0 switches a loss off. ``genes``: the counts of a cell from those
        of its genes that are not hidden (negative binomial). ``image_to_genes``: all counts from the image alone.
        ``reconstruction``: masked patches of the image, by default only of a model without genes: beside genes it taught
        nothing that a linear probe finds. ``contrast``: a cell's image finds its genes in a batch. ``niche``
        and ``tissue``: the counts of hidden cells from their surroundings.
    learning_rate, batches_per_epoch
        Of AdamW; the number of batches follows from the number of cells when None.
    devices, precision
        Passed to :class:`lightning.Trainer`.
    num_workers
        Processes that read batches while the model trains; 0 reads between the steps.

    Examples
    --------
    >>> config = sf.models.SpatiaConfig(width=64, losses={"contrast": 0})
    >>> config.width, config.niche_neighbors
    (64, 24)
    """

    genes: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    crop_um: float = 20.4
    crop_pixels: int = 48
    patch_pixels: int = 16
    wide: float = 0.0
    adaptive: bool = False
    backbone: dict | str | None = None
    width: int = 128
    n_heads: int = 4
    dropout: float = 0.1
    stem_width: int = 32
    image_layers: int = 2
    gene_layers: int = 2
    gene_latents: int = 8
    genes_to_image: float = 1.0
    image_to_gene: float = 1.0
    niche_layers: int = 2
    niche_neighbors: int = 24
    tissue_layers: int = 1
    tissue_anchors: int = 32
    anchor_um: float = 100.0
    context: str = "attention"
    niche_um: float = 0.0
    pitch_um: float = 10.0
    losses: dict[str, float] | None = None
    learning_rate: float = 5e-4
    batches_per_epoch: int | None = None
    devices: int | str = 1
    precision: str = "32-true"
    num_workers: int = 0

    named: ClassVar[dict[str, SpatiaConfig]] = {}

    def __post_init__(self) -> None:
        given = self.losses or {}
        if unknown := [name for name in given if name not in LOSSES]:
            raise ValueError(f"losses has no {unknown[0]!r}; it takes {', '.join(map(repr, LOSSES))}.")
        if given and (min(given.values()) < 0 or not any(self.loss_weights.values())):
            raise ValueError(f"weights of losses must not be negative, nor all 0; they are {given}.")
        if self.context not in ("attention", "means"):
            raise ValueError(f"context must be 'attention' or 'means', not {self.context!r}.")
        if not (self.wide == 0 or self.wide > 1):
            raise ValueError(f"wide must be above 1, or 0 for no second crop, not {self.wide!r}.")
        if not self.crop_um > 0:
            raise ValueError(f"crop_um must be a positive number, not {self.crop_um!r}.")

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of every loss."""
        usual = LOSSES | {"reconstruction": 0.0} if self.genes else LOSSES
        return usual | (self.losses or {})

    def with_sizes_of(self, other: SpatiaConfig) -> SpatiaConfig:
        """Vocabulary and sizes of another configuration with the training settings of this one."""
        return replace(other, **{name: getattr(self, name) for name in TRAINING})


SpatiaConfig.named["default"] = SpatiaConfig()


class SpatiaNetwork(nn.Module):
    """Encoders, fusion, and the two levels of context."""

    niche_layers: Any  # ModuleList of ContextLayer
    axes: Any  # Tensor, or None

    def __init__(self, c: SpatiaConfig):
        super().__init__()
        self.config = c
        d = c.width
        self.image: Any = ImageEncoder(c) if c.channels else None
        self.gene: Any = GeneEncoder(c) if c.genes else None
        self.no_image, self.no_genes = (nn.Parameter(0.02 * torch.randn(1, 1, d)) for _ in range(2))
        self.to_gene, self.to_image = CrossAttention(c, c.image_to_gene), CrossAttention(c, c.genes_to_image)
        self.cell = nn.Sequential(nn.LayerNorm(2 * d), nn.Linear(2 * d, d))
        # starts as the sum of both: a random square matrix would bury what little variance many directions have
        cast("Any", self.cell[1]).weight.data.copy_(torch.eye(d).repeat(1, 2))
        self.hidden_cell = nn.Parameter(0.02 * torch.randn(d))  # stands for a cell that is to be predicted
        self.niche_layers = nn.ModuleList(ContextLayer(c) for _ in range(c.niche_layers))
        self.tissue_layers = nn.ModuleList(ContextLayer(c) for _ in range(c.tissue_layers))
        self.niche_norm, self.tissue_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        # where a cell's image and its genes find each other
        self.project = nn.ModuleDict({name: nn.Linear(d, d) for name in ("image", "genes")})
        # predicted counts: one matrix of genes for all levels
        self.heads = nn.ModuleDict({level: Residual(d) for level in LEVELS})
        self.rates = nn.Linear(d, len(c.genes))
        self.log_theta = nn.Parameter(torch.zeros(len(c.genes)))
        # of the components of genes that means are made of, genes x components
        size = len(c.genes), min(N_COMPONENTS, len(c.genes))
        self.register_buffer("axes", torch.zeros(size) if c.context == "means" else None)

    def match(self, tokens: Tensor, modality: str) -> Tensor:
        """Unit vectors (n x d) of one modality's tokens; a cell's image and genes have a large scalar product."""
        return F.normalize(self.project[modality](tokens.mean(1)), dim=1)

    def gene_tokens(
        self, counts: Tensor, seen: Tensor, measured: Tensor, target_sum: float, standard: Tensor | None = None
    ) -> Tensor:
        """Gene tokens (n x latents x d) from those counts (n x genes) that are seen.

        Normalised by what is seen, so that hidden counts leave no trace, then centred and scaled by ``standard`` (3 x genes
        or n x 3 x genes, see :func:`spatiaflow.models.preprocess.gene_standard`), by default the training data's.
        """
        standard = cast("Tensor", self.gene.standard) if standard is None else standard
        visible = (counts * seen).sum(1)
        scale = target_sum / visible.clamp_min(1) * (seen.sum(1) / measured.sum(1).clamp_min(1))
        values = torch.log1p(counts * seen * scale[:, None])
        return self.gene((values - standard[..., 0, :]) / standard[..., 1, :], seen, torch.log1p(visible))

    def fuse(self, image: Tensor | None, genes: Tensor | None, n: int) -> Tensor:
        """Cell embeddings (n x d) from image tokens (n x t x d) and gene tokens (n x m x d); None: missing."""
        image = self.no_image.expand(n, -1, -1) if image is None else image
        genes = self.no_genes.expand(n, -1, -1) if genes is None else genes
        fused = self.to_image(image, genes).mean(1), self.to_gene(genes, image).mean(1)
        return self.cell(torch.cat(fused, 1))

    def context(self, cells: Tensor, around: Surroundings, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Niche and tissue embeddings (n x d each) of cells (n x d) in their surroundings.

        Every cell asks the cells around it, itself among them, from the same blank token: nothing but attention says how
        much of a niche its own cell makes.
        """
        h, others = self.hidden_cell.expand(len(cells), -1), cells
        for layer in self.niche_layers:
            h = layer(h, others, around.neighbors, rows)
            others = cells + h
        niche = self.niche_norm(h)
        nearest = around.nearest.to(h.device)
        total = h.new_zeros(around.n_anchors, h.shape[1]).index_add_(0, nearest, niche)
        pooled = total / torch.bincount(nearest, minlength=around.n_anchors).clamp_min(1)[:, None]
        t = h
        for layer in self.tissue_layers:
            t = layer(t, pooled, around.tissue, rows)
        return niche, self.tissue_norm(t)

    def niche_attention(self, cells: Tensor, around: Surroundings, rows: int | None = None) -> Tensor:
        """How much each cell and its neighbours weigh in its niche, mean of heads and layers, n x k."""
        h, others = self.hidden_cell.expand(len(cells), -1), cells
        total: Any = 0.0
        for layer in self.niche_layers:
            total = total + layer.weights(h, others, around.neighbors, rows)
            h = layer(h, others, around.neighbors, rows)
            others = cells + h
        return total / len(self.niche_layers)

    def contextual(self) -> set[nn.Parameter]:
        """What the niche and tissue levels are made of."""
        layers = (self.niche_layers, self.tissue_layers, self.niche_norm, self.tissue_norm)
        heads = (self.heads["niche"], self.heads["tissue"])
        return {p for module in (*layers, *heads) for p in module.parameters()} | {self.hidden_cell}

    def predicted(self, cells: Tensor, target_sum: float) -> Tensor:
        """Standardised genes (n x genes) that embedded cells are expected to have."""
        values = torch.log1p(target_sum * self.log_rates(cells, "cell").exp())
        return (values - self.gene.standard[0]) / self.gene.standard[1]

    def log_rates(self, embedding: Tensor, level: str) -> Tensor:
        """Log of the expected share of the library, n x genes."""
        with torch.autocast(embedding.device.type, enabled=False):  # a likelihood needs more than 8 bits
            return self.rates(self.heads[level](embedding.float()))

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion of every gene."""
        return F.softplus(self.log_theta) + 1e-2


class Spatia(_base.Model):
    """A fitted SPATIA: network, scaling of images and counts, and what it was trained on.

    Made by :func:`spatiaflow.tl.train_spatia` or :func:`spatiaflow.models.load`.

    Attributes
    ----------
    config
        Vocabulary of genes and channels, sizes, and training settings.
    history
        Dict of lists, one entry an epoch.
    card
        Training data, settings and scores.
    domains
        Out-of-domain score of each modality, ``"image"`` and ``"genes"``; empty in weights that were saved without.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    >>> model.config.channels
    ['dapi', 'bound', 'rna', 'prot']
    """

    verb = "sf.tl.embed_spatia"

    def __init__(
        self,
        *,
        network: SpatiaNetwork,
        target_sum: float,
        history: dict,
        card: dict,
        domains: dict[str, Domain] | None = None,
    ):
        self.network, self.config, self.target_sum = network.eval(), network.config, target_sum
        self.genes, self.history, self.card, self.domains = network.config.genes, history, card, domains or {}

    def __repr__(self) -> str:
        c = self.config
        channels = ", ".join(c.channels) or "none"
        wider = f" and {c.crop_um * c.wide:g}" if c.wide else ""
        return f"Spatia: {len(c.genes)} genes, channels {channels}, width {c.width}, {c.crop_um:g}{wider} µm crops"

    def prepare(
        self, slide: Slide, *, channels: Mapping[str, str] | None = None, scaling: str = "slide"
    ) -> tuple[Slide, np.ndarray | None]:
        """Return a slide in the model's genes and channels, and how its genes are standardised.

        Parameters
        ----------
        channels
            The model's names of channels that the image calls otherwise.
        scaling
            ``"slide"``: intensities and genes are scaled by the slide's own cells; ``"training"``: by those of the training
            slides.
        """
        slide = in_vocabulary(slide, self.config, channels)
        if scaling == "slide":
            usual = None if self.network.gene is None else self.network.gene.standard.cpu().numpy()
            return slide, standard_of(slide, self.target_sum, usual)
        if slide.crops is not None:
            own = slide.crops.range.copy()
            for name, place in zip(self.config.channels, slide.crops.places):
                if place >= 0:
                    own[place] = self.card["intensity"][name]
            slide = replace(slide, crops=replace(slide.crops, range=own))
        return slide, None

    @torch.inference_mode()
    def embed(
        self,
        slide: Slide,
        standard: np.ndarray | None = None,
        *,
        batch_size: int = 512,
        device: torch.device | str = "cpu",
        levels: Sequence[str] = LEVELS,
        attention: bool = False,
        update: Callable[[int], object] = lambda n: None,
    ) -> dict[str, np.ndarray | sparse.csr_matrix]:
        """Embeddings (level -> n x d) of all cells of one slide; with ``attention`` also the niche's, n x n sparse.

        Cells outside the image are embedded without it. ``"ood"`` (n) is how far each cell is from the training data, NaN
        where the model holds no statistics for it.

        Parameters
        ----------
        slide, standard
            From :meth:`prepare`. Without crops or without counts the modality is missing.
        batch_size
            Cells encoded at a time.
        update
            Called with the number of cells done.
        """
        network, means = self.network.to(device).eval(), self.config.context == "means"
        cells, ood = torch.empty(len(slide), self.config.width), np.full(len(slide), np.nan, np.float32)
        for rows, crops in self.batches(slide, batch_size):
            image, genes = self.tokens(slide, standard, rows, crops, device)
            cells[rows] = network.fuse(image, genes, len(rows)).cpu()
            ood[rows] = self._score(slide, rows, image)
            update(len(rows))
        if attention and means:
            raise ValueError(
                "the model's niches are means, without attention; train one with config.context='attention'."
            )
        out: dict[str, Any] = {"cell": cells}
        size = min(batch_size, 256) if torch.device(device).type == "cpu" else batch_size  # fits the processor's caches
        if means:
            components = self._components(slide, standard, cells, device)
            around_um = {"niche": self.config.niche_um, "tissue": TISSUE * self.config.niche_um}
            out = {"cell": np.hstack([components, cells.numpy()])}
            out |= {
                level: gaussian_levels(slide.xy, components, around_um[level]) for level in levels if level != "cell"
            }
        elif set(levels) - {"cell"} or attention:
            around = Surroundings.of(slide.xy, self.config)
            out["niche"], out["tissue"] = (v.cpu() for v in network.context(cells.to(device), around, size))
        found: dict[str, Any] = {level: np.asarray(out[level]) for level in levels} | {"ood": ood}
        if attention:
            weight = network.niche_attention(cells.to(device), around, size).cpu()
            row, column = np.nonzero(around.neighbors.mask.numpy())
            index = around.neighbors.index.numpy()[row, column]
            entries = weight.numpy()[row, column], (row, index)
            found["attention"] = sparse.csr_matrix(entries, (len(slide), len(slide)))
        return found

    def _components(
        self, slide: Slide, standard: np.ndarray | None, cells: Tensor, device: torch.device | str
    ) -> np.ndarray:
        """Principal components of the genes of a slide, n x components; without counts of those that its images predict."""
        network = self.network
        if slide.counts is None:
            parts = [
                (network.predicted(part.to(device), self.target_sum) @ network.axes).cpu() for part in cells.split(4096)
            ]
            return torch.cat(parts).numpy()
        standard = network.gene.standard.cpu().numpy() if standard is None else standard
        return (standardised(slide, self.target_sum, standard) @ network.axes.cpu().double().numpy()).astype(np.float32)

    def inputs(self, slide: Slide, rows: np.ndarray, image: Tensor | None) -> dict[str, np.ndarray]:
        """What the out-of-domain score of some cells is measured on, by modality, cells x F.

        Of images the mean of their tokens (n x t x d). Of genes what the encoder reads, scaled by the training data whatever
        the slide is scaled by: its own scale would hide that it differs. A gene that is not measured is at its usual value.
        """
        out = {} if image is None else {"image": image.float().mean(1).cpu().numpy()}
        if slide.counts is not None:
            centre, spread, _ = self.network.gene.standard.cpu().numpy()
            counts = slide.counts[rows].toarray()
            per = self.usual_depth(slide) / np.maximum(counts.sum(1, keepdims=True), 1)
            values = (np.log1p(counts * per) - centre) / spread
            out["genes"] = np.where(slide.measured, values, 0).astype(np.float32)
        return out

    def usual_depth(self, slide: Slide) -> float:
        """Median counts that a training cell has of the genes that a slide measures."""
        share = np.exp(self.network.gene.standard[2].cpu().numpy().astype(np.float64))
        return float(self.target_sum * share[slide.measured].sum() / share.sum())

    def _score(self, slide: Slide, rows: np.ndarray, image: Tensor | None) -> np.ndarray | float:
        """Out-of-domain score of some cells, that of their farther modality; NaN without statistics.

        The larger of two uniform quantiles q has the quantile q squared.
        """
        if not self.domains:
            return np.nan
        scores = [self.domains[name](values) for name, values in self.inputs(slide, rows, image).items()]
        return np.max(scores, 0) ** len(scores) if scores else np.nan

    def tokens(
        self,
        slide: Slide,
        standard: np.ndarray | None,
        rows: np.ndarray,
        crops: Tensor | None,
        device: torch.device | str,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (n x t x d) of the images and of the genes of some rows; ``crops`` None: without their images."""
        image = genes = None
        if crops is not None:
            places = slide.crops.places
            present = torch.from_numpy(places >= 0).expand(len(rows), -1)
            size = relative_scale(slide.crops, rows, self.config)
            x = scaled(crops, slide.crops.range, places)
            image = self.network.image(x.to(device), present.to(device), size.to(device))
        if slide.counts is not None:
            measured = torch.from_numpy(slide.measured)[None].to(device)
            usual = None if standard is None else torch.from_numpy(standard).to(device)
            counts = torch.from_numpy(slide.counts[rows].toarray().astype(np.float32)).to(device)
            genes = self.network.gene_tokens(counts, measured, measured, self.target_sum, usual)
        return image, genes

    @staticmethod
    def batches(slide: Slide, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor | None]]:
        """Yield (rows, crops): cells with an image first, then the others."""
        with_image = np.zeros(0, int) if slide.crops is None else np.flatnonzero(slide.crops.inside)
        if len(with_image):
            yield from full(slide.crops.batches(batch_size, with_image), batch_size)
        rest = np.setdiff1d(np.arange(len(slide)), with_image)
        for s in range(0, len(rest), batch_size):
            yield rest[s : s + batch_size], None

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return description and tensors."""
        description = {
            "config": asdict(self.config), "target_sum": self.target_sum, "history": self.history, "card": self.card
        }  # fmt: skip
        tensors = dict(self.network.state_dict())
        for seen, domain in self.domains.items():
            tensors |= {f"domain.{seen}.{name}": torch.from_numpy(value) for name, value in domain.tensors().items()}
        return description, tensors

    @property
    def sha256(self) -> str:
        """Identity of what makes embeddings: SHA-256 over the network's tensors."""
        return _base.tensors_sha256(self.network.state_dict())

    @classmethod
    def from_state(cls, d: dict, tensors: dict[str, Tensor]) -> Spatia:
        """Rebuild a model from the description and tensors of its file."""
        network = SpatiaNetwork(SpatiaConfig(**d["config"]))
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in [name for name in tensors if name.startswith("domain.")]:
            _, seen, part = name.split(".")
            found.setdefault(seen, {})[part] = tensors.pop(name).numpy()
        _base.fill(network, tensors)
        domains = {seen: Domain.of(parts) for seen, parts in found.items()}
        return cls(network=network, target_sum=d["target_sum"], history=d["history"], card=d["card"], domains=domains)
