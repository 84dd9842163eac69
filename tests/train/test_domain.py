"""What SPATIA remembers of training cells: parts of tissue tell how far cells of one tissue lie apart."""

import dataclasses

import numpy as np
import pytest

import spatiaflow as sf
from _spatia import tiny, train
from spatiaflow._slides import gather
from spatiaflow.train import domain


@pytest.fixture(scope="module")
def slide():
    return sf.datasets.simulated_tissue(300, seed=0)


@pytest.fixture(scope="module")
def model(slide):
    with sf.settings.override(progress=False, verbosity="error"):
        return train([slide], config=tiny(batches_per_epoch=1), max_epochs=1)


def test_cells_like_those_of_training_are_inside_and_others_are_not(model, slide, monkeypatch):
    monkeypatch.setattr(domain, "N_CELLS", 120)
    (cells,) = gather(slide, need=("counts",))
    cells = cells.align(model.genes)
    found = domain.fit_domains(model, [cells])
    assert "genes" in found
    rows = np.arange(len(cells))

    def scores(some):
        return found["genes"](model.inputs(some, rows, None)["genes"])

    assert np.median(scores(cells)) < 0.8
    shuffled = dataclasses.replace(cells, counts=cells.counts[:, ::-1].tocsr())
    assert np.median(scores(shuffled)) > np.median(scores(cells)) + 0.1


@pytest.mark.parametrize("n", [1, 3])
def test_one_slide_is_cut_into_bands_and_three_are_not(model, slide, monkeypatch, n):
    (cells,) = gather(slide, need=("counts",))
    slides = [dataclasses.replace(cells.align(model.genes), name=str(i)) for i in range(n)]
    sizes = []
    monkeypatch.setattr(domain.Domain, "fit", lambda parts: sizes.append([len(part) for part in parts]))
    monkeypatch.setattr(domain, "N_CELLS", 60)
    domain.fit_domains(model, slides)
    assert all(size == ([15] * 4 if n == 1 else [20] * 3) for size in sizes)
    assert sizes
