import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as energy_distance_1d

from spatiaflow import metrics


def samples(n=60, m=80, d=4, shift=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(shift, 1.3, size=(m, d))


def test_energy_distance_equals_the_sums_written_out():
    a, b = samples(12, 15)
    cross = np.mean([np.linalg.norm(x - y) for x in a for y in b])
    within = [
        np.mean([np.linalg.norm(x - y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)
    ]
    assert metrics.energy_distance(a, b) == pytest.approx(2 * cross - sum(within))
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=4000), rng.normal(1, 1, size=4000)
    assert metrics.energy_distance(x[:, None], y[:, None]) == pytest.approx(energy_distance_1d(x, y) ** 2, rel=0.02)


@pytest.mark.usefixtures("own_draws")
def test_kernel_distance_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = (torch.from_numpy(v).float() for v in samples(50, 50, 8))

    class Same(torch.nn.Module):
        num_features = 8

        def forward(self, x):
            return x

    reference = KernelInceptionDistance(feature=Same(), subsets=1, subset_size=50)
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert metrics.kernel_distance(a.numpy(), b.numpy()) == pytest.approx(float(reference.compute()[0]), rel=1e-3)


def test_frechet_distance_equals_the_formula():
    a, b = samples(100, 120, 3)
    one, other = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    with pytest.raises(ValueError, match="30 rows a side"):
        metrics.frechet_distance(a[:20], b)


@pytest.mark.parametrize("distance", [metrics.energy_distance, metrics.kernel_distance])
def test_no_bias_where_both_samples_are_of_one_distribution(distance):
    found = [
        distance(*samples(30, 40, 3, shift=0.0, seed=s)[:1], samples(30, 40, 3, shift=0.0, seed=s + 1000)[0])
        for s in range(300)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(300)
    rising = [distance(samples(400, 2, 3)[0], samples(400, 2, 3, seed=1)[0] + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert (np.diff(rising) > 0).all()


def test_feature_distances():
    a, b = samples(200, 200, 2, shift=0.0)
    b = a + [0.0, 3.0]
    np.testing.assert_allclose(metrics.feature_distances(a, b), [0, 3], atol=1e-12)


def test_effect_recovery():
    source = np.random.default_rng(0).normal(size=(50, 3))
    target = source + [2.0, 0, 0]
    assert metrics.effect_recovery(source, source + [1.0, 0, 0], target) == pytest.approx(
        {"share": 0.5, "cosine": 1.0, "left": 0.5}
    )
    sideways = metrics.effect_recovery(source, source + [0, 1.0, 0], target)
    assert sideways == pytest.approx({"share": 0.0, "cosine": 0.0, "left": np.sqrt(5) / 2}, abs=1e-12)
    with pytest.raises(ValueError, match="no shift"):
        metrics.effect_recovery(source, target, source)


def test_copies_are_found():
    rng = np.random.default_rng(0)
    training, held_out, fresh = (rng.normal(size=(500, 3)) for _ in range(3))
    assert metrics.memorised(training[:100] + 1e-6, training, held_out) == 1
    assert metrics.memorised(fresh, training, held_out, quantile=0.1) == pytest.approx(0.1, abs=0.05)


def test_samples_that_do_not_fit():
    a, b = samples()
    with pytest.raises(ValueError, match="4 and 3 features"):
        metrics.energy_distance(a, b[:, :3])
    with pytest.raises(ValueError, match="two are needed"):
        metrics.kernel_distance(a[:1], b)
    a[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.energy_distance(a, b)


def test_frames_of_other_features_or_another_order_are_refused():
    a, b = (pd.DataFrame(values, columns=list("wxyz")) for values in samples())
    other = b[list("zyxw")]
    for distance in (
        metrics.energy_distance,
        metrics.kernel_distance,
        metrics.frechet_distance,
        metrics.feature_distances,
    ):
        np.testing.assert_equal(distance(a, b), distance(a.to_numpy(), b.to_numpy()))
        with pytest.raises(ValueError, match=r"'w' and 'z' in one place"):
            distance(a, other)
    for score in (metrics.effect_recovery, metrics.memorised):
        for given in ((a, b, other), (a, other, b), (other, a, b)):
            with pytest.raises(ValueError, match="another order"):
                score(*given)
