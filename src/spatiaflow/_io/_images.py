"""Find the image of a slide, in AnnData or SpatialData, and where its spots lie in it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow._io._arguments import listing
from spatiaflow._io._elements import image_scales
from spatiaflow._io._files import size_of
from spatiaflow._io._pictures import candidates, check_named, pictures, pixels_of
from spatiaflow._io._pixels import as_uint8
from spatiaflow._io._scales import libraries, stated
from spatiaflow._settings import logger, warn
from spatiaflow.models.slide import ABSENT, Slide

COLOURS = {"r": "r", "red": "r", "g": "g", "green": "g", "b": "b", "blue": "b", "a": "a", "alpha": "a"}
SAME_SIZE = 0.02  # by how much sides may differ through rounding
MAX_PICTURE = 2_000_000_000  # values; a larger image is not read for the background of a figure


@dataclass
class SlideImage:
    """An image (array-like or file) and the positions of a slide's spots in its pixels."""

    source: Any  # path, or array-like c x y x (SpatialData) or y x c (others)
    xy: np.ndarray  # n x 2, pixels of the source; pixel i covers [i, i + 1)
    mpp: float  # µm per pixel of the source
    channels_first: bool
    name: str
    channels: tuple[str, ...] = ()  # names, where there are any
    affine: np.ndarray = ABSENT  # 3 x 3, SpatialData: from pixels (x, y) to the slide's coordinate system

    def is_rgb(self, n_channels: int) -> bool:
        """Whether it is a picture (H&E) and not separate channels: by the names of its channels, or three without names."""
        if self.channels in ((), ("0", "1", "2")):
            return n_channels == 3 or (n_channels == 4 and not self.channels_first)
        return _colours(self.channels) in (["r", "g", "b"], ["r", "g", "b", "a"])


def _colours(channels: Iterable[str]) -> list[str]:
    """Colours that names of channels stand for, "" for others: "Red" is one, and "RFP", a fluorescent protein, is not."""
    return [COLOURS.get(re.split("[^a-z]", name.lower())[0], "") for name in channels]


def slide_image(
    data: AnnData | SpatialData,
    slide: Slide,
    *,
    image_key: str | None = None,
    mpp: float | None = None,
    coarsest: float | None = None,
) -> SlideImage:
    """Return the image of a slide; of a multiscale image the coarsest scale that is not coarser than ``mpp``.

    ``coarsest``: µm per pixel that a picture in ``uns`` may have at most where nobody asked for it by name; ``mpp`` if None.
    """
    if isinstance(data, SpatialData):
        return _from_spatialdata(data, slide, image_key, mpp)
    return _from_anndata(data, slide, image_key, coarsest or (1.05 * mpp if mpp else np.inf), mpp)


def _from_anndata(
    adata: AnnData, slide: Slide, image_key: str | None, coarsest: float, mpp: float | None
) -> SlideImage:
    """The file of the full resolution, or an array in ``uns``: the one asked for, or the finest if it is fine enough."""
    library = libraries(adata).get(slide.name, {"images": {}, "scalefactors": {}, "metadata": {}})
    slot = f"uns['spatial'][{slide.name!r}]"
    images, path = library["images"], library["metadata"].get("source_image_path")
    if path is not None and not isinstance(path, str | PathLike):
        raise ValueError(
            f"{slot}['metadata']['source_image_path'] must be a path; it is {path!r}. Correct or delete it."
        )
    xy = _full_resolution(adata, slide, library)
    if image_key is None and path and Path(path).is_file():
        _check_size(Path(path), library, slot)
        return SlideImage(Path(path), xy, slide.mpp, False, str(path))
    if image_key is not None and image_key not in images:
        raise KeyError(f"{slot}['images'] has no {image_key!r}; it has {listing(images)}.")
    scales = {name: _scale_of(library["scalefactors"], name, slot) for name in images}
    if image_key is not None and scales[image_key] is None:
        raise KeyError(
            f"{slot}['scalefactors'] has no 'tissue_{image_key}_scalef': the pixels of this image over those of the full "
            "resolution (1.0 if it is the full resolution)."
        )
    known = {name: scale for name, scale in scales.items() if scale is not None and np.ndim(images[name]) == 3}
    coarse = ""
    if image_key is not None or known:
        key = image_key or max(known, key=lambda name: (known[name], name == "hires"))
        found = SlideImage(
            np.asarray(images[key]), xy * scales[key], slide.mpp / scales[key], False, f"{slide.name}/{key}"
        )
        limit = (
            1.05 * mpp if path and mpp else coarsest
        )  # a picture stands in for a lost file only where nothing is lost
        if image_key is not None or found.mpp <= limit:
            logger.info("slide %r: the image %r is used, %.3g µm per pixel", slide.name, key, found.mpp)
            return found
        coarse = f" images[{key!r}] has {found.mpp:.3g} µm per pixel, too coarse for {limit / 1.05:.3g}; "
        coarse += f"image_key={key!r} takes it."
    where = f"{slot}['metadata']['source_image_path']"
    if path:
        raise FileNotFoundError(
            f"{where} is {str(path)!r}, and there is no such file. Set it to the image's path.{coarse}"
        )
    raise KeyError(
        f"slide {slide.name!r} has no full-resolution image: {where} is not set. Set it to the image file, or pass the "
        f"obsm key of features made elsewhere with use_rep=.{coarse}"
    )


def _check_size(path: Path, library: dict, slot: str) -> None:
    """Warn of a file of another resolution than the positions: they would lie elsewhere on the tissue."""
    try:
        size = np.array(size_of(path), float)
    except OSError:  # opening it tells what is wrong
        return
    for name, image in library["images"].items():
        scale = _scale_of(library["scalefactors"], name, slot) if np.ndim(image) == 3 else None
        if scale is None or max(np.shape(image)[:2]) < 100:  # too few pixels to tell
            continue
        ratio = size / (np.array(np.shape(image)[1::-1]) / scale)
        if np.abs(ratio - 1).max() > SAME_SIZE:
            warn(
                f"image {str(path)!r} has {size[0]:.0f} x {size[1]:.0f} px, and by {slot}['images'][{name!r}] and its scale "
                f"factor the full resolution has {size[0] / ratio[0]:.0f} x {size[1] / ratio[1]:.0f}. Positions are of the full "
                "resolution and lie elsewhere in this file. Give the file that the positions were made with."
            )
            return


def _full_resolution(table: AnnData, slide: Slide, library: dict) -> np.ndarray:
    """Positions in pixels of the full resolution, where an integer is the middle of a pixel.

    CosMx may count y from below, while squidpy keeps the pictures upright; the labels that it keeps beside them tell.
    """
    xy = slide.xy / slide.mpp + 0.5
    if _from_below(table, slide, library):
        xy[:, 1] = len(library["images"]["segmentation"]) - xy[:, 1]
    return xy


def _from_below(table: AnnData, slide: Slide, library: dict) -> bool:
    labels, factors = library["images"].get("segmentation"), library["scalefactors"]
    if "cell_ID" not in table.obs or factors.get("tissue_hires_scalef") != 1:
        return False
    if labels is None:
        warn(
            f"slide {slide.name!r}: a CosMx may count y from the lower side of the image, and without images['segmentation'] it "
            "cannot be told. Look at pl.crops(data), and read the folder CellLabels too."
        )
        return False
    numbers = table.obs["cell_ID"].to_numpy()[slide.rows]
    x, y = np.floor(slide.xy / slide.mpp).astype(int).T
    height, width = labels.shape
    there = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y, numbers = x[there], y[there], numbers[there]
    return bool((labels[height - 1 - y, x] == numbers).sum() > (labels[y, x] == numbers).sum())


def _background_of_anndata(table: AnnData, slide: Slide, pixels: int) -> tuple[np.ndarray, float, tuple] | None:
    library = libraries(table).get(slide.name, {"images": {}, "scalefactors": {}, "metadata": {}})
    images = {name: image for name, image in library["images"].items() if np.ndim(image) == 3}
    slot = f"uns['spatial'][{slide.name!r}]"
    scales = {name: _scale_of(library["scalefactors"], name, slot) for name in images}
    known = sorted((scale, name) for name, scale in scales.items() if scale is not None)
    if not known:
        return None
    scale, name = (scales["hires"], "hires") if scales.get("hires") is not None else known[0]
    step = max(1, max(np.shape(images[name])[:2]) // (4 * pixels))
    image = _shown(np.asarray(images[name])[::step, ::step], f"{slide.name}/{name}")
    if image is None:
        return None
    return image[::-1] if _from_below(table, slide, library) else image, step * slide.mpp / scale, (0.0, 0.0)


def _scale_of(scalefactors: dict, image: str, slot: str) -> Any:
    """Pixels of an image over those of the full resolution; None where nothing says so."""
    name = f"tissue_{image}_scalef"
    if scalefactors.get(name) is None:
        return 1.0 if image == "fullres" else None
    return stated(scalefactors[name], f"{slot}['scalefactors'][{name!r}]")


def _from_spatialdata(sdata: SpatialData, slide: Slide, image_key: str | None, mpp: float | None) -> SlideImage:
    from spatialdata.transformations import get_transformation

    if image_key is not None and image_key not in sdata.images:
        raise KeyError(f"this SpatialData has no image {image_key!r}; it has {listing(sdata.images)}.")
    levels = []
    for name in [image_key] if image_key is not None else pictures(sdata, slide):
        for level in image_scales(sdata.images[name], name):
            transformations = get_transformation(level, get_all=True)
            if slide.coordinate_system not in transformations:
                raise KeyError(
                    f"image {name!r} has no transformation to {slide.coordinate_system!r}, where {slide.element!r} lies."
                )
            affine = transformations[slide.coordinate_system].to_affine_matrix(("x", "y"), ("x", "y"))
            levels.append((float(np.sqrt(abs(np.linalg.det(affine[:2, :2])))) * slide.mpp, name, level, affine))
    levels.sort(key=lambda found: found[0])
    fine = [found for found in levels if mpp is not None and found[0] <= mpp * 1.05]
    scale, name, level, affine = (fine or levels[:1])[-1]
    _check_square(affine[:2, :2], name, slide.coordinate_system)
    if image_key is not None:
        check_named(sdata, slide, image_key)
    xy = pixels_of(slide, affine)
    channels = tuple(str(name) for name in level.coords["c"].values) if "c" in level.coords else ()
    source, order = level.data, np.argsort(["rgba".find(colour) for colour in _colours(channels)])
    if (
        sorted(_colours(channels)) in (["b", "g", "r"], ["a", "b", "g", "r"]) and (np.diff(order) < 0).any()
    ):  # as of OpenCV
        source, channels = source[order], tuple(channels[i] for i in order)
    return SlideImage(source, xy, scale, True, name, channels, affine)


def _check_square(linear: np.ndarray, image_key: str, system: str | None) -> None:
    """Warn where a square of pixels is no square of tissue: patches are cut along the axes of the image."""
    wide, high = np.linalg.norm(linear, axis=0)
    skew = abs(linear[:, 0] @ linear[:, 1]) / (wide * high)
    if skew > 0.02 or abs(wide / high - 1) > 0.02:
        warn(
            f"the pixels of image {image_key!r} are not square in {system!r} ({wide:.4g} by {high:.4g}, skew {skew:.2g}); "
            "patches are cut along its own axes and show the tissue distorted."
        )


def background(
    data: AnnData | SpatialData, table: AnnData, slide: Slide, pixels: int = 600
) -> tuple[np.ndarray, float, tuple[float, float]] | None:
    """Return a small picture of the slide's tissue, its µm per pixel and its corner (µm); None where there is none.

    For an AnnData it is the "hires" image, or another whose scale is known, for a SpatialData every n-th pixel of the H&E.
    """
    if isinstance(data, AnnData):
        return _background_of_anndata(table, slide, pixels)
    extent = float(np.ptp(slide.xy, axis=0).max())
    try:
        names = candidates(data, slide)
    except KeyError:  # those of other samples
        return None
    for name in names:
        try:
            found = _from_spatialdata(data, slide, name, extent / pixels)
        except (KeyError, ValueError):  # of another sample, or a stack of planes
            continue
        linear, image = found.affine[:2, :2], found.source
        upright = np.all(np.diag(linear) > 0) and np.abs(linear - np.diag(np.diag(linear))).max() < 1e-6 * linear[0, 0]
        if not upright or not found.is_rgb(len(image)) or image.size >= MAX_PICTURE:
            continue
        step = max(1, int(extent / pixels / found.mpp))
        picture = _shown(np.asarray(image[:3, ::step, ::step]).transpose(1, 2, 0), name)
        if picture is not None:
            return picture, found.mpp * step, tuple(found.affine[:2, 2] * slide.mpp)
    return None


def _shown(image: Any, name: str) -> np.ndarray | None:
    """Return a picture (y x x x c) as uint8; None where it cannot be drawn."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        return None
    try:
        return np.asarray(as_uint8(image, name)[...])
    except ValueError as error:
        logger.warning("%s It is not drawn behind the tissue.", error)
        return None
