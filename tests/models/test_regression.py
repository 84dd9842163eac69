import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from spatiaflow.models.regression import (
    ROWS,
    Scaled,
    choose_ridge,
    combine,
    cross_fitted,
    fit_ridge,
    fit_stack,
    gene_pearson,
    given_depth,
    smooth,
)
from spatiaflow.models.slide import Reordered
from spatiaflow.models.spatial import spatial_graph

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=(6, 4))


def part(n=60, noise=0.5):
    """Features and expression of one slide."""
    x = RNG.normal(size=(n, 6))
    return x, x @ TRUE + 2 + noise * RNG.normal(size=(n, 4))


def graph(n):
    return spatial_graph(RNG.uniform(0, 1000, (n, 2)), 8)


def test_ridge_is_sklearns():
    parts = [part(), part(35)]
    x, y = (np.concatenate(values) for values in zip(*parts))
    ours, theirs = fit_ridge(parts, 7.0), Ridge(7.0).fit(x, y)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), atol=1e-4)


def test_cross_fitting_never_sees_its_own_slide():
    groups = [[part()], [part()], [part()]]
    before = cross_fitted(groups, 1.0)
    groups[1][0][1][:] = RNG.normal(size=(60, 4)) * 100
    after = cross_fitted(groups, 1.0)
    np.testing.assert_array_equal(before[1][0], after[1][0])
    assert np.abs(before[0][0] - after[0][0]).max() > 1


def test_penalty_is_chosen_where_it_helps():
    quiet, loud = [[part(noise=0.1)] for _ in range(3)], [[part(12, noise=20.0)] for _ in range(3)]
    assert choose_ridge(quiet, [[graph(60)]] * 3)[0] < choose_ridge(loud, [[graph(12)]] * 3)[0]


def test_smoothing_is_the_mean_of_neighbours():
    y, around = part()[1], graph(60)
    expected = np.stack([0.5 * y[i] + 0.5 * y[j[m]].mean(0) for i, (j, m) in enumerate(zip(around.index, around.mask))])
    np.testing.assert_allclose(smooth(y, around, 0.5), expected, atol=1e-6)
    np.testing.assert_array_equal(smooth(y[:1], graph(1), 0.5), y[:1])


def test_pearson_policy():
    y, p = RNG.normal(size=(50, 3)), RNG.normal(size=(50, 3))
    p[:, 1], y[:, 2] = 1.0, 3.0
    r = gene_pearson(y, p)
    assert r[0] == pytest.approx(np.corrcoef(y[:, 0], p[:, 0])[0, 1])
    assert r[1] == 0
    assert np.isnan(r[2])


def test_stack_finds_the_useful_part_and_ignores_noise():
    n, groups = 400, np.repeat(["a", "b", "c", "d"], 100)
    truth, mean = RNG.normal(size=(n, 5)), np.zeros((n, 5))
    y = truth + 0.3 * RNG.normal(size=(n, 5))
    parts = np.stack([RNG.normal(size=(n, 5)), 0.5 * truth, -truth])
    level, weights = fit_stack(y, parts, mean, groups)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights[1], 2.0, atol=0.2)
    assert weights[0].max() < 0.1
    assert weights[2].max() < 0.1


def test_stack_of_useless_parts_is_the_mean():
    y, parts = RNG.normal(size=(400, 5)), RNG.normal(size=(3, 400, 5))
    level, weights = fit_stack(y, parts, np.zeros((400, 5)), np.repeat(list("abcd"), 100))
    assert weights.max() < 0.15


def test_stack_judges_slide_means_and_patterns_inside_slides_apart():
    groups = np.repeat(np.arange(6), 80)
    pattern, shift = RNG.normal(size=(480, 5)), np.repeat(3 * RNG.normal(size=(6, 5)), 80, 0)
    y, mean = 1 + pattern + shift, np.ones((480, 5))
    parts = np.stack([mean + pattern, mean + shift])  # one knows the pattern, the other whose slide it is
    level, weights = fit_stack(y, parts, mean, groups)
    np.testing.assert_allclose(weights, [[1.0] * 5, [0.0] * 5], atol=0.02)
    assert level[1] == pytest.approx(1.0, abs=0.05)
    for group in range(6):
        one = groups == group
        np.testing.assert_allclose(combine(parts[:, one], mean[0], level, weights), np.maximum(y[one], 0), atol=0.5)


def test_several_sets_of_weights_are_combined_as_each_alone():
    parts, mean, level = RNG.normal(size=(3, 40, 5)), RNG.random(5), RNG.random(3)
    weights = RNG.random((2, 3, 5))
    both = combine(parts, mean, level, weights)
    for found, one in zip(both, weights):
        np.testing.assert_array_equal(found, combine(parts, mean, level, one))


def test_what_the_depth_explains_is_taken_away():
    depth, values = RNG.integers(1, 1000, 60), RNG.normal(size=(2, 60, 5))
    values = values + 3 * np.log(depth)[:, None]
    found, x = given_depth(values, depth), np.stack([np.ones(60), np.log(depth)], 1)
    for i in range(2):
        for g in range(5):
            by_hand = values[i, :, g] - x @ np.linalg.lstsq(x, values[i, :, g], rcond=None)[0]
            np.testing.assert_allclose(found[i, :, g], by_hand, atol=1e-10)
    np.testing.assert_allclose(given_depth(values, np.full(60, 7)), values - values.mean(1, keepdims=True), atol=1e-10)


def test_a_level_lies_within_what_the_members_say():
    """A member that predicts the level of a slide to float noise must not get a weight of thousands."""
    groups = np.repeat(np.arange(4), 50)
    y = RNG.normal(size=(200, 3)) + np.repeat(5 + 2 * RNG.normal(size=(4, 3)), 50, 0)
    parts = np.full((2, 200, 3), 5.0) + 1e-6 * RNG.normal(size=(2, 200, 3))
    level, _ = fit_stack(y, parts, np.full((200, 3), 5.0), groups)
    assert level.min() >= 0
    assert level.sum() <= 1 + 1e-9


@pytest.mark.parametrize("mode", ["global", "slide"])
def test_scaling_needs_no_second_copy_of_the_features(mode):
    x = np.random.default_rng(0).normal(3, 2, (5 * ROWS + 7, 40)).astype(np.float32)
    mean, std = x.mean(0, dtype=np.float64) + 1, x.std(0, dtype=np.float64) * 2
    tracemalloc.start()
    try:
        found = Scaled(x, mean, std, mode).apply(lambda rows: rows[:, :2] @ np.ones((2, 1), np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if mode == "slide":
        mean, std = mean - 1, std / 2
    np.testing.assert_allclose(found, ((x - mean) / std)[:, :2].sum(1, keepdims=True), atol=1e-5)
    assert peak < 0.9 * x.nbytes


def test_reordered_rows_are_those_rows():
    x, order = np.arange(12.0).reshape(6, 2), np.array([4, 0, 3])
    view = Reordered(x, order)
    np.testing.assert_array_equal(view[1:], x[[0, 3]])
    np.testing.assert_array_equal(Scaled(view, np.zeros(2), np.ones(2), "global")[np.array([2])], x[[3]])
    assert len(view) == 3
