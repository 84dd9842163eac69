"""pl.imputation: what is drawn is what was measured and said."""

import anndata as ad
import numpy as np
import pandas as pd
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


@pytest.mark.parametrize("own", [False, True])
def test_a_result_in_a_table_of_its_own_is_drawn_as_that_in_a_slot(slides, own):
    """Of a SpatialData beside its counts; of an AnnData with the truth."""
    data, whole = slides
    expected = sf.pl.imputation(data, "8", truth=whole, mpp=1, return_fig=True)
    result = sf.get.expression(data, key="imputed")
    result.layers["std"] = np.ones_like(result.X)
    result.uns["imputed"] = {
        name: data.uns["imputed"][name] for name in ("shared", "library_share", "normalization", "params")
    }
    if own:
        given = result
    else:
        given = sf.datasets.simulated_tissue(60, seed=0)
        del given["table"]
        where = {"region": "cells", "region_key": "region", "instance_key": "instance"}
        for name, table in (("table", data), ("imputed", result)):
            table = table.copy()
            table.obs["region"], table.obs["instance"] = pd.Categorical(["cells"] * 300), np.arange(300)
            table.uns["spatialdata_attrs"] = where
            table.obsm.pop("imputed", None)
            table.uns = {key: value for key, value in table.uns.items() if name == "imputed" or key != "imputed"}
            given[name] = table
        given["cells"] = circles(data.obsm["spatial"])
    found = sf.pl.imputation(given, "8", truth=whole, mpp=1, return_fig=True)
    texts = [[text.get_text() for ax in figure.axes for text in ax.texts] for figure in (expected, found)]
    assert texts[0] == texts[1] and any(text.startswith("r = ") for text in texts[0])


def circles(xy):
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    return ShapesModel.parse(
        xy, geometry=0, radius=1.0, index=np.arange(len(xy)), transformations={"tissue": Identity()}
    )


def test_cells_without_values_are_left_out(slides):
    data, whole = slides
    data.obsm["imputed"][:7] = np.nan
    figure = sf.pl.imputation(data, "8", truth=whole, mpp=1, return_fig=True)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert any(text.endswith("n = 293") for text in texts)
