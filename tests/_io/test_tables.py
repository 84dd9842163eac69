"""Slots are written together, and what was there before is not lost without a word."""

import anndata as ad
import numpy as np

from spatiaflow import _io, settings


def test_a_column_that_was_there_before_is_overwritten_with_a_word(caplog):
    table = ad.AnnData(np.ones((3, 1)))
    table.obs["niche"] = ["a", "b", "c"]
    with settings.override(verbosity="info"):
        _io.write(table, "niche", obs={"": np.arange(3)}, uns={"x": 1})
        assert "obs['niche'] was there before, and is overwritten" in caplog.text
        caplog.clear()
        _io.write(table, "niche", obs={"": np.arange(3)}, uns={"x": 2})  # of an earlier call
        assert "overwritten" not in caplog.text
    assert table.obs["niche"].tolist() == [0, 1, 2]
