"""Training of imputers: what is held out, what is chosen on it, and what the card says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from spatiaflow.models.slide import Slide
from spatiaflow.train import imputer

GENES = tuple(f"g{i}" for i in range(10))


def cells(seed=0, n=300):
    """Cells whose genes follow one field and a noisy twin of it."""
    rng, rule = np.random.default_rng(seed), np.random.default_rng(9)
    xy = rng.uniform(0, 100, (n, 2))
    latent = np.sin(xy[:, :1] / 15) + 0.5 * rng.normal(size=(n, 1))
    counts = rng.poisson(np.exp(latent @ rule.normal(0, 0.6, (1, 10)) + 1.5)).astype(np.float32)
    return Slide(f"s{seed}", np.arange(n).astype(str), xy, sparse.csr_matrix(counts), counts[:, :8].sum(1), GENES)


def trained(*slides, **options):
    return imputer.train_imputer(list(slides), GENES[:8], GENES[8:], branches=("genes", "neighbors"), **options)


@pytest.mark.parametrize(("n_slides", "spatial"), [(1, True), (2, False), (3, True)])
def test_blocks_are_whole_slides_or_bands_of_equal_size(n_slides, spatial):
    slides = [cells(seed) for seed in range(n_slides)]
    slides = slides if spatial else [replace(slide, xy=None) for slide in slides]
    for i, (slide, block) in enumerate(zip(slides, imputer.held_out_blocks(slides))):
        if n_slides > 2:
            assert (block == i).all()
        else:
            np.testing.assert_array_equal(np.bincount(block), [60] * 5)
        if n_slides == 1:
            along = slide.xy[:, np.argmax(np.ptp(slide.xy, axis=0))]
            assert all(along[block == b].max() <= along[block == b + 1].min() for b in range(4))


def test_moments_add_up_over_blocks():
    slide = cells()
    design = imputer.fit_design([slide], list(GENES[:8]), 50, kernel=False)
    blocks = imputer.held_out_blocks([slide])
    evidence = imputer.collect(design, [slide], GENES[8:], blocks)
    one = imputer.collect(design, [slide], GENES[8:], [np.zeros(len(slide), int)])
    for name in ("n", "x", "y", "xx", "xy"):
        np.testing.assert_allclose(getattr(evidence.total, name), getattr(one.total, name), rtol=1e-4, atol=1e-3)
    assert evidence.without(2).n == len(slide) - evidence.sums[2].n


def test_the_best_of_what_was_tried_is_taken():
    model = trained(cells(n=1000))
    assert model.validation_scores[model.branches] == max(model.validation_scores.values())
    assert model.alpha == model.penalties[model.branches]


def test_order_of_genes_and_genes_that_are_not_asked_for_do_not_matter():
    slide = cells(n=500)
    order = np.random.default_rng(0).permutation(10)
    more = replace(slide.align([GENES[i] for i in order]).align([*[GENES[i] for i in order], "other"]))
    one, other = trained(slide), trained(more)
    np.testing.assert_allclose(one.reliability, other.reliability, atol=1e-6)
    np.testing.assert_allclose(*(next(m.predict(slide))[0] for m in (one, other)), atol=1e-5)


def test_the_card_says_what_the_model_was_trained_on():
    card = trained(cells(0), cells(1), seed=3, use_rep=None).card
    assert {name: box["n_obs"] for name, box in card["data"].items()} == {"s0": 300, "s1": 300}
    assert card["seed"] == 3 and card["use_rep"] == "" and card["config"]["branches"] == ["genes", "neighbors"]
    assert set(card["validation_scores"]) == {"genes", "genes+neighbors"}


def test_the_unit_is_the_median_library():
    slides = [cells(0), cells(1)]
    assert trained(*slides).target_sum == np.median(np.concatenate([slide.library for slide in slides]))
