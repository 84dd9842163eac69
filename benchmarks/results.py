"""Measurements of the benchmarks: one long CSV a script, a row a measurement.

``results/SCRIPT.csv`` has the columns ``data, split, seed, method, metric, value, command, version, date``. The first five
name a measurement: no two rows share them. Measuring again replaces the row.

data     the data set, and after a colon what is special about it: ``her2st``, ``her2st:markers``
split    what is scored: a held-out section or mouse, ``test``, a band of the slide, a niche
seed     of the training; empty where nothing is drawn; ``mean`` of a mean over seeds
method   ``ceiling`` is the noise ceiling; ``run`` is the process as a whole
metric   ``r minus METHOD`` is a paired difference; ``..., low`` and ``..., high`` are the ends of a 95 % interval
"""

import argparse
import datetime
import fcntl
import functools
import os
import resource
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

import spatiaflow as sf

KEY = ["data", "split", "seed", "method", "metric"]
COLUMNS = [*KEY, "value", "command", "version", "date"]
DIGITS = 6  # significant, of a value


def folder() -> Path:
    """Where the CSVs are: ``SPATIAFLOW_RESULTS``, or ``benchmarks/results``."""
    return Path(os.environ.get("SPATIAFLOW_RESULTS", Path(__file__).parent / "results"))


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with ``--again``."""
    out = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--again", action="store_true", help="measure anew what the CSV holds")
    return out


def command() -> str:
    """The command of this process, without folders of this machine."""
    script, *words = sys.argv
    words = [Path(word).name if Path(word).is_absolute() else word for word in words if word != "--again"]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])


def peak_gb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_gb() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def read(script: str) -> pd.DataFrame:
    """Rows of a script; seeds are words."""
    file = folder() / f"{script}.csv"
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS).astype({"value": float})
    return parsed(file, file.stat().st_mtime_ns, file.stat().st_ino).copy()


@functools.lru_cache(maxsize=32)
def parsed(file: Path, *_version: int) -> pd.DataFrame:
    """What a file says, read once."""
    words = {name: str for name in COLUMNS if name != "value"}
    return pd.read_csv(file, dtype=words | {"value": float}, keep_default_na=False)[COLUMNS]


def rewrite(script: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Write what ``change`` makes of the rows. The file is whole at any time, also beside other processes."""
    folder().mkdir(parents=True, exist_ok=True)
    lock = os.open(folder(), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary = folder() / f".{script}.csv.tmp"
        change(read(script)).to_csv(temporary, index=False, float_format=f"%.{DIGITS}g")
        temporary.replace(folder() / f"{script}.csv")
    finally:
        os.close(lock)


def append(script: str, rows: pd.DataFrame) -> None:
    """Write rows; those of the same key are replaced."""

    def change(known):
        merged = pd.concat([known, rows[COLUMNS]]) if len(known) else rows[COLUMNS]
        return merged[~merged.duplicated(KEY, keep="last")]

    rewrite(script, change)


def drop(script: str, **where) -> None:
    """Remove the rows that :func:`select` finds."""
    rewrite(script, lambda known: known.drop(select(known, **where).index))


def select(rows: pd.DataFrame, **where) -> pd.DataFrame:
    """Rows whose columns have a value, or one of several."""
    keep = np.ones(len(rows), bool)
    for column, wanted in where.items():
        wanted = [wanted] if isinstance(wanted, str | int) else wanted
        keep &= rows[column].isin([str(one) for one in wanted]).to_numpy()
    return rows[keep]


def pivot(rows: pd.DataFrame, index="method", columns="metric", how="mean") -> pd.DataFrame:
    """A wide table, by default of the means over all other columns, in the order of the rows."""
    return rows.pivot_table("value", index, columns, aggfunc=how, sort=False)


class Table:
    """The CSV of a script, as the script fills it."""

    def __init__(self, script: str, *, again: bool = False):
        self.script, self.again, self.added = script, again, set()
        self.command = command()

    def lacks(self, data: str, split: str, seed: int | str, methods: str | Iterable[str], metric: str = "") -> bool:
        """Whether one of the methods is still to be measured, by any metric or by one."""
        methods = {methods} if isinstance(methods, str) else set(methods)
        known = (
            self.added if self.again else self.added | set(read(self.script)[KEY].itertuples(index=False, name=None))
        )
        where = data, split, str(seed)
        return bool(methods - {key[3] for key in known if key[:3] == where and metric in ("", key[4])})

    def add(self, data: str, split: str, seed: int | str, method: str, scores: Mapping[str, float]) -> None:
        """Write the metrics of a method. What is not finite is not written."""
        key, today = (data, split, str(seed), method), datetime.date.today().isoformat()
        rows = [
            (*key, metric, float(value), self.command, sf.__version__, today)
            for metric, value in scores.items()
            if np.isfinite(value)
        ]
        append(self.script, pd.DataFrame(rows, columns=COLUMNS))
        self.added |= {row[:5] for row in rows}
        print(*(part for part in key if part), *(f"{row[4]} {row[5]:.4g}" for row in rows), sep=" | ", flush=True)

    def add_all(self, data: str, split: str, seed: int | str, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Write the metrics of several methods."""
        for method, found in scores.items():
            self.add(data, split, seed, method, found)

    def add_run(self, data: str, split: str, seed: int | str = "", **scores: float) -> None:
        """Write what the process as a whole took, if it measured anything."""
        if self.added:
            self.add(data, split, seed, "run", {"peak_gb": peak_gb(), **scores})
