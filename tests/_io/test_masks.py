"""Masks of cells from polygons and labels, against a test of every pixel's centre."""

import anndata as ad
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine

from spatiaflow import _io
from spatiaflow._io._masks import PolygonMasks

SIZE = 60, 80  # y, x of the image
C, S = 0.5 * np.cos(0.6), 0.5 * np.sin(0.6)


def affine(matrix):
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


TURNED = np.array([[C, -S, 20.0], [S, C, 4.0], [0, 0, 1]])  # from pixels of the image to µm: turned, half a µm a pixel
SWAPPED = np.array([[0, 0.3, 12.0], [0.3, 0, 2.0], [0, 0, 1]])  # from pixels of the labels to µm: x and y swapped
SHAPES = [
    shapely.Point(30, 20).buffer(5),
    shapely.Point(22, 27).buffer(4).difference(shapely.Point(22, 27).buffer(2)),  # a ring
    shapely.Polygon([(34, 24), (40, 32), (40, 24), (34, 32)]),  # crosses itself
]


def carried(xy, matrix):
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def centres():
    """Middles of all pixels of the image, in µm."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    return carried(np.stack([x.ravel(), y.ravel()], 1), TURNED)


def masks_of(element, ids, order, name="cells", **more):
    """Masks of a table whose rows annotate ``element`` in some order, each put into a whole picture."""
    image = Image2DModel.parse(
        np.zeros((1, *SIZE), np.uint8), dims=("c", "y", "x"), transformations={"um": affine(TURNED)}
    )
    table = ad.AnnData(np.ones((len(order), 1), np.float32), obs=pd.DataFrame(index=[f"row{i}" for i in order]))
    table.obs["region"], table.obs["id"] = pd.Categorical([name] * len(order)), np.asarray(ids)[order]
    table = TableModel.parse(table, region=name, region_key="region", instance_key="id")
    data = sd.SpatialData.init_from_elements({"image": image, name: element, **more, "table": table})
    data.attrs["microns_per_unit"] = {"um": 1.0}
    where = _io.Where(shapes_key=next(iter(more), None))
    (slide,) = _io.places(data, where)
    found = _io.masks(data, table, slide, _io.slide_image(data, slide))
    whole = np.zeros((len(order), *SIZE), bool)
    for one, mask, (x0, y0) in zip(whole, found.inside(np.arange(len(order)), found.bounds), found.bounds[:, :2]):
        y, x = np.nonzero(mask)
        here = (y + y0 >= 0) & (y + y0 < SIZE[0]) & (x + x0 >= 0) & (x + x0 < SIZE[1])
        one[y[here] + y0, x[here] + x0] = True
    return whole


def frame_of(geometry, **columns):
    index = [f"c{i}" for i in range(len(geometry))]
    return ShapesModel.parse(
        gpd.GeoDataFrame(columns, geometry=geometry, index=index), transformations={"um": affine(np.eye(3))}
    )


def by_pixel(shapes):
    """Whether the middle of each pixel lies in each shape."""
    return np.array([[shape.contains(shapely.Point(*xy)) for xy in centres()] for shape in shapes]).reshape(-1, *SIZE)


def test_pixels_of_polygons_are_those_whose_middle_they_contain():
    order = [2, 0, 1]
    expected = by_pixel([*SHAPES[:2], shapely.make_valid(SHAPES[2])])
    assert (expected.sum((1, 2)) > 50).all()
    np.testing.assert_array_equal(masks_of(frame_of(SHAPES), ["c0", "c1", "c2"], order), expected[order])


def test_a_circle_is_a_polygon_of_its_radius():
    points = frame_of([shapely.Point(30, 20), shapely.Point(24, 22)], radius=[5.0, 2.5])
    found = masks_of(points, ["c0", "c1"], [0, 1])
    np.testing.assert_allclose(found.sum((1, 2)) / 4, np.pi * np.array([25, 6.25]), rtol=0.05)
    middle = [centres()[mask.ravel()].mean(0) for mask in found]
    np.testing.assert_allclose(middle, [[30, 20], [24, 22]], atol=0.2)


def test_several_nuclei_of_a_cell_are_one_mask():
    nuclei = frame_of([shapely.Point(*xy).buffer(2) for xy in ((28, 20), (34, 20), (22, 27))], cell_id=["b", "b", "a"])
    cells = ShapesModel.parse(
        gpd.GeoDataFrame(geometry=[shapely.Point(22, 27).buffer(4), shapely.Point(30, 20).buffer(7)], index=["a", "b"]),
        transformations={"um": affine(np.eye(3))},
    )
    first, other, alone = by_pixel(nuclei.geometry)
    found = masks_of(cells, ["a", "b"], [1, 0], nuclei=nuclei)
    np.testing.assert_array_equal(found, [first | other, alone])


@pytest.mark.parametrize("chunks", [100, 23])
def test_pixels_of_labels_are_those_whose_middle_lies_in_the_label(chunks):
    """On a grid of their own, that ends inside the image."""
    y, x = np.mgrid[:90, :100] + 0.5
    um = carried(np.stack([x.ravel(), y.ravel()], 1), SWAPPED)
    labels = np.zeros((90, 100), np.int32)
    ids = [5, 4_000_000, 2]
    for one, shape in zip(ids, (SHAPES[0], shapely.Point(36, 30).buffer(3), SHAPES[1])):
        labels[shapely.contains_xy(shape, *um.T).reshape(labels.shape)] = one
    element = Labels2DModel.parse(
        da.from_array(labels, chunks=chunks), dims=("y", "x"), transformations={"um": affine(SWAPPED)}
    )
    expected = np.zeros((3, len(centres())), bool)
    for i, xy in enumerate(carried(centres(), np.linalg.inv(SWAPPED))):
        column, row = np.floor(xy).astype(int)
        if 0 <= row < 90 and 0 <= column < 100:
            expected[:, i] = [labels[row, column] == one for one in ids]
    order = [1, 2, 0]
    found = masks_of(element, ids, order)
    np.testing.assert_array_equal(found, expected.reshape(3, *SIZE)[order])
    assert found.any((1, 2)).all()


def test_a_polygon_without_area_covers_nothing():
    line = shapely.Polygon([(3, 3), (5, 3), (7, 3)])
    found = PolygonMasks(np.array([shapely.box(1, 2, 4, 3.5), line, shapely.Polygon()]), np.eye(3))
    np.testing.assert_array_equal(found.bounds, [[1, 2, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
