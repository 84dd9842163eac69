"""datasets.weights and the argument model= of verbs: names, paths and models, and errors that name both kinds."""

import logging
import shutil
from pathlib import Path

import pytest

import spatiaflow as sf
from spatiaflow.datasets import _weights

NAME = "imputation-pancreas-small"
BUNDLED = sf.datasets.weights().query("bundled").index


def test_the_table_describes_every_file_that_comes_with_the_package():
    table = sf.datasets.weights()
    folder = sf.datasets.weights(NAME).parent
    assert set(BUNDLED) == {path.stem for path in folder.glob("*.safetensors")}
    for name in BUNDLED:
        path = sf.datasets.weights(name)
        assert path.stat().st_size == table.loc[name, "bytes"]
        assert path.with_suffix(".md").is_file(), "a model card"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_weights_are_of_the_kind_that_the_table_says(name):
    assert sf.models.load(sf.datasets.weights(name)).kind == sf.datasets.weights().loc[name, "model"]


RESTRICTED = {
    "cell-features-small", "imputation-pancreas-small", "morphology-pancreas-genes", "morphology-pancreas-small",
    "spatia-pancreas-small",
}  # fmt: skip


@pytest.fixture
def said(monkeypatch):
    """Lines that the package logs, in a process that has loaded nothing yet."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(_weights, "_told", set())
    logging.getLogger("spatiaflow").addHandler(handler)
    with sf.settings.override(verbosity="info"):
        yield lines
    logging.getLogger("spatiaflow").removeHandler(handler)


def test_a_restricted_licence_is_said_once(said):
    assert sf.datasets.weights() is not None and not said
    sf.datasets.resolve("stflow-breast-small", "STFlow")
    assert not said
    for _ in range(2):
        sf.datasets.resolve(NAME, "Imputer")
        sf.models.load(sf.datasets.weights("morphology-pancreas-genes"))
    (line,) = said
    assert NAME in line and "non-commercial" in line and "docs/weights.md" in line


def test_every_place_that_lists_weights_states_their_licence():
    table, page = sf.datasets.weights(), Path(__file__).parents[2] / "docs" / "weights.md"
    assert set(table.index[table["license"].str.contains("non-commercial")]) == RESTRICTED
    rows = {
        line.split("`")[1]: line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    }
    assert set(rows) == set(table.index)
    for name in table.index:
        card = sf.datasets.weights(name).with_suffix(".md").read_text(encoding="utf-8")
        for text in (card, rows[name]):
            assert ("non-commercial" in text.replace("*", "")) == (name in RESTRICTED), name


def test_unknown_weights_list_the_known_ones():
    with pytest.raises(ValueError, match=f"no weights 'spatia-pancreas'.*{NAME}.*path"):
        sf.datasets.weights("spatia-pancreas")


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    shutil.copytree(sf.datasets.weights(NAME).parent, folder)
    monkeypatch.setattr(_weights, "package_files", lambda package: tmp_path)
    file = folder / f"{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="damaged or missing.*Install spatiaflow again"):
        sf.datasets.weights(NAME)


def test_a_name_a_path_and_a_model_are_the_same_model(tmp_path):
    by_name = sf.datasets.resolve(NAME, "Imputer")
    path = by_name.save(tmp_path / "saved")
    for model in (path, str(path), by_name, sf.datasets.resolve(None, "Imputer", default=NAME)):
        assert sf.datasets.resolve(model, "Imputer").sha256 == by_name.sha256
    assert sf.datasets.resolve(by_name, "Imputer") is by_name


def test_a_file_without_suffix_is_a_path_and_not_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(sf.datasets.weights(NAME), tmp_path / "mine")
    assert sf.datasets.resolve("mine", "Imputer").kind == "Imputer"


def test_a_model_of_another_kind_is_told_with_the_verb_that_takes_it():
    match = r"init must be a Spatia; this is an Imputer, which sf\.tl\.impute_genes takes"
    with pytest.raises(TypeError, match=match):
        sf.datasets.resolve(NAME, "Spatia", argument="init")
    with pytest.raises(
        TypeError, match=r"model must be an Imputer; this is a Spatia, which sf\.tl\.embed_spatia takes"
    ):
        sf.datasets.resolve(sf.models.load(sf.datasets.weights("spatia-pancreas-small")), "Imputer")


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (3, TypeError, "model must be an Imputer, the path of a saved one, or the name of weights, not int"),
        (None, TypeError, "not NoneType"),
        ("imputation", ValueError, "no weights 'imputation'"),
        ("nowhere.safetensors", FileNotFoundError, "no model file at 'nowhere.safetensors'"),
    ],
)
def test_what_is_no_model_is_refused(model, error, match):
    with pytest.raises(error, match=match):
        sf.datasets.resolve(model, "Imputer")
