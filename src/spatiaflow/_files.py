"""Files that are whole or not there: atomic writes, locks that a killed process frees, scratch folders that do not stay."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

TEMPORARY = ".*.tmp"  # what a killed process may leave beside a file that it was writing
FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT")} - {None}  # no system has all of them
NO_LOCKS = {getattr(errno, name, None) for name in ("ENOSYS", "ENOLCK", "ENOTSUP", "EOPNOTSUPP")} - {None}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give the path of a temporary file, which takes the place of ``path`` when the block ends without an error.

    The file has the permissions that ``open(path, "w")`` gives: those of the file that it replaces, or what the umask leaves.
    A link stays a link, and the file that it names is replaced. After an error the temporary file is gone, and the old file is
    as it was.

    Parameters
    ----------
    path
        File to write. Its folder must exist.

    Raises
    ------
    OSError
        The disk is full, ``path`` is a folder, or it is a link into a folder that does not exist.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; the name of a file is needed.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: there is no folder {str(target.parent)!r}.")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the kernel applies the umask
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there
        publish(temporary, target)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full: {str(path)!r} was not written, and what stood there before is unchanged. Free some space in "
            f"{str(target.parent)!r}, or give a path on another disk",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give the path of a temporary folder, which gets the name ``path`` when the block ends without an error.

    Parameters
    ----------
    path
        Folder to make. It must not exist, and the folder that it is made in must.

    Raises
    ------
    OSError
        ``path`` exists, the folder that it is made in does not, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        raise FileExistsError(f"{str(path)!r} exists and is not overwritten; remove it, or give another path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: there is no folder {str(target.parent)!r}.")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            error.errno,
            f"the disk is full: {str(path)!r} was not written. Free some space in {str(target.parent)!r}, or give a path on "
            "another disk",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path) -> None:
    """Move a finished file to its name, on the same disk, so that a crash of the machine leaves the old or the new one."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)
    with suppress(OSError):  # some systems cannot open or sync a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def reserve(path: Path) -> None:
    """Take the disk space of a file that is mapped into memory: a map on a full disk kills the process without a word.

    Raises
    ------
    OSError
        There is not enough space.
    """
    size, free = path.stat().st_size, shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {str(path)!r} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. Free some space, or "
            "set checkpoint_dir= (without it: TMPDIR) to a folder on another disk",
        )
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def try_lock(path: Path) -> FileLock | None:
    """Take the lock of a file without waiting; None: another process has it.

    The lock ends with the process, however that ends.

    Raises
    ------
    NotImplementedError
        The file system has no locks.
    """
    lock = FileLock(path, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise NotImplementedError(str(error)) from error
        raise
    return lock


@contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """Make a folder for one process inside another; those that killed processes left there are removed.

    Parameters
    ----------
    folder
        Where it is made.
    prefix
        Of its name. Whatever has this prefix in ``folder`` and is locked by no process is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in {path.name.removesuffix(".lock") for path in folder.glob(f"{prefix}*")}:
        with suppress(NotImplementedError, PermissionError):  # of another user, who will remove it
            if (free := try_lock(folder / f"{name}.lock")) is not None:
                _remove(folder / name, free)
    new, lock = _new(folder, prefix)
    try:
        new.mkdir()
        yield new
    finally:
        _remove(new, lock)


def _new(folder: Path, prefix: str) -> tuple[Path, FileLock | None]:
    """Name that no other process has, and its lock; None on a disk without locks, where nobody removes what others left."""
    while True:
        new = folder / f"{prefix}{secrets.token_hex(4)}"
        try:
            if (lock := try_lock(folder / f"{new.name}.lock")) is not None:
                return new, lock  # else one that cleans up has it for a moment
        except NotImplementedError:
            return new, None


def _remove(folder: Path, lock: FileLock | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    if lock is not None:
        lock.release()
