"""Input checks that the metrics share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

# n x genes: an array, nested lists, a DataFrame or a sparse matrix
Table: TypeAlias = ArrayLike | sparse.spmatrix | sparse.sparray


def table(values: Table, name: str) -> np.ndarray:
    """Return ``values`` as a finite float64 array (n, genes)."""
    if type(values).__name__ == "AnnData":
        raise TypeError(f"{name} must be an array: give .X, a layer or an obsm of the AnnData.")
    given: Any = values
    values = np.asarray(given.toarray() if sparse.issparse(given) else given, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} must be an (n, genes) array; its shape is {values.shape}.")
    if len(values) == 0:
        raise ValueError(f"{name} has no rows.")
    _check_finite(values, name)
    return values


def tables(**values: Table) -> list[np.ndarray]:
    """Return several (n, genes) arrays, checked to be of one shape."""
    frames = {name: value for name, value in values.items() if isinstance(value, pd.DataFrame)}
    for name, frame in frames.items():
        reference = next(iter(frames.values()))
        if frame.shape == reference.shape and not (
            frame.index.equals(reference.index) and frame.columns.equals(reference.columns)
        ):
            raise ValueError(
                f"{name} has other row or column labels than {next(iter(frames))}, or another order of them; align first: "
                f"{name}.loc[{next(iter(frames))}.index, {next(iter(frames))}.columns]."
            )
    out = [table(value, name) for name, value in values.items()]
    (first, *others), names = out, list(values)
    for other, name in zip(others, names[1:]):
        if other.shape != first.shape:
            raise ValueError(
                f"{names[0]} is {first.shape} but {name} is {other.shape}; rows and genes must be the same."
            )
    return out


def ensemble(truth: Table, draws: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return ``truth`` (n, genes) and ``draws`` (n_draws, n, genes); the draws keep their type, they are large."""
    truth, draws = table(truth, "truth"), np.asarray(draws)
    if draws.ndim != 3 or draws.shape[1:] != truth.shape or len(draws) == 0:
        raise ValueError(
            f"draws must be (n_draws, {truth.shape[0]}, {truth.shape[1]}) as truth is; they are {draws.shape}."
        )
    _check_finite(draws, "draws")
    return truth, draws


def labels(values: ArrayLike, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct labels in order of first appearance, and the code of every row."""
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} must hold one label for each of {n} rows; its shape is {values.shape}.")
    distinct, first, codes = np.unique(values.astype(str), return_index=True, return_inverse=True)
    order = np.argsort(first)
    return distinct[order], np.argsort(order)[codes]


def rows_in_chunks(n: int, width: int, budget: int = 4_000_000) -> Iterator[slice]:
    """Yield slices of rows such that ``width`` values a row stay under ``budget`` values a chunk."""
    step = max(1, budget // max(1, width))
    return (slice(start, start + step) for start in range(0, n, step))


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite values; leave out the rows or genes that were not measured."
        )
