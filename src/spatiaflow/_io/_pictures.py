"""Which images of a SpatialData belong to a region: by coordinate system, then by position, then by name."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from spatialdata import SpatialData

from spatiaflow._io._arguments import listing
from spatiaflow._io._elements import affine_of, image_scales
from spatiaflow.models.slide import Slide

OVERLAP = 0.5  # of the smaller box: regions that share more of it lie over one another


def pictures(sdata: SpatialData, slide: Slide) -> list[str]:
    """Return the image of a slide, or the several that are one picture at several scales, as Visium's readers write it."""
    found = candidates(sdata, slide)
    if len({re.sub("_(full|hires|lowres)_image", "", name) for name in found}) != 1:
        raise KeyError(
            f"{len(found)} images share the coordinate system {slide.coordinate_system!r} with {slide.element!r}: "
            f"{listing(found)}. Give image_key=, or, where every sample has an image of its own, name each after its region "
            f"({f'{slide.element}_image'!r})."
        )
    return found


def candidates(sdata: SpatialData, slide: Slide) -> list[str]:
    """Return the images that may be the slide's; refuse where only the images of other samples are left."""
    from spatialdata.transformations import get_transformation

    system = slide.coordinate_system
    found = [name for name in sdata.images if system in get_transformation(sdata[name], get_all=True)]
    if len(found) > 1:  # fields of view, as of CosMx, share a system: the slide's own is where its cells are
        found = [name for name in found if _holds(sdata.images[name], slide)] or found
    regions = _regions(sdata, slide)
    mine = [name for name in found if owner(name, regions) == slide.element]
    if mine and (len(found) > 1 or len(regions) > 1):
        return mine
    if found and (over := _over(sdata, slide, regions)):
        raise KeyError(
            f"{listing([slide.element, *over])} lie over one another in {system!r}, and it cannot be told which of them "
            f"{listing(found)} shows. Name each image after its region ({f'{slide.element}_image'!r}), give each sample a "
            "coordinate system of its own, or give image_key= if it shows them all."
        )
    return found


def check_named(sdata: SpatialData, slide: Slide, image: str) -> None:
    """Refuse an image that the caller names, but that is another sample's."""
    regions = _regions(sdata, slide)
    of = owner(image, regions)
    if of not in (None, slide.element) and of in _over(sdata, slide, regions):
        raise ValueError(
            f"image {image!r} belongs to {of!r}, not to {slide.element!r}, which the table annotates too. Leave image_key= "
            "out, so that each sample has its own image, or name the image after neither."
        )


def owner(image: str, regions: list[str]) -> str | None:
    """Return the region whose name an image bears: most words in common, and more than any other region has.

    ``"a_hires_image"`` goes with ``"a"``, ``"he-a"`` with ``"cells-a"``, ``"1_image"`` with ``"1_labels"``.
    """
    words = {name: set(re.split("[^A-Za-z0-9]+", name)) - {""} for name in [image, *regions]}
    shared = sorted(((len(words[image] & words[name]), name) for name in regions), reverse=True)
    if not shared or not shared[0][0] or (len(shared) > 1 and shared[0][0] == shared[1][0]):
        return None
    return shared[0][1]


def _regions(sdata: SpatialData, slide: Slide) -> list[str]:
    """The regions of the table that annotates the slide's element, this one first."""
    for table in sdata.tables.values():
        of = table.uns.get("spatialdata_attrs", {}).get("region")
        names = [of] if isinstance(of, str) else [str(name) for name in ([] if of is None else of)]
        if slide.element in names:
            return [str(slide.element), *(name for name in names if name != slide.element and name in sdata)]
    return [str(slide.element)]


def _over(sdata: SpatialData, slide: Slide, regions: list[str]) -> list[str]:
    """The other regions that lie over the slide in its coordinate system."""
    from spatialdata import get_extent
    from spatialdata.transformations import get_transformation

    system, boxes = slide.coordinate_system, {}
    for name in regions if len(regions) > 1 else ():
        if system in get_transformation(sdata[name], get_all=True):
            extent = get_extent(sdata[name], coordinate_system=system)
            boxes[name] = np.array([extent["x"], extent["y"]], float)
    if slide.element not in boxes:
        return []
    mine = boxes.pop(slide.element)
    out = []
    for name, box in boxes.items():
        shared = np.minimum(mine[:, 1], box[:, 1]) - np.maximum(mine[:, 0], box[:, 0])
        smaller = min(np.ptp(mine, axis=1).prod(), np.ptp(box, axis=1).prod())
        if (shared > 0).all() and shared.prod() > OVERLAP * smaller:
            out.append(name)
    return out


def _holds(image: Any, slide: Slide) -> bool:
    """Whether most of the slide's positions lie in the image."""
    level = image_scales(image)[0]
    xy = pixels_of(slide, affine_of(level, slide.coordinate_system))
    return bool(((xy >= 0) & (xy <= level.shape[:0:-1])).all(1).mean() > 0.5)


def pixels_of(slide: Slide, affine: np.ndarray) -> np.ndarray:
    """Positions in pixels of an image that ``affine`` carries to the slide's coordinate system."""
    homogeneous = np.column_stack([slide.xy / slide.mpp, np.ones(len(slide.xy))])
    return (homogeneous @ np.linalg.inv(affine).T)[:, :2]
