"""Cells of every slide for the generator of morphology; goes as soon as that uses gather and Crops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from spatiaflow import _io
from spatiaflow._slides.crops import SHARED_BYTES, Crops, check_inside, match_channels, slide_crops
from spatiaflow.models.slide import Slide


@dataclass
class CellSlide:
    """Cells of one slide in the vocabulary of a model."""

    name: str
    xy: np.ndarray
    counts: sparse.csr_matrix | object | None
    measured: np.ndarray
    crops: object | None
    channels: np.ndarray
    intensity: np.ndarray | None
    tissue: str = ""


@dataclass
class Part:
    """Cells of one slide in the slide's own genes and channels."""

    slide: Slide
    counts: sparse.csr_matrix | _io.StoredCounts | None
    genes: list[str]
    crops: Crops | None
    inside: np.ndarray  # n, bool: the cell lies in the image
    tissue: str = ""


def parts(
    data, table, slides, *, modalities, crop_um: float, crop_pixels: int, layer: str | None, image_key: str | None,
    stored: _io.StoredCounts | None = None, tissue: str = "",
) -> list[Part]:  # fmt: skip
    """Cells of every slide with crops and counts; ``stored`` counts stay where they are."""
    matrix = None
    if "genes" in modalities:
        matrix = (
            stored if stored is not None else sparse.csr_matrix(_io.counts(table, None, layer)[0], dtype=np.float32)
        )
    out = []
    for slide in slides:
        crops, inside = None, np.zeros(len(slide.rows), bool)
        if "image" in modalities:
            crops = slide_crops(data, slide, table, crop_um=crop_um, pixels=crop_pixels, image_key=image_key)
            inside = check_inside(crops, slide.name)
        counts = None if matrix is None else matrix.take(slide.rows) if stored is not None else matrix[slide.rows]
        out.append(Part(slide, counts, list(table.var_names), crops, inside, tissue))
    return out


def cell_slide(part: Part, genes: list[str], channels: list[str], names: dict | None, library_id: str) -> CellSlide:
    """The cells of a slide in a model's vocabulary of genes and channels; what the slide lacks is masked."""
    counts, measured = part.counts, np.zeros(len(genes), bool)
    if counts is not None:
        place = {gene: i for i, gene in enumerate(genes)}
        columns = np.array([place.get(gene, -1) for gene in part.genes])
        measured[columns[columns >= 0]] = True
        if sparse.issparse(counts):
            coo = counts.tocoo()
            known = columns[coo.col] >= 0
            entries = coo.data[known], (coo.row[known], columns[coo.col[known]])
            counts = sparse.csr_matrix(entries, (counts.shape[0], len(genes)))
        else:
            counts = counts.named(columns, len(genes))
    order, intensity = np.zeros(0, int), None
    if part.crops is not None:
        order = match_channels(part.crops.channels, channels, names, library_id)
        intensity = part.crops.take(np.flatnonzero(part.inside)).intensity()
    return CellSlide(library_id, part.slide.xy, counts, measured, part.crops, order, intensity, part.tissue)


def share_memory(parts: list[Part]) -> None:
    """Let the images of all parts keep their decoded chunks in one place of fixed size."""
    decoded = _io.Decoded(SHARED_BYTES)
    for part in parts:
        if part.crops is not None and hasattr(part.crops.image, "decoded"):
            part.crops.image.decoded = decoded


def intensity_of(slides: list[CellSlide], channels: list[str]) -> dict[str, list[float]]:
    """Background and bright end of each channel, median over the slides that have it."""
    out = {}
    for i, name in enumerate(channels):
        known = [s.intensity[s.channels[i]] for s in slides if s.crops is not None and s.channels[i] >= 0]
        if known:
            out[name] = [float(v) for v in np.median(known, 0)]
    return out


def file_of(model: str | Path) -> str | Path:
    """File of a model: a path as it is; anything else is the name of weights."""
    if Path(model).suffix == ".safetensors" or Path(model).exists():
        return model
    from spatiaflow.datasets import weights

    return weights(str(model))
