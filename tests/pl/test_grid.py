"""The figure of what was taken for tissue."""

import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf


@pytest.fixture
def grid():
    pixels = np.full((200, 300, 3), 235, np.uint8)
    pixels[40:160, 60:240] = [190, 110, 170]
    return sf.pp.grid(pixels, mpp=2.0, step_um=40)


def test_every_square_is_drawn_on_the_whole_picture(grid):
    figure = sf.pl.tissue(grid, return_fig=True)
    (squares,) = figure.axes[0].collections
    corners = np.array([path.vertices[:4] for path in squares.get_paths()])
    np.testing.assert_allclose(corners.mean(1), grid.obsm["spatial"] * 2)
    np.testing.assert_allclose(np.ptp(corners, axis=1), 40)
    assert figure.axes[0].get_xlim() == (0, 600)


def test_groups_have_colours_of_their_own(grid):
    grid.obs["annotation"] = pd.Categorical(np.where(grid.obsm["spatial"][:, 0] < 150, "left", None))
    figure = sf.pl.tissue(grid, groupby="annotation", return_fig=True)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["none", "left"]
    assert sum(len(one.get_paths()) for one in figure.axes[0].collections) == len(grid)


def test_no_grid_is_refused(slides):
    with pytest.raises(KeyError, match=r"sf.pp.grid\(image\)"):
        sf.pl.tissue(slides[0])
