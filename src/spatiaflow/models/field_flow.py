"""Flows that start from draws of the joint law's field: images and neighbours move them towards what counts say.

The state is a few whitened gene components of the deviation of log rates, field and nugget. The path from a draw x_0 of the
field to a deviation x_1 is x_t = cos(pi t / 2) x_0 + sin(pi t / 2) x_1 (Albergo and Vanden-Eijnden 2023). Where deviations have
the law of the field, and images do not tell more about them, the mean velocity is 0: a network of zeros is the Gaussian law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models.flow import integrate
from spatiaflow.models.law import JointLaw
from spatiaflow.models.regression import Scaled, blocks
from spatiaflow.models.spatial import spatial_graph

N_STEPS = 4
NEIGHBORS = 8, 24  # whose mean state a token sees
WIDTH, DROPOUT = 64, 0.3
MAX_VALUE = 4.0  # standard deviations, of what a token knows

Velocity = Callable[[Tensor, float], Tensor]  # at states of a slide, n x components, and a time


@dataclass(frozen=True)
class Tokens:
    """What a flow knows of a slide beside the state."""

    image: np.ndarray  # n x components of the features
    pattern: np.ndarray  # n x gene components of the log mean rate
    neighbors: np.ndarray  # n x k, nearest first

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: slice) -> Tensor:
        """Of some rows: their image, the mean image of the nearest, and the pattern."""
        near = self.neighbors[rows, : NEIGHBORS[0]]
        around = sum(self.image[column] for column in near.T) / near.shape[1]
        return torch.from_numpy(np.concatenate([self.image[rows], around, self.pattern[rows]], 1))


def gene_components(law: JointLaw) -> tuple[np.ndarray, np.ndarray]:
    """Matrices from deviations to whitened components (genes x components), and back (components x genes)."""
    axes, size, _ = np.linalg.svd(law.factors, full_matrices=False)
    std = np.sqrt(size**2 + (axes**2 * law.own[:, None]).sum(0))
    sd = np.sqrt(np.maximum(law.variance, 1e-4))
    return axes / sd[:, None] / std, (axes * std).T * sd


def neighbors_of(xy: np.ndarray) -> np.ndarray:
    """Nearest other spots, n x at most 24, nearest first; of a single spot, itself."""
    return spatial_graph(xy, NEIGHBORS[-1], ties="cut").index.numpy() if len(xy) > 1 else np.zeros((1, 1), np.int64)


class FieldFlow(nn.Module):
    """Velocity of whitened gene components, n x components, from their own state, that of neighbours, images and time.

    The mean velocity over a slide is 0: levels belong to the slide effect.

    Parameters
    ----------
    centre, components
        Of the principal components of scaled features: F, and F x components with unit variance.
    down, up
        As :func:`gene_components` gives them.
    """

    centre: Tensor
    components: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, centre: np.ndarray, components: np.ndarray, down: np.ndarray, up: np.ndarray):
        super().__init__()
        arrays = {"centre": centre, "components": components, "down": down, "up": up}
        for name, value in arrays.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value), dtype=torch.float32))
        n = down.shape[1]
        self.of_tokens = nn.Linear(2 * components.shape[1] + n, WIDTH)  # apart from the state: they stay over all steps
        self.of_state = nn.Linear(n * (1 + len(NEIGHBORS)) + 2, WIDTH, bias=False)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Dropout(DROPOUT)
        )
        self.last = nn.Linear(WIDTH, n)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def tokens(self, features: Scaled | np.ndarray, neighbors: np.ndarray, log_mean: np.ndarray) -> Tokens:
        """Tokens of a slide from scaled features (n x F), :func:`neighbors_of` it, and log mean rates (n x genes)."""
        image = self._reduced(features) if isinstance(features, np.ndarray) else features.apply(self._reduced)
        pattern = (log_mean - log_mean.mean(0)) @ self.down.numpy()
        return Tokens(image, np.clip(pattern, -MAX_VALUE, MAX_VALUE).astype(np.float32), neighbors)

    def _reduced(self, features: np.ndarray) -> np.ndarray:
        found = (features.astype(np.float32) - self.centre.numpy()) @ self.components.numpy()
        return np.clip(found, -MAX_VALUE, MAX_VALUE)

    def forward(self, x: Tensor, t: Tensor, known: Tensor, neighbors: Tensor) -> Tensor:
        """Velocity at states x (draws x n x components) and times t (draws).

        Parameters
        ----------
        known
            What ``of_tokens`` makes of the tokens, n x width.
        neighbors
            n x k.
        """
        flat = x.transpose(0, 1).flatten(1)  # n x (draws x components)
        means = (nn.functional.embedding_bag(neighbors[:, :k].contiguous(), flat, mode="mean") for k in NEIGHBORS)
        around = [mean.view(len(flat), *x.shape[::2]).transpose(0, 1) for mean in means]
        angle = torch.pi / 2 * t
        time = torch.stack([angle.cos(), angle.sin()], -1)[:, None].expand(-1, x.shape[1], -1)
        state = torch.cat([x, *around, time], 2)
        parts = [self.last(self.body(known[rows] + self.of_state(state[:, rows]))) for rows in blocks(x.shape[1])]
        out = torch.cat(parts, 1)
        return out - out.mean(1, keepdim=True)

    @torch.no_grad()
    def of_slide(self, tokens: Tokens) -> Velocity:
        """Velocity at states of one slide, n x components, and a time."""
        self.eval()
        known = torch.cat([self.of_tokens(tokens[rows]) for rows in blocks(len(tokens))])
        neighbors = torch.from_numpy(tokens.neighbors)
        return torch.no_grad()(lambda x, t: self(x[None], torch.tensor([t]), known, neighbors)[0])


@dataclass(frozen=True)
class FieldFlows:
    """Flows of some folds.

    Attributes
    ----------
    share
        Of the way that draws are moved.
    for_new_donors
        Whether they were judged on donors that they had not seen; otherwise they move slides of known donors alone.
    """

    flows: tuple[FieldFlow, ...]
    share: float
    for_new_donors: bool

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, by name."""
        named = {f"{i}.{name}": v.numpy() for i, f in enumerate(self.flows) for name, v in f.state_dict().items()}
        return {"share": np.array(self.share), "for_new_donors": np.array(self.for_new_donors)} | named

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> FieldFlows:
        """From what :meth:`tensors` gave."""
        flows: list[FieldFlow] = []
        while start := {k: v for k, v in tensors.items() if k.startswith(f"{len(flows)}.")}:
            state: dict[str, Any] = {name.partition(".")[2]: torch.from_numpy(np.array(v)) for name, v in start.items()}
            flow = FieldFlow(*(state[name].numpy() for name in ("centre", "components", "down", "up")))
            flow.load_state_dict(state)
            flows.append(flow.eval())
        return cls(tuple(flows), float(tensors["share"]), bool(tensors["for_new_donors"]))


@dataclass(frozen=True)
class Moves:
    """How flows move the draws of one slide, and their mean.

    Levels belong to the slide effect: the mean of a gene's log rate over the slide stays.

    Attributes
    ----------
    features
        Scaled, n x F.
    xy
        n x 2.
    log_mean
        Log of the mean rates, n x genes.
    """

    flows: FieldFlows
    features: Scaled | np.ndarray
    xy: np.ndarray
    log_mean: np.ndarray

    @cached_property
    def _neighbors(self) -> np.ndarray:
        return neighbors_of(self.xy)

    def _velocity(self, flow: FieldFlow) -> Velocity:
        return flow.of_slide(flow.tokens(self.features, self._neighbors, self.log_mean))

    def mean(self) -> np.ndarray:
        """Change of the mean log rate, n x genes: where the flows lead the mean of the field, 0."""
        out = np.zeros(self.log_mean.shape, np.float32)
        for flow in self.flows.flows:
            way = _way(self._velocity(flow), torch.zeros(len(out), flow.down.shape[1]))
            out += (self.flows.share / len(self.flows.flows) * way @ flow.up).numpy()
        return out

    def of_draws(self, n_draws: int) -> Callable[[int, np.ndarray], np.ndarray]:
        """What moves the deviation of log rates of each draw, n x genes; one flow after the other moves its part of the draws."""
        last: dict[int, Velocity] = {}

        def move(draw: int, deviation: np.ndarray) -> np.ndarray:
            which = draw * len(self.flows.flows) // n_draws
            flow = self.flows.flows[which]
            if which not in last:  # one at a time: a slide can be large
                last.clear()
                last[which] = self._velocity(flow)
            way = _way(last[which], torch.from_numpy(deviation) @ flow.down)
            return deviation + (self.flows.share * way @ flow.up).numpy()

        return move


def _way(velocity: Velocity, start: Tensor) -> Tensor:
    """How far states of one slide, n x components, go from t = 0 to 1."""
    half = 0.5 / N_STEPS  # the middle of each step: at the ends only one of x_0 and x_1 is seen
    return integrate(lambda x, t: velocity(x, t + half), start, N_STEPS, method="euler") - start
