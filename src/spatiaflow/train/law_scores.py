"""How well a joint law does on slides that were held out; the scores are written on the model's card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from spatiaflow import metrics
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.field_flow import FieldFlow, FieldFlows, Moves
from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import HeldOut

N_DRAWS = 60
TAILS = (0.05, 0.95)
REGION = 9  # spots: one and its nearest
FIELD = "gaussian field"
SHARES = 0.25, 0.5  # of the way that flows may move draws
COVERAGE = 0.85  # least, of 90 % intervals of regions, where draws pass through flows
MAX_VALUES = 50_000  # spots x genes of a slide that are drawn


def law_scores(
    slides: list[HeldOut], law: JointLaw, *, target_sum: float | None, new_donor: bool, seed: int,
    flows: list[FieldFlows] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Score draws of slides that were predicted without themselves; means over slides.

    Of a large slide only the spots around its middle are scored.

    Parameters
    ----------
    target_sum
        As in :func:`spatiaflow.models.counts.log_normalize`.
    new_donor
        Whether the slides were predicted without their donors.
    flows
        Those that the draws of each slide pass through, if any.

    Returns
    -------
    ``"energy 9 spots"``, the energy score over genes of the means of a spot and its nearest eight, and the coverage of 90 %
    intervals: ``"coverage single"`` of spots and ``"coverage 9 spots"`` of these means. All are of log-normalised expression.
    """
    found = []
    for i, s in enumerate(slides):
        n_spots = max(REGION, MAX_VALUES // s.counts.shape[1])
        rows = np.argsort(((s.xy - np.median(s.xy, 0)) ** 2).sum(1), kind="stable")[:n_spots]
        s = s.take(np.sort(rows))
        truth = log_normalize(s.counts, s.library, target_sum)
        move = None if flows is None else Moves(flows[i], s.features, s.xy, s.log_mean).of_draws(N_DRAWS)
        counts = law.draws(s.name, s.xy, s.log_mean, s.library, N_DRAWS, new_donor=new_donor, seed=seed, move=move)
        drawn = np.stack([log_normalize(one, s.library, target_sum) for one in counts])
        regions = cKDTree(s.xy).query(s.xy, k=list(range(1, min(REGION, len(s.xy)) + 1)))[1]
        mean, drawn_mean = truth[regions].mean(1), np.stack([one[regions].mean(1) for one in drawn])
        found.append(
            (metrics.energy_score(mean, drawn_mean).mean(), _coverage(truth, drawn), _coverage(mean, drawn_mean))
        )
    names = f"energy {REGION} spots", "coverage single", f"coverage {REGION} spots"
    return {name: float(value) for name, value in zip(names, np.mean(found, 0))}


def choose_law(
    slides: list[HeldOut], law: JointLaw, flows: Sequence[FieldFlow], *, target_sum: float | None, new_donor: bool, seed: int
) -> tuple[dict[str, Any], FieldFlows | None]:  # fmt: skip
    """Score the joint law, flows from draws of its field, and independent counts on held-out slides.

    Parameters
    ----------
    flows
        For each slide one that learned without it; none where there are no flows.

    Returns
    -------
    What the model's card says, and the flows that draws are to pass through. Flows are chosen where the energy score of regions
    improves and at least :data:`COVERAGE` of the regions lie in their intervals; None otherwise.
    """
    options: Any = {"target_sum": target_sum, "new_donor": new_donor, "seed": seed}
    card: dict[str, Any] = {"chosen": FIELD, FIELD: law_scores(slides, law, **options)}
    card["independent"] = law_scores(slides, independent(law), **options)
    best, chosen, score = card[FIELD], None, f"energy {REGION} spots"
    for share in SHARES if flows else ():
        passed = [FieldFlows((flow,), share, new_donor) for flow in flows]
        found = card[f"flow, {share:g} of the way"] = law_scores(slides, law, flows=passed, **options)
        if found[score] < best[score] and found[f"coverage {REGION} spots"] >= COVERAGE:
            best, card["chosen"] = found, f"flow, {share:g} of the way"
            chosen = FieldFlows(tuple(dict.fromkeys(flows)), share, new_donor)
    return card, chosen


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
