"""Tutorials run from top to bottom, at small settings."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client import KernelManager

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))

# what is made smaller, and how many figures a tutorial shows
SMALLER = {
    "expression_from_histology": (
        {
            "MAX_EPOCHS = 60": "MAX_EPOCHS = 2",
            "(train, max_epochs": "(train, genes=8, max_epochs",
            "patch_um=155": "patch_um=64",
        },
        4,
    ),
    "from_a_picture": ({}, 4),
    "impute_with_trust": (
        {".ravel() >= 15].copy()": ".ravel() >= 15][::3].copy()", "starmap_mpfc()": "starmap_mpfc()[::3].copy()"},
        2,
    ),
    "levels_of_tissue": ({'table = sdata["table"]': 'sdata["table"] = table = sdata["table"][::5].copy()'}, 4),
    "morphology_by_gene_dose": ({"doses = [0, 0.25, 0.5, 0.75, 1]": "doses = [0, 0.5, 1]"}, 3),
    "morphology_transition": ({"simulated_tissue(3000, seed=7)": "simulated_tissue(800, seed=7)"}, 5),
    "niches_across_a_cohort": ({"simulated_tissue(700, seed=i)": "simulated_tissue(300, seed=i)"}, 3),
    "your_own_data": (
        {
            "SIZE = 1536": "SIZE = 768",
            'TRAIN = ["C3", "C4", "C5"]': 'TRAIN = ["C5"]',
            ', "B4": "B4, another donor"': "",
            "MAX_EPOCHS = 12": "MAX_EPOCHS = 2",
            "(train, max_epochs": "(train, genes=8, max_epochs",
            "patch_um=155": "patch_um=64",
            "(hidden), 150": "(hidden), 60",
        },
        6,
    ),
}


# names of the last tutorial are gone
NEXT = "%reset -f\nimport os; os.chdir({folder!r}); del os"


@pytest.fixture(scope="module")
def kernel(mirror, tmp_path_factory):
    """One process for all tutorials: libraries are imported, and public tissue is assembled, once."""
    manager = KernelManager(kernel_name="python3")
    used = {
        "SPATIAFLOW_MIRROR": str(mirror),
        "SPATIAFLOW_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    manager.start_kernel(env=os.environ | used)
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, kernel, tmp_path):
    notebook = nbformat.read(path, 4)
    small, figures = SMALLER[path.stem]
    for old, new in small.items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NEXT.format(folder=str(tmp_path))))
    nbclient.NotebookClient(notebook, km=kernel, timeout=600).execute()
    shown = [
        o
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(shown) == figures
