from dataclasses import replace

import numpy as np
import pytest

from _members import fitted, predictions, spots
from spatiaflow.models.members import MODES, NAMES, SMOOTHING, Members
from spatiaflow.models.regression import smooth


@pytest.fixture(scope="module")
def known():
    return fitted()


def test_each_name_is_a_prediction_and_the_smoothed_follows_the_raw(known):
    slide = spots(9)
    found = dict(zip(NAMES, predictions(known, slide), strict=True))
    for mode in MODES:
        for kind in ("ridge", "NB regression", "NB perceptron"):
            raw = found[f"{kind}, {mode}"]
            expected = smooth(raw, slide.graph(8), SMOOTHING)
            np.testing.assert_allclose(found[f"{kind}, {mode}, smoothed"], expected, atol=1e-6)


def test_what_is_not_wanted_is_not_computed(known):
    slide, wanted = spots(9), np.zeros(len(NAMES), bool)
    wanted[[1, 8]] = True
    every, some = predictions(known, slide), predictions(known, slide, wanted)
    for i, (one, other) in enumerate(zip(every, some)):
        np.testing.assert_array_equal(other, one if wanted[i] else 0 * other)


def test_tensors_make_the_members(known):
    choices, members = known
    again = Members.of(members.tensors())
    for one, other in zip(predictions(known, spots(9)), predictions((choices, again), spots(9))):
        np.testing.assert_array_equal(one, other)
    assert Members.of(replace(members, rates={}).tensors()).rates == {}
