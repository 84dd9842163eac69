"""What SPATIA is trained on: where batches come from, and what the losses may see."""

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import SpatiaConfig, SpatiaNetwork, Surroundings, standard_of
from spatiaflow.train.spatia import ContextTraining, Fields, ScatteredCells, nearest_hidden

pytestmark = pytest.mark.usefixtures("own_draws")


def test_tissues_are_drawn_in_balance():
    def cells(n, tissue):
        return Slide("s", np.arange(n), np.random.default_rng(n).random((n, 2)), tissue=tissue)

    batches = Fields([cells(400, "a"), cells(100, "a"), cells(500, "b")], {}, [], SpatiaConfig(), 1)
    np.testing.assert_allclose(batches.share, [1 / 3, 1 / 6, 1 / 2])


def test_scattered_cells_come_from_many_places_and_repeat():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(2.0, (3000, 4)).astype(np.float32))
    xy = rng.uniform(0, 3000, (3000, 2))
    slide = Slide("s", np.arange(3000), xy, counts, genes=tuple("abcd"))
    standards, config = {"s": standard_of(slide, 8.0)}, SpatiaConfig(genes=list("abcd"))
    batches = ScatteredCells([slide], standards, config, 40, cells=64, places=12, stretch=8)
    first = batches[3]
    assert len(first["xy"]) == 64
    row = {tuple(p): i for i, p in enumerate(xy)}
    mine = [row[tuple(p)] for p in first["xy"].numpy()]
    np.testing.assert_array_equal(first["counts"], counts[mine].toarray())  # counts and positions of the same cells
    assert len(set(mine)) == 64
    spread = np.linalg.norm(xy[mine] - xy[mine].mean(0), axis=1).mean()
    assert spread > 600  # cells of one region of 150 µm lie within 150 µm
    again = ScatteredCells([slide], standards, config, 40, cells=64, places=12, stretch=8)
    again[20]
    np.testing.assert_array_equal(again[3]["xy"], first["xy"])  # whatever was asked for before

    def cells_of(b):
        return {tuple(p) for p in batches[b]["xy"].numpy()}

    assert cells_of(3) & cells_of(4) and len(cells_of(3) | cells_of(8)) > 110  # a stretch shares places
    batches.epoch = 1
    assert not np.array_equal(batches[3]["xy"], first["xy"])


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
