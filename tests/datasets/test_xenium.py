"""Human pancreas: polygons, counts and tiles are those of the raw files."""

import numpy as np
import pandas as pd
import shapely
from PIL import Image

from spatiaflow import _io


def test_xenium_lies_where_the_slide_has_it(xenium):
    """Positions are those of the whole slide: pixels 18432-22528 and 0-4096, in µm."""
    (slide,) = _io.places(xenium)
    assert (slide.xy >= np.array([18432, 0]) * 0.2125).all()
    assert (slide.xy < np.array([22528, 4096]) * 0.2125).all()
    assert slide.xy[:, 0].max() > 22500 * 0.2125


def test_xenium_counts_and_polygons_are_those_of_the_raw_files(xenium, cache):
    raw = cache / "xenium_pancreas"
    table = xenium["table"]
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
        assert xenium["cell_boundaries"].geometry[cell].equals_exact(polygon, 1e-9)


def test_xenium_tiles_are_where_their_names_say(xenium, cache):
    pixels = xenium["morphology"].data
    for stain, channel in (("dapi", 0), ("prot", 3)):
        path = cache / "xenium_pancreas" / "pyramid_images" / f"{stain}_files" / "16" / "38_1.webp"
        tile = np.asarray(Image.open(path).convert("L"))
        np.testing.assert_array_equal(pixels[channel, 512:1024, 1024:1536], tile)
    assert pixels.chunks[0] == (4,)
    assert set(pixels.chunks[1] + pixels.chunks[2]) == {512}
