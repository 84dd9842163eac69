"""Size, shape, intensity and texture of every cell."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from skimage.color import rgb2hed
from skimage.measure import regionprops
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, warn
from spatiaflow._slides.crops import Crops
from spatiaflow.models.slide import Slide

SHAPE = ("area_um2", "perimeter_um", "major_axis_um", "minor_axis_um", "eccentricity", "solidity")
FIELD = ("nuclei_per_mm2", "nuclear_share", "mean_area_um2")
INTENSITY = ("mean", "std", "contrast", "correlation")
STAINS = ("hematoxylin", "eosin")


@verb
@_io.each_object
def morphology_profile(
    data: SpatialData,
    *,
    texture_um: float = 1.0,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    mpp: float | None = None,
    key_added: str = "morphology",
    copy: bool = False,
) -> SpatialData | None:
    """Measure size, shape, intensity and texture of every cell or nucleus.

    A cell consists of the pixels whose centre lies in its polygon, circle or label, at the finest level of the image. Of a cell
    at the border the part inside the image is measured. Image and labels are read part by part. Polygons that cross themselves
    are repaired.

    A picture (channels r, g, b, or three without a name) is taken for H&E and measured as the optical density of
    hematoxylin and eosin: tissue is high and glass is 0. To measure such channels as they are, give them other names.

    Parameters
    ----------
    data
        SpatialData with an image and with polygons, circles or labels of the cells; or a list or dict of such objects.
    texture_um
        Distance of the pixels that texture compares, µm (rounded to whole pixels, at least one).
    table_key, image_key
        Table, and the image. ``image_key`` may be omitted where one image shares the cells' coordinate system.
    shapes_key, labels_key
        The element with the cells' masks. None: the element that the table annotates. Every row needs its instance there.
    library_key
        Column of ``.obs`` that tells slides apart within an element.
    mpp
        µm per unit of the coordinate system, where the data do not say.
    key_added
        Slot.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` a SpatialData. Sets:

    ``.obsm[key_added]`` : float32 DataFrame, one row a cell in the order of ``.obs``. NaN for cells outside the image, and for
        cells without area or smaller than a pixel. Columns:

        - ``area_um2``, ``perimeter_um``, ``major_axis_um``, ``minor_axis_um`` (µm², µm); ``eccentricity`` (0 is a circle) and
          ``solidity`` (area over that of the convex hull), both without a unit: :func:`skimage.measure.regionprops`
        - of each channel ``<channel>_mean`` and ``<channel>_std``, in units of the image, or optical density of
          ``hematoxylin`` and ``eosin``
        - of each channel ``<channel>_contrast``, the mean squared difference of pixels ``texture_um`` apart, and
          ``<channel>_correlation``, their correlation (1: smooth or constant, 0: grain): the contrast and correlation of a
          grey-level co-occurrence matrix in x and y, without rounding to levels

        Characters of channel names that Zarr does not keep become ``_``.
    ``.uns[key_added]`` : dict with ``params``: elements, images and their µm per pixel, channels, settings

    Raises
    ------
    TypeError
        An AnnData: it has no masks.
    KeyError
        An element is missing, or several images and no ``image_key``.
    ValueError
        The scale is unknown, rows of the table have no instance, no cell lies in the image, or slides differ in channels.

    Warns
    -----
    UserWarning
        Some cells have no pixel in the image. Or a picture taken for H&E is dark around most cells: it may be fluorescence, whose
        channels need names (``sdata.set_channel_names``), or inverted.

    Examples
    --------
    >>> sf.pp.morphology_profile(sdata, image_key="fluorescence")
    >>> sdata["table"].obsm["morphology"].columns[:2].tolist()
    ['area_um2', 'perimeter_um']
    """
    where, started = Where(table_key, image_key, shapes_key, labels_key, library_key, mpp=mpp), time.perf_counter()
    if isinstance(data, AnnData):
        raise TypeError(
            "an AnnData has no masks of cells to measure; morphology_profile needs a SpatialData with an image and polygons "
            "or labels, e.g. spatialdata_io.xenium(path) or spatialdata.SpatialData(images=..., shapes=..., tables=...)."
        )
    if shapes_key and labels_key:
        raise ValueError("give shapes_key= or labels_key=, not both: a cell has one mask.")
    _io.positive(texture_um=texture_um)
    data, table = _io.unpack(data, table_key, copy=copy)
    slides = _io.places(data, where, missing=True)
    out: Any = None
    channels: list[str] | None = None
    images = []
    bar = progress(None, "measuring cells", total=sum(len(slide.rows) for slide in slides), unit="cell")
    for slide in slides:
        found = _io.slide_image(data, slide, image_key=image_key)
        image, _, _ = _io.open_image(found.source, found.channels_first)
        is_rgb = found.is_rgb(image.shape[0])
        image = _io.as_uint8(image, found.name) if is_rgb else image
        names = list(STAINS) if is_rgb else _column_names(found.channels)
        if channels is None:
            channels = names
            columns = [*SHAPE, *(f"{name}_{statistic}" for name in channels for statistic in INTENSITY)]
            out = np.full((table.n_obs, len(columns)), np.nan, np.float32)
        elif names != channels:
            raise ValueError(f"image {found.name!r} has channels {names}; those of the slides before are {channels}.")
        if is_rgb:
            logger.info("image %r is measured as H&E: optical density of hematoxylin and eosin", found.name)
        masks = _io.masks(data, table, slide, found)
        out[slide.rows] = _profiles(image, masks, found, texture_um, is_rgb, bar)
        images.append(found)
        _report(out[slide.rows], masks.bounds, image.shape, slide, found)
    bar.close()
    _io.write(
        table, key_added, arrays={"": pd.DataFrame(out, index=table.obs_names, columns=columns)},
        uns={
            "params": _io.provenance(
                started, elements=list(dict.fromkeys(slide.element for slide in slides)), channels=channels,
                images=[found.name for found in images], mpp=[found.mpp for found in images],
                texture_um=float(texture_um),
            ),
        },
    )  # fmt: skip
    _io.remember(data, slides, mpp)
    return data if copy else None


@verb
@_io.each_object
def image_profile(
    data: AnnData
    | Crops
    | np.ndarray
    | Sequence[AnnData | Crops | np.ndarray]
    | Mapping[str, AnnData | Crops | np.ndarray],
    *,
    channels: Sequence[str] | None = None,
    mpp: float | None = None,
    nuclei: str | None = None,
    whole: bool = False,
) -> pd.DataFrame | list[pd.DataFrame] | dict[str, pd.DataFrame]:
    """Measure the cell in the middle of each image, without polygons.

    Use it for generated images, and for real images to compare with them. The nucleus is brighter than Otsu's threshold in the
    channel of nuclei. Touching nuclei are split by a watershed of the distance to their border, and the one nearest to the
    middle is measured.

    Parameters
    ----------
    data
        Images, n x channels x pixels x pixels, or the result of :func:`spatiaflow.tl.generate_morphology` or of
        :func:`spatiaflow.pp.crops`; or a list or dict of these.
    channels
        Names of the channels. Needed for arrays; otherwise they come from ``data``.
    mpp
        µm per pixel. Needed for arrays; otherwise it comes from ``data``.
    nuclei
        Channel that shows nuclei. If None, the first channel whose name contains "dapi", else the first channel.
    whole
        Measure the whole image instead of one cell, for tiles: density, covered share and mean area of the nuclei, and each
        channel over all pixels.

    Returns
    -------
    DataFrame, or a list or dict of them. It has one row per image and the columns of :func:`morphology_profile`: shape in µm, and
    mean, standard deviation, contrast and correlation of each channel inside the nucleus. Values are NaN if no nucleus is found.
    With ``whole`` the columns ``nuclei_per_mm2``, ``nuclear_share`` and ``mean_area_um2`` replace the shape.

    Raises
    ------
    ValueError
        The number of channels differs from the images', ``nuclei`` is no channel, or channels or scale are not known.

    Examples
    --------
    >>> crops = sf.pp.crops(sdata, image_key="fluorescence")
    >>> sf.pp.image_profile(crops).columns[:2].tolist()
    ['area_um2', 'perimeter_um']
    """
    if isinstance(data, Crops):
        names, scale, parts = channels or data.channels, data.scale, []
        for rows, found in data.batches():
            for size in np.unique(scale[rows]):
                same = scale[rows] == size
                part = measured(found.numpy()[same], names, mpp or size, nuclei=nuclei, whole=whole)
                parts.append(part.set_index(rows[same]))
        return pd.concat(parts).sort_index()
    if isinstance(data, AnnData):
        known = _io.entry(data, "morphology")
        if "image" not in data.obsm or "channels" not in known:
            raise KeyError(
                "obsm has no 'image' with uns['morphology']. Give the result of sf.tl.generate_morphology(...)."
            )
        images, channels, mpp = data.obsm["image"], channels or known["channels"], mpp or known["mpp"]
    else:
        images = np.asarray(data)
    if channels is None or mpp is None:
        raise ValueError("images alone do not say what they show: give channels= and mpp= (µm per pixel).")
    return measured(images, channels, mpp, nuclei=nuclei, whole=whole)


def measured(
    images: np.ndarray, channels: Sequence[str], mpp: float, *, nuclei: str | None = None, whole: bool = False
) -> pd.DataFrame:
    """Return what :func:`image_profile` returns, for an array of images."""
    channels = list(map(str, channels))
    if images.ndim != 4 or images.shape[1] != len(channels):
        raise ValueError(f"images must be n x {len(channels)} channels x pixels x pixels; they are {images.shape}.")
    if nuclei is None:
        nuclei = next((name for name in channels if "dapi" in name.lower()), channels[0])
    if nuclei not in channels:
        raise ValueError(f"nuclei={nuclei!r} is no channel; there are {', '.join(channels)}.")
    which, step = channels.index(nuclei), max(1, round(1.0 / mpp))
    names = [f"{name}_{kind}" for name in _column_names(tuple(channels)) for kind in INTENSITY]
    shape = FIELD if whole else SHAPE
    out = np.full((len(images), len(shape) + len(names)), np.nan)
    for row, image in zip(out, images):
        bright = image[which].astype(np.float64)
        if np.ptp(bright) == 0:
            continue
        blobs = _nuclei(bright, mpp)
        if whole:
            mask, first = np.ones(blobs.shape, bool), _field(blobs, mpp)
        else:
            at = np.argwhere(blobs)
            if not len(at):  # the border of what is bright is deepest outside of it, as in a small ring
                continue
            nearest = at[((at - (np.array(blobs.shape) - 1) / 2) ** 2).sum(1).argmin()]
            mask = blobs == blobs[tuple(nearest)]
            first = _shape(mask, mpp)
        row[:] = np.concatenate([first, _intensity(image.astype(np.float64), mask, step).ravel()])
    return pd.DataFrame(out, columns=[*shape, *names])


def _field(parts: np.ndarray, mpp: float) -> np.ndarray:
    """Return density, share and mean area of nuclei, in the order of ``FIELD``."""
    n, covered = parts.max(), (parts > 0).sum()
    return np.array([1e6 * n / (parts.size * mpp**2), covered / parts.size, covered * mpp**2 / max(n, 1)])


def _nuclei(bright: np.ndarray, mpp: float, smooth_um: float = 0.75) -> np.ndarray:
    """Return the nuclei of a picture as numbers from 1; 0 is background."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter, label, maximum_filter
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    nuclei = bright > threshold_otsu(bright)
    depth = gaussian_filter(distance_transform_edt(nuclei), smooth_um / mpp)
    peaks = nuclei & (depth == maximum_filter(depth, 2 * max(1, round(2 * smooth_um / mpp)) + 1))
    return watershed(-depth, label(peaks)[0], mask=nuclei)


def _column_names(channels: tuple[str, ...]) -> list[str]:
    """Return names of channels that a column can have: Xenium has 'ATP1A1/CD45/E-Cadherin', unnamed channels are numbers."""
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", f"channel_{name}" if name.isdigit() else name) for name in channels]
    if len(set(names)) < len(names):
        raise ValueError(
            f"channels {list(channels)} have the same names; rename them with sdata.set_channel_names(...)."
        )
    return names


def _profiles(image, masks, found: _io.SlideImage, texture_um: float, is_rgb: bool, bar) -> np.ndarray:
    """Measure the cells, reading one tile of the image after the other; n x features, NaN where there is no pixel."""
    from spatiaflow._slides.patches import DARK, by_tile, warn_of_dark

    step = max(1, round(texture_um / found.mpp))
    n_channels, height, width = image.shape
    n_features = len(SHAPE) + len(INTENSITY) * (len(STAINS) if is_rgb else n_channels)
    windows = np.clip(masks.bounds, 0, [width, height, width, height])
    out = np.full((len(windows), n_features), np.nan)
    inside = np.flatnonzero((windows[:, 2:] > windows[:, :2]).all(1))
    bar.update(len(windows) - len(inside))
    dark = []
    for group in by_tile((windows[inside, :2] + windows[inside, 2:]) / 2):
        rows = inside[group]
        left, top = windows[rows, :2].min(0)
        right, bottom = windows[rows, 2:].max(0)
        block = np.asarray(image[:, top:bottom, left:right])
        for row, mask in zip(rows, masks.inside(rows, windows[rows])):
            if mask.any():
                x0, y0, x1, y1 = windows[row] - [left, top, left, top]
                values = block[:, y0:y1, x0:x1]
                _io.check_finite(np.where(mask, values, 0), found.name, found.channels)
                values = _optical_density(values[:3]) if is_rgb else values.astype(np.float64)
                out[row] = np.concatenate([_shape(mask, found.mpp), _intensity(values, mask, step).ravel()])
                if is_rgb:  # a nucleus may be dark, what lies around it is not
                    high, wide = (y1 - y0) // 2 + 1, (x1 - x0) // 2 + 1
                    around = block[:3, max(0, y0 - high) : y1 + high, max(0, x0 - wide) : x1 + wide]
                    dark.append((around.max(0) < DARK).mean() > 0.5)
        bar.update(len(rows))
    if dark and np.mean(dark) > 0.5:
        warn_of_dark(found.name, "around most cells")
    return out


def _optical_density(rgb: np.ndarray) -> np.ndarray:
    """Return the decadic optical density of hematoxylin and eosin. scikit-image returns it in units of 6."""
    return 6 * rgb2hed(rgb.transpose(1, 2, 0))[..., :2].transpose(2, 0, 1)


def _shape(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Return size and form of a mask, in the order of ``SHAPE``."""
    (region,) = regionprops(mask.view(np.uint8))
    lengths = np.array([region.perimeter, region.axis_major_length, region.axis_minor_length]) * mpp
    return np.array([region.area * mpp**2, *lengths, region.eccentricity, region.solidity])


def _intensity(values: np.ndarray, mask: np.ndarray, step: int) -> np.ndarray:
    """Return statistics of each channel (C x y x x) inside a mask: C x 4, in the order of ``INTENSITY``."""
    own = values[:, mask]
    # pairs of pixels of the cell, one step apart along y or x
    down, right = mask[step:] & mask[:-step], mask[:, step:] & mask[:, :-step]
    a = np.concatenate([values[:, step:][:, down], values[:, :, step:][:, right]], 1)
    b = np.concatenate([values[:, :-step][:, down], values[:, :, :-step][:, right]], 1)
    if not a.shape[1]:
        return np.stack([own.mean(1), own.std(1), np.zeros(len(own)), np.ones(len(own))], 1)
    # a co-occurrence matrix counts each pair both ways, so both sides have one mean and one variance
    centre = (a.mean(1) + b.mean(1)) / 2
    variance = ((a - centre[:, None]) ** 2 + (b - centre[:, None]) ** 2).mean(1) / 2
    contrast = ((a - b) ** 2).mean(1)
    flat = variance < 1e-12
    correlation = np.where(flat, 1.0, 1 - contrast / np.where(flat, 1.0, 2 * variance))
    return np.stack([own.mean(1), own.std(1), contrast, correlation], 1)


def _report(
    values: np.ndarray, bounds: np.ndarray, shape: tuple[int, ...], slide: Slide, found: _io.SlideImage
) -> None:
    """Warn of cells that could not be measured. Raise an error when none could."""
    missing = int(np.isnan(values[:, 0]).sum())
    if not missing:
        return
    size = [shape[2], shape[1]]
    has_area = (bounds[:, 2:] > bounds[:, :2]).all(1)
    outside = int((has_area & ((bounds[:, 2:] <= 0) | (bounds[:, :2] >= size)).any(1)).sum())
    message = (
        f"{missing} of {len(values)} cells of slide {slide.name!r} have no pixel in image {found.name!r} "
        f"({size[0]} x {size[1]} px): {outside} lie outside of it, {missing - outside} have no area or are smaller than a "
        f"pixel"
    )
    if missing == len(values):
        raise ValueError(f"{message}. Do the transformations of {slide.element!r} and of the image agree?")
    warn(f"{message}. Their rows are NaN.")
