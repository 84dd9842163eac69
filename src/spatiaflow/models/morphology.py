"""Flow matching from the image of a cell to its image in another state, in its surroundings (SPATIA, generative part)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from spatiaflow.models import _base
from spatiaflow.models.autoencoder import SCALE, Autoencoder
from spatiaflow.models.conditions import Conditions, Context
from spatiaflow.models.flow import integrate, time_features
from spatiaflow.models.orientation import canonical, inverse, turned
from spatiaflow.models.preprocess import beyond, scaled, unscaled
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import GatedMLP

CONDITION = 128  # width of the vector of conditions
LOSSES = {"flow": 1.0, "alignment": 0.5, "contrast": 0.1}
EDITS = ("flow", "linear")


@dataclass
class MorphologyConfig(_base.Config):
    """Sizes of the generator, and how it is trained and used.

    Attributes
    ----------
    objective
        ``"genes"``: one flow from noise to the images of all cells, under their genes, depth and neighbours; an edit goes back to
        noise and forth again under shifted genes. ``"pairs"``: SPATIA's published objective, a flow from the image of a source
        to that of its target.
    channels, transitions, profile
        Names of the image's channels, of the transitions ("A -> B"), and of the morphology features of the alignment loss.
        Training fills them in.
    crop_um, crop_pixels
        Side of the images on the tissue and in pixels, a multiple of 8.
    n_components
        Genes: principal components of expression that an image is conditioned on.
    n_embedding, n_genes
        Pairs: width of a cell's, niche's and tissue's embedding, and length of a transition's shift of genes. Training fills them
        in.
    n_neighbors
        Neighbours that a cell's image is conditioned on.
    spatial
        Pairs: whether niche, tissue and neighbours condition the image at all.
    start, noise
        Pairs: the path begins at ``"control"``: the latents of the control image, whose standard deviation is 1, plus noise of
        this standard deviation, without which a cell has one outcome. Or it begins at pure ``"noise"``; then the network also
        sees the latents of the control image.
    n_latent
        Length of the latents of an image.
    width, n_layers, n_heads
        Sizes of the perceptron between latents, and (pairs) of the attention to neighbours.
    drop
        Probability that a sample is trained without conditions, for guidance. Genes: another such share is trained without the
        cell's own genes.
    weighted
        Pairs: weigh pairs by their confidence.
    exchange
        Pairs: let similar sources of one niche exchange their targets in each batch, so that their images are close (minibatch
        optimal transport): paths are shorter, and more of the source is kept.
    losses
        Pairs: weights of ``"flow"``, ``"alignment"`` (sliced Wasserstein distance of the morphology that a small network reads
        off generated and real images) and ``"contrast"`` (the conditions of another transition must fit worse). 0 switches one
        off; the default is 1, .5 and .1.
    batch_size
        Pairs or cells a step.
    devices, precision
        As in Lightning's Trainer.
    edit
        Genes: ``"flow"``, or ``"linear"``: the ridge regression from a shift of genes to a shift of latents. None: what is
        nearer to real targets on the held-out cells, transition by transition.
    guidance
        Strength of classifier-free guidance when images are generated; 0 is none. None: none for pairs; for genes the best on
        the held-out cells.

    Examples
    --------
    >>> config = sf.models.MorphologyConfig(crop_um=16, width=256)
    >>> config.crop_pixels, config.n_latent
    (48, 128)
    """

    channels: list[str] = field(default_factory=list)
    transitions: list[str] = field(default_factory=list)
    profile: list[str] = field(default_factory=list)
    crop_um: float = 20.4
    crop_pixels: int = 48
    n_components: int = 50
    n_embedding: int = 128
    n_genes: int = 0
    n_neighbors: int = 12
    spatial: bool = True
    start: str = "control"
    noise: float = 0.5
    n_latent: int = 128
    width: int = 512
    n_layers: int = 4
    n_heads: int = 4
    drop: float = 0.1
    weighted: bool = True
    exchange: bool = True
    losses: dict[str, float] = field(default_factory=dict)
    batch_size: int = 128
    devices: int | str = 1
    precision: str = "32-true"
    objective: str = "genes"
    edit: str | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("objective", ("genes", "pairs")),
            ("start", ("control", "noise")),
            ("edit", (None, *EDITS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}.")
        if self.crop_um <= 0:
            raise ValueError(f"crop_um must be a positive number, not {self.crop_um!r}.")
        if self.crop_pixels < 1 or self.crop_pixels % SCALE:
            raise ValueError(f"crop_pixels={self.crop_pixels} must be a multiple of {SCALE}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {self.batch_size!r}.")
        if unknown := [name for name in self.losses if name not in LOSSES]:
            raise ValueError(f"losses has no {unknown[0]!r}; it takes {', '.join(map(repr, LOSSES))}.")
        self.losses = LOSSES | self.losses


MorphologyConfig.named = {"default": MorphologyConfig(), "pairs": MorphologyConfig(objective="pairs")}


class Layer(nn.Module):
    """Two linear maps with a shortcut, under conditions."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(CONDITION, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """States n x d, conditions n x c."""
        return x + self.layers(x + self.condition(condition))


class MorphologyNetwork(nn.Module):
    """Velocity of latents under conditions: a perceptron with shortcuts.

    On a path that begins at the control image the network does not see that image again. It could otherwise read the velocity
    off as (z - control) / t, and would learn nothing about the target.
    """

    def __init__(self, c: MorphologyConfig) -> None:
        super().__init__()
        self.config, d = c, CONDITION
        self.into = nn.Linear(c.n_latent * (2 if c.start == "noise" else 1), c.width)
        self.layers = nn.ModuleList(Layer(c.width) for _ in range(c.n_layers))
        self.norm, self.out = nn.LayerNorm(c.width), nn.Linear(c.width, c.n_latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.time = nn.Sequential(nn.Linear(128, d), nn.SiLU(), nn.Linear(d, d))
        self.known = nn.ModuleDict({
            name: nn.Linear(size, d)
            for name, size in {
                "cell": c.n_embedding, "niche": c.n_embedding, "tissue": c.n_embedding, "genes": c.n_genes,
                "profile": len(c.profile),
            }.items()
            if size and (c.spatial or name not in ("niche", "tissue"))
        })  # fmt: skip
        self.transition, self.level = nn.Embedding(len(c.transitions), d), nn.Embedding(2, d)
        self.nothing = nn.Parameter(0.02 * torch.randn(d))  # stands for conditions that are dropped
        self.neighbor: Any = GatedMLP(c.n_embedding + 2, 2 * d, d) if c.spatial else None
        self.around: Any = nn.MultiheadAttention(d, c.n_heads, batch_first=True) if c.spatial else None

    def condition(self, c: Conditions, kept: Tensor | None = None) -> Tensor:
        """Return the vector of conditions of each sample (n x c); ``nothing`` where not ``kept`` (n, bool)."""
        vector = self.transition(c.transition) + self.level(c.level)
        for name, layer in self.known.items():
            vector = vector + layer(getattr(c, name))
        if self.around is not None:
            tokens = self.neighbor(c.neighbors)  # n x k x c
            vector = vector + self.around(vector[:, None], tokens, tokens, need_weights=False)[0][:, 0]
        return vector if kept is None else torch.where(kept[:, None], vector, self.nothing)

    def forward(self, z: Tensor, t: Tensor, control: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity (n x d) at latents z (n x d) and times t (n)."""
        condition = F.silu(condition + self.time(time_features(t, 128)))
        h = self.into(torch.cat([z, control], 1) if self.config.start == "noise" else z)
        for layer in self.layers:
            h = layer(h, condition)
        return self.out(self.norm(h))


class Surrogate(nn.Sequential):
    """Morphology of a cell (n x f, standardised) from its latents (n x d): differentiable, fitted to measured profiles."""

    reliability: Tensor

    def __init__(self, n_latent: int, n_features: int, width: int = 256):
        super().__init__(
            nn.Linear(n_latent, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, n_features)
        )
        self.register_buffer("reliability", torch.ones(n_features))  # R2 on held-out cells, 0 where it is negative


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator, n: int = 64) -> Tensor:
    """Return the mean absolute difference of sorted projections of two samples (n x f each) on random directions."""
    directions = F.normalize(torch.randn(a.shape[1], n, generator=generator), dim=0).to(a.device)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean()


@dataclass(repr=False)
class States:
    """A fixed linear rule that gives the state of a cell from its counts, for slides without a column of states.

    Attributes
    ----------
    names, genes
        States, and the genes that the rule reads.
    weight, offset
        States x genes and states. The state is the largest of ``weight @ log1p(counts per unit) + offset``.
    unit, min_counts
        Counts of a cell (in ``genes``) are scaled to ``unit``; cells with fewer than ``min_counts`` have no state.

    Examples
    --------
    >>> states = sf.models.States(["acinar", "ductal"], ["CPA1", "KRT19"], [[1, 0], [0, 1]], [0, 0])
    >>> states(np.array([[30, 2], [1, 40], [0, 1]]))
    ['acinar', 'ductal', None]
    """

    names: list[str]
    genes: list[str]
    weight: list[list[float]]
    offset: list[float]
    unit: float = 100.0
    min_counts: int = 20

    def __repr__(self) -> str:
        return f"States: {', '.join(self.names)}; from {len(self.genes)} genes"

    def __call__(self, counts: Any) -> list[str | None]:
        """Return the states of cells from their counts (n x genes, CSR, in the order of ``genes``)."""
        total = np.asarray(counts.sum(1)).ravel()
        log = sparse.csr_matrix(sparse.diags(self.unit / total.clip(1)) @ counts).log1p()
        best = (log @ np.asarray(self.weight).T + np.asarray(self.offset)).argmax(1)
        return [self.names[b] if n >= self.min_counts else None for b, n in zip(best, total)]


class MorphologyFlow(_base.Model):
    """A fitted generator of cell images, learned from pairs of cells.

    Made by :func:`spatiaflow.tl.train_morphology` with ``config="pairs"``, or by :func:`spatiaflow.models.load`.

    Attributes
    ----------
    config
        Channels, transitions, sizes and training settings.
    autoencoder
        Images to latents and back.
    shifts
        Mean shift of genes and of the profile, for every transition and niche.
    intensity
        Background and bright end of every channel, by which images are scaled.
    states
        Rule for states where no column names them; None for models of your own.
    history, card
        As in the other models. ``card["level"]`` is ``"cell"``, or ``"niche"`` for a model of tiles.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("morphology-simulated-small"))
    >>> model.config.transitions
    ['A -> B']
    """

    verb = "sf.tl.generate_morphology"

    def __init__(
        self, *, network: MorphologyNetwork, autoencoder: Autoencoder, surrogate: Surrogate | None, shifts: dict,
        intensity: dict[str, list[float]], history: dict, card: dict, states: States | None = None,
    ) -> None:  # fmt: skip
        self.network, self.config, self.surrogate = network.eval(), network.config, surrogate
        self.autoencoder = autoencoder.eval()
        self.shifts, self.intensity, self.history, self.card = shifts, intensity, history, card
        self.genes, self.states = (), states

    def __repr__(self) -> str:
        return f"MorphologyFlow: {', '.join(self.config.transitions)}; channels {', '.join(self.config.channels)}"

    @torch.inference_mode()
    def generate(
        self,
        control: Tensor,
        conditions: Conditions,
        noise: Tensor,
        *,
        n_steps: int = 5,
        trajectory: bool = False,
    ) -> Tensor:
        """Return images in the target state (n x C x p x p) from control images and standard normal noise (n x d).

        ``n_steps`` steps of Heun's method evaluate the network twice each. With ``config.guidance`` s the velocity is
        (1 + s) v(conditions) - s v(nothing). With ``trajectory`` the images at all n_steps + 1 times are returned.

        The grain of the control image, what its latents do not hold, is kept: it belongs to the microscope and the slide, not to
        the state. Latents that do not change leave the image as it is.
        """
        network, c, turns = self.network, self.config, canonical(control)
        guidance = c.guidance or 0.0
        control = turned(control, turns)
        given, conditions = self.autoencoder.encode(control), conditions.turned(turns)
        condition = network.condition(conditions)
        if guidance:
            free = network.condition(conditions, torch.zeros(len(given), dtype=torch.bool, device=given.device))

        def velocity(z: Tensor, t: float) -> Tensor:
            times = torch.full((len(z),), t, device=z.device)
            v = network(z, times, given, condition)
            if guidance:
                v = (1 + guidance) * v - guidance * network(z, times, given, free)
            return v

        z = integrate(velocity, start(given, noise, c), 2 * n_steps, method="heun", trajectory=trajectory)
        grain = self.autoencoder.grain(control, given)

        def image(z: Tensor) -> Tensor:
            return turned(self.autoencoder.decode(z, grain), inverse(turns))

        return torch.stack([image(one) for one in z]) if trajectory else image(z)

    def generate_cells(
        self,
        slides: Sequence[Slide],
        rows: np.ndarray,
        transition: str,
        niche: np.ndarray,
        *,
        doses: Sequence[float] = (1.0,),
        n_samples: int = 1,
        n_steps: int = 5,
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | str = "cpu",
        update: Callable[[int], object] = lambda n: None,
    ) -> dict[str, np.ndarray]:
        """Return images of some cells in the target state of a transition, in the type and scale of the slides' images.

        Parameters
        ----------
        slides
            With crops in the model's channels, scaled by ``intensity``, and with features: the embeddings of cell, niche and
            tissue side by side.
        rows
            Cells inside their image, as places among the cells of all slides, one slide after the other.
        niche
            Niche of each of the cells. Where the model does not know it, the mean shift over all niches is used.
        doses
            Places on the path from the source (0) to the target (1), at ends of steps.
        n_samples
            Images of each cell and dose. The noise depends on the seed, the sample and the name of the cell.
        batch_size
            Images that are generated at a time.
        update
            Called with the number of images done.

        Returns
        -------
        ``"image"`` and ``"source"``, n * doses * n_samples x C x p x p; all images of a cell one after the other, by dose.
        """
        c, n = self.config, len(rows)
        level = int(self.card["level"] == "niche")
        modules = self.network.to(device), self.autoencoder.to(device)
        around = Context.of(slides, c.n_neighbors, c.crop_um)
        shifts, which = self.shifts[transition], np.full(n, c.transitions.index(transition))
        known = np.where(np.isin(niche, [*shifts]), niche, "")  # "": the mean over all niches
        genes, profile = (
            np.array([shifts[one][kind] for one in known]).reshape(n, -1) for kind in ("genes", "profile")
        )

        def make(control: Tensor, names: np.ndarray, here: np.ndarray) -> dict[str, Tensor]:
            given = around.conditions(rows[here], which[here], genes[here], profile[here], level).to(device)
            paths = []
            for sample in range(n_samples):
                noise = named_noise(names, seed, sample, c.n_latent).to(device)
                path = self.generate(control, given, noise, n_steps=n_steps, trajectory=True)
                paths.append(path[[round(dose * n_steps) for dose in doses]])
            images = torch.stack(paths, 1).flatten(0, 1).transpose(0, 1)  # n x (doses x samples) x C x p x p
            return {"image": images, "source": control[:, None].expand_as(images)}

        made = self.read(slides, rows, make, batch_size=batch_size, device=device, update=update)
        for module in modules:
            module.cpu()
        return made

    def read(
        self, slides: Sequence[Slide], rows: np.ndarray, make: Callable[[Tensor, np.ndarray, np.ndarray], dict[str, Tensor]], *,
        batch_size: int, device: torch.device | str, update: Callable[[int], object],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Return what ``make`` makes of the images of some cells, in the type and scale of the slides' images.

        ``make`` takes images (n x C x p x p), the names of their cells and their places in ``rows``. It returns arrays n x m x
        ... x C x p x p by name; here they are n * m x ....
        """
        order, first = np.full(sum(map(len, slides)), -1), 0
        order[rows] = np.arange(len(rows))
        made: dict[str, np.ndarray] = {}
        for slide in slides:
            own, crops = order[first : first + len(slide)], slide.crops
            first += len(slide)
            for some, found in crops.batches(batch_size, np.flatnonzero((own >= 0) & crops.inside)):
                control = (2 * scaled(found, crops.range, crops.places) - 1).to(device)
                cut = beyond(found, crops.range, crops.places)[:, None]
                for slot, values in make(control, slide.obs_names[some], own[some]).items():
                    pixels = unscaled(
                        (values.cpu() + 1) / 2, self.intensity, self.config.channels, found.numpy().dtype, cut
                    )
                    made.setdefault(slot, np.zeros((len(rows), *pixels.shape[1:]), pixels.dtype))
                    made[slot][own[some]] = pixels
                update(len(some))
        return {slot: values.reshape(-1, *values.shape[2:]) for slot, values in made.items()}

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return description and tensors."""
        description = {
            "config": asdict(self.config), "shifts": self.shifts, "intensity": self.intensity, "history": self.history,
            "card": self.card, "states": None if self.states is None else asdict(self.states),
        }  # fmt: skip
        parts = {"network": self.network, "autoencoder": self.autoencoder, "surrogate": self.surrogate}
        tensors = {
            f"{name}.{k}": v.contiguous()
            for name, part in parts.items()
            if part is not None
            for k, v in part.state_dict().items()
        }
        return description, tensors

    @classmethod
    def from_state(cls, description: dict, tensors: dict[str, Tensor]) -> MorphologyFlow:
        """Rebuild a model from the description and tensors of its file."""
        d, config = (
            description,
            MorphologyConfig(**{"objective": "pairs"} | description["config"]),
        )  # of 0.1.0: all pairs
        parts: dict[str, Any] = {
            "network": MorphologyNetwork(config),
            "autoencoder": Autoencoder(len(config.channels), config.n_latent, config.crop_pixels),
            "surrogate": None,
        }  # fmt: skip
        if any(name.startswith("surrogate.") for name in tensors):
            parts["surrogate"] = Surrogate(config.n_latent, len(config.profile))
        for name, module in parts.items():
            if module is not None:
                found = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
                _base.fill(module, found)
        states = d["states"] and States(**d["states"])
        same = {name: d[name] for name in ("shifts", "intensity", "history", "card")}
        return cls(**parts, **same, states=states)


def start(control: Tensor, noise: Tensor, c: MorphologyConfig) -> Tensor:
    """Return where the path begins: at noise, or at the latents of the control image with noise added.

    The noise is added to latents, where it changes the look of a cell. In pixels it would only be grain.
    """
    return noise if c.start == "noise" else control + c.noise * noise


def named_noise(names: Sequence[str] | np.ndarray, seed: int, sample: int, n: int) -> Tensor:
    """Return standard normal noise (cells x n) that depends on the name of each cell."""
    draws = [
        np.random.default_rng([seed, sample, zlib.crc32(str(name).encode())]).standard_normal(n, np.float32)
        for name in names
    ]
    return torch.from_numpy(np.stack(draws))
