"""Counts that stay in their Zarr store and are read by rows."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

CACHE_CHUNKS = 64


class StoredCounts:
    """Rows of a CSR matrix in a Zarr store, with one column for each gene of a vocabulary. Each chunk is decoded once.

    Only the row pointers are held in memory (4 or 8 bytes per row), and the arrays are opened at the first read, so it is
    cheap to keep and to send to another process. Cells that are close in the table share chunks: a table sorted by position
    is read fastest.
    """

    def __init__(self, store: str | Path, group: str):
        self.store, self.group = str(store), group
        self.columns: np.ndarray | None = None  # place of each stored gene in the vocabulary, or -1
        self.n_genes: int | None = None
        encoding = self._open().attrs.get("encoding-type")
        if encoding != "csr_matrix":
            raise ValueError(
                f"{self.store}/{group} is stored as {encoding!r}; a CSR matrix is needed. Set table.X = "
                "scipy.sparse.csr_matrix(table.X) and write the store again."
            )
        pointers: Any = self._open()["indptr"][:]
        small = pointers[-1] < 2**31
        self.pointers: np.ndarray = pointers.astype(np.int32 if small else np.int64)
        self.rows: np.ndarray | None = None
        self._cache: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.pointers) - 1 if self.rows is None else len(self.rows)

    def take(self, rows: np.ndarray) -> StoredCounts:
        """Return some of the rows."""
        out = object.__new__(type(self))
        out.__dict__ = self.__getstate__()
        rows = np.asarray(rows, np.int32)
        out.rows = rows if self.rows is None else self.rows[rows]
        return out

    def named(self, columns: np.ndarray, n_genes: int) -> StoredCounts:
        """Return the counts with the columns of a vocabulary; ``columns`` holds the new place of each column, or -1."""
        out = self.take(np.arange(len(self)))
        columns = np.asarray(columns, np.int32)
        if self.columns is not None:  # they were renamed before
            columns = np.where(self.columns >= 0, columns[self.columns], -1).astype(np.int32)
        out.columns, out.n_genes = columns, n_genes
        return out

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Counts of some rows, rows x genes, float32."""
        rows = np.asarray(rows) if self.rows is None else self.rows[np.asarray(rows)]
        start, stop = self.pointers[rows].astype(np.int64), self.pointers[rows + 1].astype(np.int64)
        length = stop - start
        at = np.repeat(start - np.concatenate([[0], np.cumsum(length)[:-1]]), length) + np.arange(length.sum())
        genes, values = self._gather("indices", at), self._gather("data", at)
        row = np.repeat(np.arange(len(rows)), length)
        if (bad := (values < 0) | (values != np.round(values))).any():
            raise ValueError(f"{self.store}/{self.group} does not hold raw counts (e.g. {values[bad][0]:g}).")
        columns = np.arange(int(genes.max(initial=0)) + 1) if self.columns is None else self.columns
        place = columns[genes]
        known = place >= 0
        shape = (len(rows), self.n_genes or len(columns))
        return sparse.csr_matrix((values[known].astype(np.float32), (row[known], place[known])), shape)

    def _gather(self, name: str, at: np.ndarray) -> np.ndarray:
        """Elements of a stored array, chunk by chunk."""
        array = self._arrays()[name]
        size = array.chunks[0]
        out = np.empty(len(at), array.dtype)
        chunk = at // size
        for c in np.unique(chunk):
            if (name, c) not in self._cache:
                try:
                    self._cache[name, c] = array[c * size : (c + 1) * size]
                except Exception as error:  # each codec has errors of its own
                    raise OSError(f"{self.store}/{self.group}/{name} is damaged at chunk {c}: {error}") from error
                if len(self._cache) > CACHE_CHUNKS:
                    self._cache.popitem(last=False)
            here = chunk == c
            out[here] = self._cache[name, c][at[here] - c * size]
        return out

    def _open(self) -> Any:
        import zarr

        return zarr.open_group(self.store, mode="r")[self.group]

    def _arrays(self) -> Any:
        if "opened" not in self.__dict__:
            self.opened = self._open()
        return self.opened

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "opened"} | {"_cache": OrderedDict()}
