import numpy as np
import pytest

from spatiaflow.models.mixing import N_NEAR, in_spreads, mixing, separation


def groups(shift=0.0, sizes=(300, 100), seed=0):
    """Two samples in a plane, the second shifted, at positions far from each other."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(len(sample), 2)) + shift * (sample == 1)[:, None]
    return x, sample, rng.uniform(0, 1e6, (len(sample), 2))


@pytest.mark.parametrize("sizes", [(200, 200), (600, 60), (200, 200, 200)])
def test_samples_that_are_one_mix_whatever_their_sizes(sizes):
    found = mixing(*groups(sizes=sizes), reach=1.0)
    assert (found > 0.85).all() and (found <= 1).all()


def test_mixing_falls_with_the_shift_of_one_sample():
    found = np.array([mixing(*groups(shift, (200, 200, 200)), reach=1.0) for shift in (0, 1, 2, 8)])
    assert (np.diff(found[:, 1]) < 0).all() and found[-1, 1] == 0
    assert (found[-1, [0, 2]] > 0.7).all()  # the others still mix with each other


def test_mixing_is_that_of_a_slow_count():
    x, sample, xy = groups(0.7, (60, 50))
    xy, reach, ratio = xy / 1e5, 2.0, np.empty(110)
    for i in range(110):
        around = (sample == sample[i]) & (np.linalg.norm(xy - xy[i], axis=1) <= reach)
        others = sorted((np.linalg.norm(x[j] - x[i]), j) for j in range(110) if not around[j])
        near = [j for _, j in others[:N_NEAR]]
        ratio[i] = np.mean(sample[near] != sample[i]) / np.mean([sample[j] != sample[i] for _, j in others])
    expected = [min(1, ratio[sample == s].mean()) for s in (0, 1)]
    np.testing.assert_allclose(mixing(x, sample, xy, reach), expected)


def test_cells_around_are_no_neighbours():
    """A smooth embedding: the nearest cells are those around, which says nothing of the sample."""
    rng = np.random.default_rng(0)
    xy, sample = rng.uniform(0, 1000, (1000, 2)), np.repeat([0, 1], 500)
    waves = rng.normal(size=(2, 2, 6)) / 60
    x = np.concatenate([np.sin(xy[sample == s] @ waves[s]) for s in (0, 1)])
    assert (mixing(x, sample, xy, 150.0) > mixing(x, sample, xy, 0.0) + 0.05).all()


def test_niches_have_unit_spread_in_every_direction():
    rng = np.random.default_rng(0)
    niche = rng.integers(0, 3, 500)
    scores = rng.normal(size=(3, 3))[niche] * 9 + rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3))
    x = in_spreads(scores - scores.mean(1, keepdims=True), niche)
    assert x.shape == (500, 2)
    within = sum(np.cov(x[niche == k].T, bias=True) * (niche == k).sum() for k in range(3)) / 500
    np.testing.assert_allclose(within, np.eye(2), atol=1e-8)


def test_separation_grows_with_the_distance_of_niches():
    x, niche, _ = groups(1.0)
    far, _, _ = groups(9.0)
    assert separation(x, niche) < separation(far, niche) and separation(far, niche) > 0.7
    assert np.isnan(separation(x, np.zeros(400, int)))
