"""Find the image of a slide, in AnnData or SpatialData, and where its spots lie in it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow._io._tables import Slide, _listing


@dataclass
class SlideImage:
    """An image (array-like or file) and the positions of a slide's spots in its pixels."""

    source: Any  # path, or array-like c x y x (SpatialData) or y x c (others)
    xy: np.ndarray  # n x 2, pixels of the source
    mpp: float  # µm per pixel of the source
    channels_first: bool
    name: str


def slide_image(
    data: AnnData | SpatialData, slide: Slide, *, image_key: str | None = None, mpp: float | None = None
) -> SlideImage:
    """Return the image of a slide; of a multiscale image the coarsest scale that is not coarser than ``mpp``."""
    if isinstance(data, SpatialData):
        return _from_spatialdata(data, slide, image_key, mpp)
    return _from_anndata(data, slide)


def _from_anndata(adata: AnnData, slide: Slide) -> SlideImage:
    library = adata.uns.get("spatial", {}).get(slide.library_id, {})
    path = library.get("metadata", {}).get("source_image_path")
    where = f"uns['spatial'][{slide.library_id!r}]['metadata']['source_image_path']"
    if not path:
        raise KeyError(
            f"slide {slide.library_id!r} has no full-resolution image: {where} is not set. Set it to the image file, or give "
            "features made elsewhere (any obsm key works as features_key)."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{where} is {str(path)!r}, and there is no such file; set it to where the image is now."
        )
    return SlideImage(Path(path), slide.xy / slide.mpp, slide.mpp, False, str(path))


def _from_spatialdata(sdata: SpatialData, slide: Slide, image_key: str | None, mpp: float | None) -> SlideImage:
    from spatialdata.transformations import get_transformation

    if image_key is None:
        candidates = [
            name for name in sdata.images if slide.coordinate_system in get_transformation(sdata[name], get_all=True)
        ]
        if len(candidates) != 1:
            raise KeyError(
                f"{len(candidates)} images share the coordinate system {slide.coordinate_system!r} with "
                f"{slide.element!r}: {_listing(candidates)}. Give image_key=."
            )
        image_key = candidates[0]
    if image_key not in sdata.images:
        raise KeyError(f"this SpatialData has no image {image_key!r}; it has {_listing(sdata.images)}.")
    element = sdata.images[image_key]
    best = None
    for level in _scales(element):
        transformations = get_transformation(level, get_all=True)
        if slide.coordinate_system not in transformations:
            raise KeyError(
                f"image {image_key!r} has no transformation to {slide.coordinate_system!r}, where {slide.element!r} lies."
            )
        affine = transformations[slide.coordinate_system].to_affine_matrix(("x", "y"), ("x", "y"))
        scale = float(np.sqrt(abs(np.linalg.det(affine[:2, :2])))) * slide.mpp
        if best is None or mpp is None or scale <= mpp * 1.01:
            best = best if best is not None and mpp is None else (level, affine, scale)
    level, affine, scale = best
    if abs(affine[0, 1]) + abs(affine[1, 0]) > 1e-6 * abs(affine[0, 0]):
        warnings.warn(
            f"image {image_key!r} is rotated or sheared against {slide.coordinate_system!r}; patches are cut along its own axes.",
            UserWarning,
            stacklevel=3,
        )
    homogeneous = np.column_stack([slide.xy / slide.mpp, np.ones(len(slide.xy))])
    xy = (homogeneous @ np.linalg.inv(affine).T)[:, :2]
    return SlideImage(level.data, xy, scale, True, image_key)


def _scales(element) -> list:
    """Levels of an image, finest first."""
    if not hasattr(element, "children"):
        return [element]
    return [next(iter(child.ds.data_vars.values())) for child in element.children.values()]
