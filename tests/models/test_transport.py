import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from spatiaflow.models.transport import PairingConfig, Plan, StateShares, agreement, composition, transport


def slow_plan(x, y, epsilon, rho, n_iterations=3000):
    """Sinkhorn's iterations in the log domain, written out."""
    cost = ((x[:, None] - y) ** 2).sum(-1)
    cost /= np.median(((y[:, None] - y) ** 2).sum(-1)[np.triu_indices(len(y), 1)])
    n, m = cost.shape
    f, g, damping = np.zeros(n), np.zeros(m), 1.0 if rho is None else rho / (rho + epsilon)

    def soft(values, axis):
        top = values.max(axis, keepdims=True)
        return (top + np.log(np.exp(values - top).sum(axis, keepdims=True))).squeeze(axis)

    for _ in range(n_iterations):
        f = damping * -epsilon * soft((g - cost) / epsilon - np.log(m), 1)
        g = damping * -epsilon * soft((f[:, None] - cost) / epsilon - np.log(n), 0)
    return np.exp((f[:, None] + g - cost) / epsilon) / (n * m)


@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("sizes", [(12, 12), (7, 30)])
def test_plan_equals_written_out_iterations(rho, sizes):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(sizes[0], 3)), rng.normal(0.3, 1, size=(sizes[1], 3))
    expected = slow_plan(x, y, 0.1, rho)
    plan = transport(x, y, epsilon=0.1, rho=rho, top_k=100)
    found = np.zeros_like(expected)
    np.put_along_axis(found, plan.index, plan.share * plan.mass[:, None] / len(x), 1)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(plan.mass, expected.sum(1) * len(x), rtol=2e-3)
    np.testing.assert_allclose(plan.mean, (expected / expected.sum(1, keepdims=True)) @ y, atol=2e-3)
    np.testing.assert_allclose(plan.dropped, 0, atol=1e-9)
    if rho is None:
        assert plan.marginal_error < 1e-3


def test_sharp_plan_is_the_best_assignment():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 2))
    y = x[rng.permutation(40)] + rng.normal(0, 0.05, (40, 2))
    plan = transport(x, y, epsilon=0.002, rho=None)
    best = linear_sum_assignment(((x[:, None] - y) ** 2).sum(-1))[1]
    assert (plan.index[:, 0] == best).mean() >= 0.95


def test_large_problems_are_solved_in_parts():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(900, 3)), rng.normal(size=(400, 3)) + [1, 0, 0]
    whole, parts = transport(x, y), transport(x, y, batch=150, n_rounds=4)
    assert np.abs(parts.mass - whole.mass).mean() < 0.05
    assert np.corrcoef(parts.mean[:, 1], whole.mean[:, 1])[0, 1] > 0.98
    assert (np.diff(parts.share, axis=1) <= 0).all() and (parts.dropped > -1e-9).all()
    known = parts.share > 0
    assert all(len(set(i[k])) == k.sum() for i, k in zip(parts.index, known))  # no target twice in a row
    few = transport(x[:20], y, batch=150)
    np.testing.assert_allclose(few.mean, transport(x[:20], y).mean, atol=0.4)


def test_draws_follow_the_plan():
    plan = Plan(
        np.array([[3, 5]] * 4000), np.array([[0.6, 0.2]] * 4000), *(np.ones(4000),) * 2, np.ones((4000, 1)), 0.0
    )
    drawn = plan.draw(np.random.default_rng(0))
    assert set(drawn) == {3, 5} and abs((drawn == 3).mean() - 0.75) < 0.03


def test_agreement_is_one_for_equal_plans_and_about_none_for_unrelated_ones():
    rng = np.random.default_rng(3)
    y = rng.normal(size=(300, 10))
    one, other = (transport(rng.normal(size=(300, 10)), y) for _ in range(2))
    np.testing.assert_allclose(agreement(one, one, y), 1)
    assert agreement(one, other, y).mean() < 0.2


def test_sides_do_not_depend_on_the_order_of_rows():
    names = np.array([f"c{i:02}" for i in range(40)])
    share = np.eye(2)[np.arange(40) % 2]
    shuffled = np.random.default_rng(5).permutation(40)

    def chosen(order):
        states = StateShares("state", ["A", "B"], share[order], 0.5, np.argsort(names[order]))
        return [[list(names[order][rows]) for rows in states.sides("A", b, [0, 1])] for b in "AB"]

    assert chosen(np.arange(40)) == chosen(shuffled)
    halves = chosen(shuffled)[0]
    assert not set(halves[0]) & set(halves[1]) and len(halves[0]) == len(halves[1]) == 10


def test_composition_is_the_mean_over_the_nearest_cells():
    rng = np.random.default_rng(6)
    xy, share = rng.uniform(0, 100, (200, 2)), np.eye(3)[rng.integers(0, 3, 200)]
    near = np.argsort(((xy[:, None] - xy) ** 2).sum(-1), 1)[:, 1:31]
    np.testing.assert_allclose(composition(share, xy), share[near].mean(1), atol=1e-9)


@pytest.mark.parametrize(
    "bad", [{"epsilon": 0}, {"unbalanced": -1}, {"top_k": 0}, {"pairs": "best"}, {"confidence": ""}]
)
def test_settings_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        PairingConfig(**bad)
