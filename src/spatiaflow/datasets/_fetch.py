"""Get public files by name: from the cache, else from the mirror, else from the internet. Each is checked by its sha256."""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import pooch

from spatiaflow import _files
from spatiaflow._process import unchanged
from spatiaflow._settings import logger, progress, settings

TIMEOUT = 20.0  # seconds to connect, and seconds without a byte before a server counts as stalled
LEAST, SLOWEST = (
    60.0,
    20_000,
)  # seconds that any file may take, and bytes per second below which a larger one is given up
RETRIES = 2  # after 1 and 2 seconds; for what may pass (a broken connection, a busy server), not for a 404
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
    after its size and sha256 were checked, in one atomic move, so several processes may share a cache. Mirrored files are copied:
    what the package reads is always in the cache. A source that sends more than the registry says is cut off there, and one
    that is too slow is given up. What a killed download left is removed by the next one.

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
        The registry has no such dataset or file, or its name or a link in the cache leads out of the cache.
    FileNotFoundError
        ``settings.mirror`` names a folder that does not exist.
    OSError
        No source gave the file intact. The message lists what each of them answered, and what to do.
    """
    known = _known_files(dataset, files)
    cache = settings.cache_dir.expanduser().resolve()
    wanted = {file: _place(cache, dataset, file) for file in files or known}
    missing = [file for file, path in wanted.items() if not _is_intact(path, known[file].sha256)]
    if missing:
        mirror = _mirror()
        size = sum(known[file].n_bytes for file in missing) / 1e6
        logger.info("fetching %d file(s) of %s (%.1f MB) into %s", len(missing), dataset, size, cache / dataset)
        with _quiet_pooch(), _files.scratch(cache / dataset, ".fetching-") as scratch:
            jobs = [
                (dataset, file, known[file], wanted[file], mirror, scratch / str(i)) for i, file in enumerate(missing)
            ]
            _fetch_all(jobs, f"Fetching {dataset}")
    return [wanted[file] for file in files or known]


def _fetch_all(jobs: list[tuple], description: str) -> None:
    with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
        running = [pool.submit(_fetch_one, *job) for job in jobs]
        try:
            for job in progress(as_completed(running), description, total=len(jobs), unit="file"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _place(cache: Path, dataset: str, file: str) -> Path:
    """Where a file of the registry lies in the cache."""
    for name in (dataset, file):
        plain = PurePosixPath(name)
        if (
            str(plain) != name
            or plain.is_absolute()
            or {"..", "."} & {*plain.parts, name}
            or {"\\", ":", "\0"} & {*name}
        ):
            raise ValueError(f"the registry names {name!r}, which is no plain name of a file inside the cache.")
    path = cache / dataset / file
    if not path.resolve().is_relative_to(cache):
        raise ValueError(
            f"{str(path)!r} is, or lies behind, a link to {str(path.resolve())!r}, outside the cache {str(cache)!r}. Remove the "
            "link. To keep the cache elsewhere, set sf.settings.cache_dir (or SPATIAFLOW_CACHE_DIR), which may be a link."
        )
    return path


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


def _fetch_one(dataset: str, file: str, source: Source, path: Path, mirror: str | None, scratch: Path) -> None:
    attempts: list[tuple[str, Callable]] = [(source.url, _download)]
    if mirror is not None and "://" in mirror:
        attempts.insert(0, (f"{mirror.rstrip('/')}/{quote(f'{dataset}/{file}')}", _download))
    elif mirror is not None:
        attempts.insert(0, (str(Path(mirror, dataset, file)), _copy))
    answers = []
    for address, download in attempts:
        try:
            _fetch_from(address, download, source, path, scratch)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _files.FULL:
                raise OSError(
                    error.errno,
                    f"the disk is full: {file!r} of dataset {dataset!r} ({source.n_bytes / 1e6:.1f} MB) does not fit into "
                    f"{str(settings.cache_dir)!r}. Free some space, or set sf.settings.cache_dir to a folder on another disk",
                ) from error
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


def _fetch_from(address: str, download: Callable, source: Source, path: Path, scratch: Path) -> None:
    with unchanged():  # pooch imports it, which adds filters of warnings
        import requests.exceptions  # noqa: F401
    pup = pooch.Pooch(
        path=scratch,
        base_url="",
        registry={path.name: source.sha256},
        urls={path.name: address},
        retry_if_failed=RETRIES if "://" in address else 0,
    )
    found = pup.fetch(path.name, downloader=lambda url, out, _: download(url, Path(out), source))
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.publish(Path(found), path)


def _download(url: str, out: Path, source: Source) -> None:
    with unchanged():
        import requests  # here, as it takes long to import
        from urllib3.exceptions import HTTPError, ProtocolError

    # identity: a server that compresses on the way would hide a truncated body behind a decoder's error
    headers = {"Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as response:
        if response.status_code in (401, 403, 404, 410):
            # an error that pooch does not retry: the answer would be the same
            raise FileNotFoundError(f"the server answers {response.status_code} {response.reason}")
        response.raise_for_status()

        def read() -> bytes:
            try:
                return response.raw.read1(1 << 16)  # what has arrived: read() would wait for all of it
            except ProtocolError:  # the connection broke: size and hash will tell
                return b""
            except HTTPError as error:
                raise requests.ConnectionError(str(error)) from error  # pooch tries again

        _receive(read, out, source)


def _copy(address: str, out: Path, source: Source) -> None:
    if not Path(address).is_file():
        raise FileNotFoundError("no such file in the mirror")
    with open(address, "rb") as file:
        _receive(lambda: file.read(1 << 20), out, source)


def _receive(read: Callable[[], Any], out: Path, source: Source) -> None:
    """Write what is read: no more than the registry says, in no more time than a slow network takes, and nothing else."""
    end, n, digest = time.monotonic() + LEAST + source.n_bytes / SLOWEST, 0, hashlib.sha256()
    out.unlink(missing_ok=True)  # pooch makes it for its owner alone, and a cache may be shared
    with open(out, "wb") as file:
        while block := read():
            n += len(block)
            if n > source.n_bytes:
                raise ValueError(
                    f"it sends more than the {source.n_bytes} bytes of the registry, and was cut off there"
                )
            if time.monotonic() > end:
                raise TimeoutError(
                    f"too slow: {n} of {source.n_bytes} bytes in {LEAST + source.n_bytes / SLOWEST:.0f} seconds"
                )
            digest.update(block)
            file.write(block)
    if (n, digest.hexdigest()) != (source.n_bytes, source.sha256):
        raise ValueError(
            f"it gave {n} bytes with sha256 {digest.hexdigest()}; expected are {source.n_bytes} bytes with sha256 {source.sha256}"
        )


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
