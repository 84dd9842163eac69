from dataclasses import replace

import numpy as np
import pytest
import torch

from spatiaflow import models
from spatiaflow.models.autoencoder import Autoencoder
from spatiaflow.models.flow import integrate
from spatiaflow.models.morphology import (
    MorphologyFlow,
    MorphologyNetwork,
    Surrogate,
    named_noise,
    sliced_wasserstein,
    start,
)
from spatiaflow.models.orientation import turned


def flow(network):
    torch.manual_seed(2)
    autoencoder = Autoencoder(2, network.config.n_latent, network.config.crop_pixels)
    return MorphologyFlow(
        network=network, autoencoder=autoencoder, surrogate=None, shifts={}, intensity={}, history={}, card={}
    )


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_integrators_converge_at_their_order(method, order):
    """dx/dt = x cos(3 t), whose solution is x exp(sin(3 t) / 3)."""
    x, calls = torch.tensor([1.0, -2.0], dtype=torch.float64), []

    def velocity(x, t):
        calls.append(t)
        return x * np.cos(3 * t)

    truth = x * np.exp(np.sin(3.0) / 3)
    error = [float((integrate(velocity, x, n, method=method) - truth).abs().max()) for n in (400, 800)]
    assert error[0] / error[1] == pytest.approx(2**order, rel=0.1)
    calls.clear()
    path = integrate(velocity, x, 10, method=method, trajectory=True)
    assert len(calls) == 10 and len(path) == 10 // order + 1
    with pytest.raises(ValueError, match="evaluations"):
        integrate(velocity, x, 0, method=method)


def test_path_between_gaussians_is_recovered():
    """For x0 ~ N(0, 1), x1 ~ N(3, 0.5^2), drawn apart, the velocity is known; its flow carries one to the other."""
    rng = np.random.default_rng(0)

    def velocity(x, t):
        variance = (1 - t) ** 2 + 0.25 * t**2
        return 3 + (0.25 * t - (1 - t)) / variance * (x - 3 * t)

    x = torch.from_numpy(rng.normal(size=20000))
    found = integrate(velocity, x, 200)
    assert float(found.mean()) == pytest.approx(3, abs=0.02) and float(found.std()) == pytest.approx(0.5, abs=0.02)


def test_every_condition_matters_and_guidance_of_none_is_the_conditional(network, some_conditions):
    control, noise = torch.randn(4, 2, 16, 16), torch.randn(4, 4)
    conditions, model = some_conditions(4), flow(network)
    one = model.generate(control, conditions, noise, n_steps=2)
    torch.testing.assert_close(model.generate(control, conditions, noise, n_steps=2), one)
    model.config.guidance = 1.0
    assert not torch.allclose(model.generate(control, conditions, noise, n_steps=2), one, atol=1e-4)
    model.config.guidance = 0.0
    assert not torch.allclose(model.generate(control, conditions, -noise, n_steps=2), one, atol=1e-4)
    for name in ("cell", "niche", "tissue", "neighbors", "transition", "genes", "profile"):
        other = some_conditions(4)
        value = getattr(other, name)
        setattr(other, name, 1 - value if name == "transition" else -value)
        assert not torch.allclose(model.generate(control, other, noise, n_steps=2), one, atol=1e-5), name
    part = model.generate(control[:2], conditions.rows(slice(0, 2)), noise[:2], n_steps=2)
    torch.testing.assert_close(part, one[:2], atol=1e-5, rtol=0)


def test_conditions_are_dropped_sample_by_sample(network, some_conditions):
    conditions, kept = some_conditions(3), torch.tensor([True, False, True])
    vector, whole = network.condition(conditions, kept), network.condition(conditions)
    torch.testing.assert_close(vector[kept], whole[kept])
    assert (vector[1] == network.nothing).all()


def test_neighbours_are_a_set_around_a_cell_in_canonical_orientation(network, some_conditions):
    """Their order does not matter, and a cell that is turned with its surroundings is generated turned."""
    model, conditions, noise = flow(network), some_conditions(4), torch.randn(4, 4)
    control = torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    one = model.generate(control, conditions, noise, n_steps=1)
    other = replace(conditions, neighbors=conditions.neighbors[:, [2, 0, 1]])
    torch.testing.assert_close(model.generate(control, other, noise, n_steps=1), one)
    turns = np.array([1, 3, 4, 6])
    found = model.generate(turned(control, turns), conditions.turned(turns), noise, n_steps=1)
    torch.testing.assert_close(found, turned(one, turns), atol=1e-5, rtol=1e-4)


def test_without_spatial_context_neither_niche_nor_neighbours_matter(network, some_conditions):
    alone = MorphologyNetwork(replace(network.config, spatial=False)).eval()
    for p in alone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    control, noise = torch.randn(2, 2, 16, 16), torch.randn(2, 4)
    one = flow(alone).generate(control, some_conditions(2), noise, n_steps=1)
    other = some_conditions(2)
    other.niche, other.tissue, other.neighbors = -other.niche, -other.tissue, -other.neighbors
    torch.testing.assert_close(flow(alone).generate(control, other, noise, n_steps=1), one)


def test_sliced_wasserstein():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(200, 3, generator=g)
    assert sliced_wasserstein(a, a[torch.randperm(200, generator=g)], g) == 0
    shifted = a + torch.tensor([2.0, 0, 0])
    expected = 2 * 0.5  # mean of |first coordinate| of a random direction in three dimensions
    assert float(sliced_wasserstein(a, shifted, g, n=4000)) == pytest.approx(expected, rel=0.05)


def test_save_and_load(network, tmp_path, some_conditions):
    model = MorphologyFlow(
        network=network, autoencoder=flow(network).autoencoder, surrogate=Surrogate(4, 1),
        shifts={"A -> B": {"": {"genes": [0.0] * 5, "profile": [0.1]}}},
        intensity={"dapi": [0.0, 1.0], "rna": [0.0, 2.0]}, history={"epoch": [0]}, card={"use_rep": "X"},
    )  # fmt: skip
    again = models.load(model.save(tmp_path / "m.safetensors"))
    control, noise = torch.randn(2, 2, 16, 16), torch.randn(2, 4)
    arguments = (control, some_conditions(2), noise)
    torch.testing.assert_close(again.generate(*arguments), model.generate(*arguments))
    assert again.shifts == model.shifts and again.card == model.card and again.intensity == model.intensity


def test_the_path_begins_at_the_control_with_noise(network):
    control, noise = torch.randn(1, 4), torch.randn(400, 4)
    added = start(control, noise, replace(network.config, noise=0.2)) - control
    np.testing.assert_allclose(added, 0.2 * noise, atol=1e-6)
    np.testing.assert_array_equal(start(control, noise, replace(network.config, noise=0.0))[0], control[0])
    np.testing.assert_array_equal(start(control, noise, replace(network.config, start="noise")), noise)


def test_noise_belongs_to_the_name_the_sample_and_the_seed():
    one = named_noise(["a", "b", "c"], 0, 0, 4)
    torch.testing.assert_close(named_noise(["c", "a"], 0, 0, 4), one[[2, 0]], rtol=0, atol=0)
    for seed, sample in ((1, 0), (0, 1)):
        assert not torch.isclose(named_noise(["a", "b", "c"], seed, sample, 4), one).any()
    draws = named_noise([str(i) for i in range(3000)], 0, 0, 4)
    assert abs(float(draws.mean())) < 0.05 and abs(float(draws.std()) - 1) < 0.05


def test_no_change_of_latents_is_no_change_of_the_image(network, some_conditions):
    """The grain is carried over from the control image."""
    for p in network.out.parameters():
        torch.nn.init.zeros_(p)
    model, control = flow(network), torch.randn(3, 2, 16, 16)
    made = model.generate(control, some_conditions(3), torch.zeros(3, 4), n_steps=1)
    torch.testing.assert_close(made, control)
    path = model.generate(control, some_conditions(3), torch.zeros(3, 4), n_steps=1, trajectory=True)
    assert path.shape == (2, 3, 2, 16, 16)


def test_a_rule_for_states_prints_in_a_line():
    rule = models.States(["a", "b"], [f"G{i}" for i in range(300)], [[0.5] * 300] * 2, [0, 0])
    assert repr(rule) == "States: a, b; from 300 genes"


def test_files_without_training_settings_load_with_the_defaults(network, tmp_path):
    """As version 0.1.0 wrote them."""
    model = flow(network)
    description, tensors = model.state()
    for name in ("weighted", "exchange", "losses", "batch_size", "devices", "precision", "guidance"):
        del description["config"][name]
    assert MorphologyFlow.from_state(description, tensors).config == network.config
