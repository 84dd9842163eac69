import numpy as np
import pytest
from scipy import integrate, stats

from spatiaflow import metrics


@pytest.fixture
def ensemble():
    rng = np.random.default_rng(1)
    return rng.normal(size=(40, 3)), rng.normal(0.2, 1.5, size=(9, 40, 3))


@pytest.mark.parametrize("fair", [True, False])
def test_crps_of_draws_is_the_energy_form_over_all_pairs(ensemble, fair):
    truth, draws = ensemble
    m = len(draws)
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1)) / (m * (m - 1) if fair else m * m)
    expected = np.abs(draws - truth).mean(0) - pairs / 2
    np.testing.assert_allclose(metrics.crps_ensemble(truth, draws, fair=fair), expected, atol=1e-12)


def test_unfair_crps_is_the_integral_of_the_squared_distance_to_the_empirical_cdf():
    draws, y = np.array([0.0, 0.5, 0.5, 2.0]), 0.8
    edges = np.sort(np.append(draws, y))
    middle = (edges[1:] + edges[:-1]) / 2
    cdf = (draws[:, None] <= middle).mean(0)
    expected = ((cdf - (middle >= y)) ** 2 * np.diff(edges)).sum()
    assert metrics.crps_ensemble([[y]], draws[:, None, None], fair=False)[0, 0] == pytest.approx(expected)


def test_fair_crps_does_not_depend_on_the_number_of_draws_and_reaches_the_closed_form():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 1))
    exact = metrics.crps_normal(truth, np.zeros_like(truth), np.ones_like(truth)).mean()
    for m in (2, 5, 50):
        assert metrics.crps_ensemble(truth, rng.normal(size=(m, 4000, 1))).mean() == pytest.approx(exact, abs=0.03)
    assert metrics.crps_ensemble(truth, rng.normal(size=(2, 4000, 1)), fair=False).mean() > exact + 0.2


def test_crps_of_a_normal_is_its_defining_integral():
    for y, mean, std in [(0.0, 0.0, 1.0), (2.5, 0.3, 0.7), (-4.0, 1.0, 2.0)]:
        law = stats.norm(mean, std)
        below = integrate.quad(lambda t, law=law: law.cdf(t) ** 2, -40, y)[0]
        above = integrate.quad(lambda t, law=law: law.sf(t) ** 2, y, 40)[0]
        assert metrics.crps_normal([[y]], [[mean]], [[std]])[0, 0] == pytest.approx(below + above, abs=1e-6)


def test_without_spread_crps_is_the_absolute_error(ensemble):
    truth, draws = ensemble
    error = np.abs(draws[0] - truth)
    np.testing.assert_allclose(metrics.crps_ensemble(truth, draws[:1]), error)
    np.testing.assert_allclose(metrics.crps_normal(truth, draws[0], np.zeros_like(truth)), error)


@pytest.mark.parametrize("fair", [True, False])
def test_energy_score_is_its_definition_over_all_pairs(ensemble, fair):
    truth, draws = ensemble
    m = len(draws)
    distances = np.linalg.norm(draws[:, None] - draws[None], axis=-1).sum((0, 1))
    expected = np.linalg.norm(draws - truth, axis=-1).mean(0) - distances / (m * (m - 1) if fair else m * m) / 2
    np.testing.assert_allclose(metrics.energy_score(truth, draws, fair=fair), expected, atol=1e-12)


def test_energy_score_sees_dependence_that_crps_cannot():
    rng = np.random.default_rng(0)
    truth, draws = (np.repeat(rng.normal(size=shape), 2, axis=-1) for shape in ((2000, 1), (20, 2000, 1)))
    shuffled = np.stack([draws[..., 0], draws[::-1, ..., 1]], axis=-1)  # the same marginals, independent genes
    assert metrics.crps_ensemble(truth, shuffled).mean() == pytest.approx(metrics.crps_ensemble(truth, draws).mean())
    assert metrics.energy_score(truth, draws).mean() < metrics.energy_score(truth, shuffled).mean() - 0.01


def test_chunks_of_rows_change_nothing(ensemble, monkeypatch):
    whole = metrics.crps_ensemble(*ensemble), metrics.energy_score(*ensemble)
    monkeypatch.setattr(metrics._arrays.rows_in_chunks, "__defaults__", (60,))  # two rows a chunk
    np.testing.assert_array_equal(metrics.crps_ensemble(*ensemble), whole[0])
    np.testing.assert_array_equal(metrics.energy_score(*ensemble), whole[1])


def test_coverage_counts_the_ends_and_normal_intervals_cover_as_they_say():
    np.testing.assert_array_equal(
        metrics.interval_coverage([[0, 1], [2, 9]], np.zeros((2, 2)), [[2, 2], [2, 2]]), [1, 0.5]
    )
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20_000, 2)) * [1, 3]
    reach = stats.norm.ppf(0.95) * np.ones_like(truth) * [1, 3]
    np.testing.assert_allclose(metrics.interval_coverage(truth, -reach, reach), 0.9, atol=0.01)


def test_interval_score_by_hand_and_lowest_at_the_true_quantiles():
    score = metrics.interval_score([[1.0], [4.0], [-1.0]], np.zeros((3, 1)), np.full((3, 1), 2.0), alpha=0.1)
    np.testing.assert_allclose(score[:, 0], [2, 2 + 20 * 2, 2 + 20 * 1])
    truth = np.random.default_rng(0).normal(size=(20_000, 1))
    mean = [
        metrics.interval_score(truth, np.full_like(truth, -z), np.full_like(truth, z)).mean() for z in (1.2, 1.645, 2.2)
    ]
    assert mean[1] < min(mean[0], mean[2])


def test_pit_is_uniform_for_zero_inflated_counts_and_shows_a_wrong_spread():
    rng = np.random.default_rng(0)
    truth, draws = (np.log1p(rng.poisson(0.4, shape)) for shape in ((20_000, 1), (7, 20_000, 1)))  # two thirds are zero
    values = metrics.pit(truth, draws, seed=3)
    assert stats.kstest(values[:, 0], "uniform").pvalue > 0.01
    narrow = metrics.pit(rng.normal(size=(5000, 1)), 0.3 * rng.normal(size=(19, 5000, 1)))
    assert ((narrow < 0.05) | (narrow > 0.95)).mean() > 0.5  # U-shaped


def test_pit_repeats_with_its_seed(ensemble):
    truth, draws = (np.round(values) for values in ensemble)
    np.testing.assert_array_equal(metrics.pit(truth, draws, seed=1), metrics.pit(truth, draws, seed=1))
    assert (metrics.pit(truth, draws, seed=1) != metrics.pit(truth, draws, seed=2)).any()


def test_impossible_input_is_refused(ensemble):
    truth, draws = ensemble
    with pytest.raises(ValueError, match=r"draws must be \(n_draws, 40, 3\)"):
        metrics.crps_ensemble(truth, draws[:, 1:])
    with pytest.raises(ValueError, match="lower exceeds upper in 120 places"):
        metrics.interval_coverage(truth, truth + 1, truth)
    with pytest.raises(ValueError, match="std has negative values"):
        metrics.crps_normal(truth, truth, -np.ones_like(truth))
    with pytest.raises(ValueError, match="alpha"):
        metrics.interval_score(truth, truth, truth, alpha=90)
