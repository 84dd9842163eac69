"""pl.imputation: what is drawn is what was measured and said."""

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf


@pytest.fixture
def slides():
    """A cell's genes follow its place; the last two genes are hidden."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 300, (300, 2))
    rate = np.exp(np.sin(xy[:, :1] / 60) @ rng.normal(0, 1, (1, 10)) + 1)
    whole = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obsm={"spatial": xy})
    data = whole[:, :8].copy()
    data.obsm["imputed"] = rng.uniform(0, 2, (300, 3)).astype(np.float32)
    data.uns["imputed"] = {
        "genes": ["8", "9", "0"], "shared": [str(i) for i in range(8)], "library_share": 0.8,
        "reliability": np.array([0.6, 0.2, 0.4]),
        "denoised": np.array([False, False, True]), "normalization": {"target_sum": 50.0}, "params": {},
    }  # fmt: skip
    return data, whole


def test_correlation_is_that_of_the_normalised_counts(slides):
    data, whole = slides
    figure = sf.pl.imputation(data, "8", truth=whole[::-1].copy(), mpp=1, return_fig=True)
    library = np.asarray(data.X.sum(1)).ravel()
    y = np.log1p(whole[:, "8"].X.toarray().ravel() * 50 * 0.8 / library)
    r = np.corrcoef(y, data.obsm["imputed"][:, 0])[0, 1]
    texts = [t.get_text() for ax in figure.axes for t in ax.texts]
    assert any(t.startswith(f"r = {r:.2f}") for t in texts)
    assert "reliability 0.60" in texts
    points = figure.axes[-1].lines[1]
    np.testing.assert_allclose(points.get_xdata(), [0.6, 0.2])  # the denoised gene is not compared with its own counts
    assert points.get_ydata()[0] == pytest.approx(r)


@pytest.mark.parametrize("stretch", [0.3, 1, 3])
def test_measured_and_imputed_are_drawn_alike_in_size(slides, stretch):
    data, whole = slides
    data.obsm["spatial"] = data.obsm["spatial"] * [stretch, 1]
    figure = sf.pl.imputation(data, "8", truth=whole, mpp=1, return_fig=True)
    figure.canvas.draw()
    first, second = (ax.get_window_extent() for ax in figure.axes if ax.get_title().startswith("8, "))
    assert (first.width, first.height) == pytest.approx((second.width, second.height))
    assert figure.get_figwidth() <= 7.11


def test_without_measured_values_the_std_is_drawn_and_reliability_is_sorted(slides):
    data = slides[0]
    data.obsm["imputed_std"] = np.random.default_rng(0).random(data.obsm["imputed"].shape)
    figure = sf.pl.imputation(data, ["8", "0"], mpp=1, return_fig=True)
    (std,) = [ax for ax in figure.axes if ax.get_title() == "8, std"]
    np.testing.assert_allclose(std.collections[0].get_array(), data.obsm["imputed_std"][:, 0], rtol=1e-6)
    titles = {ax.get_title() for ax in figure.axes}
    assert {"8, imputed", "0, measured", "0, denoised"} <= titles and "8, measured" not in titles
    np.testing.assert_allclose(figure.axes[-1].lines[0].get_ydata(), [0.6, 0.4, 0.2])


def test_unknown_genes_and_cells_say_so(slides):
    data, whole = slides
    with pytest.raises(KeyError, match="has no 'ACTB'"):
        sf.pl.imputation(data, "ACTB", mpp=1)
    with pytest.raises(KeyError, match="truth has no cell '299'"):
        sf.pl.imputation(data, "8", truth=whole[:299].copy(), mpp=1)
    with pytest.raises(ValueError, match="empty"):
        sf.pl.imputation(data, [], mpp=1)
