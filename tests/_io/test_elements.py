"""Centroids, areas and copies of the elements of a SpatialData."""

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from spatialdata import get_centroids
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel
from spatialdata.transformations import Affine, Identity, get_transformation, set_transformation

from spatiaflow._io import _elements

TURN = Affine([[0.1, -0.2, 5], [0.2, 0.1, -3], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))


@pytest.mark.parametrize("scale_factors", [None, [2]])
def test_centroids_of_labels_equal_those_of_spatialdata(scale_factors):
    rng = np.random.default_rng(0)
    pixels = rng.choice([0, 3, 500, 7_000_000], (700, 900), p=[0.4, 0.2, 0.3, 0.1]).astype(np.int32)
    labels = Labels2DModel.parse(
        da.from_array(pixels, chunks=300), dims=("y", "x"), transformations={"um": TURN}, scale_factors=scale_factors
    )
    expected = get_centroids(labels, coordinate_system="um").compute()
    found = _elements.centroids_of(labels, "labels", "um")
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found[["x", "y"]], expected[["x", "y"]])


def test_centroids_of_labels_do_not_depend_on_chunks():
    """A cell that lies in four chunks has one centroid."""
    centres = np.array([[20, 30], [100, 14], [66, 46], [150, 104], [40, 90]])  # x, y: where four pixels meet
    pixels = np.zeros((120, 168), np.uint32)
    for i, (x, y) in enumerate(centres):
        pixels[y - 6 : y + 6, x - 6 : x + 6] = i + 1
    for chunks in (pixels.shape, (29, 19)):
        labels = Labels2DModel.parse(pixels, dims=("y", "x"), chunks=chunks, transformations={"global": Identity()})
        found = _elements.centroids_of(labels, "labels", "global")
        assert list(found.index) == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(found, centres)


def outlines(polygons):
    frame = gpd.GeoDataFrame(geometry=polygons, index=[f"c{i}" for i in range(len(polygons))])
    return ShapesModel.parse(frame, transformations={"um": TURN})


POLYGONS = [shapely.box(0, 0, 4, 2), shapely.Polygon([(9, 9), (12, 9), (9, 15)]), shapely.box(5, 5, 6, 8)]


def test_areas_are_those_of_the_shapes_carried_into_the_coordinate_system():
    rows = pd.Series(["c2", "c0"])
    matrix = TURN.to_affine_matrix(("x", "y"), ("x", "y"))
    carried = shapely.transform(np.array(POLYGONS), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2])
    found = _elements.areas_of(outlines(POLYGONS), rows, "um")
    np.testing.assert_allclose(found, shapely.area(carried)[[2, 0]])
    circles = ShapesModel.parse(
        np.zeros((3, 2)),
        geometry=0,
        radius=np.array([1.0, 2, 3]),
        index=["c0", "c1", "c2"],
        transformations={"um": TURN},
    )
    np.testing.assert_allclose(_elements.areas_of(circles, rows, "um"), np.pi * np.array([9, 1]) * 0.05)
    assert _elements.areas_of(circles, pd.Series(["c0", "unknown"]), "um") is None
    labels = Labels2DModel.parse(np.ones((9, 9), np.uint8), dims=("y", "x"), transformations={"um": TURN})
    assert _elements.areas_of(labels, rows, "um") is None


def test_what_is_written_into_a_copy_stays_out_of_the_element():
    points = PointsModel.parse(pd.DataFrame({"x": [1.0, 2], "y": [3.0, 4]}), transformations={"um": TURN})
    image = Image2DModel.parse(np.zeros((3, 8, 8), np.uint8), dims=("c", "y", "x"), transformations={"um": TURN})
    for element in (outlines(POLYGONS), points, image):
        copy = _elements.copied(element)
        set_transformation(copy, Identity(), "um")
        assert get_transformation(copy, "um") == Identity() and get_transformation(element, "um") == TURN
    copy = _elements.copied(image)
    copy[:] = 7
    assert int(image.max()) == 0
    shapes = outlines(POLYGONS)
    _elements.copied(shapes)["cell_id"] = "a"
    assert "cell_id" not in shapes


def test_a_table_of_names_finds_its_instances_by_name():
    """Of an element that the table does not annotate: ids where they fit, else the names of the rows."""
    numbers, names = pd.Series([4, 5], index=["a", "b"]), pd.Index(["b", "a"])
    assert list(_elements.known_instances(numbers, pd.Index([5, 4]))) == [4, 5]
    assert list(_elements.known_instances(numbers, names)) == ["a", "b"]
    assert list(_elements.known_instances(numbers, pd.Index(["a"]))) == [4, 5]  # an error names what was asked for
    nuclei = outlines(POLYGONS).assign(cell_id=["x", "y", "x"])
    assert list(_elements.instances_of(nuclei, "nuclei")) == ["x", "y"]
    assert list(_elements.instances_of(outlines(POLYGONS), "cells")) == ["c0", "c1", "c2"]
