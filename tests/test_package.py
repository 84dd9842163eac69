"""Conventions that later parts of the package cannot drift from: files of tests, imports, layers, signatures, docstrings."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from numpydoc.docscrape import NumpyDocString

import spatiaflow
from spatiaflow import _process

SOURCE, TESTS = Path(spatiaflow.__file__).parent, Path(__file__).parent
ORDER = (
    "table_key image_key shapes_key labels_key library_key spatial_key mpp batch_size device random_state key_added copy"
).split()


def public_functions(*modules: str):
    for module in modules or ("datasets", "get", "metrics", "pl", "pp", "tl"):
        namespace = getattr(spatiaflow, module)
        for name in namespace.__all__:
            if inspect.isfunction(one := getattr(namespace, name)):
                yield pytest.param(module, one, id=f"{module}.{name}")


def loaded_by(code: str) -> set[str]:
    """Packages that are in memory after some code, in a fresh interpreter."""
    code = f"import sys, spatiaflow as sf; {code}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_module_has_a_test_file_of_its_own():
    modules = [path.relative_to(SOURCE) for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]
    own = {module: module.parent / f"test_{module.name.removeprefix('_')}" for module in modules}
    missing = [
        f"tests/{file} of src/spatiaflow/{module}"
        for module, file in own.items()
        if not (TESTS / file).is_file() or "def test_" not in (TESTS / file).read_text(encoding="utf-8")
    ]
    assert modules
    assert not missing, (
        "tests mirror src: each module has a file with tests of its own, such as tests/metrics/test_spatial.py of "
        f"src/spatiaflow/metrics/_spatial.py. Missing: {', '.join(missing)}"
    )


HEAVY = {
    "sf": "anndata lightning scanpy spatialdata squidpy torch",
    "sf.settings": "anndata lightning scanpy spatialdata squidpy torch",
    "sf.models": "anndata lightning pandas scanpy spatialdata squidpy torch",
    "sf.datasets": "lightning scanpy spatialdata squidpy torch",
    "sf.metrics": "anndata lightning scanpy spatialdata squidpy torch",
    "sf.get": "lightning scanpy squidpy torch",
    "sf.pl": "lightning scanpy squidpy torch",
    "sf.pp": "lightning scanpy squidpy",
    "sf.tl": "lightning squidpy",
}


@pytest.mark.parametrize("namespace", HEAVY)
def test_import_is_light(namespace):
    """Nothing that takes a second to import is loaded before it is needed."""
    assert not loaded_by(namespace) & set(HEAVY[namespace].split())


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
    "tl": "torch lightning spatiaflow.pl",
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
    code = "[getattr(sf.models, name) for name in sf.models.__all__]"
    assert not loaded_by(code) & {"anndata", "scanpy", "lightning", "pandas"}


FIXED = {  # shared arguments: annotation, default
    "table_key": ("str", "table"),
    "image_key": ("str | None", None),
    "shapes_key": ("str | None", None),
    "labels_key": ("str | None", None),
    "library_key": ("str | None", None),
    "spatial_key": ("str", "spatial"),
    "mpp": ("float | None", None),
    "device": ("str | None", None),
    "random_state": ("int | None", None),
    "copy": ("bool", False),
    "layer": ("str | None", None),
    "show": ("bool | None", None),
    "return_fig": ("bool", False),
}
OLD_NAMES = {"features_key", "preset", "workers", "n_variants", "pixels"}
MAX_ARGUMENTS, MAX_LINES = 20, 60


@pytest.mark.parametrize(("module", "function"), list(public_functions()))
def test_signature(module, function):
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if module in ("pp", "tl", "get", "pl"):
        first = "image" if function.__name__ == "grid" else "data"  # a bare picture is no data yet
        assert positional[:1] == [first], "the first argument is `data`"
        assert len(positional) <= (2 if module == "pl" else 1), "only `data` is positional"
    else:
        assert len(positional) <= 4
    shared = [p.name for p in parameters if p.name in ORDER]
    assert shared == sorted(shared, key=ORDER.index), "shared arguments come in one order"
    for p in parameters:
        if p.name in FIXED and module != "metrics":  # images of metrics.image_features have no scale of their own
            assert p.default == FIXED[p.name][1], f"default of {p.name}"


def untyped(function) -> list[str]:
    """Arguments without a type, shared ones with another type than everywhere, and "return" where it has none."""
    signature = inspect.signature(function)
    found = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    found += [p.name for p in signature.parameters.values() if p.name in FIXED and p.annotation != FIXED[p.name][0]]
    return found + (["return"] if signature.return_annotation is signature.empty else [])


@pytest.mark.parametrize(("module", "function"), list(public_functions()))
def test_every_argument_has_a_type(module, function):
    assert not untyped(function)


def test_every_argument_of_a_public_class_has_a_type():
    spaces = [getattr(spatiaflow, module) for module in ("datasets", "get", "metrics", "pl", "pp", "tl")]
    classes = [one for space in spaces for name in space.__all__ if inspect.isclass(one := getattr(space, name))]
    classes.append(type(spatiaflow.settings))
    methods = [one for c in classes for name, one in vars(c).items() if inspect.isfunction(one) and name[0] != "_"]
    assert not {method.__qualname__: found for method in methods if (found := untyped(method))}


@pytest.mark.parametrize(("module", "function"), list(public_functions()))
def test_names_of_arguments_are_the_shared_ones(module, function):
    assert not OLD_NAMES & set(inspect.signature(function).parameters)


@pytest.mark.parametrize(("module", "function"), list(public_functions("get", "pl", "pp", "tl")))
def test_verbs_are_thin(module, function):
    (node,) = ast.parse(inspect.getsource(inspect.unwrap(function))).body
    body = node.body[1:]  # without the docstring
    n_arguments, n_lines = len(inspect.signature(function).parameters), body[-1].end_lineno - body[0].lineno + 1
    assert n_arguments <= MAX_ARGUMENTS
    assert n_lines <= MAX_LINES


@pytest.mark.parametrize(("module", "function"), list(public_functions("datasets", "get", "pl", "pp", "tl")))
def test_verbs_leave_the_process_as_it_was(module, function):
    assert function.__code__.co_filename == _process.__file__, "the outermost decorator is @verb of _process.py"


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


UNSAFE = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def unsafe(path: Path):
    """Calls of a file by which something could be unpickled, or code that is not installed be run."""
    tree = ast.parse(path.read_text())
    yield from (name for name in imports(path) if name.split(".")[0] in UNSAFE)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        short = called.split(".")[-1]
        if called in ("eval", "exec", "torch.hub.load", "importlib.import_module") and path.name != "__init__.py":
            yield called
        if called == "torch.load" and said.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called.startswith("trainer.") and "ckpt_path" in said and said.get("weights_only") != "True":
            yield "a checkpoint of Lightning without weights_only=True"
        if short in ("load", "read_pickle") and called.split(".")[0] in ("np", "numpy", "pd", "pandas"):
            if short == "read_pickle" or said.get("allow_pickle", "False") != "False":
                yield called
        if short == "from_pretrained" and {said.get("trust_remote_code"), said.get("use_safetensors")} != {
            "False",
            "True",
        }:
            yield f"{called} without trust_remote_code=False and use_safetensors=True"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_unpickled_and_no_foreign_code_is_run(path):
    assert not list(unsafe(path))


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from joblib import load", "torch.load(p)", "np.load(p, allow_pickle=True)", "pd.read_pickle(p)",
     "AutoModel.from_pretrained(p)", "trainer.fit(m, ckpt_path=p)", "torch.hub.load(p)", "torch.load(p, weights_only=False)"],
)  # fmt: skip
def test_what_would_unpickle_is_found(tmp_path, code):
    (tmp_path / "some.py").write_text(code)
    assert list(unsafe(tmp_path / "some.py"))
