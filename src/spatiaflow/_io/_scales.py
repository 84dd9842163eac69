"""The scale of a slide, µm per unit of its positions: stated, of the instrument, or of the array of spots."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow._io._elements import image_scales
from spatiaflow._settings import warn
from spatiaflow.models.slide import Slide

MICRON_SYSTEMS = ("microns", "micron", "micrometers", "micrometer", "um", "µm")
XENIUM_MPP = 0.2125
COSMX_MPP = {4256: 0.12028, 5472: 0.18}  # by the width of a field of view in pixels: today's instrument, the first one
VISIUM_PITCH, ST_PITCH = 100.0, 200.0
CENTRES = (("x_centroid", "y_centroid"), ("center_x", "center_y"))  # of cells, in µm: Xenium and MERSCOPE
BOX = ("min_x", "min_y", "max_x", "max_y")  # the same of MERSCOPE, all that squidpy leaves
ST_LAST = 36  # the arrays of legacy ST have at most 35 rows and columns


def stated(value: Any, slot: str) -> float:
    """Return the µm per pixel that a slot states; refuse what is no positive number."""
    try:
        number = float("nan") if isinstance(value, bool | np.bool_) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, str) or not (np.isfinite(number) and number > 0):
        raise ValueError(f"{slot} must be a positive number; it is {value!r}. Correct or delete it.")
    return number


def libraries(table: AnnData) -> dict[str, dict[str, dict]]:
    """Return the slides of ``uns["spatial"]``, each with ``images``, ``scalefactors`` and ``metadata`` as dicts.

    Entries that are no dict, such as CELLxGENE's ``is_single``, are no slides.
    """
    found = table.uns.get("spatial")
    if not isinstance(found, Mapping):
        return {}
    parts = ("images", "scalefactors", "metadata")
    if set(found) & set(parts):
        raise ValueError(
            f"uns['spatial'] holds {', '.join(map(repr, sorted(set(found) & set(parts))))} themselves, without the level of "
            "slides. Write data.uns['spatial'] = {'my_slide': data.uns['spatial']}."
        )
    out = {}
    for name, library in found.items():
        if not isinstance(library, Mapping):
            continue
        for part in parts:
            if not isinstance(library.get(part, {}), Mapping):
                raise ValueError(
                    f"uns['spatial'][{name!r}][{part!r}] must be a dict; it is {type(library[part]).__name__}. Correct or "
                    "delete it."
                )
        out[str(name)] = {part: dict(library.get(part, {})) for part in parts}
    return out


def anndata_scale(table: AnnData, rows: np.ndarray, library: str, xy: np.ndarray, key: str, mpp: float | None) -> float:
    """Return the µm per unit of a slide's positions (n x 2) in ``obsm[key]``.

    What the caller states comes first, then what ``uns`` states, the instrument, and the pitch of the array.
    """
    slot = f"uns['spatial'][{library!r}]"
    known, source = None, ""
    parts = libraries(table).get(library, {})
    for part, name in (("metadata", "microns_per_pixel"), ("scalefactors", "microns_per_pixel")):
        if known is None and parts.get(part, {}).get(name) not in (None, ""):
            source = f"{slot}[{part!r}][{name!r}]"
            known = stated(parts[part][name], source)
    if known is None:
        known, source = _of_instrument(table, rows, xy, parts) or array_scale(table.obs.iloc[rows], xy) or (None, "")
    if mpp is None and known is None:
        raise ValueError(
            f"the scale of slide {library!r} is unknown: give mpp= (micrometres per pixel of obsm[{key!r}]; mpp=1 if it is in "
            f"µm), or set data.uns['spatial'][{library!r}]['metadata']['microns_per_pixel']."
        )
    if mpp is not None and known is not None:
        contradiction(mpp, known, f"{source} says {known:.4g} µm per pixel")
    return float(known if mpp is None else mpp)  # type: ignore[arg-type]


def contradiction(mpp: float, known: float, statement: str) -> None:
    """Warn of a scale that contradicts what the data say of themselves, as ``uns says 0.5 µm per pixel``."""
    if abs(mpp / known - 1) > 0.1:
        warn(f"mpp={mpp:g} was given, but {statement}; {mpp:g} is used. Check mpp.")


def _of_instrument(table: AnnData, rows: np.ndarray, xy: np.ndarray, parts: dict) -> tuple[float, str] | None:
    """Scale of what readers of Xenium, MERSCOPE and CosMx leave in an AnnData; None for others."""
    for columns in CENTRES:
        if set(columns) <= set(table.obs):
            written = table.obs[list(columns)].iloc[rows].to_numpy(np.float64)
            if np.allclose(written, xy, rtol=1e-4, atol=1e-3, equal_nan=True):
                return 1.0, f"obs[{columns[0]!r}], which is in µm,"
    if set(BOX) <= set(table.obs):
        left, upper, right, lower = table.obs[list(BOX)].iloc[rows].to_numpy(np.float64).T
        inside = (left <= xy[:, 0]) & (xy[:, 0] <= right) & (upper <= xy[:, 1]) & (xy[:, 1] <= lower)
        if inside[np.isfinite(xy).all(1)].mean() > 0.99:
            return 1.0, "obs['min_x'], which is in µm,"
    cosmx = {"CenterX_local_px", "CenterX_global_px"} & set(table.obs)
    if cosmx and {"Area", "Area.um2"} <= set(table.obs):
        ratio = table.obs["Area.um2"] / table.obs["Area"]
        return float(np.sqrt(np.nanmedian(ratio))), "obs['Area.um2']"
    if cosmx:
        for image in parts.get("images", {}).values():
            if (width := int(np.shape(image)[1])) in COSMX_MPP:
                return COSMX_MPP[width], f"a CosMx field of view of {width} pixels"
    return None


def array_scale(obs: pd.DataFrame, xy: np.ndarray) -> tuple[float, str] | None:
    """Return the µm per unit of spots on an array, from ``array_row`` and ``array_col`` and the pitch of Visium or ST.

    Parameters
    ----------
    obs
        Table of the spots.
    xy
        Their positions, n x 2.

    Returns
    -------
    The scale and what it was taken from; None where there is no such array.
    """
    if not {"array_row", "array_col"} <= set(obs):
        return None
    place = obs[["array_col", "array_row"]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    keep = np.isfinite(place).all(1) & np.isfinite(xy).all(1)
    if keep.sum() < 4 or np.linalg.matrix_rank(place[keep] - place[keep].mean(0)) < 2:
        return None
    place, xy = place[keep], xy[keep]
    design = np.column_stack([place, np.ones(len(place))])
    solution = np.linalg.lstsq(design, xy, rcond=None)[0]
    column, row = np.linalg.norm(solution[:2], axis=1)
    off = np.median(np.linalg.norm(design @ solution - xy, axis=1))
    if min(column, row) <= 0 or off > 0.25 * max(column, row) or abs(solution[0] @ solution[1]) > 0.1 * column * row:
        return None
    whole = np.abs(place - np.round(place)).max() < 1e-6
    if whole and not (place.sum(1) % 2).any() and abs(row / column / np.sqrt(3) - 1) < 0.05:
        # neighbours of a row are two columns apart
        return VISIUM_PITCH / (2 * column), "the array of Visium (100 µm between spots)"
    if abs(row / column - 1) < 0.05 and place.min() >= 0 and place.max() < ST_LAST:
        return ST_PITCH / np.sqrt(row * column), "the array of legacy ST (200 µm between spots)"
    return None


def centres_scale(obs: pd.DataFrame, xy: np.ndarray) -> tuple[float, str] | None:
    """Return the µm per unit of cells whose centres an instrument wrote into ``obs`` in µm, and their column; None without.

    Parameters
    ----------
    obs
        Table of the cells.
    xy
        Their positions, n x 2; the instrument's may be moved, turned or mirrored.
    """
    for columns in CENTRES:
        if not set(columns) <= set(obs):
            continue
        written = obs[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        keep = np.isfinite(written).all(1) & np.isfinite(xy).all(1)
        if keep.sum() < 4:
            continue
        microns, units = (np.linalg.norm(found[keep] - found[keep].mean(0), axis=1) for found in (written, xy))
        scale = microns.sum() / max(units.sum(), 1e-12)
        if np.median(np.abs(scale * units - microns)) < 0.02 * np.median(microns):
            return float(scale), f"obs[{columns[0]!r}], which is in µm"
    return None


def plain_name(name: str) -> str:
    """Return the name of an element or coordinate system without what :func:`spatialdata.concatenate` appends to it."""
    return name.split("-")[0]


def system_scale(sdata: SpatialData, system: str) -> tuple[float, str] | None:
    """Return the µm per unit of a coordinate system, and what says so; None where nothing does.

    Its name comes first, then ``attrs["microns_per_unit"]`` and the elements of an instrument.
    """
    if plain_name(system) in MICRON_SYSTEMS:
        return 1.0, "its name"
    known = sdata.attrs.get("microns_per_unit", {})
    if not isinstance(known, Mapping):
        raise ValueError(
            "sdata.attrs['microns_per_unit'] must be a dict of coordinate systems and their µm per unit; it is "
            f"{known!r}. Write sdata.attrs['microns_per_unit'] = {{{system!r}: ...}}."
        )
    if system in known:
        slot = f"sdata.attrs['microns_per_unit'][{system!r}]"
        return stated(known[system], slot), slot
    scale = _vendor_scale(sdata, system)
    return None if scale is None else (scale, "the instrument")


def _vendor_scale(sdata: SpatialData, system: str) -> float | None:
    """µm per unit of the pixel systems that spatialdata-io's readers make, which state no scale; None for others."""
    from spatialdata.transformations import get_transformation

    reader = sdata.attrs.get("spatialdata_io_reader")  # absent in stores of its first versions
    if reader == "xenium" and system == "global":
        return XENIUM_MPP
    for name, shapes in sdata.shapes.items():
        transformations = get_transformation(shapes, get_all=True)
        if system not in transformations:
            continue
        affine = transformations[system].to_affine_matrix(("x", "y"), ("x", "y"))
        units = float(np.sqrt(abs(np.linalg.det(affine[:2, :2]))))  # of the system, per unit of the shapes
        if bins := re.search(r"square_(\d{3})um", name):  # Visium HD: squares or circles as wide as their name says
            width = 2 * shapes["radius"].iloc[0] if "radius" in shapes else np.sqrt(shapes.geometry.iloc[0].area)
            return int(bins[1]) / float(width * units)
        if reader == "merscope" and name.endswith("_polygons"):  # in µm, as a Xenium's
            return 1 / units
        vendor = re.match("(cell_boundaries|nucleus_boundaries|cell_circles)", name)
        if vendor and abs(units * XENIUM_MPP - 1) < 0.01:
            return XENIUM_MPP
    tables = [set(table.obs) for table in sdata.tables.values()]
    if reader == "cosmx" or (reader is None and any({"fov", "cell_ID"} <= columns for columns in tables)):
        for table in sdata.tables.values():
            if {"Area", "Area.um2"} <= set(table.obs):
                return float(np.sqrt(np.median(table.obs["Area.um2"] / table.obs["Area"])))
        for labels in sdata.labels.values():
            if (width := image_scales(labels)[0].shape[1]) in COSMX_MPP:
                return COSMX_MPP[width]
    return None


def microns_per_unit(sdata: SpatialData, coordinate_system: str) -> float:
    """Return the µm per unit of a coordinate system; refuse where nothing says it."""
    if (found := system_scale(sdata, coordinate_system)) is None:
        raise unknown_system(coordinate_system)
    return found[0]


def unknown_system(system: str) -> ValueError:
    """The error of a coordinate system without a scale."""
    return ValueError(
        f"the scale of coordinate system {system!r} is unknown: give mpp= (micrometres per unit; mpp=1 if its "
        f"unit is the µm, 0.2125 for a Xenium's), or set sdata.attrs['microns_per_unit'] = {{{system!r}: ...}}."
    )


def remember(data: AnnData | SpatialData, slides: list[Slide], mpp: float | None, key: str = "spatial") -> None:
    """Keep a scale that the user gave beside the image, so that it need not be given again."""
    if mpp is None:
        return
    if isinstance(data, SpatialData):
        known = dict(data.attrs.get("microns_per_unit", {}))
        data.attrs["microns_per_unit"] = known | {str(slide.coordinate_system): float(mpp) for slide in slides}
        return
    named = {slide.name for slide in slides} & set(libraries(data)) if key == "spatial" else set()
    for name, library in data.uns["spatial"].items() if named else ():
        if str(name) in named and isinstance(library, MutableMapping):
            library["metadata"] = dict(library.get("metadata", {})) | {"microns_per_pixel": float(mpp)}
