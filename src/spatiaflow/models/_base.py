"""Model files: safetensors with a JSON description in the header. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1


def save(path: str | Path, kind: str, description: dict, tensors: dict[str, Tensor]) -> Path:
    """Write a model file atomically: temporary file in the same folder, fsync, rename.

    Parameters
    ----------
    path
        Where; the suffix ``.safetensors`` is added when missing.
    kind
        Name of the model class.
    description
        JSON-able dict: config, genes, card, history.
    tensors
        Everything else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = {"format": FORMAT, "kind": kind, "sha256": tensors_sha256(tensors)}
    header = {"spatiaflow": json.dumps({**identity, **description}, default=_plain)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=header)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Read a model file: its description and its tensors.

    Raises
    ------
    FileNotFoundError
        No file there.
    ValueError
        The file is truncated, corrupted, a pickle, or not a spatiaflow model.
    """
    path = Path(path)
    if not path.is_file() and path.suffix != ".safetensors":  # as save() adds it
        path = path.with_name(path.name + ".safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"no model file at {str(path)!r} (in {str(path.parent.resolve())!r}).")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get("spatiaflow")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} is not a readable safetensors file ({error}): it is truncated, corrupted, or of another format "
            "(pickled checkpoints are never opened). Save it again with model.save(path) or download it again."
        ) from error
    if header is None:
        raise ValueError(
            f"{str(path)!r} holds safetensors, but no spatiaflow model (its header has no 'spatiaflow' entry); "
            "models are written by model.save(path)."
        )
    description = json.loads(header)
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} has model format {description.get('format')}; this version of spatiaflow reads {FORMAT}. "
            "Upgrade spatiaflow."
        )
    if description.get("sha256") != tensors_sha256(tensors):
        raise ValueError(
            f"the tensors of {str(path)!r} are not those that were saved (their sha256 differs): the file is corrupted. "
            "Save it again with model.save(path) or download it again."
        )
    return description, tensors


def sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes of tensors: identity of a model that is only in memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a model's description cannot hold {type(value).__name__}.")
