"""Networks of an imputer: they learn what ridge cannot, each without its blocks."""

import numpy as np
import pytest
from scipy import sparse

from spatiaflow._process import unchanged
from spatiaflow.models.slide import Slide
from spatiaflow.train import imputer, masked

GENES = [f"g{i}" for i in range(9)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A rule this simple is learned from few cells."""
    monkeypatch.setattr(masked, "MIN_CELLS", 1000)


@pytest.fixture(autouse=True)
def restored():
    """As in a verb: what an optimizer loads changes the filters of warnings."""
    with unchanged():
        yield


def cells(n=1500, seed=0):
    """The last gene is high where exactly one of two latent signs is up: no linear function of the others."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1, 1], (n, 2))
    rate = np.exp(1.5 + 0.7 * np.repeat(sign, 4, axis=1))
    last = np.where(sign.prod(1) < 0, 12.0, 2.0)
    counts = rng.poisson(np.c_[rate, last]).astype(np.float32)
    xy = rng.uniform(0, 500, (n, 2))
    return Slide(f"s{seed}", np.arange(n).astype(str), xy, sparse.csr_matrix(counts), counts[:, :8].sum(1), GENES)


def fitted(slide, genes=GENES[8:], **options):
    blocks = imputer.held_out_blocks([slide])
    design = imputer.fit_design([slide], GENES[:8], 50.0, kernel=False)
    return design, blocks, masked.fit_networks(design, [slide], genes, blocks, options.get("seed", 0))


def test_a_planted_rule_that_is_not_linear_is_learned_and_taken():
    slide, other = cells(), cells(seed=1)
    truth = other.align(GENES[8:]).log_normalized(50.0).toarray()[:, 0]
    found = {}
    for branches in (("genes",), ("genes", "network")):
        model = imputer.train_imputer([slide], GENES[:8], GENES[8:], target_sum=50.0, branches=branches)
        assert model.branches == branches
        found[branches] = np.corrcoef(np.concatenate([m for m, _ in model.predict(other)])[:, 0], truth)[0, 1]
        assert abs(model.reliability[0] - found[branches]) < 0.1
    linear, both = found.values()
    assert both > linear + 0.15


def test_networks_that_do_not_help_are_dropped(monkeypatch):
    monkeypatch.setattr(masked, "RATE", 3.0)
    monkeypatch.setattr(masked, "STEPS", 5)
    linear = cells().align(GENES[:8])
    model = imputer.train_imputer([linear], GENES[:7], [GENES[7]], target_sum=50.0, branches=("genes", "network"))
    assert model.branches == ("genes",) and model.networks is None
    assert ("genes", "network") in model.validation_scores


def test_a_network_has_not_seen_its_blocks():
    slide = cells(1000)
    design, blocks, right = fitted(slide)
    counts = slide.counts.toarray()
    counts[blocks[0] % masked.N_NETWORKS == 1, 8] = 500  # the library is that of the other genes
    garbage = Slide(slide.name, slide.obs_names, slide.xy, sparse.csr_matrix(counts), slide.library, slide.genes)
    _, _, found = fitted(garbage)
    for one in (right, found):  # what the unit of the target is, is that of all cells
        one.centre.fill_(0), one.spread.fill_(1)
    x = np.concatenate(list(design.columns(slide)))[:50]
    scale = [n.predict(x, np.ones(8, bool), GENES[8:], 1) for n in (right, found)]
    assert np.corrcoef(scale[0][:, 0], scale[1][:, 0])[0, 1] > 0.9
    other = [n.predict(x, np.ones(8, bool), GENES[8:], 0) for n in (right, found)]
    assert np.corrcoef(other[0][:, 0], other[1][:, 0])[0, 1] < 0.9


@pytest.mark.parametrize("change", [{"MIN_CELLS": 1501}, {"MOST_GENES": 8}])
def test_few_cells_or_many_genes_train_none(change, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(masked, name, value)
    assert fitted(cells())[2] is None


def test_the_seed_decides(monkeypatch):
    monkeypatch.setattr(masked, "EPOCHS", 1)
    slide = cells(1000)
    x = np.zeros((2, 34), np.float32)
    one, same, other = (fitted(slide, seed=s)[2].predict(x, np.ones(8, bool), GENES) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-4
