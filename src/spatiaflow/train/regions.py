"""Contiguous regions of tissue as training batches, whole slides as validation batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow.models.simple import SlideData
from spatiaflow.models.spatial import join, spatial_graph
from spatiaflow.models.stflow import GEOMETRY, Preset


def region(xy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of a random contiguous region: a random centre and its nearest u n spots, u ~ U(0, 1), at least two."""
    size = min(len(xy), max(2, int(rng.uniform() * len(xy))))
    distance = ((xy - xy[rng.integers(len(xy))]) ** 2).sum(1)
    return np.sort(np.argpartition(distance, size - 1)[:size])


class Regions(Dataset):
    """Batches of one epoch: ``preset.regions`` regions of every slide in random order.

    Item b is a function of the seed, :attr:`epoch` and b alone, so that a resumed run sees what an uninterrupted one does.
    Regions of a batch are put side by side as one graph; nothing is padded.
    """

    def __init__(self, slides: list[SlideData], preset: Preset, prior, seed: int):
        self.slides, self.preset, self.prior, self.seed, self.epoch = slides, preset, prior, seed, 0

    def __len__(self) -> int:
        return -(-len(self.slides) * self.preset.regions // self.preset.regions_per_batch)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        if not 0 <= b < len(self):
            raise IndexError(b)
        jobs = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.slides) * self.preset.regions)
        rng, size = np.random.default_rng([self.seed, self.epoch, b]), self.preset.regions_per_batch
        chosen = [self.slides[j // self.preset.regions] for j in jobs[b * size : (b + 1) * size]]
        parts = [slide.take(region(slide.xy, rng)) for slide in chosen]
        return batch(parts, self.preset, self.prior, [float(rng.uniform()) for _ in parts], rng)


class WholeSlides(Dataset):
    """Every validation slide whole, with the same prior draw at each epoch."""

    def __init__(self, slides: list[SlideData], preset: Preset, prior, seed: int):
        rng = np.random.default_rng([seed, 1])
        self.batches = [batch([slide], preset, prior, [0.0], rng) for slide in slides]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        return self.batches[b]


def batch(slides: list[SlideData], preset: Preset, prior, times: list[float], rng: np.random.Generator) -> dict:
    """Put slides (or regions) side by side: features, truth, prior draw, time of each token, graph and its geometry."""
    graph = join([spatial_graph(s.xy, preset.n_neighbors, ties=preset.ties) for s in slides])
    y, base = np.concatenate([s.y for s in slides]), [s.base for s in slides]
    base = None if base[0] is None else np.concatenate(base)
    start = prior.sample(len(y), y.shape[1], rng, base)
    out = {
        "features": np.concatenate([s.features for s in slides]),
        "y": y,
        "start": start,
        "base": base if preset.residual else np.zeros((1, 1), np.float32),
        "t": np.repeat(np.asarray(times, np.float32), [len(s) for s in slides]),
    }
    tensors = {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in out.items()}
    return tensors | {"index": graph.index, "mask": graph.mask, "edges": GEOMETRY[preset.geometry][0](graph)}
