"""Joint draws as one array."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from spatiaflow import _io
from spatiaflow._process import verb


@verb
def draws(data: AnnData, *, genes: str | Sequence[str] | None = None) -> np.ndarray:
    """Return the joint draws of :func:`spatiaflow.tl.sample_expression` as an array.

    Iterating over ``.layers`` is not the same: from anndata 0.13 on, ``.X`` is one of them.

    Parameters
    ----------
    data
        What :func:`spatiaflow.tl.sample_expression` returned, or its store as :func:`anndata.io.read_zarr` reads it.
    genes
        Some of the genes; None takes all.

    Returns
    -------
    float32 array (n_samples, n_obs, n_genes), in the unit of the draws. All of it is in memory.

    Raises
    ------
    KeyError
        There are no draws, or a gene is not among them.

    Examples
    --------
    >>> sampled = sf.tl.sample_expression(adata, model=model, n_samples=20)
    >>> sf.get.draws(sampled).shape
    (20, 79, 3)
    """
    names = sorted(
        (name for name in data.layers if re.fullmatch(r"draw_\d+", str(name))), key=lambda name: int(name[5:])
    )
    if not names:
        raise KeyError("layers has no draws. Make them with draws = sf.tl.sample_expression(data, model=model).")
    at = slice(None)
    if (chosen := _io.names(genes, "genes")) is not None:
        if unknown := [gene for gene in chosen if gene not in data.var_names]:
            raise KeyError(f"the draws have no gene {unknown[0]!r}; they have {_io.listing(list(data.var_names))}.")
        at = data.var_names.get_indexer(chosen)
    return np.stack([np.asarray(data.layers[name][:, at], dtype=np.float32) for name in names])
