"""Crops of the cells of one slide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._process import verb
from spatiaflow._slides.crops import Crops, slide_crops


@verb
@_io.each_object
def crops(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    crop_um: float | None = 20.4,
    crop_pixels: int = 48,
    own_pixels: bool = False,
    library_id: str | None = None,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
) -> Crops | list[Crops] | dict[str, Crops]:
    """Return the crops of the cells of one slide, in the order of the table. They are cut when they are read.

    Nothing is written, and only the parts of the image around the requested cells are read.
    ``sf.pp.crops(sdata).read([0, 5])`` gives a tensor of 2 crops. ``.batches()`` runs over all of them, one tile of the
    image after the other.

    Parameters
    ----------
    data
        Cells with an image; or tiles of :func:`spatiaflow.pp.tiles`, as an AnnData with an image; or a list or dict of such
        objects.
    crop_um
        Side of a crop, µm. None fits each crop to its cell: 1.25 times the longer side of its polygon's box. ``.scale``
        then holds the µm per pixel of each crop.
    crop_pixels
        Side of a crop in pixels after resampling.
    own_pixels
        Set pixels outside the cell's own polygon or label to 0, those of neighbouring cells in particular.
    library_id
        The slide; may be None where there is one.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData; ``image_key`` may be omitted where one image shares the cells' coordinate system.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not state it.

    Returns
    -------
    :class:`spatiaflow.pp.Crops`, or a list or dict of them.

    Raises
    ------
    KeyError
        No image, several and no ``image_key``, or no such slide.
    ValueError
        Several slides and no ``library_id``, cells have no masks where masks are needed, or the scale is unknown.

    Examples
    --------
    >>> crops = sf.pp.crops(sdata, crop_um=16, crop_pixels=32, image_key="fluorescence")
    >>> crops.read([0, 5]).shape
    torch.Size([2, 4, 32, 32])
    """
    where = _io.Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    _io.positive(None, crop_um=crop_um)
    _io.at_least_one(crop_pixels=crop_pixels)
    _, table = _io.unpack(data, table_key)
    slides = _io.places(data, where, partial=True)
    if library_id is None and len(slides) > 1:
        names = ", ".join(slide.name for slide in slides)
        raise ValueError(f"there are {len(slides)} slides ({names}): give library_id=.")
    slide = _io.one_slide(slides, library_id)
    options: dict[str, Any] = {
        "crop_um": crop_um,
        "pixels": crop_pixels,
        "own_pixels": own_pixels,
        "image_key": image_key,
    }
    return slide_crops(data, slide, table, **options)
