"""Image encoders by name, path or function."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from spatiaflow._process import threads, verb
from spatiaflow.models import _base
from spatiaflow.models.encoders import _texture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class Encoder:
    """A function from patches to features, with the input that it needs.

    Attributes
    ----------
    id
        Full name: hub id, path or function name.
    function
        uint8 patches (n x C x h x w, on the encoder's device) to features (n x F).
    mpp
        µm per pixel that it was made for; None where it was made for no scale (then ``pixels`` is set).
    pixels
        Input size in pixels; None where it follows from ``mpp`` and the patch's width in µm.
    multiple
        Where ``pixels`` is None, the number of pixels is a multiple of this.
    channels
        Channels it needs; None: any.
    sha256
        Of the weights; "" where there are none.
    feature_names
        Names of the features; empty where they have none.

    Examples
    --------
    >>> from spatiaflow.models.encoders import Encoder
    >>> encoder = Encoder("mean_colour", lambda patches: patches.float().mean((2, 3)), mpp=1.0)
    >>> sf.pp.encode_patches(sdata, encoder=encoder, image_key="he", patch_um=32)
    >>> sdata["table"].obsm["X_mean_colour"].shape
    (300, 3)
    """

    id: str
    function: Callable[[Tensor], Tensor]
    mpp: float | None = 0.5
    pixels: int | None = None
    multiple: int = 1
    channels: int | None = 3
    sha256: str = ""
    feature_names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the id."""
        return Path(self.id).name

    def patch_pixels(self, patch_um: float) -> int:
        """Pixels of a patch that is ``patch_um`` wide."""
        if self.pixels:
            return self.pixels
        return max(-(-8 // self.multiple), round(patch_um / cast("float", self.mpp) / self.multiple)) * self.multiple

    @torch.inference_mode()
    def __call__(self, patches: Tensor) -> Tensor:
        """Encode uint8 patches, n x C x h x w; the result (n x F, float32) is on the CPU."""
        with threads(large=bool(self.sha256)):  # published networks are large
            out = self.function(patches)
        if not isinstance(out, Tensor | np.ndarray):
            raise TypeError(f"encoder {self.id!r} must return a tensor or an array, not {type(out).__name__}.")
        out = torch.as_tensor(out)
        if out.ndim != 2 or len(out) != len(patches):
            raise ValueError(
                f"encoder {self.id!r} must return one vector a patch, ({len(patches)}, features); it returned {tuple(out.shape)}."
            )
        return out.float().cpu()


@dataclass(frozen=True)
class _Published:
    """A pathology model whose weights need access granted at its page."""

    hub: str
    license: str
    options: dict  # arguments of timm.create_model that its page gives
    swiglu: bool = False
    mean: tuple = IMAGENET[0]
    std: tuple = IMAGENET[1]


# all take 224 px at 0.5 µm per pixel, that is 112 µm
TIMM = {
    "uni": _Published("MahmoodLab/UNI", "CC-BY-NC-ND-4.0", {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni2-h": _Published(
        "MahmoodLab/UNI2-h",
        "CC-BY-NC-ND-4.0",
        {
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
        },
        swiglu=True,
    ),
    "virchow2": _Published("paige-ai/Virchow2", "CC-BY-NC-ND-4.0", {}, swiglu=True),
    "gigapath": _Published("prov-gigapath/prov-gigapath", "Apache-2.0 with terms of use", {}),
    "h-optimus-0": _Published(
        "bioptimus/H-optimus-0",
        "Apache-2.0",
        {"init_values": 1e-5, "dynamic_img_size": False},
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
    ),
}  # fmt: skip
# CONCH comes with a package of its own; 448 px of 20x tissue
CONCH_HUB, CONCH_PIXELS = "MahmoodLab/CONCH", 448
CONCH_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# encoders without weights: an entry here is all that a new one needs
WEIGHT_FREE: dict[str, Callable[[], Encoder]] = {
    "texture": lambda: Encoder(
        "texture", _texture.texture, _texture.MPP, multiple=_texture.PIXEL_MULTIPLE, feature_names=_texture.names()
    )
}
SHORT_NAMES = (*WEIGHT_FREE, *TIMM, "conch")


@verb
def load_encoder(
    encoder: str | Path | Callable | Encoder,
    *,
    checkpoint: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Return an encoder by name.

    Parameters
    ----------
    encoder
        ``"texture"`` (weight-free); the short name of a pathology model ("uni", "uni2-h", "virchow2", "gigapath",
        "h-optimus-0", "conch"), which needs the extra ``encoders`` and access to its weights; the hub id or local
        folder of any vision model of transformers; or a function of uint8 patches (n x C x h x w) to features, whose
        attributes ``mpp``, ``pixels`` and ``channels`` say what it needs (0.5 µm per pixel, any size, any channels).
    checkpoint
        Where there is no network: the folder of a pathology model, downloaded from its page (config.json and weights);
        for "conch" the file of the weights.
    device
        Where weights go.

    Raises
    ------
    TypeError
        ``encoder`` is none of these.
    ValueError
        The name is almost that of an encoder.
    ImportError
        The model needs a package.
    OSError
        The weights cannot be loaded, or the model asks to run code of its own; the message says what to do.

    Examples
    --------
    >>> from spatiaflow.models.encoders import load_encoder
    >>> encoder = load_encoder("texture")
    >>> encoder.mpp, len(encoder.feature_names)
    (1.0, 118)
    """
    if isinstance(encoder, Encoder):
        return encoder
    if callable(encoder):
        name = getattr(encoder, "__name__", type(encoder).__name__)
        needs: dict[str, Any] = {
            key: getattr(encoder, key, default) for key, default in (("mpp", 0.5), ("pixels", None), ("channels", None))
        }
        return Encoder(name, encoder, **needs)
    if checkpoint is not None and str(encoder) not in (*TIMM, "conch"):
        raise ValueError(
            f"checkpoint= is for {', '.join(TIMM)} and conch; give the folder of the model as encoder instead."
        )
    if not isinstance(encoder, str | Path):
        raise TypeError(f"encoder must be a name, a path, a function or an Encoder, not {encoder!r}.")
    if str(encoder) in WEIGHT_FREE:
        return WEIGHT_FREE[str(encoder)]()
    if str(encoder) == "conch":
        return _conch(checkpoint, device)
    if str(encoder) in TIMM:
        return _timm(str(encoder), checkpoint, device)
    if not Path(encoder).exists() and (near := get_close_matches(str(encoder).lower(), SHORT_NAMES, 1, 0.75)):
        raise ValueError(f"there is no encoder {str(encoder)!r}; did you mean {near[0]!r}?")
    return _transformers(str(encoder), device)


def _prepare(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A function from uint8 patches to an encoder's input: its size, scaled by mean and standard deviation."""

    def prepare(patches: Tensor) -> Tensor:
        x = patches.float() / 255
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]

    return prepare


def _transformers(name: str, device: torch.device | str) -> Encoder:
    from transformers import AutoModel
    from transformers.utils import cached_file

    try:
        model, loading = safely_loaded(AutoModel, name)
        found = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        settings = json.loads(Path(found).read_text()) if found else {}
        if not isinstance(settings, dict):
            raise ValueError(f"{found!r} holds a {type(settings).__name__}, not settings by name")
    except (OSError, ValueError) as error:
        raise OSError(
            f"encoder {name!r} could not be loaded: {error}\nKnown short names: {', '.join(SHORT_NAMES)}. A hub model needs "
            f"network and, if it is gated, access granted at https://huggingface.co/{name} and `hf auth login`. Without "
            "network, copy its folder (config.json, model.safetensors) here and give the folder's path as encoder."
        ) from error
    random = set(loading["missing_keys"])
    if unknown := [key for key in random if "pooler" not in key]:
        raise OSError(
            f"the weights of {name!r} lack {len(unknown)} tensors of the model (first: {sorted(unknown)[0]!r})."
        )
    model = model.eval().to(device)
    size = _input_size(settings, model.config)
    prepare = _prepare(size, settings.get("image_mean") or IMAGENET[0], settings.get("image_std") or IMAGENET[1])
    options: dict[str, Any] = {}
    takes = inspect.signature(model.forward).parameters
    if "interpolate_pos_encoding" in takes and size != _side(getattr(model.config, "image_size", size)):
        options["interpolate_pos_encoding"] = True
    is_mae = model.config.model_type == "vit_mae"
    if is_mae:
        model.config.mask_ratio = 0.0

    def encode(patches: Tensor) -> Tensor:
        if is_mae:  # nothing is masked, and constant noise keeps the tokens in their order
            tokens = (size // model.config.patch_size) ** 2
            options["noise"] = torch.arange(tokens, device=patches.device).float().expand(len(patches), -1)
        return _vector(model(pixel_values=prepare(patches), **options).last_hidden_state)

    # a pooler that the file lacks is drawn at random: it is not used, and not part of the identity
    weights = {key: value for key, value in model.state_dict().items() if key not in random}
    return Encoder(name, encode, mpp=None, pixels=size, sha256=_base.tensors_sha256(weights))


def safely_loaded(kind: Any, name: str) -> tuple[Any, dict]:
    """Load a model of transformers by hub id or folder, from safetensors and without any code that is not installed.

    Parameters
    ----------
    kind
        Class of transformers.

    Returns
    -------
    The model in single precision, and transformers' account of the loading.

    Raises
    ------
    ValueError
        The model brings code of its own, or its file is damaged or not of this network.
    OSError
        It is not there, or has no safetensors.
    """
    from transformers import PretrainedConfig
    from transformers.utils import cached_file

    try:
        config, _ = PretrainedConfig.get_config_dict(name)
        if own := {
            key: code for key, code in (config.get("auto_map") or {}).items() if key in ("AutoConfig", "AutoModel")
        }:
            raise ValueError(
                f"its config.json asks to run code of its own (auto_map: {own}), and spatiaflow never runs code from a folder or "
                "the hub. If you trust it, load the model yourself and give a function of patches as encoder. If transformers "
                "knows the architecture, remove auto_map from config.json in a copy of the folder."
            )
        model, loading = kind.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        weights = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        if weights is not None:  # None: in several parts
            _base.check_types(weights, model.state_dict())
    except (RuntimeError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its weights or config.json are damaged, or not of this network: {error}") from error
    return model, loading


def _input_size(settings: dict, config: Any) -> int:
    """Side of the input in pixels: what the preprocessor crops or resizes to, else what the model was built for."""
    crop = settings.get("crop_size") if settings.get("do_center_crop", True) else None
    for given in (crop, settings.get("size"), getattr(config, "image_size", None)):
        if side := _side(given):
            return side
    return 224


def _side(size: Any) -> int | None:
    """Side in pixels of a size as configurations state it."""
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        size = size[0]
    return int(size) if size else None


def _vector(hidden: Tensor) -> Tensor:
    """One vector a patch: the class token of a transformer, the mean over places of a convolutional network."""
    return hidden.mean((-2, -1)) if hidden.ndim == 4 else hidden[:, 0]


def _timm(name: str, checkpoint: str | Path | None, device: torch.device | str) -> Encoder:
    published = TIMM[name]
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'encoder {name!r} needs timm: pip install "spatiaflow[encoders]"') from error
    options = {"num_classes": 0, **published.options}
    if published.swiglu:
        options |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    where = f"hf-hub:{published.hub}" if checkpoint is None else f"local-dir:{_existing(checkpoint)}"
    try:
        with _tensors_only():
            model = timm.create_model(where, pretrained=True, **options).eval().to(device)
    except Exception as error:  # hub errors of many kinds: gated, offline, not found
        raise OSError(_refused(name, published.hub, published.license, error)) from error
    prepare = _prepare(224, published.mean, published.std)

    def encode(patches: Tensor) -> Tensor:
        out = model(prepare(patches))
        if out.ndim == 3:  # Virchow2: the class token beside the mean of the patch tokens, 4 registers between them
            out = torch.cat([out[:, 0], out[:, 5:].mean(1)], 1)
        return out

    return Encoder(f"hf-hub:{published.hub}", encode, pixels=224, sha256=_base.tensors_sha256(model.state_dict()))


def _conch(checkpoint: str | Path | None, device: torch.device | str) -> Encoder:
    try:
        from conch.open_clip_custom import create_model_from_pretrained
    except ImportError as error:
        raise ImportError(
            "encoder 'conch' needs its authors' package: pip install git+https://github.com/Mahmoodlab/CONCH.git"
        ) from error
    where = _existing(checkpoint) if checkpoint is not None else f"hf_hub:{CONCH_HUB}"
    try:
        with _tensors_only():
            model, _ = create_model_from_pretrained("conch_ViT-B-16", where)
    except Exception as error:  # hub errors of many kinds: gated, offline, not found
        raise OSError(_refused("conch", CONCH_HUB, "CC-BY-NC-ND-4.0", error)) from error
    model = model.eval().to(device)
    prepare = _prepare(CONCH_PIXELS, *CONCH_STATISTICS)

    def encode(patches: Tensor) -> Tensor:
        return model.encode_image(prepare(patches), proj_contrast=False, normalize=False)

    return Encoder(
        f"hf-hub:{CONCH_HUB}", encode, pixels=CONCH_PIXELS, sha256=_base.tensors_sha256(model.visual.state_dict())
    )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Have every torch.load refuse anything but tensors: the pages of some models have their weights in pickled files alone."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _existing(checkpoint: str | Path) -> str:
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"checkpoint {str(checkpoint)!r}: there is no such file or folder.")
    return str(Path(checkpoint).resolve())


def _refused(name: str, hub: str, license: str, error: Exception) -> str:
    return (
        f"the weights of {name!r} could not be loaded: {error}\nAsk for access at https://huggingface.co/{hub} (license: "
        f"{license}), then `hf auth login`. Without network, copy the files of that page here and give "
        f"encoder=spatiaflow.models.encoders.load_encoder({name!r}, checkpoint=path)."
    )
