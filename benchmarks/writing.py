"""One CSV a question, with the command, version and date in every row."""

import datetime
import os
import resource
import sys
from pathlib import Path

import pandas as pd

import spatiaflow as sf

RESULTS = Path(os.environ.get("SPATIAFLOW_RESULTS", Path(__file__).parent / "results"))


def write(name: str, rows: list[dict]) -> None:
    """Write rows to ``results/name.csv``, with the largest memory of the process so far where they tell none, and print them."""
    script, *words = sys.argv
    command = " ".join([Path(script).name] + [Path(w).name if Path(w).is_absolute() else w for w in words])
    table = pd.DataFrame(rows)
    if "peak_gb" not in table:
        table["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stamped = table.assign(command=command, version=sf.__version__, date=datetime.date.today().isoformat())
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamped.to_csv(RESULTS / f"{name}.csv", index=False)
    print(table.round(4).to_string(index=False), flush=True)
