"""Every task of the two papers in one table, from what the other benchmarks wrote.

    python benchmarks/all.py                reads benchmarks/results, writes docs/benchmark_table.md and a figure: seconds
    python benchmarks/all.py --quick        runs what needs no pancreas slide at small settings, into a folder of its own, and
                                            prints the table of that: minutes; scores mean nothing, all of it has to run
    python benchmarks/all.py --refit [FILE ...] runs everything anew (or what makes these files), seconds into refit.csv

The pancreas slide is ``pancreas.zarr``, here (``benchmarks/pancreas.py`` assembles it). Its embeddings are kept in
``features`` and trained variants in ``runs``, and used again where they are there: remove both to begin at nothing. Nothing
is counted here: each value is a mean over the seeds (and sections, mice or levels that the row names) of a column of a file,
with the standard deviation between seeds where there are several. A task whose file is missing is listed as not measured.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import writing
from writing import RESULTS

TABLE = Path(__file__).parents[1] / "docs" / "benchmark_table.md"
COMMANDS = {  # what makes the files; the table names the last of several
    "her2st-10k": "python benchmarks/expression.py --data her2st --seeds 3",
    "her2st-markers": (
        'python benchmarks/expression.py --data her2st --convention markers --seeds 3 --methods "STFlow default"'
    ),
    "mouse_olfactory_bulb-10k": (
        "python benchmarks/expression.py --data mouse_olfactory_bulb --seeds 1 && "
        'python benchmarks/expression.py --data mouse_olfactory_bulb --seeds 3 --methods "STFlow default"'
    ),
    "embedding-pancreas": (
        "python benchmarks/weights.py pancreas.zarr --modalities image --epochs 2 --out runs/spatia/image.safetensors && "
        "python benchmarks/weights.py pancreas.zarr --epochs 14 --seed 1 --out runs/spatia/1.safetensors && "
        "python benchmarks/weights.py pancreas.zarr --epochs 14 --seed 2 --out runs/spatia/2.safetensors && "
        "python benchmarks/embedding.py pancreas --store pancreas.zarr --seed 2 --weights runs/spatia/2.safetensors --quick && "
        "python benchmarks/embedding.py pancreas --store pancreas.zarr --cache features --seed 1 "
        "--weights runs/spatia/1.safetensors && "
        "python benchmarks/embedding.py pancreas --store pancreas.zarr --cache features "
        "--self-supervised runs/spatia/image.safetensors"
    ),
    "embedding-starmap": "python benchmarks/embedding.py starmap --seeds 3 --epochs 20 --cache features",
    "imputation-known": "python benchmarks/imputation.py known --store pancreas.zarr --cache features",
    "imputation-pancreas": "python benchmarks/imputation.py pancreas --store pancreas.zarr --cache features",
    "imputation-starmap": "python benchmarks/imputation.py starmap",
    "imputation-bulb": "python benchmarks/imputation.py bulb",
    "morphology-pancreas": (
        "python benchmarks/morphology_weights.py pancreas.zarr --cache features --folder runs --seeds 0 1 2 --variants ours "
        "noise unweighted unaligned nospace spoiled spoiled-unweighted && "
        "python benchmarks/morphology.py pancreas --store pancreas.zarr --cache features --folder runs --cells 600"
    ),
    "morphology-simulated": "python benchmarks/morphology.py simulated --train 15000 --seeds 3",
    "morphology-tiles": "python benchmarks/morphology.py tiles --train 30000 --seeds 2",
}
QUICK = {  # the same in minutes, and no pancreas
    "her2st-10k": 'python benchmarks/expression.py --sections C2 --seeds 1 --methods "STFlow default" --epochs 2 --threads 1',
    "embedding-simulated": "python benchmarks/embedding.py simulated --seeds 1 --epochs 1",
    "imputation-starmap": "python benchmarks/imputation.py starmap --seeds 1 --folds 1 --only BZ5",
    "morphology-simulated": "python benchmarks/morphology.py simulated --seeds 1 --train 1500 --test 1500 --epochs 1 --pixels 16",
    "morphology-tiles": "python benchmarks/morphology.py tiles --seeds 1 --train 2000 --test 1500 --epochs 1 --pixels 16",
}


@dataclass
class Row:
    """A task: where its values are, and which of the methods are ours."""

    task: str
    data: str
    split: str
    metric: str
    files: str  # as in COMMANDS
    value: str  # column
    ours: str  # method
    baselines: list[str]
    keep: str = ""  # query of rows
    method: str = "method"  # column of methods
    ceiling: str = ""  # method, or column
    less: bool = False  # less is better
    others: str = ""  # a file with rows of other methods, where it exists


ROWS = [
    Row(
        "expression from histology", "her2st", "each of C2-C5 from the four others (three of its donor)", "Pearson, 50 genes",
        "her2st-10k", "pearson", "STFlow default",
        ["ridge", "ridge + smoothing", "ridge, z-scores per section + smoothing", "MLP + smoothing", "deterministic twin",
         "STFlow paper preset", "no context (k=0)", "depth only (true counts)", "position only (siblings registered)"],
        "section != 'B4'", ceiling="ceiling",
    ),
    Row(
        "expression from histology", "her2st", "B4 from C2-C5 (another donor)", "Pearson, 50 genes", "her2st-10k", "pearson",
        "STFlow default", ["ridge", "ridge + smoothing", "ridge, z-scores per section", "MLP + smoothing", "deterministic twin",
                           "depth only (true counts)"], "section == 'B4'", ceiling="ceiling",
    ),
    Row(
        "expression from histology", "mouse olfactory bulb", "each of three sections from the others", "Pearson, 50 genes",
        "mouse_olfactory_bulb-10k", "pearson", "STFlow default",
        ["ridge", "ridge + smoothing", "ridge, z-scores per section + smoothing", "MLP + smoothing", "deterministic twin",
         "STFlow paper preset"], ceiling="ceiling",
    ),
    Row(
        "biomarker genes", "her2st", "each of C2-C5 from the four others (three of its donor)",
        "Pearson, GATA3, ERBB2, UBE2C, VWF", "her2st-markers", "markers", "STFlow default",
        ["ridge", "ridge + smoothing", "ridge, z-scores per section + smoothing", "MLP + smoothing", "depth only (true counts)",
         "position only (siblings registered)"], "section != 'B4'", ceiling="ceiling of markers",
    ),
    Row(
        "biomarker genes", "her2st", "B4 from C2-C5 (another donor)", "Pearson, GATA3, ERBB2, UBE2C, VWF", "her2st-markers",
        "markers", "STFlow default",
        ["ridge", "ridge + smoothing", "ridge, z-scores per section", "MLP + smoothing", "depth only (true counts)"],
        "section == 'B4'", ceiling="ceiling of markers",
    ),
    Row(
        "image -> gene", "Xenium pancreas", "x < 16500 to x > 19500", "Pearson, 50 genes", "embedding-pancreas", "test",
        "SPATIA image, cell + niche",
        ["CNN, supervised", "CNN, supervised + neighbours", "hand features + neighbours",
         "SPATIA image, self-supervised (no genes), cell", "untrained SPATIA, image, cell"], "task == 'image to expression'",
    ),
    Row(
        "gene -> image retrieval", "Xenium pancreas", "x > 19500, among 1,000", "first ten", "embedding-pancreas", "top 10",
        "SPATIA", ["untrained"], "task == 'retrieval among 1,000'",
    ),
    Row(
        "annotation", "Xenium pancreas", "x < 16500 to x > 19500, labels of whole-slide clusters", "macro F1",
        "embedding-pancreas", "macro F1", "SPATIA fused, cell",
        ["all genes", "PCA of genes and of image features, side by side", "SPATIA genes, cell"],
        "task == 'annotation and clusters'",
    ),
    Row(
        "annotation", "STARmap", "two mice to the third", "macro F1, 15 types", "embedding-starmap", "type F1", "SPATIA cell",
        ["genes", "genes, own", "PCA", "genes + neighbours", "scVI", "BANKSY-style 0.2"],
    ),
    Row(
        "clustering", "Xenium pancreas", "x > 19500, against whole-slide clusters", "ARI", "embedding-pancreas", "ARI",
        "SPATIA fused, cell", ["PCA of genes", "PCA of genes and of image features, side by side"],
        "task == 'annotation and clusters'",
    ),
    Row(
        "domains", "STARmap", "two mice to the third", "macro F1, 4 layers", "embedding-starmap", "layer F1", "SPATIA tissue",
        ["genes + neighbours", "genes + neighbours, own", "PCA + neighbours", "PCA + neighbours, own", "neighbours",
         "neighbours, own", "scVI + neighbours (as CellCharter)", "BANKSY-style 0.8"],
    ),
    Row(
        "domains", "STARmap", "two mice to the third, no labels", "ARI, 4 layers", "embedding-starmap", "layer ARI",
        "SPATIA niche", ["neighbours", "neighbours' scVI", "BANKSY-style 0.8", "neighbours, own"],
    ),
    Row(
        "imputation without reference", "Xenium pancreas", "model of x < 16500, genes hidden at x > 19500", "Pearson, 219 genes",
        "imputation-known", "r", "trained model", ["SPATIA's decoder, niche", "SPATIA's decoder, cell"],
    ),
    Row(
        "imputation with reference", "Xenium pancreas", "reference x < 16500, query x > 19500", "Pearson, 219 genes",
        "imputation-pancreas", "r", "ours, checked in the query",
        ["ridge, 50 components + neighbors", "ridge, genes + neighbors' genes",
         "ridge, genes + neighbors' genes + image, 0.15 of a column", "flow matching head", "perceptron, deterministic twin",
         "kNN in 50 components", "depth only"], ceiling="ceiling",
    ),
    Row(
        "imputation with reference", "STARmap", "two mice to the third", "Pearson, all genes", "imputation-starmap", "r",
        "ours, checked in the query",
        ["ridge, 50 components + neighbors", "ridge, genes + neighbors' genes", "flow matching head",
         "perceptron, deterministic twin", "kNN in 50 components", "depth only", "gimVI", "Tangram"], ceiling="ceiling",
        others="imputation-others",
    ),
    Row(
        "imputation with reference", "mouse olfactory bulb", "two sections to the third", "Pearson, genes in > 2 % of spots",
        "imputation-bulb", "r", "ours, checked in the query",
        ["ridge, 50 components", "ridge, 50 components + neighbors", "ridge, genes + neighbors' genes", "flow matching head",
         "perceptron, deterministic twin", "kNN in 50 components", "depth only"], ceiling="ceiling",
    ),
    Row(
        "phenotype generation (cell)", "Xenium pancreas, tumour cells", "x < 16500 to x > 19500", "KID (less is better)",
        "morphology-pancreas", "KID", "generated, heun 10",
        ["copy of the source", "source, histogram of the target", "generated, noise", "nearest training target",
         "generated, unweighted", "generated, nospace"], "transition == 'MKI67/UBE2C -> COL17A1/SERPINB3'",
        ceiling="training targets", less=True,
    ),
    Row(
        "phenotype generation (niche)", "simulated tissue, tiles", "another slide", "share of the change of mean nuclear area",
        "morphology-tiles", "share shown", "", [], "feature == 'mean_area_um2'",
    ),
    Row(
        "spatial effect recovery", "simulated tissue", "another slide",
        "error of the planted change, area and elongation, niches (less is better)", "morphology-simulated", "off by",
        "with context", ["without context"], method="context", less=True,
    ),
]  # fmt: skip


def read(row: Row) -> pd.DataFrame | None:
    """Rows of a task's files, with a column of seeds: one file a seed where they have none."""
    exact = RESULTS / f"{row.files}.csv"
    one_each = f"{row.files}-seed*.csv" if exact.exists() else f"{row.files}-*.csv"
    paths = [*([exact] if exact.exists() else []), *sorted(RESULTS.glob(one_each))]
    if not paths:
        return None
    if row.others and (others := RESULTS / f"{row.others}.csv").exists():
        paths.append(others)
    table = pd.concat([pd.read_csv(path).assign(file=i) for i, path in enumerate(paths)])
    if "seed" not in table:
        table["seed"] = table["file"]
    table = table.query(row.keep).copy() if row.keep else table
    if row.method not in table:
        table[row.method] = ""
    switch = {"True": f"with {row.method}", "False": f"without {row.method}"}
    return table.assign(**{row.method: table[row.method].astype(str).replace(switch)})


def value(table: pd.DataFrame, row: Row, method: str) -> str:
    """Mean over seeds, with the standard deviation between them."""
    some = table[table[row.method] == method]
    by_seed = some.groupby("seed")[row.value].mean().dropna()
    if f"{row.value}, sd of seeds" in some and len(by_seed):  # a row that is a mean of seeds already
        n = int(some["seeds"].iloc[0]) if "seeds" in some else 1
        spread = f" ± {some[f'{row.value}, sd of seeds'].iloc[0]:.3f}" if n > 1 else ""
        return f"{by_seed.mean():.3f}{spread} ({n})"
    if by_seed.empty:
        return "not measured"
    spread = f" ± {by_seed.std():.3f}" if len(by_seed) > 1 and by_seed.std() > 5e-4 else ""
    return f"{by_seed.mean():.3f}{spread} ({len(by_seed)})"


def seconds(table: pd.DataFrame, row: Row) -> str:
    """Seconds of a run of ours, where its file tells."""
    ours = table[table[row.method] == row.ours]
    for name in ("seconds", "seconds, all folds", "seconds to train"):
        if name in ours and ours[name].notna().any():
            return f"{ours[name].mean():.0f}"
    return ""


def spent(files: str) -> tuple[float, float]:
    """Seconds and GB of ``--refit``: everything that makes the files, baselines and all seeds."""
    refit = RESULTS / "refit.csv"
    known = pd.read_csv(refit).set_index("file")[["seconds", "peak_gb"]] if refit.exists() else pd.DataFrame()
    return tuple(known.loc[files]) if files in known.index else (float("nan"), float("nan"))


def number(x: float, digits: int) -> str:
    return "" if pd.isna(x) else f"{x:.{digits}f}"


def line(row: Row) -> list[str]:
    """A row of the table."""
    table, command = read(row), f"`{COMMANDS[row.files].split(' && ')[-1]}`"
    head = [row.task, row.data, row.split, row.metric]
    if table is None or not (table[row.method] == row.ours).any():
        return [*head, "not measured", "", "", "", "", "", command]
    baselines = [f"{name}: {value(table, row, name)}" for name in row.baselines if (table[row.method] == name).any()]
    ceiling = ""
    if row.ceiling:
        ceiling = f"{table[row.ceiling].mean():.3f}" if row.ceiling in table else value(table, row, row.ceiling)
    ours = (f"{row.ours}: " if row.ours else "") + value(table, row, row.ours)
    whole, memory = spent(row.files)
    memory = table["peak_gb"].max() if "peak_gb" in table else memory
    cost = [seconds(table, row), number(whole, 0), number(memory, 1)]
    return [*head, ours, "; ".join(baselines), ceiling, *cost, command]


def scores() -> pd.DataFrame:
    """The numbers of the table, a row a task and method, for :func:`spatiaflow.pl.benchmark`."""
    out = []
    for row in ROWS:
        found = read(row)
        if found is None or not row.baselines or not (found[row.method] == row.ours).any():
            continue
        ceiling = found[row.ceiling].mean() if row.ceiling in found else float("nan")
        task = f"{row.task}, {row.data}" + (", another donor" if "another donor" in row.split else "")
        task += ", no labels" if "no labels" in row.split else ""
        for name in (row.ours, *row.baselines):
            some = found[found[row.method] == name]
            by_seed, mean_of_seeds = some.groupby("seed")[row.value].mean(), f"{row.value}, sd of seeds"
            out.append({
                "task": task, "metric": row.metric, "method": "ours" if name == row.ours else name, "value": by_seed.mean(),
                "std": some[mean_of_seeds].iloc[0] if mean_of_seeds in some else by_seed.std(), "ceiling": ceiling,
                "less": row.less,
            })  # fmt: skip
    return pd.DataFrame(out)


def table() -> str:
    """The table in Markdown."""
    names = [
        "task",
        "data",
        "split",
        "metric",
        "ours (seeds)",
        "baselines (seeds)",
        "ceiling",
        "seconds of ours, once",
        "seconds of --refit",
        "GB",
        "command",
    ]
    rows = [line(row) for row in ROWS]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (names, ["---"] * len(names), *rows))


def run(commands: dict[str, str], results: Path) -> None:
    """Run commands one after the other; they write into ``results``, and ``refit.csv`` there says how long each took."""
    file, rows = results / "refit.csv", {}
    if file.exists():  # what is not run now stays
        known = pd.read_csv(file).drop(columns=["command", "version", "date"])
        rows = {row["file"]: row for row in known.to_dict("records")}
    for name, command in commands.items():
        for old in results.glob(f"{name}-*-[0-9]-*.*"):  # runs of expression.py, which leaves alone what is there
            old.unlink()
        start, where, failed, peak = time.perf_counter(), os.environ | {"SPATIAFLOW_RESULTS": str(results)}, False, 0.0
        for one in command.split(" && "):
            if not failed:
                process = subprocess.Popen([sys.executable, *shlex.split(one)[1:]], env=where)
                _, status, used = os.wait4(process.pid, 0)
                failed, peak = status != 0, max(peak, used.ru_maxrss / 2**20)
        seconds = time.perf_counter() - start
        today = time.strftime("%Y-%m-%d")
        rows[name] = {"file": name, "ran": command, "on": today, "seconds": seconds, "failed": failed, "peak_gb": peak}
        writing.write("refit", list(rows.values()))
    now = [rows[name] for name in commands]
    print(f"{sum(row['seconds'] for row in now):.0f} s in all, {sum(row['failed'] for row in now)} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--refit", nargs="*", metavar="FILE", choices=list(COMMANDS))
    a = parser.parse_args()
    if a.quick:
        RESULTS = writing.RESULTS = Path(tempfile.mkdtemp(prefix="spatiaflow-benchmarks-"))
        run(QUICK, RESULTS)
        print(table())
        raise SystemExit
    if a.refit is not None:
        run({name: COMMANDS[name] for name in a.refit or COMMANDS}, RESULTS)
    TABLE.write_text(table(), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))
    found = scores()
    if len(found):
        import spatiaflow as sf

        figure = sf.pl.benchmark(found, ours="ours", show=False, return_fig=True)
        figure.savefig(TABLE.parent / "images" / "benchmark.png", dpi=160, bbox_inches="tight")
