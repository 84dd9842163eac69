"""Conformal intervals: against the definition, and their promise on slides that share nothing."""

import numpy as np
import pytest

from spatiaflow.metrics import conformal_factor, spatial_blocks


def slow(score, group, alpha):
    """Smallest score that holds 1 - alpha of a mixture in which the new group lies at infinity."""
    names = list(dict.fromkeys(group))
    for q in sorted(score):
        if sum(np.mean(score[group == name] <= q) for name in names) / (len(names) + 1) >= 1 - alpha - 1e-9:
            return q


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5])
def test_agrees_with_the_definition(alpha):
    rng = np.random.default_rng(3)
    group = rng.choice([f"s{i}" for i in range(12)], 300)
    truth, mean, std = rng.normal(size=(300, 4)), rng.normal(size=(300, 4)), rng.uniform(0.5, 2, (300, 4))
    score = np.abs(truth - mean) / std
    expected = [slow(score[:, g], group, alpha) for g in range(4)]
    np.testing.assert_allclose(conformal_factor(truth, mean, std, group, alpha=alpha), expected)
    turn = rng.permutation(300)
    again = conformal_factor(truth[turn], mean[turn], std[turn], group[turn], alpha=alpha)
    np.testing.assert_allclose(again, expected)


def test_holds_on_a_new_slide_where_pooling_does_not():
    rng, held, pooled = np.random.default_rng(0), [], []
    for _ in range(300):  # slides of unequal size, each with an error of its own
        size = rng.integers(20, 200, 11)
        group = np.repeat(np.arange(11), size)
        error = (rng.normal(size=11)[group] + 0.3 * rng.normal(size=len(group)))[:, None]
        seen, new = group < 10, group == 10
        one = np.ones_like(error)
        factor = conformal_factor(error[seen], 0 * one[seen], one[seen], group[seen])
        held.append((np.abs(error[new]) <= factor).mean())
        pooled.append((np.abs(error[new]) <= np.quantile(np.abs(error[seen]), 0.9)).mean())
    spread = np.std(held) / np.sqrt(300)
    assert np.mean(held) > 0.9 - 2 * spread
    assert np.mean(pooled) < 0.9 - 2 * np.std(pooled) / np.sqrt(300)


def test_too_few_slides_name_blocks_as_the_way_out():
    rng = np.random.default_rng(1)
    truth, xy = rng.normal(size=(800, 1)), rng.uniform(0, 3000, (800, 2))
    slide = np.repeat(np.arange(8), 100)
    with pytest.raises(ValueError, match="8 group.* need 9 slides.*spatial_blocks"):
        conformal_factor(truth, 0 * truth, 0 * truth + 1, slide)
    assert conformal_factor(truth, 0 * truth, 0 * truth + 1, slide, alpha=0.2).shape == (1,)  # 4 are needed
    by_block = conformal_factor(truth, 0 * truth, 0 * truth + 1, spatial_blocks(xy, 500))
    assert by_block[0] == pytest.approx(1.75, abs=0.35)  # 1.645, a little more for the block to come


def test_bad_input():
    one = np.ones((20, 1))
    with pytest.raises(ValueError, match="std must be above 0"):
        conformal_factor(one, one, 0 * one, np.arange(20))
    with pytest.raises(ValueError, match="one label for each"):
        conformal_factor(one, one, one, np.arange(19))
    with pytest.raises(ValueError, match="alpha"):
        conformal_factor(one, one, one, np.arange(20), alpha=1.0)
