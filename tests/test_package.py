"""Conventions that later parts of the package cannot drift from: imports, layers, signatures, docstrings."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from numpydoc.docscrape import NumpyDocString

import spatiaflow

SOURCE = Path(spatiaflow.__file__).parent
ORDER = (
    "table_key image_key shapes_key labels_key library_key spatial_key mpp batch_size device random_state key_added copy"
).split()


def public_functions():
    for module in ("datasets", "get", "metrics", "pl", "pp", "tl"):
        namespace = getattr(spatiaflow, module)
        for name in namespace.__all__:
            if inspect.isfunction(getattr(namespace, name)):
                yield pytest.param(module, getattr(namespace, name), id=f"{module}.{name}")


def test_import_is_light():
    code = "import sys, spatiaflow; print(sorted({'torch', 'squidpy', 'scanpy', 'lightning'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FORBIDDEN = {
    "models": "anndata scanpy spatialdata squidpy lightning pandas spatiaflow._io spatiaflow.tl spatiaflow.pp spatiaflow.pl "
    "spatiaflow.get spatiaflow.train spatiaflow.datasets spatiaflow.metrics",
    "train": "anndata scanpy spatialdata squidpy spatiaflow._io spatiaflow.tl spatiaflow.pp spatiaflow.pl spatiaflow.get "
    "spatiaflow.datasets",
    "metrics": "anndata spatialdata spatiaflow.tl spatiaflow.pp spatiaflow.pl spatiaflow.train spatiaflow.get",
    "pl": "torch lightning spatiaflow.models spatiaflow.train spatiaflow.tl spatiaflow.pp",
    "pp": "lightning spatiaflow.train spatiaflow.tl spatiaflow.pl",
    "tl": "spatiaflow.pl",
    "get": "torch spatiaflow.tl spatiaflow.pl spatiaflow.pp spatiaflow.models",
    "datasets": "torch lightning spatiaflow.tl spatiaflow.pl spatiaflow.pp spatiaflow.train",
    "_io": "torch spatiaflow._slides spatiaflow.tl spatiaflow.pl spatiaflow.pp spatiaflow.models spatiaflow.train",
    "_slides": "lightning spatiaflow.tl spatiaflow.pl spatiaflow.pp spatiaflow.train",
}
ALLOWED = "spatiaflow.models.slide"  # the container, which needs no torch


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_imports_go_one_way(layer):
    banned = FORBIDDEN[layer].split()
    broken = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in sorted((SOURCE / layer).rglob("*.py"))
        for name in imports(path)
        if not name.startswith(ALLOWED) and any(name == b or name.startswith(b + ".") for b in banned)
    ]
    assert not broken


def test_models_run_without_the_data_libraries():
    code = (
        "import sys, spatiaflow.models; print(sorted({'anndata', 'scanpy', 'lightning', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize(("module", "function"), list(public_functions()))
def test_signature(module, function):
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if module in ("pp", "tl", "get", "pl"):
        assert positional[:1] == ["data"], "the first argument is `data`"
        assert len(positional) <= (2 if module == "pl" else 1), "only `data` is positional"
    else:
        assert len(positional) <= 4
    shared = [p.name for p in parameters if p.name in ORDER]
    assert shared == sorted(shared, key=ORDER.index), "shared arguments come in one order"
    for p in parameters:
        if p.name == "copy":
            assert p.default is False
        if p.name == "random_state":
            assert p.default is None
        if p.name in ("image_key", "shapes_key", "labels_key", "library_key", "mpp", "device"):
            assert p.default is None
        if p.name == "table_key":
            assert p.default == "table"


@pytest.mark.parametrize(("module", "function"), list(public_functions()))
def test_docstring(module, function):
    doc = NumpyDocString(inspect.getdoc(function) or "")
    assert "".join(doc["Summary"]).strip(), "a summary"
    documented = {name.lstrip("*").strip() for entry in doc["Parameters"] for name in entry.name.split(",")}
    named = {p.name for p in inspect.signature(function).parameters.values()}
    assert named == documented, "every parameter is documented, and no other"
    text = inspect.getdoc(function)
    assert "Returns\n-------" in text
    if "key_added" in named:
        assert "Sets:" in text and "Raises\n------" in text
