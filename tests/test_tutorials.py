"""Tutorials run from top to bottom, at small settings."""

from pathlib import Path

import nbclient
import nbformat
import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_MIRROR", str(mirror))
    monkeypatch.setenv("SPATIAFLOW_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, 4)
    small = [cell for cell in notebook.cells if "MAX_EPOCHS = 60" in cell.source]
    assert len(small) == 1
    small[0].source = small[0].source.replace("MAX_EPOCHS = 60", "MAX_EPOCHS = 2")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [
        o
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(shown) == 4
