"""Draws as an array."""

import numpy as np
import pytest

import spatiaflow as sf


def test_draws_are_in_order_and_x_is_none_of_them(model, slide):
    drawn = sf.tl.sample_expression(slide("t", n=5, seed=7), model=model, n_samples=12)
    drawn.layers["draw_of_mine"] = drawn.X + 1
    found = sf.get.draws(drawn)
    assert found.shape == (12, *drawn.shape) and found.dtype == np.float32
    np.testing.assert_array_equal(found[11], drawn.layers["draw_011"])
    np.testing.assert_array_equal(sf.get.draws(drawn, genes=["G3", "G1"]), sf.get.draws(drawn[:, ["G3", "G1"]]))
    np.testing.assert_array_equal(sf.get.draws(drawn, genes="G3")[..., 0], sf.get.draws(drawn[:, ["G3"]])[..., 0])


def test_what_is_missing_is_named(model, slide):
    with pytest.raises(KeyError, match="layers has no draws"):
        sf.get.draws(slide("t", n=3))
    drawn = sf.tl.sample_expression(slide("t", n=3), model=model, n_samples=2)
    with pytest.raises(KeyError, match="no gene 'no'; they have 'G"):
        sf.get.draws(drawn, genes=["G1", "no"])
