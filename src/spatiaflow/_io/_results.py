"""Results that verbs wrote: their values beside measured ones, as AnnData of their own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from spatiaflow._io._arguments import listing, text
from spatiaflow._io._tables import counts, dense, entry, library_sizes, owned
from spatiaflow._settings import warn

SHALLOW = 5.0  # times fewer counts per row than in training: rather a part of the genes than less depth


def slot_as_anndata(table: AnnData, key: str) -> AnnData:
    """Return ``obsm[key]`` with the names in ``uns[key]["genes"]`` as an AnnData of its own."""
    text(key=key)
    names = entry(table, key).get("genes")
    if key not in table.obsm or names is None:
        others = [k for k in table.obsm if k != key and {"normalization", "genes"} <= set(entry(table, k))]
        found = f"it needs obsm[{key!r}] and uns[{key!r}]['genes']; obsm has {listing(table.obsm)}"
        if others:
            found = f"there is {listing(others)}; give key={others[0]!r}"
        raise KeyError(
            f"no result {key!r}: {found}. "
            "Results come from sf.tl.predict_expression(data, model=...) and sf.tl.impute_genes(data, reference=...)."
            + (" Objects joined by anndata.concat lose uns: predict once more after it." if key in table.obsm else "")
        )
    width, written = np.shape(table.obsm[key])[1], dict(entry(table, key).get("params", {})).get("n_obs", table.n_obs)
    if width != len(names) or table.n_obs > written:
        raise ValueError(
            f"uns[{key!r}] was not written with obsm[{key!r}]: it describes {len(names)} genes of {written} rows, and the slot "
            f"has {width} of {table.n_obs}. Were objects joined that have results of their own? Predict once more after it."
        )
    var = pd.DataFrame(index=pd.Index([str(name) for name in names]))
    for name in ("skill", "trusted", "reliability", "reliability_reference", "denoised"):
        if name in table.uns[key]:
            var[name] = np.asarray(table.uns[key][name])
    out = beside(table, np.array(table.obsm[key]), var)
    for name in ("std", "rate"):
        if f"{key}_{name}" in table.obsm:
            out.layers[name] = np.array(table.obsm[f"{key}_{name}"])
    where = dict(entry(table, key).get("params", {})).get("spatial_key", "spatial")
    if where in table.obsm:
        out.obsm[where] = owned(table.obsm[where])
    return out


def own_result(data: Any, table: AnnData, key: str) -> AnnData | None:
    """Return the table of its own in which a result of many genes stands, if ``obsm[key]`` does not hold the result."""
    held = table if isinstance(data, AnnData) else data.tables.get(key)
    if held is None or key in table.obsm:
        return None
    if "normalization" not in entry(held, key) or "std" not in held.layers:
        return None
    if not held.obs_names.equals(table.obs_names):
        raise ValueError(
            f"the table {key!r} has other rows than the table that it was computed from: rows were dropped or reordered. Run "
            f"sf.tl.impute_genes(data, ..., key_added={key!r}) again."
        )
    return held


def beside(table: AnnData, values: np.ndarray, var: pd.DataFrame) -> AnnData:
    """Return values of the rows of a table as an AnnData of its own, with the table's ``obs`` and what says where rows are."""
    out = AnnData(values, obs=table.obs.copy(), var=var)
    for name in ("spatial", "spatialdata_attrs"):
        if name in table.uns:
            out.uns[name] = deepcopy(table.uns[name])
    return out


def same_cells(truth: AnnData, table: AnnData) -> np.ndarray:
    """Rows of ``truth`` that hold the cells of a table."""
    at = truth.obs_names.get_indexer(table.obs_names)
    if (at < 0).any():
        name = table.obs_names[int(np.argmax(at < 0))]
        raise KeyError(f"truth has no cell {name!r}; obs_names must be those of data.")
    return at


def log_expression(
    table: AnnData,
    genes: list[str],
    layer: str | None,
    key: str,
    source: AnnData | None = None,
    held: AnnData | None = None,
) -> np.ndarray:
    """Return measured log1p expression (n_obs x genes), normalised as the prediction in the slot ``key`` is.

    ``source`` holds the counts, of the same cells, where the table does not; the library is always the table's. ``held`` is the
    table with ``uns[key]``, if it is another.
    """
    held = table if held is None else held
    per, stored = target_sum(held, key), held.uns[key]
    values = dense(counts(table if source is None else source, genes, layer)[0])
    if source is not None:
        values = values[same_cells(source, table)]
    if per is None:
        return np.log1p(values)
    if "shared" in stored:  # imputed: counts of the genes that the reference measures too
        shared = [str(gene) for gene in stored["shared"]]
        library = np.asarray(counts(table, shared, layer)[0].sum(1), float).ravel() / stored["library_share"]
    else:
        known = stored.get("params", {}).get("n_vars", table.n_vars)
        if table.n_vars < known:
            warn(
                f"the table has {table.n_vars} genes and had {known} when uns[{key!r}] was written: the library size, a sum "
                "over all genes, is no longer known, and measured values are too high. Draw from the whole table."
            )
        library = library_sizes(table, layer)
        usual = stored.get("params", {}).get("training_library") or 0.0
        if table.n_vars >= known and np.median(library) < usual / SHALLOW:
            warn(
                f"the table has a median of {np.median(library):.4g} counts per row, and the training slides {usual:.4g}. The "
                "library size is the sum over all genes: if the table was cut to some of them, measured values are too high. "
                "Draw from the whole table."
            )
    return np.log1p(values * (per / np.maximum(library, 1))[:, None])


def target_sum(table: AnnData, key: str) -> float | None:
    """Return what the values in ``obsm[key]`` are counts per; None for raw counts."""
    value = table.uns[key].get("normalization", {}).get("target_sum", 1e4)
    return None if value == "raw" else float(value)
