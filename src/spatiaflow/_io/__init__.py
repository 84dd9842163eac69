"""AnnData and SpatialData to arrays, and back into slots: the only place that knows both, and every slot name."""

from spatiaflow._io._tables import (
    Slide,
    counts,
    features,
    microns_per_unit,
    pitch,
    slides,
    storable,
    unpack,
    write,
)

__all__ = ["Slide", "counts", "features", "microns_per_unit", "pitch", "slides", "storable", "unpack", "write"]
