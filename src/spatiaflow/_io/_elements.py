"""Elements of a SpatialData: their levels, their transformations, and where their instances lie."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
from geopandas import GeoDataFrame


def image_scales(element: Any, name: str = "") -> list:
    """Return the levels of an image or of labels, the finest first; refuse a stack of planes."""
    levels = [element]
    if hasattr(element, "children"):
        levels = [next(iter(child.ds.data_vars.values())) for child in element.children.values()]
    if "z" in levels[0].dims:
        raise ValueError(
            f"element {name or levels[0].name!r} has the axes {', '.join(map(str, levels[0].dims))}; two dimensions are "
            "needed. Choose a plane, or the maximum over z, as a new element: "
            "sdata['flat'] = Image2DModel.parse(sdata[...].max('z')), Labels2DModel for labels."
        )
    return levels


def copied(element: Any) -> Any:
    """Return a copy that can be written into, transformations included. Pixels and points that are lazy stay lazy."""
    if hasattr(element, "dims") or hasattr(element, "children"):  # an image or labels
        return element.copy(deep=True)
    out = element.copy()
    if hasattr(out, "attrs"):
        out.attrs.update(deepcopy(dict(element.attrs)))
    return out


def centroids_of(element: Any, name: str, system: str) -> pd.DataFrame:
    """Return x and y of every instance of an element, in a coordinate system; labels are read chunk by chunk."""
    if isinstance(element, GeoDataFrame):  # an empty polygon has none
        found = (
            element.geometry.centroid.get_coordinates().reindex(element.index) if element.index.is_unique else element
        )
    elif hasattr(element, "divisions"):
        found = element[["x", "y"]].compute()
    else:
        element = image_scales(element, name)[0]
        found = _label_centroids(element.data)
    if not found.index.is_unique:
        raise ValueError(
            f"the index of {name!r} is not unique (first: {found.index[found.index.duplicated()][0]!r} comes again); every "
            f"instance needs a name of its own: sdata[{name!r}].index = ..., and the same in the table's instance_key."
        )
    matrix = affine_of(element, system)
    return pd.DataFrame(found @ matrix[:2, :2].T + matrix[:2, 2], found.index).set_axis(["x", "y"], axis=1)


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


def affine_of(element: Any, system: str | None) -> np.ndarray:
    """3 x 3, from an element's own x and y to the coordinate system."""
    from spatialdata.transformations import get_transformation

    return get_transformation(element, to_coordinate_system=system).to_affine_matrix(("x", "y"), ("x", "y"))


def areas_of(element: Any, instances: pd.Series, system: str | None) -> np.ndarray | None:
    """Return the area of instances in squared units of a coordinate system; None for points and labels."""
    if not isinstance(element, GeoDataFrame) or not instances.isin(element.index).all():
        return None
    shapes = element.loc[instances]
    own = np.pi * shapes["radius"] ** 2 if "radius" in shapes else shapes.geometry.area
    return own.to_numpy(np.float64) * abs(np.linalg.det(affine_of(element, system)[:2, :2]))


def instances_of(element: Any, name: str) -> pd.Index:
    """Return the instances of an element as a table may name them: of shapes with ``cell_id`` the cells."""
    if isinstance(element, GeoDataFrame):
        return pd.Index(element["cell_id"]).unique() if "cell_id" in element else element.index
    if hasattr(element, "divisions"):
        return pd.Index(element.index.compute())
    return _label_centroids(image_scales(element, name)[0].data).index


def known_instances(instances: pd.Series, known: pd.Index) -> pd.Series:
    """Return the instances of rows as an element that the table does not annotate knows them: as they are, or by obs_names."""
    by_name = instances.index.to_series()
    return by_name if not instances.isin(known).all() and by_name.isin(known).all() else instances
