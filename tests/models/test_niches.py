import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from spatiaflow.models.niches import N_RUNS, Niches, Reduced, _aligned, niches_of_embedding


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=600)
    stretched = rng.normal(size=(600, 6)) * [6, 1, 1, 1, 1, 1]  # as is the covariance of all groups
    return truth, 4 * np.eye(6)[truth + 1] + stretched


def test_a_mixture_with_one_covariance_is_a_linear_function(groups):
    truth, x = groups
    fit = Reduced.of(x).mixture(4, 0)
    assert adjusted_rand_score(truth, fit.label) > 0.9  # the longest axis is noise
    assert ((x @ fit.slope + fit.intercept).argmax(1) == fit.label).all()


def test_runs_are_brought_to_one_numbering(groups):
    _, x = groups
    label = Reduced.of(x).mixture(4, 0).label
    orders = np.array([[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
    names = [np.argsort(order)[label] for order in orders]  # order[i] is what run calls i
    found = _aligned(names, 4)
    renamed = [np.argsort(order)[name] for order, name in zip(found, names)]
    assert (renamed[0] == renamed[1]).all() and (renamed[0] == renamed[2]).all()


def test_consensus_and_another_order_of_niches(groups):
    truth, x = groups
    model = niches_of_embedding(x, 4, 0)
    assert model.intercept.shape == (N_RUNS, 4)
    probability, support = model.of_embedding(x)
    assert adjusted_rand_score(truth, probability.argmax(1)) > 0.9
    np.testing.assert_allclose(probability.sum(1), 1)
    np.testing.assert_allclose(support.sum(1), 1)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(model.take(order).of_embedding(x)[0], probability[:, order])


def test_half_the_weight_is_that_of_all_genes():
    """Two halves say niche 0, the run with all genes niche 1."""
    weights = np.zeros((3, 1, 1, 2))
    model = Niches(weights, np.array([[50.0, 0.0], [50.0, 0.0], [0.0, 50.0]]))
    probability, support = model.of_embedding(np.zeros((1, 1)))
    np.testing.assert_allclose(probability, [[0.5, 0.5]], atol=1e-9)
    np.testing.assert_allclose(support, [[1.0, 0.0]], atol=1e-9)
