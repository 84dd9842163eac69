"""Datasets that are assembled once: whole or not there, and built again where they are damaged."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf
from spatiaflow.datasets import _assemble, _fetch


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A dataset of one raw file; ``small()`` returns its store's path, ``small.built`` counts how often it was made."""
    sources = {"set": {"raw": _fetch.Source("https://x", "0" * 64, 1)}}
    monkeypatch.setattr(_assemble, "registry", lambda: sources)

    def write(store: Path):
        load.built += 1
        if load.fails:
            (store.parent / "half").write_text("half")
            raise KeyboardInterrupt
        ad.AnnData(np.ones((4, 3), np.float32)).write_h5ad(store)

    def load():
        return _assemble.assembled("set", write, ".h5ad")

    load.built, load.fails, load.sources = 0, False, sources
    with sf.settings.override(cache_dir=tmp_path):
        yield load


def test_a_killed_assembly_leaves_nothing_that_is_read(small, tmp_path):
    small.fails = True
    with pytest.raises(KeyboardInterrupt):
        small()
    assert not list((tmp_path / "set").iterdir())
    (tmp_path / "set" / "assembling-old").mkdir()  # of a process that had no time to clean up
    small.fails = False
    assert ad.read_h5ad(small()).shape == (4, 3)


@pytest.mark.parametrize("damage", ["cut", "lost", "unfinished"])
def test_a_damaged_store_is_built_again(small, damage):
    path = small()
    assert small() == path
    assert small.built == 1
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "lost":
        path.unlink()
    else:
        (path.parent / _assemble.SIZE).unlink()
    assert ad.read_h5ad(small()).shape == (4, 3)
    assert small.built == 2


def test_another_registry_is_another_store(small):
    first = small()
    small.sources["set"]["raw"] = _fetch.Source("https://x", "1" * 64, 1)
    assert small() != first
    assert first.exists()


def test_the_faster_of_two_processes_keeps_its_store(small, monkeypatch):
    """The slower one finds a whole store under the name and leaves it, as it may be in use."""
    path = small()
    (path.parent / "mark").write_text("")
    answers = iter([False, True])
    monkeypatch.setattr(_assemble, "_is_whole", lambda folder: next(answers))
    assert small() == path
    assert small.built == 2
    assert (path.parent / "mark").exists()
