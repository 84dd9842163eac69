"""Tables, positions, features and counts out of AnnData and SpatialData; results back into slots."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from anndata import AnnData
from geopandas import GeoDataFrame
from scipy import sparse
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from spatiaflow._settings import logger

# pitches that spot arrays have, µm: legacy ST (and its denser 2k array), Visium, Visium HD bins
KNOWN_PITCHES = (200.0, 141.0, 100.0, 16.0, 8.0, 2.0)
ENCODER = (
    "id",
    "sha256",
    "mpp",
    "patch_um",
    "standardize",
    "n_features",
)  # provenance of features, in uns[features_key]
MICRON_SYSTEMS = ("microns", "micron", "micrometers", "micrometer", "um", "µm")
XENIUM_MPP = 0.2125
COSMX_MPP = {4256: 0.12028, 5472: 0.18}  # by the width of a field of view in pixels: today's instrument, the first one


@dataclass(frozen=True)
class Slide:
    """The spots or cells of one slide: where they stand in the table, and where on the tissue."""

    library_id: str
    rows: np.ndarray  # n, int: positions in table.obs
    xy: np.ndarray  # n x 2, float64, µm
    mpp: float  # µm per unit of the stored positions
    element: str | None = None  # the SpatialData element that the rows annotate
    coordinate_system: str | None = None

    @cached_property
    def pitch(self) -> float:
        """Median distance to the nearest other position, µm (1 where there is none)."""
        return pitch(self.xy)


def pitch(xy: np.ndarray) -> float:
    """Median distance to the nearest distinct neighbour; 1 for a single position."""
    distinct = np.unique(xy, axis=0)
    if len(distinct) < 2:
        return 1.0
    return float(np.median(cKDTree(distinct).query(distinct, k=2)[0][:, 1]))


def unpack(data: AnnData | SpatialData, table_key: str = "table", *, copy: bool = False):
    """Return ``(data, table)``; with ``copy=True`` a copy whose table can be written without touching the original."""
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
        raise TypeError(f"data must be an AnnData or a SpatialData, not {type(data).__name__}.")
    if not table.obs_names.is_unique:
        raise ValueError("obs_names are not unique; call .obs_names_make_unique() first.")
    return data, table


def slides(
    data: AnnData | SpatialData,
    *,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    missing: bool = False,
) -> list[Slide]:
    """Return every slide of ``data`` with its positions in µm.

    AnnData: ``obsm[spatial_key]`` times the µm per pixel. SpatialData: the centroids of the elements that the table
    annotates, in their common coordinate system. Slides come in order of first appearance. Positions may only be NaN
    (empty polygons) with ``missing=True``.
    """
    if mpp is not None and not (np.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp is in micrometres per pixel and must be a positive number, not {mpp!r}.")
    _, table = unpack(data, table_key)
    if isinstance(data, SpatialData):
        found = _slides_of_spatialdata(data, table, shapes_key or labels_key, library_key, mpp)
    else:
        found = _slides_of_anndata(table, library_key, spatial_key, mpp)
    for slide in found:
        _check_positions(slide, table, library_key, missing)
    return found


def _slides_of_anndata(table, library_key, spatial_key, mpp) -> list[Slide]:
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
            warnings.warn(
                f"mpp={mpp:g} was given, but uns['spatial'][{library!r}] says {stored:g} µm per pixel; {mpp:g} is used.",
                UserWarning,
                stacklevel=4,
            )
        out.append(Slide(library, rows, xy[rows] * float(scale), float(scale)))
    return out


def _slides_of_spatialdata(sdata, table, element_key, library_key, mpp) -> list[Slide]:
    from spatialdata.transformations import get_transformation

    attrs = table.uns.get("spatialdata_attrs")
    if attrs is None:
        raise ValueError(
            "the table annotates no element (uns has no 'spatialdata_attrs'); "
            "link it with spatialdata.models.TableModel.parse(table, region=..., region_key=..., instance_key=...)."
        )
    region_of, instance_of = table.obs[attrs["region_key"]].astype(str), table.obs[attrs["instance_key"]]
    regions = [element_key] if element_key else list(dict.fromkeys(region_of))
    missing = [name for name in regions if name not in sdata]
    if missing:
        raise KeyError(f"the table annotates {_listing(missing)}, which this SpatialData does not hold.")
    common = set.intersection(*(set(get_transformation(sdata[name], get_all=True)) for name in regions))
    if not common:
        raise ValueError(f"elements {_listing(regions)} share no coordinate system; align them first.")
    system = next(
        (name for name in MICRON_SYSTEMS if name in common), "global" if "global" in common else sorted(common)[0]
    )
    scale = mpp if mpp is not None else microns_per_unit(sdata, system)
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
            out.append(Slide(name, rows, xy, scale, name, system))
        else:
            for library, members in _groups(table[rows], library_key, []):
                out.append(Slide(library, rows[members], xy[members], scale, name, system))
    return out


def _of_other_element(sdata, name, centroids, instances) -> tuple[pd.DataFrame, pd.Series]:
    """Match the table with an element that it does not annotate. A Xenium's numbers nuclei apart from cells."""
    if name == "nucleus_labels" and sdata.attrs.get("spatialdata_io_reader") == "xenium":
        raise ValueError(
            "the numbers in 'nucleus_labels' are those of nuclei, not of the table's cells; give "
            "shapes_key='nucleus_boundaries', which knows the cell of each nucleus."
        )
    if hasattr(sdata[name], "geometry") and "cell_id" in sdata[name]:
        centroids = centroids.groupby(sdata[name]["cell_id"].to_numpy()).mean()
    if not instances.isin(centroids.index).all():
        by_name = instances.index.to_series()
        instances = by_name if by_name.isin(centroids.index).all() else instances
    return centroids, instances


def _centroids(element, system: str) -> pd.DataFrame:
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


def _label_centroids(labels) -> pd.DataFrame:
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


def _affine(element, system: str) -> np.ndarray:
    """3 x 3, from an element's own x and y to the coordinate system."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y"))


def image_scales(element) -> list:
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


def _groups(table, library_key, libraries):
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


def _check_positions(slide: Slide, table, library_key, missing: bool) -> None:
    bad = ~np.isfinite(slide.xy).all(1)
    if bad.any() and not missing:
        raise ValueError(
            f"{int(bad.sum())} positions of slide {slide.library_id!r} are NaN or infinite "
            f"(first: {table.obs_names[slide.rows[np.argmax(bad)]]!r}); drop those rows."
        )
    points = np.unique(slide.xy[~bad], axis=0)
    distinct, known = len(points), int((~bad).sum())
    if distinct < known:
        hint = "" if library_key else "; if several slides share this table, give library_key="
        warnings.warn(
            f"{known - distinct} positions of slide {slide.library_id!r} are duplicates of others{hint}.",
            UserWarning,
            stacklevel=3,
        )
    if distinct >= 16:
        nearest = cKDTree(points).query(points, k=2)[0][:, 1]
        is_lattice = np.subtract(*np.percentile(nearest, [80, 20])) < 0.1 * np.median(nearest)
        step = float(np.median(nearest))
        closest = min(KNOWN_PITCHES, key=lambda known: abs(np.log(known / step)))
        if is_lattice and abs(step / closest - 1) > 0.15:
            warnings.warn(
                f"slide {slide.library_id!r}: at {slide.mpp:g} µm per pixel its spots are {step:.4g} µm apart, but spot "
                f"arrays have a pitch of 200, 141, 100, 16, 8 or 2 µm ({closest:g} would need "
                f"mpp={slide.mpp * closest / step:.4g}). Check mpp.",
                UserWarning,
                stacklevel=3,
            )


FEATURES_HELP = "Make histology features with sf.pp.encode_patches(data), or give features_key=..."


def features(table: AnnData, key: str, hint: str = FEATURES_HELP) -> np.ndarray:
    """Return ``obsm[key]`` as a float32 array (n_obs x n_features), checked to be finite."""
    if key not in table.obsm:
        raise KeyError(f"obsm has no {key!r}; it has {_listing(table.obsm)}. {hint}")
    values = table.obsm[key]
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
        raise ValueError(
            f"obsm[{key!r}] must be a numeric (n_obs, n_features) array; it is {values.dtype} {values.shape}."
        )
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise ValueError(
            f"obsm[{key!r}] has NaN or infinite values in {int(bad.sum())} rows "
            f"(first: {table.obs_names[np.argmax(bad)]!r}); drop those rows or encode them again."
        )
    return values.astype(np.float32, copy=False)


def same_encoder(tables: list[AnnData], key: str) -> dict:
    """Return the provenance of the features at ``key``, which must be the same in all tables."""
    found = []
    for table in tables:
        width = features(table, key).shape[1]
        stored = table.uns.get(key, {})
        known = {name: stored[name] for name in ENCODER if name in stored} if isinstance(stored, Mapping) else {}
        found.append(
            {"key": key, "id": key, "sha256": ""} | {k: _plain(v) for k, v in known.items()} | {"n_features": width}
        )
    for one in found[1:]:
        if one != found[0]:
            raise ValueError(f"obsm[{key!r}] of the slides was made by different encoders: {found[0]} and {one}.")
    return found[0]


def check_encoder(table: AnnData, key: str, expected: dict) -> None:
    """Refuse features that another encoder made than the one a model was trained with."""
    if key not in table.obsm:
        raise KeyError(
            f"obsm has no {key!r}; it has {_listing(table.obsm)}. The model was trained on features of encoder "
            f"{expected['id']!r} ({expected['n_features']} columns). Run sf.pp.encode_patches(data, "
            f"encoder={expected['id']!r}) first, or give features_key=..."
        )
    found = same_encoder([table], key)
    for name in ("n_features", "id", "sha256", "mpp", "patch_um", "standardize"):
        known = name in found and name in expected and (name != "id" or key in table.uns)
        if known and found[name] != expected[name]:
            raise ValueError(
                f"obsm[{key!r}] was made with {name} {found[name]!r}, but the model was trained with {name} "
                f"{expected[name]!r} (encoder {expected['id']!r}). Run sf.pp.encode_patches(data, "
                f"encoder={expected['id']!r}) with the settings of the training slides."
            )


def shared_genes(tables: list[AnnData]) -> list[str]:
    """Genes that every table measures, in the order of the first."""
    others = [set(table.var_names) for table in tables[1:]]
    names = [name for name in tables[0].var_names if all(name in other for other in others)]
    if not names:
        raise ValueError("the slides share no gene (var_names); are the identifiers of one kind?")
    return names


def library_sizes(table: AnnData, layer: str | None = None) -> np.ndarray:
    """Total counts of every row over all genes of the table, float64."""
    values, _ = counts(table, None, layer)
    total = np.asarray(values.sum(1), dtype=np.float64).ravel()
    if (total == 0).any():
        warnings.warn(f"{int((total == 0).sum())} rows have no counts at all.", UserWarning, stacklevel=3)
    return total


def dense(values) -> np.ndarray:
    """Return counts as a float64 array."""
    return np.ascontiguousarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)


def morphology(table: AnnData, key: str) -> pd.DataFrame:
    """Return the DataFrame of morphology at ``obsm[key]``."""
    if not isinstance(table.obsm.get(key), pd.DataFrame):
        raise KeyError(
            f"obsm has no DataFrame {key!r}; it has {_listing(table.obsm)}. Run sf.pp.morphology_profile(data) first."
        )
    return table.obsm[key]


def groups(table: AnnData, groupby: str) -> pd.Series:
    """Return ``obs[groupby]`` as a categorical of at most 50 groups; those without rows are left out."""
    if groupby not in table.obs:
        raise KeyError(f"obs has no {groupby!r}; it has {_listing(table.obs.columns)}.")
    column = table.obs[groupby]
    if column.nunique() > 50:
        raise ValueError(
            f"obs[{groupby!r}] has {column.nunique()} distinct values; groupby= needs a column of at most 50 groups."
        )
    return column.astype("category").cat.remove_unused_categories()


def slot_as_anndata(table: AnnData, key: str) -> AnnData:
    """Return ``obsm[key]`` with the names in ``uns[key]["genes"]`` as an AnnData of its own."""
    names = table.uns[key].get("genes") if isinstance(table.uns.get(key), Mapping) else None
    if key not in table.obsm or names is None:
        raise KeyError(
            f"no result {key!r}: it needs obsm[{key!r}] and uns[{key!r}]['genes']; obsm has {_listing(table.obsm)}. "
            "Run sf.tl.predict_expression(data, model=...) first."
        )
    var = pd.DataFrame(index=pd.Index([str(name) for name in names]))
    for name in ("skill", "trusted", "reliability"):
        if name in table.uns[key]:
            var[name] = np.asarray(table.uns[key][name])
    out = AnnData(np.asarray(table.obsm[key]), obs=table.obs.copy(), var=var)
    if f"{key}_std" in table.obsm:
        out.layers["std"] = np.asarray(table.obsm[f"{key}_std"])
    if "spatial" in table.obsm:
        out.obsm["spatial"] = np.asarray(table.obsm["spatial"])
    for name in ("spatial", "spatialdata_attrs"):
        if name in table.uns:
            out.uns[name] = table.uns[name]
    return out


def counts(table: AnnData, genes: list[str] | None = None, layer: str | None = None, rows: np.ndarray | None = None):
    """Return raw counts (n_obs x n_genes; CSR or array) of ``genes``, checked to be non-negative integers, with names."""
    if not table.var_names.is_unique:
        duplicated = table.var_names[table.var_names.duplicated()][0]
        raise ValueError(f"var_names are not unique (e.g. {duplicated!r}); call .var_names_make_unique() first.")
    if layer is not None and layer not in table.layers:
        raise KeyError(f"layers has no {layer!r}; it has {_listing(table.layers)}.")
    where = "X" if layer is None else f"layers[{layer!r}]"
    if genes is not None:
        missing = [gene for gene in genes if gene not in table.var_names]
        if missing:
            raise KeyError(
                f"{len(missing)} of {len(genes)} genes are not in var_names (first: {_listing(missing[:3])})."
            )
    chosen = table if genes is None else table[:, list(genes)]
    chosen = chosen if rows is None or len(rows) == table.n_obs else chosen[rows]
    values = chosen.X if layer is None else chosen.layers[layer]
    if values is None:
        raise ValueError(f"{where} is empty; raw counts are needed.")
    if table.isbacked or not (sparse.issparse(values) or isinstance(values, np.ndarray)):
        values = chosen.to_memory()
        values = values.X if layer is None else values.layers[layer]
    values = sparse.csr_matrix(values) if sparse.issparse(values) else np.asarray(values)
    flat = values.data if sparse.issparse(values) else values
    if not np.isfinite(flat).all():
        raise ValueError(f"{where} has NaN or infinite values; raw counts are needed.")
    if flat.size and flat.min() < 0:
        raise ValueError(
            f"{where} has negative values (minimum {flat.min():g}); raw counts are needed, e.g. layer='counts'."
        )
    if flat.size and (flat != np.round(flat)).any():
        raise ValueError(f"{where} is not integer; raw counts are needed. If they are in a layer, give layer='counts'.")
    return values, list(chosen.var_names)


def write(
    table: AnnData,
    key: str,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    obs: dict[str, np.ndarray] | None = None,
    uns: dict | None = None,
) -> None:
    """Write ``obsm[key + suffix]``, ``obs[key + suffix]`` and ``uns[key]`` together."""
    for suffix, values in (arrays or {}).items():
        table.obsm[f"{key}{suffix}"] = values
    for suffix, values in (obs or {}).items():
        table.obs[f"{key}{suffix}"] = pd.Series(values, index=table.obs_names)
    if uns is not None:
        table.uns[key] = storable(uns)
    logger.info("wrote %s", ", ".join(_written(key, arrays, obs, uns)))


def _written(key, arrays, obs, uns):
    yield from (f"obsm[{key + suffix!r}]" for suffix in arrays or {})
    yield from (f"obs[{key + suffix!r}]" for suffix in obs or {})
    if uns is not None:
        yield f"uns[{key!r}]"


def storable(value):
    """Return ``value`` as what h5ad and Zarr keep: dict, str, int, float, bool, list of str, array. None becomes ""."""
    if isinstance(value, dict):
        return {str(name): storable(item) for name, item in value.items()}
    if value is None:
        return ""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list | tuple):
        if all(isinstance(item, str) for item in value):
            return np.asarray(value, dtype=object) if len(value) else np.asarray([], dtype=str)
        return np.asarray(value)
    return str(value)


def log_expression(table: AnnData, genes: list[str], layer: str | None, target_sum: float | None) -> np.ndarray:
    """Return measured log1p expression (n_obs x genes) of counts per ``target_sum`` of each row's whole library."""
    values = dense(counts(table, genes, layer)[0])
    if target_sum is None:
        return np.log1p(values)
    return np.log1p(values * (target_sum / np.maximum(library_sizes(table, layer), 1))[:, None])


def target_sum(table: AnnData, key: str) -> float | None:
    """Return what the values in ``obsm[key]`` are counts per; None for raw counts."""
    value = table.uns[key].get("normalization", {}).get("target_sum", 1e4)
    return None if value == "raw" else float(value)


def background(table: AnnData, slide: Slide) -> tuple[np.ndarray, float] | None:
    """Return the small image of an AnnData's slide and its µm per pixel, where there is one."""
    library = table.uns.get("spatial", {}).get(slide.library_id, {})
    image = library.get("images", {}).get("hires")
    if image is None:
        return None
    return np.asarray(image), slide.mpp / float(library["scalefactors"]["tissue_hires_scalef"])


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _listing(names) -> str:
    names = [repr(str(name)) for name in names]
    return (", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")) or "nothing"
