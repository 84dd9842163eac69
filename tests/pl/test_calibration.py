import numpy as np
import pytest

import spatiaflow as sf


def test_calibration_of_a_true_std_is_the_diagonal(predicted):
    figure = sf.pl.calibration(predicted, show=False, return_fig=True)
    left, right = figure.axes
    nominal, observed = left.lines[1].get_data()
    np.testing.assert_allclose(observed, nominal, atol=0.05)
    stated, error = right.lines[1].get_data()
    np.testing.assert_allclose(error, stated, rtol=0.15)
    predicted.obsm["stflow_std"] = predicted.obsm["stflow_std"] / 3
    figure = sf.pl.calibration(predicted, show=False, return_fig=True)
    assert figure.axes[0].lines[1].get_ydata()[-2] < 0.6


def test_ties_among_zeros_do_not_count_as_covered(slide):
    """A perfect law of sparse counts lies on the diagonal."""
    rng = np.random.default_rng(0)
    adata = slide("t", n=20)
    counts = rng.poisson(0.1, (400, 12)).astype(float)
    counts[:, -1] = 1000 - counts[:, :-1].sum(1)  # so that libraries are known
    adata.X = counts
    genes = [f"G{g}" for g in range(11)]
    draws = np.log1p(rng.poisson(0.1, (200, 400, 11)) * 10.0)
    adata.obsm["stflow"], adata.obsm["stflow_std"] = draws.mean(0), draws.std(0) + 1e-6
    adata.uns["stflow"] = {"genes": genes}
    figure = sf.pl.calibration(adata, draws=draws, return_fig=True)
    nominal, observed = figure.axes[0].lines[1].get_data()
    np.testing.assert_allclose(observed, nominal, atol=0.03)
    with pytest.raises(ValueError, match="draws must be"):
        sf.pl.calibration(adata, draws=draws[:, :5], return_fig=True)
