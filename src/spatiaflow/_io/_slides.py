"""Slides: which rows stand on which tissue, and where, in µm."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from geopandas import GeoDataFrame
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from spatiaflow._io._where import Where
from spatiaflow._settings import warn
from spatiaflow.models.slide import ABSENT, Slide

# pitches that spot arrays have, µm: legacy ST (and its denser 2k array), Visium, Visium HD bins
KNOWN_PITCHES = (200.0, 141.0, 100.0, 16.0, 8.0, 2.0)
SLIDE_COLUMNS = (
    "library_id",
    "library",
    "sample",
    "sample_id",
    "section",
    "slide",
    "slide_id",
    "mouse",
    "donor",
    "batch",
)
MICRON_SYSTEMS = ("microns", "micron", "micrometers", "micrometer", "um", "µm")
XENIUM_MPP = 0.2125
COSMX_MPP = {4256: 0.12028, 5472: 0.18}  # by the width of a field of view in pixels: today's instrument, the first one


def places(
    data: AnnData | SpatialData, where: Where | None = None, *, missing: bool = False, scaled: bool = True
) -> list[Slide]:
    """Return every slide of ``data`` with its positions in µm, and nothing else yet.

    AnnData: ``obsm[spatial_key]`` times the µm per pixel. SpatialData: the centroids of the elements that the table
    annotates, in their common coordinate system. Slides come in order of first appearance.

    Parameters
    ----------
    missing
        Positions may be NaN (empty polygons).
    scaled
        False: only the order of positions matters, so their scale may be unknown, and an AnnData may have none.
    """
    where = where or Where()
    _, table = unpack(data, where.table_key)
    if not scaled:
        return _unscaled(data, table, where)
    if isinstance(data, SpatialData):
        found = _slides_of_spatialdata(data, table, where)
    else:
        found = _slides_of_anndata(table, where.library_key, where.spatial_key, where.mpp)
    for slide in found:
        _check_positions(slide, table, where.library_key, missing)
    return found


def _unscaled(data: AnnData | SpatialData, table: AnnData, where: Where) -> list[Slide]:
    """Slides whose positions have any unit, or none at all."""
    if isinstance(data, SpatialData):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Check mpp")  # the scale is of no interest here
            return places(data, replace(where, mpp=1.0))
    there = where.spatial_key in table.obsm
    xy: Any = np.asarray(table.obsm[where.spatial_key], dtype=np.float64)[:, :2] if there else None
    out = []
    for name, rows in _groups(table, where.library_key, list(table.uns.get("spatial", {})) if there else []):
        if there and not np.isfinite(xy[rows]).all():
            raise ValueError(
                f"positions of slide {name!r} in obsm[{where.spatial_key!r}] are NaN or infinite; drop those rows."
            )
        out.append(Slide(name, table.obs_names.to_numpy()[rows], xy[rows] if there else ABSENT, rows=rows))
    return out


def one_slide(found: list[Slide], library_id: str | None) -> Slide:
    """Return the slide of a name, the first without one."""
    by_name = {slide.name: slide for slide in found}
    if library_id is not None and library_id not in by_name:
        raise KeyError(f"no slide {library_id!r}; there are {', '.join(by_name)}.")
    return found[0] if library_id is None else by_name[library_id]


def _slides_of_anndata(table: AnnData, library_key: str | None, spatial_key: str, mpp: float | None) -> list[Slide]:
    if spatial_key not in table.obsm:
        raise KeyError(
            f"obsm has no {spatial_key!r}; it has {_listing(table.obsm)}. Positions belong there as an (n_obs, 2) array: "
            f"data.obsm[{spatial_key!r}] = coordinates, or give spatial_key=..."
        )
    xy = np.asarray(table.obsm[spatial_key], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(f"obsm[{spatial_key!r}] must have 2 columns, x and y; its shape is {xy.shape}.")
    xy = xy[:, :2]
    libraries = table.uns.get("spatial", {})
    out = []
    for library, rows in _groups(table, library_key, list(libraries)):
        metadata = libraries.get(library, {}).get("metadata", {}) if library in libraries else {}
        scale = mpp if mpp is not None else metadata.get("microns_per_pixel")
        if scale is None:
            raise ValueError(
                f"the scale of slide {library!r} is unknown: give mpp= (micrometres per pixel of obsm[{spatial_key!r}]; "
                f"mpp=1 if it is in µm), or set data.uns['spatial'][{library!r}]['metadata']['microns_per_pixel']."
            )
        stored = metadata.get("microns_per_pixel")
        if mpp is not None and stored is not None and abs(mpp / stored - 1) > 0.1:
            warn(
                f"mpp={mpp:g} was given, but uns['spatial'][{library!r}] says {stored:g} µm per pixel; {mpp:g} is used."
            )
        names = table.obs_names.to_numpy()[rows]
        out.append(Slide(library, names, xy[rows] * float(scale), rows=rows, mpp=float(scale)))
    return out


def _slides_of_spatialdata(sdata: SpatialData, table: AnnData, where: Where) -> list[Slide]:
    from spatialdata.transformations import get_transformation

    element_key, library_key, mpp = where.shapes_key or where.labels_key, where.library_key, where.mpp

    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        raise ValueError(
            "the table annotates no element (uns has no 'spatialdata_attrs'); "
            "link it with spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    region_of, instance_of = table.obs[attrs["region_key"]].astype(str), table.obs[attrs["instance_key"]]
    regions = [element_key] if element_key else list(dict.fromkeys(region_of))
    missing = [name for name in regions if name not in sdata]
    if missing and element_key:
        here = [*sdata.shapes, *sdata.labels, *sdata.points]
        raise KeyError(f"this SpatialData holds no {element_key!r}; it has {_listing(here)}.")
    if missing:
        raise KeyError(f"the table annotates {_listing(missing)}, which this SpatialData does not hold.")
    common = set.intersection(*(set(get_transformation(sdata[name], get_all=True)) for name in regions))
    if not common:
        raise ValueError(f"elements {_listing(regions)} share no coordinate system; align them first.")
    if where.coordinate_system is not None and where.coordinate_system not in common:
        raise KeyError(
            f"elements {_listing(regions)} have no coordinate system {where.coordinate_system!r}; they share {_listing(common)}."
        )
    system = where.coordinate_system or next(
        (name for name in MICRON_SYSTEMS if name in common), "global" if "global" in common else sorted(common)[0]
    )
    scale = microns_per_unit(sdata, system) if mpp is None else mpp
    if mpp is not None:
        _compare_scale(sdata, system, mpp)
    out = []
    for name in regions:
        rows = np.flatnonzero(region_of == name) if not element_key else np.arange(table.n_obs)
        if isinstance(sdata[name], GeoDataFrame) and not sdata[name].index.is_unique:
            raise ValueError(f"the index of {name!r} is not unique; every instance needs a name of its own.")
        centroids, instances = _centroids(sdata[name], system), instance_of.iloc[rows]
        if name not in set(region_of):
            centroids, instances = _of_other_element(sdata, name, centroids, instances)
        if len(unknown := instances[~instances.isin(centroids.index)]):
            raise ValueError(
                f"{len(unknown)} rows of the table annotate no instance of {name!r} (first: {unknown.iloc[0]!r}); "
                "spatialdata.match_table_to_element(sdata, ...) keeps those that match."
            )
        xy = centroids.loc[instances, ["x", "y"]].to_numpy(np.float64) * scale
        if library_key is None:
            out.append(_place(table, name, rows, xy, scale, name, system))
        else:
            for library, members in _groups(table[rows], library_key, []):
                out.append(_place(table, library, rows[members], xy[members], scale, name, system))
    return out


def _place(table: AnnData, name: str, rows: np.ndarray, xy: np.ndarray, mpp: float, element: str, system: str) -> Slide:
    names = table.obs_names.to_numpy()[rows]
    return Slide(name, names, xy, rows=rows, mpp=mpp, element=element, coordinate_system=system)


def _of_other_element(
    sdata: SpatialData, name: str, centroids: pd.DataFrame, instances: pd.Series
) -> tuple[pd.DataFrame, pd.Series]:
    """Match the table with an element that it does not annotate. A Xenium's numbers nuclei apart from cells."""
    if name == "nucleus_labels" and sdata.attrs.get("spatialdata_io_reader") == "xenium":
        raise ValueError(
            "the numbers in 'nucleus_labels' are those of nuclei, not of the table's cells; give "
            "shapes_key='nucleus_boundaries', which knows the cell of each nucleus."
        )
    if hasattr(sdata[name], "geometry") and "cell_id" in sdata[name]:
        centroids = centroids.groupby(sdata[name]["cell_id"].to_numpy()).mean()
    return centroids, known_instances(instances, centroids.index)


def known_instances(instances: pd.Series, known: pd.Index) -> pd.Series:
    """Return the instances of rows as an element that the table does not annotate knows them: as they are, or by obs_names."""
    by_name = instances.index.to_series()
    return by_name if not instances.isin(known).all() and by_name.isin(known).all() else instances


def _centroids(element: Any, system: str) -> pd.DataFrame:
    """Return x and y of every instance of an element, in a coordinate system; labels are read chunk by chunk."""
    if isinstance(element, GeoDataFrame):  # an empty polygon has none
        centroids = element.geometry.centroid.get_coordinates().reindex(element.index)
    elif hasattr(element, "divisions"):
        centroids = element[["x", "y"]].compute()
    else:
        element = image_scales(element)[0]
        centroids = _label_centroids(element.data)
    affine = _affine(element, system)
    return pd.DataFrame(centroids @ affine[:2, :2].T + affine[:2, 2], centroids.index).set_axis(["x", "y"], axis=1)


def _label_centroids(labels: Any) -> pd.DataFrame:
    from dask.array.core import slices_from_chunks

    sums = []
    for rows, columns in slices_from_chunks(labels.chunks):
        block = np.asarray(labels[rows, columns])
        y, x = np.nonzero(block)
        which, ids = pd.factorize(block[y, x])
        sums.append(
            pd.DataFrame(
                {
                    "x": np.bincount(which, x + columns.start + 0.5, len(ids)),
                    "y": np.bincount(which, y + rows.start + 0.5, len(ids)),
                    "n": np.bincount(which, minlength=len(ids)),
                },
                index=ids,
            )
        )
    total = pd.concat(sums).groupby(level=0).sum()
    return total[["x", "y"]].div(total["n"], axis=0)


def _affine(element: Any, system: str | None) -> np.ndarray:
    """3 x 3, from an element's own x and y to the coordinate system."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y"))


def image_scales(element: Any) -> list:
    """Levels of an image or of labels, the finest first."""
    if not hasattr(element, "children"):
        return [element]
    return [next(iter(child.ds.data_vars.values())) for child in element.children.values()]


def microns_per_unit(sdata: SpatialData, coordinate_system: str) -> float:
    """Return the µm per unit of a coordinate system: by its name, ``attrs["microns_per_unit"]``, or a vendor's elements."""
    if coordinate_system in MICRON_SYSTEMS:
        return 1.0
    known = sdata.attrs.get("microns_per_unit", {})
    if coordinate_system in known:
        return float(known[coordinate_system])
    if (scale := _vendor_scale(sdata, coordinate_system)) is not None:
        return scale
    raise ValueError(
        f"the scale of coordinate system {coordinate_system!r} is unknown: give mpp= (micrometres per unit; mpp=1 if its "
        f"unit is the µm, 0.2125 for a Xenium's), or set sdata.attrs['microns_per_unit'] = {{{coordinate_system!r}: ...}}."
    )


def _compare_scale(sdata: SpatialData, system: str, mpp: float) -> None:
    """Warn of a scale that contradicts what the data say of themselves."""
    try:
        known = microns_per_unit(sdata, system)
    except ValueError:
        return
    if abs(mpp / known - 1) > 0.1:
        warn(
            f"mpp={mpp:g} was given, but coordinate system {system!r} has {known:g} µm per unit; {mpp:g} is used. Check mpp."
        )


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
        if bins := re.search(r"square_(\d{3})um$", name):  # Visium HD: squares or circles as wide as their name says
            width = 2 * shapes["radius"].iloc[0] if "radius" in shapes else np.sqrt(shapes.geometry.iloc[0].area)
            return int(bins[1]) / float(width * units)
        if reader == "merscope" and name.endswith("_polygons"):  # in µm, as a Xenium's
            return 1 / units
        if name in ("cell_boundaries", "nucleus_boundaries", "cell_circles") and abs(units * XENIUM_MPP - 1) < 0.01:
            return XENIUM_MPP
    if reader == "cosmx":
        for table in sdata.tables.values():
            if {"Area", "Area.um2"} <= set(table.obs):
                return float(np.sqrt(np.median(table.obs["Area.um2"] / table.obs["Area"])))
        for labels in sdata.labels.values():
            if (width := image_scales(labels)[0].shape[1]) in COSMX_MPP:
                return COSMX_MPP[width]
    return None


def _groups(table: AnnData, library_key: str | None, libraries: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (library id, rows) in order of first appearance."""
    if library_key is None:
        if len(libraries) > 1:
            raise ValueError(
                f"uns['spatial'] holds {len(libraries)} slides ({_listing(libraries)}): give library_key=, the obs column "
                "that tells them apart."
            )
        yield (libraries[0] if libraries else "slide"), np.arange(table.n_obs)
        return
    if library_key not in table.obs:
        raise KeyError(f"obs has no {library_key!r}; it has {_listing(table.obs.columns)}.")
    column = table.obs[library_key]
    if column.isna().any():
        raise ValueError(
            f"obs[{library_key!r}] has {int(column.isna().sum())} missing values; every row needs its slide."
        )
    names = column.astype(str).to_numpy()
    for name in dict.fromkeys(names):
        yield name, np.flatnonzero(names == name)


def _check_positions(slide: Slide, table: AnnData, library_key: str | None, missing: bool) -> None:
    bad = ~np.isfinite(slide.xy).all(1)
    if bad.any() and not missing:
        raise ValueError(
            f"{int(bad.sum())} positions of slide {slide.name!r} are NaN or infinite "
            f"(first: {table.obs_names[slide.rows[np.argmax(bad)]]!r}); drop those rows."
        )
    points = np.unique(slide.xy[~bad], axis=0)
    distinct, known = len(points), int((~bad).sum())
    if distinct < known:
        hint = "" if library_key else "; if several slides share this table, give library_key="
        warn(f"{known - distinct} positions of slide {slide.name!r} are duplicates of others{hint}.")
    if library_key is None and (column := _column_of_slides(slide, table)) is not None:
        warn(
            f"obs[{column!r}] seems to tell several slides apart that lie over one another here; if so, give "
            f"library_key={column!r}."
        )
    if distinct >= 16:
        is_lattice, step = _lattice(points)
        closest = min(KNOWN_PITCHES, key=lambda known: abs(np.log(known / step)))
        if is_lattice and abs(step / closest - 1) > 0.15:
            warn(
                f"slide {slide.name!r}: at {slide.mpp:g} µm per pixel its spots are {step:.4g} µm apart, but spot "
                f"arrays have a pitch of 200, 141, 100, 16, 8 or 2 µm ({closest:g} would need "
                f"mpp={slide.mpp * closest / step:.4g}). Check mpp."
            )


def _lattice(points: np.ndarray) -> tuple[bool, float]:
    """Whether distinct points form an array of spots, printed ones jittered, and their median distance."""
    nearest = cKDTree(points).query(points, k=2)[0][:, 1]
    step = float(np.median(nearest))
    low, lower, upper, high = np.percentile(nearest, [10, 20, 80, 90])
    return upper - lower < 0.17 * step and high - low < 0.25 * step, step


def _column_of_slides(slide: Slide, table: AnnData) -> str | None:
    """A column of obs that seems to tell slides apart: by its name, or because its groups alone are regular arrays."""
    if len(slide.rows) < 32:
        return None
    regular = _lattice(np.unique(slide.xy, axis=0))[0]
    for name in table.obs.columns:
        column = table.obs[name].iloc[slide.rows]
        if not (isinstance(column.dtype, pd.CategoricalDtype) or column.dtype == object):
            continue
        codes, groups = pd.factorize(column)
        parts = [slide.xy[codes == i] for i in range(len(groups))] if 2 <= len(groups) <= 50 else []
        if len(parts) < 2:
            continue
        if str(name).lower() in SLIDE_COLUMNS and _overlap(parts[0], parts[1]):
            return name
        if not regular and all(len(part) >= 16 and _lattice(np.unique(part, axis=0))[0] for part in parts):
            return name
    return None


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the boxes of two sets of points share more than half of the smaller one."""
    low, high = np.maximum(first.min(0), second.min(0)), np.minimum(first.max(0), second.max(0))
    area = min(np.ptp(first, axis=0).prod(), np.ptp(second, axis=0).prod())
    return bool((high > low).all() and (high - low).prod() > 0.5 * area)


def unpack(data: Any, table_key: str = "table", *, copy: bool = False, name: str = "data") -> tuple[Any, AnnData]:
    """Return ``(data, table)``; with ``copy=True`` a copy whose table can be written without touching the original.

    ``name``: the argument that holds the data, for errors.
    """
    if isinstance(data, AnnData):
        if data.isbacked and copy:
            raise ValueError("copy=True needs the data in memory; this AnnData is backed: call data.to_memory() first.")
        data = data.copy() if copy else data
        table = data
    elif isinstance(data, SpatialData):
        if table_key not in data.tables:
            raise KeyError(
                f"this SpatialData has no table {table_key!r}; it has {_listing(data.tables)}. Give table_key=..."
            )
        table = data.tables[table_key]
        if copy:
            table = table.copy()
            elements = {name: element for _, name, element in data.gen_elements() if name != table_key}
            data = SpatialData.init_from_elements({**elements, table_key: table}, attrs=dict(data.attrs))
            table = data.tables[table_key]
    else:
        raise TypeError(
            f"{name} must be an AnnData or a SpatialData (only training takes a list of them), not {type(data).__name__}."
        )
    if table.n_obs == 0:
        raise ValueError("the table has no rows: no spot or cell is left.")
    if not table.obs_names.is_unique:
        raise ValueError("obs_names are not unique; call .obs_names_make_unique() first.")
    return data, table


def _listing(names: Iterable) -> str:
    names = [repr(str(name)) for name in names]
    return (", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")) or "nothing"
