"""pl.benchmark: the best baseline is named, and better is to the right."""

import pandas as pd
import pytest

import spatiaflow as sf


def test_better_is_to_the_right_and_the_best_baseline_is_named():
    data = pd.DataFrame({
        "task": ["a"] * 3 + ["b"] * 3, "metric": ["r"] * 3 + ["KID"] * 3, "method": ["ours", "ridge", "MLP"] * 2,
        "value": [0.5, 0.3, 0.4, 0.5, 0.3, 0.4], "less": [False] * 3 + [True] * 3, "ceiling": [0.8] * 3 + [float("nan")] * 3,
    })  # fmt: skip
    figure = sf.pl.benchmark(data, ours="ours", return_fig=True)
    first, second = figure.axes
    assert [t.get_text() for t in first.texts] == ["MLP", "a\nr"]
    assert [t.get_text() for t in second.texts] == ["ridge", "b\nKID"]
    assert first.get_xlim()[0] < 0.3 < 0.8 < first.get_xlim()[1]
    assert second.get_xlim()[0] > second.get_xlim()[1]
    for ax, best in ((first, 0.4), (second, 0.3)):
        assert [line.get_xdata()[0] for line in ax.lines if line.get_color() == "0.25"] == [best]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ours", "best other", "others", "ceiling"]

    of_two = sf.pl.benchmark(data[data["method"] != "MLP"], ours="ours", return_fig=True)
    assert [t.get_text() for t in of_two.legends[0].get_texts()] == ["ours", "best other", "ceiling"]
    alone = sf.pl.benchmark(data[data["method"] == "ours"], ours="ours", return_fig=True)
    assert [t.get_text() for t in alone.legends[0].get_texts()] == ["ours", "ceiling"]


def test_missing_columns_and_methods_say_so():
    data = pd.DataFrame({"task": ["a"], "metric": ["r"], "method": ["ridge"], "value": [0.1]})
    with pytest.raises(ValueError, match="no method 'ours'; it has ridge"):
        sf.pl.benchmark(data, ours="ours")
    with pytest.raises(KeyError, match="no column 'value'"):
        sf.pl.benchmark(data.drop(columns="value"), ours="ridge")
