"""One call from objects to slides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from spatiaflow import _io
from spatiaflow._io import Where
from spatiaflow._settings import warn
from spatiaflow.models.slide import Slide

NEEDS = ("counts", "features", "crops")


def gather(
    data: Any,
    where: Where | None = None,
    *,
    need: Collection[str] = (),
    layer: str | None = None,
    use_rep: str | Sequence[str] | None = None,
    donor_key: str | None = None,
    fold_key: str | None = None,
    crop_um: float | None = None,
    crop_pixels: int = 48,
    crop_wide: float = 0.0,
    missing: bool = False,
    scaled: bool = True,
    together: bool = True,
    argument: str = "layer",
) -> list[Slide]:
    """Return the slides of one or many objects, with what a caller needs of them.

    Parameters
    ----------
    data
        An AnnData or SpatialData with one or many slides, a list or dict of them, or the path of a manifest, see
        :func:`spatiaflow._slides.corpus.read_corpus`.
    where
        Elements and columns to read.
    need
        Some of ``"counts"`` (raw counts of all genes of the table, and the library size), ``"features"`` (the slot
        ``use_rep``) and ``"crops"`` (images of the cells, read when they are used).
    layer
        Layer with raw counts; None reads ``X``.
    use_rep
        Slot of ``.obsm``, or several whose columns are put side by side.
    donor_key
        Column of ``.obs`` that names the donor of each slide.
    fold_key
        Column of ``.obs`` with the fold of each row, which becomes its label.
    crop_um, crop_pixels
        Side of a crop on the tissue, and in pixels; ``crop_um=None`` fits each crop to its cell.
    crop_wide
        Width of a second crop over that of the first; 0: none.
    missing
        Positions may be NaN.
    scaled
        False: positions may have any unit, or be missing altogether.
    together
        Compare the slides with each other, see :func:`check_together`. False: the caller does so, over more slides than these.
    argument
        Name of the caller's argument that gives ``layer``, for errors.

    Raises
    ------
    KeyError
        A table, slot, layer, element or image is missing.
    ValueError
        Counts are not raw, the scale is unknown, or positions or features are not finite.
    """
    if unknown := set(need) - set(NEEDS):
        raise ValueError(f"need must be among {', '.join(NEEDS)}, not {', '.join(sorted(unknown))}.")
    if isinstance(data, str | Path):
        from spatiaflow._slides.corpus import read_corpus

        found = read_corpus(
            data, need=need, layer=layer, use_rep=use_rep, crop_um=crop_um, crop_pixels=crop_pixels,
            crop_wide=crop_wide, missing=missing, scaled=scaled,
        )  # fmt: skip
        if scaled and together:
            check_together(found)
        return found
    where = where or Where()
    out: list[Slide] = []
    for label, one in _io.objects_of(data).items():
        with _io.named(label, "data" if argument == "layer" else "reference"):
            table = _io.unpack(one, where.table_key)[1]
            found = _io.places(one, where, missing=missing, scaled=scaled)
            counts = None
            if "counts" in need:
                counts = sparse.csr_matrix(_io.counts(table, None, layer, argument=argument)[0], dtype=np.float32)
                _io.check_measured(table, counts, where.library_key)
            features = None
            if "features" in need:
                slots = _io.names(use_rep, "use_rep") or []
                found_slots = [_io.features(table, slot) for slot in slots]
                features = found_slots[0] if len(slots) == 1 else np.hstack(found_slots)
            share = _io.tissue_share(table)
            for slide in found:
                rows = slide.rows
                parts: dict[str, Any] = {} if share is None else {"tissue_share": share[rows]}
                if counts is not None:
                    own = counts[rows]
                    library = np.asarray(own.sum(1, dtype=np.float64)).ravel()
                    genes = tuple(map(str, table.var_names))
                    parts |= {"counts": own, "library": library, "genes": genes, "measured": None}
                if features is not None:
                    whole = np.array_equal(rows, np.arange(len(features)))
                    parts["features"] = features if whole else features[rows]  # features can be gigabytes: no copy
                if donor_key is not None:
                    parts["donor"] = _donor(table, donor_key, slide)
                if fold_key is not None:
                    parts["labels"] = _folds(table, fold_key, slide)
                if "crops" in need:
                    from spatiaflow._slides.crops import slide_crops

                    parts["crops"] = slide_crops(
                        one, slide, table, crop_um=crop_um, pixels=crop_pixels, wide=crop_wide, image_key=where.image_key,
                        as_uint8=True,
                    )  # fmt: skip
                name = unique_name(slide.name, label, len(found), {s.name for s in out}, isinstance(data, Mapping))
                out.append(replace(slide, name=name, **parts))
    if scaled and together:
        check_together(out)
    return out


def _donor(table: AnnData, donor_key: str, slide: Slide) -> str:
    """Name of a slide's donor; a slide has one."""
    found = _column(table, slide, donor_key=donor_key).to_numpy()
    names = {str(one) for one in found}
    if len(names) != 1 or found[0] is None or found[0] != found[0]:
        listed = ", ".join(sorted(map(repr, names))[:3])
        raise ValueError(
            f"obs[{donor_key!r}] must name one donor for each slide; slide {slide.name!r} has {len(names)} ({listed}). If one "
            "table holds several slides, tell them apart with library_key."
        )
    return names.pop()


def _folds(table: AnnData, fold_key: str, slide: Slide) -> np.ndarray:
    """Fold of each row, as text; every row has one."""
    found = _column(table, slide, fold_key=fold_key)
    if found.isna().any():
        raise ValueError(
            f"obs[{fold_key!r}] must name a fold for every row; {found.isna().sum()} of {len(found)} rows of slide "
            f"{slide.name!r} have none. Leave these rows out, or name a fold for them."
        )
    return _io.as_text(found)


def _column(table: AnnData, slide: Slide, **named: str) -> pd.Series:
    """Values of a column of ``.obs``, named by the argument that gives it, in the rows of a slide."""
    _io.text(**named)
    ((argument, key),) = named.items()
    if key not in table.obs:
        raise KeyError(
            f"obs has no {key!r} ({argument}); it has {', '.join(map(repr, table.obs.columns)) or 'no columns'}."
        )
    return table.obs[key].iloc[slide.rows]


def unique_name(name: str, label: str, n_slides: int, taken: Collection[str], named: bool) -> str:
    """Name of a slide that no other has: of a dict the key of its object."""
    if named:
        name = label if n_slides == 1 else f"{label}:{name}"
    while name in taken:  # two objects may call their slide alike
        name += "'"
    return name


def check_together(slides: Sequence[Slide]) -> None:
    """Warn of a slide that comes twice, and of slides whose spots are not as far apart as the others'."""
    if len(slides) < 2:
        return
    seen: dict[bytes, str] = {}
    for slide in slides:
        if (twin := seen.setdefault(slide.xy.tobytes(), slide.name)) != slide.name:
            warn(
                f"slides {twin!r} and {slide.name!r} have the same positions: is one slide given twice? What is held out "
                "would then have been trained on."
            )
    pitches = {slide.name: slide.pitch for slide in slides if len(slide) > 15}
    usual = float(np.median(list(pitches.values()))) if pitches else 1.0
    for name, step in pitches.items():
        if abs(step / usual - 1) > 0.5:
            warn(f"spots of slide {name!r} are {step:.3g} µm apart, those of the others {usual:.3g} µm. Check mpp.")
