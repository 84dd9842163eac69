import numpy as np
import pytest
from scipy import sparse

from spatiaflow.train.pairs import Pairs, mean_shift, shares

RNG = np.random.default_rng(0)


def test_shares_of_a_plan_side_by_side():
    dense = RNG.random((7, 9)) * (RNG.random((7, 9)) < 0.5)
    dense[3] = 0
    allowed = RNG.random((7, 9)) < 0.7
    allowed[5] = False
    index, share = shares(sparse.csr_matrix(dense), allowed)
    for i in range(7):
        row, kept = np.zeros(9), dense[i] * allowed[i]
        np.add.at(row, index[i], share[i])
        np.testing.assert_allclose(row, kept / kept.sum() if kept.sum() else kept)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_mean_shift_is_that_of_the_pairs_written_out(kind):
    values, share = RNG.normal(size=(9, 4)), RNG.dirichlet(np.ones(3), 5)
    target = np.stack([RNG.permutation(9)[:3] for _ in range(5)])
    pairs = Pairs(
        np.array([0, 4, 2, 2, 8]), target, share, RNG.random(5), np.zeros(5, int), np.zeros((5, 0)), np.zeros((5, 0))
    )
    expected = sum(
        c * (sum(s * values[t] for s, t in zip(row, to)) - values[i])
        for i, to, row, c in zip(pairs.source, target, share, pairs.confidence)
    ) / pairs.confidence.sum()  # fmt: skip
    np.testing.assert_allclose(np.asarray(mean_shift(pairs, kind(values))).ravel(), expected)
