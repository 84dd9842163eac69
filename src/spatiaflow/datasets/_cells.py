"""What the datasets of segmented cells share: repaired outlines, and one SpatialData store of image, polygons and counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse


def repaired(rings: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return polygons of rings (n x 2 vertices) and how many were repaired.

    Of a ring that touches or crosses itself the largest part is kept; a ring without an area becomes an empty polygon.
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
    """Write a SpatialData store whose coordinate system "global" is µm on the slide.

    Parameters
    ----------
    store
        Path of the store.
    dataset
        Name, citation and license, for ``attrs["dataset"]`` and ``uns["dataset"]``.
    cells
        GeoSeries of polygons in µm, index = cell id.
    counts, features, is_control
        Cells x features; names of the features; which of them are controls and no genes.
    obs
        Further columns of ``.obs``.
    transcripts
        Molecules with x, y, z in µm, gene and cell_id.
    pixels, stains
        Image (c, y, x), uint8, and the names of its channels.
    mpp, origin
        µm per pixel; x and y in µm of the image's corner.
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
    with warnings.catch_warnings():  # said once an array, and nothing that a reader of the data can act on
        warnings.filterwarnings("ignore", "zarr v3 autosharding")
        sdata.write(store)
