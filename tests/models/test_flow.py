import numpy as np
import pytest
import torch

from spatiaflow.models.flow import interpolate, sample, schedule, time_features, velocity


def test_interpolation_by_hand():
    y0, y1 = torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    assert interpolate(y0, y1, 0.25).tolist() == [[0.5, 3.0]]
    assert velocity(interpolate(y0, y1, 0.25), y1, 0.25).tolist() == [[2.0, -4.0]]


@pytest.mark.parametrize("n_steps", [1, 2, 5, 17])
def test_sampler_recovers_a_planted_endpoint(n_steps):
    truth, seen = torch.randn(6, 3), []

    def endpoint(y, t):
        seen.append(t)
        return truth

    assert torch.equal(sample(endpoint, torch.randn(6, 3), schedule(n_steps)), truth)
    assert seen == [s / n_steps for s in range(n_steps)]


def test_sampler_follows_the_straight_path():
    y0, y1 = torch.randn(4, 2), torch.randn(4, 2)

    def endpoint(y, t):
        torch.testing.assert_close(y, interpolate(y0, y1, t))
        return y1

    sample(endpoint, y0, schedule(5))


def test_endpoint_mean_collapses_draws_as_theory_says():
    """y1 ~ N(0, s^2) unseen, exact conditional mean as endpoint: std of the draws is a known product of slopes."""
    s, n_steps = 2.0, 50

    def endpoint(y, t):  # E[y1 | y_t] for a standard normal prior
        return y * (t * s**2) / ((1 - t) ** 2 + (t * s) ** 2)

    draws = sample(endpoint, torch.randn(200_000, 1), schedule(n_steps)).std()
    slope = 1.0
    for t in schedule(n_steps):
        k = t * s**2 / ((1 - t) ** 2 + (t * s) ** 2)
        slope = slope * k if t == schedule(n_steps)[-1] else slope * (1 + (k - 1) / (1 - t) / n_steps)
    assert draws.item() == pytest.approx(slope, rel=0.02)
    assert 0.9 * s < slope < s  # narrower than the truth even at 50 steps


def test_released_schedule_has_four_evaluations():
    np.testing.assert_allclose(schedule(5, "released"), [0.01, 0.2575, 0.505, 0.7525], atol=1e-6)


def test_bad_steps_are_refused():
    with pytest.raises(ValueError, match="n_steps"):
        schedule(0)
    with pytest.raises(ValueError, match="released"):
        schedule(1, "released")
    with pytest.raises(ValueError, match="schedule"):
        schedule(3, "cosine")


def test_time_features_resolve_time():
    near = torch.tensor([0.50, 0.52])
    default, paper = time_features(near), time_features(near, scale=1.0)
    assert (default[0] - default[1]).norm() > 20 * (paper[0] - paper[1]).norm()
