"""How much of each sample each niche makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb


@verb
def niche_composition(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    by: str | None = None,
    key: str = "niche",
    counts: bool = False,
    table_key: str = "table",
) -> pd.DataFrame:
    """Return the share of each sample's cells that lie in each niche.

    Parameters
    ----------
    data
        One object, or a list or dict of objects, whose niches :func:`spatiaflow.tl.cluster_niches` found together.
    by
        Column of ``.obs`` that names the sample of each cell; None: each object is a sample, called by its key or place.
    key
        Column of the niches.
    counts
        Return numbers of cells instead of shares, for tests of differences between samples.
    table_key
        Table of a SpatialData.

    Returns
    -------
    DataFrame, samples x niches, both in the order of their categories; objects in the order given. Rows sum to 1, with
    ``counts=True`` to the number of cells. ``.attrs["n_cells"]`` is the number of cells of each sample. Cells without a niche
    or sample are left out.

    Raises
    ------
    KeyError
        A column is missing.
    ValueError
        The list or dict is empty, or niches were found in each object alone.

    See Also
    --------
    spatiaflow.pl.composition : draw it.

    Examples
    --------
    >>> sf.get.niche_composition(sdata, by="cell_type").sum(axis=1).round(3).unique().tolist()
    [1.0]
    """
    _io.text(by=by, key=key)
    _check_found_together(data, key, table_key)
    niche, sample = columns_of_cells(data, [key, by], table_key)
    found = pd.crosstab(sample, niche, dropna=False).loc[lambda table: table.sum(axis=1) > 0]
    found.index, found.columns = (
        pd.Index(found.index, name=by, dtype=object),
        pd.Index(found.columns, name=key, dtype=object),
    )
    out = found if counts else found.div(found.sum(axis=1), axis=0)
    out.attrs["n_cells"] = found.sum(axis=1).to_dict()
    return out


def _check_found_together(data, key: str, table_key: str) -> None:
    """Refuse objects in which ``cluster_niches`` found niches one by one: those of one name have nothing in common."""
    first: tuple[str, np.ndarray] | None = None
    for name, one in _io.objects_of(data).items():
        model = _io.entry(_io.unpack(one, table_key)[1], key).get("model")
        if not isinstance(model, Mapping):
            continue
        intercept = np.asarray(model["intercept"])
        if first is not None and not np.array_equal(first[1], intercept):
            raise ValueError(
                f"niches {key!r} of objects {first[0]!r} and {name!r} were found in each alone, so equal names mean nothing. Run "
                "sf.tl.cluster_niches on the whole list, or carry them: sf.tl.cluster_niches(other, model=first)."
            )
        first = first or (name, intercept)


def columns_of_cells(data, columns: Sequence[str | None], table_key: str) -> list[pd.Series]:
    """Columns of ``.obs`` of all objects, one below the other, as categories of text in their order; None: the object.

    Cells that lack one of them are left out.
    """
    parts: list[list[pd.Series]] = [[] for _ in columns]
    for name, one in _io.objects_of(data).items():
        table = _io.unpack(one, table_key)[1]
        for column, part in zip(columns, parts):
            if column is not None and column not in table.obs:
                raise KeyError(
                    f"obs has no {column!r}; it has {_io.listing(table.obs.columns)}. Run sf.tl.cluster_niches(data)."
                )
            values = pd.Series(name, table.obs_names) if column is None else table.obs[column]
            names = [_io.label(value) for value in values.astype("category").cat.categories]
            part.append(pd.Series(pd.Categorical(_io.as_text(values), list(dict.fromkeys(names)))))
    out = []
    for part in parts:
        fullest_first = sorted(part, key=lambda values: -len(values.cat.categories))
        names = list(dict.fromkeys(name for values in fullest_first for name in values.cat.categories))
        joined = np.concatenate([values.astype(object).to_numpy() for values in part])
        out.append(pd.Series(pd.Categorical(joined, names)))
    known = np.logical_and.reduce([values.notna() for values in out])
    return [values[known].reset_index(drop=True) for values in out]
