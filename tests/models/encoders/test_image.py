"""Published image encoders: how they are loaded, and what is refused."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from spatiaflow.models.encoders import Encoder, load_encoder

RNG = np.random.default_rng(0)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def save_tiny(folder, kind, **changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, **({"image_size": 32, "patch_size": 8} | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ViTMAE"])
def test_transformers_models_from_a_folder(tmp_path, kind):
    model = save_tiny(tmp_path / "tiny", kind)
    encoder = load_encoder(str(tmp_path / "tiny"))
    patches = torch.from_numpy(RNG.integers(0, 255, (4, 3, 48, 48), dtype=np.uint8))
    out = encoder(patches)
    assert out.shape == (4, 16)
    torch.testing.assert_close(encoder(patches), out)  # nothing is masked at random
    torch.testing.assert_close(encoder(patches[2:3]), out[2:3], atol=1e-5, rtol=1e-5)
    assert len(encoder.sha256) == 64
    assert (encoder.name, encoder.pixels) == ("tiny", 32)
    if kind != "ViTMAE":
        pixels = F.interpolate(patches.float() / 255, (32, 32), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        pixels = (pixels - mean) / std
        with torch.inference_mode():
            torch.testing.assert_close(out, model(pixel_values=pixels).last_hidden_state[:, 0], atol=1e-4, rtol=1e-4)


def test_the_preprocessor_says_size_and_statistics(tmp_path):
    model = save_tiny(tmp_path / "tiny", "Dinov2", image_size=64)
    settings = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 36}}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(tmp_path / "tiny")
    assert encoder.pixels == 32  # the crop, not the 64 px that the position embeddings were made for
    patches = torch.from_numpy(RNG.integers(0, 255, (2, 3, 32, 32), dtype=np.uint8))
    with torch.inference_mode():
        expected = model(pixel_values=(patches / 255 - 0.5) / 0.2).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(patches), expected, atol=1e-4, rtol=1e-4)


def test_a_pooler_drawn_at_random_is_no_part_of_the_identity(tmp_path):
    import transformers

    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "tiny")
    torch.manual_seed(1)
    a = load_encoder(tmp_path / "tiny")
    torch.manual_seed(2)
    b = load_encoder(tmp_path / "tiny")
    assert a.sha256 == b.sha256


def test_a_convolutional_network_gives_one_vector(tmp_path):
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    transformers.ConvNextModel(config).save_pretrained(tmp_path / "net")
    assert load_encoder(tmp_path / "net")(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 16)


def test_a_function_says_what_it_needs():
    def corner(patches):
        return patches[:, :, 0, 0]

    plain = load_encoder(corner)
    assert (plain.name, plain.mpp, plain.pixels, plain.channels, plain.sha256) == ("corner", 0.5, None, None, "")
    corner.mpp, corner.channels = 0.25, 4
    assert load_encoder(corner).patch_pixels(10.0) == 40
    assert load_encoder(corner).channels == 4
    with pytest.raises(ValueError, match=r"\(2, features\); it returned \(2, 3, 8, 8\)"):
        Encoder("same", lambda patches: patches)(torch.zeros(2, 3, 8, 8))


def test_missing_encoders_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "conch", None)
    with pytest.raises(ImportError, match=r"pip install \"spatiaflow\[encoders\]\""):
        load_encoder("uni2-h")
    with pytest.raises(ImportError, match="Mahmoodlab/CONCH"):
        load_encoder("conch")
    with pytest.raises(ValueError, match="checkpoint= is for uni"):
        load_encoder("texture", checkpoint=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"https://huggingface.co/nobody/nothing-here(.|\n)*folder"):
        load_encoder("nobody/nothing-here")


def test_published_networks_may_have_more_threads_than_small_functions(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)

    def count(patches):
        return torch.full((len(patches), 1), torch.get_num_threads())

    patches = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    assert Encoder("small", count)(patches).item() == 1
    assert Encoder("published", count, sha256="of its weights")(patches).item() == 3


def with_header(path, length, header=b"{}"):
    path.write_bytes(length.to_bytes(8, "little") + header)


def other_weights(path, change):
    with safe_open(str(path), framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(change(tensors), str(path), metadata=metadata)


DAMAGE = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged, or not of this network"),
    "empty": (lambda path: path.write_bytes(b""), "damaged, or not of this network"),
    "a header of exabytes": (lambda path: with_header(path, 2**62), "damaged, or not of this network"),
    "a header of 200 MB": (lambda path: with_header(path, 200_000_000), "damaged, or not of this network"),
    "tensors beyond the file": (
        lambda path: with_header(path, 60, b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     '),
        "damaged, or not of this network",
    ),
    "another shape": (
        lambda path: other_weights(path, lambda t: {k: v[..., :1].clone() for k, v in t.items()}),
        "damaged, or not of this network",
    ),
    "whole numbers": (
        lambda path: other_weights(path, lambda t: {k: v.to(torch.int32) for k, v in t.items()}),
        "damaged, or not of this network",
    ),
    "other names": (lambda path: other_weights(path, lambda t: {f"x.{k}": v for k, v in t.items()}), "lack .* tensors"),
    "a pickle alone": (
        lambda path: (torch.save({}, path.with_name("pytorch_model.bin")), path.unlink()),
        "could not be loaded",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_of_a_folder_are_refused(tmp_path, damage):
    save_tiny(tmp_path / "tiny", "ViT")
    spoil, match = DAMAGE[damage]
    spoil(tmp_path / "tiny" / "model.safetensors")
    with pytest.raises(OSError, match=match):
        load_encoder(tmp_path / "tiny")


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_settings_of_a_folder_are_refused(tmp_path, file, text):
    save_tiny(tmp_path / "tiny", "ViT")
    (tmp_path / "tiny" / file).write_text(text)
    with pytest.raises(OSError, match="could not be loaded"):
        load_encoder(tmp_path / "tiny")


def test_half_precision_is_read_as_single(tmp_path):
    save_tiny(tmp_path / "tiny", "ViT")
    other_weights(tmp_path / "tiny" / "model.safetensors", lambda t: {k: v.half() for k, v in t.items()})
    assert load_encoder(tmp_path / "tiny")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).dtype == torch.float32


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import ViTConfig as Config, ViTModel as Model
"""


@pytest.mark.parametrize("kind", ["vit", "of_its_own"])
def test_code_of_a_folder_is_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether it may
    save_tiny(tmp_path / "tiny", "ViT")
    marker = tmp_path / "the code ran"
    (tmp_path / "tiny" / "code.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="asks to run code of its own.*never runs code.*give a function"):
        load_encoder(tmp_path / "tiny")
    assert not marker.exists()


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["uni", "conch"])
def test_a_pickle_of_a_pathology_model_runs_no_code(tmp_path, monkeypatch, name):
    """Their pages have pickled files; timm and conch read them with torch.load, here as carelessly as they can."""
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"x": Marker(tmp_path / "the code ran")}, weights)

    def create(*args, **options):
        return torch.load(weights, weights_only=False)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create))
    monkeypatch.setitem(sys.modules, "conch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "conch.open_clip_custom", SimpleNamespace(create_model_from_pretrained=create))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(OSError, match="could not be loaded"):
        load_encoder(name, checkpoint=tmp_path)
    assert not (tmp_path / "the code ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
