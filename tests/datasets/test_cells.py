"""Segmented cells of public raw files, against the raw files read slowly."""

import sys

import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from skimage.draw import polygon as fill

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.datasets import _fetch
from spatiaflow.datasets._cells import repaired

LOADERS = {"xenium_pancreas": 7619, "merfish_mouse_brain": 504}


@pytest.fixture(scope="module")
def stores(cache):
    return {name: getattr(sf.datasets, name)() for name in LOADERS}


@pytest.mark.parametrize("name", list(LOADERS))
def test_every_cell_has_a_valid_polygon_in_the_image_and_counts(stores, name):
    sdata = stores[name]
    table, shapes = sdata["table"], sdata["cell_boundaries"]
    assert table.n_obs == len(shapes) == LOADERS[name]
    assert shapes.geometry.is_valid.all()
    assert not shapes.geometry.is_empty.any()
    assert shapes.index.is_unique
    _io.counts(table)
    assert not table.var_names.str.startswith(("Blank", "NegControl", "Unassigned")).any()
    assert table.uns["dataset"]["name"] == sdata.attrs["dataset"]["name"] == name
    controls = sf.get.expression(sdata, key="controls")
    assert controls.X.sum() < 0.01 * table.X.sum()
    assert controls.var_names.str.startswith(("Blank", "NegControl", "Unassigned")).all()

    (slide,) = _io.places(sdata)
    found = _io.slide_image(sdata, slide)
    np.testing.assert_allclose(slide.xy, table.obsm["spatial"], atol=1e-6)
    assert ((found.xy >= 0) & (found.xy <= found.source.shape[:0:-1])).all()


@pytest.mark.parametrize(
    ("name", "mpp", "stains"),
    [
        ("xenium_pancreas", 0.2125, ("dapi", "bound", "rna", "prot")),
        ("merfish_mouse_brain", 0.10863, ("dapi", "polyT")),
    ],
)
def test_nuclei_are_bright_inside_the_polygons(stores, name, mpp, stains):
    """Polygons lie on the image: DAPI is bright inside, and less so where they are moved by 10 µm."""
    sdata = stores[name]
    (slide,) = _io.places(sdata)
    found = _io.slide_image(sdata, slide)
    assert found.mpp == pytest.approx(mpp, rel=1e-4)
    assert found.channels == stains
    assert found.source.dtype == np.uint8
    dapi = np.asarray(found.source[0])
    corner = slide.xy[0] - found.xy[0] * found.mpp
    inside = np.zeros(dapi.shape, bool)
    for polygon in sdata["cell_boundaries"].geometry:
        x, y = ((np.asarray(polygon.exterior.coords) - corner) / found.mpp).T
        inside[fill(y, x, dapi.shape)] = True
    assert dapi[inside].mean() > 3 * dapi[~inside].mean()
    for axis in (0, 1):
        for shift in (-10, 10):
            assert dapi[np.roll(inside, round(shift / mpp), axis)].mean() < 0.8 * dapi[inside].mean()


def test_xenium_lies_where_the_slide_has_it(stores):
    """Positions are those of the whole slide: pixels 18432-22528 and 0-4096, in µm."""
    (slide,) = _io.places(stores["xenium_pancreas"])
    assert (slide.xy >= np.array([18432, 0]) * 0.2125).all()
    assert (slide.xy < np.array([22528, 4096]) * 0.2125).all()
    assert slide.xy[:, 0].max() > 22500 * 0.2125


def test_xenium_counts_and_polygons_are_those_of_the_raw_files(stores, cache):
    sdata, raw = stores["xenium_pancreas"], cache / "xenium_pancreas"
    table = sdata["table"]
    assert table.n_vars == 377
    assert table.obsm["controls"].shape == (7619, 129)
    cells = [table.obs_names[i] for i in (0, 1234, 7618)]
    for gene in ("INS", "CFTR", "AMY2A", "GATM"):
        seen = pd.read_parquet(raw / "cbg" / f"{gene}.parquet")[gene]
        for cell in cells:
            assert table[cell, gene].X.sum() == (seen[cell] if cell in seen.index else 0)
        assert table[:, gene].X.sum() == sum(n for cell, n in seen.items() if cell in table.obs_names)
    clusters = pd.read_parquet(raw / "cell_clusters" / "cluster.parquet")["cluster"]
    assert [table.obs.loc[cell, "cluster"] for cell in cells] == [clusters[cell] for cell in cells]
    outlines = pd.read_parquet(raw / "cell_segmentation" / "cell_tile_100_5.parquet").set_index("name")["GEOMETRY"]
    for cell, rings in outlines.items():
        polygon = shapely.Polygon([(x * 0.2125, y * 0.2125) for x, y in rings[0]])
        assert sdata["cell_boundaries"].geometry[cell].equals_exact(polygon, 1e-9)


def test_xenium_tiles_are_where_their_names_say(stores, cache):
    from PIL import Image

    pixels = stores["xenium_pancreas"]["morphology"].data
    for stain, channel in (("dapi", 0), ("prot", 3)):
        path = cache / "xenium_pancreas" / "pyramid_images" / f"{stain}_files" / "16" / "38_1.webp"
        tile = np.asarray(Image.open(path).convert("L"))
        np.testing.assert_array_equal(pixels[channel, 512:1024, 1024:1536], tile)
    assert pixels.chunks[0] == (4,)
    assert set(pixels.chunks[1] + pixels.chunks[2]) == {512}


def test_merfish_counts_are_the_molecules_in_the_polygon_of_their_plane(stores, cache):
    sdata, raw = stores["merfish_mouse_brain"], cache / "merfish_mouse_brain"
    table = sdata["table"]
    assert table.n_vars + table.obsm["controls"].shape[1] == 559
    molecules = pd.read_csv(raw / "vizgen_transcripts.gz")
    outlines = [pd.read_csv(raw / "cell_boundaries" / f"z{z}_polygons.gz", dtype={"poly_ID": str}) for z in (0, 1)]
    for cell in table.obs_names[[40, 300]]:
        counted = dict.fromkeys(table.var_names, 0)
        for z in (0, 1):
            ring = outlines[z][outlines[z]["poly_ID"] == cell]
            polygon = shapely.Polygon([(x, -y) for x, y in zip(ring["x"], ring["y"])])
            west, south, east, north = polygon.bounds
            near = molecules[molecules["global_x"].between(west, east) & molecules["global_y"].between(south, north)]
            for molecule in near[near["global_z"] == z].itertuples():
                if polygon.contains(shapely.Point(molecule.global_x, molecule.global_y)) and molecule.gene in counted:
                    counted[molecule.gene] += 1
        assert sum(counted.values()) > 10
        assert table[cell].X.toarray().ravel().tolist() == list(counted.values())
    points = sdata["transcripts"].compute()
    assert len(points) == len(molecules)
    assert (points["cell_id"] != "").sum() == table.X.sum() + table.obsm["controls"].sum()


@pytest.mark.parametrize("name", [*LOADERS, "starmap_mpfc"])
def test_second_call_only_reads(stores, cortex, name, monkeypatch):
    """Neither the raw files nor the package that reads them are needed again."""
    monkeypatch.setattr(_fetch, "_fetch_one", lambda *args: pytest.fail("fetched again"))
    monkeypatch.setattr(
        sys.modules[getattr(sf.datasets, name).__module__], "_write", lambda *args: pytest.fail("built again")
    )
    again = getattr(sf.datasets, name)()
    table, before = (again, cortex) if name == "starmap_mpfc" else (again["table"], stores[name]["table"])
    assert (table.X != before.X).nnz == 0


def test_what_is_written_into_a_dataset_stays_out_of_the_cache(stores, tmp_path):
    sdata = sf.datasets.merfish_mouse_brain()
    assert sdata.path is None
    sdata.write(tmp_path / "mine.zarr")
    assert sd.read_zarr(tmp_path / "mine.zarr")["table"].n_obs == 504


def test_outlines_that_cross_themselves_are_repaired():
    bow = np.array([[0, 0], [4, 4], [4, 0], [0, 1]])
    fine, line = np.array([[0, 0], [1, 0], [1, 1]]), np.array([[0, 0], [1, 1]])
    polygons, n_repaired = repaired([bow, fine, line])
    assert n_repaired == 1
    assert polygons[0].is_valid
    assert 0 < polygons[0].area < 8
    assert polygons[1].equals(shapely.Polygon(fine))
    assert polygons[2].is_empty
