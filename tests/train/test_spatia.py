"""What the losses of SPATIA may see."""

import numpy as np
import pytest
import torch

from spatiaflow.models.fusion import Surroundings
from spatiaflow.models.spatia import SpatiaConfig, SpatiaNetwork
from spatiaflow.train.spatia import ContextTraining, nearest_hidden

pytestmark = pytest.mark.usefixtures("own_draws")


def test_context_asks_for_hidden_cells_and_never_sees_them():
    n, rng = 200, np.random.default_rng(0)
    config = SpatiaConfig(genes=[f"g{i}" for i in range(20)], width=32, gene_layers=1, anchor_um=40.0)
    xy, network = rng.uniform(0, 150, (n, 2)), SpatiaNetwork(config)
    around = Surroundings.of(xy, config)
    absent = torch.from_numpy(rng.random(n) < 0.25)
    target, found = nearest_hidden(absent, around.neighbors)
    for i in range(n):
        known = [j for j, real in zip(around.neighbors.index[i].tolist(), around.neighbors.mask[i]) if real]
        hidden = [j for j in known if absent[j]]
        assert bool(found[i]) == bool(hidden)
        if hidden:
            assert target[i] == min(hidden, key=lambda j: np.linalg.norm(xy[j] - xy[i]))
    assert (target[absent] == torch.arange(n)[absent]).all() and found.float().mean() > 0.8

    module = ContextTraining(network, {"niche": 1.0, "tissue": 1.0}, 40.0)
    cells = torch.randn(n, config.width, requires_grad=True)
    counts = torch.from_numpy(rng.poisson(2.0, (n, 20)).astype(np.float32))
    measured, standard = torch.ones(counts.shape, dtype=bool), network.gene.standard[None]
    batch = {"cells": cells, "counts": counts, "measured": measured, "standard": standard, "around": around}
    sum(module.losses(batch, torch.Generator().manual_seed(1)).values()).backward()
    absent = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.25
    assert (cells.grad[absent] == 0).all()
    assert (cells.grad[~absent].abs().sum(1) > 0).all()
