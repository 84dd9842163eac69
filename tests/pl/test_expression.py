import inspect
import warnings

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection

import spatiaflow as sf


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
    assert 0 < std[1] and std[0] <= std[1] / 2, "a small range of std is not stretched over all colours"
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


@pytest.mark.parametrize("name", [name for name in sf.pl.__all__ if name != "composition"])  # which compares samples
def test_a_figure_shows_one_object(name, predicted):
    figure = getattr(sf.pl, name)
    _, *others = inspect.signature(figure).parameters.values()
    required = {one.name: "G1" for one in others if one.default is inspect.Parameter.empty}
    with pytest.raises(TypeError, match="must be one|gene_scores draws a DataFrame"):
        figure([predicted], **required)


def test_a_table_cut_before_it_was_predicted_is_a_warning(slides, model):
    whole, cut = slides[0].copy(), slides[0][:, list(model.genes)[:1]].copy()
    for table in (whole, cut):
        sf.tl.predict_expression(table, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sf.pl.expression(whole, model.genes[0])
    with pytest.warns(UserWarning, match="the training slides .* measured values are too high"):
        sf.pl.expression(cut, model.genes[0])
