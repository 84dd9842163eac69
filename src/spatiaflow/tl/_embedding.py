"""Embeddings of tables: their values, and how they were made where the verb that wrote them has recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from spatiaflow import _io

EMBEDDING_HELP = "Run sf.tl.embed_spatia(data) first, or give use_rep=..."


def embedding(table: AnnData, use_rep: str) -> np.ndarray:
    """An embedding of a table, n x columns."""
    return _io.features(table, use_rep, EMBEDDING_HELP)


def pooled(tables: Sequence[AnnData], use_rep: str, argument: str = "data") -> np.ndarray:
    """Embeddings of all tables, one after the other. ``argument``: what errors call them."""
    found = []
    for i, table in enumerate(tables):
        with _io.named(str(i) if len(tables) > 1 else "", argument):
            found.append(embedding(table, use_rep))
    check_alike(tables, use_rep, [x.shape[1] for x in found], f"the objects of {argument}")
    return np.concatenate(found)


def made_by(table: AnnData, use_rep: str) -> dict[str, Any]:
    """How an embedding was made: by which model, from which modalities, under which scaling; empty where it is unknown.

    ``use_rep`` is the name that the verb was given, ``"X_spatia"``, or the slot of a level, ``"X_spatia_niche"``.
    """
    names = [name for name in table.uns if use_rep == name or use_rep.startswith(f"{name}_")]
    params = _io.entry(table, max(names, key=len)).get("params", {}) if names else {}
    return {
        "embedding_sha256": str(params.get("model_sha256", "")),
        "embedding_modalities": sorted(map(str, params.get("modalities", []))),
        "embedding_scaling": str(params.get("scaling", "")),
    }


def check_alike(tables: Sequence[AnnData], use_rep: str, widths: Sequence[int], whose: str) -> None:
    """Refuse embeddings of different width, or made in different ways where it is known how they were made."""
    found = []
    for table in tables:
        made = made_by(table, use_rep)
        if made["embedding_sha256"]:  # levels matter where they stand side by side
            params = _io.entry(table, use_rep).get("params", {})
            found.append(made | {"levels": [*map(str, params.get("levels", []))]})
    if any(one != found[0] for one in found[1:]):
        raise ValueError(
            f"obsm[{use_rep!r}] of {whose} was made by different models, or of other levels, modalities or scaling. Run "
            "sf.tl.embed_spatia on all of them with the same model=, levels=, modalities= and scaling=."
        )
    if len(set(widths)) > 1:
        raise ValueError(f"obsm[{use_rep!r}] of {whose} has {' and '.join(map(str, widths))} columns; embed all alike.")
