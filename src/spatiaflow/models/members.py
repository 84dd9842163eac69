"""The simple models that STFlow's network is stacked with: regressions of log expression and of rates, raw and smoothed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spatiaflow.models.rates import Rates
from spatiaflow.models.regression import Ridge, Scaled, smooth
from spatiaflow.models.slide import Rows, Slide

MODES = ("global", "slide")  # features are scaled by the training slides, or by the slide itself
SMOOTHING = 0.5  # the stack mixes raw and smoothed, so any weight up to this one can come out
SMOOTHED_OVER = 8  # neighbours
KINDS = ("ridge", "NB regression", "NB perceptron")
NAMES = tuple(f"{kind}, {mode}{more}" for mode in MODES for kind in KINDS for more in ("", ", smoothed"))
NETWORK = "network"


@dataclass(frozen=True)
class Members:
    """Simple models fitted to some slides.

    Attributes
    ----------
    mean, std
        Of the features, F.
    ridges
        Ridge regression of log expression for each of :data:`MODES`.
    rates
        Count regressions for each of :data:`MODES`: linear, perceptron. Empty for a network that is not stacked.
    depth
        Ridge regression of the log library size.
    """

    mean: np.ndarray
    std: np.ndarray
    ridges: dict[str, Ridge]
    rates: dict[str, tuple[Rates, Rates]]
    depth: Ridge

    def scaled(self, features: Rows, mode: str) -> Scaled:
        """Features as the models take them."""
        return Scaled(features, self.mean, self.std, mode)

    def predictions(
        self, slide: Slide, expression: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the log expression (n x genes) that each of :data:`NAMES` predicts, in that order.

        Parameters
        ----------
        slide
            With raw features, without glass.
        expression
            Mean log expression of log rates.
        wanted
            Which of them are computed, bool; others are yielded as zeros.
        """
        wanted = np.ones(len(NAMES), bool) if wanted is None else wanted
        graph: Any = slide.graph(SMOOTHED_OVER) if wanted[1::2].any() else None
        zeros = np.zeros((len(slide), 1), np.float32)
        for m, mode in enumerate(MODES):
            x: Any = self.scaled(slide.features, mode) if wanted[6 * m : 6 * m + 6].any() else None
            for k in range(3):
                raw_wanted, smooth_wanted = wanted[6 * m + 2 * k : 6 * m + 2 * k + 2]
                raw = zeros
                if raw_wanted or smooth_wanted:
                    raw = x.apply(self.ridges[mode].predict if k == 0 else self.rates[mode][k - 1])
                    raw = raw if k == 0 else expression(raw)
                yield raw if raw_wanted else zeros
                yield smooth(raw, graph, SMOOTHING) if smooth_wanted else zeros

    def log_depth(self, slide: Slide) -> np.ndarray:
        """Predicted log library size of every row, n."""
        predicted = self.scaled(slide.features, "global").apply(self.depth.predict)
        return smooth(predicted, slide.graph(SMOOTHED_OVER), SMOOTHING)[:, 0]

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, by name."""
        out = {"mean": self.mean, "std": self.std, "depth.coefficients": self.depth.coefficients}
        out["depth.intercept"] = self.depth.intercept
        for mode in MODES:
            ridge = self.ridges[mode]
            out |= {f"{mode}.ridge.coefficients": ridge.coefficients, f"{mode}.ridge.intercept": ridge.intercept}
            for kind, rates in zip(("linear", "perceptron"), self.rates.get(mode, ())):
                out |= {f"{mode}.{kind}.{name}": value for name, value in rates.tensors().items()}
        return out

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Members:
        """From what :meth:`tensors` gave."""

        def under(start: str) -> dict[str, Any]:
            return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}

        rates = {}
        for mode in MODES:
            if linear := under(f"{mode}.linear."):
                rates[mode] = (Rates.of(linear), Rates.of(under(f"{mode}.perceptron.")))
        ridges = {mode: Ridge(**under(f"{mode}.ridge.")) for mode in MODES}
        return cls(tensors["mean"], tensors["std"], ridges, rates, Ridge(**under("depth.")))
