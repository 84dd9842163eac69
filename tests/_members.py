"""Slides that the simple models of a stack are fitted to."""

import numpy as np
import torch
import torch._dynamo  # the first optimizer of a process loads it, and it changes the environment
from scipy import sparse

from spatiaflow.models.slide import Slide
from spatiaflow.train.members import Choices, fit_members


def spots(seed, n=64):
    """A slide whose counts follow its features, and whose depth follows the last of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    library = np.round(np.exp(7 + 0.5 * x[:, 2]))
    counts = rng.poisson(library[:, None] * np.exp(-4 + 0.6 * x[:, :2])).astype(np.float32)
    xy = np.stack(np.meshgrid(np.arange(8.0), np.arange(n // 8)), -1).reshape(-1, 2) * 100
    return Slide(f"s{seed}", np.arange(n).astype(str), xy, sparse.csr_matrix(counts), library, ("a", "b"), features=x)


def fitted():
    """What is chosen on three such slides, and the models fitted to them."""
    slides = [spots(seed) for seed in range(3)]
    with torch.random.fork_rng():
        choices = Choices.of(slides, [[s] for s in slides], "global", 1e4, np.full(256, 1100.0), stacked=True)
        return choices, fit_members(slides, choices, stacked=True, max_epochs=20, seed=0)


def predictions(fitted, slide, wanted=None):
    """Of each of the models, in the order of ``NAMES``."""
    choices, members = fitted
    return list(members.predictions(slide, lambda log_rate: choices.counting.mean_at(log_rate, choices.theta), wanted))
