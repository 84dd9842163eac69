"""Grids on a picture: which squares there are, the small copy, and regions of annotations."""

import json

import numpy as np
import pytest

from spatiaflow._slides.grid import annotation_of, shrunk, squares


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_shrunk_copy_is_the_mean_of_squares(monkeypatch, channels_first):
    monkeypatch.setattr("spatiaflow._slides.grid.BLOCK", 64)
    image = np.random.default_rng(0).integers(0, 255, (203, 305, 4), dtype=np.uint8)
    given = image.transpose(2, 0, 1) if channels_first else image
    found, factor = shrunk(given, 80, channels_first=channels_first)
    assert factor == 4
    right = image[:200, :304, :3].reshape(50, 4, 76, 4, 3).mean((1, 3))
    np.testing.assert_allclose(found, right, atol=0.51)


def test_squares_cover_the_picture():
    assert len(squares((100, 250), 50)) == 10
    assert len(squares((10, 10), 50)) == 1
    assert squares((100, 250), 50).max(0).tolist() == [4, 1]


def region(name, low, high):
    corners = [[low, low], [high, low], [high, high], [low, high], [low, low]]
    geometry = {"type": "Polygon", "coordinates": [corners]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def test_a_point_belongs_to_the_smallest_region_around_it(tmp_path):
    path = tmp_path / "regions.geojson"
    regions = [region("inner", 40, 60), region("outer", 0, 100)]
    for order in (regions, regions[::-1]):
        path.write_text(json.dumps({"type": "FeatureCollection", "features": order}))
        found = annotation_of(path, np.array([[50.0, 50], [10, 10], [200, 50]]))
        assert found.tolist() == ["inner", "outer", None]
    with pytest.raises(ValueError, match="span x 0 to 100 and y 0 to 100, squares x 200 to 200"):
        annotation_of(path, np.array([[200.0, 50]]))
