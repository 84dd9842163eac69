"""Which pixels of an image belong to which cell, from polygons, circles or labels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData
from scipy import ndimage
from spatialdata import SpatialData

from spatiaflow._io._elements import affine_of, image_scales, known_instances
from spatiaflow._io._images import SlideImage
from spatiaflow._io._reader import open_image, parts
from spatiaflow.models.slide import Slide


def masks(sdata: SpatialData, table: AnnData, slide: Slide, image: SlideImage) -> PolygonMasks | LabelMasks:
    """Return the masks of a slide's cells, in the order of ``slide.rows``, in pixels of the image."""
    attrs = table.uns["spatialdata_attrs"]
    instances = table.obs[attrs["instance_key"]].iloc[slide.rows]
    element = sdata[slide.element]
    annotated = (table.obs[attrs["region_key"]].astype(str) == slide.element).any()
    if slide.element not in sdata.shapes:
        return LabelMasks(element, instances.to_numpy(), slide, image)
    if not annotated:
        if "cell_id" in element:  # a cell may have several nuclei
            element = (
                element.dissolve("cell_id") if element["cell_id"].duplicated().any() else element.set_index("cell_id")
            )
        instances = known_instances(instances, element.index)
    shapes = element.loc[instances]
    geometry = shapes.geometry.to_numpy()
    if "radius" in shapes:
        geometry = shapely.buffer(geometry, shapes["radius"].to_numpy())
    return PolygonMasks(
        geometry, np.linalg.inv(image.affine) @ affine_of(sdata[slide.element], slide.coordinate_system)
    )


class PolygonMasks:
    """Pixels whose centre lies inside a polygon. Polygons that cross themselves are repaired."""

    def __init__(self, geometry: np.ndarray, to_pixels: np.ndarray):
        flat = shapely.force_2d(geometry)
        self.polygons = shapely.make_valid(shapely.transform(flat, lambda xy: _apply(to_pixels, xy)))

    @cached_property
    def bounds(self) -> np.ndarray:
        """Pixels that a cell may cover: n x 4 int, x0, y0, x1, y1; all 0 for a polygon without area."""
        box = shapely.bounds(self.polygons)
        box[~(shapely.area(self.polygons) > 0)] = 0
        return np.column_stack([np.floor(box[:, :2]), np.ceil(box[:, 2:])]).astype(int)

    def inside(self, rows: np.ndarray, windows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the mask (y, x) of each cell within its window (n x 4, as ``bounds``)."""
        for polygon, (x0, y0, x1, y1) in zip(self.polygons[rows], windows):
            shapely.prepare(polygon)
            yield shapely.contains_xy(polygon, *np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5))
            shapely.destroy_prepared(polygon)


class LabelMasks:
    """Pixels whose centre lies in a pixel of the cell's label; labels may have another grid than the image."""

    def __init__(self, element: Any, instances: np.ndarray, slide: Slide, image: SlideImage):
        levels = [(level, affine_of(level, slide.coordinate_system)) for level in image_scales(element)]
        wanted = np.linalg.det(image.affine[:2, :2])
        level, affine = min(levels, key=lambda found: abs(np.log(abs(np.linalg.det(found[1][:2, :2]) / wanted))))
        self.labels, _, _ = open_image(level.data, True)
        self.instances = instances
        self.to_labels = np.linalg.inv(affine) @ image.affine

    @cached_property
    def bounds(self) -> np.ndarray:
        """Pixels that a cell may cover: n x 4 int, x0, y0, x1, y1; all 0 for a label without pixels. Reads all labels."""
        box = _extents(self.labels, self.instances)
        there = box[:, 2] > 0
        corners = np.stack([box[:, [i, j]] for i in (0, 2) for j in (1, 3)])  # 4 x n x 2
        corners = _apply(np.linalg.inv(self.to_labels), corners.reshape(-1, 2)).reshape(corners.shape)
        out = np.column_stack([np.floor(corners.min(0) + 1e-6), np.ceil(corners.max(0) - 1e-6)])
        return np.where(there[:, None], out, 0).astype(int)

    def inside(self, rows: np.ndarray, windows: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the mask (y, x) of each cell within its window (n x 4, as ``bounds``); one read for all of them."""
        size = np.array(self.labels.shape[:0:-1])  # x, y
        around = np.concatenate([windows[:, :2].min(0), windows[:, 2:].max(0)])
        corners = _apply(self.to_labels, np.array([[x, y] for x in around[::2] for y in around[1::2]], float))
        low = np.clip(np.floor(corners.min(0)).astype(int), 0, size)
        high = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, size)
        if (low >= high).any():  # the image goes on where there are no labels
            yield from (np.zeros((y1 - y0, x1 - x0), bool) for x0, y0, x1, y1 in windows)
            return
        block = np.asarray(self.labels[:, low[1] : high[1], low[0] : high[0]])[0]
        for instance, (x0, y0, x1, y1) in zip(self.instances[rows], windows):
            centres = np.stack(np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5), -1)
            at = np.floor(_apply(self.to_labels, centres) + 1e-9).astype(int) - low
            known = ((at >= 0) & (at < high - low)).all(-1)
            at = np.where(known[..., None], at, 0)
            yield known & (block[at[..., 1], at[..., 0]] == instance)


def _extents(labels: Any, instances: np.ndarray) -> np.ndarray:
    """Bounding box (n x 4: x0, y0, x1, y1) of each instance in pixels of the labels, read chunk by chunk; 0 if absent."""
    wanted, back = np.unique(instances, return_inverse=True)
    index = pd.Index(wanted)
    low, high = np.full((len(wanted), 2), np.iinfo(int).max), np.zeros((len(wanted), 2), int)
    for x0, y0, (block,) in parts(labels):
        codes, names = pd.factorize(block.ravel())
        rows = index.get_indexer(names)
        for row, (y, x) in zip(rows, ndimage.find_objects(codes.reshape(block.shape) + 1)):
            if row >= 0:
                low[row] = np.minimum(low[row], (x.start + x0, y.start + y0))
                high[row] = np.maximum(high[row], (x.stop + x0, y.stop + y0))
    return np.where(high[:, :1] > 0, np.column_stack([low, high]), 0)[back]


def _apply(affine: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Points (n x 2) under an affine map (3 x 3)."""
    return xy @ affine[:2, :2].T + affine[:2, 2]
