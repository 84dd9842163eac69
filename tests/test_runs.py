"""The folder of a run: locked by it, free again however it ends, and refused where it is of another run or program."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from spatiaflow._runs import BEST, FINISHED, NEWEST, claim

RUN = {"seed": 0, "data": np.arange(3.0)}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_differs_from_the_run_of_the_folder_is_named(tmp_path):
    with claim(tmp_path, False, **RUN):
        (tmp_path / NEWEST).write_text("state")
    with pytest.raises(ValueError, match="holds another run: it differs in data, more. Give the arguments and data"):
        with claim(tmp_path, True, seed=0, data=np.arange(4.0), more=None):
            pass
    with claim(tmp_path, True, **RUN):
        assert (tmp_path / NEWEST).exists()
    with claim(tmp_path, False, seed=1):
        assert not (tmp_path / NEWEST).exists()


def test_a_second_run_is_told_about_the_first(tmp_path):
    with claim(tmp_path / "run", False, **RUN):
        with pytest.raises(
            RuntimeError, match=f"in use by another run: process {os.getpid()} on {socket.gethostname()}"
        ):
            with claim(tmp_path / "run", True, **RUN):
                pass
    with claim(tmp_path / "run", True, **RUN):  # free again
        pass


HOLD = """
import sys, time
from pathlib import Path
from spatiaflow._runs import claim
with claim(Path(sys.argv[1]), False, seed=0):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"ready"
        with pytest.raises(RuntimeError, match=rf"process {other.pid} on .*, started 2\d\d\d-.*another checkpoint_dir"):
            with claim(tmp_path / "run", True, seed=0):
                pass
        other.kill()
        other.wait()
        with claim(tmp_path / "run", True, seed=0):
            pass


@pytest.mark.parametrize("name", [NEWEST, BEST, FINISHED, "fold_0/last.ckpt", "images.npy", "part_0000_000000.npz"])
@pytest.mark.parametrize("resume", [True, False])
def test_files_of_another_program_are_not_touched(tmp_path, name, resume):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ValueError, match=f"holds '{name}', but no 'run.json'.*not touched. Give a new folder"):
        with claim(tmp_path, resume, **RUN):
            pass
    assert names(tmp_path) == [name] and file.read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(NotADirectoryError, match="checkpoint_dir .* is a file; give a folder"):
        with claim(tmp_path / "run", False, **RUN):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"spatiaflow": 1}', '{"seed": "' + 64 * "0" + '"}', "\xff" * 9])
@pytest.mark.parametrize("resume", [True, False])
def test_a_note_that_cannot_be_read_is_refused(tmp_path, text, resume):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match="is not the note of a run of spatiaflow.*Remove it to start anew, or give another"
    ):
        with claim(tmp_path, resume, **RUN):
            pass
