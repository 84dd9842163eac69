import time

import numpy as np
import pytest

from spatiaflow import metrics


@pytest.fixture
def slides():
    rng = np.random.default_rng(0)
    library = np.repeat(["s1", "s2"], [70, 50])
    xy = rng.uniform(0, 1000, (120, 2))
    truth = rng.normal(size=(120, 4))
    first, second = truth + rng.normal(size=(120, 4)), truth + 2 * rng.normal(size=(120, 4))
    return truth, first, second, metrics.spatial_blocks(xy, 400, library=library), library


def test_blocks_are_squares_that_never_span_slides():
    rng = np.random.default_rng(0)
    xy, library = rng.uniform(-500, 700, (400, 2)), rng.integers(0, 2, 400)
    blocks = metrics.spatial_blocks(xy, 300, library=library)
    assert set(blocks) == set(range(blocks.max() + 1))
    for block in range(blocks.max() + 1):
        members = blocks == block
        assert len(set(library[members])) == 1
        assert np.ptp(xy[members], axis=0).max() <= 300
    assert len(np.unique(blocks)) == 2 * 16


def test_sums_of_blocks_give_the_same_bootstrap_as_the_rows_themselves(slides):
    truth, first, second, blocks, library = slides

    def score(rows):
        parts = [rows[library[rows] == name] for name in ("s1", "s2")]
        return np.mean(
            [(metrics.pearson(truth[p], first[p]) - metrics.pearson(truth[p], second[p])).mean() for p in parts]
        )

    slow = metrics.bootstrap_blocks(score, blocks, library=library, n_boot=50, seed=4)
    fast = metrics.paired_pearson_difference(truth, first, second, blocks, library=library, n_boot=50, seed=4)
    np.testing.assert_allclose(fast, slow, atol=1e-10)


def test_difference_is_that_of_pearson_with_its_policy_on_constants(slides):
    truth, first, second, blocks, library = slides
    second[:, 0], first[library == "s1", 1] = 0.1, 1e6  # constant predictions score 0
    truth[library == "s2", 2] = 3.0  # constant truth is left out
    by_slide = metrics.pearson(truth, first, library=library) - metrics.pearson(truth, second, library=library)
    found = metrics.paired_pearson_difference(truth, first, second, blocks, library=library, n_boot=10)
    assert found[0] == pytest.approx(by_slide.mean(axis=1).mean())
    assert np.isfinite(found).all()


def test_interval_of_a_mean_is_that_of_independent_blocks():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(60), 10)
    values = rng.normal(size=60)[blocks]  # rows of a block are copies: 60 observations, not 600
    value, low, high = metrics.bootstrap_blocks(lambda rows: values[rows].mean(), blocks)
    assert value == pytest.approx(values.mean())
    width = 2 * 1.96 * values[::10].std() / np.sqrt(60)
    assert high - low == pytest.approx(width, rel=0.12)
    naive = metrics.bootstrap_blocks(lambda rows: values[rows].mean(), np.arange(600), n_boot=200)
    assert naive[2] - naive[1] < 0.5 * width


def test_same_prediction_has_no_difference_and_the_seed_repeats(slides):
    truth, first, second, blocks, library = slides
    assert metrics.paired_pearson_difference(truth, first, first, blocks, library=library) == (0, 0, 0)
    again = [metrics.paired_pearson_difference(truth, first, second, blocks, seed=s) for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_better_prediction_is_above_zero(slides):
    difference, low, high = metrics.paired_pearson_difference(*slides[:4], library=slides[4])
    assert 0 < low < difference < high


def test_thousand_resamples_of_900_spots_and_50_genes_take_no_time():
    rng = np.random.default_rng(0)
    truth, first, second = rng.normal(size=(3, 900, 50))
    blocks = metrics.spatial_blocks(rng.uniform(0, 6000, (900, 2)), 1000)
    start = time.process_time()
    metrics.paired_pearson_difference(truth, first, second, blocks)
    assert time.process_time() - start < 5  # measured at a tenth of a second; row by row it is minutes


def test_a_single_block_and_a_block_of_two_slides_are_refused(slides):
    truth, first, second, blocks, library = slides
    with pytest.raises(ValueError, match="single block"):
        metrics.paired_pearson_difference(truth, first, second, np.zeros(120))
    with pytest.raises(ValueError, match="rows of two slides"):
        metrics.paired_pearson_difference(truth, first, second, np.arange(120) % 5, library=library)
    with pytest.raises(ValueError, match="size must be above 0"):
        metrics.spatial_blocks(np.zeros((3, 2)), 0)
