"""The models, in torch only; each is one file that reads like its paper."""

from __future__ import annotations

from pathlib import Path

from spatiaflow.models import _base
from spatiaflow.models.features import ImageFeatures
from spatiaflow.models.imputation import Imputer
from spatiaflow.models.morphology import MorphologyConfig, MorphologyFlow, States
from spatiaflow.models.spatia import Spatia, SpatiaConfig
from spatiaflow.models.stflow import PRESETS, Preset, STFlow

__all__ = [
    "PRESETS",
    "ImageFeatures",
    "Imputer",
    "MorphologyConfig",
    "MorphologyFlow",
    "Preset",
    "STFlow",
    "Spatia",
    "SpatiaConfig",
    "States",
    "load",
]

_KINDS = {
    "ImageFeatures": ImageFeatures, "Imputer": Imputer, "MorphologyFlow": MorphologyFlow, "STFlow": STFlow, "Spatia": Spatia,
}  # fmt: skip


def load(path: str | Path) -> STFlow | Spatia | MorphologyFlow | Imputer | ImageFeatures:
    """Load a model written by ``model.save(path)``.

    Parameters
    ----------
    path
        A safetensors file.

    Returns
    -------
    The model.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    TypeError
        ``path`` is not a path.
    ValueError
        The file is truncated, corrupted, a pickle, or not a spatiaflow model.

    Examples
    --------
    >>> sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    Spatia: 377 genes, channels dapi, bound, rna, prot, width 128, 20.4 µm crops
    """
    if not isinstance(path, str | Path):
        raise TypeError(f"a model or the path of a saved one is needed, not {path!r}.")
    description, tensors = _base.read(path)
    if description["kind"] not in _KINDS:
        raise ValueError(f"{str(path)!r} holds a {description['kind']!r}; this version knows {', '.join(_KINDS)}.")
    return _KINDS[description["kind"]].from_state(description, tensors)
