import numpy as np
import pytest

from spatiaflow.models.rates import Rates, choose_penalty, fit_linear, fit_perceptron

N, F, G = 400, 5, 4


def slides(n_slides=3, curved=False, seed=0):
    """Counts whose log rate follows the features, with a level for each slide and gene, and very different depth."""
    rng = np.random.default_rng(seed)
    true = np.random.default_rng(7).normal(0, 0.5, (F, G))
    parts, levels = [], []
    for _ in range(n_slides):
        x, library = rng.normal(size=(N, F)).astype(np.float32), rng.lognormal(8, 0.8, N)
        level = rng.normal(-6, 1.5, G)
        signal = (x**2 - 1) @ true if curved else x @ true
        mean = library[:, None] * np.exp(level + signal)
        parts.append((x, rng.poisson(mean * rng.gamma(10, 0.1, mean.shape)).astype(np.float32), library))
        levels.append(level)
    return parts, true, np.array(levels)


def test_planted_coefficients_and_levels_are_recovered():
    parts, true, levels = slides()
    found = fit_linear(parts, 1.0)
    np.testing.assert_allclose(found.weights[0].T, true, atol=0.08)
    np.testing.assert_allclose(found.level, levels.mean(0), atol=0.15)
    np.testing.assert_allclose(fit_linear(parts, 1.0, np.array([1.0, 0, 0])).level, levels[0], atol=0.2)


def test_levels_of_slides_do_not_teach_the_pattern():
    """Features that tell the slides apart, and nothing inside them, get no coefficient."""
    parts, _, _ = slides()
    told = [(np.hstack([x, np.full((N, 1), 3.0 * i, np.float32)]), c, n) for i, (x, c, n) in enumerate(parts)]
    assert np.abs(fit_linear(told, 1.0).weights[0][:, -1]).max() < 0.05


def test_perceptron_follows_what_is_not_linear():
    (*train, stop), _, _ = slides(5, curved=True)
    (test,), true, levels = slides(1, curved=True, seed=9)
    found = fit_perceptron(train, [stop], max_epochs=200, patience=20)
    linear = fit_linear(train, 1.0)
    signal = (test[0] ** 2 - 1) @ true

    def r(rates):
        return np.mean([np.corrcoef(rates(test[0])[:, g], signal[:, g])[0, 1] for g in range(G)])

    assert r(linear) < 0.5
    assert r(found) > 0.8


def test_penalty_is_chosen_by_held_out_slides():
    parts, _, _ = slides()
    noise = [
        (np.random.default_rng(i).normal(size=(N, 60)).astype(np.float32), c, n) for i, (_, c, n) in enumerate(parts)
    ]
    assert choose_penalty([[p] for p in noise]) > choose_penalty([[p] for p in parts])


@pytest.mark.parametrize("fit", ["linear", "perceptron"])
def test_tensors_make_the_rates(fit):
    parts, _, _ = slides()
    found = fit_linear(parts, 1.0) if fit == "linear" else fit_perceptron(parts, parts[:1], max_epochs=2)
    np.testing.assert_array_equal(Rates.of(found.tensors())(parts[0][0]), found(parts[0][0]))
