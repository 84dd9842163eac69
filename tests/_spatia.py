"""A tiny SPATIA, and copies of a slide with other parts."""

import spatialdata as sd
from spatialdata.models import Image2DModel

import spatiaflow as sf

TINY = {
    "crop_pixels": 16,
    "patch_pixels": 8,
    "width": 32,
    "image_layers": 1,
    "gene_layers": 1,
    "anchor_um": 40.0,
    "crop_um": 12.0,
    "batches_per_epoch": 6,
}


def tiny(**changes):
    return sf.models.SpatiaConfig(**(TINY | changes))


def train(slides, **options):
    options = {"image_key": "fluorescence", "max_epochs": 2, "config": tiny()} | options
    return sf.tl.train_spatia(slides, **options)


def embedded(slide, model, **options):
    options = {"image_key": "fluorescence"} | options
    copy = sf.tl.embed_spatia(slide, model=model, copy=True, **options)
    return copy["table"] if isinstance(copy, sd.SpatialData) else copy


def edited(slide, **changes):
    """A copy of a slide with other images, shapes or table."""
    table = changes.pop("table", slide["table"].copy())
    elements = {name: element for _, name, element in slide.gen_elements() if name != "table"} | changes
    return sd.SpatialData.init_from_elements({**elements, "table": table}, attrs=dict(slide.attrs))


def image_like(slide, values, names):
    from spatialdata.transformations import get_transformation

    return Image2DModel.parse(
        values, dims=("c", "y", "x"), c_coords=list(names),
        transformations={"global": get_transformation(slide["fluorescence"], "global")},
    )  # fmt: skip
