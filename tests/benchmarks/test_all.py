"""The table of every task is what the result files say."""

import sys
from pathlib import Path

import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("all", None)
    import all as module

    return module


def test_the_table_in_the_docs_is_that_of_the_files(everything):
    assert everything.TABLE.read_text(encoding="utf-8") == everything.table()


def test_every_method_that_a_row_names_is_in_its_file(everything):
    for row in everything.ROWS:
        table = everything.read(row)
        if table is not None and row.ours:
            assert not {row.ours, *row.baselines} - set(table[row.method]), row.task


def test_a_value_is_the_mean_over_seeds_with_their_spread(everything, tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    table = pd.DataFrame({"method": ["a", "a", "a", "b"], "seed": [0, 0, 1, 0], "r": [0.1, 0.3, 0.4, 0.5]})
    table.to_csv(tmp_path / "some.csv", index=False)
    row = everything.Row("task", "data", "split", "r", "some", "r", "a", ["b", "c"])
    found = everything.read(row)
    assert everything.value(found, row, "a") == "0.300 ± 0.141 (2)"
    assert everything.value(found, row, "b") == "0.500 (1)"
    assert everything.value(found, row, "c") == "not measured"
    monkeypatch.setitem(everything.COMMANDS, "some", "python x.py")
    assert everything.line(row)[4:6] == ["**0.300 ± 0.141 (2)**", "b: 0.500 (1)"]
    monkeypatch.setitem(everything.COMMANDS, "none", "python y.py")
    row.files = "none"
    assert everything.line(row)[4] == "not measured"
