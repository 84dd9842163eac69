"""A piece of mouse brain measured by MERFISH (Vizgen), with two stains, cell polygons and transcripts."""

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

STAINS = ("dapi", "polyT")
MPP = 500.008 / 4603  # µm per pixel, 0.1086
ORIGIN = 6400.029, 4699.967  # µm, corner of the image on the slide; y points down
PLANES = (0, 1)
SHOWN = 1  # plane of the image and the polygons: it has more cells, more transcripts and a brighter image
DATASET = {
    "name": "merfish_mouse_brain",
    "citation": "Vizgen MERFISH mouse brain receptor map, public data release; a piece of it in GiottoData, "
    "https://github.com/drieslab/GiottoData",
    "license": "GiottoData is MIT; the data are Vizgen's public release",
}


@verb
def merfish_mouse_brain() -> SpatialData:
    """Load a piece of mouse brain, 500 x 450 µm, measured by MERFISH, with DAPI and polyT images.

    The first call downloads the raw files and converts them to one Zarr store in ``settings.cache_dir``. Later calls open that
    store. The piece has two focal planes. The files do not assign transcripts to cells. Here a transcript belongs to the cell
    whose polygon *in the same plane* contains it. The counts of a cell are summed over both planes. Image and polygons are those
    of plane 1.

    Returns
    -------
    SpatialData of 504 cells. The coordinate system "global" is in µm on the slide; y points down as in the image. The object has
    no path, so changes never reach the cache. Save a copy with ``sdata.write(path)``.

    ``images["morphology"]`` : uint8 (2, 4143, 4603), channels dapi, polyT; 0.1086 µm per pixel, read lazily
    ``shapes["cell_boundaries"]`` : polygons; the index holds the cell ids
    ``points["transcripts"]`` : all 80,343 molecules, with ``gene``, ``z`` (plane) and ``cell_id`` ("" outside cells)
    ``tables["table"]`` : annotates the polygons, with

    ``.X`` : CSR float32, counts (integers) of 450 genes; they sum to 32,326
    ``.obsm["controls"]``, ``.uns["controls"]["genes"]`` : float32, counts of the blank barcodes, and their names. Genes and
        blanks are 559 features together
    ``.obsm["spatial"]`` : float64 (n_obs, 2), centroids in µm
    ``.uns["dataset"]`` (and ``sdata.attrs["dataset"]``) : dict of ``name``, ``citation``, ``license``

    Raises
    ------
    OSError
        A file could not be downloaded. The message tells what to do.

    Notes
    -----
    The data are Vizgen's public MERFISH release of the mouse brain. This piece comes from the repository ``drieslab/GiottoData``
    (MIT). Cells without a polygon in plane 1, and cells whose centroid lies outside the image, are dropped, and their number is
    logged. The other cells are not filtered: some outlines are smaller than 1 µm², and 24 cells have no transcripts. Cells at the
    border are cut off, and so are their counts. Images are lossy (JPEG, 8 bit).

    Examples
    --------
    >>> sdata = sf.datasets.merfish_mouse_brain()
    >>> sdata["table"].shape
    (504, 450)
    """
    import spatialdata as sd

    sdata = sd.read_zarr(assembled("merfish_mouse_brain", _write))
    sdata.path = None  # so that changes of this object do not reach the cache
    return sdata


def _write(store: Path) -> None:
    files = dict(zip(registry()["merfish_mouse_brain"], fetch("merfish_mouse_brain")))
    pixels = np.stack([np.asarray(Image.open(files[f"images/mini_dataset_{stain}_z{SHOWN}.jpg"])) for stain in STAINS])
    polygons = {z: _polygons(files[f"cell_boundaries/z{z}_polygons.gz"]) for z in PLANES}
    transcripts = pd.read_csv(files["vizgen_transcripts.gz"])
    transcripts = transcripts.rename(columns={"global_x": "x", "global_y": "y", "global_z": "z"})
    transcripts["gene"] = transcripts["gene"].astype("category")
    transcripts["cell_id"] = _assign(transcripts, polygons)

    cells, ids = polygons[SHOWN], np.unique(np.concatenate([cells.index for cells in polygons.values()]))
    corner = np.array(ORIGIN) + MPP * np.array(pixels.shape[:0:-1])
    inside = cells.centroid.x.between(ORIGIN[0], corner[0]) & cells.centroid.y.between(ORIGIN[1], corner[1])
    logger.info(
        "merfish_mouse_brain: %d cells; dropped %d without a polygon in plane %d and %d centred outside the image",
        inside.sum(), len(ids) - len(cells), SHOWN, (~inside).sum(),
    )  # fmt: skip
    cells = cells[inside]
    transcripts["cell_id"] = (
        transcripts["cell_id"].where(transcripts["cell_id"].isin(cells.index), "").astype("category")
    )
    genes = transcripts["gene"].cat.categories.to_numpy(object)
    write_cells(
        store,
        DATASET,
        cells=cells,
        counts=_counts(cells.index, transcripts),
        features=genes,
        is_control=np.array([gene.startswith("Blank-") for gene in genes]),
        transcripts=transcripts,
        pixels=pixels,
        stains=STAINS,
        mpp=MPP,
        origin=ORIGIN,
    )


def _polygons(path: Path):
    """Return the polygons of one plane in µm. In the file y points up and is negative."""
    import geopandas as gpd
    import shapely

    vertices = pd.read_csv(path, dtype={"poly_ID": str})  # 39 digits: too many for any number type
    vertices["y"] *= -1
    rings = {cell: ring.to_numpy() for cell, ring in vertices.groupby("poly_ID", sort=False)[["x", "y"]]}
    polygons, n_repaired = repaired(rings.values())
    empty = shapely.is_empty(polygons)
    logger.info("%s: %d of %d outlines repaired, %d empty ones dropped", path.name, n_repaired, len(rings), empty.sum())
    return gpd.GeoSeries(polygons[~empty], index=pd.Index(np.array(list(rings), object)[~empty], name="cell_id"))


def _assign(transcripts: pd.DataFrame, polygons: dict) -> pd.Series:
    """Return the cell of each transcript, or "". Its polygon of the same plane contains it; if several do, the first is taken."""
    import geopandas as gpd

    cell_ids = pd.Series("", index=transcripts.index, dtype=object)
    for z, cells in polygons.items():
        own = transcripts[transcripts["z"] == z]
        points = gpd.GeoDataFrame(geometry=gpd.points_from_xy(own["x"], own["y"]), index=own.index)
        outlines = gpd.GeoDataFrame({"order": range(len(cells))}, geometry=cells.array)
        first = points.sjoin(outlines, predicate="within").groupby(level=0)["order"].min()
        cell_ids[first.index] = cells.index.to_numpy(object)[first]
    return cell_ids


def _counts(cell_ids: pd.Index, transcripts: pd.DataFrame) -> sparse.csr_matrix:
    inside = transcripts[transcripts["cell_id"] != ""]
    rows, columns = cell_ids.get_indexer(inside["cell_id"]), inside["gene"].cat.codes.to_numpy()
    shape = len(cell_ids), len(transcripts["gene"].cat.categories)
    return sparse.csr_matrix((np.ones(len(inside), np.float32), (rows, columns)), shape=shape)
