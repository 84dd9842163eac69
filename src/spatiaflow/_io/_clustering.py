"""Which run of clustering the labels of a table come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from anndata import AnnData

from spatiaflow._io._tables import as_text, entry


def fingerprint(*arrays: np.ndarray) -> str:
    """What ``params["clustering_sha256"]`` holds: equal only for clusters of one run, or carried from it."""
    out = hashlib.sha256()
    for array in arrays:
        out.update(np.ascontiguousarray(array).tobytes())
    return out.hexdigest()


def clustering_of(table: AnnData, key: str) -> str:
    """Return the fingerprint of the run that wrote the clusters in ``obs[key]``, or "" if it is unknown.

    Clusters that the user has renamed are not checked: a number means nothing without its run, a name does.
    """
    if key not in table.obs or not all(name.isdigit() for name in {*as_text(table.obs[key])} - {""}):
        return ""
    return str(entry(table, key).get("params", {}).get("clustering_sha256", ""))


def different_clusterings(tables: Mapping[str, AnnData], key: str) -> tuple[str, str] | None:
    """Return two objects whose clusters come from separate runs, if there are any: equal numbers do not mean the same there."""
    known = {name: found for name, table in tables.items() if (found := clustering_of(table, key))}
    first = next(iter(known), "")
    other = next((name for name in known if known[name] != known[first]), None)
    return None if other is None else (first, other)
