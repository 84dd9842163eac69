"""Inner scores of joint laws, on slides that a known law made."""

import numpy as np
import pytest
from test_law import simulated

from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import HeldOut, fit_law
from spatiaflow.train.law_scores import independent, law_scores

OPTIONS = {"target_sum": 1e4, "new_donor": False, "seed": 0}


@pytest.fixture(scope="module")
def planted() -> tuple[list[HeldOut], JointLaw]:
    slides = simulated(0.6, 0.1)
    return slides, fit_law(slides, 100.0)


def test_regions_of_a_planted_field_are_covered_and_those_of_independent_counts_are_not(planted):
    slides, law = planted
    field, alone = (law_scores(slides, one, **OPTIONS) for one in (law, independent(law)))
    assert field["coverage single"] == pytest.approx(0.9, abs=0.04)
    assert alone["coverage single"] == pytest.approx(0.9, abs=0.04)
    assert field["coverage 9 spots"] == pytest.approx(0.9, abs=0.06)
    assert alone["coverage 9 spots"] < 0.65
    assert field["energy 9 spots"] < 0.95 * alone["energy 9 spots"]


def test_a_law_of_the_wrong_width_scores_worse(planted):
    slides, law = planted
    right, wide = (law_scores(slides, law, **(OPTIONS | {"new_donor": new})) for new in (False, True))
    assert wide["coverage 9 spots"] > right["coverage 9 spots"] + 0.05
    assert wide["energy 9 spots"] > 1.05 * right["energy 9 spots"]


def test_of_a_large_slide_the_middle_is_scored(planted, monkeypatch):
    from spatiaflow.train import law_scores as module

    slides, law = planted
    monkeypatch.setattr(module, "MAX_VALUES", 12 * 100)
    spoilt = [s.counts.copy() for s in slides]
    for s, counts in zip(slides, spoilt):
        counts[np.abs(s.xy - np.median(s.xy, 0)).max(1) > 700] = 1e4
    far = [HeldOut(s.name, s.donor, s.xy, counts, s.library, s.log_mean) for s, counts in zip(slides, spoilt)]
    assert law_scores(far, law, **OPTIONS) == law_scores(slides, law, **OPTIONS)


@pytest.mark.parametrize("n", [1, 5])
def test_slides_smaller_than_a_region_are_one_region(planted, n):
    slides, law = planted
    few = [HeldOut(s.name, s.donor, s.xy[:n], s.counts[:n], s.library[:n], s.log_mean[:n]) for s in slides]
    assert all(np.isfinite(list(law_scores(few, law, **OPTIONS).values())))
