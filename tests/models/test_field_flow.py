"""Flows from draws of the field: their network against a slow reference, moves of draws and of means, files."""

import numpy as np
import pytest
import torch

from spatiaflow.models.field_flow import FieldFlow, FieldFlows, Moves, gene_components, neighbors_of
from spatiaflow.models.law import JointLaw

N, N_GENES, N_FEATURES = 40, 7, 5
pytestmark = pytest.mark.usefixtures("own_draws")


def law(rng: np.random.Generator) -> JointLaw:
    factors = rng.uniform(-0.6, 0.6, (N_GENES, 2))
    return JointLaw(
        theta=np.full(N_GENES, 5.0), lengths=np.array([100.0, 400.0]), field_sd=rng.uniform(0.2, 0.5, (2, N_GENES)),
        nugget_sd=rng.uniform(0.1, 0.3, N_GENES), slide_sd=np.zeros(N_GENES), donor_sd=np.ones(N_GENES), factors=factors,
    )  # fmt: skip


def flow(seed: int) -> FieldFlow:
    """A flow with weights that matter."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    made = FieldFlow(rng.standard_normal(N_FEATURES), rng.standard_normal((N_FEATURES, 3)), *gene_components(law(rng)))
    torch.nn.init.normal_(made.last.weight, std=0.3)
    return made.eval()


def slide(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, positions without ties, and log mean rates."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, N_FEATURES)), 1000 * rng.random((N, 2)), rng.standard_normal((N, N_GENES)) - 5


def test_gene_components_of_draws_of_the_field_are_white():
    rng = np.random.default_rng(0)
    known = law(rng)
    down, up = gene_components(known)
    own = known.factors @ known.factors.T + np.diag(known.own)
    sd = np.sqrt(known.variance)
    covariance = down.T @ (own * np.outer(sd, sd)) @ down
    np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-6)
    np.testing.assert_allclose(up @ down, np.eye(2), atol=1e-9)


def test_neighbors_are_the_nearest_others():
    _, xy, _ = slide()
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_array_equal(neighbors_of(xy), np.argsort(distance, 1)[:, :24])
    np.testing.assert_array_equal(neighbors_of(xy[:1]), [[0]])
    assert neighbors_of(xy[:5]).shape == (5, 4)


def test_velocity_is_that_of_a_slow_reference(monkeypatch):
    monkeypatch.setattr("spatiaflow.models.regression.ROWS", 16)  # several blocks
    made, (features, xy, log_mean) = flow(1), slide()
    near, t = neighbors_of(xy), 0.3
    x = np.random.default_rng(2).standard_normal((N, made.down.shape[1])).astype(np.float32)
    tokens = made.tokens(features, near, log_mean)
    found = made.of_slide(tokens)(torch.from_numpy(x), t).numpy()

    image = np.clip((features - made.centre.numpy()) @ made.components.numpy(), -4, 4)
    pattern = np.clip((log_mean - log_mean.mean(0)) @ made.down.numpy(), -4, 4)
    rows = []
    for i in range(N):
        known = np.concatenate([image[i], image[near[i, :8]].mean(0), pattern[i]])
        angle = np.pi / 2 * t
        state = np.concatenate([x[i], x[near[i, :8]].mean(0), x[near[i, :24]].mean(0), [np.cos(angle), np.sin(angle)]])
        with torch.no_grad():
            known, state = (torch.from_numpy(v.astype(np.float32)) for v in (known, state))
            rows.append(made.last(made.body(made.of_tokens(known) + made.of_state(state))).numpy())
    rows = np.stack(rows)
    np.testing.assert_allclose(found, rows - rows.mean(0), atol=1e-5)


def test_draws_go_a_share_of_the_way_and_each_flow_moves_its_part_of_them():
    flows, (features, xy, log_mean) = (flow(1), flow(2)), slide()
    deviation = np.random.default_rng(0).standard_normal((N, N_GENES)).astype(np.float32)

    def moved(some, share, draw):
        by = Moves(FieldFlows(some, share, False), features, xy, log_mean).of_draws(10)(draw, deviation) - deviation
        assert by.shape == deviation.shape
        return by

    first, second = moved(flows[:1], 1.0, 0), moved(flows[1:], 1.0, 0)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(moved(flows, 0.5, 4), first / 2, atol=1e-6)
    np.testing.assert_allclose(moved(flows, 0.5, 5), second / 2, atol=1e-6)
    assert not moved(flows, 0.0, 3).any()


def test_the_mean_log_rate_of_a_gene_stays():
    moves = Moves(FieldFlows((flow(1), flow(2)), 1.0, False), *slide())
    deviation = np.random.default_rng(0).standard_normal((N, N_GENES)).astype(np.float32)
    for by in (moves.mean(), moves.of_draws(2)(0, deviation) - deviation):
        assert np.abs(by).max() > 0.1
        np.testing.assert_allclose(by.mean(0), 0, atol=1e-5)


def test_the_mean_moves_as_draws_do_on_average():
    one, (features, xy, log_mean) = flow(1), slide()
    torch.nn.init.zeros_(one.of_state.weight)
    moves = Moves(FieldFlows((one,), 0.5, False), features, xy, log_mean)
    same = np.ones((N, N_GENES), np.float32)
    np.testing.assert_allclose(moves.mean(), moves.of_draws(1)(0, same) - 1, atol=1e-5)


def test_the_order_of_rows_changes_nothing():
    flows, (features, xy, log_mean) = FieldFlows((flow(1),), 0.5, False), slide()
    deviation = np.random.default_rng(0).standard_normal((N, N_GENES)).astype(np.float32)
    order = np.random.default_rng(1).permutation(N)
    one, two = Moves(flows, features, xy, log_mean), Moves(flows, features[order], xy[order], log_mean[order])
    np.testing.assert_allclose(two.of_draws(1)(0, deviation[order]), one.of_draws(1)(0, deviation)[order], atol=1e-5)
    np.testing.assert_allclose(two.mean(), one.mean()[order], atol=1e-5)


def test_an_untrained_flow_moves_nothing():
    rng = np.random.default_rng(0)
    made = FieldFlow(np.zeros(N_FEATURES), np.eye(N_FEATURES), *gene_components(law(rng)))
    moves = Moves(FieldFlows((made,), 1.0, False), *slide())
    deviation = rng.standard_normal((N, N_GENES)).astype(np.float32)
    np.testing.assert_array_equal(moves.of_draws(1)(0, deviation), deviation)
    assert not moves.mean().any()


def test_tensors_give_the_same_flows_back():
    flows = FieldFlows(tuple(flow(i) for i in range(11)), 0.25, False)  # ten and more: names of two digits
    again = FieldFlows.of(flows.tensors())
    assert (again.share, again.for_new_donors) == (0.25, False)
    assert len(again.flows) == 11
    np.testing.assert_array_equal(Moves(again, *slide()).mean(), Moves(flows, *slide()).mean())
