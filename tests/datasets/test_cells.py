"""What all datasets of segmented cells have in common: valid polygons on their image, counts, and a store that is read again."""

import sys

import numpy as np
import pytest
import shapely
from skimage.draw import polygon as fill

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.datasets import _fetch
from spatiaflow.datasets._cells import repaired

LOADERS = {"xenium_pancreas": 7619, "merfish_mouse_brain": 504}


@pytest.fixture(scope="module")
def stores(xenium, merfish):
    return {"xenium_pancreas": xenium, "merfish_mouse_brain": merfish}


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


def test_outlines_that_cross_themselves_are_repaired():
    bow = np.array([[0, 0], [4, 4], [4, 0], [0, 1]])
    fine, line = np.array([[0, 0], [1, 0], [1, 1]]), np.array([[0, 0], [1, 1]])
    polygons, n_repaired = repaired([bow, fine, line])
    assert n_repaired == 1
    assert polygons[0].is_valid
    assert 0 < polygons[0].area < 8
    assert polygons[1].equals(shapely.Polygon(fine))
    assert polygons[2].is_empty
