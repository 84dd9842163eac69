"""The folder of a training: checked before it is used, and the same result after a kill at any moment."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from noisy import Noisy, run

from spatiaflow.models import _base
from spatiaflow.train import checkpoint
from spatiaflow.train.checkpoint import BEST, FINISHED, NEWEST, claim

RUN = {"seed": 0, "data": np.arange(3.0)}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def train(folder, resume=True):
    """A training as the package does it: the folder is claimed, a network is fitted, then kept."""
    with claim(folder, resume, **RUN):
        finished = folder / "fold_0" / FINISHED
        if resume and finished.exists():
            return _base.tensors_sha256(checkpoint.read_weights(finished, Noisy().state_dict())[1])
        module = Noisy()
        run(module, folder / "fold_0", resume, max_epochs=2)
        _base.save(finished, "Noisy", {}, module.state_dict())
    return _base.tensors_sha256(module.state_dict())


def killed_at(call, work):
    """Do some work in a process that is killed just before its ``call``-th change of a file; whether it was."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), "the work failed by itself"
        return status == signal.SIGKILL
    n_calls = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal n_calls
            n_calls += 1
            if n_calls > call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    try:
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, dying(getattr(os, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("old", ["no folder", "another run"])
def test_a_kill_before_any_change_of_a_file_changes_nothing(tmp_path, old):
    expected, folder, call = train(tmp_path / "whole"), tmp_path / "run", 0
    died, n_started = True, 0
    while died:
        shutil.rmtree(folder, ignore_errors=True)
        if old == "another run":
            shutil.copytree(tmp_path / "whole", folder)
            note = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps(note | {"run": {"seed": "another"}}))
        died = killed_at(call, lambda: train(folder, resume=False))
        if old == "no folder" or "another" not in (folder / "run.json").read_text():
            assert train(folder) == expected, f"killed before change {call}"
            assert not [name for name in names(folder) if name.endswith(".tmp")]
            if old == "another run" and (folder / "fold_0" / NEWEST).exists():
                n_started += 1
                if n_started > 8:  # from here on it is as in a new folder
                    break
        call += 1
    assert call > 15


def test_an_interrupted_run_frees_its_folder_and_the_next_interrupt_works(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, False, **RUN):
        run(Noisy(dies_in=1), tmp_path / "cells")
    assert signal.getsignal(signal.SIGINT) is handler
    with claim(tmp_path, True, **RUN):
        resumed = run(Noisy(), tmp_path / "cells", resume=True)
    torch.testing.assert_close(resumed, run(Noisy(), None), rtol=0, atol=0)


def test_a_log_beside_the_run_and_deeper_checkpoints_stay(tmp_path):
    other = tmp_path / "mine" / NEWEST
    other.parent.mkdir()
    other.write_text("mine"), (tmp_path / "job.log").write_text("mine")
    for _ in range(2):
        with claim(tmp_path, False, **RUN):
            run(Noisy(), tmp_path / "fold_0")
    assert {"mine/last.ckpt", "job.log", "fold_0/last.ckpt"} <= set(names(tmp_path))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run that came to its end."""
    folder = tmp_path_factory.mktemp("done")
    run(Noisy(), folder)
    return folder


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("something else"),
    "a pickle": lambda path: torch.save({"state_dict": Marker(path.with_name("marker"))}, path),
    "another network": lambda path: _other(path),
}


def _other(path):
    if path.name == NEWEST:
        state = torch.load(path, weights_only=True)
        state["state_dict"] = {"x": torch.zeros(2)}
        torch.save(state, path)
    else:
        _base.save(path, "Noisy", {}, {"x": torch.zeros(2)})


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [NEWEST, BEST])
def test_a_damaged_checkpoint_is_refused_and_the_message_says_what_to_remove(tmp_path, done, name, damage):
    folder = shutil.copytree(done, tmp_path / "run")
    DAMAGE[damage](folder / name)
    with pytest.raises(
        ValueError, match=rf"{name}' is damaged, or not of this run: .*\. Expected: .* resume=True"
    ) as error:
        run(Noisy(), folder, resume=True)
    assert not (folder / "marker").exists(), "code of a pickle ran"
    for path in (folder / NEWEST, folder / BEST):
        if repr(str(path)) in str(error.value).split("Remove ")[1]:
            path.unlink()
    torch.testing.assert_close(run(Noisy(), folder, resume=True), run(Noisy(), None), rtol=0, atol=0)


def test_lost_best_weights_are_noticed(tmp_path, done):
    folder = shutil.copytree(done, tmp_path / "run")
    (folder / BEST).unlink()
    with pytest.raises(ValueError, match="best.safetensors' is damaged, or not of this run: no model file"):
        run(Noisy(), folder, resume=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, done, monkeypatch):
    folder = shutil.copytree(done, tmp_path / "run")
    before = (folder / NEWEST).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint.Files().save_checkpoint({"state_dict": {}}, folder / NEWEST)
    assert (folder / NEWEST).read_bytes() == before
    assert not list(folder.glob("*.tmp"))
