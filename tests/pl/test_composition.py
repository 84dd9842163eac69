import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import spatiaflow as sf


@pytest.fixture
def cells():
    """Four samples, two of each condition; niche "1" makes .5, .25, .75 and 1 of them."""
    share = {"s1": (2, 2), "s2": (3, 1), "s10": (1, 3), "s3": (0, 4)}
    rows = [(name, niche) for name, n in share.items() for niche, many in zip("01", n) for _ in range(many)]
    obs = pd.DataFrame(rows, columns=["sample", "niche"], index=[f"c{i}" for i in range(16)])
    obs["niche"] = pd.Categorical(obs["niche"])
    obs["sample"] = pd.Categorical(obs["sample"], list(share))
    obs["condition"] = obs["sample"].astype(str).map({"s1": "well", "s2": "ill", "s10": "ill", "s3": "well"})
    return ad.AnnData(np.ones((16, 1)), obs=obs)


def drawn(figure):
    """Heights of the bars of each niche by sample, and their colours."""
    (ax,) = figure.axes
    samples = [label.get_text() for label in ax.get_xticklabels()]
    niches = [bars.get_label() for bars in ax.containers]
    heights = np.stack([[bar.get_height() for bar in bars] for bars in ax.containers], 1)
    index, columns = (pd.Index(names, dtype=object) for names in (samples, niches))  # pandas 3 has a type of text
    return pd.DataFrame(heights, index, columns), [to_hex(bars[0].get_facecolor()) for bars in ax.containers]


def test_bars_are_the_numbers_of_get(cells):
    for counts in (False, True):
        found, _ = drawn(sf.pl.composition(cells, by="sample", counts=counts, return_fig=True))
        expected = sf.get.niche_composition(cells, by="sample", counts=counts)
        pd.testing.assert_frame_equal(found, expected.astype(float), check_names=False)
    figure = sf.pl.composition(cells, by="sample", return_fig=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["4"] * 4  # cells


def test_samples_of_a_condition_stand_together(cells):
    figure = sf.pl.composition(cells, by="sample", condition="condition", return_fig=True)
    assert list(drawn(figure)[0].index) == ["s2", "s10", "s1", "s3"]
    assert {"ill", "well"} < {text.get_text() for text in figure.axes[0].texts}
    place = figure.axes[0].get_xticks()
    assert place[2] - place[1] > place[1] - place[0]


def test_objects_are_samples_and_have_one_palette(cells):
    parts = {name: cells[cells.obs["sample"] == name].copy() for name in ("s3", "s1", "s10")}
    found, colors = drawn(sf.pl.composition(parts, return_fig=True))
    assert list(found.index) == ["s3", "s1", "s10"]
    assert list(parts["s1"].uns["niche_colors"]) == colors
    assert list(parts["s3"].uns["niche_colors"]) == colors[1:]  # it has niche "1" alone
    del parts["s3"].uns["niche_colors"]
    parts["s10"].uns["niche_colors"] = ["#000000", "#ff0000"]
    assert drawn(sf.pl.composition(parts, return_fig=True))[1] == ["#000000", "#ff0000"]
    assert parts["s3"].uns["niche_colors"] == ["#ff0000"]


def test_colours_are_those_of_uns(cells):
    cells.uns["niche_colors"] = np.array(["red", "#00ff00"], dtype=object)
    assert drawn(sf.pl.composition(cells, by="sample", return_fig=True))[1] == ["#ff0000", "#00ff00"]
    assert list(cells.uns["niche_colors"]) == ["red", "#00ff00"]
    cells.uns["niche_colors"] = ["red"]  # too few: of other niches
    assert drawn(sf.pl.composition(cells, by="sample", return_fig=True))[1] == list(cells.uns["niche_colors"])


def test_many_groups_have_different_colours():
    obs = pd.DataFrame({"niche": pd.Categorical(np.arange(25).astype(str)), "sample": "a"})
    obs.index = obs.index.astype(str)
    _, colors = drawn(sf.pl.composition(ad.AnnData(np.ones((25, 1)), obs=obs), by="sample", return_fig=True))
    assert len(set(colors)) == 25


def test_it_is_drawn_into_axes(cells):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2)
    assert sf.pl.composition(cells, by="sample", ax=axes[1], return_fig=True) is figure
    assert axes[1].containers and not axes[0].containers


def test_clear_errors(cells):
    with pytest.raises(KeyError, match="obs has no 'donor'"):
        sf.pl.composition(cells, by="donor")
    with pytest.raises(KeyError, match="obs has no 'treatment'"):
        sf.pl.composition(cells, by="sample", condition="treatment")
    with pytest.raises(ValueError, match="sample '' has cells of several values .*'ill', 'well'.*by="):
        sf.pl.composition(cells, condition="condition")
    cells.obs["niche"] = pd.Categorical([None] * 16, ["0"])
    with pytest.raises(ValueError, match=r"no cell has a value in obs\['niche'\]"):
        sf.pl.composition(cells)
