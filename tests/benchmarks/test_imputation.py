"""The baselines of the imputation benchmark are what they are called."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge

import imputation


def test_ridge_is_that_of_the_penalty_that_predicts_left_out_groups_best():
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


def test_uncertain_values_are_called_different_less_often():
    import imputation_trust

    rng = np.random.default_rng(0)
    groups = [rng.normal(0, 0.05, (200, 50)), rng.normal(0.02, 0.05, (200, 50))]
    sure = imputation_trust.p_values(groups)
    unsure = imputation_trust.p_values(groups, [np.ones((200, 50))] * 2)
    slow = stats.false_discovery_control(
        [stats.ttest_ind(a, b, equal_var=False)[1] for a, b in zip(groups[0].T, groups[1].T)]
    )
    np.testing.assert_allclose(sure, slow, atol=0.01)
    assert (sure < 0.05).mean() > 0.5 > 0.05 > (unsure < 0.05).mean()


@pytest.mark.slow
@pytest.mark.parametrize("flow", [True, False])
def test_heads_find_a_planted_mean_and_the_flow_its_spread(flow, monkeypatch):
    import flow_head

    monkeypatch.setattr(flow_head, "WIDTH", 128)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 6)).astype(np.float32)
    truth = 5 + x @ rng.normal(size=(6, 3))
    spread = np.array([0.5, 1.0, 2.0])
    y = truth + spread * rng.normal(size=truth.shape)
    head = flow_head.fit_head(x[:2500], y[:2500], np.arange(2500) % 10, flow, seed=0)
    mean = head.mean(x[2500:])
    assert np.min([np.corrcoef(mean[:, j], truth[2500:, j])[0, 1] for j in range(3)]) > 0.9
    if flow:
        draws = head.draws(x[2500:], 50)
        np.testing.assert_allclose(draws.std(0).mean(0), spread, rtol=0.25)
        assert np.corrcoef(draws.mean(0).ravel(), mean.ravel())[0, 1] > 0.97  # a mean of draws, without their noise


def test_conformal_coverage_is_counted_in_the_query():
    import imputation_trust

    class Evidence:
        y, library, block = np.random.default_rng(0).normal(5, 2, (1000, 4)), np.ones(1000), np.arange(1000) % 5

    class Model:
        @staticmethod
        def std(mean, library):
            return np.ones_like(mean)

    y = np.random.default_rng(1).normal(5, 2, (800, 4))
    found = imputation_trust.conformal(y, np.full_like(y, 5), np.ones_like(y), Model, Evidence, np.full((1000, 4), 5.0))
    assert (
        found["80 %, conformal"] > 0.75 > 0.55 > found["80 %, normal law"]
    )  # the stated deviation is half the true one
    assert 2.2 < found["conformal factor"] < 5
