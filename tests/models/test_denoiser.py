import numpy as np
import pytest
import torch

from spatiaflow.models import denoiser
from spatiaflow.models.counts import CountPrior, ZeroPrior
from spatiaflow.models.denoiser import Denoiser, DenoiserConfig, SlideTokens
from spatiaflow.models.spatial import spatial_graph

RNG = np.random.default_rng(0)
N = 150
X, XY = RNG.normal(size=(N, 6)).astype(np.float32), RNG.uniform(0, 1000, (N, 2))
PRIOR = CountPrior(np.full(3, 1e-3), np.ones(3), np.zeros(3), np.full(4, 2000.0), 1e4)


def network(geometry, seed=0, n_neighbors=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = DenoiserConfig(6, 3, 16, 2, 3, n_neighbors, geometry=geometry)
        return Denoiser(config).eval()


def predicted(networks, rows, prior=PRIOR, seeds=((5,),), times=(0.0, 0.5), residual=False, base=None):
    tokens = SlideTokens(X, XY, base, networks[0].config, prior, residual, "cpu", rows)
    return tokens.mean(networks, [list(seed) for seed in seeds], list(times))


@pytest.mark.parametrize("geometry", ["invariants", "frames", "distance"])
@pytest.mark.parametrize("room", [0, 4 * N * 8 * 8, 9e8])
def test_parts_are_the_whole(geometry, room, monkeypatch):
    """Also without room for the embedded geometry, or with room for that of one layer."""
    one = network(geometry)
    with torch.inference_mode():
        graph, zero = spatial_graph(XY, 8, ties="cut"), torch.zeros(N, 3)
        whole = one(torch.from_numpy(X), zero, torch.zeros(N), graph, one.edges(graph))
    monkeypatch.setattr(denoiser, "GEOMETRY_BYTES", room)
    for rows in (1, 7, 64, N):
        np.testing.assert_allclose(predicted([one], rows, ZeroPrior(), times=(0.0,)), whole, atol=1e-5)


def test_networks_and_draws_are_averaged():
    networks, seeds = [network("invariants", seed) for seed in (1, 2)], ((3,), (4,))
    each = [predicted([one], 32, seeds=(seed,)) for one in networks for seed in seeds]
    np.testing.assert_allclose(predicted(networks, 32, seeds=seeds), np.mean(each, 0), atol=1e-5)
    assert np.ptp(each, axis=0).max() > 1e-3


def test_the_simple_prediction_is_added_in_the_slides_order():
    base, one = np.arange(3.0 * N, dtype=np.float32).reshape(N, 3), network("distance")
    added = predicted([one], 32, ZeroPrior(), times=(0.0,), residual=True, base=base)
    np.testing.assert_allclose(added - base, predicted([one], 32, ZeroPrior(), times=(0.0,)), atol=1e-4)


def test_spots_may_be_alone():
    one = network("invariants", n_neighbors=0)
    np.testing.assert_allclose(predicted([one], 10), predicted([one], N), atol=1e-5)


def test_memory_is_that_of_a_few_states_of_the_tokens(monkeypatch):
    """No array of neighbours or heads for all tokens is made while the network runs, but what stays for all steps."""
    monkeypatch.setattr(denoiser, "GEOMETRY_BYTES", 0)
    one, made = network("invariants"), []
    for name in ("empty", "empty_like", "zeros_like"):
        original = getattr(torch, name)

        def watch(*args, original=original, **options):
            out = original(*args, **options)
            made.append(out.numel())
            return out

        monkeypatch.setattr(torch, name, watch)
    monkeypatch.setattr(type(one.layers[0].attention), "keys", watched_keys(made, type(one.layers[0].attention).keys))
    predicted([one], 16)
    assert max(made) <= N * one.config.width


def watched_keys(made, original):
    def keys(self, h, y):
        key, value = original(self, h, y)
        made.extend([key.numel(), value.numel()])
        return key, value

    return keys
