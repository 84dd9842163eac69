"""Weights by name: those that come with the package, and published ones; each checked by its sha256."""

from __future__ import annotations

import csv
import hashlib
from importlib.resources import files as package_files
from pathlib import Path

import pandas as pd

from spatiaflow.datasets._fetch import fetch

FOLDER = "weights"


def weights(name: str | None = None) -> Path | pd.DataFrame:
    """List the weights that the package knows, or return the file of one of them.

    Bundled weights need no network; others are downloaded once into ``settings.cache_dir``.

    Parameters
    ----------
    name
        Name of the weights; None lists all.

    Returns
    -------
    Path of a safetensors file for :func:`spatiaflow.models.load`; without ``name`` a DataFrame, one row each: ``model``
    (its class), ``bundled``, ``bytes``, ``sha256``, ``license`` and ``description``. The model card of bundled weights is
    the Markdown file beside them.

    Raises
    ------
    ValueError
        There are no weights of this name.
    OSError
        The file is damaged, or could not be downloaded.

    Examples
    --------
    >>> sf.datasets.weights().loc["spatia-pancreas-small", "model"]
    'Spatia'
    >>> sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    Spatia: 377 genes, channels dapi, bound, rna, prot, width 128, 20.4 µm crops
    """
    folder = package_files("spatiaflow.datasets") / FOLDER
    with (folder / "weights.csv").open(encoding="utf-8") as lines:
        known = {row["name"]: row for row in csv.DictReader(lines)}
    if name is None:
        table = pd.DataFrame(known.values(), columns=["name", *_COLUMNS]).set_index("name")
        return table.assign(bundled=table["bundled"] == "yes", bytes=table["bytes"].astype(int))
    if name not in known:
        raise ValueError(
            f"there are no weights {name!r}; known are {', '.join(known) or 'none'}. A path is taken as well."
        )
    row = known[name]
    if row["bundled"] != "yes":
        return fetch(FOLDER, f"{name}.safetensors")[0]
    path = Path(str(folder / f"{name}.safetensors"))
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
        raise OSError(f"the bundled weights {name!r} are damaged or missing ({path}); install spatiaflow again.")
    return path


def resolve(model, kind: str, *, default: str | None = None, argument: str = "model"):
    """Return the model that a verb's ``model=`` names: a model, the path of a saved one, or the name of weights.

    Parameters
    ----------
    model
        What the user gave; None takes ``default``.
    kind
        The kind that the verb needs, such as ``"Spatia"``.
    default
        Name of weights.
    argument
        Name of the verb's argument, for errors.

    Raises
    ------
    TypeError
        The model is of another kind; the message names both, and the verb that takes it.
    """
    from spatiaflow import models
    from spatiaflow.models import _base

    model = default if model is None else model
    if isinstance(model, str | Path):
        is_file = Path(model).suffix == ".safetensors" or Path(model).exists()
        model = models.load(model if is_file else weights(str(model)))
    if not isinstance(model, _base.Model):
        raise TypeError(
            f"{argument} must be a {kind}, the path of a saved one, or the name of weights, not {type(model).__name__}."
        )
    _base.check_kind(type(model), kind, argument)
    return model


_COLUMNS = ("model", "bundled", "bytes", "sha256", "license", "description")
