"""AnnData and SpatialData to arrays, and back into slots: the only place that knows both, and every slot name."""

from spatiaflow._io._images import SlideImage, slide_image
from spatiaflow._io._tables import (
    Slide,
    check_encoder,
    counts,
    dense,
    features,
    library_sizes,
    microns_per_unit,
    pitch,
    same_encoder,
    shared_genes,
    slides,
    slot_as_anndata,
    storable,
    unpack,
    write,
)

__all__ = [
    "Slide",
    "SlideImage",
    "check_encoder",
    "counts",
    "dense",
    "features",
    "library_sizes",
    "microns_per_unit",
    "pitch",
    "same_encoder",
    "shared_genes",
    "slide_image",
    "slides",
    "slot_as_anndata",
    "storable",
    "unpack",
    "write",
]
