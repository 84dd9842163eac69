"""A region of human pancreas measured by Xenium, with four stains, cell polygons and counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image
from scipy import sparse

from spatiaflow._process import verb
from spatiaflow._settings import logger
from spatiaflow.datasets._assemble import assembled
from spatiaflow.datasets._cells import repaired, write_cells
from spatiaflow.datasets._fetch import fetch, registry

if TYPE_CHECKING:
    from spatialdata import SpatialData

STAINS = ("dapi", "bound", "rna", "prot")
MPP = 0.2125  # µm per pixel of the full resolution
TILE = 512  # pixels of an image tile
REGION = 18432, 0, 22528, 4096  # x0, y0, x1, y1 in full-resolution pixels of the slide
CONTROLS = ("NegControlProbe", "NegControlCodeword", "UnassignedCodeword")
DATASET = {
    "name": "xenium_pancreas",
    "citation": "10x Genomics, Human Pancreas FFPE with Multimodal Cell Segmentation (Xenium); tiles by celldega, "
    "https://github.com/broadinstitute/celldega_Xenium_human_Pancreas_FFPE",
    "license": "tile repository: Broad Institute's academic, non-profit licence; 10x Genomics' public datasets are CC BY "
    "4.0 as a rule, not checked for this one",
}


@verb
def xenium_pancreas() -> SpatialData:
    """Load a region of human pancreas (FFPE), 870 x 870 µm, measured by Xenium with its four segmentation stains.

    The first call downloads 36 MB in 1,200 files and converts them to one Zarr store in ``settings.cache_dir``. Later calls
    open that store. Cells are not filtered: half of them have 39 counts or fewer.

    Returns
    -------
    SpatialData of 7,619 cells. The coordinate system "global" is in µm on the whole slide. The region is x 3916.8 to 4787.2,
    y 0 to 870.4. The object has no path, so changes never reach the cache. Save a copy with ``sdata.write(path)``.

    ``images["morphology"]`` : uint8 (4, 4096, 4096), channels dapi, bound (membrane), rna, prot; 0.2125 µm per pixel, read
        lazily. Values are rarely above 90, so rescale each channel for display
    ``shapes["cell_boundaries"]`` : polygons; the index holds the cell ids
    ``tables["table"]`` : annotates the polygons, with

    ``.X`` : CSR float32, counts (integers) of 377 genes
    ``.obs["cluster"]`` : category, missing for the 4 cells without counts. The publishers made these clusters from the
        same counts. They are not gold labels, and agreement with them does not measure how good a method is
    ``.obsm["controls"]``, ``.uns["controls"]["genes"]`` : float32 (n_obs, 129), counts of negative controls and unassigned
        codewords, and their names
    ``.obsm["spatial"]`` : float64 (n_obs, 2), centroids in µm
    ``.uns["dataset"]`` (and ``sdata.attrs["dataset"]``) : dict of ``name``, ``citation``, ``license``

    Raises
    ------
    OSError
        A file could not be downloaded. The message tells what to do.

    Notes
    -----
    The data are 10x Genomics' "Human Pancreas FFPE with Multimodal Cell Segmentation" (Xenium). The files come from the
    repository ``broadinstitute/celldega_Xenium_human_Pancreas_FFPE``, which is under Broad's academic, non-profit licence.
    Images are lossy (WebP, 8 bit). A cell belongs to the region if its centroid does, so cells at the border extend beyond the
    image.

    Examples
    --------
    >>> sdata = sf.datasets.xenium_pancreas()
    >>> sdata["table"].shape
    (7619, 377)
    """
    import spatialdata as sd

    sdata = sd.read_zarr(assembled("xenium_pancreas", _write))
    sdata.path = None  # so that changes of this object do not reach the cache
    return sdata


def _write(store: Path) -> None:
    write_region(store, dict(zip(registry()["xenium_pancreas"], fetch("xenium_pancreas"))), REGION)


def write_region(store: Path, files: dict[str, Path], region: tuple[int, int, int, int]) -> None:
    """Write a region of the slide: x0, y0, x1, y1 in full-resolution pixels. x0 and y0 must be multiples of ``TILE``."""
    cells = _cells([path for file, path in files.items() if file.startswith("cell_segmentation/")], region)
    genes = {path.stem: path for file, path in files.items() if file.startswith("cbg/")}
    clusters = pd.read_parquet(files["cell_clusters/cluster.parquet"])["cluster"].astype(object)
    write_cells(
        store,
        DATASET,
        cells=cells,
        counts=_counts(cells.index, list(genes.values())),
        features=np.array(list(genes), object),
        is_control=np.array([gene.startswith(CONTROLS) for gene in genes]),
        obs={
            "cluster": pd.Categorical(
                clusters.reindex(cells.index).to_numpy(), sorted(clusters.dropna().unique(), key=int)
            )
        },
        pixels=_pixels(files, region),
        stains=STAINS,
        mpp=MPP,
        origin=(region[0] * MPP, region[1] * MPP),
    )


def _cells(paths: list[Path], region: tuple[int, int, int, int]):
    """Return polygons in µm of the cells centred in the region. A cell that is listed in several tiles is taken once."""
    import geopandas as gpd
    import shapely

    x0, y0, x1, y1 = region
    outlines = pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True).drop_duplicates("name")
    polygons, n_repaired = repaired(np.stack(rings[0]) for rings in outlines["GEOMETRY"])
    centre = gpd.GeoSeries(polygons).centroid  # NaN for an empty polygon, which is then not inside
    inside = ((centre.x >= x0) & (centre.x < x1) & (centre.y >= y0) & (centre.y < y1)).to_numpy()
    logger.info(
        "xenium_pancreas: %d cells in the region; of all %d outlines, %d crossed themselves and were repaired, %d were empty",
        inside.sum(), len(polygons), n_repaired, shapely.is_empty(polygons).sum(),
    )  # fmt: skip
    in_microns = shapely.transform(polygons[inside], lambda xy: xy * MPP)
    return gpd.GeoSeries(in_microns, index=pd.Index(outlines["name"].to_numpy(object)[inside], name="cell_id"))


def _counts(cell_ids: pd.Index, paths: list[Path]) -> sparse.csr_matrix:
    """Join the files of the genes. Each file lists the cells of the whole slide in which the gene was detected."""
    rows, columns, values = [], [], []
    for column, path in enumerate(paths):
        seen = pd.read_parquet(path).iloc[:, 0]
        row = cell_ids.get_indexer(seen.index)
        rows.append(row[row >= 0])
        columns.append(np.full(len(rows[-1]), column))
        values.append(seen.to_numpy(np.float32)[row >= 0])
    triplets = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix(triplets, shape=(len(cell_ids), len(paths)))


def _pixels(files: dict[str, Path], region: tuple[int, int, int, int]) -> np.ndarray:
    """Join the tiles. They are named by column and row on the whole slide. Tiles at the slide's end are smaller."""
    x0, y0, x1, y1 = region
    pixels = np.zeros((len(STAINS), y1 - y0, x1 - x0), np.uint8)
    for c, stain in enumerate(STAINS):
        for y in range(y0, y1, TILE):
            for x in range(x0, x1, TILE):
                with Image.open(files[f"pyramid_images/{stain}_files/16/{x // TILE}_{y // TILE}.webp"]) as tile:
                    values = np.asarray(tile.convert("L"))
                pixels[c, y - y0 : y - y0 + TILE, x - x0 : x - x0 + TILE] = values[: y1 - y, : x1 - x]
    return pixels
