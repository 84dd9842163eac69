"""Files of models: what is written is read, of every version, and what is no model is told apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import spatiaflow as sf
from spatiaflow.models import _base
from spatiaflow.models.slide import Slide

DATA = Path(__file__).parents[1] / "data"
OLD, SAVED = DATA / "stflow-0.1.0.safetensors", DATA / "stflow.safetensors"
NAMES = ("imputation-pancreas-small", "spatia-pancreas-small", "morphology-simulated-small", "cell-features-small")


def rewritten(path, change, to):
    """A copy of a model file whose header is changed."""
    with safe_open(str(path), framework="pt") as file:
        header, tensors = json.loads(file.metadata()["spatiaflow"]), {k: file.get_tensor(k) for k in file.keys()}
    change(header)
    save_file(tensors, str(to), metadata={"spatiaflow": json.dumps(header)})
    return to


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_loaded(name, tmp_path):
    model = sf.models.load(sf.datasets.weights(name))
    again = sf.models.load(model.save(tmp_path / "again"))
    assert type(again) is type(model)
    assert again.sha256 == model.sha256
    assert repr(again) == repr(model)
    assert len(model.genes) in (0, sf.datasets.weights().loc[name, "genes"])
    assert [*again.genes] == [*model.genes]
    assert json.dumps(again.card, default=_base._plain) == json.dumps(model.card, default=_base._plain)


def test_a_file_of_the_first_version_is_refused_with_its_version():
    with pytest.raises(ValueError, match=r"other members than this version's.*It was written by spatiaflow 0\.1\.0"):
        sf.models.load(OLD)


def test_the_kind_that_is_asked_for_is_checked():
    with pytest.raises(TypeError, match=r"must be a Spatia; this is an STFlow, which sf\.tl\.predict_expression takes"):
        sf.models.load(SAVED, kind="Spatia")


def test_every_public_model_states_its_verb():
    sf.models.load  # noqa: B018 - it imports all kinds
    for kind in _base.KINDS.values():
        if kind.__module__.startswith("spatiaflow."):
            space, verb = kind.verb.removeprefix("sf.").split(".")
            assert callable(getattr(getattr(sf, space), verb))


def test_a_path_without_suffix_is_that_of_save(tmp_path):
    model = sf.models.load(sf.datasets.weights(NAMES[0]))
    assert model.save(tmp_path / "panel").name == "panel.safetensors"
    assert sf.models.load(tmp_path / "panel").sha256 == model.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["panel.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model = sf.models.load(sf.datasets.weights(NAMES[0]))
    path = model.save(tmp_path / "panel")
    before = path.read_bytes()

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(size, tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(SAVED.read_bytes()[:size])
    with pytest.raises(ValueError, match="not a readable safetensors file.*truncated.*Save it again"):
        sf.models.load(path)


def test_a_flipped_bit_is_found_by_the_hash(tmp_path):
    content = bytearray(SAVED.read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="sha256 differs"):
        sf.models.load(tmp_path / "flipped.safetensors")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="no spatiaflow model"):
        sf.models.load(path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pickled.safetensors")
    with pytest.raises(ValueError, match="pickled checkpoints are never opened"):
        sf.models.load(tmp_path / "pickled.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda header: header.update(format=99), "model format 99; this version of spatiaflow reads 1.*Upgrade"),
        (lambda header: header.update(kind="Dreamer"), "holds a 'Dreamer'; this version knows.*Imputer.*STFlow"),
        (lambda header: header.pop("genes"), "do not make an STFlow.*It was written by spatiaflow"),
    ],
    ids=["format of the future", "unknown kind", "missing entry"],
)
def test_headers_that_this_version_cannot_read_say_why(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        sf.models.load(rewritten(SAVED, change, tmp_path / "changed.safetensors"))


def with_tensors(change, to):
    """A copy of a model file with other tensors, whose hash is right."""
    with safe_open(str(SAVED), framework="pt") as file:
        header, tensors = json.loads(file.metadata()["spatiaflow"]), {k: file.get_tensor(k) for k in file.keys()}
    change(tensors)
    header["sha256"] = _base.tensors_sha256(tensors)
    save_file(tensors, str(to), metadata={"spatiaflow": json.dumps(header)})
    return to


def network_tensor(tensors):
    return next(name for name in sorted(tensors) if name.startswith("network.0."))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(network_tensor(t)), "lacks 1 tensor"),
        (lambda t: t.update({"network.0.more": torch.zeros(1)}), "has in excess 1 tensor.*'more'"),
        (lambda t: t.update({network_tensor(t): torch.zeros(1, 2, 3)}), r"has shape \(1, 2, 3\), not"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), "holds torch.int32, not torch.float32"),
    ],
    ids=["missing", "in excess", "shape", "type"],
)
def test_tensors_that_are_not_those_of_the_network_are_refused(change, match, tmp_path):
    with pytest.raises(ValueError, match=f"do not make an STFlow: .*{match}"):
        sf.models.load(with_tensors(change, tmp_path / "changed.safetensors"))


@pytest.mark.parametrize("header", ["{", "[]", "null", "{}", '{"kind": 3}', "[" * 100_000])
def test_a_damaged_description_is_refused(header, tmp_path):
    save_file({"x": torch.zeros(2)}, str(tmp_path / "a.safetensors"), metadata={"spatiaflow": header})
    with pytest.raises(
        ValueError, match="the 'spatiaflow' entry in the header of .* (is damaged|does not describe a model)"
    ):
        sf.models.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 10**8 + 1, 2**40, 2**63])
def test_a_header_that_claims_more_than_there_is_is_refused(length, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"x": 1}')
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        sf.models.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("path", "error"), [(None, TypeError), (3, TypeError), ("nowhere", FileNotFoundError)])
def test_what_is_no_path_is_refused(path, error):
    with pytest.raises(error):
        sf.models.load(path)


def test_identity_is_that_of_the_values_and_their_names():
    one, other = torch.arange(6.0), torch.arange(6.0).reshape(2, 3)
    assert _base.tensors_sha256({"a": one, "b": other}) == _base.tensors_sha256({"b": other, "a": one.clone()})
    different = [{"a": other}, {"b": one}, {"a": one.double()}, {"a": one + 1}]
    assert len({_base.tensors_sha256(tensors) for tensors in [{"a": one}, *different]}) == 5


def test_a_card_holds_what_the_model_was_trained_on():
    slide = Slide("s", np.array(["a", "b"]), np.array([[0, 0], [3, 4.0]]))
    card = _base.model_card([slide], config={"width": 2}, seed=1, epochs=3, scores={"r": 0.5}, use_rep="X")
    assert card["data"] == {"s": {"n_obs": 2, "box_um": [0, 0, 3, 4]}}
    assert (card["seed"], card["epochs"], card["validation_scores"], card["use_rep"]) == (1, 3, {"r": 0.5}, "X")
    assert card["licence"] == "not stated"
    assert set(card["versions"]) == {"spatiaflow", "torch", "numpy"}
