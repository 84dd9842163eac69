"""Figures of generated cells, of which each is a known mixture of a source and of a real cell of the target state."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf
from spatiaflow.pl._profile import _label

SIZE = {"crop_um": 16.0, "crop_pixels": 16, "image_key": "fluorescence"}


@pytest.fixture(scope="module")
def cells(tissue):
    """Crops of all cells, and the rows of either state."""
    state = tissue["table"].obs["state"].to_numpy()
    return sf.pp.crops(tissue, **SIZE), {name: np.flatnonzero(state == name) for name in "AB"}


def generated(cells, doses, *, n=8, name="A -> B", strength=1.0, n_samples=1):
    """What ``tl.generate_morphology`` returns: by cell, dose and sample. All samples but the first are black."""
    crops, rows = cells
    source, target = (crops.read(rows[state][:n]).numpy().astype(float) for state in "AB")
    each = [(i, dose, sample) for i in range(n) for dose in doses for sample in range(n_samples)]
    mixed = [(sample == 0) * (source[i] + strength * dose * (target[i] - source[i])) for i, dose, sample in each]
    images = np.stack(mixed).clip(0, 255).round().astype(np.uint8)
    about = {"channels": crops.channels, "mpp": SIZE["crop_um"] / SIZE["crop_pixels"]}
    profile = sf.pp.image_profile(images, **about)
    obs = pd.DataFrame(each, columns=["source_cell", "dose", "sample"])
    obs = obs.assign(transition=name, source_cell=[f"cell_{i}" for i in obs["source_cell"]])
    obs.index = profile.index = [f"{one}_{i}" for i, one in enumerate(obs["source_cell"])]
    made = ad.AnnData(profile.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=profile.columns))
    made.obsm["image"], made.obsm["source"] = images, source[[i for i, *_ in each]].astype(np.uint8)
    made.uns["morphology"] = about
    return made


def pictures(figure):
    """Images of a figure of one row each, rows x columns x pixels x pixels x RGB."""
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    tops = [round(ax.get_position().y0, 3) for ax in figure.axes if ax.images]
    return [np.stack([one for one, at in zip(shown, tops) if at == top]) for top in dict.fromkeys(tops)]


def test_figures(tissue, cells):
    crops, real = cells
    made = generated(cells, [0.5, 1])
    figure = sf.pl.transition(made, crops.read(real["B"]).numpy(), n=5, return_fig=True)
    labels = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert labels == ["source", "dose 0.5", "dose 1", "real targets", "2 µm"]
    assert sum(len(ax.images) for ax in figure.axes) == 20
    profiles = {k: sf.pp.image_profile(crops.take(real[s])) for k, s in (("source", "A"), ("target", "B"))}
    figure = sf.pl.profile_shift(made, **profiles, return_fig=True)
    assert len(figure.axes) == 6
    with pytest.raises(KeyError, match="no feature 'size'"):
        sf.pl.profile_shift(made, **profiles, features="size")
    with pytest.raises(KeyError, match="generate_morphology"):
        sf.pl.transition(tissue["table"])
    with pytest.raises(ValueError, match="targets must be"):
        sf.pl.transition(made, np.zeros((3, 4, 8, 8)))


def test_a_column_is_a_cell_and_the_first_of_its_samples(cells):
    made = generated(cells, [0, 1], n_samples=2)
    figure = sf.pl.transition(made, n=4, channels=["dapi"], percentiles=(0, 100), return_fig=True)
    source, none, whole = pictures(figure)
    np.testing.assert_array_equal(none, source)  # a dose of 0 is the cell itself
    assert (abs(whole - source).max((1, 2, 3)) > 0.05).all()  # and the second sample would be black
    place = list(made.uns["morphology"]["channels"]).index("dapi")
    every = made.obsm["source"][::4, place].astype(float)
    shown = [np.argmin([np.std(one[..., 0] - (each - each.min()) / np.ptp(each)) for each in every]) for one in source]
    assert sorted(set(shown)) == shown  # four different cells, in their order
    low, high = every[shown].min(), every[shown].max()
    np.testing.assert_allclose(source[..., 0], (every[shown] - low) / (high - low), atol=1e-6)


def test_a_figure_of_doses(tissue, cells):
    both = ad.concat(
        [generated(cells, [0, 0.5, 1]), generated(cells, [0, 0.5, 1], name="STATE1 +2", strength=0.5)],
        uns_merge="first", index_unique="-",
    )  # fmt: skip
    figure = sf.pl.morphology_dose(both, cell="cell_2", return_fig=True)
    assert sum(len(ax.images) for ax in figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes[:3]] == ["0", "0.5", "1"]
    words = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert {"A -> B", "STATE1 +2"} <= set(words)
    area = both.to_df()["area_um2"]
    for edit in ("A -> B", "STATE1 +2"):  # over all cells, and not over the one that is drawn
        first, last = (area[(both.obs["transition"] == edit) & (both.obs["dose"] == dose)].mean() for dose in (0, 1))
        assert f"area {100 * (last / first - 1):+.0f} %" in words
    state, gene = pictures(figure)
    np.testing.assert_array_equal(state[0], gene[0])
    np.testing.assert_allclose(state[1], gene[2], atol=0.05)  # half the dose, and half the strength
    assert abs(state[2] - state[0]).max() > 0.2
    with pytest.raises(KeyError, match="no image was generated of the cell 'nobody'"):
        sf.pl.morphology_dose(both, cell="nobody")
    other = generated(cells, [0, 0.5, 1])
    twice = ad.concat([other, other], uns_merge="first", index_unique="-")
    for bad in (twice, other[~((other.obs["source_cell"] == "cell_2") & (other.obs["dose"] == 0.5))].copy()):
        with pytest.raises(ValueError, match="images for 3 doses"):
            sf.pl.morphology_dose(bad, cell="cell_2")
    with pytest.raises(ValueError, match="the same doses, two or more"):
        sf.pl.morphology_dose(generated(cells, [1]))
    with pytest.raises(KeyError, match="generate_morphology"):
        sf.pl.morphology_dose(tissue["table"])


def test_the_features_that_differ_most_are_drawn_with_their_medians(cells):
    crops, rows = cells
    made = generated(cells, [1])
    source, target = (sf.pp.image_profile(crops.take(rows[state])) for state in "AB")
    figure = sf.pl.profile_shift(made, source=source, target=target, return_fig=True)
    change = {}
    for name in source:
        values = [*source[name].dropna(), *target[name].dropna()]
        spread = np.std(values, ddof=1)
        change[name] = abs(source[name].mean() - target[name].mean()) / spread if spread > 0 else 0
    expected = sorted(change, key=change.get, reverse=True)[:6]
    assert [ax.get_xlabel() for ax in figure.axes] == [_label(name, unit=True) for name in expected]
    for ax, name in zip(figure.axes, expected):
        points = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        medians = [values[name].median() for values in (source, made.to_df(), target)]
        np.testing.assert_allclose(points, medians, rtol=1e-5)
    sizes = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sizes == [f"source ({len(source)})", "generated (8)", f"target ({len(target)})"]


def test_channels_are_known_and_not_too_many_for_one_picture(cells):
    made = generated(cells, [0, 1])
    with pytest.raises(KeyError, match="no channel 'gold'; there are dapi, bound, rna, prot"):
        sf.pl.transition(made, channels=["gold"])
    made.uns["morphology"] = made.uns["morphology"] | {"channels": [f"c{i}" for i in range(8)]}
    with pytest.raises(ValueError, match="8 channels are too many"):
        sf.pl.transition(made)


def test_each_dose_is_a_violin_of_the_first_samples(cells):
    crops, rows = cells
    profiles = {
        name: sf.pp.image_profile(crops.take(rows[state])) for name, state in (("source", "A"), ("target", "B"))
    }
    one, several = generated(cells, [0, 1]), generated(cells, [0, 1], n_samples=3)
    drawn = [sf.pl.profile_shift(made, **profiles, features="area_um2", return_fig=True) for made in (one, several)]
    for figure in drawn:
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels[1:3] == ["dose 0 (8)", "dose 1 (8)"] and labels[0].startswith("source") and len(labels) == 4
    medians = [[line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"] for figure in drawn]
    assert medians[0] == medians[1] and medians[0][1] != medians[0][2]
    doses = [sf.pl.morphology_dose(made, return_fig=True) for made in (one, several)]
    texts = [[text.get_text() for ax in figure.axes for text in ax.texts] for figure in doses]
    assert texts[0] == texts[1] and any(text.startswith("area ") for text in texts[0])
