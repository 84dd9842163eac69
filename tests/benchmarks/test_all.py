"""The page's table is what the result files say, and what they say is read as it should be."""

import importlib
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import all as everything
import results

BENCHMARKS = Path(everything.__file__).parent
COMMANDS = sorted({
    command for path in results.folder().glob("*.csv") for command in results.read(path.stem)["command"].unique()
})  # fmt: skip
CHAINS = [one for chain in [*everything.COMMANDS.values(), *everything.QUICK.values()] for one in chain.split(" && ")]


@pytest.fixture
def book(tmp_path, monkeypatch):
    """An empty table of a script called "some"."""
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path))
    return results.Table("some")


def task(**options) -> everything.Row:
    options = {
        "task": "task",
        "data": "data",
        "score": "r",
        "where": {"data": "d"},
        "metric": "r",
        "ours": "a",
    } | options
    return everything.Row(script="some", simple=["b", "c"], **options)


def test_the_table_in_the_docs_is_that_of_the_files():
    page = everything.PAGE.read_text(encoding="utf-8")
    assert page.split(everything.BEGIN)[1].split(everything.END)[0] == everything.table()


def test_the_page_is_one_page():
    page = everything.PAGE.read_text(encoding="utf-8")
    assert len(page) <= 12_000
    assert page.count("![") == 1
    assert sum(line.startswith("| --- |") for line in page.splitlines()) == 1


def test_the_page_tells_what_a_refit_costs():
    page = everything.PAGE.read_text(encoding="utf-8")
    rows = results.read("all")
    cost, (version,) = results.pivot(rows, "data")["seconds"], rows["version"].unique()
    said = (
        f"{len(cost)} of the {len(everything.COMMANDS)} parts took {cost.sum() / 3600:.1f} hours with version {version}"
    )
    assert said in " ".join(page.split())


@pytest.mark.parametrize("command", [*COMMANDS, *CHAINS])
def test_every_command_is_one_that_its_script_accepts(command):
    _, script, *words = shlex.split(command, comments=True)
    if "# commit" in command:  # measured by a script of that commit, which is gone
        assert not (BENCHMARKS / Path(script).name).exists()
        return
    if Path(script).name in ("weights.py", "morphology_weights.py"):  # they measure nothing
        assert (BENCHMARKS / Path(script).name).exists()
        return
    importlib.import_module(Path(script).stem).parser().parse_args(words)


def test_rows_were_measured_by_the_commands_that_refit_them():
    chains = {one for chain in everything.COMMANDS.values() for one in chain.split(" && ")}
    for row in everything.ROWS:
        if row.script in ("embedding", "imputation", "morphology", "niches", "editing"):
            rows = results.select(results.read(row.script), **row.where, method=row.ours, metric=row.metric)
            assert set(rows["command"]) <= chains, row.task


def test_every_simple_method_that_a_row_names_is_measured():
    for row in everything.ROWS:
        for name in {*row.simple} - {*row.known}:
            assert len(everything.values(row, name)), (row.task, row.data, name)


def test_no_simple_method_is_left_out_that_is_better():
    """Ours in other forms, and rows that are no method or know what no method may, aside."""
    aside = (
        "SPATIA", "ours", "generated", "gain of", "real targets", "training targets", "STFlow", "deterministic twin",
        "no context", "no flow", "depth only", "position only", "ceiling", "cluster_niches",
    )  # fmt: skip
    for row in everything.ROWS:
        rows = results.select(results.read(row.script), **row.where, metric=row.metric)
        mean = {name: everything.mean(row, name) * (-1 if row.less else 1) for name in rows["method"].unique()}
        best = max(mean[name] for name in row.simple if name in mean) if {*row.simple} & {*mean} else np.inf
        better = [
            name for name, value in mean.items() if value > best and name != row.ours and not name.startswith(aside)
        ]
        assert not better, (row.task, row.data)


def test_the_best_simple_method_is_compared_by_splits_or_seeds(book):
    for seed in (0, 1):
        for split, value in (("x", 0.1), ("y", 0.3), ("z", 0.5)):
            book.add("d", split, seed, "a", {"r": value + 0.1 + 0.02 * seed})
    for split, b, c in (("x", 0.1, 0.0), ("y", 0.25, 0.0), ("z", 0.4, 0.9)):
        book.add("d", split, 0, "b", {"r": b})
        book.add("d", split, 0, "c", {"r": c})
    found = everything.line(task(over="mice"))
    assert (found.best, found.over) == ("c", "3 mice")
    assert found.theirs == pytest.approx(0.3)
    assert found.spread == pytest.approx(0.02 / 2**0.5)
    pairs = np.array([0.21, 0.41, -0.29])
    assert found.difference == pytest.approx(pairs.mean())
    low, high = stats.t.interval(0.95, 2, pairs.mean(), pairs.std(ddof=1) / 3**0.5)
    np.testing.assert_allclose([found.low, found.high], [low, high])
    assert found.verdict == "level"
    less = everything.line(task(less=True, over="mice"))
    assert (less.best, less.verdict) == ("b", "worse" if less.high < 0 else "level")
    assert less.difference == pytest.approx(0.25 - 0.41)


@pytest.mark.parametrize("less", [False, True])
def test_a_measured_difference_is_above_zero_where_ours_is_better(book, less):
    book.add("d", "x", 0, "a", {"r": 0.5})
    book.add(
        "d",
        "x",
        0,
        "b",
        {"r": 0.4 if not less else 0.6, "r minus a": -0.1, "r minus a, low": -0.3, "r minus a, high": -0.05},
    )
    if less:  # the other way round, as benchmarks of distances say it
        book.add("d", "x", 0, "b", {"r minus a": 0.1, "r minus a, low": 0.05, "r minus a, high": 0.3})
    found = everything.line(task(less=less))
    np.testing.assert_allclose([found.difference, found.low, found.high], [0.1, 0.05, 0.3])
    assert (found.verdict, found.over) == ("better", "blocks")


def test_intervals_of_independent_splits_add_in_squares(book):
    for split, half in (("x", 0.03), ("y", 0.04)):
        for seed in (0, 1):
            row = {"r": 0.5, "r minus b": -0.1, "r minus b, low": -0.1 - half, "r minus b, high": -0.1 + half}
            book.add("d", split, seed, "a", row)
        book.add("d", split, 0, "b", {"r": 0.6})
    found = everything.line(task())
    np.testing.assert_allclose([found.low, found.high], [-0.125, -0.075])
    assert found.verdict == "worse"


def test_both_compared_with_a_third_give_their_difference(book):
    book.add("d", "x", 0, "a", {"r": 0.5, "r minus c": 0.2, "r minus c, low": 0.17, "r minus c, high": 0.24})
    book.add("d", "x", 0, "b", {"r": 0.4, "r minus c": 0.1, "r minus c, low": 0.07, "r minus c, high": 0.14})
    book.add("d", "x", 0, "c", {"r": 0.3})
    found = everything.line(task())
    np.testing.assert_allclose([found.difference, found.low, found.high], [0.1, 0.05, 0.15])


def test_the_best_of_each_run_is_compared_with_where_it_differs(book):
    for seed, best in enumerate(("b", "c", "c")):
        minus = f"r minus {best}"
        book.add(
            "d", "x", seed, "a", {"r": 0.5, minus: 0.1 * seed, f"{minus}, low": 0.1 * seed - 0.1, f"{minus}, high": 0.3}
        )
        book.add("d", "x", seed, "b", {"r": 0.4})
        book.add("d", "x", seed, "c", {"r": 0.3})
    found = everything.line(task())
    np.testing.assert_allclose([found.difference, found.low, found.high], [0.1, 0, 0.3])


def test_the_best_of_each_run_does_not_stand_for_a_method_that_was_no_candidate(book):
    """Published methods are measured apart: the difference to another method says nothing of them."""
    for split, value in (("x", 0.5), ("y", 0.6)):
        book.add("d", split, 0, "a", {"r": value, "r minus b": 0.2, "r minus b, low": 0.1, "r minus b, high": 0.3})
        book.add("d", split, 0, "b", {"r": value - 0.2})
        book.add("d", split, 0, "c", {"r": value - 0.05})
    found = everything.line(task(over="mice"))
    assert (found.best, found.over) == ("c", "2 mice")
    assert found.difference == pytest.approx(0.05)


def test_a_longer_name_is_another_method(book):
    book.add("d", "x", 0, "b", {"r": 0.4})
    book.add("d", "x", 0, "a", {"r": 0.5, "r minus b + smoothing": 0.3, "r minus b + smoothing, low": 0.2})
    assert everything.line(task()).verdict == "not tested"


def test_what_is_not_measured_is_said(book):
    assert everything.line(task()) is None


def test_refit_replaces_rows_when_all_went_well(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path / "kept"))
    results.Table("some").add("d", "s", 0, "old", {"r": 1})
    results.Table("some").add("d", "s", 0, "new", {"r": 1})
    script = tmp_path / "some.py"
    script.write_text("import results; results.Table('some').add('d', 's', 0, 'new', {'r': 2})")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")
    everything.run({"one": f"python {script}", "bad": f"python {script} && python {tmp_path}/none.py"})
    assert results.pivot(results.read("some"))["r"].to_dict() == {"old": 1, "new": 2}
    cost = results.pivot(results.read("all"), "data")
    assert cost["failed"].to_dict() == {"one": 0, "bad": 1}
    assert (cost[["seconds", "peak_gb"]] > 0).all(axis=None)
    assert set(results.read("some")["date"]) == {pd.Timestamp.now().strftime("%Y-%m-%d")}


def test_the_figure_shows_every_tested_difference():
    found = [one for one in map(everything.line, everything.ROWS) if one and one.theirs]
    (ax,) = everything.figure().axes
    assert len(ax.get_yticklabels()) == len(found)
