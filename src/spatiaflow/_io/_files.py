"""Open image files, or say what is wrong with them: an incomplete file must not read as black."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

TIFF = (".tif", ".tiff", ".svs", ".btf", ".ndpi", ".scn", ".qptiff")
VENDORS = (".mrxs", ".vms", ".vmu", ".bif", ".svslide", ".dcm")  # read by openslide; it has no other use here
FORMATS = "Convert it to a TIFF, PNG or JPEG (bioformats2raw, QuPath and ImageJ read the vendors' formats)."
ORIENTATION = 274  # the tag of TIFF and EXIF


def open_file(path: Path, shrink: float) -> tuple[Any, bool, float]:
    """Open an image file; TIFF lazily.

    Returns
    -------
    The array-like (c x y x or y x c), whether channels come first, and how many pixels of the file a pixel covers.
    """
    if path.is_dir():
        raise OSError(f"{path} is a folder, not an image file. Read a Zarr store with spatialdata.read_zarr(path).")
    suffix = path.suffix.lower()
    return (_open_tiff if suffix in TIFF else _open_vendor if suffix in VENDORS else _open_picture)(path, shrink)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image file as :func:`open_file` gives them without shrinking; only its header is read."""
    if path.suffix.lower() in TIFF:
        array, channels_first, _ = _open_tiff(path, 1.0)
        height, width = array.shape[1:3] if channels_first else array.shape[:2]
        return int(width), int(height)
    if path.suffix.lower() in VENDORS:
        return open_openslide(path).dimensions
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _open_tiff(path: Path, shrink: float) -> tuple[Any, bool, float]:
    import dask.array as da
    import tifffile
    import zarr

    try:
        with tifffile.TiffFile(path) as tif:
            _check_siblings(path, tif)
            number = largest_series(tif)
            series = tif.series[number]
            axes, levels = series.axes, series.levels
            if "X" not in axes or "Y" not in axes:
                raise ValueError(f"{path} has axes {axes}; an image has Y, X and channels (S or C). {FORMATS}")
            widths = [level.shape[axes.index("X")] for level in levels]
            level = max((i for i, width in enumerate(widths) if widths[0] <= width * shrink * 1.05), default=0)
            _check_complete(path, levels[level])
            tag = series.keyframe.tags.get(ORIENTATION)
    except tifffile.TiffFileError as error:
        raise OSError(f"{path} is no TIFF, or is damaged: {error}. {FORMATS}") from error
    array = da.from_zarr(zarr.open(tifffile.imread(path, aszarr=True, series=number, level=level), mode="r"))
    if extra := [axis for axis, length in zip(axes, array.shape) if axis not in "YXSC" and length > 1]:
        raise ValueError(
            f"{path} has axes {axes} ({' x '.join(map(str, array.shape))}); an image has Y, X and channels (S or C), not "
            f"{', '.join(extra)} as well. Write it again with the axes named: tifffile.imwrite(path, array, "
            "metadata={'axes': 'CYX'}), after choosing a plane or the maximum over them."
        )
    array = array[tuple(slice(None) if axis in "YXSC" else 0 for axis in axes)]
    axes = "".join(axis for axis in axes if axis in "YXSC")
    if len(axes) > 3:
        raise ValueError(f"{path} has axes {axes}: both samples (S) and channels (C). {FORMATS}")
    array = _upright(array, int(tag.value) if tag is not None else 1, axes.index("Y"))
    return array, axes.index("Y") > 0, widths[0] / widths[level]


def largest_series(tif: Any) -> int:
    """Number of the image of a TIFF with most pixels: a thumbnail may come first."""
    if not tif.series:
        raise OSError(f"{tif.filehandle.path} has no image: it is damaged, or is not what its name says. {FORMATS}")
    return max(range(len(tif.series)), key=lambda i: _pixels(tif.series[i]))


def _pixels(series: Any) -> int:
    sides = [length for axis, length in zip(series.axes, series.shape) if axis in "YX"]
    return int(np.prod(sides)) if len(sides) == 2 else 0


def _check_siblings(path: Path, tif: Any) -> None:
    """An OME-TIFF may be a set of files; those that are missing would read as zeros."""
    named = set(re.findall(r'FileName="([^"]+)"', tif.ome_metadata or ""))
    if missing := sorted(name for name in named if not (path.parent / name).is_file() and name != path.name):
        raise FileNotFoundError(
            f"{path} belongs to a set of files, and {', '.join(missing)} is not in {path.parent}. Copy them there, "
            "or write the image as one file."
        )


def _check_complete(path: Path, level: Any) -> None:
    """Parts without data would read as zeros, and those beyond the end of the file as an error of the codec."""
    size = path.stat().st_size
    for page in level.pages:
        if page is None:
            raise OSError(f"{path} is incomplete: a page is missing. Copy it again.")
        page = page.aspage() if hasattr(page, "aspage") else page
        if page.parent.filehandle.path != str(path.resolve()) and page.parent.filehandle.path != str(path):
            continue  # of another file of the set
        counts, offsets = np.asarray(page.databytecounts), np.asarray(page.dataoffsets)
        if (counts == 0).any():
            raise OSError(
                f"{path} has {int((counts == 0).sum())} parts without data, which would read as black. Copy or write it again."
            )
        if (offsets + counts).max() > size:
            raise OSError(f"{path} is cut off: it has {size:,} bytes and should have more. Copy it again.")


class _Level:
    """A level of a slide that openslide reads: y x x x 3, sliced like an array."""

    ndim, dtype, chunks = 3, np.dtype(np.uint8), (1024, 1024, 3)

    def __init__(self, slide: Any, level: int):
        self.slide, self.level, self.factor = slide, level, slide.level_downsamples[level]
        width, height = slide.level_dimensions[level]
        self.shape = (height, width, 3)

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (part.indices(length) for part, length in zip(key[:2], self.shape))
        corner = int(left * self.factor), int(top * self.factor)  # of the finest level
        region = np.asarray(self.slide.read_region(corner, self.level, (right - left, bottom - top)))
        return np.where(region[..., 3:] == 0, np.uint8(255), region[..., :3])  # what was not scanned is glass


def open_openslide(path: Path) -> Any:
    """Open a file with openslide, or say how to install it."""
    try:
        import openslide
    except ImportError as error:
        raise ImportError(f"{path.suffix} is read by openslide: pip install 'spatiaflow[wsi]'.") from error
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise OSError(f"{path} is damaged, or parts of it are missing: {error}. {FORMATS}") from error


def _open_vendor(path: Path, shrink: float) -> tuple[Any, bool, float]:
    slide = open_openslide(path)
    level = max(i for i, factor in enumerate(slide.level_downsamples) if factor <= shrink * 1.05 or i == 0)
    return _Level(slide, level), False, float(slide.level_downsamples[level])


def _open_picture(path: Path, shrink: float) -> tuple[np.ndarray, bool, float]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # slides are larger than Pillow's guard
    try:
        with Image.open(path) as image:
            width = image.width
            if shrink >= 2:
                image.draft(image.mode, (int(image.width / shrink), int(image.height / shrink)))
            factor = 2 ** round(np.log2(width / image.width))  # the sides of a coarser decoding are rounded up
            is_plain = image.mode in ("L", "RGB", "RGBA") or image.mode.startswith("I")
            picture = ImageOps.exif_transpose(image if is_plain else image.convert("RGB"))
            return np.asarray(picture), False, float(factor)
    except UnidentifiedImageError as error:
        raise OSError(f"{path} is in a format that is not known here. {FORMATS}") from error
    except OSError as error:
        if error.errno is not None:  # missing, or not readable
            raise
        raise OSError(f"{path} is damaged or cut off: {error}. Copy it again.") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _upright(array: Any, orientation: int, y: int) -> Any:
    """Turn an array as its orientation tag says (1: as it is), ``y`` being the place of its y axis."""
    import dask.array as da

    if orientation in (5, 6, 7, 8):
        array = da.swapaxes(array, y, y + 1)
    if orientation in (3, 4, 7, 8):
        array = da.flip(array, y)
    if orientation in (2, 3, 6, 7):
        array = da.flip(array, y + 1)
    return array
