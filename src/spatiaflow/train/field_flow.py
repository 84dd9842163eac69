"""Fitting a flow that starts from draws of the joint law's field.

Each fold of the training has a flow of its own. It learns from draws of the posterior of field and nugget given the counts of
the fold's training slides, with a joint law as prior, around a ridge regression that left each of them out. Held-out slides
have a part only in what is chosen for all folds together (:class:`spatiaflow.train.members.Choices`), so they can judge it
(:func:`spatiaflow.train.law_scores.choose_law`).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from spatiaflow.models.field_flow import FieldFlow, gene_components, neighbors_of
from spatiaflow.models.fields import Fields, kernel
from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import HeldOut

N_COMPONENTS = 50  # of the features
MAX_SLIDES = 12  # of a fold
MIN_SPOTS, MAX_SPOTS, MAX_VALUES = 100, 600, 60_000  # of a slide, around its middle; spots x genes
N_PRIOR, N_POSTERIOR = 48, 12  # draws of each slide
N_STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DECAY = 120, 4, 1e-3, 0.1, 0.98


def fit_field_flow(slides: list[HeldOut], law: JointLaw, seed: int) -> FieldFlow:
    """Fit a flow to slides that were predicted without themselves, and the law of what they deviate by."""
    kept = np.sort(np.random.default_rng(seed).permutation(len(slides))[:MAX_SLIDES])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = FieldFlow(**_arrays(slides, law))
        return _fitted(flow, [_Examples.of(_middle(slides[i]), law, flow, seed) for i in kept], seed)


def _middle(slide: HeldOut) -> HeldOut:
    """The slide, or the spots around its middle where it is large."""
    distance = ((slide.xy - np.median(slide.xy, 0)) ** 2).sum(1)
    n_spots = int(np.clip(MAX_VALUES // slide.counts.shape[1], MIN_SPOTS, MAX_SPOTS))
    return slide.take(np.sort(np.argsort(distance, kind="stable")[:n_spots]))


def _arrays(slides: list[HeldOut], law: JointLaw) -> dict[str, np.ndarray]:
    """What a flow is made with: components of features and of genes."""
    features = np.concatenate([s.features for s in slides]).astype(np.float64)
    centre = features.mean(0)
    moments = (features - centre).T @ (features - centre) / len(features)
    size, axes = np.linalg.eigh(moments)
    size, axes = size[::-1], axes[:, ::-1]
    n = max(1, min(N_COMPONENTS, int((size > 1e-8 * max(size[0], 1e-12)).sum())))
    down, up = gene_components(law)
    return {"centre": centre, "components": axes[:, :n] / np.sqrt(np.maximum(size[:n], 1e-12)), "down": down, "up": up}


class _Posterior:
    """Field and nugget of a slide given its counts: Gaussian around the mode, with the curvature there.

    A draw is one of the prior, corrected by what made-up observations of it miss (Matheron's rule).
    """

    def __init__(self, slide: HeldOut, law: JointLaw, n_newton: int = 12):
        distance = cdist(slide.xy, slide.xy)
        self.law, self.kernels = law, [kernel(distance, length).astype(np.float32) for length in law.lengths]
        self.fields = [Fields(slide.xy, float(length)) for length in law.lengths]
        counts, theta = slide.counts, law.theta
        offset = np.log(np.maximum(slide.library, 1))[:, None] + slide.log_mean - law.variance / 2
        mode = np.zeros(counts.shape)
        for _ in range(n_newton):
            mean = np.exp(np.clip(offset + mode, -30, 20))
            self.weight = np.maximum(mean * theta / (mean + theta), 1e-8)
            self.seen = mode + (counts - mean) / np.maximum(mean, 1e-12)
            limited = mode + np.clip(self.seen - mode, -3, 3)
            solved = self.solve(limited)
            step = np.clip(self.shared(solved) + self.level(solved) - mode, -1.5, 1.5)
            mode = mode + step
            if np.abs(step).max() < 1e-2:
                break
        mean = np.exp(np.clip(offset + mode, -30, 20))
        self.weight = np.maximum(mean * theta / (mean + theta), 1e-8)
        self.seen = mode + (counts - mean) / np.maximum(mean, 1e-12)

    def part(self, x: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """Covariance of genes times n x genes."""
        x = x * sd
        return ((x @ self.law.factors) @ self.law.factors.T + x * self.law.own) * sd

    def shared(self, x: np.ndarray) -> np.ndarray:
        """Covariance of field and nugget times n x genes."""
        fields = (k @ self.part(x, sd).astype(np.float32) for k, sd in zip(self.kernels, self.law.field_sd))
        return self.part(x, self.law.nugget_sd) + sum(fields)

    def level(self, x: np.ndarray) -> np.ndarray:
        """Covariance of the slide effect times n x genes."""
        return self.part(x.sum(0, keepdims=True), self.law.slide_sd)

    def solve(self, seen: np.ndarray, n_steps: int = 60, tolerance: float = 3e-3) -> np.ndarray:
        """Inverse of the covariance of observations times n x genes, by conjugate gradients."""
        root = np.sqrt(self.weight)
        left = root * seen
        x, towards, size = np.zeros_like(left), left.copy(), float((left**2).sum())
        enough = tolerance**2 * size
        for _ in range(n_steps):
            if size <= enough:
                break
            scaled = root * towards
            through = towards + root * (self.shared(scaled) + self.level(scaled))
            step = size / float((towards * through).sum())
            x, left = x + step * towards, left - step * through
            last, size = size, float((left**2).sum())
            towards = left + size / last * towards
        return root * x

    def prior(self, rng: np.random.Generator) -> np.ndarray:
        """A draw of field and nugget, n x genes."""
        return self.law.deviation(self.fields, rng, len(self.seen))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A draw of them given the counts, n x genes."""
        law, drawn = self.law, self.prior(rng)
        n_genes, n_factors = law.factors.shape
        level = law.correlated(rng.standard_normal((1, n_factors)), rng.standard_normal((1, n_genes))) * law.slide_sd
        noise = rng.standard_normal(drawn.shape) / np.sqrt(self.weight)
        return drawn + self.shared(self.solve(self.seen - drawn - level - noise))


@dataclass(frozen=True)
class _Examples:
    """Of a slide: tokens, and components of draws of the prior and of the posterior, draws x n x components."""

    tokens: Tensor
    neighbors: Tensor
    prior: Tensor
    posterior: Tensor

    @classmethod
    def of(cls, slide: HeldOut, law: JointLaw, flow: FieldFlow, seed: int) -> _Examples:
        found, neighbors, down = _Posterior(slide, law), neighbors_of(slide.xy), flow.down.numpy()
        tokens = flow.tokens(slide.features, neighbors, slide.log_mean)[:]
        rng = np.random.default_rng([seed, zlib.crc32(slide.name.encode())])
        prior = np.stack([found.prior(rng) @ down for _ in range(N_PRIOR)])
        posterior = np.stack([found.draw(rng) @ down for _ in range(N_POSTERIOR)])
        draws = (torch.from_numpy(x.astype(np.float32)) for x in (prior, posterior))
        return cls(tokens, torch.from_numpy(neighbors), *draws)


def _fitted(flow: FieldFlow, examples: list[_Examples], seed: int) -> FieldFlow:
    """Train a flow; the moving average of its weights."""
    rng = np.random.default_rng(seed)
    # early on the mean of all steps so far, later of the last ones
    average = AveragedModel(flow, avg_fn=lambda mean, p, n: torch.lerp(mean, p, max(1 - DECAY, 10 / (float(n) + 10))))
    optimizer = torch.optim.AdamW(flow.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(N_STEPS):
        e = examples[rng.integers(len(examples))]
        start, end = (x[rng.integers(len(x), size=BATCH)] for x in (e.prior, e.posterior))
        t = torch.from_numpy(rng.random(BATCH).astype(np.float32))  # one of each slide
        cos, sin = torch.cos(torch.pi / 2 * t)[:, None, None], torch.sin(torch.pi / 2 * t)[:, None, None]
        velocity = torch.pi / 2 * (cos * end - sin * start)
        optimizer.zero_grad()
        found = flow(cos * start + sin * end, t, flow.of_tokens(e.tokens), e.neighbors)
        ((found - (velocity - velocity.mean(1, keepdim=True))) ** 2).mean().backward()
        optimizer.step()
        average.update_parameters(flow)
    flow.load_state_dict(average.module.state_dict())
    return flow.eval()
