import numpy as np
import pytest
from matplotlib.colors import to_rgb

import spatiaflow as sf
from spatiaflow.pl._crops import COLOURS, _Pictures


def drawn(figure):
    return [ax for ax in figure.axes if ax.images and ax.get_aspect() == 1]


def test_crops_are_of_the_group_and_repeat_with_the_seed(tissue, monkeypatch):
    def rows_of(**options):
        seen = []
        original = _Pictures.draw
        with monkeypatch.context() as patch:
            patch.setattr(_Pictures, "draw", lambda self, ax, row, o: (seen.append(row), original(self, ax, row, o)))
            figure = sf.pl.crops(tissue, "cell_type", n=3, image_key="he", return_fig=True, **options)
        return sorted(seen), figure

    first, figure = rows_of()
    types = tissue["table"].obs["cell_type"].iloc[first].value_counts()
    assert (types == 3).all()
    assert len(drawn(figure)) == 12
    assert rows_of()[0] == first != rows_of(random_state=1)[0]
    chosen, figure = rows_of(groups=["lymphocyte", "fibroblast"])
    assert set(tissue["table"].obs["cell_type"].iloc[chosen]) == {"lymphocyte", "fibroblast"}
    assert [ax.texts[0].get_text() for ax in drawn(figure)[::3]] == ["lymphocyte", "fibroblast"]


def test_crops_have_their_size_and_a_true_scale_bar(tissue):
    figure = sf.pl.crops(tissue, n=4, crop_um=20.0, image_key="he", return_fig=True)
    (bar,) = [line for ax in figure.axes for line in ax.lines if line.get_gid() == "scale bar"]
    assert np.ptp(bar.get_xdata()) == 5
    assert "5 µm" in [text.get_text() for text in bar.axes.texts]
    for ax in drawn(figure):
        assert np.ptp(ax.get_xlim()) == pytest.approx(20)
        assert ax.yaxis_inverted()
        left, right, bottom, top = ax.images[0].get_extent()
        height, width = ax.images[0].get_array().shape[:2]
        assert (right - left) / width == pytest.approx((bottom - top) / height) == pytest.approx(0.5)
        assert left <= -10 + 0.5
        assert right >= 10 - 0.5


def test_h_and_e_is_drawn_as_it_is(tissue):
    figure = sf.pl.crops(tissue, n=1, image_key="he", outline=False, random_state=3, return_fig=True)
    (ax,) = drawn(figure)
    picture = np.round(ax.images[0].get_array() * 255).astype(np.uint8)
    whole = np.asarray(tissue["he"].data).transpose(1, 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view(whole, picture.shape[:2], axis=(0, 1))
    assert (windows == picture.transpose(2, 0, 1)).all((2, 3, 4)).any()
    assert not ax.collections
    assert not figure.legends


def test_channels_have_their_colours_and_one_contrast(tissue):
    figure = sf.pl.crops(tissue, n=2, image_key="fluorescence", channels=["dapi", "prot"], return_fig=True)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dapi", "prot"]
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()] == [to_rgb(COLOURS[i]) for i in (0, 3)]
    figure = sf.pl.crops(tissue, n=2, image_key="fluorescence", channels="dapi", percentiles=(0, 100), return_fig=True)
    for ax in drawn(figure):
        picture = ax.images[0].get_array()
        assert (picture[..., 0] == picture[..., 2]).all()  # grey
        assert ax.collections  # outline
    whole = np.asarray(tissue["fluorescence"].data)[0]
    found = np.unique(np.concatenate([ax.images[0].get_array()[..., 0].ravel() for ax in drawn(figure)]))
    levels = found * (float(whole.max()) - whole.min()) + whole.min()  # by the slide's own limits, not the crop's
    np.testing.assert_allclose(levels, levels.round(), atol=1e-6)


def test_positions_of_an_anndata_are_enough(slide):
    adata = slide("t", seed=5)
    figure = sf.pl.crops(adata, crop_um=400.0, n=3, image_key="hires", return_fig=True)
    assert len(drawn(figure)) == 3
    with pytest.raises(ValueError, match="outline=True"):
        sf.pl.crops(adata, outline=True)


def test_crops_name_what_is_wrong(tissue):
    for options, kind, match in (
        ({"groupby": "NOPE"}, KeyError, "NOPE"),
        ({"groupby": "niche", "groups": ["bone"]}, KeyError, "bone.*stroma"),
        ({"channels": ["cd3"]}, KeyError, "cd3.*dapi"),
        ({"crop_um": 0}, ValueError, "crop_um"),
        ({"n": 0}, ValueError, "at least 1"),
        ({"channels": ["dapi", "bound", "rna", "prot"] * 2}, ValueError, "twice"),
        ({"image_key": None}, KeyError, "image_key"),
    ):
        with pytest.raises(kind, match=match):
            sf.pl.crops(tissue, **{"image_key": "fluorescence", **options})
