"""Get public files by name: from the cache, else from the mirror, else from the internet. Each is checked by its sha256."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pooch

from spatiaflow._settings import logger, progress, settings

TIMEOUT = 20.0  # seconds to connect, and seconds without a byte before a server counts as stalled
RETRIES = 2  # after 1 and 2 seconds; only for temporary failures (a broken connection, a busy server), not for a 404
THREADS = 8


class Source(NamedTuple):
    """Where the registry says a file is, and what it must hold."""

    url: str
    sha256: str
    n_bytes: int


@cache
def registry() -> dict[str, dict[str, Source]]:
    """Return ``{dataset: {file: Source}}`` of every file that the package knows."""
    known: dict[str, dict[str, Source]] = {}
    with (package_files("spatiaflow.datasets") / "registry.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            source = Source(row["url"], row["sha256"], int(row["bytes"]))
            known.setdefault(row["dataset"], {})[row["file"]] = source
    return known


def fetch(dataset: str, *files: str) -> list[Path]:
    """Return the paths of files of a dataset, after downloading those that the cache does not hold intact.

    Looks in ``settings.cache_dir/<dataset>/<file>``, then in ``settings.mirror`` (a folder or a base URL laid out as
    ``<dataset>/<file>``), then at the public address. Whatever the source, a file enters the cache under its name only
    after its sha256 was checked, in one atomic move, so several processes may share a cache. Mirrored files are copied:
    what the package reads is always in the cache.

    Parameters
    ----------
    dataset
        Name of the dataset in the registry.
    *files
        Names of its files; none given: all of them.

    Returns
    -------
    Absolute paths in the cache, in the order of ``files``.

    Raises
    ------
    ValueError
        The registry has no such dataset or file.
    FileNotFoundError
        ``settings.mirror`` names a folder that does not exist.
    OSError
        No source gave the file intact. The message lists what each of them answered, and what to do.
    """
    known = _known_files(dataset, files)
    folder = settings.cache_dir.expanduser().resolve() / dataset
    wanted = {file: folder / file for file in files or known}
    missing = [file for file, path in wanted.items() if not _is_intact(path, known[file].sha256)]
    if missing:
        mirror = _mirror()
        size = sum(known[file].n_bytes for file in missing) / 1e6
        logger.info("fetching %d file(s) of %s (%.1f MB) into %s", len(missing), dataset, size, folder)
        with _quiet_pooch(), ThreadPoolExecutor(min(THREADS, len(missing))) as pool:
            jobs = [pool.submit(_fetch_one, dataset, file, known[file], wanted[file], mirror) for file in missing]
            try:
                for job in progress(as_completed(jobs), f"Fetching {dataset}", total=len(jobs), unit="file"):
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [wanted[file] for file in files or known]


def _known_files(dataset: str, files: tuple[str, ...]) -> dict[str, Source]:
    if dataset not in registry():
        raise ValueError(f"there is no dataset {dataset!r}; the registry has {', '.join(registry())}.")
    known = registry()[dataset]
    for file in files:
        if file not in known:
            some = ", ".join(list(known)[:12]) + (f", ... ({len(known)})" if len(known) > 12 else "")
            raise ValueError(f"dataset {dataset!r} has no file {file!r}; it has {some}.")
    return known


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and pooch.file_hash(str(path)) == sha256


def _mirror() -> str | None:
    """Return the mirror's base URL, or its folder after a check that it is there; None without a mirror."""
    mirror = settings.mirror
    if mirror is None or "://" in mirror:
        return mirror
    folder = Path(mirror).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"settings.mirror is {mirror!r}, and there is no such folder. Set it (or SPATIAFLOW_MIRROR) to a folder or a "
            "base URL that holds <dataset>/<file>, or to None to use the public addresses alone."
        )
    return str(folder.resolve())


def _fetch_one(dataset: str, file: str, source: Source, path: Path, mirror: str | None) -> None:
    attempts: list[tuple[str, Callable]] = [(source.url, _download)]
    if mirror is not None and "://" in mirror:
        attempts.insert(0, (f"{mirror.rstrip('/')}/{quote(f'{dataset}/{file}')}", _download))
    elif mirror is not None:
        attempts.insert(0, (str(Path(mirror, dataset, file)), _copy))
    answers = []
    for address, download in attempts:
        try:
            _fetch_from(address, download, source.sha256, path)
        except (OSError, ValueError) as error:
            answers.append(f"  {address}: {error}")
            if address != source.url and not isinstance(error, FileNotFoundError):
                logger.warning("the mirror failed, so the public address is tried; %s", answers[-1].strip())
        else:
            return
    path.unlink(missing_ok=True)  # a file that was already in the cache had the wrong hash
    mirrored = mirror or "<folder or base URL>"
    raise OSError(
        f"could not fetch {file!r} of dataset {dataset!r}; nothing was kept in the cache:\n" + "\n".join(answers) + "\n"
        f"Try again later, or without network: put the file (sha256 {source.sha256}) at {mirrored}/{dataset}/{file} "
        f"and set sf.settings.mirror or the environment variable SPATIAFLOW_MIRROR to {mirrored}. If its hash is wrong "
        "again and again, the published file has changed: update spatiaflow."
    )


def _fetch_from(address: str, download: Callable, sha256: str, path: Path) -> None:
    # pooch creates subfolders without exist_ok, which fails when two threads do it at the same time
    path.parent.mkdir(parents=True, exist_ok=True)
    pup = pooch.Pooch(
        path=path.parent,
        base_url="",
        registry={path.name: sha256},
        urls={path.name: address},
        retry_if_failed=RETRIES if "://" in address else 0,
    )
    pup.fetch(path.name, downloader=download)


def _download(url: str, output_file: str, pup: pooch.Pooch) -> None:
    # identity: with compression, a truncated download would show up as an unclear decoding error
    download = pooch.HTTPDownloader(chunk_size=1 << 16, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"})
    try:
        download(url, output_file, pup)
    except OSError as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403, 404, 410):
            # pooch does not retry this error: the answer would be the same
            raise FileNotFoundError(f"the server answers {response.status_code} {response.reason}") from error
        raise


def _copy(address: str, output_file: str, pup: pooch.Pooch) -> None:
    if not Path(address).is_file():
        raise FileNotFoundError("no such file in the mirror")
    shutil.copyfile(address, output_file)


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Keep pooch from logging a line a file beside the one progress bar."""
    log = pooch.get_logger()
    before = log.level
    log.setLevel("WARNING")
    try:
        yield
    finally:
        log.setLevel(before)
