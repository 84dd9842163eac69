import inspect

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection

import spatiaflow as sf


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def predicted(slide):
    """A slide with a planted prediction: the truth plus noise of the stated size."""
    adata = slide("t", seed=5)
    genes = [f"G{g}" for g in range(12)]
    counts = adata.X.toarray()
    truth = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    rng = np.random.default_rng(0)
    std = rng.uniform(0.2, 1.0, truth.shape)
    adata.obsm["stflow"] = (truth + std * rng.standard_normal(truth.shape)).astype(np.float32)
    adata.obsm["stflow_std"] = std.astype(np.float32)
    adata.uns["stflow"] = {"genes": genes, "trusted": np.arange(12) < 9, "normalization": {"target_sum": 1e4}}
    return adata


def tissue_axes(figure):
    return [ax for ax in figure.axes if any(isinstance(c, EllipseCollection) for c in ax.collections)]


def test_expression_shares_one_scale_and_gives_the_right_r(predicted):
    figure = sf.pl.expression(predicted, ["G1", "G10"], show=False, return_fig=True)
    axes = tissue_axes(figure)
    assert [ax.get_title() for ax in axes] == [
        "G1, measured", "G1, predicted", "G1, std", "G10, measured", "G10, predicted (untrusted)", "G10, std",
    ]  # fmt: skip
    measured, mean, std = (ax.collections[0].get_clim() for ax in axes[:3])
    assert measured == mean != std
    truth = axes[0].collections[0].get_array()
    r = np.corrcoef(truth, predicted.obsm["stflow"][:, 1])[0, 1]
    assert f"r = {r:.2f}" in [t.get_text() for t in axes[1].texts]
    assert all(ax.yaxis_inverted() and ax.get_aspect() == 1 for ax in axes)


def test_scale_bar_is_as_long_as_it_says(predicted):
    figure = sf.pl.expression(predicted, "G1", show=False, return_fig=True)
    (bar,) = [line for ax in figure.axes for line in ax.lines if line.get_gid() == "scale bar"]
    label = next(
        t.get_text() for ax in figure.axes for t in ax.texts if "m" in t.get_text() and "=" not in t.get_text()
    )
    length = float(label.split()[0]) * (1000 if label.endswith(" mm") else 1)
    assert np.ptp(bar.get_xdata()) == pytest.approx(length)


def test_expression_without_counts_or_with_wrong_names(predicted):
    unmeasured = predicted[:, ["G0"]].copy()
    figure = sf.pl.expression(unmeasured, "G5", show=False, return_fig=True)
    assert [ax.get_title() for ax in tissue_axes(figure)] == ["G5, predicted", "G5, std"]
    with pytest.raises(KeyError, match="NOPE"):
        sf.pl.expression(predicted, "NOPE")
    with pytest.raises(KeyError, match="predict_expression"):
        sf.pl.expression(predicted, "G1", key="other")


def test_gene_scores_are_sorted_and_named(predicted):
    scores = pd.DataFrame({"STFlow": [0.1, 0.9, 0.5], "ridge": [0.2, 0.8, 0.4]}, index=list("abc"))
    figure = sf.pl.gene_scores(scores, ceiling=pd.Series(1.0, list("abc")), show=False, return_fig=True)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["b", "c", "a"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["STFlow (0.50)", "ridge (0.47)", "noise ceiling"]
    with pytest.raises(TypeError):
        sf.pl.gene_scores([1, 2])


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


def test_he_lies_behind_the_spots_of_a_spatialdata():
    from spatiaflow import _io

    sdata = sf.datasets.simulated_tissue(200, seed=0)
    (slide,) = _io.places(sdata)
    picture, scale, corner = _io.background(sdata, sdata["table"], slide, pixels=100)
    image = np.asarray(sdata["he"].data)
    found = _io.slide_image(sdata, slide, image_key="he")
    step = round(scale / found.mpp)
    np.testing.assert_array_equal(picture, image[:, ::step, ::step].transpose(1, 2, 0))
    spot = (slide.xy[0] - corner) / scale  # of the small picture
    np.testing.assert_allclose(spot * step, found.xy[0], atol=1e-6)


def test_a_ceiling_may_be_an_array():
    scores = pd.DataFrame({"a": [0.1, 0.3]}, index=["g", "h"])
    figure = sf.pl.gene_scores(scores, ceiling=np.array([0.5, 0.6]), return_fig=True)
    line = next(one for one in figure.axes[0].lines if one.get_label() == "noise ceiling")
    np.testing.assert_allclose(line.get_ydata(), [0.6, 0.5])  # in the order of the scores


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


@pytest.mark.parametrize("name", sf.pl.__all__)
def test_a_figure_shows_one_object(name, predicted):
    figure = getattr(sf.pl, name)
    _, *others = inspect.signature(figure).parameters.values()
    required = {one.name: "G1" for one in others if one.default is inspect.Parameter.empty}
    with pytest.raises(TypeError, match="must be one|gene_scores draws a DataFrame"):
        figure([predicted], **required)
