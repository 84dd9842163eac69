"""The flow is chosen where images tell what the mean does not, and not where the field is all there is."""

import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf
from spatiaflow.models import STFlowConfig
from spatiaflow.models.field_flow import FieldFlow
from spatiaflow.models.fields import Fields
from spatiaflow.models.slide import Slide
from spatiaflow.train.field_flow import _empty, fit_field_flow
from spatiaflow.train.law import HeldOut, fit_law
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


@pytest.mark.parametrize(("bimodal", "shown", "chosen"), [(True, 2.5, "flow"), (False, 0.0, "gaussian field")])
def test_flow_is_chosen_where_images_show_the_type_and_not_of_a_gaussian_field(bimodal, shown, chosen):
    made = slides(bimodal=bimodal, shown=shown)
    flow, card = fit_field_flow(made, fit_law(made, 100.0), **OPTIONS)
    assert card["chosen"] == chosen
    assert (flow is not None) == (chosen == "flow")
    if chosen == "flow":
        assert card["flow"]["energy 9 spots"] < 0.8 * card["gaussian field"]["energy 9 spots"]
        again = FieldFlow.of(flow.tensors())
        s, deviation = made[0], np.random.default_rng(0).standard_normal((len(XY), N_GENES)).astype(np.float32)
        one, two = (f.move(f.tokens(f.reduce(s.features), s.xy, s.log_mean))(deviation) for f in (flow, again))
        np.testing.assert_array_equal(one, two)
        order = np.random.default_rng(1).permutation(len(XY))
        tokens = flow.tokens(flow.reduce(s.features[order]), s.xy[order], s.log_mean[order])
        assert np.abs(flow.move(tokens)(deviation[order]) - one[order]).mean() < 0.02  # ties between neighbours


def test_an_untrained_flow_moves_nothing():
    made = slides(bimodal=False, shown=0.0)
    flow = FieldFlow(**_empty(made, fit_law(made, 100.0)))
    deviation = np.ones((len(XY), N_GENES), np.float32)
    moved = flow.move(flow.tokens(flow.reduce(made[0].features), XY, made[0].log_mean))(deviation)
    np.testing.assert_array_equal(moved, deviation)


def test_a_model_whose_draws_pass_through_a_flow_is_saved_and_draws_the_same_whatever_the_order_of_rows(
    tmp_path,
):
    made = []
    for s in slides(bimodal=True, shown=2.5):
        names = np.array([f"{i:03}" for i in range(len(XY))])
        arrays = {"counts": sparse.csr_matrix(s.counts), "library": s.library, "features": s.features}
        made.append(Slide(s.name, names, XY, genes=tuple(map(str, range(N_GENES))), **arrays))
    config = STFlowConfig(
        **(vars(STFlowConfig.of("default")) | {"width": 16, "n_heads": 2, "regions": 2, "max_epochs": 1})
    )
    model = train_stflow(made[:3], config, encoder={"id": "planted"})
    assert model.card["law"]["chosen"] == "flow"
    again = sf.models.load(model.save(tmp_path / "model"))
    order = np.random.default_rng(0).permutation(len(XY))
    draws, loaded, shuffled = (
        np.stack(list(one.draws(slide, 3, new_donor=False, seed=4)))
        for one, slide in ((model, made[3]), (again, made[3]), (model, made[3].take(order)))
    )
    np.testing.assert_array_equal(loaded, draws)
    np.testing.assert_array_equal(shuffled, draws[:, order])
    model.field_flow = None
    assert np.abs(np.stack(list(model.draws(made[3], 3, new_donor=False, seed=4))) - draws).mean() > 0.01
