from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spatiaflow.models.morphology import Surrogate
from spatiaflow.models.orientation import canonical, turned
from spatiaflow.train.morphology import MorphologyTraining, fit_autoencoder

pytestmark = pytest.mark.usefixtures("own_draws")


def training(network, surrogate=None, *, alignment=0.0, contrast=0.0, weighted=True):
    losses = {"flow": 1.0, "alignment": alignment, "contrast": contrast}
    network.config = replace(network.config, losses=losses, weighted=weighted)
    return MorphologyTraining(network, surrogate)


@pytest.fixture
def batch(some_conditions):
    """A batch of 8 pairs."""
    n = 8
    source, target = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(3))
    return {
        "source": source,
        "target": target,
        "confidence": torch.ones(n),
        "conditions": some_conditions(n),
        "seed": 5,
    }


def test_equal_confidence_is_plain_flow_matching(network, batch):
    found = []
    for weighted, confidence in ((True, 0.3), (True, 1.0), (False, 0.3)):
        module = training(network, weighted=weighted)
        found.append(
            float(module.losses(network, batch | {"confidence": torch.full((8,), confidence)})["flow"].detach())
        )
    assert found[0] == pytest.approx(found[1]) and found[1] == pytest.approx(found[2])
    module = training(network)
    b = batch | {"confidence": torch.tensor([1.0] + [0.0] * 7)}
    b["source"].requires_grad_(True)
    module.losses(network, b)["flow"].backward()
    assert (b["source"].grad[1:] == 0).all() and b["source"].grad[0].abs().sum() > 0


def test_losses_are_switched_by_name_and_reach_the_network(network, batch):
    surrogate = Surrogate(4, 1)
    module = training(network, surrogate, alignment=1.0, contrast=1.0).train()
    losses = module.losses(network, batch)
    assert set(losses) == {"flow", "alignment", "contrast"}
    losses["alignment"].backward()
    assert network.into.weight.grad.abs().sum() > 0 and all(p.grad is None for p in surrogate.parameters())
    off = training(network, surrogate)
    assert set(off.losses(network, batch)) == {"flow"}
    batch["conditions"].transition.zero_()  # no other transition to contrast with
    assert float(module.losses(network, batch)["contrast"].detach()) == 0


def test_morphology_is_aligned_late_on_the_path_alone(network, monkeypatch, batch):
    """Early the best endpoint is a mean over targets, which would be asked to spread as they do."""
    module = training(network, Surrogate(4, 1), alignment=1.0)
    values = {}
    for since in (0.0, 0.75, 2.0):
        monkeypatch.setattr("spatiaflow.train.morphology.ALIGNED_FROM", since)
        values[since] = float(module.losses(network, batch)["alignment"].detach())
    assert values[2.0] == 0 and values[0.0] > 0 and values[0.75] != values[0.0]


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 500])
def test_a_training_may_have_any_number_of_steps(network, steps):
    module = training(network)
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert np.all(np.array(rates) > 0) and np.max(rates) <= module.learning_rate * (1 + 1e-9)


def blobs(n, seed=0):
    """Blobs whose noise is strong where they are bright (n x 16 x 16), their brightness, and noise alone."""
    rng, grid = np.random.default_rng(seed), np.arange(16)
    x, y = rng.uniform(4, 12, (2, n, 1, 1))
    blob = np.exp(-((grid[None, :, None] - y) ** 2 + (grid - x) ** 2) / rng.uniform(4, 12, (n, 1, 1)))
    noise = rng.normal(size=(2, n, 16, 16))
    return np.stack([2 * blob - 1 + (0.05 + 0.3 * blob) * noise[0], noise[1]], 1).astype(np.float32), blob


@pytest.fixture(scope="module")
def fitted():
    images, blob = blobs(800)
    rows = np.arange(800)
    return (
        *fit_autoencoder(images, rows < 700, rows >= 700, 8, n_steps=400, batch_size=32),
        torch.from_numpy(images),
        blob,
    )


@pytest.mark.slow
def test_autoencoder_learns_planted_blobs_and_says_how_well(fitted):
    network, r2, images, _ = fitted
    assert r2[0] > 0.9 and r2[1] < 0.5  # the second channel is noise alone
    with torch.inference_mode():
        z = network.encode(turned(images, canonical(images)))
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=0.1, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(8), atol=0.1, rtol=0)


@pytest.mark.slow
def test_grain_is_carried_at_the_strength_it_would_have_there(fitted):
    network, _, images, blob = fitted
    images, blob = images[700:], torch.from_numpy(blob[700:])  # held out
    turns = canonical(images)
    images, blob = turned(images, turns), turned(blob[:, None], turns)[:, 0].numpy()
    with torch.inference_mode():
        z = network.encode(images)
        grain = network.grain(images, z)
        torch.testing.assert_close(network.decode(z, grain), images, atol=1e-4, rtol=0)
        smooth = network.decode(z.roll(1, 0))
        left = (network.decode(z.roll(1, 0), grain) - smooth)[:, 0].numpy()  # the grain of each, where the next blob is
    there = np.roll(blob, 1, 0)
    bright, dark = there > 0.6, (there < 0.05) & (blob > 0.6)
    assert left[bright & (blob < 0.05)].std() > 0.15  # planted there: about .29; .06 where it came from
    assert left[dark].std() < 0.1  # planted there: .06; .29 where it came from
