"""The baselines of the imputation benchmark are what they are called."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def imputation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import imputation as module

    return module


def test_ridge_is_that_of_the_penalty_that_predicts_left_out_groups_best(imputation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 20))
    y = np.maximum(x[:, :3] @ rng.normal(size=(3, 4)) + 3 * rng.normal(size=(300, 4)) + 5, 0)
    query, groups = rng.normal(size=(50, 20)), np.arange(300) % 4
    scores = []
    for penalty in imputation.PENALTIES:
        found = 0.0
        for g in range(4):
            model = Ridge(penalty).fit(x[groups != g], y[groups != g])
            p = model.predict(x[groups == g])
            found += np.mean([stats.pearsonr(y[groups == g, j], p[:, j])[0] for j in range(4)])
        scores.append(found)
    slow = Ridge(imputation.PENALTIES[int(np.argmax(scores))]).fit(x, y).predict(query)
    np.testing.assert_allclose(imputation.ridge([x[:100], x[100:]], [y[:100], y[100:]], groups, query), slow, atol=1e-3)


def test_uncertain_values_are_called_different_less_often(imputation):
    rng = np.random.default_rng(0)
    groups = [rng.normal(0, 0.05, (200, 50)), rng.normal(0.02, 0.05, (200, 50))]
    sure = imputation.p_values(groups)
    unsure = imputation.p_values(groups, [np.ones((200, 50))] * 2)
    slow = stats.false_discovery_control(
        [stats.ttest_ind(a, b, equal_var=False)[1] for a, b in zip(groups[0].T, groups[1].T)]
    )
    np.testing.assert_allclose(sure, slow, atol=0.01)
    assert (sure < 0.05).mean() > 0.5 > 0.05 > (unsure < 0.05).mean()
