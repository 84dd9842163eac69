"""Where the batches of SPATIA come from."""

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow.models.preprocess import standard_of
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import SpatiaConfig
from spatiaflow.train.cells import Fields, ScatteredCells, augmented

pytestmark = pytest.mark.usefixtures("own_draws")


def test_a_cell_and_what_is_around_it_are_augmented_alike():
    x = torch.rand(6, 3, 8, 8)
    twice = augmented(torch.cat([x, x], 1), np.random.default_rng(0), 3)
    once = augmented(x, np.random.default_rng(0), 3)
    assert torch.equal(twice[:, :3], once) and torch.equal(twice[:, 3:], once) and not torch.equal(once, x)


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
