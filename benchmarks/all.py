"""Every task of the two papers in one table and one figure, from what the other benchmarks measured.

    python benchmarks/all.py                    writes the table and the figure of docs/benchmarks.md: seconds
    python benchmarks/all.py --quick            runs what needs no pancreas slide at small settings, into a folder of its own,
                                                and prints the table of that: minutes; scores mean nothing, all of it has to run
    python benchmarks/all.py --refit [NAME ...] measures everything anew, or what is named, and how long it took: hours

The pancreas slide is ``pancreas.zarr``, here (``benchmarks/pancreas.py`` assembles it). Its embeddings are kept in
``features`` and trained variants in ``runs``, and used again where they are there: remove both to begin at nothing.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

import results
from spatiaflow.models.members import NAMES

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FIGURE = PAGE.parent / "images" / "benchmark.png"
BEGIN, END = "<!-- table: python benchmarks/all.py -->\n", "<!-- end of the table -->\n"
COMMANDS = {
    "her2st-10k": "python benchmarks/expression.py --data her2st --seeds 3 && python benchmarks/expression.py --table",
    "her2st-markers": (
        'python benchmarks/expression.py --data her2st --convention markers --seeds 3 --methods "STFlow default" && '
        "python benchmarks/expression.py --table"
    ),
    "mouse_olfactory_bulb-10k": (
        "python benchmarks/expression.py --data mouse_olfactory_bulb --seeds 1 && "
        'python benchmarks/expression.py --data mouse_olfactory_bulb --seeds 3 --methods "STFlow default" && '
        "python benchmarks/expression.py --table"
    ),
    "glass": "python benchmarks/glass.py",
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
    "confidence": (
        "python benchmarks/confidence.py pancreas --store pancreas.zarr --cache features && "
        "python benchmarks/confidence.py starmap"
    ),
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
    "niches": "python benchmarks/niches.py simulated starmap && python benchmarks/niches.py pancreas --store pancreas.zarr",
    "niches-others": "python benchmarks/niches.py others",
    "editing": (
        "python benchmarks/morphology_weights.py pancreas.zarr --cache features --variants genes --seeds 0 1 2 --folder runs "
        "--epochs 10 --like src/spatiaflow/datasets/weights/morphology-pancreas-small.safetensors && "
        "python benchmarks/editing.py --store pancreas.zarr --cache features --folder runs --draws 200 && "
        "python benchmarks/morphology_weights.py pancreas.zarr --cache features --variants genes --seeds 0 1 2 "
        "--folder runs-band --without-band --epochs 10 "
        "--like src/spatiaflow/datasets/weights/morphology-pancreas-small.safetensors && "
        "python benchmarks/editing.py --store pancreas.zarr --cache features --folder runs-band --part band --draws 200 "
        "--strengths 0.5"
    ),
    "joint": "python benchmarks/joint.py",
    "threads": "python benchmarks/threads.py",
}
QUICK = {  # the same in minutes, and no pancreas
    "her2st-10k": 'python benchmarks/expression.py --sections C2 --seeds 1 --methods "STFlow default" --epochs 2 --threads 1',
    "glass": "python benchmarks/glass.py --sections C2 --epochs 2",
    "embedding-simulated": "python benchmarks/embedding.py simulated --seeds 1 --epochs 1",
    "imputation-starmap": "python benchmarks/imputation.py starmap --seeds 1 --folds 1 --only BZ5",
    "morphology-simulated": "python benchmarks/morphology.py simulated --seeds 1 --train 1500 --test 1500 --epochs 1 --pixels 16",
    "morphology-tiles": "python benchmarks/morphology.py tiles --seeds 1 --train 2000 --test 1500 --epochs 1 --pixels 16",
    "joint": "python benchmarks/joint.py --tasks her2st --seeds 1 --epochs 1",
    "threads": "python benchmarks/threads.py --only STFlow --threads 1 --rounds 1 --patience 0",
}
DONOR, OTHER_DONOR = ["C2", "C3", "C4", "C5"], ["B4"]
IMAGE_ONLY = [
    "kNN retrieval", "ridge", "ridge + smoothing", "ridge, z-scores per section", "ridge, z-scores per section + smoothing",
    "MLP", "MLP + smoothing",
]  # fmt: skip
AROUND = ["genes + neighbours", "PCA + neighbours", "neighbours", "scVI + neighbours (as CellCharter)", "neighbours' scVI",
          "BANKSY-style 0.2", "BANKSY-style 0.8"]  # fmt: skip
BY_MOUSE = [f"{name}, own" for name in ("genes", "PCA", *AROUND) if "scVI" not in name]
NICHES = ["genes", "PCA", "scVI", *AROUND, *BY_MOUSE]
IMPUTATION = [
    "training mean", "depth only", "kNN in 50 components", "ridge, 50 components", "ridge, 50 components + neighbors",
    "ridge, genes", "ridge, genes + neighbors' genes", "flow matching head", "perceptron, deterministic twin",
]  # fmt: skip
WITH_IMAGE = [f"ridge, genes + neighbors' genes + image, {w} of a column" for w in (0.05, 0.15)]
LAWS = ["constant marginal", "ridge with residuals of left-out blocks", "flow matching head"]
NICHE_PEERS = [
    f"{name}{note}" for name in ("CellCharter", "BANKSY", "Novae") for note in ("", ", tuned", ", number chosen")
]
IMPUTATION_PEERS = ["gimVI", "Tangram", "SpaGE", "SpaGE, tuned"]
IMAGES = [
    "copy of the source",
    "nearest training target",
    "OT-matched training target",
    "mean shift of latents",
    "linear map",
]
TUMOUR, FIBROBLASTS = "MKI67/UBE2C -> COL17A1/SERPINB3", "SFRP4/LTBP2 -> COL5A2/THBS2"
DUCTS = "ACE2/ANPEP -> CXCL6/CFTR"


@dataclass
class Row:
    """A task on a data set: where its measurements are, and which methods are ours and which are simple."""

    task: str
    data: str
    score: str  # in words
    script: str
    where: dict  # of the rows of the script
    metric: str
    ours: str
    simple: list[str]
    ceiling: str = "ceiling"  # method
    less: bool = False  # less is better
    paired: str = ""  # split where the difference was measured, if over several at once
    over: str = "seeds"  # else the interval is over these: seeds, or what a split is
    columns: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # a name -> method, metric and script, where they differ
    known: dict[str, float] = field(default_factory=dict)  # a method -> what it has by definition


STFLOW, IMPUTED = "STFlow default", "ours, checked in the query"
TEST = {"data": "pancreas", "split": "test"}
MICE, BULBS = ["BZ5", "BZ9", "BZ14"], ["MOB1", "MOB2", "MOB3"]
CONFIDENCE = ["one confidence for all", "without temperature"]
GENES = ["all genes", "PCA of genes", "PCA of genes and of image features, side by side"]
SPREAD = {"training distribution": (STFLOW, "crps_marginal"), "ridge with residuals": (STFLOW, "crps_ridge")}
SAME, OTHER = "her2st, sections of one donor", "her2st, another donor"
PATTERNS = [
    (SAME, "her2st", DONOR), ("her2st, a new donor", "donors", ["A1", "B4", *DONOR]),
    ("Visium, lung", "lung", ["A1", "B1", "C1"]), ("Visium, brain", "brain", ["A1", "B1"]),
    ("Visium, kidney", "kidney", ["B1", "C1"]),
]  # fmt: skip


def imputed(data: str, where: dict, more: list[str], **options) -> Row:
    return Row(
        "imputation from a reference",
        data,
        "Pearson",
        "imputation",
        where,
        "pearson",
        IMPUTED,
        [*IMPUTATION, *more],
        **options,
    )


def generated(task: str, transition: str, split: str = "test") -> Row:
    where = {"data": f"pancreas:{transition}", "split": split}
    return Row(task, "pancreas", "KID", "editing", where, "KID", "default", IMAGES, "training targets", less=True)


def as_embedded(metric: str, methods: list[str]) -> dict[str, tuple[str, ...]]:
    """Simple methods that the benchmark of embeddings measured."""
    return {name: (name, metric, "embedding") for name in methods}


ROWS = [
    Row("expression from histology", SAME, "Pearson", "expression", {"data": "her2st", "split": DONOR}, "pearson50", STFLOW,
        IMAGE_ONLY, paired="C2-C5"),
    Row("expression from histology", OTHER, "Pearson", "expression", {"data": "her2st", "split": ["B4"]}, "pearson50", STFLOW,
        IMAGE_ONLY, paired="B4"),
    Row("expression from histology", "olfactory bulb", "Pearson", "expression",
        {"data": "mouse_olfactory_bulb", "split": BULBS}, "pearson50", STFLOW, IMAGE_ONLY, paired="all"),
    *(Row("pattern given the depth", name, "partial r", "joint", {"data": data, "split": sections}, "partial", STFLOW, [*NAMES],
          over="sections") for name, data, sections in PATTERNS),
    Row("four biomarkers", SAME, "Pearson", "expression", {"data": "her2st:markers", "split": DONOR}, "pearson:markers", STFLOW,
        IMAGE_ONLY, over="sections"),
    Row("four biomarkers", OTHER, "Pearson", "expression", {"data": "her2st:markers", "split": ["B4"]}, "pearson:markers",
        STFLOW, IMAGE_ONLY),
    Row("uncertainty of expression", SAME, "CRPS", "expression", {"data": "her2st", "split": DONOR}, "crps", STFLOW, [*SPREAD],
        less=True, over="sections", columns=SPREAD),
    Row("regions of nine spots", SAME, "energy", "joint", {"data": "her2st", "split": DONOR}, "energy 9 spots", STFLOW,
        ["independent", "gene copula"], less=True, over="sections"),
    Row("regions of nine spots", "her2st, a new donor", "energy", "joint", {"data": "donors", "split": ["A1", "B4", *DONOR]},
        "energy 9 spots", STFLOW, ["independent", "gene copula"], less=True, over="sections"),
    *(Row("regions of nine spots", f"Visium, {tissue}", "energy", "joint", {"data": tissue}, "energy 9 spots", STFLOW,
          ["independent", "gene copula"], less=True, over="sections") for tissue in ("lung", "brain", "kidney")),
    Row("image to genes", "pancreas", "Pearson", "embedding", TEST, "pearson50", "SPATIA image, cell + niche",
        ["hand features", "hand features + neighbours", "CNN, supervised", "CNN, supervised + neighbours"]),
    Row("image found by genes", "pancreas", "share in first 10", "embedding", TEST, "top 10", "SPATIA", ["untrained"]),
    Row("cell types", "pancreas", "macro F1", "embedding", TEST, "macro F1", "SPATIA fused, cell", GENES),
    Row("cell types", "STARmap", "macro F1", "niches", {"data": "starmap", "split": MICE}, "type F1", "annotate, genes", NICHES,
        over="mice", columns=as_embedded("type F1", NICHES)),
    Row("confidence of labels", "pancreas", "Brier", "confidence", {"data": "pancreas"}, "Brier", "annotate", CONFIDENCE,
        less=True),
    Row("confidence of labels", "STARmap", "Brier", "confidence", {"data": "starmap"}, "Brier", "annotate", CONFIDENCE,
        less=True, over="mice"),
    Row("clusters of cells", "pancreas", "ARI", "niches", TEST, "cluster ARI", "cluster_cells", GENES,
        columns=as_embedded("ARI", GENES)),
    Row("layers", "STARmap", "macro F1", "niches", {"data": "starmap", "split": MICE}, "layer F1", "niche level, linear probe",
        NICHES, over="mice", columns=as_embedded("layer F1", NICHES)),
    Row("layers, without labels", "STARmap", "ARI", "niches", {"data": "starmap", "split": MICE}, "layer ARI",
        "cluster_niches, number chosen", [*NICHES, *NICHE_PEERS], over="mice", columns=as_embedded("layer ARI", NICHES)),
    Row("imputation by a saved model", "pancreas", "Pearson", "imputation", {"data": "pancreas:known", "split": "test"},
        "pearson", "trained model", ["SPATIA's decoder, cell", "SPATIA's decoder, niche", "SPATIA's decoder, tissue"]),
    imputed("pancreas", TEST, WITH_IMAGE),
    imputed("STARmap", {"data": "starmap", "split": MICE}, IMPUTATION_PEERS, over="mice"),
    imputed("olfactory bulb", {"data": "mouse_olfactory_bulb", "split": BULBS}, []),
    Row("uncertainty of imputed genes", "pancreas", "CRPS", "imputation", {"data": "pancreas"}, "CRPS", "ours", LAWS, less=True,
        over="folds"),
    Row("uncertainty of imputed genes", "STARmap", "CRPS", "imputation", {"data": "starmap"}, "CRPS", "ours", LAWS, less=True,
        over="folds"),
    generated("generated tumour cells", TUMOUR),
    generated("generated fibroblasts", FIBROBLASTS),
    generated("generated duct cells", DUCTS, "band"),
    Row("generated tiles", "simulated tissue", "share of the change", "morphology",
        {"data": "simulated:tiles", "split": "mean_area_um2"}, "share shown", "generated", ["copy of the source"],
        known={"copy of the source": 0.0}),
    Row("change by niche", "simulated tissue", "error of the change", "morphology", {"data": "simulated:state by niche"},
        "off by", "with context", ["without context"], less=True),
]  # fmt: skip


ENDS = ["middle", "low", "high"]
VERDICTS = ["better", "level", "worse", "not tested", "not measured"]


@dataclass
class Line:
    """What the table says of a task."""

    row: Row
    ours: float
    spread: float  # standard deviation between seeds
    best: str  # simple method
    theirs: float
    difference: float  # above 0: ours is better
    low: float
    high: float
    over: str  # what the interval is over
    ceiling: float

    @property
    def verdict(self) -> str:
        if not np.isfinite(self.low):
            return "not tested"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "level"


def values(row: Row, method: str) -> pd.DataFrame:
    """What a method has, by split and seed."""
    name, metric, *script = row.columns.get(method, (method, row.metric))
    rows = results.select(results.read(*(script or [row.script])), **row.where, method=name, metric=metric)
    return rows[["split", "seed", "value"]]


def mean(row: Row, method: str) -> float:
    """Mean over splits of the means over seeds; where the mean over seeds is what was measured, that."""
    if method in row.known:
        return row.known[method]
    found = values(row, method)
    if (found["seed"] == "mean").any():
        found = found[found["seed"] == "mean"]
    return found.groupby("split")["value"].mean().mean()


def paired(row: Row, best: str) -> pd.DataFrame:
    """Differences that a benchmark measured in pairs, and the ends of their intervals, by split and seed.

    They are ours minus the best simple method, or the other way round; or both minus a third (taken as independent, which makes
    the interval wider than it is); or ours minus the best simple method of each run, if this one was a candidate. Taken is what
    was measured most often.
    """
    where = row.where | ({"split": row.paired} if row.paired else {})
    rows = results.select(results.read(row.script), **where)
    named = rows["metric"].str.extract(r"^(?P<metric>.+) minus (?P<other>.+?)(, (?P<end>low|high))?$")
    rows = rows.assign(**named[["metric", "other", "end"]].fillna("middle"))
    rows = results.select(rows, metric=row.metric)

    def minus(method, others, by=("split", "seed")):
        found = results.select(rows, method=method, other=others)
        return found.pivot_table("value", by, "end", sort=False).reindex(columns=ENDS)

    a, b = (minus(method, row.simple, ["split", "seed", "other"]) for method in (row.ours, best))
    a, b = a.align(b, join="inner", axis=0)
    apart = (
        np.hypot(a["middle"] - a["low"], b["high"] - b["middle"]),
        np.hypot(a["high"] - a["middle"], b["middle"] - b["low"]),
    )
    middle = a["middle"] - b["middle"]
    third = (
        pd.DataFrame(dict(zip(ENDS, (middle, middle - apart[0], middle + apart[1])))).groupby(["split", "seed"]).mean()
    )
    reverse = -minus(best, [row.ours, "ours"]).set_axis([ENDS[0], ENDS[2], ENDS[1]], axis=1)[ENDS]
    candidate = (rows[["method", "other"]] == best).any(axis=None)
    return max(minus(row.ours, best), reverse, third, minus(row.ours, row.simple if candidate else []), key=len)


def measured(row: Row, best: str) -> tuple[float, float, float] | None:
    """Difference and its interval over blocks of tissue, where a benchmark measured it.

    Of several seeds the mean; of several splits, which are independent, the distances to the ends are added in squares.
    """
    found = paired(row, best).groupby("split").mean()
    if found.empty:
        return None
    if row.less:
        found = -found.set_axis([ENDS[0], ENDS[2], ENDS[1]], axis=1)
    middle = found["middle"].mean()
    below, above = (np.sqrt(((found["middle"] - found[end]) ** 2).sum()) / len(found) for end in ENDS[1:])
    return middle, middle - below, middle + above


def between(row: Row, best: str) -> tuple[float, float, float, str]:
    """Difference and its interval by the t distribution, over splits or over seeds."""
    one, other = (values(row, method) for method in (row.ours, best))
    unit = "seed" if row.over == "seeds" else "split"
    one, other = (found.groupby(unit)["value"].mean() for found in (one, other))
    if best in row.known:
        other = one * 0 + row.known[best]
    pairs = (other - one if row.less else one - other).dropna()
    n, middle = len(pairs), mean(row, row.ours) - mean(row, best)
    half = stats.t.ppf(0.975, n - 1) * pairs.std() / n**0.5 if n > 1 else np.nan
    middle = -middle if row.less else middle
    return middle, middle - half, middle + half, f"{n} {row.over}" if n > 1 else ""


def line(row: Row) -> Line | None:
    """A row of the table; None where nothing is measured."""
    ours = values(row, row.ours)
    candidates = {name: mean(row, name) for name in row.simple}
    candidates = {name: value for name, value in candidates.items() if np.isfinite(value)}
    if ours.empty or not candidates:
        return None
    best = (min if row.less else max)(candidates, key=candidates.get)
    found = measured(row, best)
    *interval, over = (*found, "blocks") if found else between(row, best)
    spread = ours[ours["seed"] != "mean"].groupby("seed")["value"].mean().std()
    ceiling = mean(row, row.ceiling)
    return Line(row, mean(row, row.ours), spread, best, candidates[best], *interval, over, ceiling)


def short(x: float, sign: bool = False) -> str:
    """Three digits, no zero before the point."""
    return "" if not np.isfinite(x) else f"{x:{'+' if sign else ''}.3f}".replace("0.", ".")


def table() -> str:
    """The count of verdicts and the table, in Markdown."""
    found = [(row, line(row)) for row in ROWS]
    verdicts = [one.verdict if one else "not measured" for _, one in found]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS if name in verdicts)
    names = ["task", "data", "score", "ours", "best simple method", "difference [95 %]", "over", "ceiling", "verdict"]
    cells = [names, ["---"] * len(names)]
    for row, one in found:
        head = [row.task, row.data, row.score + (" ↓" if row.less else "")]
        if one is None:
            cells.append([*head, "not measured", "", "", "", "", ""])
            continue
        spread = f" ± {short(one.spread)}" if one.spread > 5e-4 else ""
        interval = f" [{short(one.low, True)}, {short(one.high, True)}]" if one.over else ""
        cells.append([
            *head, short(one.ours) + spread, f"{one.best} {short(one.theirs)}", short(one.difference, True) + interval,
            one.over, short(one.ceiling), one.verdict,
        ])  # fmt: skip
    return (
        f"\nOf {len(ROWS)} comparisons: {counts}.\n\n"
        + "".join("| " + " | ".join(row) + " |\n" for row in cells)
        + "\n"
    )


def figure():
    """Differences in per cent of the simple method, with their intervals; what leaves the picture ends in an arrow."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    reach, colours = 50, {"better": "#0072b2", "level": "0.45", "worse": "#d55e00"}
    lines = [found for found in map(line, ROWS) if found and found.theirs and found.verdict in colours]
    drawing, ax = plt.subplots(figsize=(3.54, 0.19 * len(lines) + 0.6), layout="constrained")
    ax.axvline(0, color="0.6", lw=0.8, zorder=0)
    for y, found in enumerate(lines):
        middle, *ends = (100 * v / abs(found.theirs) for v in (found.difference, found.low, found.high))
        colour = colours[found.verdict]
        ax.axhline(y, color="0.92", lw=0.6, zorder=-1)
        ax.plot(np.clip(ends, -reach, reach), [y, y], color=colour, lw=1.3, solid_capstyle="butt")
        for end in ends:
            if abs(end) > reach:
                ax.plot(np.sign(end) * reach, y, "<" if end < 0 else ">", ms=3.5, color=colour, clip_on=False)
        if abs(middle) <= reach:
            ax.plot(middle, y, "o", ms=3.4, color=colour)
    labels = [f"{found.row.task}, {found.row.data.replace('sections of one donor', 'same donor')}" for found in lines]
    ax.set_yticks(range(len(lines)), labels, fontsize=6)
    ax.set(xlim=(-reach, reach), ylim=(len(lines) - 0.4, -0.6), xticks=(-50, -25, 0, 25, 50))
    ax.tick_params(axis="x", labelsize=6, length=2)
    ax.tick_params(axis="y", length=0, pad=6)
    ax.spines[["left", "top", "right"]].set_visible(False)
    drawing.supxlabel("difference to the best simple method, % of its score", fontsize=6)
    marks = [Line2D([], [], color=colour, marker="o", ms=3.4, lw=1.3, label=name) for name, colour in colours.items()]
    drawing.legend(handles=marks, loc="outside upper right", ncols=3, fontsize=6, frameon=False)
    return drawing


def run(commands: dict[str, str]) -> None:
    """Run commands, each name in an empty folder; its rows replace the known ones when all went well."""
    target, book = results.folder(), results.Table("all", again=True)
    for name, chain in commands.items():
        work = Path(tempfile.mkdtemp(prefix=f"spatiaflow-{name}-"))
        start, where, failed, peak = time.perf_counter(), os.environ | {"SPATIAFLOW_RESULTS": str(work)}, False, 0.0
        for one in chain.split(" && "):
            if not failed:
                process = subprocess.Popen([sys.executable, *shlex.split(one)[1:]], env=where)
                _, status, used = os.wait4(process.pid, 0)
                failed, peak = status != 0, max(peak, used.ru_maxrss / 2**20)
        cost = {"seconds": time.perf_counter() - start, "peak_gb": peak, "failed": failed}
        book.add(name, "refit", "", "run", cost)
        if failed:
            print(f"{name} failed; what it measured is in {work}")
            continue
        for path in work.iterdir():
            if path.suffix == ".csv":
                rows = pd.read_csv(path, dtype=str, keep_default_na=False).astype({"value": float})
                results.append(path.stem, rows)
            else:
                shutil.move(path, target / path.name)
        shutil.rmtree(work)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--quick", action="store_true")
    out.add_argument("--refit", nargs="*", metavar="NAME", choices=list(COMMANDS))
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    if a.quick:
        os.environ["SPATIAFLOW_RESULTS"] = tempfile.mkdtemp(prefix="spatiaflow-benchmarks-")
        run(QUICK)
        print(table())
        raise SystemExit
    if a.refit is not None:
        run({name: COMMANDS[name] for name in a.refit or COMMANDS})
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
    figure().savefig(FIGURE, dpi=160)
    print(table())
