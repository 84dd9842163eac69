"""The benchmark of the confidence of labels: on tissue whose cell types are planted."""

import numpy as np
import pytest

import confidence
import spatiaflow as sf
from spatiaflow.tl import _labels


@pytest.fixture(scope="module")
def halves():
    """Labelled cells, and those that are to be labelled, with counts so few that some labels are wrong."""
    table = sf.datasets.simulated_tissue(400, seed=3)["table"]
    table.X.data = np.random.default_rng(0).binomial(table.X.data.astype(int), 0.03).astype(np.float32)
    table.obs["label"] = table.obs["cell_type"].astype(str)
    return table[::2].copy(), table[1::2].copy()


def test_all_three_confidences_are_scored_on_the_same_cells(halves):
    reference, query = halves
    found = confidence.judge(reference, query, ("X",), 0)
    assert list(found) == list(confidence.METHODS)
    assert {scores["cells"] for scores in found.values()} == {query.n_obs}
    ours, one = found["annotate"], found["one confidence for all"]
    assert 0.4 < ours["right"] == one["right"] < 0.95
    assert ours["Brier"] < one["Brier"]
    assert query.obs.columns.tolist() == reference.obs.columns.tolist()  # neither is written to


def test_scores_of_known_confidences():
    right = np.arange(1000) % 4 > 0
    sure, fair, wrong = (confidence.scores(p, right) for p in (right.astype(float), np.full(1000, 0.75), 1.0 - right))
    assert sure["Brier"] == pytest.approx(0, abs=1e-6)
    assert fair["Brier"] == pytest.approx(0.75 * 0.25)
    assert fair["calibration error"] == pytest.approx(0, abs=0.02)
    assert sure["log score"] < fair["log score"] < wrong["log score"]


def test_the_probability_as_it_comes_is_that_of_highest_likelihood():
    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b"], 100)
    x = np.where(y == "a", -1.0, 1.0)[:, None] + rng.normal(size=(200, 3))
    make, temperature, held_out = confidence.by_likelihood(x, y, np.repeat("slide", 200), "linear", 0)
    assert temperature == 1
    np.testing.assert_allclose(held_out.sum(1), 1)

    def likelihood(probability):
        return np.log(probability[np.arange(200), (y == "b").astype(int)]).mean()

    folds = _labels._folds(y, np.repeat("slide", 200), 0)
    tried = [likelihood(_labels._held_out(one, x, y, folds)) for one in _labels._candidates("linear", 200)]
    assert likelihood(held_out) == max(tried) > min(tried)
    assert make().fit(x, y).score(x, y) > 0.8
