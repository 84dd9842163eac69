"""Training batches of contiguous regions of tissue, and validation batches of whole slides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import GEOMETRY, join
from spatiaflow.models.stflow import STFlowConfig


def region(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the rows of a random contiguous region: a random spot and its nearest u n spots, u ~ U(0, 1), at least two."""
    size = min(len(xy), max(2, int(rng.uniform() * len(xy))))
    distance = ((xy - xy[rng.integers(len(xy))]) ** 2).sum(1)
    return np.sort(np.argpartition(distance, size - 1)[:size])


class Regions(Dataset):
    """Batches of one epoch: ``config.regions`` regions of every slide in random order.

    Item b depends only on the seed, :attr:`epoch` and b, so a resumed run sees the same batches as an uninterrupted one. The
    regions of a batch are joined to one graph without padding.
    """

    def __init__(
        self, slides: list[Slide], expression: list[np.ndarray], base: list[np.ndarray] | None, config: STFlowConfig, prior,
        seed: int,
    ):  # fmt: skip
        self.slides, self.expression, self.base = slides, expression, base
        self.config, self.prior, self.seed, self.epoch = config, prior, seed, 0

    def __len__(self) -> int:
        return -(-len(self.slides) * self.config.regions // self.config.regions_per_batch)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        if not 0 <= b < len(self):
            raise IndexError(b)
        c = self.config
        jobs = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.slides) * c.regions)
        rng = np.random.default_rng([self.seed, self.epoch, b])
        chosen = [int(j) // c.regions for j in jobs[b * c.regions_per_batch : (b + 1) * c.regions_per_batch]]
        rows = [region(self.slides[i].xy, rng) for i in chosen]
        parts = [self.slides[i].take(r) for i, r in zip(chosen, rows)]
        expression = [self.expression[i][r] for i, r in zip(chosen, rows)]
        base = None if self.base is None else [self.base[i][r] for i, r in zip(chosen, rows)]
        return batch(parts, expression, base, c, self.prior, [float(rng.uniform()) for _ in parts], rng)


class WholeSlides(Dataset):
    """Whole validation slides, with the same draw of the prior in each epoch."""

    def __init__(
        self, slides: list[Slide], expression: list[np.ndarray], base: list[np.ndarray] | None, config: STFlowConfig, prior,
        seed: int,
    ):  # fmt: skip
        rng = np.random.default_rng([seed, 1])
        self.batches = [
            batch([slide], [y], None if base is None else [base[i]], config, prior, [0.0], rng)
            for i, (slide, y) in enumerate(zip(slides, expression))
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        return self.batches[b]


def batch(
    slides: list[Slide], expression: list[np.ndarray], base: list[np.ndarray] | None, config: STFlowConfig, prior,
    times: list[float], rng: np.random.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Join slides or regions to one batch.

    Returns
    -------
    Features, expression, draw of the prior, simple prediction and time of each token; the graph and its edge features.
    """
    graph = join([slide.graph(config.n_neighbors, ties=config.ties) for slide in slides])
    y, known = np.concatenate(expression), None if base is None else np.concatenate(base)
    out = {
        "features": np.concatenate([slide.features for slide in slides]),
        "y": y,
        "start": prior.sample(len(y), y.shape[1], rng, known),
        "base": known if config.residual else np.zeros((1, 1), np.float32),
        "t": np.repeat(np.asarray(times, np.float32), [len(slide) for slide in slides]),
    }
    tensors = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in out.items()}
    return tensors | {"index": graph.index, "mask": graph.mask, "edges": GEOMETRY[config.geometry][0](graph)}
