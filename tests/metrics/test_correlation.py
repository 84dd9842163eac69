import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from spatiaflow import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    truth = np.log1p(rng.poisson(1.5, (120, 7))).astype(np.float32)  # many ties, as in counts
    return truth, (truth + rng.normal(0, 1, truth.shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("ours", "reference"), [(metrics.pearson, stats.pearsonr), (metrics.spearman, stats.spearmanr)]
)
def test_correlations_agree_with_scipy_gene_by_gene(ours, reference, pair):
    expected = [reference(x, y)[0] for x, y in zip(pair[0].T.astype(float), pair[1].T.astype(float))]
    np.testing.assert_allclose(ours(*pair), expected, atol=1e-12)


def test_rmse_of_a_known_offset():
    np.testing.assert_allclose(metrics.rmse(np.zeros((4, 2)), [[1, 0], [1, 0], [-1, 0], [-1, 4]]), [1, 2])


@pytest.mark.parametrize("score", [metrics.pearson, metrics.spearman])
@pytest.mark.parametrize("level", [0.1, 0.0, 1e6])
def test_constant_prediction_scores_zero_and_constant_truth_is_undefined(score, level):
    varying, flat = np.random.default_rng(0).normal(size=(97, 1)), np.full((97, 1), level, np.float32)
    assert score(varying, flat)[0] == 0  # exactly: float noise around a constant must not correlate
    assert np.isnan(score(flat, varying)[0])
    assert np.isnan(score(flat, flat)[0])


@pytest.mark.parametrize("score", [metrics.pearson, metrics.spearman, metrics.rmse])
def test_score_by_slide_is_the_score_of_each_slide_alone(score, pair):
    library = np.array(["b", "a", "c"])[np.arange(120) % 3]
    by_slide = score(*pair, library=library)
    assert list(by_slide.index) == ["b", "a", "c"]  # order of appearance
    for name in "abc":
        np.testing.assert_array_equal(by_slide.loc[name], score(*(x[library == name] for x in pair)))


def test_pooling_rewards_a_difference_between_slides_that_per_slide_scores_ignore():
    rng = np.random.default_rng(0)
    library = np.repeat([0, 1], 200)
    truth, guess = (10 * library[:, None] + rng.normal(size=(400, 1)) for _ in range(2))
    assert metrics.pearson(truth, guess)[0] > 0.9
    assert np.abs(metrics.pearson(truth, guess, library=library).to_numpy()).max() < 0.3


def test_gene_correlation_agreement_matches_numpy_and_sees_lost_structure(pair):
    truth, guess = pair
    upper = np.triu_indices(7, 1)
    x, y = np.corrcoef(truth.T)[upper], np.corrcoef(guess.T)[upper]
    found = metrics.gene_correlation_agreement(truth, guess)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2)))
    perfect = metrics.gene_correlation_agreement(truth, 3 * truth - 1)
    assert perfect["pearson"] == pytest.approx(1)
    assert perfect["rmse"] == pytest.approx(0, abs=1e-6)
    nothing = metrics.gene_correlation_agreement(truth, np.ones_like(truth))
    assert nothing["pearson"] == 0
    assert nothing["rmse"] == pytest.approx(np.sqrt(np.mean(x**2)))


def test_shapes_and_missing_values_are_refused(pair):
    truth, guess = pair
    with pytest.raises(ValueError, match=r"truth is \(120, 7\) but prediction is \(119, 7\)"):
        metrics.pearson(truth, guess[1:])
    with pytest.raises(ValueError, match="library must hold one label for each of 120 rows"):
        metrics.pearson(truth, guess, library=[1, 2])
    guess[3, 2] = np.nan
    with pytest.raises(ValueError, match="prediction has 1 NaN"):
        metrics.spearman(truth, guess)


def test_labels_that_differ_are_refused():
    rng = np.random.default_rng(0)
    truth = pd.DataFrame(rng.normal(size=(9, 3)), columns=list("abc"))
    for other in (truth[list("cba")], truth.sample(frac=1, random_state=0)):
        with pytest.raises(ValueError, match="align first"):
            metrics.pearson(truth, other)
    np.testing.assert_allclose(metrics.pearson(truth, truth), 1)
    np.testing.assert_allclose(metrics.pearson(sparse.csr_matrix(truth), truth), 1)
