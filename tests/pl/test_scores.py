import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf


def test_gene_scores_are_sorted_and_named(predicted):
    scores = pd.DataFrame({"STFlow": [0.1, 0.9, 0.5], "ridge": [0.2, 0.8, 0.4]}, index=list("abc"))
    figure = sf.pl.gene_scores(scores, ceiling=pd.Series(1.0, list("abc")), show=False, return_fig=True)
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["b", "c", "a"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["STFlow (0.50)", "ridge (0.47)", "noise ceiling"]
    with pytest.raises(TypeError):
        sf.pl.gene_scores([1, 2])


def test_a_ceiling_may_be_an_array():
    scores = pd.DataFrame({"a": [0.1, 0.3]}, index=["g", "h"])
    figure = sf.pl.gene_scores(scores, ceiling=np.array([0.5, 0.6]), return_fig=True)
    line = next(one for one in figure.axes[0].lines if one.get_label() == "noise ceiling")
    np.testing.assert_allclose(line.get_ydata(), [0.6, 0.5])  # in the order of the scores
