"""What every model is, and its file: safetensors with a JSON description in the header. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spatiaflow import _files
from spatiaflow._process import verb
from spatiaflow.models.slide import Slide

FORMAT = 1
KINDS: dict[str, type[Model]] = {}  # by name of the class, filled as the classes are defined


class Config:
    """Settings of a model and its training, as a dataclass; some have a name.

    Attributes
    ----------
    named
        Settings by name; ``"default"`` when a class has no other.
    """

    named: ClassVar[dict[str, Any]] = {}

    @classmethod
    def of(cls, config: Self | str | None, argument: str = "config") -> Self:
        """Return the settings that a verb's ``config=`` means: an instance, a name, or None for the default.

        Raises
        ------
        TypeError
            ``config`` is neither.
        ValueError
            No settings have this name.
        """
        if isinstance(config, cls):
            return config
        if config is None or config == "default":
            return cls.named.get("default") or cls()
        if not isinstance(config, str):
            raise TypeError(
                f"{argument} must be a name or a models.{cls.__name__}, not {type(config).__name__}; for other settings "
                f"give {argument}=sf.models.{cls.__name__}(...)."
            )
        if config not in cls.named:
            raise ValueError(
                f"{argument} must be one of {', '.join(map(repr, cls.named or ('default',)))}, not {config!r}."
            )
        return cls.named[config]


class Model(ABC):
    """A fitted model: what it knows of itself, and its file. A subclass states its description and its tensors.

    Attributes
    ----------
    kind
        Name of the class, as it stands in the file.
    verb
        The function that applies the model, for error messages.
    genes
        Names of the genes that it reads or predicts; none where it knows images alone.
    card
        Dict with data (slides and their boxes), config, seed, epochs done, validation scores, versions and licence; see
        :func:`model_card`.
    """

    kind: ClassVar[str]
    verb: ClassVar[str]
    genes: Sequence[str]
    card: dict

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = cls.__name__
        KINDS[cls.kind] = cls

    @abstractmethod
    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return the JSON-able description and the tensors that make the model."""

    @classmethod
    @abstractmethod
    def from_state(cls, description: dict, tensors: dict[str, Tensor]) -> Self:
        """Rebuild a model from the description and tensors of its file."""

    def save(self, path: str | Path) -> Path:
        """Write the model to one safetensors file, and return its path.

        The file is whole or not there, a link stays a link, and permissions are those of any new file.

        Parameters
        ----------
        path
            Where; the suffix ``.safetensors`` is added when missing.

        Raises
        ------
        OSError
            The disk is full or the folder cannot be written. What stood at the path before is unchanged.
        """
        return save(path, self.kind, *self.state())

    @property
    def sha256(self) -> str:
        """Identity of what was learned: SHA-256 over all tensors."""
        return tensors_sha256(self.state()[1])


@verb
def load(path: str | Path, kind: str | None = None) -> Model:
    """Load a model written by ``model.save(path)``.

    Parameters
    ----------
    path
        A safetensors file.
    kind
        The kind that is needed, such as ``"STFlow"``; None takes any.

    Returns
    -------
    The model.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    TypeError
        ``path`` is not a path, or the file holds a model of another kind.
    ValueError
        The file is truncated, corrupted, a pickle, not a spatiaflow model, or of another format.

    Examples
    --------
    >>> sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    Spatia: 377 genes, channels dapi, bound, rna, prot, width 128, 20.4 µm crops
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"a model or the path of a saved one is needed, not {path!r}.")
    description, tensors = read(path)
    if description["kind"] not in KINDS:
        raise ValueError(
            f"{str(path)!r} holds a {description['kind']!r}; this version knows {', '.join(sorted(KINDS))}."
        )
    found = KINDS[description["kind"]]
    check_kind(found, kind)
    try:
        return found.from_state(description, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        wrote = description.get("card", {}).get("spatiaflow", "an unknown version")
        raise ValueError(
            f"the header and tensors of {str(path)!r} do not make {with_article(found.kind)}: {error}. "
            f"It was written by spatiaflow {wrote}."
        ) from error


def check_kind(found: type[Model], kind: str | None, argument: str = "model") -> None:
    """Refuse a model of another kind than the one that is needed. A kind that is built on it will do."""
    if kind is not None and kind not in (one.__name__ for one in found.__mro__):
        kinds = with_article(kind), with_article(found.kind)
        raise TypeError(f"{argument} must be {kinds[0]}; this is {kinds[1]}, which {found.verb} takes.")


def with_article(kind: str) -> str:
    """Name of a kind with "a" or "an" before it."""
    return f"{'an' if kind.startswith(('A', 'E', 'I', 'O', 'U', 'ST')) else 'a'} {kind}"


def model_card(
    slides: Sequence[Slide],
    *,
    config: dict,
    seed: int,
    epochs: int,
    scores: dict,
    licence: str = "not stated",
    **more: Any,
) -> dict:
    """Return the card of a model: what it was trained on, how, and by which versions.

    Parameters
    ----------
    slides
        Training slides; their names, sizes and boxes (µm) are kept.
    config
        Training settings.
    epochs
        Epochs done.
    scores
        Validation scores.
    licence
        Of the weights.
    **more
        What only this kind of model has.
    """
    versions = {}
    for name in ("spatiaflow", "torch", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            versions[name] = "unknown"
    return {
        "data": {slide.name: slide.box for slide in slides}, "config": config, "seed": seed, "epochs": epochs,
        "validation_scores": scores, "spatiaflow": versions["spatiaflow"], "versions": versions, "licence": licence,
    } | more  # fmt: skip


def save(path: str | Path, kind: str, description: dict, tensors: dict[str, Tensor]) -> Path:
    """Write a model file atomically.

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
    with _files.atomic(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata=header)
        except SafetensorError as error:  # how it says that it could not write
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
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
    before = path.stat()

    def replaced() -> bool:
        """Safetensors opens a file twice, so what was replaced in between is half one file and half another."""
        after = path.stat()
        return (after.st_ino, after.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)

    try:
        with safe_open(str(path), framework="pt") as file:
            description = _description((file.metadata() or {}).get("spatiaflow"), path)  # before anything large is read
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        if replaced():
            return read(path)
        raise ValueError(
            f"{str(path)!r} is not a readable safetensors file ({error}): it is truncated, corrupted, or of another format "
            "(pickled checkpoints are never opened). Save it again with model.save(path) or download it again."
        ) from error
    if description.get("sha256") != tensors_sha256(tensors):
        if replaced():
            return read(path)
        raise ValueError(
            f"the tensors of {str(path)!r} are not those that were saved (their sha256 differs): the file is corrupted. "
            "Save it again with model.save(path) or download it again."
        )
    return description, tensors


def _description(header: str | None, path: Path) -> dict:
    """What the header of a model file says."""
    if header is None:
        raise ValueError(
            f"{str(path)!r} holds safetensors, but no spatiaflow model (its header has no 'spatiaflow' entry); "
            "models are written by model.save(path)."
        )
    try:
        description = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the 'spatiaflow' entry in the header of {str(path)!r} is damaged: {error}.") from error
    if not isinstance(description, dict) or not isinstance(description.get("kind"), str):
        raise ValueError(f"the 'spatiaflow' entry in the header of {str(path)!r} does not describe a model.")
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} has model format {description.get('format')}; this version of spatiaflow reads {FORMAT}. "
            "Upgrade spatiaflow."
        )
    return description


def fill(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a network the tensors of a file, after :func:`check_tensors`."""
    check_tensors(tensors, network.state_dict())
    network.load_state_dict(tensors)


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of a network: by name, shape, and whether they hold real or whole numbers.

    Raises
    ------
    ValueError
        The message names the first difference.
    """
    for more, less, what in ((wanted, found, "lacks"), (found, wanted, "has in excess")):
        if names := [name for name in more if name not in less]:
            raise ValueError(f"it {what} {len(names)} tensor(s) of the network, first {names[0]!r}")
    for name, value in wanted.items():
        one = found[name]
        if one.shape != value.shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(one.shape)}, not {tuple(value.shape)}")
        if one.dtype != value.dtype and not (one.is_floating_point() and value.is_floating_point()):
            raise ValueError(f"tensor {name!r} holds {one.dtype}, not {value.dtype}")


def check_types(path: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Refuse a safetensors file in which tensors of a network hold whole numbers instead of real ones; reads its header."""
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():
            kind = file.get_slice(name).get_dtype()
            if name in wanted and wanted[name].is_floating_point() != kind.startswith(("F", "BF")):
                raise TypeError(f"tensor {name!r} holds {kind}, not {wanted[name].dtype}")


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


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a model's description cannot hold {type(value).__name__}.")
