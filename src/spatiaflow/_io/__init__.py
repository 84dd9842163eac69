"""AnnData and SpatialData to arrays, and back into slots: the only place that knows both, and every slot name."""

from spatiaflow._io._arguments import at_least_one, held_out, known_names, one_of, positive, slot_name
from spatiaflow._io._images import SlideImage, background, slide_image
from spatiaflow._io._keys import Key, provenance
from spatiaflow._io._lists import each_object, objects_of
from spatiaflow._io._masks import masks
from spatiaflow._io._reader import Chunks, Decoded, open_image
from spatiaflow._io._slides import microns_per_unit, one_slide, places, unpack
from spatiaflow._io._stored import StoredCounts
from spatiaflow._io._tables import (
    check_encoder,
    counts,
    dense,
    features,
    groups,
    keep,
    library_sizes,
    log_expression,
    morphology,
    same_encoder,
    shared_genes,
    slot_as_anndata,
    storable,
    target_sum,
    tissue_share,
    write,
    write_tissue,
)
from spatiaflow._io._where import Where

__all__ = [
    "Chunks",
    "Decoded",
    "Key",
    "SlideImage",
    "StoredCounts",
    "Where",
    "at_least_one",
    "background",
    "check_encoder",
    "counts",
    "dense",
    "each_object",
    "features",
    "groups",
    "held_out",
    "keep",
    "known_names",
    "library_sizes",
    "log_expression",
    "masks",
    "microns_per_unit",
    "morphology",
    "objects_of",
    "one_of",
    "one_slide",
    "open_image",
    "places",
    "positive",
    "provenance",
    "same_encoder",
    "shared_genes",
    "slide_image",
    "slot_name",
    "slot_as_anndata",
    "storable",
    "target_sum",
    "tissue_share",
    "unpack",
    "write",
    "write_tissue",
]
