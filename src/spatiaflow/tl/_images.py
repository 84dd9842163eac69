"""Cells as the generator of morphology sees them: slides with crops and the embeddings of three levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from anndata import AnnData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._slides import gather
from spatiaflow._slides.crops import check_inside, share_memory
from spatiaflow.models.slide import LEVELS, Slide


def cells_with_images(
    data,
    where: Where,
    use_rep: str | None,
    *,
    crop_um: float,
    crop_pixels: int,
    counts: bool = False,
    layer: str | None = None,
    together: bool = True,
) -> list[Slide]:
    """Return slides with crops; their features are the embeddings ``use_rep`` of cell, niche and tissue side by side.

    ``together=False``: the caller has slides of more objects, and makes :func:`check_together` compare all of them.
    """
    slots = [] if use_rep is None else [Key.obsm.level(use_rep, level) for level in LEVELS]
    for one in _io.objects_of(data).values():
        table = _io.unpack(one, where.table_key)[1]
        hint = f"Run sf.tl.embed_spatia(data, key_added={use_rep!r}) first."
        found = [_io.features(table, slot, hint) for slot in slots]
        if len({level.shape[1] for level in found}) > 1:
            widths = ", ".join(str(level.shape[1]) for level in found)
            raise ValueError(
                f"the levels of {use_rep!r} have {widths} columns. The generator takes learned levels of one width: embed by a "
                'model that was trained with SpatiaConfig(context="attention").'
            )
    need = ("crops", *(["features"] if slots else []), *(["counts"] if counts else []))
    slides = gather(
        data, where, need=need, use_rep=slots or None, crop_um=crop_um, crop_pixels=crop_pixels, layer=layer, together=together
    )  # fmt: skip
    for slide in slides:
        check_inside(slide.crops, slide.name)
    share_memory(slides)
    return slides


def channels_of(slides: Sequence[Slide]) -> list[str]:
    """Return the names of the channels of all slides, in lower case."""
    return list(dict.fromkeys(str(channel).lower() for slide in slides for channel in slide.crops.channels))


def with_channels(slides: Sequence[Slide], channels: list[str], intensity: dict | None = None) -> list[Slide]:
    """Return the slides with crops matched with ``channels``, and scaled by ``intensity`` or by their own range."""
    out = []
    for slide in slides:
        crops = slide.crops
        if intensity is not None:
            crops = replace(crops, range=np.array([intensity[str(name).lower()] for name in crops.channels]))
        out.append(replace(slide, crops=crops.matched(channels, None, slide.name)))
    return out


def placed(table: AnnData, slides: Sequence[Slide], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each row among the cells of all slides, or -1, and whether it lies inside its image.

    ``first`` counts the cells of the slides before these.
    """
    place, inside = np.full(table.n_obs, -1), np.zeros(table.n_obs, bool)
    for slide in slides:
        place[slide.rows] = first + np.arange(len(slide))
        inside[slide.rows] = slide.crops.inside
        first += len(slide)
    return place, inside


def is_tiles(table: AnnData) -> bool:
    """Whether the rows of a table are tiles of :func:`spatiaflow.pp.tiles`."""
    return "params" in _io.entry(table, "tiles")
