"""Whether clusters that were found in several objects mean the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from anndata import AnnData

from spatiaflow._io._tables import as_text, entry


def fingerprint(*arrays: np.ndarray) -> str:
    """What ``params["found_sha256"]`` holds: equal for the clusters of one run alone, and where they were carried from it."""
    out = hashlib.sha256()
    for array in arrays:
        out.update(np.ascontiguousarray(array).tobytes())
    return out.hexdigest()


def found_by(table: AnnData, key: str) -> str:
    """The fingerprint of the run that found the clusters in ``obs[key]``; "" where it is unknown.

    A user who has renamed clusters knows what they are: only the numbers that a run gives need the run.
    """
    if key not in table.obs or not all(name.isdigit() for name in {*as_text(table.obs[key])} - {""}):
        return ""
    return str(entry(table, key).get("params", {}).get("found_sha256", ""))


def found_apart(tables: Mapping[str, AnnData], key: str) -> tuple[str, str] | None:
    """Two objects whose clusters were found in different runs, so that equal names have nothing in common."""
    known = {name: found for name, table in tables.items() if (found := found_by(table, key))}
    first = next(iter(known), "")
    other = next((name for name in known if known[name] != known[first]), None)
    return None if other is None else (first, other)
