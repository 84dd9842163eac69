"""One long CSV a script: rows have one schema, are resumed by row, and survive processes side by side."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import results

HERE = Path(results.__file__).parent / "results"
SCRIPTS = sorted(path.stem for path in HERE.glob("*.csv"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_have_one_schema(script, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(HERE))
    rows = results.read(script)
    assert list(pd.read_csv(HERE / f"{script}.csv", nrows=1)) == results.COLUMNS
    assert not rows.duplicated(results.KEY).any()
    assert rows["value"].notna().all()
    assert rows["seed"].isin(["", "mean", *map(str, range(10))]).all()
    assert pd.to_datetime(rows["date"], format="%Y-%m-%d").notna().all()
    assert (rows[["data", "method", "metric", "command", "version"]] != "").all(axis=None)


def test_the_results_are_few_files():
    assert len([*HERE.rglob("*")]) <= 40


def test_what_is_held_is_skipped_unless_told_otherwise():
    results.Table("some").add("her2st", "C2", 0, "ridge", {"pearson50": 0.5, "crps": float("nan")})
    table = results.Table("some")
    assert not table.lacks("her2st", "C2", 0, "ridge")
    assert table.lacks("her2st", "C2", 0, ["ridge", "MLP"])
    assert table.lacks("her2st", "C2", 1, "ridge")
    assert table.lacks("her2st", "C2", 0, "ridge", "crps")  # what is not a number is not written
    again = results.Table("some", again=True)
    assert again.lacks("her2st", "C2", 0, "ridge")
    again.add("her2st", "C2", 0, "ridge", {"pearson50": 0.25})
    assert not again.lacks("her2st", "C2", 0, "ridge")  # measured by this run
    assert results.read("some")["value"].tolist() == [0.25]


def test_a_process_takes_nothing_from_another(folder):
    code = (
        "import results, sys; t = results.Table('some')\nfor i in range(10): t.add('d', 's', i, sys.argv[1], {'r': i})"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=HERE.parent, stdout=subprocess.DEVNULL)
        for name in "ab"
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert len(results.read("some")) == 20
    assert [path.name for path in folder.iterdir()] == ["some.csv"]


def test_values_keep_six_digits_and_words_stay_words(folder):
    results.Table("some").add("d", "", "", "NA", {"r": 0.123456789, "cells": 100_000, "p": 1e-9})
    rows = results.read("some")
    assert rows["value"].tolist() == [0.123457, 100_000, 1e-9]
    assert rows[["split", "seed", "method"]].drop_duplicates().values.tolist() == [["", "", "NA"]]
    before = (folder / "some.csv").read_text()
    results.append("some", rows[:1])
    assert sorted((folder / "some.csv").read_text().splitlines()) == sorted(before.splitlines())


def test_the_command_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/home/me/benchmarks/some.py", "a.zarr", "--methods", "no noise", "--again", "/data/b.zarr"]
    )
    assert results.command() == "python benchmarks/some.py a.zarr --methods 'no noise' b.zarr"


def test_select_and_pivot():
    found = {("b", 0): 1, ("b", 1): 3, ("a", 0): 5, ("a", 1): 5}
    rows = [("d", "s", str(seed), method, "r", value) for (method, seed), value in found.items()]
    rows = pd.DataFrame(rows, columns=[*results.KEY, "value"])
    assert results.pivot(rows)["r"].to_dict() == {"b": 2, "a": 5}
    assert results.select(rows, seed=1, method=["a", "c"])["value"].tolist() == [5]
