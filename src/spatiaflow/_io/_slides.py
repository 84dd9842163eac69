"""Slides: which rows stand on which tissue, and where, in µm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow._io._arguments import listing, text
from spatiaflow._io._checks import check_positions, check_separate
from spatiaflow._io._elements import areas_of, centroids_of, copied, instances_of, known_instances
from spatiaflow._io._scales import (
    MICRON_SYSTEMS,
    anndata_scale,
    array_scale,
    centres_scale,
    contradiction,
    libraries,
    plain_name,
    system_scale,
    unknown_system,
)
from spatiaflow._io._where import Where
from spatiaflow._settings import logger
from spatiaflow.models.slide import ABSENT, Slide

# columns of a DataFrame of positions, x first
XY_COLUMNS = (
    ("x", "y"),
    ("x_centroid", "y_centroid"),
    ("center_x", "center_y"),
    ("pxl_col_in_fullres", "pxl_row_in_fullres"),
    ("pixel_x", "pixel_y"),
    ("imagecol", "imagerow"),
    ("x_location", "y_location"),
    ("x_um", "y_um"),
    ("centerx_global_px", "centery_global_px"),
    ("spatial1", "spatial2"),
)


def places(
    data: AnnData | SpatialData,
    where: Where | None = None,
    *,
    missing: bool = False,
    scaled: bool = True,
    partial: bool = False,
) -> list[Slide]:
    """Return every slide of ``data`` with its positions in µm, and nothing else yet.

    AnnData: ``obsm[spatial_key]`` times the µm per pixel. SpatialData: the centroids of the elements that the table
    annotates; a region is a slide. Regions that share no coordinate system lie in their own. Slides come in order of first
    appearance.

    Parameters
    ----------
    missing
        Positions may be NaN (empty polygons).
    scaled
        False: only the order of positions matters, so their scale may be unknown, and an AnnData may have none.
    partial
        The element that the caller names may hold some of the regions only; the others are no slides then.
    """
    where = where or Where()
    _, table = unpack(data, where.table_key)
    if not scaled:
        return _unscaled(data, table, where)
    if not isinstance(data, SpatialData):
        found = _slides_of_anndata(table, where)
        areas: list[Any] = [None] * len(found)
    else:
        found = _slides_of_spatialdata(data, table, where, partial)
        instances = table.obs[table.uns["spatialdata_attrs"]["instance_key"]]
        areas = [areas_of(data[s.element], instances.iloc[s.rows], s.coordinate_system) for s in found]
        areas = [None if area is None else area * slide.mpp**2 for area, slide in zip(areas, found)]
    for slide, area in zip(found, areas):
        check_positions(slide, table, where.library_key, missing, area)
    return found


def _unscaled(data: AnnData | SpatialData, table: AnnData, where: Where) -> list[Slide]:
    """Slides whose positions have any unit, or none at all."""
    if isinstance(data, SpatialData):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Check mpp")  # the scale is of no interest here
            return places(data, replace(where, mpp=1.0))
    there = where.spatial_key in table.obsm
    xy = positions(table, where.spatial_key) if there else ABSENT
    out = []
    for name, rows in _groups(table, where.library_key, there):
        if there and not np.isfinite(xy[rows]).all():
            raise ValueError(
                f"positions of slide {name!r} in obsm[{where.spatial_key!r}] are NaN or infinite; drop those rows."
            )
        out.append(Slide(name, table.obs_names.to_numpy()[rows], xy[rows] if there else ABSENT, rows=rows))
        if there:
            check_separate(out[-1], table, where.library_key)
    return out


def where_in_reference(reference: Any, where: Where) -> Where:
    """Return the arguments that hold for a reference: those that name what it does not have concern the data alone."""
    changes: dict[str, Any] = {}
    if isinstance(reference, SpatialData):
        if where.table_key not in reference.tables and len(reference.tables) == 1:
            changes["table_key"] = next(iter(reference.tables))
        changes |= {key: None for key in ("shapes_key", "labels_key") if getattr(where, key) not in reference}
    where = replace(where, **changes)
    table = unpack(reference, where.table_key, name="reference")[1]
    return replace(where, library_key=where.library_key if where.library_key in table.obs else None)


def one_slide(found: list[Slide], library_id: str | None) -> Slide:
    """Return the slide of a name, the first without one."""
    text(library_id=library_id)
    by_name = {slide.name: slide for slide in found}
    if library_id is not None and library_id not in by_name:
        raise KeyError(f"no slide {library_id!r}; there are {', '.join(by_name)}.")
    return found[0] if library_id is None else by_name[library_id]


def positions(table: AnnData, key: str) -> np.ndarray:
    """Return ``obsm[key]`` as x and y (n_obs x 2, float64); columns of a DataFrame are found by their names."""
    if key not in table.obsm:
        raise KeyError(
            f"obsm has no {key!r}; it has {listing(table.obsm)}. Positions belong there as an (n_obs, 2) array: "
            f"data.obsm[{key!r}] = coordinates, or give spatial_key=..."
        )
    values = table.obsm[key]
    if isinstance(values, pd.DataFrame):
        values = _xy_columns(values, key)
    elif sparse.issparse(values):
        values = values.toarray()
    try:
        xy = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"obsm[{key!r}] must hold numbers, x and y of every row: {error}.") from error
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ValueError(f"obsm[{key!r}] must have 2 columns, x and y; its shape is {xy.shape}.")
    return xy[:, :2]


def _xy_columns(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    names = [str(name).lower() for name in frame.columns]
    if names[:2] == ["0", "1"]:  # no names
        return frame
    found = [pair for pair in XY_COLUMNS if set(pair) <= set(names)]
    if len(found) != 1:
        raise ValueError(
            f"obsm[{key!r}] is a DataFrame with the columns {listing(frame.columns)}; which are x and y? Give them in that "
            f"order: data.obsm[{key!r}] = data.obsm[{key!r}][[x, y]].to_numpy()."
        )
    return frame.iloc[:, [names.index(name) for name in found[0]]]


def _slides_of_anndata(table: AnnData, where: Where) -> list[Slide]:
    xy = positions(table, where.spatial_key)
    out = []
    for library, rows in _groups(table, where.library_key, True):
        scale = anndata_scale(table, rows, library, xy[rows], where.spatial_key, where.mpp)
        out.append(Slide(library, table.obs_names.to_numpy()[rows], xy[rows] * scale, rows=rows, mpp=scale))
    return out


def _slides_of_spatialdata(sdata: SpatialData, table: AnnData, where: Where, partial: bool) -> list[Slide]:
    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        raise ValueError(
            "the table annotates no element (uns has no 'spatialdata_attrs'); "
            "link it with spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    if missing := [name for name in (attrs["region_key"], attrs["instance_key"]) if name not in table.obs]:
        raise KeyError(
            f"obs has no {missing[0]!r}, which uns['spatialdata_attrs'] names; it has {listing(table.obs.columns)}. Link the "
            "table again with spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    region_of, instance_of = table.obs[attrs["region_key"]].astype(str), table.obs[attrs["instance_key"]]
    regions = {name: np.flatnonzero(region_of == name) for name in dict.fromkeys(region_of)}
    if (element := where.shapes_key or where.labels_key) is not None:
        regions = _regions_of_element(sdata, element, regions, instance_of, partial)
    if missing := [name for name in regions if name not in sdata]:
        raise KeyError(
            f"the table annotates {listing(missing)}, which this SpatialData does not hold. Read or add that element; or, where "
            f"obsm['spatial'] of the table holds positions, pass the table alone: data[{where.table_key!r}]."
        )
    systems = _systems(sdata, list(regions), where.coordinate_system)
    out = []
    for name, rows in regions.items():
        system, instances = systems[name], instance_of.iloc[rows]
        centroids = centroids_of(sdata[name], name, system)
        if name not in set(region_of):
            centroids, instances = _of_other_element(sdata, name, centroids, instances)
        if len(unknown := instances[~instances.isin(centroids.index)]):
            raise ValueError(
                f"{len(unknown)} rows of the table annotate no instance of {name!r} (first: {unknown.iloc[0]!r}); "
                "spatialdata.match_table_to_element(sdata, ...) keeps those that match."
            )
        units = centroids.loc[instances, ["x", "y"]].to_numpy(np.float64)
        known = system_scale(sdata, system) or array_scale(table.obs.iloc[rows], units)
        known = known or centres_scale(table.obs.iloc[rows], units)
        if where.mpp is None and known is None:
            raise unknown_system(system)
        if where.mpp is not None and known is not None:
            says = f"coordinate system {system!r} has {known[0]:.4g} µm per unit, by {known[1]}"
            contradiction(where.mpp, known[0], says)
        mpp = float(where.mpp if where.mpp is not None else known[0])  # type: ignore[index]
        groups = (
            [(name, np.arange(len(rows)))] if where.library_key is None else _groups(table[rows], where.library_key)
        )
        for library, members in groups:
            names = table.obs_names.to_numpy()[rows[members]]
            place = {"rows": rows[members], "mpp": mpp, "element": name, "coordinate_system": system}
            out.append(Slide(library, names, units[members] * mpp, **place))
    return out


def _regions_of_element(
    sdata: SpatialData, element: str, regions: dict[str, np.ndarray], instance_of: pd.Series, partial: bool
) -> dict[str, np.ndarray]:
    """Rows that lie on the element that the caller names: of its own region, or of the one whose instances it holds."""
    if element not in sdata:
        here = [*sdata.shapes, *sdata.labels, *sdata.points]
        raise KeyError(f"this SpatialData holds no {element!r}; it has {listing(here)}.")
    if element in regions:
        mine = [element]
    elif len(regions) == 1:
        mine = list(regions)
    else:
        known = instances_of(sdata[element], element)
        fits = {
            name: known_instances(instance_of.iloc[rows], known).isin(known).all() for name, rows in regions.items()
        }
        mine = [name for name, fit in fits.items() if fit]
        if len(mine) > 1:
            raise ValueError(
                f"{element!r} holds the instances of {listing(mine)} alike, so it cannot be told whose they are. Number the "
                "instances of every region differently."
            )
        if not mine:
            raise ValueError(f"{element!r} holds the instances of none of {listing(regions)}.")
    if len(mine) < len(regions) and not partial:
        others = [name for name in regions if name not in mine]
        raise ValueError(
            f"{element!r} belongs to {listing(mine)}, not to {listing(others)}, which the table annotates too. Leave it out, "
            f"or take those rows alone: spatialdata.subset_sdata_by_table_mask(sdata, table_name, mask)."
        )
    return {element: regions[mine[0]]}


def _systems(sdata: SpatialData, regions: list[str], wanted: str | None) -> dict[str, str]:
    """The coordinate system of each region: one that all share, or of each its own."""
    from spatialdata.transformations import get_transformation

    own = {name: set(get_transformation(sdata[name], get_all=True)) for name in regions}
    common = set.intersection(*own.values())
    if wanted is not None and wanted not in common:
        raise KeyError(
            f"elements {listing(regions)} have no coordinate system {wanted!r}; they share {listing(sorted(common))}."
        )
    out = {}
    for name in regions:
        known = sorted(common or own[name])
        usual = next(
            (one for wished in (*MICRON_SYSTEMS, "global") for one in known if plain_name(one) == wished), known[0]
        )
        out[name] = wanted or usual
    return out


def _of_other_element(
    sdata: SpatialData, name: str, centroids: pd.DataFrame, instances: pd.Series
) -> tuple[pd.DataFrame, pd.Series]:
    """Match the table with an element that it does not annotate. A Xenium's numbers nuclei apart from cells."""
    outlines = name.replace("nucleus_labels", "nucleus_boundaries", 1)
    if plain_name(name) == "nucleus_labels" and outlines in sdata.shapes and "cell_id" in sdata[outlines]:  # a Xenium's
        raise ValueError(
            f"the numbers in {name!r} are those of nuclei, not of the table's cells; give shapes_key={outlines!r}, which "
            "knows the cell of each nucleus."
        )
    if hasattr(sdata[name], "geometry") and "cell_id" in sdata[name]:
        centroids = centroids.groupby(sdata[name]["cell_id"].to_numpy()).mean()
    return centroids, known_instances(instances, centroids.index)


def _groups(table: AnnData, library_key: str | None, by_uns: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (library id, rows) in order of first appearance; ``by_uns``: ``uns["spatial"]`` may name the slides."""
    named = list(libraries(table)) if by_uns else []
    if library_key is None and len(named) > 1:
        library_key = _library_column(table, named)
    if library_key is None:
        yield (named[0] if named else "slide"), np.arange(table.n_obs)
        return
    if library_key not in table.obs:
        raise KeyError(f"obs has no {library_key!r}; it has {listing(table.obs.columns)}.")
    column = table.obs[library_key]
    if column.isna().any():
        raise ValueError(
            f"obs[{library_key!r}] has {int(column.isna().sum())} missing values; every row needs its slide."
        )
    names = column.astype(str).to_numpy()
    for name in dict.fromkeys(names):
        yield name, np.flatnonzero(names == name)


def _library_column(table: AnnData, named: list[str]) -> str:
    """The column of obs whose values are the slides of ``uns["spatial"]``, as squidpy and scanpy's concat leave it."""
    fits = [name for name in table.obs if set(table.obs[name].dropna().astype(str).unique()) <= set(named)]
    fits = [name for name in fits if not table.obs[name].isna().any()]
    if len(fits) != 1:
        raise ValueError(
            f"uns['spatial'] holds {len(named)} slides ({listing(named)}): give library_key=, the obs column "
            f"that tells them apart{f' ({listing(fits)}?)' if fits else ''}."
        )
    logger.info("obs[%r] tells the slides of uns['spatial'] apart", fits[0])
    return str(fits[0])


def unpack(data: Any, table_key: str = "table", *, copy: bool = False, name: str = "data") -> tuple[Any, AnnData]:
    """Return ``(data, table)``; with ``copy=True`` a copy whose table can be written without touching the original.

    ``name``: the argument that holds the data, for errors.
    """
    text(table_key=table_key)
    if isinstance(data, AnnData):
        if data.isbacked and data.is_view:
            raise ValueError(f"{name} is a view of a backed AnnData; call {name}.to_memory() first.")
        if data.isbacked and copy:
            raise ValueError("copy=True needs the data in memory; this AnnData is backed: call data.to_memory() first.")
        data = data.copy() if copy else data
        table = data
    elif isinstance(data, SpatialData):
        if table_key not in data.tables:
            raise KeyError(
                f"this SpatialData has no table {table_key!r}; it has {listing(data.tables)}. Give table_key=..."
            )
        table = data.tables[table_key]
        if copy:
            elements = {name: copied(element) for _, name, element in data.gen_elements()}
            data = SpatialData.init_from_elements(elements, attrs=deepcopy(data.attrs))
            table = data.tables[table_key]
    else:
        raise TypeError(f"{name} must be one AnnData or SpatialData, not {type(data).__name__}.")
    if not isinstance(table.obs, pd.DataFrame):
        raise ValueError(f"{name} is a lazy AnnData; call {name}.to_memory() first.")
    if table.n_obs == 0:
        raise ValueError(f"the table of {name} has no rows: no spot or cell is left.")
    if not table.obs_names.is_unique:
        raise ValueError(f"obs_names of {name} are not unique; call .obs_names_make_unique() first.")
    return data, table
