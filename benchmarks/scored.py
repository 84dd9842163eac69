"""A slide of spots as the benchmarks of expression score it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import Part, Ridge, choose_ridge, fit_ridge, standardize
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import Graph

SMOOTHED_OVER = 8  # neighbours


@dataclass
class Scored:
    """A slide with features and counts of the genes to predict, and their expression beside it (n x genes).

    It is a class, and not a slide and a parallel list, because slides are left out one at a time, drawn, scaled and shuffled in
    a dozen places: two lists would have to be indexed alike in each.
    """

    slide: Slide
    y: np.ndarray

    @classmethod
    def of(
        cls, name: str, obs_names, xy: np.ndarray, features: np.ndarray, counts: np.ndarray, library: np.ndarray,
        genes: Sequence[str], target_sum: float | None,
    ) -> "Scored":  # fmt: skip
        """From arrays; expression is log1p of counts per ``target_sum``, or of raw counts with None."""
        slide = Slide(name, obs_names, xy, sparse.csr_matrix(counts), library, genes, features=features)
        return cls(slide, log_normalize(counts, library, target_sum))

    def __len__(self) -> int:
        return len(self.slide)

    @property
    def name(self) -> str:
        return self.slide.name

    @property
    def features(self) -> np.ndarray:
        return self.slide.features

    @property
    def part(self) -> Part:
        """What regressions read."""
        return self.slide.features, self.y

    @property
    def graph(self) -> Graph:
        """What predictions are smoothed over."""
        return self.slide.graph(SMOOTHED_OVER)

    def having(self, features: np.ndarray) -> "Scored":
        """The same slide with other features."""
        return replace(self, slide=replace(self.slide, features=features))


def scaled(train: list[Scored], test: list[Scored], mode: str) -> tuple[list[Scored], list[Scored]]:
    """Features scaled by those of the training slides, or each slide's by its own with ``mode="slide"``."""
    features = np.concatenate([s.features for s in train]).astype(np.float64)
    mean, std = features.mean(0), features.std(0)
    std = np.where(std < 1e-6, 1, std)
    first, second = ([s.having(standardize(s.features, mean, std, mode)) for s in some] for some in (train, test))
    return first, second


def chosen_ridge(train: list[Scored]) -> tuple[float, float, float]:
    """Penalty, smoothing and their score, by leaving out one slide at a time."""
    return choose_ridge([[s.part] for s in train], [[s.graph] for s in train])


def fitted_ridge(train: list[Scored], alpha: float) -> Ridge:
    """A ridge regression on some slides."""
    return fit_ridge([s.part for s in train], alpha)
