"""Flow matching from the image of a cell to how it would look in another state, where it is (SPATIA, generative part)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from spatiaflow.models import _base
from spatiaflow.models.flow import integrate, time_features
from spatiaflow.models.spatial import GatedMLP

SCALE = 4  # pixels of the image to a pixel of its latents


@dataclass
class MorphologyConfig:
    """Hyper-parameters of the generator.

    Attributes
    ----------
    channels, crop_um, crop_pixels
        Images: their channels by name, their side on the tissue and in pixels.
    transitions
        Names of the transitions, "A -> B".
    profile
        Names of the morphology features that the alignment loss speaks of.
    n_embedding, n_genes
        Width of a cell's, niche's and tissue's embedding, and length of a transition's shift of genes.
    n_neighbors
        Neighbours that a cell's image is conditioned on, one token each.
    spatial
        Whether niche, tissue and neighbours condition the image at all.
    start, noise
        The path begins at ``"control"``, the latents of the control image, whose standard deviation is 1, with noise of this
        standard deviation added (without it a cell has one outcome), or at pure ``"noise"``; then the network is shown the
        latents of the control image beside.
    n_latent
        Channels of the latents, whose side is a quarter of the image's.
    patch_pixels, width, n_layers, n_heads
        Of the transformer over patches of latents; the side of a patch, in pixels of the image, is a multiple of 4.
    drop
        Probability that a sample is trained without conditions, for guidance.

    Examples
    --------
    >>> config = sf.models.MorphologyConfig(channels=["dapi"], transitions=["A -> B"])
    >>> config.crop_pixels, config.n_latent
    (48, 4)
    """

    channels: list[str]
    transitions: list[str]
    profile: list[str] = field(default_factory=list)
    crop_um: float = 20.4
    crop_pixels: int = 48
    n_embedding: int = 128
    n_genes: int = 0
    n_neighbors: int = 12
    spatial: bool = True
    start: str = "control"
    noise: float = 0.5
    n_latent: int = 4
    patch_pixels: int = 8
    width: int = 128
    n_layers: int = 4
    n_heads: int = 4
    drop: float = 0.1


@dataclass
class Conditions:
    """What an image is generated under; every tensor has a row a cell."""

    cell: Tensor  # n x d: the source cell's embedding
    niche: Tensor  # n x d
    tissue: Tensor  # n x d
    neighbors: Tensor  # n x k x (d + 2): embeddings of its neighbours, and where they lie, in crops
    transition: Tensor  # n, place in the vocabulary
    genes: Tensor  # n x genes: mean shift of the transition
    profile: Tensor  # n x features: mean shift of the transition
    level: Tensor  # n: 0 a cell, 1 a tile

    def rows(self, which) -> Conditions:
        """Some of the cells."""
        return Conditions(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def to(self, device) -> Conditions:
        """The same on a device."""
        return Conditions(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Residual(nn.Module):
    """Two convolutions beside a shortcut. Not normalised: how bright an image is would be lost."""

    def __init__(self, d: int):
        super().__init__()
        self.layers = nn.Sequential(nn.SiLU(), nn.Conv2d(d, d, 3, 1, 1), nn.SiLU(), nn.Conv2d(d, d, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images n x d x p x p."""
        return x + self.layers(x)


class Autoencoder(nn.Module):
    """Images to latents of a quarter of their side and back; the flow runs between latents.

    A variational autoencoder that says of every pixel what to expect and how far off that may be. What an image holds beyond
    its latents, its *grain*, is measured by the latter: carried to other latents it is as strong as it would be there, and does
    not draw the edges of the image it came from.
    """

    def __init__(self, n_channels: int, n_latent: int = 4, width: int = 32):
        super().__init__()
        n, a, b = n_channels, width, 2 * width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * n, a, 3, 1, 1), Residual(a), nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1),
            Residual(b), nn.SiLU(), nn.Conv2d(b, 2 * n_latent, 3, 1, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(n_latent, b, 3, 1, 1), Residual(b), Residual(b), nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2), Residual(a),
            nn.SiLU(), nn.Conv2d(a, 2 * a, 3, 1, 1), nn.PixelShuffle(2), nn.SiLU(), nn.Conv2d(a // 2, 2 * n, 3, 1, 1),
        )  # fmt: skip
        for name, size in (("pixel", n), ("latent", n_latent)):  # of training images
            self.register_buffer(f"{name}_mean", torch.zeros(1, size, 1, 1))
            self.register_buffer(f"{name}_std", torch.ones(1, size, 1, 1))
        self.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw latents of images (n x C x p x p)."""
        mean, log_variance = self.encoder((x - self.pixel_mean) / self.pixel_std).chunk(2, 1)
        return mean, log_variance.clamp(-10, 4)

    def expected(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of raw latents, pixel by pixel and in standardised images: the mean, and the log of how far off it may be."""
        mean, log_std = self.decoder(z).chunk(2, 1)
        return mean, log_std.clamp(-3.5, 1.5)

    def encode(self, x: Tensor) -> Tensor:
        """Latents (n x d x p/4 x p/4), of mean 0 and standard deviation 1, of images (n x C x p x p)."""
        return (self.posterior(x)[0] - self.latent_mean) / self.latent_std

    def grain(self, x: Tensor, z: Tensor) -> Tensor:
        """What images (n x C x p x p) hold beyond their latents, in standard deviations."""
        mean, log_std = self.expected(z * self.latent_std + self.latent_mean)
        return ((x - self.pixel_mean) / self.pixel_std - mean) * (-log_std).exp()

    def decode(self, z: Tensor, grain: Tensor | None = None) -> Tensor:
        """Images of latents, smooth or with this grain."""
        mean, log_std = self.expected(z * self.latent_std + self.latent_mean)
        if grain is not None:
            mean = mean + log_std.exp() * grain
        return mean * self.pixel_std + self.pixel_mean

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Negative evidence lower bound a pixel; ``noise`` is standard normal, of the shape of the latents.

        Pixels weigh by the standard deviation that they are given, so that the mean is fitted where that is large too (Seitzer,
        Tavakoli, Antic and Martius, 2022).
        """
        mean, log_variance = self.posterior(x)
        expected, log_std = self.expected(mean + noise * (0.5 * log_variance).exp())
        misfit = 0.5 * (((x - self.pixel_mean) / self.pixel_std - expected) * (-log_std).exp()) ** 2 + log_std
        weight = log_std.exp().detach()
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum() / x.numel()
        return (weight * misfit).mean() + weight.mean() * divergence


class Block(nn.Module):
    """Transformer block on patches: attention among them, to the neighbours, and a perceptron; modulated by the conditions."""

    def __init__(self, c: MorphologyConfig):
        super().__init__()
        d = c.width
        self.heads = c.n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed_forward = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))
        self.modulation = nn.Linear(d, 6 * d)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.around = nn.MultiheadAttention(d, c.n_heads, batch_first=True) if c.spatial else None
        if self.around is not None:
            nn.init.zeros_(self.around.out_proj.weight)

    def forward(self, x: Tensor, condition: Tensor, around: Tensor | None) -> Tensor:
        """Patches n x p x d, conditions n x d, tokens of neighbours n x k x d."""
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(condition)[:, None].chunk(6, -1)
        h = self.norms[0](x) * (1 + scale) + shift
        n, p, d = h.shape
        q, k, v = self.qkv(h).view(n, p, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, p, d)
        x = x + gate * self.out(h)
        if self.around is not None:
            x = x + self.around(x, around, around, need_weights=False)[0]
        return x + gate_2 * self.feed_forward(self.norms[1](x) * (1 + scale_2) + shift_2)


class MorphologyNetwork(nn.Module):
    """Velocity of latents under conditions: a diffusion transformer on patches of them.

    On a path that begins at the control image the network does not see that image again: the less noise there is at the start,
    the better could the velocity be read off, (z - control) / t, without a word learnt about where to go.
    """

    def __init__(self, c: MorphologyConfig):
        super().__init__()
        self.config, d = c, c.width
        self.patch = c.patch_pixels // SCALE
        self.side = c.crop_pixels // c.patch_pixels
        n = c.n_latent * self.patch**2
        self.into = nn.Linear(n * (2 if c.start == "noise" else 1), d)
        self.out = nn.Linear(d, n)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.place = nn.Parameter(0.02 * torch.randn(1, self.side**2, d))
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
        self.neighbor = GatedMLP(c.n_embedding + 2, 2 * d, d) if c.spatial else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.LayerNorm(d)

    def condition(self, c: Conditions, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One vector (n x d) and the neighbours' tokens (n x k x d); samples that are not ``kept`` (n, bool) see neither."""
        vector = self.transition(c.transition) + self.level(c.level)
        for name, layer in self.known.items():
            vector = vector + layer(getattr(c, name))
        around = self.neighbor(c.neighbors) if self.neighbor is not None else None
        if kept is not None:
            vector = torch.where(kept[:, None], vector, self.nothing)
            around = None if around is None else torch.where(kept[:, None, None], around, self.nothing)
        return vector, around

    def forward(self, z: Tensor, t: Tensor, control: Tensor, condition: Tensor, around: Tensor | None) -> Tensor:
        """Velocity (n x d x p/4 x p/4) at latents z (alike) and times t (n)."""
        seen = torch.cat([z, control], 1) if self.config.start == "noise" else z
        condition = F.silu(condition + self.time(time_features(t, 128)))
        h = self.into(F.pixel_unshuffle(seen, self.patch).flatten(2).transpose(1, 2)) + self.place
        for block in self.blocks:
            h = block(h, condition, around)
        h = self.out(self.norm(h)).transpose(1, 2).reshape(len(z), -1, self.side, self.side)
        return F.pixel_shuffle(h, self.patch)


class Surrogate(nn.Module):
    """Morphology of a cell from its latents, differentiable: a small convolutional network fitted to measured profiles."""

    def __init__(self, n_latent: int, n_features: int, width: int = 24):
        super().__init__()
        layers, n = [], n_latent
        for out, stride in ((2 * width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [nn.Conv2d(n, out, 3, stride, padding=1), nn.GroupNorm(4, out), nn.SiLU()]
            n = out
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * n, n_features))
        self.register_buffer("reliability", torch.ones(n_features))  # R2 on held-out cells, 0 where it is negative

    def forward(self, z: Tensor) -> Tensor:
        """Standardised features (n x f) of latents (n x d x p/4 x p/4)."""
        return self.layers(z)


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator, n: int = 64) -> Tensor:
    """Mean absolute difference of sorted projections of two samples of one size (n x f) on random directions."""
    directions = F.normalize(torch.randn(a.shape[1], n, generator=generator), dim=0).to(a.device)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean()


@dataclass
class States:
    """A frozen linear rule that tells the state of a cell from its counts, for slides whose states nobody has named.

    Attributes
    ----------
    names, genes
        States, and genes the rule reads.
    weight, offset
        States x genes and states; the largest of ``weight @ log1p(counts per unit) + offset`` is the state.
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

    def __call__(self, counts) -> list[str | None]:
        """States of cells from their counts (n x genes, CSR, in the order of ``genes``)."""
        total = np.asarray(counts.sum(1)).ravel()
        log = sparse.csr_matrix(sparse.diags(self.unit / total.clip(1)) @ counts).log1p()
        best = (log @ np.asarray(self.weight).T + np.asarray(self.offset)).argmax(1)
        return [self.names[b] if n >= self.min_counts else None for b, n in zip(best, total)]


class MorphologyFlow:
    """A fitted generator of cell images; made by :func:`spatiaflow.tl.train_morphology` or :func:`spatiaflow.models.load`.

    Attributes
    ----------
    config
        Vocabulary of channels and transitions, and all sizes.
    autoencoder
        Between images and the latents that the flow runs between.
    shifts
        Of every transition and niche the mean shift of genes and of the profile.
    intensity
        Background and bright end of every channel, by which images are scaled.
    states
        Rule that tells states where no column names them; None for models of your own.
    history, card
        As of the other models.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("morphology-simulated-small"))
    >>> model.config.transitions
    ['A -> B']
    """

    def __init__(
        self, *, network: MorphologyNetwork, autoencoder: Autoencoder, surrogate: Surrogate | None, shifts: dict,
        intensity: dict, history, card, states: States | None = None,
    ):  # fmt: skip
        self.network, self.config, self.surrogate = network.eval(), network.config, surrogate
        self.autoencoder = autoencoder.eval()
        self.shifts, self.intensity, self.history, self.card = shifts, intensity, history, card
        self.states = states

    def __repr__(self) -> str:
        return f"MorphologyFlow: {', '.join(self.config.transitions)}; channels {', '.join(self.config.channels)}"

    @torch.inference_mode()
    def generate(
        self,
        control: Tensor,
        conditions: Conditions,
        noise: Tensor,
        *,
        n_steps=10,
        method="heun",
        guidance=0.0,
        trajectory=False,
    ) -> Tensor:
        """Images in the target state (n x C x p x p) from control images and standard normal noise of their latents' shape.

        ``n_steps`` counts evaluations of the network along the path; with guidance s the velocity is
        (1 + s) v(conditions) - s v(nothing). With ``trajectory`` all states between, steps + 1 of them, come first.

        The grain of the control image, what its latents do not hold, is carried over: it is the microscope's and the slide's
        rather than the state's, and no change of latents is no change of the image.
        """
        network, c = self.network, self.config
        given = self.autoencoder.encode(control)
        condition, around = network.condition(conditions)
        if guidance:
            none = torch.zeros(len(given), dtype=torch.bool, device=given.device)
            free, free_around = network.condition(conditions, none)

        def velocity(z, t):
            times = torch.full((len(z),), t, device=z.device)
            v = network(z, times, given, condition, around)
            if guidance:
                v = (1 + guidance) * v - guidance * network(z, times, given, free, free_around)
            return v

        z = integrate(velocity, start(given, noise, c), n_steps, method=method, trajectory=trajectory)
        grain = self.autoencoder.grain(control, given)
        if trajectory:
            return torch.stack([self.autoencoder.decode(one, grain) for one in z])
        return self.autoencoder.decode(z, grain)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one cell: channels and sides of its latents."""
        side = self.config.crop_pixels // SCALE
        return self.config.n_latent, side, side

    def save(self, path) -> object:
        """Write the model to one safetensors file, atomically, and return its path."""
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
        return _base.save(path, "MorphologyFlow", description, tensors)

    @classmethod
    def from_state(cls, d: dict, tensors: dict[str, Tensor]) -> MorphologyFlow:
        """Rebuild a model from the description and tensors of its file."""
        try:
            config = MorphologyConfig(**d["config"])
            parts = {
                "network": MorphologyNetwork(config), "autoencoder": Autoencoder(len(config.channels), config.n_latent),
                "surrogate": None,
            }  # fmt: skip
            if any(name.startswith("surrogate.") for name in tensors):
                parts["surrogate"] = Surrogate(config.n_latent, len(config.profile))
            for name, module in parts.items():
                if module is not None:
                    found = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
                    module.load_state_dict(found)
            states = d["states"] and States(**d["states"])
            same = {name: d[name] for name in ("shifts", "intensity", "history", "card")}
            return cls(**parts, **same, states=states)
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"the file's header and tensors do not make a MorphologyFlow: {error}") from error


def start(control: Tensor, noise: Tensor, c: MorphologyConfig) -> Tensor:
    """Where the path begins: at noise, or at the latents of the control image with noise added.

    Noise belongs into latents: there it changes what a cell looks like, and what the flow leaves of it looks like a cell. In
    pixels it is grain, which has to be taken off pixel by pixel.
    """
    return noise if c.start == "noise" else control + c.noise * noise
