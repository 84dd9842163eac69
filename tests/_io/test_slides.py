"""Positions, and the slides that rows belong to."""

import anndata as ad
import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
from shapely import Point
from spatialdata import SpatialData, concatenate
from spatialdata.models import Labels3DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

from spatiaflow import _io
from spatiaflow._io import Where

RNG = np.random.default_rng(0)
XY = RNG.uniform(0, 90, (40, 2)) * [1, 0.5]


def table_of(positions, n=40, **options):
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    return ad.AnnData(np.ones((n, 2), np.float32), obs=obs, obsm={"spatial": positions}, **options)


@pytest.mark.parametrize(
    "columns",
    [("x", "y"), ("X", "Y"), ("x_centroid", "y_centroid"), ("pxl_col_in_fullres", "pxl_row_in_fullres"), (0, 1)],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_columns_of_positions_are_found_by_name(columns, turned):
    table = table_of(XY)
    frame = pd.DataFrame(XY, index=table.obs_names, columns=columns)
    if turned and columns != (0, 1):
        frame = frame[list(columns)[::-1]].assign(other=1)
    table.obsm["spatial"] = frame
    np.testing.assert_array_equal(_io.positions(table, "spatial"), XY)


def test_columns_of_positions_that_cannot_be_told():
    table = table_of(XY)
    frame = pd.DataFrame(XY, index=table.obs_names, columns=["a", "b"])
    for one in (frame, frame.assign(x=1, y=1, center_x=1, center_y=1)):
        table.obsm["spatial"] = one
        with pytest.raises(ValueError, match="which are x and y"):
            _io.places(table, Where(mpp=1.0))


def sample(name, system=None, n=40, ids=0, x=0.0):
    """One region of circles, numbered from ``ids``."""
    frame = gpd.GeoDataFrame(
        {"radius": np.full(n, 3.0)}, geometry=[Point(*p) for p in XY[:n] + x], index=np.arange(n) + ids
    )
    spots = ShapesModel.parse(frame, transformations={system or name: Identity()})
    obs = pd.DataFrame({"region": pd.Categorical([name] * n), "id": np.arange(n) + ids})
    obs.index = [f"{name}{i}" for i in range(n)]
    table = TableModel.parse(
        ad.AnnData(np.ones((n, 3), np.float32), obs=obs), region=name, region_key="region", instance_key="id"
    )
    return SpatialData(shapes={name: spots}, tables={"table": table})


def pair(**options):
    return concatenate([sample("s1", **options), sample("s2", **options | {"ids": 100})], concatenate_tables=True)


def test_samples_have_coordinate_systems_of_their_own():
    both = pair()
    first, second = _io.places(both, Where(mpp=2.0))
    assert (first.coordinate_system, second.coordinate_system) == ("s1", "s2")
    np.testing.assert_allclose(second.xy, 2 * XY)
    both.attrs["microns_per_unit"] = {"s1": 2.0, "s2": 3.0}
    assert [slide.mpp for slide in _io.places(both)] == [2.0, 3.0]
    assert {slide.coordinate_system for slide in _io.places(pair(system="global"), Where(mpp=1.0))} == {"global"}


def test_an_element_belongs_to_every_sample_or_the_error_says_to_which_not():
    both = pair(system="global")
    with pytest.raises(ValueError, match="'s1' belongs to 's1', not to 's2'"):
        _io.places(both, Where(shapes_key="s1", mpp=1.0))
    (only,) = _io.places(both, Where(shapes_key="s1", mpp=1.0), partial=True)
    assert only.name == "s1"
    assert only.rows.tolist() == list(range(40))
    both["nuclei"] = both["s2"]
    (only,) = _io.places(both, Where(shapes_key="nuclei", mpp=1.0), partial=True)
    assert only.rows.tolist() == list(range(40, 80))
    alike = concatenate([sample("s1", "global"), sample("s2", "global")], concatenate_tables=True)
    alike["nuclei"] = alike["s2"]
    with pytest.raises(ValueError, match="it cannot be told whose they are"):
        _io.places(alike, Where(shapes_key="nuclei", mpp=1.0), partial=True)


def test_an_index_of_points_that_starts_again():
    parts = [dd.from_pandas(pd.DataFrame(XY[i : i + 20], columns=["x", "y"]), npartitions=1) for i in (0, 20)]
    data = sample("P", n=20)
    del data.shapes["P"]
    data["P"] = PointsModel.parse(dd.concat(parts, interleave_partitions=True), transformations={"P": Identity()})
    with pytest.raises(ValueError, match="the index of 'P' is not unique"):
        _io.places(data, Where(mpp=1.0))


def test_a_stack_of_labels_is_refused():
    data = sample("L", n=2)
    del data.shapes["L"]
    data["L"] = Labels3DModel.parse(
        np.ones((4, 6, 6), np.uint8), dims=("z", "y", "x"), transformations={"L": Identity()}
    )
    with pytest.raises(ValueError, match="element 'L' has the axes z, y, x"):
        _io.places(data, Where(mpp=1.0))


def test_the_column_that_names_the_slides_is_found():
    spatial = {name: {"metadata": {"microns_per_pixel": 1.0}} for name in ("a", "b", "c")}
    table = table_of(XY, uns={"spatial": spatial})
    table.obs["where"] = pd.Categorical(np.repeat(["a", "b"], 20))
    assert [slide.name for slide in _io.places(table)] == ["a", "b"]
    del table.obs["where"]
    with pytest.raises(ValueError, match="give library_key="):
        _io.places(table)


def test_a_reference_is_asked_for_what_it_has():
    where = Where(table_key="mine", shapes_key="cells", library_key="sample")
    found = _io.where_in_reference(sample("s1"), where)
    assert (found.table_key, found.shapes_key, found.library_key) == ("table", None, None)
    both = table_of(XY)
    both.obs["sample"] = "a"
    assert _io.where_in_reference(both, where).library_key == "sample"


def test_backed_and_lazy_tables(tmp_path):
    table = table_of(XY)
    table.write_h5ad(tmp_path / "t.h5ad")
    backed = ad.read_h5ad(tmp_path / "t.h5ad", backed="r")
    assert len(_io.places(backed, Where(mpp=1.0))[0]) == 40
    with pytest.raises(ValueError, match="view of a backed AnnData; call data.to_memory"):
        _io.unpack(backed[:20])
    backed.file.close()
    table.write_zarr(tmp_path / "t.zarr")
    with pytest.raises(ValueError, match="lazy AnnData; call data.to_memory"):
        _io.unpack(ad.experimental.read_lazy(tmp_path / "t.zarr"))
