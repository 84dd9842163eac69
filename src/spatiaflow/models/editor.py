"""Morphology by genes: one flow from noise to images of all cells, and edits that go back to noise and forth again.

The flow is conditioned on a cell's genes, its depth and its actual neighbours, never on its image. An edit integrates the latents
of the source back to noise under its own genes, and forward under shifted ones, with the same guidance in both directions. What
genes do not tell stays in the noise, so it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from spatiaflow.models import _base
from spatiaflow.models.autoencoder import Autoencoder
from spatiaflow.models.flow import integrate, time_features
from spatiaflow.models.morphology import CONDITION, Layer, MorphologyConfig, MorphologyFlow, States, named_noise
from spatiaflow.models.orientation import canonical, inverse, turned
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import spatial_graph
from spatiaflow.models.transport import per_unit

FRESH = 0.3  # share of fresh noise in the start of every image of a cell but the first


@dataclass
class Surroundings:
    """What the image of each cell is conditioned on. Every tensor has one row a cell."""

    own: Tensor  # n x k, components of the cell's genes
    around: Tensor  # n x (1 + k + neighbours): log counts, mean components of the neighbours, distances to them

    def rows(self, which: Any) -> Surroundings:
        """Return some of the cells."""
        return Surroundings(self.own[which], self.around[which])

    def to(self, device: str | torch.device) -> Surroundings:
        """Return the conditions on a device."""
        return Surroundings(self.own.to(device), self.around.to(device))


class Components(nn.Module):
    """Principal components of log expression: the genes of a cell as a few numbers, and a shift of genes as one of these."""

    mean: Tensor
    axes: Tensor
    depth: Tensor
    unit: Tensor

    def __init__(self, n_genes: int, n_components: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_genes))  # of log counts
        self.register_buffer("axes", torch.zeros(n_genes, n_components))
        self.register_buffer("depth", torch.tensor([0.0, 1.0]))  # mean and deviation of the log of all counts
        self.register_buffer("unit", torch.ones(1))  # counts of a cell are scaled to it

    @classmethod
    def fit(cls, counts: sparse.csr_matrix, n_components: int, seed: int = 0) -> Self:
        """Fit to counts (n x genes). All components have one scale, so that they keep their shares of the variance."""
        from sklearn.decomposition import PCA

        total = np.asarray(counts.sum(1)).ravel()
        counts, total = counts[total > 0], total[total > 0]
        k = min(n_components, *(size - 1 for size in counts.shape))
        out, unit = cls(counts.shape[1], k), float(np.median(total))
        # not scanpy's pca: it does not keep the projection, which shifts of genes need
        pca = PCA(k, svd_solver="covariance_eigh" if counts.shape[1] <= 3000 else "arpack", random_state=seed)
        pca.fit(per_unit(counts, unit))
        log = np.log(total)
        scale = max(float(np.sqrt(pca.explained_variance_.mean())), 1e-9)
        for name, values in {
            "mean": pca.mean_, "axes": pca.components_.T / scale, "depth": [log.mean(), max(log.std(), 1e-3)], "unit": [unit],
        }.items():  # fmt: skip
            getattr(out, name).copy_(torch.as_tensor(np.asarray(values)))
        return out

    def of(self, counts: sparse.csr_matrix, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return components (n x k) and log counts (n, standardised). Genes that are not measured are at their mean."""
        log = np.log(np.asarray(counts.sum(1)).ravel().clip(1))
        mean, axes = (getattr(self, name).double().cpu().numpy() for name in ("mean", "axes"))
        axes = axes * measured[:, None]
        found = per_unit(sparse.csr_matrix(counts, dtype=np.float64), float(self.unit)) @ axes - mean @ axes
        return found.astype(np.float32), ((log - float(self.depth[0])) / float(self.depth[1])).astype(np.float32)

    def shift(self, genes: np.ndarray) -> np.ndarray:
        """Return shifts of log counts (n x genes) as shifts of components (n x k)."""
        return (np.asarray(genes) @ self.axes.double().cpu().numpy()).astype(np.float32)

    def surroundings(self, slides: Sequence[Slide], n_neighbors: int, crop_um: float) -> Surroundings:
        """Return the conditions of all cells of slides that have the model's genes, one slide after the other."""
        own, around = [], []
        for slide in slides:
            found, depth = self.of(slide.counts[np.arange(len(slide))], slide.measured)
            graph = spatial_graph(slide.xy, n_neighbors, ties="cut", scale=crop_um)
            index, distance = graph.index.numpy(), graph.offset.norm(dim=-1).numpy()
            if not index.shape[1]:  # a single cell is its own neighbour
                index, distance = np.zeros((len(slide), 1), int), np.zeros((len(slide), 1))
            distance = np.pad(distance, ((0, 0), (0, n_neighbors - distance.shape[1])), mode="edge")
            own.append(found)
            around.append(np.concatenate([depth[:, None], found[index].mean(1), distance], 1).astype(np.float32))
        return Surroundings(torch.from_numpy(np.concatenate(own)), torch.from_numpy(np.concatenate(around)))


class EditNetwork(nn.Module):
    """Velocity of latents on the way from noise to images, under genes and surroundings, or under less."""

    def __init__(self, c: MorphologyConfig) -> None:
        super().__init__()
        self.config, d = c, CONDITION
        self.into = nn.Linear(c.n_latent, c.width)
        self.layers = nn.ModuleList(Layer(c.width) for _ in range(c.n_layers))
        self.norm, self.out = nn.LayerNorm(c.width), nn.Linear(c.width, c.n_latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.time = nn.Sequential(nn.Linear(128, d), nn.SiLU(), nn.Linear(d, d))
        self.known = nn.ModuleDict({
            name: nn.Linear(size, d)
            for name, size in {"own": c.n_components, "around": 1 + c.n_components + c.n_neighbors}.items()
        })  # fmt: skip
        self.nothing = nn.ParameterDict({name: torch.zeros(d) for name in self.known})  # stands for what is dropped

    def condition(self, s: Surroundings, own: Tensor | None = None, around: Tensor | None = None) -> Tensor:
        """Return the vector of conditions of each cell (n x c); of each kind only where it is kept (n, bool)."""
        vector: Any = 0.0
        for name, kept in (("own", own), ("around", around)):
            value = self.known[name](getattr(s, name))
            vector = vector + (value if kept is None else torch.where(kept[:, None], value, self.nothing[name]))
        return vector

    def forward(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the velocity (n x d) at latents z (n x d) and times t (n)."""
        condition = F.silu(condition + self.time(time_features(t, 128)))
        h = self.into(z)
        for layer in self.layers:
            h = layer(h, condition)
        return self.out(self.norm(h))


@torch.inference_mode()
def edited(
    network: EditNetwork,
    z: Tensor,
    s: Surroundings,
    shifts: Sequence[Tensor],
    noise: Tensor | None = None,
    *,
    guidance: float,
    n_steps: int = 5,
) -> list[Tensor]:
    """Return latents (n x d) of cells whose genes are shifted by each of some shifts of components (n x k).

    The velocity is v(context) + (1 + guidance) (v(genes and context) - v(context)), also on the way back to noise. ``noise`` (n
    x d) is mixed into the start. What the solver loses on the way to noise and back under the cell's own genes is given back, so
    no shift is no change.
    """
    without = network.condition(s, torch.zeros(len(z), dtype=torch.bool, device=z.device))

    def velocity(own: Tensor) -> Callable[[Tensor, float], Tensor]:
        full = network.condition(Surroundings(own, s.around))

        def at(x: Tensor, t: float) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            v = network(x, times, full)
            return v if guidance == 0 else (1 + guidance) * v - guidance * network(x, times, without)

        return at

    own = velocity(s.own)
    back = integrate(lambda x, t: -own(x, 1 - t), z, 2 * n_steps)
    lost = z - integrate(own, back, 2 * n_steps)
    start = back if noise is None else (1 - FRESH**2) ** 0.5 * back + FRESH * noise
    return [
        z if noise is None and not shift.any() else integrate(velocity(s.own + shift), start, 2 * n_steps) + lost
        for shift in shifts
    ]


@dataclass(frozen=True)
class Edit:
    """How images are edited: by the flow or by the linear map, the guidance of the flow and the strength of the map."""

    kind: str = "flow"
    guidance: float = 0.0
    strength: float = 1.0


class MorphologyEditor(MorphologyFlow):
    """A fitted generator of cell images by genes.

    Made by :func:`spatiaflow.tl.train_morphology` or :func:`spatiaflow.models.load`.

    Attributes
    ----------
    config
        Channels, transitions, sizes and training settings. ``config.edit`` and ``config.guidance``, where they are not None, come
        before ``edits``. Set them to edit in another way.
    edits
        How each transition is edited and, as "", any shift of genes: what was nearest to real targets on the held-out cells.
    genes
        Genes that the model reads.
    components
        Principal components of their log counts.
    linear
        The linear map from a shift of components to a shift of latents, k x d.
    autoencoder, shifts, intensity, states, history, card
        As in :class:`MorphologyFlow`. ``card["validation_scores"]`` has the distance to real targets of every way to edit.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("morphology-pancreas-genes"))
    >>> model.edits[""].kind, len(model.genes)
    ('linear', 377)
    """

    def __init__(
        self, *, network: EditNetwork, autoencoder: Autoencoder, genes: Sequence[str], components: Components, linear: Tensor,
        shifts: dict, intensity: dict[str, list[float]], history: dict, card: dict, states: States | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> None:  # fmt: skip
        self.network: Any = network.eval()
        self.edits = dict(edits or {})
        self.config, self.surrogate, self.autoencoder = network.config, None, autoencoder.eval()
        self.genes, self.components, self.linear = list(genes), components, linear
        self.shifts, self.intensity, self.history, self.card, self.states = shifts, intensity, history, card, states

    def __repr__(self) -> str:
        c = self.config
        return (
            f"MorphologyEditor: {len(self.genes)} genes, {', '.join(c.transitions)}; channels {', '.join(c.channels)}"
        )

    def edit_of(self, name: str = "") -> Edit:
        """Return how a transition is edited, or any shift of genes (""). The settings come first."""
        found, c = self.edits.get(name) or self.edits.get("", Edit()), self.config
        guidance = found.guidance if c.guidance is None else c.guidance
        return replace(found, kind=c.edit or found.kind, guidance=guidance)

    def change(self, edit: str | Mapping[str, float], niche: np.ndarray) -> np.ndarray:
        """Return by how much components change in each cell, n x k: by a transition in its niche, or by a shift of genes."""
        if isinstance(edit, str):
            shifts = self.shifts[edit]
            names, place = np.unique(np.where(np.isin(niche, [*shifts]), niche, ""), return_inverse=True)
            return self.components.shift(np.array([shifts[name]["genes"] for name in names]))[place]
        genes = np.zeros((1, len(self.genes)))
        genes[0, [self.genes.index(gene) for gene in edit]] = [*edit.values()]
        return np.repeat(self.components.shift(genes), len(niche), 0)

    @torch.inference_mode()
    def edit(
        self, control: Tensor, s: Surroundings, change: Tensor, noise: Tensor | None = None, *, doses: Sequence[float] = (1.0,),
        n_steps: int = 5, by: Edit | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Return images (n x C x p x p) of cells after each dose of a change of components (n x k).

        The grain of the source image, what its latents do not hold, is kept. A dose of 0 leaves the image as it is.
        """
        by = by or self.edit_of()
        turns = canonical(control)
        control = turned(control, turns)
        z = self.autoencoder.encode(control)
        if by.kind == "linear":
            line = by.strength * change @ self.linear.to(change)
            made = [z + dose * line + (0 if noise is None else FRESH * noise) for dose in doses]
        else:
            shifts = [dose * change for dose in doses]
            made = edited(self.network, z, s, shifts, noise, guidance=by.guidance, n_steps=n_steps)
        grain = self.autoencoder.grain(control, z)
        return [turned(self.autoencoder.decode(one, grain), inverse(turns)) for one in made]

    def generate_cells(
        self,
        slides: Sequence[Slide],
        rows: np.ndarray,
        edit: str | Mapping[str, float] | np.ndarray,
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
        """Return images of some cells under an edit, in the type and scale of the slides' images.

        Parameters
        ----------
        slides
            With crops in the model's channels, scaled by ``intensity``, and with counts.
        rows, niche, batch_size, update
            As in :meth:`MorphologyFlow.generate_cells`.
        edit
            A transition, a shift of log counts by gene, or a change of components for each cell, n x k.
        doses
            Shares of the edit. Each is an image of its own.
        n_samples
            Images of each cell and dose. The first has no fresh noise.

        Returns
        -------
        ``"image"`` and ``"source"``, n * doses * n_samples x C x p x p; all images of a cell one after the other, by dose.
        """
        surroundings = self.components.surroundings(
            [slide.align(self.genes) for slide in slides], self.config.n_neighbors, self.config.crop_um
        )
        change = torch.from_numpy(edit if isinstance(edit, np.ndarray) else self.change(edit, niche))
        by = self.edit_of(edit if isinstance(edit, str) else "")
        modules = self.network.to(device), self.autoencoder.to(device)

        def make(control: Tensor, names: np.ndarray, here: np.ndarray) -> dict[str, Tensor]:
            given, shift, found = surroundings.rows(rows[here]).to(device), change[here].to(device), []
            for sample in range(n_samples):
                noise = named_noise(names, seed, sample, self.config.n_latent).to(device) if sample else None
                found.append(
                    torch.stack(self.edit(control, given, shift, noise, doses=doses, n_steps=n_steps, by=by), 1)
                )
            images = torch.stack(found, 2).flatten(1, 2)  # n x (doses x samples) x C x p x p
            return {"image": images, "source": control[:, None].expand_as(images)}

        made = self.read(slides, rows, make, batch_size=batch_size, device=device, update=update)
        for module in modules:
            module.cpu()
        return made

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return description and tensors."""
        description, tensors = super().state()
        description |= {"genes": self.genes, "edits": {name: asdict(one) for name, one in self.edits.items()}}
        more = {f"components.{name}": value.contiguous() for name, value in self.components.state_dict().items()}
        return description, tensors | more | {"linear": self.linear.contiguous()}

    @classmethod
    def from_state(cls, description: dict, tensors: dict[str, Tensor]) -> MorphologyEditor:
        """Rebuild a model from the description and tensors of its file."""
        d, config = description, MorphologyConfig(**description["config"])
        parts: dict[str, Any] = {
            "network": EditNetwork(config),
            "autoencoder": Autoencoder(len(config.channels), config.n_latent, config.crop_pixels),
            "components": Components(len(d["genes"]), config.n_components),
        }  # fmt: skip
        for name, module in parts.items():
            _base.fill(module, {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")})
        states = d["states"] and States(**d["states"])
        same = {name: d[name] for name in ("genes", "shifts", "intensity", "history", "card")}
        edits = {name: Edit(**one) for name, one in d.get("edits", {}).items()}
        return cls(**parts, **same, linear=tensors["linear"], states=states, edits=edits)
