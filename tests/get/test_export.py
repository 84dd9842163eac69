"""Files and objects that viewers open: equal when read again."""

import json
import warnings

import numpy as np
import pytest
import shapely
import spatialdata as sd
import spatialdata_plot  # noqa: F401
from matplotlib import pyplot as plt

import spatiaflow as sf


@pytest.fixture(scope="module")
def predicted(slide, model):
    """A slide with predictions, annotated; do not write into it."""
    out = slide("s7", seed=7)
    sf.tl.predict_expression(out, model=model)
    out.obs["tissue"] = np.float32(0.5)
    out.obs["annotation"] = np.where(np.arange(len(out)) % 3 > 0, "tumour", None)
    return out


def test_geojson_holds_places_and_values(predicted, tmp_path):
    path = sf.get.geojson(predicted, path=tmp_path / "a.geojson", genes=["G3", "G0"])
    found = json.loads(path.read_text(encoding="utf-8"))["features"]
    assert [one["properties"]["name"] for one in found] == list(predicted.obs_names)
    squares = [shapely.from_geojson(json.dumps(one["geometry"])) for one in found]
    centres = np.array([(one.centroid.x, one.centroid.y) for one in squares])
    np.testing.assert_allclose(centres, predicted.obsm["spatial"] + 0.5, atol=0.02)
    assert np.sqrt(squares[0].area) * 0.5 == pytest.approx(200, rel=0.1)  # µm, as far as spots are apart
    result = sf.get.expression(predicted)
    for gene in ("G3", "G0"):
        values = [one["properties"]["measurements"][gene] for one in found]
        np.testing.assert_allclose(values, result[:, gene].X.ravel(), atol=1e-4)
        values = [one["properties"]["measurements"][f"{gene} std"] for one in found]
        np.testing.assert_allclose(values, result[:, gene].layers["std"].ravel(), atol=1e-4)
    assert set(found[0]["properties"]["measurements"]) == {"G3", "G0", "G3 std", "G0 std", "tissue", "ood"}
    assert "classification" not in found[0]["properties"]
    assert found[1]["properties"]["classification"] == {"name": "tumour"}


def test_geojson_is_read_as_annotations_again(predicted, tmp_path):
    """Squares of a grid are regions of the same picture."""
    pixels = np.full((200, 200, 3), [190, 110, 170], np.uint8)
    pixels[:10] = pixels[:, :10] = 235
    grid = sf.pp.grid(pixels, mpp=1.0, step_um=20)
    grid.obsm["stflow"] = np.ones((len(grid), 1), np.float32)
    grid.uns["stflow"] = {"genes": ["A"]}
    grid.obs["annotation"] = [f"row {int(y)}" for y in grid.obsm["spatial"][:, 1]]
    path = sf.get.geojson(grid, path=tmp_path / "a.geojson", genes="A")
    again = sf.pp.grid(pixels, mpp=1.0, step_um=20, region=path)
    assert list(again.obs["annotation"]) == list(grid.obs["annotation"])


def test_what_cannot_be_exported(predicted, tmp_path):
    with pytest.raises(KeyError, match="has no 'nope'; it has 'G"):
        sf.get.geojson(predicted, path=tmp_path / "a.geojson", genes="nope")
    pixels = np.full((60, 60, 3), [190, 110, 170], np.uint8)
    with pytest.raises(KeyError, match=r"no result 'stflow'.*predict_expression"):
        sf.get.spatialdata(sf.pp.grid(pixels, mpp=1.0, step_um=20))
    assert not list(tmp_path.iterdir())


def test_spatialdata_is_written_read_and_drawn(predicted, tmp_path):
    sdata = sf.get.spatialdata(predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdata.write(tmp_path / "s.zarr")
        again = sd.read_zarr(tmp_path / "s.zarr")
        again.pl.render_images("s7_image").pl.render_shapes("s7_squares", color="G0").pl.show(coordinate_systems="s7")
        plt.close("all")
    result = sf.get.expression(predicted)
    np.testing.assert_array_equal(again["table"].X, result.X)
    np.testing.assert_array_equal(again["table"].layers["std"], result.layers["std"])
    assert list(again["table"].obs_names) == list(result.obs_names)
    assert again.attrs["microns_per_unit"] == {"s7": 0.5}
    squares = again["s7_squares"].loc[again["table"].obs["instance"]]
    np.testing.assert_allclose(squares.centroid.get_coordinates(), predicted.obsm["spatial"] + 0.5)
    extent = sd.get_extent(again["s7_image"], coordinate_system="s7")
    picture = predicted.uns["spatial"]["s7"]["images"]["hires"]
    np.testing.assert_allclose(extent["x"][1], picture.shape[1] * 10)
