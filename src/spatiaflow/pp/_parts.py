"""What is done of a long encoding, in files of the folder of its run."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np

from spatiaflow import _files, _runs

EVERY = 20.0  # seconds between two files
CHECKED = 16  # patches that are encoded again before a run goes on
# of the largest value of a feature: how much it may differ then, as another batch may change its last digits
SAME = 0.01


class Parts:
    """Rows of arrays of one slide, as they are computed: written every few seconds, and when the block ends, however it ends.

    Parameters
    ----------
    folder
        Of the run, claimed already. None: nothing is kept.
    number
        Of the slide in the run.
    """

    def __init__(self, folder: Path | None, number: int):
        self.folder, self.prefix = folder, _runs.PARTS.replace("*", f"{number:04d}_*")
        self.files = [] if folder is None else sorted(folder.glob(self.prefix))
        self.waiting: list[dict[str, np.ndarray]] = []
        self.written = time.monotonic()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def __len__(self) -> int:
        """Rows that an earlier run left."""
        return sum(len(_read(path, "rows")["rows"]) for path in self.files)

    def read(self) -> dict[str, np.ndarray]:
        """Arrays that an earlier run left, with ``rows``; empty where it left none.

        Raises
        ------
        ValueError
            A file is damaged.
        """
        found = [_read(path) for path in self.files]
        return {name: np.concatenate([one[name] for one in found]) for name in (found[0] if found else ())}

    def add(self, rows: np.ndarray, patches: np.ndarray, **arrays: np.ndarray) -> None:
        """Take in what was computed of some rows, and a checksum of the pixels that it comes from."""
        if self.folder is None:
            return
        self.waiting.append({"rows": rows, "pixels": checksums(patches), **arrays})
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def write(self) -> None:
        """Write what waits to a file of its own."""
        if not self.waiting or self.folder is None:
            return
        path = self.folder / self.prefix.replace("*", f"{len(self.files):06d}")
        arrays = {name: np.concatenate([one[name] for one in self.waiting]) for name in self.waiting[0]}
        with _files.atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        self.files.append(path)
        self.waiting, self.written = [], time.monotonic()

    def check(self, known: dict[str, np.ndarray], rows: np.ndarray, pixels: np.ndarray, features: np.ndarray) -> None:
        """Compare checksums and features of some rows, computed anew, with what is ``known``.

        Raises
        ------
        ValueError
            The picture or the encoder is another one.
        """
        places = {row: place for place, row in enumerate(known["rows"].tolist())}
        there = [places[row] for row in rows.tolist()]
        if (known["pixels"][there] != pixels).any():
            raise _runs.another(self.files[0].parent, "its picture has other pixels")
        size = np.abs(known["features"])
        near = SAME * np.maximum(size.max(0), 1e-3 * size.max())  # where all is near 0, digits differ
        before = known["features"][there]
        if before.shape != features.shape or (np.nanmedian(np.abs(features - before), 0) > near).any():
            raise _runs.another(self.files[0].parent, "the encoder gave other features for the same patches")


def checksums(patches: np.ndarray) -> np.ndarray:
    """CRC-32 of each patch, n, uint32."""
    return np.array([zlib.crc32(np.ascontiguousarray(one).data) for one in patches], np.uint32)


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise ValueError(
            f"{str(path)!r} is damaged: {str(error).strip() or type(error).__name__}. Remove it, and repeat the call with "
            "resume=True: its patches are then encoded again, with the same result."
        ) from error
