"""How well a joint law does on slides that were held out; the scores are written on the model's card."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree

from spatiaflow import metrics
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import HeldOut

N_DRAWS = 60
TAILS = (0.05, 0.95)
REGION = 9  # spots: one and its nearest
MAX_VALUES = 50_000  # spots x genes of a slide that are drawn


def law_scores(
    slides: list[HeldOut], law: JointLaw, *, target_sum: float | None, new_donor: bool, seed: int
) -> dict[str, float]:
    """Score draws of slides that were predicted without themselves; means over slides.

    Of a large slide only the spots around its middle are scored.

    Parameters
    ----------
    target_sum
        As in :func:`spatiaflow.models.counts.log_normalize`.
    new_donor
        Whether the slides were predicted without their donors.

    Returns
    -------
    ``"energy 9 spots"``, the energy score over genes of the means of a spot and its nearest eight, and the coverage of 90 %
    intervals: ``"coverage single"`` of spots and ``"coverage 9 spots"`` of these means. All are of log-normalised expression.
    """
    found = []
    for s in slides:
        n_spots = max(REGION, MAX_VALUES // s.counts.shape[1])
        rows = np.sort(np.argsort(((s.xy - np.median(s.xy, 0)) ** 2).sum(1), kind="stable")[:n_spots])
        xy, library = s.xy[rows], s.library[rows]
        truth = log_normalize(s.counts[rows], library, target_sum)
        counts = law.draws(s.name, xy, s.log_mean[rows], library, N_DRAWS, new_donor=new_donor, seed=seed)
        drawn = np.stack([log_normalize(one, library, target_sum) for one in counts])
        regions = cKDTree(xy).query(xy, k=list(range(1, min(REGION, len(xy)) + 1)))[1]
        mean, drawn_mean = truth[regions].mean(1), np.stack([one[regions].mean(1) for one in drawn])
        found.append(
            (metrics.energy_score(mean, drawn_mean).mean(), _coverage(truth, drawn), _coverage(mean, drawn_mean))
        )
    names = f"energy {REGION} spots", "coverage single", f"coverage {REGION} spots"
    return {name: float(value) for name, value in zip(names, np.mean(found, 0))}


def independent(law: JointLaw) -> JointLaw:
    """The law of single counts given the slide's level, with every count drawn alone."""
    n_genes = len(law.theta)
    nothing = np.zeros(n_genes)
    return replace(
        law, theta=law.marginal_theta(), lengths=np.zeros(0), field_sd=np.zeros((0, n_genes)), nugget_sd=nothing,
        slide_sd=nothing, donor_sd=nothing,
    )  # fmt: skip


def _coverage(truth: np.ndarray, drawn: np.ndarray) -> float:
    low, high = np.quantile(drawn, TAILS, axis=0, method="weibull")
    return float(((truth >= low) & (truth <= high)).mean())
