import numpy as np
import pytest

from spatiaflow.models.ood import MAX_LOG_INFLATION, OutOfDomain, inflation
from spatiaflow.train.stflow import fit_spread

RNG = np.random.default_rng(0)


def test_ood_is_the_distance_to_the_nearest_of_other_groups():
    groups = [RNG.normal(size=(40, 3)) * [3, 1, 0.2] + shift for shift in (0, 0, 6)]
    ood, distances = OutOfDomain.fit(groups)
    points = [g @ ood.components for g in groups]
    assert np.concatenate(points).std(0) == pytest.approx(1, rel=0.4)  # whitened (up to the mean)
    for i, own in enumerate(points):
        others = np.concatenate([p for j, p in enumerate(points) if j != i])
        slow = [np.sort(np.linalg.norm(others - row, axis=1))[:5].mean() for row in own]
        np.testing.assert_allclose(distances[i], slow)
    assert np.median(distances[2]) > 2 * np.median(distances[0])  # the foreign one
    far = ood(groups[0] + 20)
    assert (ood.quantile(far) == 1).all()
    assert (ood.relative(far) > 1).all()
    assert ood.relative(np.median(np.concatenate(distances))) == pytest.approx(0, abs=1e-9)


def test_a_small_slide_among_large_ones_still_has_references():
    ood, distances = OutOfDomain.fit([RNG.normal(size=(5000, 2)), RNG.normal(size=(3, 2))], n_references=100)
    assert all(np.isfinite(d).all() for d in distances)
    assert len(ood.references) == 53


def test_planted_spread_and_inflation_are_recovered():
    """Errors made with known factors: one for each gene, one for a foreign slide, one for unfamiliar spots inside slides."""
    n, genes = 4000, 30
    slide = np.repeat(np.arange(4), n // 4)
    relative = RNG.normal(0, 0.2, n) + np.array([-0.1, 0, 0.1, 1.0])[slide]
    slides = [slide == i for i in range(4)]
    expected, planted = RNG.uniform(0.2, 2, (n, genes)), RNG.uniform(0.3, 3, genes)
    factor = np.concatenate([inflation([0.2, 2.5, 1.0, -1.0], relative[s]) for s in slides])
    error = RNG.normal(size=(n, genes)) ** 2 * expected * planted * factor[:, None]
    spread, widening, found = fit_spread(error, expected, relative, slides)
    np.testing.assert_allclose(spread[None] * found[:, None], planted * factor[:, None], rtol=0.25)
    assert widening[1] == pytest.approx(2.5, abs=0.3)
    assert widening[2] == pytest.approx(1.0, abs=0.2)
    assert widening[3] == min(np.median(relative[s]) for s in slides)


def test_inflation_is_bounded():
    assert inflation([0, 8, 8, 0], np.full(5, 50.0)) == pytest.approx(np.exp(MAX_LOG_INFLATION))


def test_a_slide_nearer_than_any_held_out_is_not_thought_easier():
    relative = RNG.normal(0, 0.1, 50)
    middle = relative - np.median(relative)
    np.testing.assert_allclose(inflation([0.1, 2, 1, -0.3], middle - 1), inflation([0.1, 2, 1, -0.3], middle - 0.3))
    assert (inflation([0.1, 2, 1, -0.3], middle) > inflation([0.1, 2, 1, -0.3], middle - 0.3)).all()
