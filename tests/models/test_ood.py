import numpy as np
import pytest

from spatiaflow.models.ood import OutOfDomain

RNG = np.random.default_rng(0)


def test_ood_is_the_distance_to_the_nearest_of_other_groups():
    groups = [RNG.normal(size=(40, 3)) * [3, 1, 0.2] + shift for shift in (0, 0, 6)]
    ood = OutOfDomain.fit(groups)
    points = [g @ ood.components for g in groups]
    assert np.concatenate(points).std(0) == pytest.approx(1, rel=0.4)  # whitened (up to the mean)
    expected = []
    for i, own in enumerate(points):
        others = np.concatenate([p for j, p in enumerate(points) if j != i])
        expected.append([np.sort(np.linalg.norm(others - row, axis=1))[:5].mean() for row in own])
    np.testing.assert_allclose(ood.distances, np.sort(np.concatenate(expected)))
    assert np.median(expected[2]) > 2 * np.median(expected[0])  # the foreign one
    far = ood(groups[0] + 20)
    assert (ood.quantile(far) == 1).all()


def test_a_small_slide_among_large_ones_still_has_references():
    ood = OutOfDomain.fit([RNG.normal(size=(5000, 2)), RNG.normal(size=(3, 2))], n_references=100)
    assert np.isfinite(ood.distances).all()
    assert len(ood.references) == 53
