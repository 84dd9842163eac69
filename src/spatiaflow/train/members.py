"""Fitting the simple models of the stack, and what is chosen once for all folds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spatiaflow._settings import logger
from spatiaflow.models.counts import CountLaw, log_normalize
from spatiaflow.models.members import MODES, SMOOTHED_OVER, Members
from spatiaflow.models.rates import Part, choose_penalty, fit_linear, fit_perceptron
from spatiaflow.models.regression import choose_ridge, fit_ridge, standardize
from spatiaflow.models.slide import Slide
from spatiaflow.train.law import fit_theta, level_of

MAX_ROWS = 20_000  # that a count regression is fitted to
UNCHOSEN = 100.0  # penalty of the regression that gives the dispersions alone
STOP_SHARE = 0.2  # of every slide, held out to stop the perceptron


def expression(slide: Slide, target_sum: float | None) -> np.ndarray:
    """Log-normalised expression, n x genes."""
    return log_normalize(counts_of(slide), slide.library, target_sum)


def counts_of(slide: Slide) -> np.ndarray:
    """Counts, n x genes, float64."""
    return slide.counts.toarray().astype(np.float64)


@dataclass(frozen=True)
class Choices:
    """What is chosen on all training slides together, and then used in every fold."""

    mean: np.ndarray  # of the features, F
    std: np.ndarray
    mode: str  # how the network's features are scaled, one of MODES
    alpha: float  # penalty of the ridge regression
    penalty: float  # of the count regression
    theta: np.ndarray  # inverse dispersion of counts around a simple prediction, genes
    counting: CountLaw
    target_sum: float | None

    @classmethod
    def of(
        cls, slides: list[Slide], groups: list[list[Slide]], mode: str, target_sum: float | None, libraries: np.ndarray,
        *, stacked: bool,
    ) -> Choices:  # fmt: skip
        """Choose by leaving out one group of slides at a time.

        Parameters
        ----------
        slides
            All training slides, with raw features.
        groups
            The same spots as they are held out together.
        mode
            One of :data:`MODES`, or ``"choose"``.
        libraries
            Quantiles of the library sizes.
        stacked
            Whether count regressions are used; the penalty is chosen only then.
        """
        features = np.concatenate([s.features for s in slides]).astype(np.float64)
        mean, std = features.mean(0), features.std(0)
        std = np.where(std < 1e-6, 1.0, std)
        found = {}
        for one in MODES if mode == "choose" and len(slides) > 2 else ["global" if mode == "choose" else mode]:
            scaled = [[replace(s, features=standardize(s.features, mean, std, one)) for s in group] for group in groups]
            known = [[(s.features, expression(s, target_sum)) for s in group] for group in scaled]
            found[one] = choose_ridge(known, [[s.graph(SMOOTHED_OVER) for s in group] for group in scaled])
        best = max(found, key=lambda one: found[one][2])
        if len(found) > 1:
            scores = ", ".join(f"{one!r} {score:.3f}" for one, (_, _, score) in found.items())
            logger.info("standardize=%r is used: held-out Pearson of ridge regression is %s", best, scores)
        thin = [
            [_part(replace(s, features=standardize(s.features, mean, std, best)), 3000) for s in group]
            for group in groups
        ]
        penalty = choose_penalty(thin) if stacked else UNCHOSEN
        parts = [part for group in thin for part in group]
        rates = fit_linear(parts, penalty)
        means = [n[:, None] * np.exp(rates(x)) for x, _, n in parts]
        means = [mean * np.exp(level_of(c, mean)) for mean, (_, c, _) in zip(means, parts)]
        theta = fit_theta(np.concatenate([c for _, c, _ in parts]), np.concatenate(means))
        counting = CountLaw(libraries, target_sum, np.zeros(()))
        return cls(mean, std, best, found[best][0], penalty, theta, counting, target_sum)

    def scaled(self, slide: Slide) -> Slide:
        """A slide with features as the network takes them."""
        return replace(slide, features=standardize(slide.features, self.mean, self.std, self.mode))


def fit_members(slides: list[Slide], choices: Choices, *, stacked: bool, max_epochs: int, seed: int) -> Members:
    """Fit the simple models; without ``stacked``, the ridge regressions alone.

    ``max_epochs`` is the longest training of a perceptron.
    """
    c, ridges, rates = choices, {}, {}
    share = _share(slides)
    most = max(20, MAX_ROWS // len(slides))
    for mode in MODES:
        scaled = [replace(s, features=standardize(s.features, c.mean, c.std, mode)) for s in slides]
        ridges[mode] = fit_ridge([(s.features, expression(s, c.target_sum)) for s in scaled], c.alpha)
        if stacked:
            bands = [s.hold_out(STOP_SHARE) for s in scaled]
            first, last = ([_part(pair[i], most) for pair in bands] for i in (0, 1))
            rates[mode] = (
                fit_linear([_part(s, most) for s in scaled], c.penalty, share),
                fit_perceptron(first, last, share, seed=seed, max_epochs=max_epochs),
            )
    x = [standardize(s.features, c.mean, c.std, "global") for s in slides]
    depth = fit_ridge([(f, np.log(np.maximum(s.library, 1))[:, None]) for f, s in zip(x, slides)], c.alpha)
    return Members(c.mean, c.std, ridges, rates, depth)


def _part(slide: Slide, most: int) -> Part:
    """Features, counts and library sizes of at most ``most`` spots, evenly taken."""
    step = -(-len(slide) // most)
    return slide.features[::step], slide.counts[::step].toarray().astype(np.float32), np.asarray(slide.library[::step])


def _share(slides: list[Slide]) -> np.ndarray:
    """Weight of each slide's level; donors count equally."""
    donors = np.array([s.donor for s in slides])
    weight = np.array([1 / (donors == donor).sum() for donor in donors])
    return weight / weight.sum()
