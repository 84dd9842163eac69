import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from spatiaflow import metrics
from spatiaflow.metrics._spatial import _weights


@pytest.fixture
def tissue():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (90, 2))
    smooth = np.stack([np.sin(xy[:, 0] / 150), xy[:, 1] / 500, np.cos(xy.sum(1) / 300)], axis=1)
    return xy, np.hstack([smooth, rng.normal(size=(90, 2))])


def moran_of_one_gene(x, xy, k):
    """The definition, one pair at a time."""
    z, total, weight = x - x.mean(), 0.0, 0.0
    for i in range(len(x)):
        distance = np.linalg.norm(xy - xy[i], axis=1)
        distance[i] = np.inf
        for j in np.argsort(distance)[:k]:
            total += z[i] * z[j]
            weight += 1
    return len(x) / weight * total / (z**2).sum()


@pytest.mark.parametrize("k", [1, 6])
def test_morans_i_is_its_double_loop(tissue, k):
    xy, values = tissue
    expected = [moran_of_one_gene(x, xy, k) for x in values.T]
    np.testing.assert_allclose(metrics.morans_i(values, xy, k=k), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, bool])
def test_morans_i_on_a_given_graph_is_its_definition(tissue, dtype):
    xy, values = tissue
    graph = sparse.csr_matrix(np.random.default_rng(1).poisson(0.1, (90, 90)).astype(dtype))
    weights, z = graph.toarray().astype(float), values - values.mean(0)
    expected = 90 / weights.sum() * np.einsum("ij,ig,jg->g", weights, z, z) / (z**2).sum(0)
    np.testing.assert_allclose(metrics.morans_i(values, xy, graph=graph), expected, atol=1e-10)


def test_no_position_is_its_own_neighbour_even_among_duplicates():
    xy = np.repeat(np.random.default_rng(0).normal(size=(5, 2)), 4, axis=0)
    for k in (1, 3, 6):
        weights = _weights(20, xy, k, None)
        assert weights.diagonal().sum() == 0
        np.testing.assert_allclose(np.asarray(weights.sum(1)), 1)


def test_morans_i_leaves_the_thread_limit_of_the_process():
    code = "import numpy as np, torch; from spatiaflow import metrics; before = torch.get_num_threads()\n"
    code += "metrics.morans_i(np.random.rand(20, 2), np.random.rand(20, 2)); assert torch.get_num_threads() == before"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_constant_gene_has_no_morans_i(tissue):
    xy, values = tissue
    values[:, 1] = 0.1
    assert np.isnan(metrics.morans_i(values, xy)).tolist() == [False, True, False, False, False]
    assert np.isnan(metrics.morans_i(values[:, 1:2], xy)).tolist() == [True]


def test_agreement_is_perfect_for_the_truth_and_tells_smoothing_from_it(tissue):
    xy, values = tissue
    perfect = metrics.morans_agreement(values, 2 * values + 1, xy)
    assert perfect["pearson"] == pytest.approx(1)
    assert perfect["spearman"] == pytest.approx(1)
    assert perfect["mean_abs_difference"] == pytest.approx(0, abs=1e-12)
    smoothed = _weights(90, xy, 6, None) @ values
    expected = np.abs(metrics.morans_i(values, xy) - metrics.morans_i(smoothed, xy)).mean()
    assert metrics.morans_agreement(values, smoothed, xy)["mean_abs_difference"] == pytest.approx(expected)
    assert expected > 0.1
    flat = metrics.morans_agreement(values, np.zeros_like(values), xy)
    assert flat["pearson"] == 0
    assert flat["mean_abs_difference"] == pytest.approx(np.abs(metrics.morans_i(values, xy)).mean())


def test_too_few_positions_and_a_foreign_graph_are_refused(tissue):
    xy, values = tissue
    with pytest.raises(ValueError, match="6 neighbours need more than 6 positions; there are 6"):
        metrics.morans_i(values[:6], xy[:6])
    with pytest.raises(ValueError, match=r"graph must be \(90, 90\)"):
        metrics.morans_i(values, xy, graph=sparse.eye(5))
