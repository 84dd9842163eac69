"""Lines between the cells of pairs, and the confidence of each niche."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection

import spatiaflow as sf
from _pairs import paired, tissue


def drawn(figure):
    """Ends of the lines of a figure of pairs, and how many pairs each niche has."""
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    niches = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    return {tuple(np.ravel(one)) for one in lines.get_segments()}, niches


def test_pairs_are_drawn():
    adata, _ = tissue(60, 80, niches=2)
    found = paired(adata, niche_key="niche", transitions=[("A", "B"), ("B", "A")])
    with pytest.raises(ValueError, match="give one of 'A -> B', 'B -> A'"):
        sf.pl.pairs(adata, mpp=1)
    lines, _ = drawn(sf.pl.pairs(adata, "A -> B", n=20, mpp=1, return_fig=True))
    xy = pd.DataFrame(adata.obsm["spatial"], adata.obs_names)
    known = {(*xy.loc[s], *xy.loc[t]) for s, t in zip(found["source"], found["target"])}
    assert len(lines) == 20 and lines <= known
    with pytest.raises(KeyError, match="no transition 'A -> C'"):
        sf.pl.pairs(adata, "A -> C", mpp=1)
    del adata.uns["transitions"]
    with pytest.raises(KeyError, match="pair_transitions"):
        sf.pl.pairs(adata, mpp=1)


def test_pairs_of_rows_that_were_dropped_are_not_drawn():
    adata, _ = tissue(60, 80)
    found = paired(adata)
    kept = adata[adata.obsm["spatial"][:, 0] < 300].copy()
    left = found[found["source"].isin(kept.obs_names) & found["target"].isin(kept.obs_names)]
    assert 0 < len(left) < len(found)
    with pytest.warns(
        UserWarning, match=f"{len(found) - len(left)} of {len(found)} pairs of 'A -> B' name rows .*pair_trans"
    ):
        lines, niches = drawn(sf.pl.pairs(kept, mpp=1, return_fig=True))
    xy = pd.DataFrame(kept.obsm["spatial"], kept.obs_names)
    assert lines == {(*xy.loc[s], *xy.loc[t]) for s, t in zip(left["source"], left["target"])}
    assert niches == [f"whole table ({len(left)})"]
    sources = adata[adata.obs["state"] == "A"].copy()
    with pytest.raises(
        ValueError, match="60 of 60 pairs of 'A -> B' name rows that obs_names no longer has .*pair_trans"
    ):
        sf.pl.pairs(sources, mpp=1)


def test_lines_are_coloured_by_confidence_and_the_surest_lie_on_top():
    adata, _ = tissue(60, 80, niches=2)
    found = paired(adata, niche_key="niche").set_index("source")
    figure = sf.pl.pairs(adata, n=1000, mpp=1, return_fig=True)
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    shown = lines.get_array()
    assert (np.diff(shown) >= 0).all() and lines.get_clim() == (0, pytest.approx(found["confidence"].max()))
    name_at = {tuple(xy): name for name, xy in zip(adata.obs_names, adata.obsm["spatial"])}
    sources = [name_at[tuple(one[0])] for one in lines.get_segments()]
    assert sorted(sources) == sorted(found.index)  # with n above the number of pairs all are drawn
    np.testing.assert_allclose(shown, found.loc[sources, "confidence"])
    sizes = found["niche"].value_counts()
    labels = [text.get_text() for text in figure.axes[1].get_yticklabels()]
    assert labels == [f"{niche} ({sizes[niche]})" for niche in sorted(sizes.index)]
