"""The simple models of the stack find what was planted, and what is chosen for all folds is what is better."""

from dataclasses import replace

import numpy as np
import pytest

from _members import fitted, predictions, spots
from spatiaflow.models.members import NAMES
from spatiaflow.train.members import UNCHOSEN, Choices, _part, _share, fit_members

pytestmark = pytest.mark.usefixtures("own_draws")


@pytest.fixture(scope="module")
def known():
    return fitted()


@pytest.mark.parametrize("name", NAMES[::2])
def test_each_model_predicts_a_gene_that_follows_the_features(known, name):
    slide = spots(9)
    found = predictions(known, slide)[NAMES.index(name)]
    assert np.corrcoef(found[:, 0], slide.log_normalized().toarray()[:, 0])[0, 1] > 0.5


def test_depth_is_an_output_of_its_own(known):
    slide = spots(9)
    assert np.corrcoef(known[1].log_depth(slide), np.log(slide.library))[0, 1] > 0.5


def choices_of(slides, mode="global", *, stacked=False):
    return Choices.of(slides, [[s] for s in slides], mode, 1e4, np.full(256, 1100.0), stacked=stacked)


def test_features_are_scaled_by_all_training_slides():
    slides = [spots(0), spots(1, 32)]
    slides = [
        replace(s, features=np.column_stack([s.features * [3, 1, 1] + [5, 0, 0], np.full(len(s), 7)])) for s in slides
    ]
    every = np.concatenate([s.features for s in slides])
    found = choices_of(slides)
    np.testing.assert_allclose(found.mean, every.mean(0))
    np.testing.assert_allclose(found.std, [*every[:, :3].std(0), 1])  # of a constant feature nothing is divided by
    np.testing.assert_allclose(
        found.scaled(slides[1]).features, (slides[1].features - found.mean) / found.std, atol=1e-5
    )


def rescaled(seed, factor):
    """A slide whose genes follow the features, and these times a factor of the slide's own."""
    slide = spots(seed)
    return replace(slide, features=slide.features * np.asarray(factor, np.float32))


def following(seed, spread):
    """A slide whose first gene follows the sum of two features of unequal spread."""
    slide, rng = spots(seed), np.random.default_rng(seed)
    x = (rng.normal(size=(len(slide), 3)) * [*spread, 1]).astype(np.float32)
    counts = rng.poisson(np.exp(4 + 0.4 * x[:, :2].sum(1, keepdims=True)) * [1, 1]).astype(np.float32)
    return replace(slide, features=x, counts=type(slide.counts)(counts), library=np.full(len(slide), 1e4))


def test_features_are_scaled_by_the_slide_where_that_predicts_better():
    staining = [rescaled(0, [9, 1, 1]), rescaled(1, [1, 9, 1]), rescaled(2, [0.2, 1, 5]), rescaled(3, [1, 1, 1])]
    assert choices_of(staining, "choose").mode == "slide"
    tissue = [following(seed, spread) for seed, spread in enumerate([(1.5, 0.1), (0.1, 1.5), (1.5, 0.1), (0.1, 1.5)])]
    assert choices_of(tissue, "choose").mode == "global"
    assert choices_of(tissue[:2], "choose").mode == "global"  # too few slides to choose by
    assert choices_of(tissue, "slide").mode == "slide"


def test_a_network_that_is_not_stacked_has_ridges_alone():
    slides = [spots(seed) for seed in range(3)]
    stacked, alone = (choices_of(slides, stacked=stacked) for stacked in (True, False))
    assert alone.penalty == UNCHOSEN and stacked.alpha == alone.alpha
    members = fit_members(slides, alone, stacked=False, max_epochs=1, seed=0)
    assert members.rates == {} and set(members.ridges) == {"global", "slide"}


def test_slides_of_a_donor_share_its_weight():
    slides = [replace(spots(i), donor=donor) for i, donor in enumerate("aab")]
    np.testing.assert_allclose(_share(slides), [0.25, 0.25, 0.5])


@pytest.mark.parametrize("most", [64, 63, 20, 1])
def test_some_spots_are_taken_evenly(most):
    slide = spots(0)
    features, counts, library = _part(slide, most)
    rows = np.flatnonzero((slide.features[:, None] == features).all(-1).any(1))
    assert len(rows) == len(features) <= most and len(set(np.diff(rows))) <= 1
    np.testing.assert_array_equal(counts, slide.counts.toarray()[rows])
    np.testing.assert_array_equal(library, slide.library[rows])
