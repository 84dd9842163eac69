import numpy as np
import pytest
import torch
from scipy import optimize, sparse, stats

from spatiaflow.models.counts import (
    CountLaw,
    CountPrior,
    GaussianPrior,
    ImagePrior,
    ScalarZINB,
    Spread,
    ZeroPrior,
    draw_counts,
    fit_counts,
    library_quantiles,
    log_likelihood,
    log_moments,
    log_normalize,
)

RNG = np.random.default_rng(0)


def test_likelihood_is_scipys():
    counts, mean, theta = np.arange(30.0), 4.0, 1.7
    expected = stats.nbinom.logpmf(counts, theta, theta / (theta + mean))
    found = log_likelihood(torch.tensor(counts), torch.tensor(mean), torch.tensor(theta))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    inflated = log_likelihood(torch.tensor(counts), torch.tensor(mean), torch.tensor(theta), torch.tensor(0.3))
    assert torch.exp(inflated[0]).item() == pytest.approx(0.3 + 0.7 * np.exp(expected[0]), rel=1e-5)


def test_fit_matches_a_slow_fit_and_the_planted_truth():
    library = RNG.lognormal(7, 0.5, 3000)
    rate, theta = np.array([2e-3, 1e-2, 3e-4]), np.array([1.0, 5.0, 0.5])
    counts = draw_counts(library[:, None] * rate, theta, 0.0, RNG)
    found_rate, found_theta, pi = fit_counts(counts, library)
    np.testing.assert_allclose(found_rate * (1 - pi), rate, rtol=0.12)
    np.testing.assert_allclose(found_theta[:2], theta[:2], rtol=0.15)

    def slow(p):
        mean, t = library * np.exp(p[0]), np.exp(p[1])
        return -stats.nbinom.logpmf(counts[:, 1], t, t / (t + mean)).sum()

    best = optimize.minimize(slow, [np.log(0.01), 0.0], method="Nelder-Mead").x
    if pi[1] == 0:
        assert np.log(found_rate[1]) == pytest.approx(best[0], abs=2e-3)
        assert np.log(found_theta[1]) == pytest.approx(best[1], abs=2e-2)


def test_zero_inflation_is_found_only_where_it_is():
    library = np.full(4000, 1000.0)
    mean = np.full((4000, 2), 6.0)
    counts = draw_counts(mean, np.array([4.0, 4.0]), np.array([0.4, 0.0]), RNG)
    rate, _, pi = fit_counts(counts, library)
    assert pi[0] == pytest.approx(0.4, abs=0.05)
    assert rate[0] == pytest.approx(6e-3, rel=0.05)
    assert pi[1] < 0.05


@pytest.mark.parametrize("prior", [ScalarZINB(0.7, 2.0, 0.3), ScalarZINB.from_logits(1.0, 0.1, 0.0)])
def test_scalar_zinb_moments(prior):
    counts = np.expm1(prior.sample(200_000, 1, RNG))
    assert counts.mean() == pytest.approx((1 - prior.pi) * prior.mean, rel=0.03)
    zero = prior.pi + (1 - prior.pi) * (prior.theta / (prior.theta + prior.mean)) ** prior.theta
    assert (counts == 0).mean() == pytest.approx(zero, abs=0.01)


def test_released_parameters_are_the_papers():
    prior = ScalarZINB.from_logits()
    assert (prior.mean, prior.theta, prior.pi) == pytest.approx((1.1052, 1.0, 0.5), abs=1e-4)
    assert prior == ScalarZINB()


def test_priors_are_seeded_and_deterministic_ones_say_so():
    base, noise = RNG.random((9, 4)), np.full(4, 0.1)
    counts = CountPrior(np.full(4, 1e-3), np.ones(4), np.zeros(4), np.array([500.0, 2000.0]), 1e4)
    for prior in (ZeroPrior(), GaussianPrior(), ScalarZINB(), counts, ImagePrior(noise), ImagePrior(0 * noise)):
        one, two, other = (prior.sample(9, 4, np.random.default_rng(s), base) for s in (1, 1, 2))
        assert one.shape == (9, 4)
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, two)
        assert np.array_equal(one, other) == prior.deterministic


def test_count_prior_looks_like_its_training_data():
    library = RNG.lognormal(7, 0.4, 4000)
    counts = draw_counts(library[:, None] * [1e-3, 2e-2], np.array([0.8, 3.0]), 0.0, RNG)
    drawn = CountPrior.fit(counts, library).sample(20_000, 2, RNG)
    measured = log_normalize(counts, library)
    np.testing.assert_allclose(drawn.mean(0), measured.mean(0), rtol=0.06)
    np.testing.assert_allclose(drawn.std(0), measured.std(0), rtol=0.06)


def law(pi=0.0):
    return CountLaw(library_quantiles(RNG.lognormal(7, 0.5, 2000)), 1e4, np.full(3, pi))


@pytest.mark.parametrize("pi", [0.0, 0.3])
def test_law_draws_have_the_moments_asked_for(pi):
    one = law(pi)
    mean = np.tile([0.5, 1.2, 2.0], (40, 1))
    std = one.std_at(mean, np.array([1.0, 2.0, 5.0]))
    draws = one.sample(mean, std, 500)
    np.testing.assert_allclose(draws.mean((0, 1)), mean[0], rtol=0.06)
    np.testing.assert_allclose(draws.std((0, 1)), std[0], rtol=0.08)
    assert (draws == 0).any()  # counts, not a normal


def test_law_recovers_a_planted_dispersion():
    one, n = law(), 4000
    library = RNG.choice(one.libraries, n)
    rate = RNG.lognormal(-6, 0.7, (n, 1)) * np.ones(3)
    theta = np.array([0.5, 2.0, 20.0])
    counts = draw_counts(library[:, None] * rate, theta, 0.0, RNG)
    depth = np.concatenate([np.stack([one.rates, np.ones(len(one.rates))], 1)])
    mean = np.stack(
        [np.interp(np.log(rate[:, g]), np.log(depth[:, 0]), one._row(t)[0]) for g, t in enumerate(theta)], 1
    )
    found = one.fit_theta(mean, counts, library)
    assert (np.abs(np.log(found / theta)) < np.log(1.8)).all()


@pytest.mark.parametrize("target_sum", [50.0, None])
def test_sparse_counts_are_normalised_as_dense_ones(target_sum):
    rng = np.random.default_rng(0)
    counts, library = rng.poisson(0.5, (30, 8)), np.r_[0, rng.poisson(40, 29)]
    found = log_normalize(sparse.csr_matrix(counts), library, target_sum)
    assert sparse.issparse(found)
    np.testing.assert_allclose(found.toarray(), log_normalize(counts, library, target_sum), rtol=1e-6)


def test_one_share_of_extra_zeros_may_stand_for_all_genes():
    mean, theta = np.random.default_rng(0).uniform(0, 2, (20, 3)), np.array([0.5, 2.0, 10.0])
    one, each = (CountLaw(np.arange(20.0, 80), 50.0, pi) for pi in (np.array(0.2), np.full(3, 0.2)))
    np.testing.assert_array_equal(one.std_at(mean, theta), each.std_at(mean, theta))
    np.testing.assert_array_equal(one.rate_at(mean, theta), each.rate_at(mean, theta))


@pytest.mark.parametrize("target_sum", [1e4, None])
@pytest.mark.parametrize("theta", [0.2, 1.5, 40.0])
def test_spread_is_that_of_many_draws(theta, target_sum):
    """Against 400,000 draws for each of five rates, at dispersions between those of the table."""
    rng, library = np.random.default_rng(1), library_quantiles(RNG.lognormal(7, 0.5, 2000))
    spread = Spread(library, target_sum)
    for rate in (2e-5, 3e-4, 2e-3, 2e-2, 0.3):
        size = rng.choice(library, 400_000)
        y = log_normalize(draw_counts(size[:, None] * rate, theta, 0.0, rng), size, target_sum).astype(np.float64)
        found = spread(y.mean(0, keepdims=True), np.array([theta]))[0, 0]
        np.testing.assert_allclose(found, y.std(), rtol=0.01)


@pytest.mark.parametrize(("kind", "more"), [(CountLaw, (0.1,)), (Spread, ())])
def test_tables_of_the_same_library_sizes_are_made_once(kind, more):
    library = library_quantiles(RNG.lognormal(7, 0.5, 2000), 16)
    one, again, other, raw = (
        kind(size, target, *more) for size, target in ((library, 1e4), (library.copy(), 1e4), (library + 1, 1e4), (library, None))
    )  # fmt: skip
    assert one.mean is again.mean and one.std is again.std
    assert not np.array_equal(one.mean, other.mean) and not np.array_equal(one.mean, raw.mean)


def test_moments_of_counts_are_those_of_all_counts():
    theta, mean, scale = 0.7, np.array([0.01, 3.0, 400.0]), np.array([1.0, 8.0])
    first, variance = log_moments(theta, mean, scale)
    counts = np.arange(40_000)
    for i, m in enumerate(mean):
        p = stats.nbinom.pmf(counts, theta, theta / (theta + m))[:, None]
        y = np.log1p(counts[:, None] * scale)
        np.testing.assert_allclose(first[i], (p * y).sum(0), rtol=1e-4)
        np.testing.assert_allclose(variance[i], (p * y**2).sum(0) - (p * y).sum(0) ** 2, rtol=1e-4)


def test_spread_has_no_grain():
    """What differs from a smooth curve: the table of random draws had 1.6 %."""
    mean = np.linspace(0.3, 4, 400)[:, None]
    found = Spread(library_quantiles(RNG.lognormal(7, 0.5, 2000)), 1e4)(mean, np.array([2.0]))[:, 0]
    smooth = np.polynomial.Polynomial.fit(mean[:, 0], found, 9)(mean[:, 0])
    assert np.abs(found / smooth - 1).max() < 3e-3
