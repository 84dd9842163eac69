"""The pancreas slide from the publishers' files: tiles at the end of the slide are smaller, cells are listed by several."""

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from PIL import Image

import pancreas
from spatiaflow.datasets._xenium import MPP, STAINS, TILE

WIDTH, HEIGHT = 2 * TILE, TILE + 88  # the slide goes on to the right


@pytest.fixture
def published(tmp_path):
    """The publishers' folder of a slide, and its pixels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 90, (len(STAINS), HEIGHT // 8, 3 * TILE // 8), np.uint8)
    pixels = coarse.repeat(8, 1).repeat(8, 2)
    for c, stain in enumerate(STAINS):
        tiles = tmp_path / "pyramid_images" / f"{stain}_files" / "16"
        tiles.mkdir(parents=True)
        for column in range(3):
            for row in range(2):
                tile = pixels[c, row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                Image.fromarray(tile).save(tiles / f"{column}_{row}.webp", lossless=True)
    for folder in ("cell_segmentation", "cbg", "cell_clusters"):
        (tmp_path / folder).mkdir()

    def ring(x, y):
        return [np.array(p, float) for p in ((x, y), (x + 10, y), (x + 10, y + 10), (x, y + 10), (x, y))]

    def outlines(cells, number):
        table = pd.DataFrame({"name": list(cells), "GEOMETRY": [[ring(*xy)] for xy in cells.values()]})
        table.to_parquet(tmp_path / "cell_segmentation" / f"cell_tile_{number}_0.parquet")

    outlines({"a": (20, 40), "b": (WIDTH - 15, HEIGHT - 20)}, 0)
    outlines({"b": (WIDTH - 15, HEIGHT - 20), "c": (WIDTH - 3, 30)}, 1)  # b again; c is centred beyond the part
    for gene, seen in {"INS": {"a": 3, "c": 9}, "GCG": {"b": 2}, "NegControlProbe_1": {"b": 1}}.items():
        pd.DataFrame({gene: seen}).to_parquet(tmp_path / "cbg" / f"{gene}.parquet")
    pd.DataFrame({"cluster": {"a": "2", "c": "1"}}).to_parquet(tmp_path / "cell_clusters" / "cluster.parquet")
    return tmp_path, pixels


def test_a_part_up_to_the_end_of_the_slide(published, tmp_path_factory):
    folder, pixels = published
    store = tmp_path_factory.mktemp("out") / "pancreas.zarr"
    pancreas.assemble(folder, store, (0, 0, WIDTH, HEIGHT))
    sdata = sd.read_zarr(store)
    np.testing.assert_array_equal(sdata["morphology"].values, pixels[:, :, :WIDTH])
    table = sdata["table"]
    assert list(table.obs_names) == ["a", "b"]
    counts = pd.DataFrame(table.X.toarray(), table.obs_names, table.var_names)
    assert counts.loc["a"].to_dict() == {"INS": 3, "GCG": 0}
    assert counts.loc["b"].to_dict() == {"INS": 0, "GCG": 2}
    assert table.obs["cluster"]["a"] == "2"
    assert pd.isna(table.obs["cluster"]["b"])
    assert table.obsm["controls"].ravel().tolist() == [0, 1]
    centre = np.array([[25, 45], [WIDTH - 10, HEIGHT - 15]])
    np.testing.assert_allclose(table.obsm["spatial"], centre * MPP)
