"""Every public function and class shows how it is called, and what it shows is true."""

import doctest
import inspect
import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd

import spatiaflow as sf
from spatiaflow.models import encoders
from spatiaflow.train import morphology

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
API = Path(__file__).parents[1] / "docs" / "api.md"
FRESH = {"sdata": sd.deepcopy, "adata": lambda adata: adata.copy(), "model": lambda model: model}
SLOW = {"sf.tl.train_morphology"}
FROM_MIRROR = re.compile(r"datasets\.(her2st|merfish|mouse|starmap|visium|xenium)")


def public(module, path):
    """Name and object of all functions and classes that a module exposes; an instance stands for its class."""
    for name in module.__all__:
        one, name = getattr(module, name), f"{path}.{name}"
        if inspect.ismodule(one):
            yield from public(one, name)
        elif inspect.isclass(one) or inspect.isfunction(one):
            yield name, one
        elif type(one).__module__.startswith("spatiaflow"):
            yield name, type(one)


PUBLIC = dict([*public(sf, "sf"), *public(encoders, "sf.models.encoders")])
FOUND = [test for name, one in PUBLIC.items() for test in doctest.DocTestFinder().find(one, name)]
EXAMPLES = {test.name: test for test in FOUND if test.examples}


@cache
def shared() -> dict:
    """What examples begin with, as the page of the API makes it."""
    (code,) = re.findall(r"```python\n(.*?)```", API.read_text(encoding="utf-8"), re.S)
    space = {}
    exec(code, space)
    return space


def takes(key, source):
    """Whether an example reads a variable before it assigns it."""
    first = re.search(rf"\b{key}\b(?P<assigned> = )?", source)
    return bool(first and not first["assigned"])


@pytest.mark.parametrize("name", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in EXAMPLES])
def test_example_runs(name, request, tmp_path, monkeypatch):
    test, said = EXAMPLES[name], []
    source = "".join(example.source for example in test.examples)
    real = FROM_MIRROR.search(source) and sf.settings.override(mirror=str(request.getfixturevalue("mirror")))
    needed = [key for key in FRESH if takes(key, source)]
    monkeypatch.setattr(morphology, "MAX_STEPS", 60)  # of the autoencoder
    test.globs = {"sf": sf, "np": np} | {key: FRESH[key](shared()[key]) for key in needed}
    monkeypatch.chdir(tmp_path)
    with real or nullcontext():
        result = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=said.append)
    plt.close("all")
    assert not result.failed, "".join(said)


def test_everything_public_has_an_example():
    assert not [name for name in PUBLIC if name not in EXAMPLES]


def test_no_example_is_skipped():
    assert not [k for k, test in EXAMPLES.items() if any(e.options.get(doctest.SKIP) for e in test.examples)]
