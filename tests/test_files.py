"""Files that are whole or not there: links, permissions, full disks, locks and what killed processes leave."""

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from spatiaflow import _files
from spatiaflow.models import _base

TENSORS = {"x": torch.arange(100_000.0)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="new"):
    with _files.atomic(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_new_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "a")
        _base.save(tmp_path / "b", "STFlow", {}, TENSORS)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o660)
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o660


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    disk, here = tmp_path / "disk", tmp_path / "here"
    disk.mkdir(), here.mkdir()
    target, link = disk / "model.safetensors", here / "model.safetensors"
    link.symlink_to(Path("..") / "disk" / "model.safetensors")  # relative, and to a file that is yet to be written
    for value in (1.0, 2.0):
        _base.save(link, "STFlow", {}, {"x": torch.full((3,), value)})
        assert link.is_symlink() and not target.is_symlink()
        assert _base.read(target)[1]["x"][0] == _base.read(link)[1]["x"][0] == value
    assert names(here) == names(disk) == ["model.safetensors"]


def test_a_folder_that_is_a_link_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    _base.save(tmp_path / "link" / "model", "STFlow", {}, TENSORS)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == ["model.safetensors"]


def test_a_link_into_nowhere_and_a_folder_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
        write(tmp_path / "link")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; the name of a file is needed"):
        write(tmp_path / "folder")


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, step):
    write(tmp_path / "a", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="the disk is full: '.*a' was not written.*Free some space") as error:
        write(tmp_path / "a")
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_an_interrupt_leaves_no_temporary_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), _files.atomic(tmp_path / "a"):
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_a_write_that_the_system_refuses_is_an_oserror(tmp_path):
    """A limit on the size of files stands for a disk that fills up in the middle of the tensors."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(OSError, match="(?i)file too large") as error:
            _base.save(tmp_path / "a", "STFlow", {}, TENSORS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert not names(tmp_path)


def test_readers_never_see_half_a_file(tmp_path):
    _base.save(tmp_path / "a", "STFlow", {}, TENSORS)
    done = threading.Event()

    def rewrite():
        for value in range(20):
            _base.save(tmp_path / "a", "STFlow", {}, {"x": torch.full((100_000,), float(value))})
        done.set()

    thread = threading.Thread(target=rewrite)
    thread.start()
    while not done.is_set():
        x = _base.read(tmp_path / "a.safetensors")[1]["x"].numpy()
        assert len(np.unique(x)) in (1, 100_000)
    thread.join()
    assert names(tmp_path) == ["a.safetensors"]


def test_a_file_that_is_replaced_between_header_and_tensors_is_read_again(tmp_path, monkeypatch):
    path, opened = _base.save(tmp_path / "a", "STFlow", {}, {"x": torch.zeros(3)}), []

    @contextlib.contextmanager
    def late(name, framework):
        """The header of one file and the tensors of the next, the first time."""
        with safe_open(name, framework=framework) as first:
            opened.append(first.metadata())
            if len(opened) == 1:
                _base.save(path, "STFlow", {}, {"x": torch.ones(3)})
            with safe_open(name, framework=framework) as second:
                yield SimpleNamespace(metadata=lambda: opened[-1], keys=second.keys, get_tensor=second.get_tensor)

    monkeypatch.setattr(_base, "safe_open", late)
    assert torch.equal(_base.read(path)[1]["x"], torch.ones(3)) and len(opened) == 2


def test_a_map_that_does_not_fit_is_told_before_it_is_written(tmp_path):
    """A write to a map on a full disk is a signal that kills the process."""
    path = tmp_path / "map"
    path.touch()
    os.truncate(path, 2**43)  # 9 TB, of which nothing is on the disk yet
    with pytest.raises(
        OSError, match=r"the disk is full: '.*map' needs 8796.09 GB, and .* GB are free.*checkpoint_dir="
    ):
        _files.reserve(path)
    os.truncate(path, 100_000)
    _files.reserve(path)
    assert path.stat().st_blocks * 512 >= 100_000


HOLD = """
import sys, time
from pathlib import Path
from spatiaflow import _files
with _files.scratch(Path(sys.argv[1]), "work-") as folder:
    (folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_scratch_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(tmp_path):
    def process():
        out = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)], stdout=subprocess.PIPE)
        assert out.stdout.readline().strip() == b"ready"
        return out

    killed, running = process(), process()
    try:
        killed.kill()
        killed.wait()
        with _files.scratch(tmp_path, "work-") as mine:
            assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2  # that of the running process, and mine
            assert mine.is_dir()
        assert list(tmp_path.glob("work-*/half")), "the running process lost its folder"
    finally:
        running.kill()
        running.wait()
        killed.stdout.close(), running.stdout.close()
    with _files.scratch(tmp_path, "work-"):
        pass
    assert not names(tmp_path)


def test_a_lock_is_had_once_and_ends_with_its_holder(tmp_path):
    lock = _files.try_lock(tmp_path / "a.lock")
    assert _files.try_lock(tmp_path / "a.lock") is None
    found = []
    thread = threading.Thread(target=lambda: found.append(_files.try_lock(tmp_path / "a.lock")))
    thread.start()
    thread.join()
    assert found == [None]
    pid = os.fork()
    if not pid:  # a worker that outlives its parent must not keep the lock
        time.sleep(5)
        os._exit(0)
    lock.release()
    again = _files.try_lock(tmp_path / "a.lock")
    assert again is not None
    again.release()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch):
    from spatiaflow._runs import claim

    def none(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_files.FileLock, "acquire", none)
    with _files.scratch(tmp_path, "work-") as folder:
        assert folder.is_dir()
    with claim(tmp_path / "run", False, seed=0):
        assert (tmp_path / "run" / "run.json").is_file()
    assert names(tmp_path) == ["run"]


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with _files.new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), _files.new_folder(tmp_path / "b") as folder:
        raise KeyboardInterrupt
    with pytest.raises(FileExistsError, match="is not overwritten"), _files.new_folder(tmp_path / "a"):
        pass
    with pytest.raises(FileNotFoundError, match="there is no folder"), _files.new_folder(tmp_path / "no" / "c"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
