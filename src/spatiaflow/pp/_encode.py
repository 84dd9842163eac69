"""Histology features of spots or cells."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io, _runs, datasets
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, settings
from spatiaflow._slides import gather
from spatiaflow.models.slide import MIN_TISSUE
from spatiaflow.pp._parts import CHECKED, Parts, checksums

if TYPE_CHECKING:
    import torch

    from spatiaflow.models import Slide, STFlow
    from spatiaflow.models.encoders import Encoder

MIN_PIXELS = 16  # of a patch, in a picture that stands in for the full resolution

Data: TypeAlias = AnnData | SpatialData


@verb
@_io.each_object
def encode_patches(
    data: Data | Sequence[Data] | Mapping[str, Data],
    *,
    model: STFlow | str | Path | None = None,
    encoder: str | Path | Callable | Encoder = "texture",
    patch_um: float = 112.0,
    resolution_um: float | None = None,
    standardize: bool = False,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    key_added: str | None = None,
    copy: bool = False,
) -> Data | list[Data] | dict[str, Data] | None:
    """Encode the patch of histology around every spot or cell.

    Patches have a physical width, ``patch_um``, and are resampled to the size that the encoder was made for. The image is
    read in parts. Beyond its border the colour of the border is repeated. Features that were made elsewhere need no call:
    store them in ``.obsm`` and pass the key as ``use_rep`` to the functions that read them.

    Parameters
    ----------
    data
        One object, or a list or dict of objects: SpatialData with an image, or AnnData whose
        ``.uns["spatial"][library]["metadata"]["source_image_path"]`` names the
        full-resolution image (JPEG, PNG, TIFF); without that file ``images["hires"]`` is taken if it is fine enough.
    model
        A model of expression (its path, or the name of weights): encode as its training slides were, with the same encoder, patch
        width, resolution and slot. ``encoder``, ``patch_um``, ``resolution_um``, ``standardize`` and ``key_added`` are not read.
    encoder
        ``"texture"``: 118 weight-free statistics of colour, stains, nuclei and texture of H&E. Otherwise the hub id or
        local folder of a vision model of transformers (DINOv2, ViT-MAE, Phikon, ...), the short name of a pathology
        model ("uni", "uni2-h", "virchow2", "gigapath", "h-optimus-0", "conch"; extra ``encoders``), what
        ``models.encoders.load_encoder`` returned, or a function from uint8 patches (n x C x h x w tensor) to features,
        whose attributes ``mpp``, ``pixels`` and ``channels`` say what it needs (else 0.5 µm per pixel, any channels).
    patch_um
        Width of a patch, µm.
    resolution_um
        µm per pixel that finer images are averaged to first. Pictures of different resolution then give features alike. None
        keeps all detail.
    standardize
        Scale the features of each slide to mean 0 and deviation 1 over its spots on tissue. This uses all of them at once:
        results are transductive, and it is recorded (``params["standardized_on"]``, the number of spots of each slide).
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData; ``image_key`` may be omitted where one image shares the spots' coordinate system. For
        an AnnData, ``image_key`` is a key of ``.uns["spatial"][library]["images"]``.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say; for a
        SpatialData, µm per unit of its coordinate system.
    batch_size
        Patches encoded at a time (64).
    device
        Overrides ``settings.device``.
    checkpoint_dir
        Folder for the features that are done, for this run alone: they are written every 20 seconds, and stay there. Nothing is
        written when None. Of a list or dict each object has a folder in it.
    resume
        Go on from what ``checkpoint_dir`` holds. The result is that of an uninterrupted run. 16 patches of each slide are encoded
        again, to see that picture and encoder are the same.
    key_added
        Slot; by default ``"X_"`` and the last part of the encoder's name.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` what was given. Sets:

    ``.obsm[key_added]`` : float32 array (n_obs, n_features)
    ``.obs["tissue"]`` : float32 in [0, 1], the share of the patch that is tissue (RGB images only), under this name whatever
        ``key_added`` is. Optical density above the glass of the same image decides; black padding and what lies outside the
        image are no tissue. A column of this name that holds something else is kept, and a warning is logged
    ``.uns[key_added]`` : dict with the encoder's ``id``, ``sha256`` of its weights, ``mpp``, ``patch_um``, ``resolution_um``,
        ``standardize``, ``n_features``, ``params`` (with ``feature_names`` where they have names), and of RGB images ``stain``:
        quartiles of the optical density of ``hematoxylin`` and ``eosin`` in the tissue of each slide's patches (slides x 3)

    Raises
    ------
    KeyError
        No image, or several and no ``image_key``.
    ValueError
        The scale is unknown, most spots lie outside of the image, the range of the image's values is not that of a picture,
        the encoder needs other channels or returns values that are not finite. ``checkpoint_dir`` holds another run or a damaged
        file, or ``resume`` has none.
    RuntimeError
        Another run uses ``checkpoint_dir``; the message names it.
    FileNotFoundError
        The image is not where ``.uns`` says.
    ImportError, OSError
        The encoder's package or weights are missing; the message says how to get them. The disk is full.

    Examples
    --------
    >>> sf.pp.encode_patches(sdata, image_key="he", patch_um=64)
    >>> sdata["table"].obsm["X_texture"].shape
    (300, 118)
    """
    from spatiaflow.models.encoders import load_encoder

    if model is not None:
        encoder, patch_um, resolution_um, standardize, key_added = _as_trained(model)
    _io.positive(patch_um=patch_um)
    _io.positive(None, resolution_um=resolution_um)
    _io.at_least_one(None, batch_size=batch_size)
    _io.slot_name(key_added)
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to continue.")
    started = time.perf_counter()
    data, table = _io.unpack(data, table_key, copy=copy)
    where = Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    slides = gather(data, where)
    target = settings.torch_device(device)
    encoder = load_encoder(encoder, device=target)
    pixels = encoder.patch_pixels(patch_um)
    key_added = key_added or Key.obsm.encoder(re.sub(r"[^A-Za-z0-9_.-]", "-", encoder.name))
    out = np.zeros((table.n_obs, 0), np.float32)
    share, standardized_on, stains = np.full(table.n_obs, np.nan, np.float32), [], []
    how = _How(encoder, float(patch_um), resolution_um, pixels, batch_size or 64, target)
    for slide, found, tissue, stain in _each(data, slides, image_key, how, checkpoint_dir, resume):
        share[slide.rows] = tissue
        stains.append(stain)
        if not out.shape[1]:
            out = np.full((table.n_obs, found.shape[1]), np.nan, np.float32)
        if standardize:
            own = found[on] if (on := ~(tissue < MIN_TISSUE)).sum() > 1 else found
            spread = np.nanstd(own, axis=0)
            found = (found - np.nanmean(own, axis=0)) / np.where(spread < 1e-6, 1, spread)
            standardized_on.append(len(own))
        out[slide.rows] = found
    _io.write_tissue(table, share)
    _io.write(
        table, key_added, arrays={"": out},
        uns={
            "id": encoder.id, "sha256": encoder.sha256, "mpp": patch_um / pixels, "patch_um": float(patch_um),
            **({"resolution_um": float(resolution_um)} if resolution_um else {}),
            "standardize": standardize, "n_features": out.shape[1], **_io.stain_entry(stains),
            "params": _io.provenance(
                started, feature_names=list(encoder.feature_names), standardized_on=standardized_on
            ),
        },
    )  # fmt: skip
    _io.remember(data, slides, mpp, spatial_key)
    return data if copy else None


def _as_trained(model: STFlow | str | Path) -> tuple[str, float, float | None, bool, str]:
    """How a model's training slides were encoded: encoder, patch_um, resolution_um, standardize and slot."""
    made = cast("STFlow", datasets.resolve(model, "STFlow")).encoder
    if "patch_um" not in made:
        raise ValueError(
            f"the model was trained on {made['n_features']} features that were made elsewhere; how is not known. Make them in "
            f"the same way and store them in obsm[{made['key']!r}]."
        )
    return made["id"], made["patch_um"], made.get("resolution_um"), bool(made.get("standardize")), made["key"]


@dataclass(frozen=True)
class _How:
    """How patches are encoded: what each of them depends on, beside the picture and its place."""

    encoder: Encoder
    patch_um: float
    resolution_um: float | None
    pixels: int
    batch_size: int
    device: torch.device

    def identity(self) -> dict[str, Any]:
        """What tells it from others. Batches and the kind of device move the last digits."""
        named = {name: getattr(self, name) for name in ("patch_um", "resolution_um", "batch_size")}
        return named | {"encoder": (self.encoder.id, self.encoder.sha256, self.pixels), "device": self.device.type}


def _each(
    data, slides: list[Slide], image_key: str | None, how: _How, folder: str | Path | None, resume: bool
) -> Iterator[tuple[Slide, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield each slide and what :func:`_encoded` returns of it; what is done is kept in a folder, if there is one."""
    folder = None if folder is None else Path(folder)
    run = how.identity() | {"slides": tuple(slide.name for slide in slides), "positions": [s.xy for s in slides]}
    with nullcontext() if folder is None else _runs.claim(folder, resume, **run):
        parts = [Parts(folder, number) for number in range(len(slides))]
        with progress(
            None, f"encoding with {how.encoder.name}", sum(map(len, slides)), "patch", initial=sum(map(len, parts))
        ) as bar:
            for slide, kept in zip(slides, parts):
                yield slide, *_encoded(data, slide, image_key, how, kept, bar)


def _encoded(
    data, slide: Slide, image_key: str | None, how: _How, parts: Parts, bar
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of all spots of one slide, n x F; of each patch the share that is tissue; quartiles of the stains, 2 x 3.

    Where the image is no RGB the last two are NaN.
    """
    from spatiaflow._slides.patches import Tissue, cut, warn_of_dark
    from spatiaflow.models.preprocess import spread

    encoder, patch_um, pixels = how.encoder, how.patch_um, how.pixels
    coarsest = max(patch_um / MIN_PIXELS, 1.05 * patch_um / pixels)
    found = _io.slide_image(data, slide, image_key=image_key, mpp=patch_um / pixels, coarsest=coarsest)
    image, channels_first, shrunk = _io.open_image(found.source, found.channels_first, patch_um / pixels / found.mpp)
    found = replace(found, xy=found.xy / shrunk, mpp=found.mpp * shrunk, channels_first=channels_first)
    used = _check(image, found, encoder, patch_um, pixels)
    sides = image.shape[:0:-1] if channels_first else image.shape[1::-1]
    there = np.flatnonzero(_io.inside(found.xy, sides, slide.name, found.name, "Their features are NaN."))
    image = _io.as_uint8(image, found.name)
    out, done = np.zeros((len(slide), 0), np.float32), np.zeros(len(slide), bool)
    size = image.shape[1:] if channels_first else image.shape[:2]
    tissue = Tissue(found.xy, patch_um / found.mpp, size) if used == 3 and found.is_rgb(3) else None
    coarse = round(patch_um / how.resolution_um) if how.resolution_um else None
    patches_at = partial(
        cut, image, width=patch_um / found.mpp, pixels=pixels, channels_first=channels_first, batch_size=how.batch_size,
        coarse=coarse,
    )  # fmt: skip
    if known := parts.read():
        some = known["rows"][spread(len(known["rows"]), CHECKED)]
        again = [
            (some[at], checksums(patches.numpy()), encoder(patches[:, :used].to(how.device)).numpy())
            for at, patches in patches_at(found.xy[some])
        ]
        parts.check(known, *map(np.concatenate, zip(*again)))
        out, done[known["rows"]] = _filled(out, known["rows"], known["features"], encoder.id), True
        if tissue is not None:
            tissue.colour[known["rows"]] = known["colour"]
    with parts:
        for at, patches in patches_at(found.xy[there], skip=done[there]):
            rows, values = there[at], encoder(patches[:, :used].to(how.device)).numpy()
            out = _filled(out, rows, values, encoder.id)
            if tissue is not None:
                tissue.add(rows, patches[:, :3])
            colour = {} if tissue is None else {"colour": tissue.colour[rows]}
            parts.add(rows, patches.numpy(), features=values, **colour)
            bar.update(len(rows))
    if tissue is not None and tissue.dark:
        warn_of_dark(found.name, "around most spots")
    if bad := int((~np.isfinite(out[there])).any(1).sum()):
        raise ValueError(f"encoder {encoder.id!r} gave NaN or infinite features for {bad} patches of {slide.name!r}.")
    if tissue is None:
        return out, np.full(len(slide), np.nan, np.float32), np.full((2, 3), np.nan)
    cells = tissue.cells()
    return out, cells.mean((1, 2), dtype=np.float32), tissue.stains(cells)


def _filled(out: np.ndarray, rows: np.ndarray, values: np.ndarray, name: str) -> np.ndarray:
    """``out`` with values (n x F) in some rows; it gets its width from the first."""
    if not out.shape[1]:
        out = np.full((len(out), values.shape[1]), np.nan, np.float32)
    if values.shape[1] != out.shape[1]:
        raise ValueError(
            f"encoder {name!r} returned {out.shape[1]} features, then {values.shape[1]}: one width is needed."
        )
    out[rows] = values
    return out


def _check(image, found, encoder, patch_um: float, pixels: int) -> int:
    """Return how many of the image's channels are used; refuse what cannot be meant."""
    mpp = patch_um / pixels
    shape = image.shape if found.channels_first else (image.shape[2], *image.shape[:2])
    used = shape[0]
    if encoder.channels == 3 and used == 4 and found.is_rgb(4):
        used = 3  # the fourth is alpha
    if encoder.channels is not None and used != encoder.channels:
        raise ValueError(
            f"encoder {encoder.id!r} needs {encoder.channels} channels; image {found.name!r} has {used}"
            f"{' (' + ', '.join(found.channels) + ')' if found.channels else ''}. Give another image_key= or encoder=, or "
            "choose channels: sdata[new_key] = sdata[image_key].sel(c=[...])."
        )
    if image.dtype != np.uint8 and not found.is_rgb(shape[0]):
        raise ValueError(
            f"image {found.name!r} is {image.dtype} and no RGB picture; patches are encoded from uint8. Scale each channel to "
            "0-255 first."
        )
    if patch_um > 4 * found.mpp * max(shape[1:]):
        raise ValueError(
            f"patch_um={patch_um:g} is many times the width of image {found.name!r}, {found.mpp * max(shape[1:]):.0f} µm."
        )
    if found.mpp > 1.5 * mpp:
        logger.warning(
            "image %r has %.3g µm per pixel, and encoder %r reads %.3g: patches are enlarged, and detail that the encoder "
            "looks for is missing",
            found.name, found.mpp, encoder.id, mpp,
        )  # fmt: skip
    if encoder.pixels and encoder.mpp and not 0.8 < mpp / encoder.mpp < 1.25:
        logger.warning(
            "encoder %r was made for %.3g µm per pixel, and a patch of %.4g µm gives it %.3g; patch_um=%.4g would fit",
            encoder.id, encoder.mpp, mpp * encoder.pixels, mpp, encoder.mpp * encoder.pixels,
        )  # fmt: skip
    return used
