"""Shared by the datasets of segmented cells: repair outlines, and write image, polygons and counts as one SpatialData."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse


def repaired(rings: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return polygons made from rings (n x 2 vertices), and how many were repaired.

    If a ring touches or crosses itself, the largest part is kept. A ring without an area becomes an empty polygon.
    """
    import shapely

    polygons = np.array([shapely.Polygon(ring) if len(ring) > 2 else shapely.Polygon() for ring in rings])
    broken = np.flatnonzero(~shapely.is_valid(polygons))
    for i in broken:
        polygons[i] = max(shapely.get_parts(polygons[i].buffer(0)), key=shapely.area, default=shapely.Polygon())
    return polygons, len(broken)


def write_cells(
    store: Path,
    dataset: dict[str, str],
    *,
    cells,
    counts: sparse.csr_matrix,
    features: np.ndarray,
    is_control: np.ndarray,
    obs: dict | None = None,
    transcripts: pd.DataFrame | None = None,
    pixels: np.ndarray,
    stains: tuple[str, ...],
    mpp: float,
    origin: tuple[float, float],
) -> None:
    """Write a SpatialData store. Its coordinate system "global" is in µm on the slide.

    Parameters
    ----------
    store
        Path of the store.
    dataset
        Name, citation and license; stored in ``attrs["dataset"]`` and ``uns["dataset"]``.
    cells
        GeoSeries of polygons in µm. The index holds the cell ids.
    counts, features, is_control
        Counts (cells x features), the names of the features, and which features are controls instead of genes.
    obs
        More columns for ``.obs``.
    transcripts
        Molecules with x, y, z in µm, gene and cell_id.
    pixels, stains
        Image, uint8 (c, y, x), and the names of its channels.
    mpp, origin
        µm per pixel, and x and y of the image's corner in µm.
    """
    import dask.array as da
    import geopandas as gpd
    import spatialdata as sd
    from anndata import AnnData
    from spatialdata.models import Image2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale, Sequence, Translation

    table = AnnData(
        counts[:, ~is_control],
        obs=pd.DataFrame(
            {
                "cell_id": cells.index.to_numpy(object),
                "region": pd.Categorical(["cell_boundaries"] * len(cells)),
                **(obs or {}),
            },
            index=pd.Index(cells.index.to_numpy(object)),
        ),
        var=pd.DataFrame(index=features[~is_control]),
        obsm={
            "spatial": np.column_stack([cells.centroid.x, cells.centroid.y]),
            "controls": counts[:, is_control].toarray(),
        },
        uns={"controls": {"genes": features[is_control]}, "dataset": dataset},
    )
    image = Image2DModel.parse(
        da.from_array(pixels, chunks=(len(pixels), 512, 512)), dims=("c", "y", "x"), c_coords=list(stains),
        transformations={"global": Sequence([Scale([mpp, mpp], ("x", "y")), Translation(list(origin), ("x", "y"))])},
    )  # fmt: skip
    on_slide = {"global": Identity()}
    points = {}
    if transcripts is not None:
        points["transcripts"] = PointsModel.parse(transcripts, feature_key="gene", transformations=on_slide)
    sdata = sd.SpatialData(
        images={"morphology": image},
        shapes={"cell_boundaries": ShapesModel.parse(gpd.GeoDataFrame(geometry=cells), transformations=on_slide)},
        points=points,
        tables={"table": TableModel.parse(table, "cell_boundaries", "region", "cell_id")},
        attrs={"microns_per_unit": {"global": 1.0}, "dataset": dataset},
    )
    with warnings.catch_warnings():  # repeated for each array, and the user cannot do anything about it
        warnings.filterwarnings("ignore", "zarr v3 autosharding")
        sdata.write(store)
