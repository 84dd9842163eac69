"""Distance of new features to the training data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree


@dataclass
class OutOfDomain:
    """Distance of features to the training data: mean distance to the nearest references along principal axes."""

    components: np.ndarray  # F x d, whitened principal axes
    references: np.ndarray  # m x d
    distances: np.ndarray  # sorted; of each training row to the references of the other groups

    N_NEAREST = 5

    @classmethod
    def fit(cls, groups: list[np.ndarray], n_components: int = 16, n_references: int = 2000) -> OutOfDomain:
        """Fit to features (n x F) of several groups of slides."""
        stacked = np.concatenate(groups).astype(np.float64)
        thin = stacked[:: max(1, len(stacked) // 5000)]
        _, singular, axes = np.linalg.svd(thin, full_matrices=False)
        d = min(n_components, int((singular > 1e-6 * singular[0]).sum()))
        components = axes[:d].T / (singular[:d] / np.sqrt(len(thin)))
        group = np.repeat(np.arange(len(groups)), [len(f) for f in groups])
        rng, quota = np.random.default_rng(0), -(-n_references // len(groups))
        chosen = np.concatenate([rng.permutation(np.flatnonzero(group == g))[:quota] for g in range(len(groups))])
        points = stacked @ components
        distances = [cls._distance(points[group == g], points[chosen[group[chosen] != g]]) for g in range(len(groups))]
        return cls(components, points[chosen], np.sort(np.concatenate(distances)))

    @classmethod
    def _distance(cls, points: np.ndarray, references: np.ndarray) -> np.ndarray:
        nearest = cKDTree(references).query(points, k=min(cls.N_NEAREST, len(references)), workers=-1)[0]
        return nearest.reshape(len(points), -1).mean(1)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the distance of each row of features to the training data."""
        return self.at(features @ self.components)

    def at(self, points: np.ndarray) -> np.ndarray:
        """The same of features that are given along the principal axes, n x d."""
        return self._distance(points, self.references)

    def quantile(self, distance: np.ndarray) -> np.ndarray:
        """Return the quantile in [0, 1] of distances among those of the training rows."""
        return np.searchsorted(self.distances, distance) / len(self.distances)


@dataclass
class Domain:
    """Out-of-domain score of values that have no common unit: they are centred and scaled as the training rows are."""

    centre: np.ndarray  # F
    scale: np.ndarray  # F
    ood: OutOfDomain

    N_DISTANCES = 1000  # quantiles that stand for the distances of all training rows

    @classmethod
    def fit(cls, groups: list[np.ndarray]) -> Domain:
        """Fit to values (n x F) of several groups of slides, or of several parts of one."""
        stacked = np.concatenate(groups).astype(np.float64)
        centre, scale = stacked.mean(0), np.maximum(stacked.std(0), 1e-6)
        ood = OutOfDomain.fit([(group - centre) / scale for group in groups])
        ood.distances = np.quantile(ood.distances, (np.arange(cls.N_DISTANCES) + 0.5) / cls.N_DISTANCES)
        return cls(centre, scale, ood)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Score of each row, n, float32 in [0, 1]: the quantile of its distance among the training rows'."""
        return self.ood.quantile(self.ood((values - self.centre) / self.scale)).astype(np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, by name, float32."""
        arrays = {"centre": self.centre, "scale": self.scale, **vars(self.ood)}
        return {name: np.asarray(value, np.float32) for name, value in arrays.items()}

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Domain:
        """From what :meth:`tensors` gave."""
        known = {name: value.astype(np.float64) for name, value in tensors.items()}
        return cls(known.pop("centre"), known.pop("scale"), OutOfDomain(**known))
