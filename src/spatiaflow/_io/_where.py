"""Where things are in an object: the arguments that every verb shares, bundled once per call."""

from __future__ import annotations

from dataclasses import dataclass

from spatiaflow._io._arguments import positive


@dataclass(frozen=True)
class Where:
    """Elements and columns that a call reads; signatures stay flat, and the first line of a verb bundles them.

    Attributes
    ----------
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key
        Slot of ``.obsm`` with the positions of an AnnData.
    mpp
        µm per pixel of the positions; of a SpatialData, µm per unit of the coordinate system.
    coordinate_system
        Coordinate system of a SpatialData that positions are given in; chosen when None.
    """

    table_key: str = "table"
    image_key: str | None = None
    shapes_key: str | None = None
    labels_key: str | None = None
    library_key: str | None = None
    spatial_key: str = "spatial"
    mpp: float | None = None
    coordinate_system: str | None = None

    def __post_init__(self) -> None:
        positive(None, mpp=self.mpp)
