"""Convert slow raw files once, and keep the result in the cache. A store there is complete or absent."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from spatiaflow import _files
from spatiaflow._settings import logger, settings
from spatiaflow.datasets._fetch import registry

LAYOUT = 1  # increase it when the loaders write something else: stores of another layout are not read
SIZE = "bytes"  # file beside the store: its number of bytes when it was finished


def assembled(dataset: str, write: Callable[[Path], None], suffix: str = ".zarr") -> Path:
    """Return the store of a dataset in the cache. If it is missing or damaged, ``write(path)`` makes it.

    The store is written in a folder of its own and moved to its name in one step. So a killed process, or several processes at
    once, cannot leave half a store under that name. The name contains a digest of the raw files' sha256, so other raw files make
    another store.

    Parameters
    ----------
    dataset
        Name in the registry.
    write
        Function that writes the store to a path.
    suffix
        Suffix of the store's name.
    """
    folder = settings.cache_dir.expanduser().resolve() / dataset / f"assembled-{_digest(dataset)}"
    if not _is_whole(folder):
        with _files.scratch(folder.parent, "assembling-") as scratch:
            new = scratch / folder.name
            new.mkdir()
            logger.info("assembling %s, once, into %s", dataset, folder)
            write(new / f"{dataset}{suffix}")
            (new / SIZE).write_text(str(_n_bytes(new)))
            if not _is_whole(folder):  # else another process was faster, and its store may be in use
                _move(new, folder, aside=scratch / "damaged")
    return folder / f"{dataset}{suffix}"


def _digest(dataset: str) -> str:
    lines = [f"{LAYOUT}", *(f"{file} {source.sha256}" for file, source in sorted(registry()[dataset].items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _is_whole(folder: Path) -> bool:
    return (folder / SIZE).is_file() and (folder / SIZE).read_text() == str(_n_bytes(folder))


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path != folder / SIZE)


def _move(new: Path, folder: Path, aside: Path) -> None:
    if folder.exists():
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise
