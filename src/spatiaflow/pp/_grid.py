"""Virtual spots on a bare image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, warn
from spatiaflow._slides.artefacts import COARSEST_UM, NO_TISSUE, SHARP_UM, artefacts_of, at_cells, named, sharpness
from spatiaflow._slides.grid import PIXELS, annotation_of, shrunk, squares, tissue_of
from spatiaflow.models.slide import MIN_TISSUE

if TYPE_CHECKING:
    from spatialdata import SpatialData

FOREIGN = 0.3  # of the tissue; more that absorbs light unlike H&E is a warning
HIRES = 2000  # pixels of the small copy of the picture, as Space Ranger writes it


@verb
def grid(
    image: str | Path | np.ndarray | SpatialData | Sequence | Mapping[str, Any],
    *,
    step_um: float = 100.0,
    region: str | Path | None = None,
    min_tissue: float = MIN_TISSUE,
    image_key: str | None = None,
    mpp: float | None = None,
) -> AnnData | list[AnnData] | dict[str, AnnData]:
    """Lay a grid of virtual spots over the tissue of an H&E image that has no measured spots.

    The result is what other functions take for a slide: encode its patches, predict its expression, draw it.

    Parameters
    ----------
    image
        Path of an image, an array (height x width x 3), a SpatialData with an image, or a WSIData of wsidata; or a list or dict
        of these. Files are TIFF (OME-TIFF, SVS, NDPI, SCN, ...), JPEG and PNG, and with the extra ``wsi`` what else openslide
        reads (MRXS, ...).
    step_um
        Side of a square, and distance between centres, µm. The best choice is the distance between the spots that a model was
        trained on: 200 µm for legacy Spatial Transcriptomics, 100 µm for Visium.
    region
        GeoJSON of annotated regions in pixels of the image, as QuPath exports it.
    min_tissue
        Share of a square that must be tissue. Other squares are left out.
    image_key
        Image of a SpatialData.
    mpp
        µm per pixel. None: what the file states (OME metadata, the scanner's entry, a microscope's resolution tag), or the
        coordinate system of a SpatialData.

    Returns
    -------
    AnnData, squares x 0 genes, or a list or dict of them:

    ``.obs_names`` : ``"<image>_<column>_<row>"``
    ``.obs["tissue"]`` : float32, share of the square that is tissue, without pen, frame and inset.
        :func:`spatiaflow.pp.encode_patches` replaces it by that of its own patch, which may be smaller, so that a few squares
        become glass
    ``.obs["artefact"]`` : categories, what spoils the square; missing where nothing does. ``"pen"`` (blue, green and black
        ink), ``"frame"`` (the dots around a Visium slide) and ``"inset"`` (a small copy in a corner, set off by black) are no
        tissue, and cover at least 5 % of the square. ``"red"`` is as red as ink: a red or pink pen, or blood of an orange
        stain; such squares stay, and a warning counts them. ``"blurred"`` is out of focus; this is judged where the
        picture has at most 2 µm per pixel, against the sharpest quarter of its squares, and such squares stay
    ``.obs["annotation"]`` : with ``region``, categories: name of the smallest region around the centre; missing outside
    ``.obsm["spatial"]`` : float64 (n, 2), centres in pixels of the image
    ``.uns["spatial"]`` : one library, with a small copy of the picture (``images["hires"]``, at most 2,000 px), its scale, and
        ``metadata`` with ``microns_per_pixel`` and ``source_image_path``; an array or element without a file is kept itself, as
        ``images["fullres"]``
    ``.uns["grid"]`` : ``step_um`` and ``params``

    Raises
    ------
    FileNotFoundError
        There is no such file.
    KeyError
        The SpatialData has no image, or several and no ``image_key``.
    TypeError
        ``image`` is none of these.
    ValueError
        The scale is not stated or is no microscope's, the image is no RGB picture, no square is tissue, or ``region`` cannot be
        read or has no polygon on the tissue.
    ImportError, OSError
        The file needs openslide, is damaged, cut off, or in a format that is not known.

    Warns
    -----
    UserWarning
        The picture is dark, as fluorescence is; its colours are not those of H&E; squares are as red as ink; ``mpp`` contradicts
        the file.

    See Also
    --------
    encode_patches : the next step.

    Examples
    --------
    >>> grid = sf.pp.grid(sdata, image_key="he", step_um=50)
    >>> grid.shape
    (16, 0)
    """
    _io.positive(step_um=step_um)
    _io.positive(None, mpp=mpp)
    _io.share(min_tissue=min_tissue)
    arguments: dict[str, Any] = {
        "step_um": step_um,
        "region": region,
        "min_tissue": min_tissue,
        "image_key": image_key,
        "mpp": mpp,
    }
    if isinstance(image, list | tuple | Mapping):
        found = {name: _grid(one, **arguments) for name, one in _io.objects_of(image).items()}
        return _io.in_form_of(image, found)
    return _grid(image, **arguments)


def _grid(image, *, step_um, region, min_tissue, image_key, mpp) -> AnnData:
    started = time.perf_counter()
    found = _io.bare_image(image, image_key=image_key, mpp=mpp)
    opened, first, factor = _io.open_image(found.source, found.channels_first, step_um / PIXELS / found.mpp)
    shape = opened.shape[1:] if first else opened.shape[:2]
    if (n := opened.shape[0 if first else 2]) not in (3, 4):
        raise ValueError(
            f"image {found.name!r} has {n} channel{'s' * (n > 1)}; H&E has red, green and blue. Of other stains no expression is "
            "predicted."
        )
    opened = _io.as_uint8(opened, found.name)
    scale = found.mpp * factor  # of what is read
    width = step_um / scale
    places = squares(shape, width)
    bar = progress(None, "looking for tissue", total=len(places), unit="square")
    tissue = tissue_of(opened, (places + 0.5) * width, width, channels_first=first, progress=bar.update)
    bar.close()
    if dark := tissue.dark:
        warn(
            f"image {found.name!r} is dark: is it fluorescence, or inverted? It is read as H&E in red, green and blue."
        )
    small, step = shrunk(opened, HIRES, channels_first=first)
    codes = np.zeros(small.shape[:2], np.uint8) if dark else artefacts_of(small, scale * step)
    spoilt = at_cells(codes, (places + 0.5) * width / step, width / step)
    cells = tissue.cells(without=(spoilt > 0) & (spoilt <= NO_TISSUE))
    share = cells.mean((1, 2), dtype=np.float32)
    kept = share >= max(min_tissue, 1e-6)
    logger.info("%r: %d of %d squares are tissue, %.3g µm per pixel", found.name, kept.sum(), len(kept), found.mpp)
    if not kept.any():
        raise ValueError(
            f"no square of image {found.name!r} is tissue (highest share {share.max():.2f}, min_tissue={min_tissue:g}). Is it "
            "empty glass?"
        )
    if not dark and (foreign := tissue.unlike_stain(kept, cells[kept])) > FOREIGN:
        warn(
            f"image {found.name!r} does not look like H&E: {foreign:.0%} of what was taken for tissue absorbs green no more than "
            "red and blue. Is it another stain, or a photograph of something else?"
        )
    places, name = places[kept], _io.plain_stem(found.name)
    xy = (places + 0.5) * step_um / found.mpp  # pixel i covers [i, i + 1)
    artefact = named(spoilt[kept], _sharpness(found, xy, step_um))
    _warn_of_red(found.name, int((artefact == "red").sum()))
    obs = pd.DataFrame(
        {Key.obs.tissue: share[kept], "artefact": artefact}, index=[f"{name}_{x}_{y}" for x, y in places]
    )
    if region is not None:
        obs["annotation"] = pd.Categorical(annotation_of(region, xy))
    out = AnnData(obs=obs)
    out.obsm[Key.obsm.spatial] = xy - 0.5  # an integer is the middle of a pixel
    out.uns[Key.uns.spatial] = {name: _library(found, opened, first, small, step * factor, step_um)}
    out.uns["grid"] = {
        "step_um": float(step_um),
        "params": _io.storable(_io.provenance(
            started, step_um=float(step_um), min_tissue=float(min_tissue), mpp=found.mpp,
            region=None if region is None else str(region), n_squares=len(kept),
        )),
    }  # fmt: skip
    return out


def _warn_of_red(name: str, n: int) -> None:
    """Ask to look at squares that may be pen or blood."""
    if n:
        warn(
            f"{n} squares of image {name!r} are as red as ink. Look at sf.pl.tissue(grid). If it is pen and not blood, "
            'drop them: grid[grid.obs["artefact"] != "red"].'
        )


def _sharpness(found, xy: np.ndarray, step_um: float) -> np.ndarray | None:
    """Sharpness of the squares around points (pixels of the full resolution); None where the picture is too coarse for it."""
    if found.mpp > COARSEST_UM:
        return None
    opened, first, factor = _io.open_image(found.source, found.channels_first, SHARP_UM / found.mpp)
    um = max(SHARP_UM, found.mpp * factor)
    bar = progress(None, "looking at the focus", total=len(xy), unit="square")
    out = sharpness(
        _io.as_uint8(opened, found.name), xy / factor, step_um / found.mpp / factor, max(16, round(step_um / um)),
        channels_first=first, progress=bar.update,
    )  # fmt: skip
    bar.close()
    return out


def _library(found, opened, first: bool, small: np.ndarray, factor: float, step_um: float) -> dict:
    """The picture of a slide as readers of Visium leave it, with a small copy, ``factor`` times coarser."""
    out = {
        "images": {"hires": small},
        "scalefactors": {"tissue_hires_scalef": 1 / factor, "spot_diameter_fullres": step_um / found.mpp},
        "metadata": {"microns_per_pixel": found.mpp},
    }
    if isinstance(found.source, Path):
        out["metadata"]["source_image_path"] = str(found.source)
    else:
        whole = opened[tuple(slice(0, n) for n in opened.shape)]
        out["images"]["fullres"] = np.ascontiguousarray(np.moveaxis(whole, 0, 2) if first else whole)
        out["scalefactors"]["tissue_fullres_scalef"] = 1.0
    return out
