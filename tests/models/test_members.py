import numpy as np
import pytest
from scipy import sparse

from spatiaflow.models.members import MODES, NAMES, SMOOTHING, Members
from spatiaflow.models.regression import smooth
from spatiaflow.models.slide import Slide
from spatiaflow.train.members import Choices, fit_members


def make(seed, n=64):
    """A slide whose counts follow its features, and whose depth follows the last of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    library = np.round(np.exp(7 + 0.5 * x[:, 2]))
    counts = rng.poisson(library[:, None] * np.exp(-4 + 0.6 * x[:, :2])).astype(np.float32)
    xy = np.stack(np.meshgrid(np.arange(8.0), np.arange(n // 8)), -1).reshape(-1, 2) * 100
    return Slide(f"s{seed}", np.arange(n).astype(str), xy, sparse.csr_matrix(counts), library, ("a", "b"), features=x)


@pytest.fixture(scope="module")
def fitted():
    slides = [make(seed) for seed in range(3)]
    choices = Choices.of(slides, [[s] for s in slides], "global", 1e4, np.full(256, 1100.0), stacked=True)
    return choices, fit_members(slides, choices, stacked=True, max_epochs=20, seed=0)


def predictions(fitted, slide, wanted=None):
    choices, members = fitted
    return list(members.predictions(slide, lambda log_rate: choices.counting.mean_at(log_rate, choices.theta), wanted))


def test_each_name_is_a_prediction_and_the_smoothed_follows_the_raw(fitted):
    slide = make(9)
    found = dict(zip(NAMES, predictions(fitted, slide), strict=True))
    for mode in MODES:
        for kind in ("ridge", "NB regression", "NB perceptron"):
            raw = found[f"{kind}, {mode}"]
            expected = smooth(raw, slide.graph(8), SMOOTHING)
            np.testing.assert_allclose(found[f"{kind}, {mode}, smoothed"], expected, atol=1e-6)
            truth = slide.log_normalized().toarray()
            assert np.corrcoef(raw[:, 0], truth[:, 0])[0, 1] > 0.5, (kind, mode)


def test_what_is_not_wanted_is_not_computed(fitted):
    slide, wanted = make(9), np.zeros(len(NAMES), bool)
    wanted[[1, 8]] = True
    every, some = predictions(fitted, slide), predictions(fitted, slide, wanted)
    for i, (one, other) in enumerate(zip(every, some)):
        np.testing.assert_array_equal(other, one if wanted[i] else 0 * other)


def test_depth_is_an_output_of_its_own(fitted):
    slide = make(9)
    assert np.corrcoef(fitted[1].log_depth(slide), np.log(slide.library))[0, 1] > 0.5


def test_tensors_make_the_members(fitted):
    choices, members = fitted
    again = Members.of(members.tensors())
    for one, other in zip(predictions(fitted, make(9)), predictions((choices, again), make(9))):
        np.testing.assert_array_equal(one, other)
    alone = fit_members([make(0), make(1)], choices, stacked=False, max_epochs=1, seed=0)
    assert Members.of(alone.tensors()).rates == {}
