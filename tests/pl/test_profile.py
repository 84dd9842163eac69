import numpy as np
import pytest

import spatiaflow as sf


def test_profile_shows_medians_and_the_features_that_differ(tissue):
    values, group = tissue["table"].obsm["morphology"], tissue["table"].obs["cell_type"]
    figure = sf.pl.profile(tissue, "cell_type", show=False, return_fig=True)
    heatmap, _, *violins = figure.axes
    assert [t.get_text().split(" (")[0] for t in heatmap.get_yticklabels()] == list(group.cat.categories)
    assert heatmap.get_yticklabels()[2].get_text() == f"lymphocyte ({(group == 'lymphocyte').sum()})"
    scores = heatmap.images[0].get_array()
    column = values["dapi_mean"]
    spread = (column.quantile(0.75) - column.quantile(0.25)) / 1.349
    expected = (column[group == "lymphocyte"].median() - column.median()) / spread
    assert scores[2, list(values).index("dapi_mean")] == pytest.approx(expected, rel=1e-4)
    low, high = heatmap.images[0].get_clim()
    assert low == -high  # white is the median cell
    assert len(violins) == 3
    assert not {"rna mean (image units)"} & {ax.get_xlabel() for ax in violins}  # follows the niche, not the type
    points = [line.get_xdata()[0] for line in violins[0].lines if line.get_marker() == "o"]
    assert len(points) == 4


def test_profile_of_chosen_features_has_units(tissue):
    figure = sf.pl.profile(tissue["table"], "state", features=["area_um2"], show=False, return_fig=True)
    assert figure.axes[2].get_xlabel() == "area (µm²)"
    points = [line.get_xdata()[0] for line in figure.axes[2].lines if line.get_marker() == "o"]
    medians = (
        tissue["table"].obsm["morphology"]["area_um2"].groupby(tissue["table"].obs["state"], observed=True).median()
    )
    np.testing.assert_allclose(points, medians)
    figure = sf.pl.profile(tissue, "niche", features=["area_um2", "solidity", "dapi_std", "rna_std"], return_fig=True)
    assert len(figure.axes) == 6


def test_profile_leaves_out_missing_cells_and_names_what_is_wrong(tissue):
    table = tissue["table"].copy()
    table.obsm["morphology"].iloc[:50] = np.nan
    table.obs["niche"] = table.obs["niche"].where(np.arange(200) < 190)
    figure = sf.pl.profile(table, "niche", return_fig=True)
    counts = [int(t.get_text().split("(")[1][:-1]) for t in figure.axes[0].get_yticklabels()]
    assert sum(counts) == 140
    with pytest.raises(KeyError, match="morphology_profile"):
        sf.pl.profile(table, "niche", key="other")
    with pytest.raises(KeyError, match="NOPE"):
        sf.pl.profile(table, "NOPE")
    with pytest.raises(KeyError, match="width"):
        sf.pl.profile(table, "niche", features=["width"])
    with pytest.raises(ValueError, match="200 distinct"):
        sf.pl.profile(table, "cell_id")
    table.obsm["morphology"][:] = np.nan
    with pytest.raises(ValueError, match="no cell has both"):
        sf.pl.profile(table, "niche")
