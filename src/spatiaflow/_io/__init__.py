"""AnnData and SpatialData to arrays, and back into slots: the only place that knows both, and every slot name."""

from spatiaflow._io._arguments import (
    at_least_one,
    element_name,
    held_out,
    known_names,
    listing,
    names,
    one_of,
    positive,
    share,
    slot_name,
)
from spatiaflow._io._images import SlideImage, background, slide_image
from spatiaflow._io._keys import Key, provenance
from spatiaflow._io._lists import each_object, objects_of
from spatiaflow._io._masks import masks
from spatiaflow._io._pixels import as_uint8, check_finite, inside
from spatiaflow._io._reader import Chunks, Decoded, open_image
from spatiaflow._io._scales import libraries, microns_per_unit, remember
from spatiaflow._io._slides import one_slide, places, positions, unpack, where_in_reference
from spatiaflow._io._stored import StoredCounts
from spatiaflow._io._tables import (
    check_counts,
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
    "as_uint8",
    "at_least_one",
    "background",
    "check_counts",
    "check_encoder",
    "check_finite",
    "counts",
    "dense",
    "each_object",
    "element_name",
    "features",
    "groups",
    "held_out",
    "inside",
    "keep",
    "known_names",
    "libraries",
    "library_sizes",
    "listing",
    "log_expression",
    "masks",
    "microns_per_unit",
    "morphology",
    "names",
    "objects_of",
    "one_of",
    "one_slide",
    "open_image",
    "places",
    "positions",
    "positive",
    "provenance",
    "remember",
    "same_encoder",
    "share",
    "shared_genes",
    "slide_image",
    "slot_name",
    "slot_as_anndata",
    "storable",
    "target_sum",
    "tissue_share",
    "unpack",
    "where_in_reference",
    "write",
    "write_tissue",
]
