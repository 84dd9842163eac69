"""Networks of an imputer: what is hidden is not read, and a slow reference gives the same."""

import numpy as np
import torch
from scipy.special import erf

from spatiaflow.models.imputer import Design
from spatiaflow.models.masked import Networks

G, N_IMAGE = 4, 2


def networks(n=2, seed=0):
    branch, gene = Design.layout(G, True, N_IMAGE)
    design = Design(
        [f"g{i}" for i in range(G)], 100.0, branch, gene, np.zeros(0), np.zeros(0), spatial=True, n_image=N_IMAGE
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = Networks(design, [*design.inputs, "a", "b"], n)
        for name in ("centre", "spread"):
            getattr(out, name).copy_(torch.rand(G + 2) + 0.5)
        out.unit.fill_(2.0)
    rng = np.random.default_rng(seed)
    return out, rng.normal(size=(9, len(branch) + 3)).astype(np.float32), rng  # three columns of a kernel


def by_hand(network, x, visible):
    """One cell after the other."""
    first, _, _, second, _, _, last = network.layers
    out = []
    for row in x:
        own, near, image = row[1 : 1 + G], row[1 + G : 1 + 4 * G].reshape(3, G), row[1 + 4 * G :]
        h = np.concatenate([row[:1], own * visible, *(one * visible for one in near), image, visible])
        for layer in (first, second):
            h = layer.weight.detach().numpy() @ h + layer.bias.detach().numpy()
            h = h * 0.5 * (1 + erf(h / np.sqrt(2)))
        out.append(last.weight.detach().numpy() @ h + last.bias.detach().numpy())
    return np.array(out)


def test_prediction_is_the_mean_of_the_networks_in_the_unit_of_the_genes():
    model, x, _ = networks()
    visible = np.array([True, False, True, True])
    raw = np.mean([by_hand(one, x[:, : model.n_columns] / 2.0, visible) for one in model.members], 0)
    right = raw * model.spread.numpy() + model.centre.numpy()
    np.testing.assert_allclose(model.predict(x, visible, model.genes), right, atol=1e-5)
    np.testing.assert_allclose(model.predict(x, visible, ["b", "g1"]), right[:, [5, 1]], atol=1e-5)
    alone = (
        by_hand(model.members[1], x[:, : model.n_columns] / 2.0, visible) * model.spread.numpy() + model.centre.numpy()
    )
    np.testing.assert_allclose(model.predict(x, visible, model.genes, 1), alone, atol=1e-5)


def test_hidden_genes_are_not_read():
    model, x, rng = networks()
    folds = [np.array([0, 2]), np.array([3])]
    right, seen = model.hidden(x, np.ones(G, bool), folds), np.ones(G, bool)
    assert np.isnan(right[:, 1]).all() and np.isfinite(right[:, [0, 2, 3]]).all()
    for fold in folds:
        garbage = x.copy()
        for group in range(4):
            garbage[:, 1 + G * group + fold] = rng.normal(size=(9, len(fold))) * 100
        np.testing.assert_array_equal(model.hidden(garbage, seen, folds)[:, fold], right[:, fold])
        assert not np.allclose(model.hidden(garbage, seen, folds), right, equal_nan=True)
