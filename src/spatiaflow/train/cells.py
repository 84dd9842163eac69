"""Batches that SPATIA is trained on: cells from many places, and contiguous fields of cells."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.data import Dataset

from spatiaflow.models.fusion import Surroundings
from spatiaflow.models.orientation import turned
from spatiaflow.models.preprocess import relative_scale, scaled
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import SpatiaConfig

Standards = Mapping[str, np.ndarray | None]  # by name of the slide: how its genes are standardised, 3 x genes


def augmented(x: Tensor, rng: np.random.Generator, n_channels: int) -> Tensor:
    """Turn and mirror each crop; change gain, gamma and background of each channel a little, by the same for all crops.

    ``x`` has the channels of the crops, then those of the wider crops where there are any.

    Brightness carries information on expression. A large change, or another one for each cell, would teach to ignore it.
    """
    n, c = len(x), n_channels
    x = turned(x, rng.integers(0, 8, n))
    gain, gamma, shift = (
        torch.from_numpy(v.astype(np.float32)).repeat(x.shape[1] // c).view(1, -1, 1, 1)
        for v in (rng.lognormal(0, 0.08, c), rng.lognormal(0, 0.06, c), rng.normal(0, 0.012, c))
    )
    return x.clamp_min(0) ** gamma * gain + shift


class SlideBatches(Dataset):
    """Item b of an epoch depends on the seed, the epoch and b alone.

    Tissues, and slides within a tissue, are drawn with probability proportional to the square root of their cells, so that
    large ones do not dominate.
    """

    def __init__(self, slides: Sequence[Slide], standards: Standards, config: SpatiaConfig, n_batches: int, seed: int):
        self.slides, self.standards, self.config = slides, standards, config
        self.n_batches, self.seed, self.epoch = n_batches, seed, 0
        self.trees = [cKDTree(s.xy, leafsize=32) for s in slides]  # half the nodes, half the memory
        cells_of = np.array([len(s) for s in slides], float)
        tissue = np.array([s.tissue for s in slides])
        share = np.zeros(len(slides))
        for name in np.unique(tissue):
            same = tissue == name
            share[same] = np.sqrt(cells_of[same].sum()) * np.sqrt(cells_of[same]) / np.sqrt(cells_of[same]).sum()
        self.share = share / share.sum()

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, b: int) -> dict:
        if not 0 <= b < len(self):
            raise IndexError(b)
        rng = np.random.default_rng([self.seed, self.epoch, b])
        return self.batch(b, rng) | {"seed": int(rng.integers(2**31))}

    @abstractmethod
    def batch(self, b: int, rng: np.random.Generator) -> dict:
        """One batch."""

    def place(self, rng: np.random.Generator) -> tuple[int, int]:
        """A slide and one of its cells."""
        which = int(rng.choice(len(self.slides), p=self.share))
        return which, int(rng.integers(len(self.slides[which])))


class ScatteredCells(SlideBatches):
    """Batches for the losses of single cells: crops, counts and positions of cells from many places.

    Neighbours look alike, so a step that sees few places teaches an encoder little. The cells are drawn from ``places``
    contiguous regions that stay the same for ``stretch`` successive batches, so that images are read region by region.
    """

    def __init__(
        self, slides: Sequence[Slide], standards: Standards, config: SpatiaConfig, n_batches: int, *, cells=256, places=24,
        stretch=16, radius_um=150.0, seed=0, augment=True,
    ):  # fmt: skip
        super().__init__(slides, standards, config, n_batches, seed)
        self.cells, self.places, self.stretch, self.radius_um, self.augment = cells, places, stretch, radius_um, augment
        self._known: Any = None, None  # of the last stretch

    def batch(self, b: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Crops, counts and positions of cells, and what is known of their slides."""
        which, rows = self._pool(b // self.stretch)
        chosen = rng.choice(len(rows), min(self.cells, len(rows)), replace=False)
        parts = [self._read(k, np.sort(rows[chosen[which[chosen] == k]]), rng) for k in np.unique(which[chosen])]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pool(self, stretch: int) -> tuple[np.ndarray, np.ndarray]:
        """Slide and row of all cells of the regions of one stretch."""
        key = self.epoch, stretch
        if self._known[0] != key:
            rng = np.random.default_rng([self.seed, *key, 1])
            pool: dict[int, np.ndarray] = {}
            for which, first in (self.place(rng) for _ in range(self.places)):
                around = self.trees[which].query_ball_point(self.slides[which].xy[first], self.radius_um)
                pool[which] = np.union1d(pool.get(which, []), around).astype(int)
            slides = np.repeat([*pool], [len(rows) for rows in pool.values()])
            self._known = key, (slides, np.concatenate([*pool.values()]))
        return self._known[1]

    def _read(self, which: int, rows: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        slide, n = self.slides[which], len(rows)
        part = {"xy": torch.from_numpy(slide.xy[rows]), "measured": torch.from_numpy(np.tile(slide.measured, (n, 1)))}
        if slide.counts is not None:
            part["counts"] = torch.from_numpy(slide.counts[rows].toarray().astype(np.float32))
            part["standard"] = torch.from_numpy(self.standards[slide.name]).expand(n, -1, -1)
        if slide.crops is not None:
            x = scaled(slide.crops.read(rows), slide.crops.range, slide.crops.places)
            part["crops"] = augmented(x, rng, len(slide.crops.places)) if self.augment else x
            part["scale"] = relative_scale(slide.crops, rows, self.config)
            part["present"] = torch.from_numpy(np.tile(slide.crops.places >= 0, (n, 1)))
        return part


class Fields(SlideBatches):
    """Batches for the niche and tissue levels: one contiguous field of cells, embedded by encoders that are trained.

    ``views`` holds for every slide its cell embeddings: from both modalities, from the image, from the genes.
    """

    def __init__(
        self, slides: Sequence[Slide], standards: Standards, views: list[list[np.ndarray]], config: SpatiaConfig,
        n_batches: int, *, cells=1024, seed=0,
    ):  # fmt: skip
        super().__init__(slides, standards, config, n_batches, seed)
        self.views, self.cells = views, cells

    def batch(self, b: int, rng: np.random.Generator) -> dict:
        """Embeddings and counts of the cells of one field, and their surroundings."""
        which, first = self.place(rng)
        slide, views = self.slides[which], self.views[which]
        k = min(self.cells, len(slide))
        rows = np.sort(self.trees[which].query(slide.xy[first], k=[*range(1, k + 1)])[1])
        share = np.array([2.0, 1.0, 1.0][: len(views)])  # both modalities twice as often as one of them
        view = views[int(rng.choice(len(views), p=share / share.sum()))]
        return {
            "cells": torch.from_numpy(np.asarray(view[rows], np.float32)),
            "counts": torch.from_numpy(slide.counts[rows].toarray().astype(np.float32)),
            "measured": torch.from_numpy(np.tile(slide.measured, (len(rows), 1))),
            "standard": torch.from_numpy(self.standards[slide.name])[None],
            "around": Surroundings.of(slide.xy[rows], self.config),
        }
