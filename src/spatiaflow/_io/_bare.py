"""A picture alone: a file, an array or an element of a SpatialData, and what states its scale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
from spatialdata import SpatialData

from spatiaflow._io._elements import image_scales
from spatiaflow._io._files import ORIENTATION, TIFF, VENDORS, largest_series, open_openslide, size_of
from spatiaflow._io._images import SlideImage
from spatiaflow._io._pixels import FINEST, plausible
from spatiaflow._io._scales import contradiction, system_scale

UNITS = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "\\u00B5m": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
}
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296  # tags of TIFF
TAG_UNITS = {2: 25400.0, 3: 10000.0}  # µm of an inch and a centimetre
COARSEST_TAG = 10.0  # µm per pixel; a coarser resolution tag is meant for a printer
ENOUGH = 0.55  # µm per pixel; of an image with several scales the coarsest that is as fine as this is kept
UNUSUAL = re.compile(r"[^A-Za-z0-9_.-]+")


def bare_image(image: Any, *, image_key: str | None = None, mpp: float | None = None) -> SlideImage:
    """Return a picture with its scale; ``mpp`` overrides what the file says of itself.

    Parameters
    ----------
    image
        Path, array (y x x c), SpatialData, or a WSIData of wsidata: an object with ``reader.file``, ``properties.mpp`` (or None)
        and ``properties.shape`` (height and width).
    image_key
        Image of a SpatialData.

    Raises
    ------
    KeyError
        The SpatialData has no such image, or several and no ``image_key``.
    TypeError
        It is none of these.
    ValueError
        Nothing states the scale, or no microscope has it.
    OSError
        The file cannot be read.
    """
    reader = getattr(image, "reader", None)
    if reader is not None and hasattr(reader, "file"):
        found = _of_wsidata(image, mpp or image.properties.mpp)
    elif isinstance(image, SpatialData):
        found = _element(image, image_key, mpp)
    elif isinstance(image, str | Path):
        found = _file(Path(image), mpp)
    elif hasattr(image, "shape") and hasattr(image, "dtype"):
        if mpp is None:
            raise ValueError("the scale of an array is unknown: give mpp= (micrometres per pixel).")
        found = SlideImage(np.asarray(image), np.zeros((0, 2)), float(mpp), _channels_first(image), "image")
    else:
        raise TypeError(
            f"image must be a path, an array (height x width x 3), a SpatialData or a WSIData, not {type(image).__name__}."
        )
    plausible(found.mpp, found.name)
    return found


def _channels_first(image: Any) -> bool:
    return np.ndim(image) == 3 and np.shape(image)[0] in (3, 4) and np.shape(image)[-1] not in (3, 4)


def _of_wsidata(image: Any, mpp: float | None) -> SlideImage:
    """Picture of a WSIData: the file of its reader, or the image of the SpatialData that it was made from."""
    if image.reader.file in getattr(image, "images", ()):
        return _element(image, image.reader.file, mpp)
    found = _file(Path(image.reader.file), mpp)
    shown, read = tuple(image.properties.shape), size_of(cast("Path", found.source))[::-1]
    if shown != read:
        raise ValueError(
            f"the WSIData shows {shown[1]} x {shown[0]} px of {image.reader.file!r}, and its largest image has {read[1]} x "
            f"{read[0]}. Only the largest can be read: open it with wsidata.open_wsi(path), without scene=, or give its path."
        )
    return found


def _file(path: Path, mpp: float | None) -> SlideImage:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    known, tags = scale_of(path)
    if mpp is None and known is None:
        raise ValueError(
            f"{str(path)!r} does not state its scale{tags}: give mpp= (micrometres per pixel; a scanner's 40x has about 0.25, "
            "20x about 0.5, and a smaller copy more)."
        )
    if mpp is not None and known is not None:
        contradiction(mpp, known, f"{str(path)!r} says {known:.4g} µm per pixel")
    return SlideImage(path.absolute(), np.zeros((0, 2)), float(known if mpp is None else mpp), False, path.stem)  # type: ignore[arg-type]


def _element(sdata: SpatialData, image_key: str | None, mpp: float | None) -> SlideImage:
    from spatialdata.transformations import get_transformation

    names = list(sdata.images)
    if image_key is None and len(names) != 1:
        raise KeyError(
            f"this SpatialData has {len(names)} images; choose one with image_key=: {', '.join(map(repr, names))}."
        )
    name = names[0] if image_key is None else image_key
    if name not in sdata.images:
        raise KeyError(f"this SpatialData has no image {name!r}; it has {', '.join(map(repr, names))}.")
    levels = image_scales(sdata.images[name], name)
    level, scales = levels[0], []
    for system, transformation in get_transformation(level, get_all=True).items():
        known = system_scale(sdata, system)
        if known is not None:
            affine = transformation.to_affine_matrix(("x", "y"), ("x", "y"))[:2, :2]
            scales.append(known[0] * float(np.sqrt(abs(np.linalg.det(affine)))))
    if mpp is None and not scales:
        raise ValueError(
            f"the scale of image {name!r} is unknown: give mpp= (micrometres per pixel of its finest scale)."
        )
    if mpp is not None and scales:
        contradiction(mpp, scales[0], f"its coordinate system says {scales[0]:.4g} µm per pixel")
    scale = float(mpp or scales[0])
    steps = [level.sizes["x"] / one.sizes["x"] for one in levels]
    chosen = max((i for i, step in enumerate(steps) if step * scale <= ENOUGH), default=0)
    return SlideImage(levels[chosen].data, np.zeros((0, 2)), scale * steps[chosen], True, name)


def scale_of(path: Path) -> tuple[float | None, str]:
    """Return the µm per pixel that an image file states (None where it does not), and what it says instead, for an error."""
    suffix = path.suffix.lower()
    if suffix in VENDORS:
        stated = open_openslide(path).properties
        pair = tuple(float(stated[f"openslide.mpp-{axis}"]) for axis in "xy" if f"openslide.mpp-{axis}" in stated)
        return (_square(pair, path), "") if len(pair) == 2 else (None, "")
    return (_of_tiff if suffix in TIFF else _of_picture)(path)


def _of_tiff(path: Path) -> tuple[float | None, str]:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.series[largest_series(tif)].keyframe
            text = str(page.description or "")
            if tif.ome_metadata and (pair := _of_ome(tif.ome_metadata, page.imagewidth)):
                return _square(pair, path), ""
            if found := re.search(r"\bMPP\s*=\s*([\d.]+)", text):  # Aperio
                return float(found[1]), ""
            tags = {tag.code: tag.value for tag in page.tags}
            if not {X_RESOLUTION, Y_RESOLUTION} <= set(tags):
                return None, ""
            per = [float(np.divide(*tags[code])) for code in (X_RESOLUTION, Y_RESOLUTION)]
            unit = UNITS.get(str((tif.imagej_metadata or {}).get("unit", "")))
            if unit is not None and min(per) > 0:
                return _square((unit / per[0], unit / per[1]), path), ""
            length = TAG_UNITS.get(int(tags.get(RESOLUTION_UNIT, 2)))
    except tifffile.TiffFileError:  # opening it tells what is wrong
        return None, ""
    return (None, "") if length is None or min(per) <= 0 else _of_tags((length / per[0], length / per[1]), path)


def _of_ome(metadata: str, width: int) -> tuple[float, float] | None:
    """PhysicalSizeX and -Y of the image of this width, in µm."""
    for pixels in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", metadata):
        found = dict(re.findall(r'(\w+)="([^"]*)"', pixels))
        if found.get("SizeX") == str(width) and {"PhysicalSizeX", "PhysicalSizeY"} <= set(found):
            units = [UNITS.get(found.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "XY"]
            if all(unit is not None for unit in units):
                x, y = (float(found[f"PhysicalSize{axis}"]) * unit for axis, unit in zip("XY", units))  # type: ignore[operator]
                return x, y
    return None


def _of_picture(path: Path) -> tuple[float | None, str]:
    from PIL import Image, UnidentifiedImageError

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            dpi = image.info.get("dpi")
            if image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8) and dpi:
                dpi = dpi[::-1]
    except (UnidentifiedImageError, OSError):  # opening it tells what is wrong
        return None, ""
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return (None, "") if not dpi or min(dpi) <= 1 else _of_tags((25400 / float(dpi[0]), 25400 / float(dpi[1])), path)


def _of_tags(pair: tuple[float, float], path: Path) -> tuple[float | None, str]:
    """Scale of resolution tags, where they are a microscope's and not a printer's."""
    if FINEST <= min(pair) and max(pair) <= COARSEST_TAG:
        return _square(pair, path), ""
    return None, f" (its resolution tag, {pair[0]:.4g} µm per pixel, is a printer's)"


def _square(pair: tuple[float, ...], path: Path) -> float:
    x, y = pair
    if abs(x / y - 1) > 0.02:
        raise ValueError(
            f"the pixels of {str(path)!r} are not square ({x:.4g} by {y:.4g} µm). Resample it to square pixels, or give mpp= if "
            "the file is wrong."
        )
    return float(np.sqrt(x * y))


def plain_stem(name: str) -> str:
    """Name of a picture as the name of a slide: without characters that slots and elements cannot have."""
    return UNUSUAL.sub("_", name).strip("_") or "slide"
