import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf


def test_the_curve_is_drawn_and_the_number_taken_is_marked():
    cells = ad.AnnData(np.ones((3, 2)))
    curve = {"n_clusters": np.arange(2, 6), "agreement": np.array([0.3, 0.8, 0.7, 0.4]), "error": np.full(4, 0.02)}
    cells.uns["niche"] = {"stability": curve, "params": {"n_clusters": 3}}
    (ax,) = sf.pl.niche_stability(cells, return_fig=True).axes
    line, taken = ax.lines[0], ax.lines[-1]
    np.testing.assert_allclose(line.get_ydata(), curve["agreement"])
    assert taken.get_xdata().tolist() == [3] and taken.get_ydata().tolist() == [0.8]
    cells.uns["niche"]["stability"] = {}
    with pytest.raises(KeyError, match=r"cluster_niches\(data\) without n_clusters="):
        sf.pl.niche_stability(cells)
