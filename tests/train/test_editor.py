from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow.models.editor import Edit, EditNetwork, Surroundings
from spatiaflow.models.morphology import MorphologyConfig
from spatiaflow.train import editor as training
from spatiaflow.train.pairs import Pairs

pytestmark = pytest.mark.usefixtures("own_draws")
CONFIG = MorphologyConfig(
    transitions=["A -> B", "A -> A"], n_latent=6, width=16, n_layers=1, n_components=3, n_neighbors=2, batch_size=16
)


def planted(n=400, noise=0.5, seed=0):
    """Latents that follow genes and surroundings by linear maps; neighbours are like the cell itself."""
    g = torch.Generator().manual_seed(seed)
    own, weight, context = (torch.randn(*shape, generator=g) for shape in ((n, 3), (3, 6), (6, 6)))
    around = torch.cat([0.7 * own + torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)], 1)
    latents = own @ weight + around @ context + noise * torch.randn(n, 6, generator=g)
    return latents, Surroundings(own, around), weight


def test_the_linear_map_is_the_planted_effect_of_own_genes():
    """Not that of the neighbours, which are like the cell."""
    latents, surroundings, weight = planted(4000)
    found = training.fit_linear(latents, surroundings, np.arange(4000) < 3900)
    torch.testing.assert_close(found, weight, atol=0.08, rtol=0.05)


def model_of(weight, **settings):
    return SimpleNamespace(
        network=EditNetwork(CONFIG).eval(), linear=weight.clone(), config=replace(CONFIG, **settings),
        change=lambda name, niche: np.tile(np.array([1.0, -1.0, 0.5], np.float32), (len(niche), 1)),
    )  # fmt: skip


@pytest.fixture
def case():
    """Targets are what a shift of genes by (1, -1, .5) makes of other cells."""
    latents, surroundings, weight = planted()
    latents[200:] += torch.tensor([1.0, -1.0, 0.5]) @ weight
    return (
        latents,
        surroundings,
        weight,
        [training.Case("A -> B", np.arange(200), np.full(200, ""), np.arange(200, 400), True)],
    )


def chosen(model, latents, surroundings, cases):
    return training.choose(model, latents, surroundings, np.arange(len(latents)), cases, device="cpu")


def test_the_linear_map_is_taken_where_it_wins_at_its_best_strength(case):
    latents, surroundings, weight, cases = case
    model = model_of(weight / 3)  # a third of the truth: the best strength is 3
    scores = chosen(model, latents, surroundings, cases)  # the network has learned nothing and leaves cells as they are
    assert (
        model.edits["A -> B"] == model.edits[""] and model.edits[""].kind == "linear" and model.edits[""].strength == 3
    )
    torch.testing.assert_close(model.linear, weight / 3)
    assert (
        scores["energy, copy"] == 1
        and scores["energy, flow 0"] == pytest.approx(1)
        and scores["energy, linear 3"] < 0.1
    )


def test_the_flow_is_taken_where_it_wins_and_settings_are_kept(case):
    latents, surroundings, weight, cases = case
    model = model_of(-weight)
    chosen(model, latents, surroundings, cases)
    assert model.edits[""].kind == "flow"
    model = model_of(weight, guidance=1.5)
    scores = chosen(model, latents, surroundings, cases)
    assert model.edits[""].guidance == 1.5 and "energy, flow 1.5" in scores and "energy, flow 3" not in scores


def test_each_transition_is_edited_in_its_own_way(case):
    """The sum is that of held-out cells alone, so the other transition has no part in how shifts of genes are edited."""
    latents, surroundings, weight, (held_out,) = case
    backward = training.Case("B -> A", held_out.source, held_out.niche, held_out.target, False)
    model = model_of(weight / 3)
    forward = model.change
    model.change = lambda name, niche: forward(name, niche) * {"A -> B": 1, "B -> A": -1}[name]
    with pytest.warns(UserWarning, match="held-out cells of a state of B -> A: how to edit is chosen on cells that"):
        scores = chosen(model, latents, surroundings, [held_out, backward])
    found = {name: edit.kind for name, edit in model.edits.items()}
    assert found == {
        "": "linear",
        "A -> B": "linear",
        "B -> A": "flow",
        "A -> A": "flow",
    }  # the last has no cells to compare
    alone = model_of(weight / 3)
    some = chosen(alone, latents, surroundings, [held_out])
    assert alone.edits[""] == model.edits[""] and some["energy, linear 3"] == scores["energy, linear 3"]
    assert scores["energy, A -> B, linear 3"] < 0.1 and scores["energy, B -> A, flow 0"] == pytest.approx(1)


def test_without_cells_of_the_states_the_flow_is_used_with_a_warning(case):
    model = model_of(case[2])
    with pytest.warns(UserWarning, match="Give more cells"):
        assert chosen(model, *case[:2], []) == {}
    assert model.edits == {"": Edit("flow", 3.0)}


def test_edits_are_compared_on_held_out_cells_or_where_these_are_few_on_others():
    n = 100
    pairs = Pairs(
        np.arange(n), np.arange(n)[:, None] + 100, np.ones((n, 1)), np.ones(n), np.repeat([0, 1], 50), np.zeros((n, 0)),
        np.zeros((n, 0)), np.zeros(n, int),
    )  # fmt: skip
    for edge, sources, targets, held_out in (
        (110, range(50), range(110, 150), True),
        (140, range(50), range(100, 140), False),
    ):
        band = np.arange(200) >= edge
        band[:50] = held_out
        (found,) = training.cases_of(pairs, np.full(n, "gland"), band, CONFIG.transitions, np.random.default_rng(0))
        assert found.name == "A -> B" and list(found.source) == list(sources) and set(found.niche) == {"gland"}
        assert list(found.target) == list(targets) and found.held_out is held_out
    assert not training.cases_of(
        pairs.rows(np.arange(10)), np.full(10, ""), band, CONFIG.transitions, np.random.default_rng(0)
    )


def test_batches_depend_on_the_seed_and_the_epoch_alone():
    latents, surroundings, _ = planted()
    one, other = (training.CellBatches(np.arange(50, 90), latents, surroundings, 3, 16, 0) for _ in range(2))
    for name in ("source", "own", "around"):
        assert torch.equal(one[2][name], other[2][name])
    assert len({tuple(row) for row in one[0]["source"].tolist()}) == 16  # no cell twice
    other.epoch = 1
    assert not torch.equal(one[2]["source"], other[2]["source"]) and one[2]["seed"] != other[2]["seed"]
    with pytest.raises(IndexError):
        one[3]


def test_conditions_are_dropped_together_or_those_of_the_cell_alone():
    """At a share of a half every cell loses its genes, and half of them their surroundings too."""
    latents, surroundings, _ = planted()
    network, seen = EditNetwork(replace(CONFIG, drop=0.5)), {}
    condition = network.condition

    def watched(s, own, around):
        seen["own"], seen["around"] = own, around
        return condition(s, own, around)

    network.condition = watched
    module = training.EditTraining(network, None)
    b = training.CellBatches(np.arange(400), latents, surroundings, 1, 400, 0)[0]
    module.train().losses(network, b)
    assert not seen["own"].any() and 0.4 < seen["around"].float().mean() < 0.6
    module.eval().losses(network, b)
    assert seen["own"].all() and seen["around"].all()


def test_the_flow_learns_the_planted_effect_of_genes(monkeypatch):
    """Trained for seconds, edits go the way of the planted effect."""
    monkeypatch.setattr("spatiaflow.train.morphology.MIN_BATCHES", 150)
    latents, surroundings, weight = planted(1500, noise=0.2)
    latents = latents / latents.std(0)
    config = replace(CONFIG, width=64, n_layers=2, batch_size=128)
    network, history = training.fit_editor(latents, surroundings, np.arange(1500) >= 1300, config, max_epochs=3)
    assert history["val_loss"][-1] < history["val_loss"][0]
    s, shift = surroundings.rows(slice(1300, None)), torch.tensor([[1.0, 0, 0]]).expand(200, 3)
    (made,) = training.edited(network, latents[1300:], s, [shift], guidance=0.0)
    moved = (made - latents[1300:]).mean(0)
    assert torch.cosine_similarity(moved, weight[0] / (latents.std(0)), dim=0) > 0.8


def test_shifts_are_the_differences_of_the_states_each_cell_once():
    """However often a cell is a target, and however sure its pairs are."""
    n = 8
    pairs = Pairs(
        np.array([0, 1, 2, 3]), np.array([[4, 5], [4, 4], [6, 7], [6, 6]]), np.array([[0.9, 0.1], [1, 0], [0.5, 0.5], [1, 0]]),
        np.array([0.9, 0.1, 0.5, 0.5]), np.zeros(4, int), np.zeros((4, 0)), np.zeros((4, 0)), np.zeros(4, int),
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(n, 3))
    found = training.state_shifts(pairs, np.array(["a", "a", "b", "b"]), ["A -> B"], sparse.csr_matrix(x))["A -> B"]
    assert set(found) == {"", "a", "b"} and found["a"]["confidence"] == 0.5
    np.testing.assert_allclose(found[""]["genes"], x[4:].mean(0) - x[:4].mean(0), atol=1e-5)
    np.testing.assert_allclose(found["a"]["genes"], x[4:6].mean(0) - x[:2].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="B -> A has no pair"):
        training.state_shifts(pairs, np.array(["a"] * 4), ["A -> B", "B -> A"], sparse.csr_matrix(x))
