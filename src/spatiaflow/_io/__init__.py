"""AnnData and SpatialData to arrays, and back into slots: the only place that knows both, and every slot name."""

from spatiaflow._io._images import SlideImage, slide_image
from spatiaflow._io._reader import Chunks, open_image
from spatiaflow._io._tables import (
    Slide,
    background,
    check_encoder,
    counts,
    dense,
    features,
    library_sizes,
    log_expression,
    microns_per_unit,
    pitch,
    same_encoder,
    shared_genes,
    slides,
    slot_as_anndata,
    storable,
    target_sum,
    unpack,
    write,
)

__all__ = [
    "Chunks",
    "Slide",
    "SlideImage",
    "background",
    "check_encoder",
    "counts",
    "dense",
    "features",
    "library_sizes",
    "log_expression",
    "microns_per_unit",
    "open_image",
    "pitch",
    "same_encoder",
    "shared_genes",
    "slide_image",
    "slides",
    "slot_as_anndata",
    "storable",
    "target_sum",
    "unpack",
    "write",
]
