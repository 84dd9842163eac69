"""Bundled and downloaded weights by name, checked by sha256. ``resolve`` loads what the ``model=`` of a verb names."""

from __future__ import annotations

import csv
import hashlib
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from spatiaflow._process import verb
from spatiaflow._settings import logger
from spatiaflow.datasets._fetch import fetch

if TYPE_CHECKING:
    from spatiaflow.models._base import Model

FOLDER = "weights"
RESTRICTED = "non-commercial"  # what the licence of training data that restricts a use says
_told: set[str] = set()  # licences that this process has told of


@verb
def weights(name: str | None = None) -> Path | pd.DataFrame:
    """Return the file of the named weights, or a table of all known weights.

    Bundled weights need no internet access. Others are downloaded once into ``settings.cache_dir``. Verbs take these names as
    ``model=``. Call this function only to list the weights, or to load a model without a verb.

    Parameters
    ----------
    name
        Name of the weights. If None, all are listed.

    Returns
    -------
    Path of a safetensors file for :func:`spatiaflow.models.load`. Without ``name`` a DataFrame with one row per name and the
    columns ``model`` (class), ``task``, ``tissue``, ``genes`` (how many), ``scores`` (on data that were held out), ``bundled``,
    ``bytes``, ``sha256``, ``license`` (of the weights and of their training data) and ``description``. The model card of bundled
    weights is the Markdown file beside them. The first weights in a process whose training data are for non-commercial use alone
    log this.

    Raises
    ------
    ValueError
        There are no weights of this name.
    OSError
        The file is damaged or could not be downloaded.

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
        return table.assign(bundled=table["bundled"] == "yes", **{n: table[n].astype(int) for n in ("bytes", "genes")})
    if name not in known:
        raise ValueError(
            f"there are no weights {name!r}. Known names are {', '.join(known) or 'none'}. To use a model of your own, "
            "pass the path of its .safetensors file."
        )
    row = known[name]
    if RESTRICTED in row["license"] and row["license"] not in _told:
        _told.add(row["license"])
        logger.info(
            "weights %r: %s. For other uses train on your own slide; docs/weights.md has the calls. This is said once.",
            name, row["license"],
        )  # fmt: skip
    if row["bundled"] != "yes":
        return fetch(FOLDER, f"{name}.safetensors")[0]
    path = Path(str(folder / f"{name}.safetensors"))
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
        raise OSError(f"the bundled weights {name!r} are damaged or missing ({path}). Install spatiaflow again.")
    return path


def resolve(
    model: Model | str | Path | None, kind: str, *, default: str | None = None, argument: str = "model"
) -> Model:
    """Return the model that the argument ``model=`` of a verb stands for.

    Parameters
    ----------
    model
        A model, the path of a saved model, or the name of weights. A string is a path if it ends in ``.safetensors`` or if
        that file exists. None means ``default``.
    kind
        Kind of model that the verb needs, such as ``"Spatia"``.
    default
        Name of the weights to use if ``model`` is None.
    argument
        Name of the verb's argument, for error messages.

    Raises
    ------
    TypeError
        ``model`` is not a model, or a model of another kind. The message names both kinds and the verb that takes the model.
    ValueError
        There are no weights of this name, or the file does not contain a model.
    FileNotFoundError
        There is no file at this path.
    """
    from spatiaflow import models
    from spatiaflow.models import _base
    from spatiaflow.models._base import with_article

    model = default if model is None else model
    if isinstance(model, str | Path):
        is_file = Path(model).suffix == ".safetensors" or Path(model).exists()
        model = models.load(model if is_file else weights(str(model)))
    if not isinstance(model, _base.Model):
        raise TypeError(
            f"{argument} must be {with_article(kind)}, the path of a saved one, or the name of weights, not "
            f"{type(model).__name__}."
        )
    _base.check_kind(type(model), kind, argument)
    return model


_COLUMNS = ("model", "task", "tissue", "genes", "scores", "bundled", "bytes", "sha256", "license", "description")
