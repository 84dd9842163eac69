import numpy as np
import pytest

from spatiaflow.models.fields import Fields, kernel

XY = np.stack(np.meshgrid(np.arange(16) * 100.0, np.arange(12) * 100.0), -1).reshape(-1, 2)
APART = np.hypot(*(XY[:, None] - XY[None]).transpose(2, 0, 1))


@pytest.mark.parametrize("max_dense", [1500, 0], ids=["Cholesky", "FFT"])
@pytest.mark.parametrize("length", [200.0, 700.0])
def test_covariance_is_the_kernel(max_dense, length):
    """On a lattice many pairs are equally far apart; their mean leaves 1 % of sampling error."""
    fields, rng = Fields(XY, length, max_dense), np.random.default_rng(0)
    drawn = np.concatenate([fields.draw(rng, 50) for _ in range(80)], 1).astype(np.float64)
    covariance = drawn @ drawn.T / drawn.shape[1]
    for lag in (0.0, 100.0, 200.0, 300.0, 500.0):
        found = covariance[np.isclose(APART, lag)].mean()
        assert found == pytest.approx(kernel(lag, length), abs=0.05 * kernel(0.0, length)), lag
    assert abs(drawn.mean()) < 0.05


def test_fields_are_independent_of_each_other():
    drawn = Fields(XY, 200.0, 0).draw(np.random.default_rng(1), 400).T  # pairs come from one transform
    r = np.corrcoef(drawn[::2].ravel(), drawn[1::2].ravel())[0, 1]
    assert abs(r) < 0.02


def test_positions_off_the_grid_have_variance_1():
    xy = np.random.default_rng(0).uniform(0, 2000, (300, 2))
    fields, rng = Fields(xy, 150.0, 0), np.random.default_rng(0)
    drawn = np.concatenate([fields.draw(rng, 50) for _ in range(40)], 1)
    np.testing.assert_allclose(drawn.var(1), 1, atol=0.15)
    assert drawn.var() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "xy", [np.zeros((1, 2)), np.zeros((5, 2)), [[0.0, 0.0], [1e6, 0.0]]], ids=["one", "same", "far"]
)
def test_odd_positions(xy):
    for max_dense in (0, 100):
        assert np.isfinite(Fields(np.asarray(xy), 100.0, max_dense).draw(np.random.default_rng(0), 3)).all()


def test_covariance_between_cells_of_the_grid():
    """Spots anywhere, much closer to each other than a cell of the grid."""
    rng = np.random.default_rng(2)
    first, angle = rng.uniform(500, 1500, (400, 2)), rng.uniform(0, 2 * np.pi, 400)
    towards = np.stack([np.cos(angle), np.sin(angle)], 1)
    apart = (0.1, 0.25, 0.5, 1.0)
    xy = np.concatenate([first, *(first + 300 * lag * towards for lag in apart)])
    fields = Fields(xy, 300.0, 0)
    drawn = np.concatenate([fields.draw(rng, 50) for _ in range(20)], 1).reshape(len(apart) + 1, 400, -1)
    for lag, found in zip(apart, (drawn[0] * drawn[1:]).mean((1, 2))):
        assert found == pytest.approx(kernel(300 * lag, 300.0), abs=0.05), lag
