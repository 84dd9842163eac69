import numpy as np

from spatiaflow.models.conditions import Context
from spatiaflow.models.slide import Slide

RNG = np.random.default_rng(0)


def test_neighbours_of_a_context_are_of_the_same_slide():
    """The second slide lies where the first does; its rows follow those of the first."""
    xy = RNG.uniform(0, 100, (30, 2))
    features = RNG.normal(size=(30, 6)).astype(np.float32)
    slides = [Slide(name, np.arange(30).astype(str), xy, features=features) for name in ("a", "b")]
    around = Context.of(slides, 4, 10.0)
    assert around.cell.shape == (60, 2) and (around.neighbors[:30] < 30).all()
    np.testing.assert_array_equal(around.neighbors[30:], around.neighbors[:30] + 30)
    np.testing.assert_allclose(around.offset[:30], (xy[around.neighbors[:30]] - xy[:, None]) / 10, atol=1e-5)


def test_conditions_of_a_cell_are_its_embeddings_and_its_neighbours():
    cell, niche, tissue = RNG.normal(size=(3, 5, 3))
    neighbors, offset = RNG.integers(0, 5, (5, 2)), RNG.normal(size=(5, 2, 2))
    rows, genes, profile = np.array([4, 1]), RNG.normal(size=(2, 6)), RNG.normal(size=(2, 0))
    found = Context(cell, niche, tissue, neighbors, offset).conditions(rows, np.array([1, 0]), genes, profile, 1)
    for name, expected in (("cell", cell[rows]), ("niche", niche[rows]), ("tissue", tissue[rows]), ("genes", genes)):
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-6)
    for i, row in enumerate(rows):
        for j, near in enumerate(neighbors[row]):
            np.testing.assert_allclose(found.neighbors[i, j], [*cell[near], *offset[row, j]], rtol=1e-6)
    assert found.transition.tolist() == [1, 0] and found.level.tolist() == [1, 1] and found.profile.shape == (2, 0)
