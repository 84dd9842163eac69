"""How much of each sample each niche makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._settings import logger


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
        Column of ``.obs`` that names the sample of each cell; None: each object is a sample, called by its key or place. Cells of
        one name are added up, also from several objects.
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
        The list or dict is empty, or the objects were clustered separately.

    See Also
    --------
    spatiaflow.pl.composition : draw it.

    Examples
    --------
    >>> sf.get.niche_composition(sdata, by="cell_type").sum(axis=1).round(3).unique().tolist()
    [1.0]
    """
    _io.text(by=by, key=key)
    _check_clusterings(data, key, table_key)
    if by is not None:
        _tell_of_joined(data, by, table_key)
    niche, sample = columns_of_cells(data, [key, by], table_key)
    found = pd.crosstab(sample, niche, dropna=False).loc[lambda table: table.sum(axis=1) > 0]
    found.index, found.columns = (
        pd.Index(found.index, name=by or "sample", dtype=object),
        pd.Index(found.columns, name=key, dtype=object),
    )
    out = found if counts else found.div(found.sum(axis=1), axis=0)
    out.attrs["n_cells"] = found.sum(axis=1).to_dict()
    return out


def _tell_of_joined(data, by: str, table_key: str) -> None:
    """Log which samples get the cells of several objects: right for a donor, wrong for sections that are numbered anew."""
    of: dict[str, list[str]] = {}
    for name, one in _io.objects_of(data).items():
        table = _io.unpack(one, table_key)[1]
        for sample in sorted({*_io.as_text(table.obs[by])} - {""}) if by in table.obs else ():
            of.setdefault(sample, []).append(name)
    if joined := {sample: names for sample, names in of.items() if len(names) > 1}:
        sample, names = next(iter(joined.items()))
        logger.info(
            "%d samples of obs[%r] get the cells of several objects, such as %r of %s", len(joined), by, sample,
            ", ".join(map(repr, names)),
        )  # fmt: skip


def _check_clusterings(data, key: str, table_key: str) -> None:
    """Refuse objects whose clusters were found one by one: those of one name have nothing in common."""
    tables = {name: _io.unpack(one, table_key)[1] for name, one in _io.objects_of(data).items()}
    if (apart := _io.different_clusterings(tables, key)) is not None:
        raise ValueError(
            f"clusters {key!r} of objects {apart[0]!r} and {apart[1]!r} come from separate runs, so equal numbers do not mean "
            "the same cluster. Run sf.tl.cluster_niches or sf.tl.cluster_cells on the whole list, or carry niches: "
            "sf.tl.cluster_niches(other, model=first). If you matched them yourself, rename them: only numbers are checked."
        )


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
