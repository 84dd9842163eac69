"""Results in formats that viewers open: GeoJSON for QuPath, SpatialData for napari-spatialdata and Vitessce."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from spatiaflow import _files, _io
from spatiaflow._process import verb
from spatiaflow.models.slide import square_corners

if TYPE_CHECKING:
    from spatialdata import SpatialData


@verb
def geojson(
    data: AnnData,
    *,
    path: str | Path,
    genes: str | Sequence[str],
    key: str = "stflow",
    library_key: str | None = None,
    library_id: str | None = None,
) -> Path:
    """Write a result as GeoJSON: a square for every spot or square of a grid, with its values as measurements.

    QuPath reads the file by "File, Import objects", and draws it by "Measure, Show measurement maps".

    Parameters
    ----------
    data
        AnnData with the result of a function such as :func:`spatiaflow.tl.predict_expression`.
    path
        File to write, ``.geojson``.
    genes
        One gene or several.
    key
        Slot of the result.
    library_key, library_id
        Column of ``.obs`` that tells slides apart, and the slide to write (the first when None).

    Returns
    -------
    The path. Corners are in pixels of the full-resolution image. ``properties`` of a square holds its ``name``, with
    ``.obs["annotation"]`` its ``classification``, and ``measurements``: each gene, ``"<gene> std"``, ``"tissue"``
    and ``"ood"``, as far as they are known.

    Raises
    ------
    KeyError
        The slot, a gene or the slide is missing.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> path = sf.get.geojson(adata, path="expression.geojson", genes="STATE1")
    """
    result = _io.slot_as_anndata(data, key)
    names = _io.names(genes, "genes") or []
    if missing := [gene for gene in names if gene not in result.var_names]:
        raise KeyError(f"uns[{key!r}]['genes'] has no {missing[0]!r}; it has {_io.listing(result.var_names)}.")
    slide = _io.one_slide(_io.places(data, _io.Where(library_key=library_key)), library_id)
    part = result[slide.rows, names]
    columns = {gene: part.X[:, i] for i, gene in enumerate(names)}
    if "std" in part.layers:
        columns |= {f"{gene} std": part.layers["std"][:, i] for i, gene in enumerate(names)}
    for name, column in (("tissue", "tissue"), ("ood", f"{key}_ood")):
        if column in data.obs:
            columns[name] = data.obs[column].to_numpy(float)[slide.rows]
    groups = data.obs["annotation"].iloc[slide.rows] if "annotation" in data.obs else None
    corners = (_corners(data, slide) / slide.mpp + 0.5).round(2)
    features = []
    for i, name in enumerate(slide.obs_names):
        properties: dict = {"objectType": "tile", "name": str(name)}
        if groups is not None and pd.notna(groups.iloc[i]):
            properties["classification"] = {"name": str(groups.iloc[i])}
        values = {column: round(float(value[i]), 5) for column, value in columns.items() if np.isfinite(value[i])}
        ring = corners[i][[0, 1, 2, 3, 0]].tolist()
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties | {"measurements": values}})
    text = json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)
    with _files.atomic(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


@verb
def spatialdata(data: AnnData, *, key: str = "stflow", library_key: str | None = None) -> SpatialData:
    """Return a result as a SpatialData: the picture, a square for every spot, and the table that annotates the squares.

    Parameters
    ----------
    data
        AnnData with the result of a function such as :func:`spatiaflow.tl.predict_expression`.
    key
        Slot of the result.
    library_key
        Column of ``.obs`` that tells slides apart.

    Returns
    -------
    SpatialData, with a coordinate system for every slide, in pixels of its full-resolution image:

    ``images[f"{slide}_image"]`` : the small copy of the picture, where there is one
    ``shapes[f"{slide}_squares"]`` : squares
    ``tables["table"]`` : what :func:`spatiaflow.get.expression` returns
    ``attrs["microns_per_unit"]`` : the scale of every coordinate system

    Raises
    ------
    KeyError
        The slot is missing.
    ValueError
        The name of a slide cannot be the name of an element.

    Examples
    --------
    >>> sdata = sf.get.spatialdata(adata)
    >>> list(sdata.shapes)
    ['nuclei_squares']
    """
    import geopandas
    import shapely
    import spatialdata as sd
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity

    table = _io.slot_as_anndata(data, key)
    slides = _io.places(data, _io.Where(library_key=library_key))
    images, shapes, region = {}, {}, np.full(table.n_obs, None, object)
    for slide in slides:
        _io.element_name(slide.name, "the name of a slide")
        name = f"{slide.name}_squares"
        polygons = shapely.polygons(_corners(data, slide) / slide.mpp + 0.5)
        frame = geopandas.GeoDataFrame(geometry=polygons, index=table.obs_names[slide.rows])
        shapes[name] = ShapesModel.parse(frame, transformations={slide.name: Identity()})
        region[slide.rows] = name
        if (found := _io.background(data, data, slide)) is not None:
            picture, scale, (left, top) = found
            pixels = scale / slide.mpp
            matrix = np.array([[pixels, 0, left / slide.mpp], [0, pixels, top / slide.mpp], [0, 0, 1.0]])
            to_slide = Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))
            images[f"{slide.name}_image"] = Image2DModel.parse(
                np.moveaxis(picture[..., :3], 2, 0), dims=("c", "y", "x"), c_coords=["r", "g", "b"],
                transformations={slide.name: to_slide},
            )  # fmt: skip
    table = table[pd.notna(region)].copy()
    table.uns.pop("spatialdata_attrs", None)
    table.obs["region"] = pd.Categorical(region[pd.notna(region)])
    table.obs["instance"] = table.obs_names.to_numpy()
    parsed = TableModel.parse(table, region=list(shapes), region_key="region", instance_key="instance")
    scales = {slide.name: slide.mpp for slide in slides}
    return sd.SpatialData(images=images, shapes=shapes, tables={"table": parsed}, attrs={"microns_per_unit": scales})


def _corners(data: AnnData, slide) -> np.ndarray:
    """Corners of the square of each spot, n x 4 x 2, µm: of a grid its own, else as wide as spots are apart."""
    step = _io.entry(data, "grid").get("step_um") or slide.pitch
    return square_corners(slide.xy, float(step))
