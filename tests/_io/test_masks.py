"""Centroids and masks of labels, read part by part."""

import dask.array as da
import numpy as np
import pytest
from spatialdata import get_centroids
from spatialdata.models import Labels2DModel
from spatialdata.transformations import Affine

from spatiaflow._io import _elements


@pytest.mark.parametrize("scale_factors", [None, [2]])
def test_centroids_of_labels_equal_those_of_spatialdata(scale_factors):
    rng = np.random.default_rng(0)
    pixels = rng.choice([0, 3, 500, 7_000_000], (700, 900), p=[0.4, 0.2, 0.3, 0.1]).astype(np.int32)
    turn = Affine([[0.1, -0.2, 5], [0.2, 0.1, -3], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    labels = Labels2DModel.parse(
        da.from_array(pixels, chunks=300), dims=("y", "x"), transformations={"um": turn}, scale_factors=scale_factors
    )
    expected = get_centroids(labels, coordinate_system="um").compute()
    found = _elements.centroids_of(labels, "labels", "um")
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found[["x", "y"]], expected[["x", "y"]])
