"""What SPATIA's verbs share: cells of every slide as its model sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from spatiaflow import _io
from spatiaflow._settings import logger
from spatiaflow._slides.crops import SHARED_BYTES, Crops, check_inside, match_channels, slide_crops
from spatiaflow.models.slide import Slide
from spatiaflow.train.spatia import CellSlide

MODALITIES = ("image", "genes")
MANIFEST = (
    "store", "tissue", "platform", "table_key", "image_key", "shapes_key", "labels_key", "library_key", "mpp"
)  # fmt: skip
MIN_COVERAGE = 0.1  # of the model's genes: below it an embedding would rest on what the model was never shown


def check_modalities(modalities) -> tuple[str, ...]:
    """Return modalities as a tuple, after a check of their names."""
    chosen = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    if not chosen or set(chosen) - set(MODALITIES):
        raise ValueError(f"modalities must be 'image', 'genes' or both, not {modalities!r}.")
    return chosen


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


def with_intensity(slide: CellSlide, intensity: dict, channels: list[str]) -> CellSlide:
    """The slide's cells, scaled as the training slides were."""
    if slide.crops is None:
        return slide
    own = slide.intensity.copy()
    for name, place in zip(channels, slide.channels):
        if place >= 0:
            own[place] = intensity[name]
    return replace(slide, intensity=own)


def check_coverage(have: list[str], genes: list[str]) -> float:
    """Return the share of the model's genes that are measured; refuse a table that measures too few."""
    n = len(set(genes) & set(have))
    if n < max(1, MIN_COVERAGE * len(genes)):
        raise ValueError(
            f"var_names hold {n} of the model's {len(genes)} genes; at least {MIN_COVERAGE:.0%} are needed. The "
            f"model knows e.g. {', '.join(genes[:5])}; are the identifiers of one kind (symbols or Ensembl, human or "
            "mouse)? modalities='image' does without genes; on other tissue train your own with sf.tl.train_spatia(data)."
        )
    if n < len(genes):
        logger.info("%d of the model's %d genes are measured; the others are masked", n, len(genes))
    return n / len(genes)


def read_corpus(manifest: str | Path, **options) -> list[Part]:
    """Cells of every store of a manifest; counts and images stay on disk.

    Of each cell are held its position, its place in the image and a pointer to its counts.
    """
    from spatialdata import read_zarr

    manifest, out = Path(manifest), []
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    if "store" not in table or not len(table):
        raise ValueError(
            f"{str(manifest)!r} needs a row a store and a column 'store'; it has {', '.join(table.columns)}."
        )
    if unknown := [name for name in table.columns if name not in MANIFEST]:
        raise ValueError(f"{str(manifest)!r} has a column {unknown[0]!r}; known are {', '.join(MANIFEST)}.")
    for row in table.to_dict("records"):
        given = {name: value for name, value in row.items() if value}
        store, tissue = manifest.parent / given.pop("store"), given.pop("tissue", "")
        given.pop("platform", None)
        table_key, image_key = given.get("table_key", "table"), given.pop("image_key", None)
        if "mpp" in given:
            given["mpp"] = float(given["mpp"])
        data = read_zarr(store)
        slides = _io.slides(data, **given)
        group = f"tables/{table_key}/" + (f"layers/{options['layer']}" if options.get("layer") else "X")
        stored = _io.StoredCounts(store, group) if "genes" in options["modalities"] else None
        for part in parts(data, data[table_key], slides, stored=stored, tissue=tissue, image_key=image_key, **options):
            part.slide = replace(part.slide, library_id=f"{store.stem}:{part.slide.name}", xy=np.float32(part.slide.xy))
            if part.crops is not None:
                part.crops.xy = np.float32(part.crops.xy)
            out.append(part)
    return out


def file_of(model: str | Path) -> str | Path:
    """File of a model: a path as it is; anything else is the name of weights."""
    if Path(model).suffix == ".safetensors" or Path(model).exists():
        return model
    from spatiaflow.datasets import weights

    return weights(str(model))
