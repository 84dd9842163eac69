"""Code in the pages does what they say."""

import ast
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import spatiaflow as sf
from spatiaflow.train import morphology

DOCS = Path(__file__).parents[1] / "docs"
SMALLER = {
    "index": {"train_stflow(train)": "train_stflow(train, genes=5, max_epochs=2)", "patch_um=155": "patch_um=64"},
    "morphology": {
        "simulated_tissue(1500)": "simulated_tissue(800)",
        "crop_pixels=32": "crop_pixels=16, n_latent=16, width=64, n_layers=2",
    },
}


def test_an_encoder_of_your_own_is_twenty_lines():
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "encoders.md").read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 20
    space = {}
    exec(code, space)
    features = space["slide"]["table"].obsm["X_my_encoder"]
    assert features.shape == (300, 32)
    assert features.std(0).max() > 0
    assert space["slide"]["table"].uns["X_my_encoder"]["mpp"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["index", "concepts", "levels", "cohorts", "imputation", "uncertainty", "morphology", "weights"]
)
def test_the_first_example_of_a_page_runs(page, mirror, monkeypatch):
    monkeypatch.setattr(morphology, "MAX_STEPS", 60)
    monkeypatch.setattr(morphology, "MIN_BATCHES", 20)
    code = re.search(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.S)[1]
    for old, new in SMALLER.get(page, {}).items():
        assert old in code
        code = code.replace(old, new)
    with sf.settings.override(mirror=str(mirror)):
        exec(code, {})
    plt.close("all")


def test_every_test_that_a_page_names_exists():
    root = DOCS.parent
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    for file, test in named:
        functions = [
            node.name for node in ast.parse((root / file).read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        assert test in functions, f"{file} has no {test}"
    rows = [
        line for line in (DOCS / "reliability.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    assert len(rows) == 1 + len(named), "every row names one test"
