"""An encoding that was interrupted goes on, with the result of one that was not."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spatiaflow as sf
from spatiaflow.pp import _parts

N = 90


class Picky:
    """Encoder whose values depend a little on the batch, as those of networks do; it stops at its ``stops_at``-th batch."""

    __name__, channels = "picky", 3

    def __init__(self, stops_at=None, error=KeyboardInterrupt):
        self.stops_at, self.error, self.n = stops_at, error, 0

    def __call__(self, patches):
        if self.n == self.stops_at:
            raise self.error
        self.n += 1
        mean = patches.float().mean((2, 3))
        return mean + 1e-4 * mean.mean(0)


@pytest.fixture
def often(monkeypatch):
    """A file for each batch."""
    monkeypatch.setattr(_parts, "EVERY", 0)


@pytest.fixture(scope="module")
def tissue():
    one = sf.datasets.simulated_tissue(N, seed=0, n_genes=30)
    two = sf.datasets.simulated_tissue(N, seed=1, n_genes=30)
    return [one, two]


def encode(data, encoder, folder=None, **options):
    options = {"image_key": "he", "patch_um": 32.0, "batch_size": 8, "checkpoint_dir": folder} | options
    found = sf.pp.encode_patches(data, encoder=encoder, copy=True, **options)
    tables = [one["table"] for one in (found if isinstance(found, list) else [found])]
    return [(t.obsm["X_picky"], t.obs["tissue"].to_numpy(), t.uns["X_picky"]["stain"]) for t in tables]


def equal(one, two):
    for a, b in zip(one, two, strict=True):
        for values, others in zip(a, b, strict=True):
            assert (
                all(map(np.array_equal, values.values(), others.values()))
                if isinstance(values, dict)
                else (np.array_equal(values, others, equal_nan=True))
            )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_error_the_batches_that_are_done_are_not_encoded_again(tissue, tmp_path, error):
    whole = Picky()
    expected = encode(tissue[0], whole)
    with pytest.raises(error):
        encode(tissue[0], Picky(5, error), tmp_path / "run")
    again = Picky()
    equal(encode(tissue[0], again, tmp_path / "run", resume=True), expected)
    n_checks = again.n + 5 - whole.n
    assert 1 <= n_checks <= _parts.CHECKED  # a batch for each tile that a checked patch lies in
    last = Picky()  # nothing is left
    equal(encode(tissue[0], last, tmp_path / "run", resume=True), expected)
    assert last.n <= _parts.CHECKED


def test_several_objects_go_on_where_they_were(tissue, tmp_path, often):
    expected = encode(tissue, Picky())
    with pytest.raises(KeyboardInterrupt):
        encode(tissue, Picky(15), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"object_0", "object_1"}
    equal(encode(tissue, Picky(), tmp_path, resume=True), expected)


def test_without_resume_a_run_starts_anew(tissue, tmp_path, often):
    encode(tissue[0], Picky(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        encode(tissue[0], Picky(2), tmp_path)
    assert len(list(tmp_path.glob("part_*"))) == 2


KILLED = """
import os, signal, sys
import spatiaflow as sf
from spatiaflow.pp import _parts
sys.path.insert(0, sys.argv[1])
from test_parts import N, Picky, encode
_parts.EVERY = 0
class Killer(Picky):
    def __call__(self, patches):
        if self.n == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(patches)
encode(sf.datasets.simulated_tissue(N, seed=0, n_genes=30), Killer(), sys.argv[2])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tissue, tmp_path):
    arguments = [str(Path(__file__).parent), str(tmp_path / "run")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run").glob("part_*"))) == 4
    equal(encode(tissue[0], Picky(), tmp_path / "run", resume=True), encode(tissue[0], Picky()))


@pytest.fixture(scope="module")
def begun(tissue, tmp_path_factory):
    """The folder of a run that was interrupted."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        encode(tissue[0], Picky(5), folder)
    return folder


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"batch_size": 7}, "batch_size"), ({"patch_um": 24.0}, "patch_um, encoder"), ({"resolution_um": 2.0}, "resolution_um")],
)  # fmt: skip
def test_other_arguments_are_refused(tissue, begun, options, differs):
    with pytest.raises(ValueError, match=f"holds another run: it differs in {differs}. Give the arguments and data"):
        encode(tissue[0], Picky(), begun, resume=True, **options)


def test_other_positions_and_another_encoder_are_refused(tissue, begun):
    with pytest.raises(ValueError, match="it differs in positions"):
        encode(tissue[1], Picky(), begun, resume=True)
    with pytest.raises(ValueError, match="it differs in encoder"):
        sf.pp.encode_patches(
            tissue[0], image_key="he", patch_um=32.0, batch_size=8, checkpoint_dir=begun, resume=True, copy=True
        )


def test_another_picture_in_the_same_place_is_refused(tissue, begun):
    other = sf.datasets.simulated_tissue(N, seed=0, n_genes=30)
    other["he"].data = other["he"].data // 2 * 2
    with pytest.raises(ValueError, match="holds another run: its picture has other pixels. Give"):
        encode(other, Picky(), begun, resume=True)


def test_a_function_that_was_edited_is_refused(tissue, begun):
    class Edited(Picky):
        def __call__(self, patches):
            return super().__call__(patches) * torch.tensor([1, 1.05, 1])  # one feature of three

    with pytest.raises(ValueError, match="the encoder gave other features for the same patches"):
        encode(tissue[0], Edited(), begun, resume=True)


def test_last_digits_of_values_near_zero_are_no_other_encoder(tissue, tmp_path):
    class Rough(Picky):
        def __call__(self, patches):
            found = super().__call__(patches)
            found[:, 1] = 1e-7 * len(patches)
            return found

    with pytest.raises(KeyboardInterrupt):
        encode(tissue[0], Rough(5), tmp_path)
    equal(encode(tissue[0], Rough(), tmp_path, resume=True), encode(tissue[0], Rough()))


@pytest.mark.parametrize("damage", [b"", b"something else", None])
def test_a_damaged_file_is_named_and_can_be_removed(tissue, begun, tmp_path, damage):
    folder = shutil.copytree(begun, tmp_path / "run")
    (path,) = folder.glob("part_*")
    path.write_bytes(path.read_bytes()[:-60] if damage is None else damage)
    with pytest.raises(ValueError, match=r"part_0000_000000.npz' is damaged: .*Remove it, and repeat the call"):
        encode(tissue[0], Picky(), folder, resume=True)
    path.unlink()
    equal(encode(tissue[0], Picky(), folder, resume=True), encode(tissue[0], Picky()))


def test_resume_without_a_folder_is_refused(tissue):
    with pytest.raises(ValueError, match="resume=True needs the checkpoint_dir"):
        encode(tissue[0], Picky(), resume=True)


def test_progress_starts_where_the_run_stopped(tissue, begun, tmp_path, capsys):
    folder = shutil.copytree(begun, tmp_path / "run")
    with sf.settings.override(progress=True):
        encode(tissue[0], Picky(), folder, resume=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encoding with picky")]
    assert "patch/s" in lines[0] and "s left" in lines[0]
    assert f"100 %, patch {N} of {N}" in lines[-1] and not any(": 10 %" in line for line in lines)
