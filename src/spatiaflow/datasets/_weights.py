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


_COLUMNS = ("model", "bundled", "bytes", "sha256", "license", "description")
