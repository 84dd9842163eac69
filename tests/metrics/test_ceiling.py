import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spatiaflow import metrics

MIRROR = Path(os.environ.get("SPATIAFLOW_MIRROR") or Path(__file__).parents[3] / "shared" / "data" / "mirror")


def planted(n, depth, seed=0, n_genes=60):
    """Rates of a made-up tissue (n, genes), summing to ``depth`` in every spot."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(0, 1, n_genes)) * np.exp(rng.normal(0, 0.5, (n, n_genes)) * rng.random(n_genes))
    return rate / rate.sum(1, keepdims=True) * depth


def normalised(counts):
    return np.log1p(counts / np.maximum(counts.sum(1, keepdims=True), 1) * 1e4)


@pytest.mark.parametrize(("depth", "tolerance"), [(500, 0.15), (4000, 0.07)])
def test_ceiling_is_the_correlation_of_the_noisy_with_the_noiseless(depth, tolerance):
    rng, rate = np.random.default_rng(1), planted(1500, depth)
    noiseless = np.mean([normalised(rng.poisson(rate)) for _ in range(100)], axis=0)  # the best a predictor could know
    counts = rng.poisson(rate)
    reachable = metrics.pearson(normalised(counts), noiseless)
    found = metrics.noise_ceiling(counts)
    assert abs(np.mean(found - reachable)) < 0.02
    certain = reachable > 0.4  # below, the correlation of the halves drowns in its own error
    np.testing.assert_allclose(found[certain], reachable[certain], atol=tolerance)


def test_ceiling_rises_with_depth_and_is_zero_without_signal():
    rng = np.random.default_rng(0)
    shallow, deep = (metrics.noise_ceiling(rng.poisson(planted(300, depth))).mean() for depth in (300, 30_000))
    assert shallow + 0.2 < deep < 1
    same_everywhere = np.full((1500, 40), 20.0)
    assert np.mean(metrics.noise_ceiling(rng.poisson(same_everywhere)) ** 2) < 0.03


def test_library_is_that_of_all_genes_of_the_thinned_table():
    counts = np.random.default_rng(0).poisson(planted(200, 2000))
    chosen = [7, 3, 50]
    np.testing.assert_allclose(metrics.noise_ceiling(counts, genes=chosen), metrics.noise_ceiling(counts)[chosen])
    alone = metrics.noise_ceiling(counts[:, chosen])  # another library size: another answer
    assert np.abs(alone - metrics.noise_ceiling(counts, genes=chosen)).max() > 0.02


def test_raw_log_counts_know_no_library():
    counts = np.random.default_rng(0).poisson(planted(200, 2000))
    depth_only = np.random.default_rng(1).binomial(counts, np.linspace(0.02, 1, 200)[:, None])
    raw, scaled = (metrics.noise_ceiling(depth_only, target_sum=target) for target in (None, 1e4))
    assert raw.mean() > scaled.mean() + 0.1  # depth alone is signal in raw counts


def test_empty_gene_is_undefined_and_a_single_count_is_pure_noise():
    counts = np.random.default_rng(0).poisson(5.0, (50, 4))
    counts[:, 0] = 0
    counts[:, 1] = np.arange(50) == 3
    found = metrics.noise_ceiling(counts)
    assert np.isnan(found[0])
    assert found[1] == 0
    assert np.isfinite(found[2:]).all()


def test_sparse_and_dense_agree_and_the_seed_repeats():
    counts = np.random.default_rng(0).poisson(planted(100, 800))
    before = counts.copy()
    found = metrics.noise_ceiling(sparse.csr_matrix(counts.astype(np.float32)), seed=5)
    np.testing.assert_array_equal(found, metrics.noise_ceiling(counts, seed=5))
    assert (found != metrics.noise_ceiling(counts, seed=6)).any()
    np.testing.assert_array_equal(counts, before)


def test_normalised_values_are_refused():
    with pytest.raises(ValueError, match="raw counts"):
        metrics.noise_ceiling(normalised(np.ones((5, 5))) / 3)


@pytest.mark.skipif(not (MIRROR / "her2st").is_dir(), reason=f"no her2st files in {MIRROR}; set SPATIAFLOW_MIRROR")
def test_ceiling_of_a_real_section_is_near_the_one_known():
    tables = {name: pd.read_csv(MIRROR / "her2st" / f"{name}.tsv.gz", sep="\t", index_col=0) for name in ("C3", "C4")}
    test, train = tables["C3"], tables["C4"]
    shared = [gene for gene in train.columns if gene in test.columns]
    variance = normalised(train[shared].to_numpy()).var(0)
    genes = test.columns.get_indexer(np.array(shared)[np.argsort(-variance)[:50]])
    assert metrics.noise_ceiling(test.to_numpy(), genes=genes, n_repeats=3).mean() == pytest.approx(0.80, abs=0.04)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [({"genes": ["a"]}, TypeError, "get_loc"), ({"genes": [-1]}, ValueError, "from 0 to 5"),
     ({"genes": [6]}, ValueError, "from 0 to 5"), ({"target_sum": -1}, ValueError, "target_sum")],
)  # fmt: skip
def test_columns_that_are_not_there_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        metrics.noise_ceiling(np.random.default_rng(0).poisson(5, (50, 6)), **bad)
