"""The distances of the benchmark of generation against the package's own, and under weights against copies of rows."""

import numpy as np
import pytest

import morphology as benchmark
import spatiaflow as sf

RNG = np.random.default_rng(0)


def sample(n, shift):
    return benchmark.Images(
        RNG.normal(shift, 1, (n, 5)), RNG.normal(shift, 1, (n, 3)), RNG.choice(["a", "b"], n), RNG.integers(0, 6, n)
    )


def test_distances_are_those_of_the_package():
    a, b = sample(80, 0.0), sample(70, 0.7)
    found = benchmark.distances(a, b, benchmark.block_draws(np.r_[a.block, b.block], n=0))
    assert found["KID"][0] == pytest.approx(sf.metrics.kernel_distance(a.features, b.features))
    assert found["energy"][0] == pytest.approx(sf.metrics.energy_distance(a.profile, b.profile))


def test_a_cell_drawn_twice_is_not_compared_with_itself():
    a, b = sample(12, 0.0), sample(9, 0.7)
    weight = np.array([2.0, 0, 1, 3, 1, 0, 1])
    found = benchmark.distances(a, b, [weight])["energy"][0]
    x, y = weight[a.block], weight[b.block]

    def mean(p, q, u, v, same):
        pairs = [
            (u[i] * v[j], np.linalg.norm(p[i] - q[j]))
            for i in range(len(p))
            for j in range(len(q))
            if not same or i != j
        ]
        return sum(w * d for w, d in pairs) / sum(w for w, _ in pairs)

    expected = 2 * mean(a.profile, b.profile, x, y, False) - mean(a.profile, a.profile, x, x, True)
    assert found == pytest.approx(expected - mean(b.profile, b.profile, y, y, True))


def test_matched_images_have_the_intensities_of_the_target():
    source, target = RNG.integers(0, 100, (40, 2, 8, 8)), RNG.integers(50, 250, (40, 2, 8, 8))
    out = benchmark.matched(source, source, target)
    np.testing.assert_allclose(np.quantile(out, [0.1, 0.5, 0.9]), np.quantile(target, [0.1, 0.5, 0.9]), atol=3)
    assert np.corrcoef(out.ravel(), source.ravel())[0, 1] > 0.95


def test_a_gain_is_the_mean_over_seeds_of_paired_differences():
    draws = RNG.normal(0, 0.01, 301)
    having = [{"KID": level + draws} for level in (0.1, 0.9)]  # seeds differ by more than what is gained
    without = [{"KID": level + 0.2 + 2 * draws} for level in (0.1, 1.0)]
    row = benchmark.gain(without, having)
    assert row["KID"] == pytest.approx(0.25 + draws[0])
    assert row["KID, sd of seeds"] == pytest.approx(0.05 * 2**0.5)  # as of a sample
    np.testing.assert_allclose([row["KID, low"], row["KID, high"]], 0.25 + np.quantile(draws[1:], [0.025, 0.975]))
