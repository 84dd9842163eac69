"""Mouse brain: counts are the molecules of the raw files, and a copy is the user's own."""

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import spatialdata as sd

import spatiaflow as sf
from spatiaflow.datasets._merfish import _assign


def test_merfish_counts_are_the_molecules_in_the_polygon_of_their_plane(merfish, cache):
    raw = cache / "merfish_mouse_brain"
    table = merfish["table"]
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
    points = merfish["transcripts"].compute()
    assert len(points) == len(molecules)
    assert (points["cell_id"] != "").sum() == table.X.sum() + table.obsm["controls"].sum()


def test_what_is_written_into_a_dataset_stays_out_of_the_cache(cache, tmp_path):
    sdata = sf.datasets.merfish_mouse_brain()
    assert sdata.path is None
    sdata.write(tmp_path / "mine.zarr")
    assert sd.read_zarr(tmp_path / "mine.zarr")["table"].n_obs == 504


def test_a_transcript_belongs_to_the_first_polygon_of_its_plane_that_contains_it():
    """Beside a loop over transcripts and polygons, which overlap and differ by plane."""
    rng = np.random.default_rng(0)
    polygons = {}
    for z in (0, 1):
        boxes = [shapely.Point(*xy).buffer(r) for xy, r in zip(rng.uniform(0, 50, (12, 2)), rng.uniform(3, 9, 12))]
        polygons[z] = gpd.GeoSeries(boxes, index=[f"cell{i}" for i in rng.permutation(12)])
    transcripts = pd.DataFrame(rng.uniform(0, 50, (300, 2)), columns=["x", "y"]).assign(z=rng.integers(0, 3, 300))
    expected = []
    for one in transcripts.itertuples():
        inside = [
            cell for cell, outline in polygons.get(one.z, {}).items() if outline.contains(shapely.Point(one.x, one.y))
        ]
        expected.append(inside[0] if inside else "")
    assert list(_assign(transcripts, polygons)) == expected and expected.count("") > 100
