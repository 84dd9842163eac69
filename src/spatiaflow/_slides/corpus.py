"""Slides of many stores, from a manifest. Counts and images stay on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spatiaflow import _io
from spatiaflow._slides.gather import gather, unique_name
from spatiaflow.models.slide import Slide

WHERE = ("table_key", "image_key", "shapes_key", "labels_key", "library_key", "mpp")
COLUMNS = ("store", "tissue", "platform", *WHERE)


def read_corpus(
    manifest: str | Path, *, need: Collection[str] = (), layer: str | None = None, **options: Any
) -> list[Slide]:
    """Return the slides of every store of a manifest.

    Of each cell only its position, its place in the image and a pointer to its counts are held in memory. The rows of the
    table serve as ``obs_names``.

    Parameters
    ----------
    manifest
        CSV with one SpatialData store per row. ``store`` is a path relative to the manifest. Columns that may be empty or
        absent: ``tissue``, ``platform``, ``table_key``, ``image_key``, ``shapes_key``, ``labels_key``, ``library_key`` and
        ``mpp``.
    need, layer, **options
        As for :func:`spatiaflow._slides.gather`.

    Raises
    ------
    ValueError
        The manifest has no rows, no column ``store`` or an unknown column, or counts are not stored as a CSR matrix.
    """
    from spatialdata import read_zarr

    out: list[Slide] = []
    for row in read_manifest(Path(manifest)):
        store, tissue = Path(manifest).parent / row["store"], row.get("tissue", "")
        given: dict[str, Any] = {name: row[name] for name in WHERE if row.get(name)}
        if "mpp" in given:
            given["mpp"] = float(given["mpp"])
        where = _io.Where(**given)
        data = read_zarr(store)
        table = _io.unpack(data, where.table_key)[1]
        genes, counts = tuple(map(str, table.var_names)), None
        if "counts" in need:
            _io.check_counts(table, layer)
            group = f"tables/{where.table_key}/" + (f"layers/{layer}" if layer else "X")
            counts = _io.StoredCounts(store, group)
        for slide in gather(data, where, need=[name for name in need if name != "counts"], together=False, **options):
            parts: dict[str, Any] = {
                "crops": slide.crops,
                "rows": None,
                "obs_names": slide.rows.astype(np.int32),
                "tissue": tissue,
            }
            if counts is not None:
                parts |= {"counts": counts.take(slide.rows), "genes": genes, "measured": None}
            if slide.crops is not None:
                parts["crops"] = replace(slide.crops, xy=np.float32(slide.crops.xy))
            name = unique_name(f"{store.stem}:{slide.name}", "", 1, [s.name for s in out], False)
            out.append(replace(slide, name=name, **parts))
    return out


def read_manifest(manifest: Path) -> list[dict[str, str]]:
    """Rows of a manifest, checked; empty cells are empty strings."""
    if not manifest.is_file():
        what = "is a store or folder, not a manifest" if manifest.is_dir() else "is no file"
        raise FileNotFoundError(
            f"data is the path {str(manifest)!r}, which {what}. Give the objects themselves (spatialdata.read_zarr(path), "
            "anndata.read_h5ad(path)), or the path of a CSV with one store per row in its column 'store'."
        )
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    if "store" not in table or not len(table):
        raise ValueError(
            f"{str(manifest)!r} needs one row per store and a column 'store'; it has {', '.join(table.columns)}."
        )
    if unknown := [name for name in table.columns if name not in COLUMNS]:
        raise ValueError(f"{str(manifest)!r} has a column {unknown[0]!r}; known are {', '.join(COLUMNS)}.")
    return table.to_dict("records")
