import numpy as np

from spatiaflow.train.trust import partial, trusted

RNG = np.random.default_rng(0)


def test_partial_correlation_is_that_of_the_residuals():
    depth = RNG.lognormal(8, 1, 500)
    y, p = RNG.normal(size=(2, 500, 3)) + np.log(depth)[:, None]
    x = np.stack([np.ones(500), np.log(depth)], 1)
    for g in range(3):
        a, b = (v - x @ np.linalg.solve(x.T @ x, x.T @ v) for v in (y[:, g], p[:, g]))
        np.testing.assert_allclose(partial(y, p, depth)[g], np.corrcoef(a, b)[0, 1], atol=1e-9)
    assert (partial(y, np.ones_like(p), depth) == 0).all()


def held_out(r, donors, shift=0.0, n=300, genes=400, seed=0):
    """Truth and prediction with correlation ``r`` in each gene, and a shift of it between donors."""
    rng, rows = np.random.default_rng(seed), []
    for _ in donors:
        p = rng.normal(size=(n, genes))
        own = np.clip(r + shift * rng.normal(size=genes), -0.95, 0.95)
        rows.append((own * p + np.sqrt(1 - own**2) * rng.normal(size=(n, genes)), p))
    y, p = (np.concatenate([one[i] for one in rows]) for i in (0, 1))
    name = np.repeat(np.arange(len(donors)), n)
    return y, p, np.full(len(y), 1000.0), name, np.repeat(donors, n)


def test_noise_is_seldom_trusted_and_signal_is():
    assert trusted(*held_out(0.0, list("abcd")))[1].mean() < 0.1
    assert trusted(*held_out(0.5, list("abcd"))).mean() > 0.95


def test_a_shift_between_donors_is_learned_from_four_on():
    calm, wild = (trusted(*held_out(0.25, list("abcdef"), shift))[1].mean() for shift in (0.0, 0.3))
    assert calm > 0.9
    assert wild < 0.6


def test_trusted_genes_are_wrong_at_most_one_time_in_ten():
    """Genes of any quality; the next donor shows which were right."""
    rng = np.random.default_rng(1)
    quality = np.abs(rng.normal(0, 0.2, 2000)) * rng.choice([0, 1], 2000)
    found = trusted(*held_out(quality, list("abcde"), 0.15, genes=2000))[1]
    following = quality + 0.15 * rng.normal(size=2000)
    assert found.sum() > 100
    assert (following[found] <= 0).mean() <= 0.1


def test_one_donor_says_less_of_another():
    same, new = trusted(*held_out(0.25, list("aaa")))
    assert same.mean() > 0.9
    assert new.mean() < 0.1
