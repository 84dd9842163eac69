import dataclasses

import numpy as np
import pytest

from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import fit_theta

XY = np.stack(np.meshgrid(np.arange(12) * 100.0, np.arange(12) * 100.0), -1).reshape(-1, 2)
FACTORS = np.array([[0.8], [0.8], [0.0], [0.0]])


@pytest.fixture(scope="module")
def law():
    return JointLaw(
        theta=np.full(4, 1e4), lengths=np.array([200.0, 900.0]), field_sd=np.array([[0.4] * 4, [0.2] * 4]),
        nugget_sd=np.full(4, 0.2), slide_sd=np.full(4, 0.1), donor_sd=np.full(4, 1.0), factors=FACTORS,
    )  # fmt: skip


def drawn(law, n_draws=200, *, rate=1e-2, depth=1e5, new_donor=False, seed=0, name="s"):
    mean = np.full((len(XY), 4), np.log(rate), np.float32)
    return np.stack(
        list(law.draws(name, XY, mean, np.full(len(XY), depth), n_draws, new_donor=new_donor, seed=seed))
    ).astype(np.float64)


def test_moments_are_those_of_the_law(law):
    """Counts are large, so that log counts show the log rates."""
    log = np.log(drawn(law, 400) + 0.5)
    log -= log.mean(0)
    variance = law.variance[0] + law.slide_sd[0] ** 2
    assert log.var(0).mean() == pytest.approx(variance, rel=0.08)
    lag1 = np.isclose(np.hypot(*(XY[:, None] - XY[None]).transpose(2, 0, 1)), 100)
    expected = 0.16 * np.exp(-0.5) + 0.04 * np.exp(-1 / 9) + law.slide_sd[0] ** 2
    found = np.mean([np.einsum("di,dj->ij", log[:, :, g], log[:, :, g])[lag1].mean() / len(log) for g in range(4)])
    assert found == pytest.approx(expected, rel=0.1)
    correlation = np.corrcoef(log.reshape(-1, 4).T)
    assert correlation[0, 1] == pytest.approx(0.64, abs=0.05)
    assert abs(correlation[2, 3]) < 0.05


def test_the_mean_of_draws_is_the_mean(law):
    alone = dataclasses.replace(law, slide_sd=np.zeros(4))
    np.testing.assert_allclose(drawn(alone, 300).mean((0, 1)), 1e3, rtol=0.05)


def test_single_counts_have_the_marginal_dispersion(law):
    alone = dataclasses.replace(law, theta=np.full(4, 5.0), slide_sd=np.zeros(4))
    counts = drawn(alone, 100, rate=1e-3)[:, ::5].reshape(-1, 4)
    np.testing.assert_allclose(fit_theta(counts, np.full(counts.shape, 100.0)), alone.marginal_theta(None), rtol=0.15)


def test_a_new_donor_is_less_certain_and_draws_come_in_pairs(law):
    known, new = (law.slide_effects("s", 200, new, 0)[0] for new in (False, True))
    assert new.std() > 5 * known.std()
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(known.std(0), 0.1, rtol=0.15)
    assert (law.marginal_theta(True) < law.marginal_theta(False)).all()


def test_noise_belongs_to_seed_and_slide(law):
    one = drawn(law, 3)
    np.testing.assert_array_equal(one, drawn(law, 3))
    assert (one != drawn(law, 3, seed=1)).mean() > 0.5
    assert (one != drawn(law, 3, name="t")).mean() > 0.5


def test_tensors_make_the_law(law):
    again = JointLaw.of(law.tensors())
    for field in dataclasses.fields(JointLaw):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(law, field.name))
