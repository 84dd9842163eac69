"""Image encoders by name, path or function; one object says what each needs and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from spatiaflow.models import _base
from spatiaflow.models.encoders import _texture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# pathology models loaded through timm: hub id, arguments of timm.create_model, how the output becomes one vector
TIMM = {
    "uni": ("MahmoodLab/UNI", {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni2-h": (
        "MahmoodLab/UNI2-h",
        {
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True,
        },
    ),
    "virchow2": ("paige-ai/Virchow2", {}),
    "gigapath": ("prov-gigapath/prov-gigapath", {}),
    "h-optimus-0": ("bioptimus/H-optimus-0", {"init_values": 1e-5, "dynamic_img_size": False}),
}  # fmt: skip
STATISTICS = {"h-optimus-0": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))}


@dataclass
class Encoder:
    """A function from patches to features, with what it needs and what it is.

    Attributes
    ----------
    id
        Full name: hub id, path or function name.
    function
        uint8 patches (n x C x h x w, on the encoder's device) to features (n x F).
    mpp
        µm per pixel that patches must have; None where the input size is fixed.
    pixels
        Input size in pixels; None where it follows from ``mpp`` and the patch's width in µm.
    channels
        Channels it needs; None: any.
    sha256
        Of the weights; "" where there are none.
    """

    id: str
    function: Callable[[Tensor], Tensor]
    mpp: float | None = None
    pixels: int | None = None
    channels: int | None = 3
    sha256: str = ""

    @property
    def name(self) -> str:
        """Last part of the id."""
        return Path(self.id).name

    def patch_pixels(self, patch_um: float) -> int:
        """Pixels of a patch that is ``patch_um`` wide."""
        return self.pixels or max(8, round(patch_um / self.mpp))

    @torch.inference_mode()
    def __call__(self, patches: Tensor) -> Tensor:
        out = torch.as_tensor(self.function(patches))
        if out.ndim != 2 or len(out) != len(patches):
            raise ValueError(
                f"encoder {self.id!r} must return one vector a patch, ({len(patches)}, features); it returned {tuple(out.shape)}."
            )
        return out.float().cpu()


def load_encoder(encoder: str | Path | Callable | Encoder, *, device: torch.device | str = "cpu") -> Encoder:
    """Return an encoder by name.

    Parameters
    ----------
    encoder
        ``"texture"`` (weight-free), the short name of a pathology model (needs the extra ``encoders``), the hub id or
        local folder of any vision model of transformers, or a function of uint8 patches (n x C x h x w) to features.
    device
        Where weights go.

    Raises
    ------
    ImportError
        The model needs the extra.
    OSError
        The weights cannot be had; the message says where and how.
    """
    if isinstance(encoder, Encoder):
        return encoder
    if callable(encoder):
        name = getattr(encoder, "__name__", type(encoder).__name__)
        mpp, pixels = getattr(encoder, "mpp", 0.5), getattr(encoder, "pixels", None)
        return Encoder(name, encoder, mpp, pixels, getattr(encoder, "channels", None))
    if str(encoder) == "texture":
        return Encoder("texture", lambda patches: _texture.texture(patches.cpu()), _texture.MPP)
    if str(encoder) in TIMM:
        return _timm(str(encoder), device)
    return _transformers(str(encoder), device)


def _prepare(size: int, mean, std) -> Callable[[Tensor], Tensor]:
    def prepare(patches: Tensor) -> Tensor:
        x = patches.float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]

    return prepare


def _transformers(name: str, device) -> Encoder:
    import json

    from transformers import AutoModel
    from transformers.utils import cached_file

    try:
        model = AutoModel.from_pretrained(name).eval().to(device)
        found = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise OSError(
            f"encoder {name!r} could not be loaded: {error}\nKnown short names: texture, {', '.join(TIMM)}. A hub model needs "
            f"network and, if it is gated, access granted at https://huggingface.co/{name} and `hf auth login`. Without "
            "network, copy its folder (config.json, model.safetensors) here and give the folder's path as encoder."
        ) from error
    settings = json.loads(Path(found).read_text()) if found else {}
    mean, std = settings.get("image_mean", IMAGENET[0]), settings.get("image_std", IMAGENET[1])
    size = getattr(model.config, "image_size", 224)
    prepare = _prepare(size, mean, std)
    options = {}
    if model.config.model_type == "vit_mae":
        # no masking at inference; constant noise keeps the patches in their order
        model.config.mask_ratio = 0.0
        tokens = (size // model.config.patch_size) ** 2
        options["noise"] = torch.arange(tokens, device=device, dtype=torch.float32)[None]

    def encode(patches: Tensor) -> Tensor:
        extra = {key: value.expand(len(patches), -1) for key, value in options.items()}
        return model(pixel_values=prepare(patches), **extra).last_hidden_state[:, 0]

    return Encoder(name, encode, None, size, 3, _base.tensors_sha256(model.state_dict()))


def _timm(name: str, device) -> Encoder:
    hub, arguments = TIMM[name]
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'encoder {name!r} needs timm: pip install "spatiaflow[encoders]"') from error
    if name in ("uni2-h", "virchow2"):
        arguments = arguments | {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    try:
        model = timm.create_model(f"hf-hub:{hub}", pretrained=True, num_classes=0, **arguments).eval().to(device)
    except Exception as error:  # hub errors of many kinds: gated, offline, not found
        raise OSError(
            f"the weights of {name!r} could not be had: {error}\nAsk for access at https://huggingface.co/{hub}, then "
            "`hf auth login`; without network, download them elsewhere and set HF_HOME to that cache."
        ) from error
    prepare = _prepare(224, *STATISTICS.get(name, IMAGENET))

    def encode(patches: Tensor) -> Tensor:
        out = model(prepare(patches))
        if out.ndim == 3:  # Virchow2: class token beside the mean of patch tokens (4 registers between)
            out = torch.cat([out[:, 0], out[:, 5:].mean(1)], 1)
        return out

    return Encoder(f"hf-hub:{hub}", encode, None, 224, 3, _base.tensors_sha256(model.state_dict()))
