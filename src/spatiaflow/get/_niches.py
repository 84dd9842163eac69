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
    table_key
        Table of a SpatialData.

    Returns
    -------
    DataFrame, samples x niches; rows sum to 1. ``.attrs["n_cells"]`` is the number of cells of each sample. Cells without a
    niche or sample are left out.

    Raises
    ------
    KeyError
        A column is missing.
    ValueError
        The list or dict is empty.

    Examples
    --------
    >>> sf.get.niche_composition(sdata, by="cell_type").sum(axis=1).round(3).unique().tolist()
    [1.0]
    """
    _io.text(by=by, key=key)
    niches, samples = [], []
    for name, one in _io.objects_of(data).items():
        table = _io.unpack(one, table_key)[1]
        for column in (key, by):
            if column is not None and column not in table.obs:
                raise KeyError(
                    f"obs has no {column!r}; it has {_io.listing(table.obs.columns)}. Run sf.tl.cluster_niches(data)."
                )
        niches.append(table.obs[key].astype("category"))
        samples.append(np.full(table.n_obs, name) if by is None else table.obs[by].astype(object).to_numpy())
    names = list(dict.fromkeys(str(name) for column in niches for name in column.cat.categories))
    frame = pd.DataFrame(
        {"sample": np.concatenate(samples), "niche": np.concatenate([c.astype(object) for c in niches])}
    )
    frame = frame[frame.notna().all(axis=1)].astype(str)
    counts = pd.crosstab(frame["sample"], frame["niche"]).reindex(columns=names, fill_value=0)
    out = counts.div(counts.sum(axis=1), axis=0).rename_axis(index=by, columns=key)
    out.attrs["n_cells"] = counts.sum(axis=1).to_dict()
    return out
