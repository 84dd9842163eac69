"""The folder of a run that can go on: one run at a time, and nothing of anyone else."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from scipy import sparse

from spatiaflow import _files
from spatiaflow._settings import logger

NEWEST, BEST, FINISHED, IMAGES = "last.ckpt", "best.safetensors", "finished.safetensors", "images.npy"
PARTS = "part_*.npz"  # of features
WRITTEN = (NEWEST, BEST, FINISHED, IMAGES, PARTS)
NOTE, LOCK, OWNER = "run.json", "run.lock", "run.owner"
FORMAT = 1  # of the note
FOLDERS = ("fold_*", "cells", "context")  # of networks, inside the folder of a run


@contextmanager
def claim(folder: Path, resume: bool, **run) -> Iterator[None]:
    """Hold the folder of a run: lock it, note what the run is made of, and refuse what is not of this run.

    Parameters
    ----------
    folder
        Made when missing.
    resume
        Go on from what is there, if it is of the same run. Otherwise what an earlier run left is removed.
    run
        Settings (anything with a faithful ``repr``) and arrays, by name; a list of them counts as one.

    Raises
    ------
    RuntimeError
        Another run holds the folder.
    ValueError
        The folder holds another run (with ``resume``), a damaged note, or files that no run of this package wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"checkpoint_dir {str(folder)!r} is a file; give a folder, or a name that is free.")
    _noted(folder)  # before anything is written there
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        now = {name: _digest(value) for name, value in run.items()}
        known = _noted(folder)
        if resume and known is not None and known["whole"]:
            if other := [name for name in now if known["run"].get(name) != now[name]]:
                raise another(folder, f"it differs in {', '.join(other)}")
            _remove(folder, (_files.TEMPORARY,))
        else:  # what an earlier run left must not be taken for this one's, should it be interrupted here
            _note(folder, now, whole=False)
            _remove(folder, (*WRITTEN, _files.TEMPORARY))
        _note(folder, now, whole=True)
        yield


def another(folder: Path, found: str) -> ValueError:
    """Error for a folder that holds another run; ``found`` says by what that is known."""
    return ValueError(
        f"{str(folder)!r} holds another run: {found}. Give the arguments and data of that run, or another checkpoint_dir."
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = _files.try_lock(folder / LOCK)
    except NotImplementedError as error:
        logger.warning("%s cannot be locked (%s): make sure that no other run uses it", folder, error)
        yield
        return
    if lock is None:
        raise RuntimeError(
            f"checkpoint_dir {str(folder)!r} is in use by another run: {_owner(folder)}. Wait until it ends, or give another "
            "checkpoint_dir."
        )
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        with _files.atomic(folder / OWNER) as temporary:
            temporary.write_text(json.dumps(owner))
        yield
    finally:
        lock.release()


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or its file is damaged
        return "it has not yet said which"


def _noted(folder: Path) -> dict | None:
    """Note of the run whose folder it is; None for a folder that is new. Refuses folders of other programs."""
    note = folder / NOTE
    if not note.exists():
        if found := _present(folder, WRITTEN):
            raise ValueError(
                f"checkpoint_dir {str(folder)!r} holds {str(found[0].relative_to(folder))!r}, but no {NOTE!r} of a run of "
                "spatiaflow. Its files are not touched. Give a new folder, or one that an earlier run with checkpoint_dir= wrote."
            )
        return None
    try:
        known = json.loads(note.read_text())
        if (known["spatiaflow"], type(known["whole"]), type(known["run"])) == (FORMAT, bool, dict):
            return known
        problem = "it has other entries"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"{str(note)!r} is not the note of a run of spatiaflow ({problem}): it is damaged, of an older version, or of another "
        "program. So it is not known which run the folder holds. Remove it to start anew, or give another checkpoint_dir."
    )


def _note(folder: Path, run: dict[str, str], whole: bool) -> None:
    with _files.atomic(folder / NOTE) as temporary:
        temporary.write_text(json.dumps({"spatiaflow": FORMAT, "whole": whole, "run": run}, indent=1))


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Files by these names in the folder of a run and in those of its networks."""
    folders = [folder, *(path for name in FOLDERS for path in folder.glob(name) if path.is_dir())]
    return [path for one in folders for name in names for path in one.glob(name) if path.is_file() or path.is_symlink()]


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    for path in _present(folder, names):
        path.unlink()
        if path.parent != folder:
            with suppress(OSError):  # something else is there
                path.parent.rmdir()


def _digest(value) -> str:
    digest = hashlib.sha256()
    for one in value if isinstance(value, list) else [value]:
        if sparse.issparse(one):
            parts = [one.data, one.indices, one.indptr]
        else:
            parts = [one] if isinstance(one, np.ndarray) else [np.frombuffer(repr(one).encode(), np.uint8)]
        for part in parts:
            digest.update(f"{part.shape}{part.dtype}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()
