"""What SPATIA's verbs share: cells of every slide as its model sees them."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import sparse

from spatiaflow import _io
from spatiaflow._settings import logger
from spatiaflow.pp._crops import slide_crops
from spatiaflow.train.spatia import CellSlide

MODALITIES = ("image", "genes")
MIN_COVERAGE = 0.1  # of the model's genes: below it an embedding would rest on what the model was never shown


def check_modalities(modalities) -> tuple[str, ...]:
    """Return modalities as a tuple, after a check of their names."""
    chosen = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if not chosen or set(chosen) - set(MODALITIES):
        raise ValueError(f"modalities must be 'image', 'genes' or both, not {modalities!r}.")
    return chosen


def cell_slides(
    data, table, slides, *, genes: list[str], channels: list[str] | None, channel_names: dict | None, modalities,
    crop_um: float, crop_pixels: int, layer: str | None, image_key: str | None,
) -> tuple[list[CellSlide], np.ndarray]:  # fmt: skip
    """Cells of every slide with crops and counts in the model's vocabulary; and which cells lie in an image (n_obs).

    ``channels`` None takes the image's own.
    """
    out, inside = [], np.zeros(table.n_obs, bool)
    measured, matrix = (
        vocabulary_counts(table, genes, layer) if "genes" in modalities else (np.zeros(len(genes), bool), None)
    )
    for slide in slides:
        crops, order, intensity = None, np.zeros(0, int), None
        if "image" in modalities:
            crops = slide_crops(data, slide, crop_um=crop_um, pixels=crop_pixels, image_key=image_key)
            order = match_channels(crops.channels, channels or list(crops.channels), channel_names, slide.library_id)
            inside[slide.rows] = within(crops, slide.library_id)
            known = np.flatnonzero(inside[slide.rows])
            intensity = crops.take(known).intensity()
        counts = None if matrix is None else matrix[slide.rows]
        out.append(CellSlide(slide.library_id, slide.xy, counts, measured, crops, order, intensity))
    return out, inside


def vocabulary_counts(table, genes: list[str], layer: str | None) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Which genes of the vocabulary the table measures, and its counts with a column for each gene of it."""
    have = [gene for gene in genes if gene in set(table.var_names)]
    if len(have) < max(1, MIN_COVERAGE * len(genes)):
        raise ValueError(
            f"var_names hold {len(have)} of the model's {len(genes)} genes; at least {MIN_COVERAGE:.0%} are needed. The "
            f"model knows e.g. {', '.join(genes[:5])}; are the identifiers of one kind (symbols, Ensembl)? "
            "modalities='image' does without genes."
        )
    if len(have) < len(genes):
        logger.info("%d of the model's %d genes are measured; the others are masked", len(have), len(genes))
    values, _ = _io.counts(table, have, layer)
    place = {gene: i for i, gene in enumerate(genes)}
    columns = np.array([place[gene] for gene in have])
    coo = sparse.coo_matrix(values)
    matrix = sparse.csr_matrix((coo.data.astype(np.float32), (coo.row, columns[coo.col])), (table.n_obs, len(genes)))
    return np.isin(np.arange(len(genes)), columns), matrix


def match_channels(have, wanted: list[str], names: dict | None, library_id: str) -> np.ndarray:
    """For each of the model's channels its place in the image, or -1; names are compared without case."""
    names = names or {}
    if unknown := [name for name in names if name not in have]:
        raise KeyError(f"channels= names {unknown[0]!r}; the image of slide {library_id!r} has {', '.join(have)}.")
    if unknown := [name for name in names.values() if name not in wanted]:
        raise KeyError(f"channels= maps to {unknown[0]!r}; the model has {', '.join(wanted)}.")
    called = [str(names.get(name, name)).lower() for name in have]
    places = np.array([called.index(name.lower()) if name.lower() in called else -1 for name in wanted])
    if (places < 0).all():
        raise KeyError(
            f"none of the channels of slide {library_id!r} ({', '.join(have)}) is known to the model "
            f"({', '.join(wanted)}). Map them: channels={{{have[0]!r}: {wanted[0]!r}}}, or give modalities='genes'."
        )
    if (places < 0).any():
        missing = [name for name, place in zip(wanted, places) if place < 0]
        logger.info("slide %r has no channel %s: masked", library_id, ", ".join(missing))
    return places


def within(crops, library_id: str) -> np.ndarray:
    """Cells whose centre lies in the image."""
    shape = crops.image.shape[1:] if crops.channels_first else crops.image.shape[:2]
    if min(shape) < np.median(crops.width):
        raise ValueError(
            f"the image of slide {library_id!r} is {shape[1]} x {shape[0]} px, smaller than a crop "
            f"({np.median(crops.width):.0f} px)."
        )
    inside = ((crops.xy >= 0) & (crops.xy < np.array(shape)[::-1])).all(1)
    if not inside.any():
        raise ValueError(
            f"no cell of slide {library_id!r} lies in its image ({shape[1]} x {shape[0]} px; cells from "
            f"{crops.xy.min(0).round()} to {crops.xy.max(0).round()}). Check the transformations, or mpp=."
        )
    if not inside.all():
        warnings.warn(
            f"{int((~inside).sum())} of {len(inside)} cells of slide {library_id!r} lie outside its image; they are "
            "embedded without it.",
            UserWarning,
            stacklevel=4,
        )
    return inside
