"""The table of every task is what the result files say."""

import pandas as pd

import all as everything


def test_the_table_in_the_docs_is_that_of_the_files():
    assert everything.TABLE.read_text(encoding="utf-8") == everything.table()


def test_each_file_was_made_by_the_command_that_the_table_names():
    for name, commands in everything.COMMANDS.items():
        chain = [command.removeprefix("python benchmarks/") for command in commands.split(" && ")]
        whole = [everything.RESULTS / f"{name}.csv"]
        for path in [*whole, *everything.RESULTS.glob(f"{name}-seed*.csv")]:
            if path.exists():  # else one file a run of expression.py
                made_by = pd.read_csv(path)["command"].unique().item()
                assert made_by in (chain[-1:] if path in whole else chain), path.name


def test_every_method_that_a_row_names_is_in_its_file():
    for row in everything.ROWS:
        table = everything.read(row)
        if table is not None and row.ours:
            assert not {row.ours, *row.baselines} - set(table[row.method]), row.task


def test_no_method_that_is_better_than_the_baselines_is_left_out():
    """Other levels and forms of ours, and rows that are no method, aside."""
    aside = ("SPATIA", "ours", "generated", "gain of", "real targets", "training targets")
    for row in everything.ROWS:
        table = everything.read(row)
        if table is None or not row.baselines:
            continue
        mean = table.groupby(row.method)[row.value].mean() * (-1 if row.less else 1)
        best = mean[[name for name in row.baselines if name in mean]].max()
        better = [name for name in mean[mean > best].index if name != row.ours and not name.startswith(aside)]
        assert not better, (row.task, row.data)


def test_a_value_is_the_mean_over_seeds_with_their_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    table = pd.DataFrame({"method": ["a", "a", "a", "b"], "seed": [0, 0, 1, 0], "r": [0.1, 0.3, 0.4, 0.5]})
    table.to_csv(tmp_path / "some.csv", index=False)
    row = everything.Row("task", "data", "split", "r", "some", "r", "a", ["b", "c"])
    found = everything.read(row)
    assert everything.value(found, row, "a") == "0.300 ± 0.141 (2)"
    assert everything.value(found, row, "b") == "0.500 (1)"
    assert everything.value(found, row, "c") == "not measured"
    monkeypatch.setitem(everything.COMMANDS, "some", "python x.py")
    assert everything.line(row)[4:6] == ["a: 0.300 ± 0.141 (2)", "b: 0.500 (1)"]
    monkeypatch.setitem(everything.COMMANDS, "none", "python y.py")
    assert everything.line(row)[7:10] == ["", "", ""]  # neither file tells seconds or memory
    pd.DataFrame({"file": ["some"], "seconds": [61.2], "peak_gb": [1.23]}).to_csv(tmp_path / "refit.csv", index=False)
    assert everything.line(row)[7:10] == ["", "61", "1.2"]
    row.files = "none"
    assert everything.line(row)[4] == "not measured"


def test_refit_times_each_command_starts_anew_and_keeps_what_was_known(tmp_path, monkeypatch):
    script = tmp_path / "some.py"
    script.write_text("import os, pathlib; pathlib.Path(os.environ['SPATIAFLOW_RESULTS'], 'made.csv').write_text('a')")
    monkeypatch.setattr(everything.writing, "RESULTS", tmp_path)
    for old in ("one-C2-0-ridge.csv", "one-C2-0-ridge.npz", "one.csv", "other-C2-0-ridge.csv"):
        (tmp_path / old).write_text("old")
    everything.run({"one": f"python {script}", "bad": f"python {tmp_path}/none.py && python {script}"}, tmp_path)
    everything.run({"bad": f"python {script}"}, tmp_path)
    found = pd.read_csv(tmp_path / "refit.csv").set_index("file")
    assert list(found.index) == ["one", "bad"]
    assert not found["failed"].any()
    assert (found["seconds"] > 0).all()
    assert (found["peak_gb"] > 0).all()
    left = {path.name for path in tmp_path.glob("*.csv")} | {path.name for path in tmp_path.glob("*.npz")}
    assert left == {"made.csv", "one.csv", "other-C2-0-ridge.csv", "refit.csv"}


def test_other_methods_come_from_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    pd.DataFrame({"method": ["a"], "seed": [0], "r": [0.2]}).to_csv(tmp_path / "some.csv", index=False)
    row = everything.Row("task", "data", "split", "r", "some", "r", "a", ["b"], others="more")
    assert everything.value(everything.read(row), row, "b") == "not measured"
    pd.DataFrame({"method": ["b"], "seed": [0], "r": [0.1]}).to_csv(tmp_path / "more.csv", index=False)
    assert everything.value(everything.read(row), row, "b") == "0.100 (1)"


def test_a_result_names_its_command_without_a_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(everything.writing, "RESULTS", tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["/home/me/benchmarks/some.py", "pancreas.zarr", "--out", "runs/a.csv", "/data/b.zarr"]
    )
    everything.writing.write("some", [{"method": "ridge", "test": 0.5}])
    (command,) = pd.read_csv(tmp_path / "some.csv")["command"]
    assert command == "some.py pancreas.zarr --out runs/a.csv b.zarr"
