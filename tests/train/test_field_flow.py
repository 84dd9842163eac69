"""Flows learn what counts say beyond the mean: the posterior against a dense reference, and planted tissue."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf
from spatiaflow.models import STFlowConfig
from spatiaflow.models.field_flow import FieldFlows, Moves
from spatiaflow.models.fields import Fields, kernel
from spatiaflow.models.law import JointLaw
from spatiaflow.models.slide import Slide
from spatiaflow.train import field_flow as module
from spatiaflow.train.field_flow import _Posterior, fit_field_flow
from spatiaflow.train.law import HeldOut, fit_law
from spatiaflow.train.law_scores import choose_law
from spatiaflow.train.stflow import train_stflow

XY = np.stack(np.meshgrid(np.arange(20) * 100.0, np.arange(20) * 100.0), -1).reshape(-1, 2)
N_GENES = 12
pytestmark = pytest.mark.usefixtures("own_draws")
OPTIONS = {"target_sum": 1e4, "new_donor": False, "seed": 0}


def slides(*, bimodal: bool, shown: float) -> list[HeldOut]:
    """Tissue of two types, or a Gaussian field, that half of the genes follow and features show or not."""
    out, load = [], np.repeat([1.0, 0.0], N_GENES // 2)
    for i in range(4):
        rng = np.random.default_rng(i)
        field = Fields(XY, 500.0).draw(rng, 1)[:, 0]
        state = np.where(field > np.median(field), 1.0, -1.0) if bimodal else field
        log_mean = np.full((len(XY), N_GENES), np.log(20 / 1e4))
        excess = np.log(np.cosh(load)) if bimodal else load**2 / 2
        rate = np.exp(log_mean + state[:, None] * load - excess)
        counts = rng.poisson(1e4 * rate).astype(float)
        features = np.column_stack([shown * state, np.zeros((len(XY), 5))]) + rng.standard_normal((len(XY), 6))
        out.append(HeldOut(f"s{i}", "", XY, counts, np.full(len(XY), 1e4), log_mean, features.astype(np.float32)))
    return out


def test_posterior_draws_have_the_mean_and_covariance_of_a_dense_reference():
    rng = np.random.default_rng(0)
    n, genes = 10, 3
    xy = 300 * rng.random((n, 2))
    law = JointLaw(
        theta=np.full(genes, 8.0), lengths=np.array([100.0, 300.0]), field_sd=rng.uniform(0.3, 0.5, (2, genes)),
        nugget_sd=np.full(genes, 0.2), slide_sd=np.full(genes, 0.3), donor_sd=np.ones(genes),
        factors=rng.uniform(0.2, 0.7, (genes, 1)),
    )  # fmt: skip
    own = law.factors @ law.factors.T + np.diag(law.own)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)

    def block(space: np.ndarray, sd: np.ndarray) -> np.ndarray:
        return np.kron(space, own * np.outer(sd, sd))

    prior = block(np.eye(n), law.nugget_sd) + sum(
        block(kernel(distance, length), sd) for length, sd in zip(law.lengths, law.field_sd)
    )
    whole = prior + block(np.ones((n, n)), law.slide_sd)
    counts = rng.poisson(30, (n, genes)).astype(float)
    held = HeldOut("s", "", xy, counts, np.full(n, 1e4), np.full((n, genes), np.log(30 / 1e4)))

    mode = np.zeros(n * genes)
    offset = np.log(1e4) + held.log_mean.ravel() - np.tile(law.variance / 2, n)
    for _ in range(50):  # Newton's steps
        mean = np.exp(offset + mode)
        weight = mean * 8 / (mean + 8)
        seen = mode + (counts.ravel() - mean) / mean
        mode = whole @ np.linalg.solve(whole + np.diag(1 / weight), seen)
    gain = prior @ np.linalg.inv(whole + np.diag(1 / weight))
    expected, covariance = gain @ seen, prior - gain @ prior

    found = _Posterior(held, law, n_newton=50)
    draws = np.stack([found.draw(rng).ravel() for _ in range(3000)])
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(0) - expected) / sd).max() < 0.1
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.08)
    off = np.abs(np.cov(draws.T) - covariance) / covariance.max()
    assert off.max() < 0.1
    assert off.mean() < 0.03


@pytest.mark.slow
def test_flow_finds_the_type_that_images_show_on_a_slide_it_never_saw():
    made = slides(bimodal=True, shown=2.5)
    law = fit_law(made[:3], 100.0)
    flow = fit_field_flow(made[:3], law, 0)
    moves = Moves(FieldFlows((flow,), 1.0, False), made[3].features, XY, made[3].log_mean)
    truth = np.log((made[3].counts[:, 0] + 1) / made[3].counts[:, 0].mean())
    assert np.corrcoef(moves.mean()[:, 0], truth)[0, 1] > 0.8
    card, chosen = choose_law(made[3:], law, [flow], **OPTIONS)
    assert card["chosen"] == "flow, 0.5 of the way"
    assert card[card["chosen"]]["energy 9 spots"] < 0.8 * card["gaussian field"]["energy 9 spots"]
    assert chosen.share == 0.5


@pytest.mark.slow
def test_flow_of_a_gaussian_field_that_images_do_not_show_moves_little():
    made = slides(bimodal=False, shown=0.0)
    law = fit_law(made[:3], 100.0)
    flow = fit_field_flow(made[:3], law, 0)
    card, _ = choose_law(made[3:], law, [flow], **OPTIONS)
    field = card["gaussian field"]["energy 9 spots"]
    assert card["flow, 0.5 of the way"]["energy 9 spots"] == pytest.approx(field, rel=0.02)
    moves = Moves(FieldFlows((flow,), 1.0, False), made[3].features, XY, made[3].log_mean)
    assert moves.mean().std() < 0.25 * np.sqrt(law.variance[0])


def test_of_many_and_large_slides_some_are_learned_from(monkeypatch):
    monkeypatch.setattr(module, "MAX_SLIDES", 2)
    monkeypatch.setattr(module, "MIN_SPOTS", 50)
    monkeypatch.setattr(module, "MAX_SPOTS", 50)
    monkeypatch.setattr(module, "N_STEPS", 2)
    seen = []
    old = module._Examples.of.__func__

    def of(cls, slide, *rest):
        seen.append(slide)
        return old(cls, slide, *rest)

    monkeypatch.setattr(module._Examples, "of", classmethod(of))
    made = slides(bimodal=False, shown=0.0)
    fit_field_flow(made, fit_law(made, 100.0), 0)
    assert [len(s.xy) for s in seen] == [50, 50]
    assert np.ptp(seen[0].xy, axis=0).max() < 1000  # around the middle


@pytest.mark.slow
def test_a_model_whose_draws_pass_through_flows_is_saved_and_draws_the_same_whatever_the_order_of_rows(
    tmp_path, monkeypatch
):
    def forced(slides, law, flows, **options):  # the stack knows all that images show here
        return choose_law(slides, law, flows, **options)[0], FieldFlows(tuple(flows), 0.5, False)

    monkeypatch.setattr("spatiaflow.train.stflow.choose_law", forced)
    monkeypatch.setattr("spatiaflow.train.stflow.FLOW_SPOTS", 100)
    made, corner = [], (XY < 1200).all(1)
    n = int(corner.sum())
    for s in slides(bimodal=True, shown=2.5):
        s = s.take(corner)
        names = np.array([f"{i:03}" for i in range(n)])
        arrays = {"counts": sparse.csr_matrix(s.counts), "library": s.library, "features": s.features}
        xy = s.xy + np.random.default_rng(3).random(s.xy.shape)  # no ties between neighbours
        made.append(Slide(s.name, names, xy, genes=tuple(map(str, range(N_GENES))), **arrays))
    config = STFlowConfig(
        **(vars(STFlowConfig.of("default")) | {"width": 16, "n_heads": 2, "regions": 2, "max_epochs": 1})
    )
    model = train_stflow(made[:3], config, encoder={"id": "planted"})
    scores = model.card["law"]
    assert {"chosen", "gaussian field", "independent", "flow, 0.25 of the way", "flow, 0.5 of the way"} == set(scores)
    assert len(model.field_flows.flows) == 3  # of the folds
    again = sf.models.load(model.save(tmp_path / "model"))
    order = np.random.default_rng(0).permutation(n)
    draws, loaded, shuffled = (
        np.stack(list(one.draws(slide, 4, new_donor=False, seed=4)))
        for one, slide in ((model, made[3]), (again, made[3]), (model, made[3].take(order)))
    )
    np.testing.assert_array_equal(loaded, draws)
    np.testing.assert_array_equal(shuffled, draws[:, order])
    whole, part = (model.predict([one], new_donor=False) for one in (made[3], made[3].take(order)))
    np.testing.assert_array_equal(part.rate, whole.rate[order])
    np.testing.assert_array_equal(part.mean, whole.mean[order])
    drawn = np.mean([np.expm1(x) / 1e4 for x in model.draws(made[3], 100, depth=1e5, new_donor=False)], 0)
    assert np.corrcoef(np.log(drawn).ravel(), np.log(whole.rate).ravel())[0, 1] > 0.97
    np.testing.assert_allclose(drawn.sum(0), whole.rate.sum(0), rtol=0.06)
    across = replace(model.field_flows, for_new_donors=True)
    found = []
    for flows in (model.field_flows, across, None):
        model.field_flows = flows
        found.append((model.predict([made[3]]).rate, next(model.draws(made[3], 1))))  # a new donor
    for i in (0, 1):
        np.testing.assert_array_equal(found[0][i], found[2][i])
        assert np.abs(found[1][i] - found[2][i]).max() > 0
    assert np.abs(np.stack(list(model.draws(made[3], 4, new_donor=False, seed=4))) - draws).mean() > 0.01
    assert np.abs(model.predict([made[3]], new_donor=False).rate / whole.rate - 1).mean() > 0.01
