"""Cell, niche and tissue embeddings by SPATIA."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed, settings

if TYPE_CHECKING:
    from spatiaflow.models import Spatia

DEFAULT_WEIGHTS = "spatia-pancreas-small"


def train_spatia(
    data: AnnData | SpatialData | list[AnnData | SpatialData] | str | Path,
    *,
    modalities: tuple[str, ...] = ("image", "genes"),
    init: Spatia | str | Path | None = None,
    losses: dict[str, float] | None = None,
    genes: list[str] | None = None,
    channels: dict[str, str] | None = None,
    crop_um: float = 20.4,
    layer: str | None = None,
    preset: dict | None = None,
    validation: list[str] | float = 0.1,
    max_epochs: int = 20,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    devices: int | str = 1,
    precision: str = "32-true",
    workers: int = 0,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    device: str | None = None,
    random_state: int | None = None,
) -> Spatia:
    """Train SPATIA on the cells of one or many slides, without labels.

    Losses, each of which has a name and a weight: ``genes`` (counts of a cell from those of its genes that are not
    hidden, negative binomial), ``image_to_genes`` (all counts from the image alone), ``reconstruction`` (masked patches
    of the image), ``contrast`` (a cell's image finds its genes among a batch), ``niche`` and ``tissue`` (the counts of
    cells that are hidden altogether, from their surroundings).

    Parameters
    ----------
    data
        One object, or a list with one or more slides each. Panels and channels may differ between them: what a slide
        lacks is masked there. Or the path of a manifest, a CSV with a SpatialData store a row (columns ``store`` and, where
        needed, ``tissue``, ``platform``, ``table_key``, ``image_key``, ``shapes_key``, ``labels_key``, ``library_key``,
        ``mpp``): counts and images then stay on disk and are read region by region.
    modalities
        ``"image"``, ``"genes"`` or both.
    init
        A model to go on from; its vocabulary and sizes are kept.
    losses
        Weights that differ from the defaults; 0 switches a loss off.
    genes
        Vocabulary; all genes of all slides when None.
    channels
        Names of a slide's channels that the model calls otherwise, ``{"DAPI": "dapi"}``.
    crop_um
        Side of a cell's crop.
    layer
        Layer with raw counts; None reads ``X``.
    preset
        Sizes of the network that differ from :class:`spatiaflow.models.SpatiaConfig`'s.
    validation
        Names of slides, or the fraction of each slide that is held out as one contiguous band, with a gap beside it, to
        choose the epoch.
    max_epochs
        Epochs.
    checkpoint_dir
        Folder for the state of the training; nothing is written when None.
    resume
        Go on from what ``checkpoint_dir`` holds.
    devices, precision
        Passed to :class:`lightning.Trainer`.
    workers
        Processes that read batches while the model trains; 0 reads between the steps.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say; for a
        SpatialData, µm per unit of its coordinate system.
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None.

    Returns
    -------
    :class:`spatiaflow.models.Spatia`, with ``.history``, ``.card`` and ``.save(path)``.

    Raises
    ------
    KeyError
        An element, a layer or every channel is missing.
    ValueError
        Counts are not raw, the scale is unknown, or an image is smaller than a crop.

    See Also
    --------
    embed_spatia : apply the model.

    Examples
    --------
    A small network for one epoch, so that it takes seconds:

    >>> slides = [sf.datasets.simulated_tissue(80, seed=seed) for seed in (1, 2)]
    >>> small = {"width": 32, "crop_pixels": 16}
    >>> model = sf.tl.train_spatia(slides, image_key="fluorescence", preset=small, max_epochs=1)
    >>> model
    Spatia: 60 genes, channels dapi, bound, rna, prot, width 32, 20.4 µm crops
    >>> sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence")
    """
    from spatiaflow import models
    from spatiaflow.models.encoders._cell import published_mae
    from spatiaflow.models.spatia import SpatiaConfig
    from spatiaflow.tl import _cells as cells
    from spatiaflow.train.spatia import LOSSES, fit_spatia, hold_out

    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to go on with.")
    _io.at_least_one(max_epochs=max_epochs)
    _io.positive(crop_um=crop_um)
    _io.known_names(LOSSES, losses=losses)
    if losses and (min(losses.values()) < 0 or not any((LOSSES | losses).values())):
        raise ValueError(f"weights of losses must not be negative, nor all 0; they are {losses}.")
    modalities = cells.check_modalities(modalities)
    if init is not None:
        init = init if isinstance(init, models.Spatia) else models.load(cells.file_of(init))
        if not isinstance(init, models.Spatia):
            raise TypeError(f"init must be a Spatia, not a {type(init).__name__}.")
        crop_um = init.config.crop_um
    preset, backbone = dict(preset or {}), None
    if isinstance(preset.get("backbone"), str | Path):
        preset["backbone"], backbone = published_mae(str(preset["backbone"]))
    try:
        sizes = SpatiaConfig([], [], **({"crop_um": crop_um} | preset)) if init is None else init.config
    except TypeError as error:
        raise ValueError(f"preset holds what models.SpatiaConfig has no name for: {error}.") from error
    width = None if sizes.adaptive else sizes.crop_um
    options = {"modalities": modalities, "crop_um": width, "crop_pixels": sizes.crop_pixels, "layer": layer}
    named = {}
    if isinstance(data, str | Path):
        for part in cells.read_corpus(data, **options):
            named[part.slide.name] = part
    else:
        found = _io.collect(
            data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
            spatial_key=spatial_key, mpp=mpp,
        )  # fmt: skip
        for one, table, slides in found:
            own = list(slides.values())
            named |= zip(slides, cells.parts(one, table, own, image_key=image_key, **options))
    cells.share_memory([*named.values()])
    if init is not None:
        config = init.config
        for part in named.values() if "genes" in modalities else ():
            cells.check_coverage(part.genes, config.genes)
    else:
        known, seen = channels or {}, [part.crops.channels for part in named.values() if part.crops is not None]
        config = replace(
            sizes,
            genes=_distinct(genes or (g for part in named.values() for g in part.genes))
            if "genes" in modalities
            else [],
            channels=_distinct(str(known.get(name, name)).lower() for names in seen for name in names),
            pitch_um=float(np.median([part.slide.pitch for part in named.values()])),
        )
    ready, boxes = [], {}
    for name, part in named.items():
        boxes[name] = {"n_obs": len(part.slide.rows), "box_um": [*part.slide.xy.min(0), *part.slide.xy.max(0)]}
        slide = cells.cell_slide(part, config.genes, config.channels, channels, name)
        ready.append(slide.take(np.flatnonzero(part.inside)) if "image" in modalities else slide)
    validation = _io.held_out(validation, boxes)
    training, held_out = hold_out(ready, validation, 2 * config.anchor_um)
    if genes is not None and (unknown := sorted(set(genes) - {g for part in named.values() for g in part.genes})):
        raise ValueError(f"genes= names {len(unknown)} that no slide measures, such as {unknown[0]!r}.")
    depth = [np.asarray(s.counts[s.spread(4000)].sum(1)).ravel() for s in training if s.counts is not None]
    target_sum = init.target_sum if init else max(float(np.median(np.concatenate(depth))), 1.0) if depth else 1.0
    standard = {s.name: s.standardised(target_sum).standard for s in ready}  # of whole slides
    training, held_out = ([replace(s, standard=standard[s.name]) for s in part] for part in (training, held_out))
    target = settings.torch_device(device)
    card = {
        "data": boxes, "modalities": list(modalities), "intensity": cells.intensity_of(training, config.channels),
        "spatiaflow": spatiaflow.__version__,
    }  # fmt: skip
    logger.info("training SPATIA on %d cells of %d slide(s), device %s", sum(map(len, training)), len(ready), target)
    return fit_spatia(
        training, config, card=card, target_sum=target_sum, losses=losses, validation=held_out, init=init,
        max_epochs=max_epochs, checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume,
        accelerator={"cuda": "gpu"}.get(target.type, target.type), devices=devices, precision=precision, workers=workers,
        seed=resolve_seed(random_state), backbone=backbone,
    )  # fmt: skip


def _distinct(names) -> list[str]:
    return list(dict.fromkeys(names))


def embed_spatia(
    data: AnnData | SpatialData,
    *,
    model: Spatia | str | Path | None = None,
    levels: tuple[str, ...] = ("cell", "niche", "tissue"),
    modalities: tuple[str, ...] = ("image", "genes"),
    channels: dict[str, str] | None = None,
    layer: str | None = None,
    scaling: str = "slide",
    attention: bool = False,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    key_added: str = "X_spatia",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Embed every cell by itself, in its niche and in its tissue.

    The cell level fuses a cell's image and its genes; the niche level looks at the cells around, the tissue level at
    several hundred µm around them. Nothing is random: the same call gives the same bytes. Images are read part by part.

    Parameters
    ----------
    data
        Cells with positions, and raw counts or an image or both.
    model
        A trained model, the path of a saved one, or the name of weights that :func:`spatiaflow.datasets.weights` lists;
        "spatia-pancreas-small" when None.
    levels
        ``"cell"``, ``"niche"``, ``"tissue"``, or some of them.
    modalities
        ``"image"``, ``"genes"`` or both. What is left out is replaced by a learned token.
    channels
        Names of the image's channels that the model calls otherwise, ``{"DAPI": "dapi"}``. Channels that the model
        does not know are left out, those that the image lacks are masked.
    layer
        Layer with raw counts; None reads ``X``.
    scaling
        Of image intensities and of genes: ``"slide"`` by the slide's own cells (percentiles; mean and deviation of each
        gene), which evens out stain, exposure and batch but looks at all cells at once (transductive; it is recorded), or
        ``"training"`` by those of the training slides: for a part of a slide, or one of unlike composition.
    attention
        Also write how much each neighbour weighs in a cell's niche.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData; ``image_key`` may be omitted where one image shares the cells' coordinate system.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say; for a
        SpatialData, µm per unit of its coordinate system.
    batch_size
        Cells encoded at a time (512).
    device
        Overrides ``settings.device``.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obsm[f"{key_added}_cell"]``, ``[f"{key_added}_niche"]``, ``[f"{key_added}_tissue"]`` : float32 array (n_obs, width)
    ``.obsm[key_added]`` : float32 array (n_obs, levels x width), the levels side by side, each scaled to unit norm
    ``.obsp[f"{key_added}_attention"]`` : CSR (n_obs, n_obs), with ``attention=True``; a row sums to 1
    ``.uns[key_added]`` : dict with ``levels``, ``gene_coverage``, ``channels`` (those used) and ``params``

    Raises
    ------
    KeyError
        An element is missing, or the model knows no channel of the image.
    ValueError
        Too few of the model's genes are measured, counts are not raw, or the scale is unknown.

    Examples
    --------
    >>> sf.tl.embed_spatia(sdata, modalities="image", image_key="fluorescence")
    >>> sdata["table"].obsm["X_spatia_niche"].shape
    (300, 128)
    """
    from spatiaflow import models
    from spatiaflow.models.spatia import LEVELS
    from spatiaflow.tl import _cells

    started = time.perf_counter()
    _io.at_least_one(batch_size=batch_size)
    _io.slot_name(key_added)
    modalities = _cells.check_modalities(modalities)
    levels = (levels,) if isinstance(levels, str) else tuple(levels)
    if not levels or set(levels) - set(LEVELS):
        raise ValueError(f"levels must be among {', '.join(LEVELS)}, not {levels!r}.")
    if scaling not in ("slide", "training"):
        raise ValueError(f"scaling must be 'slide' or 'training', not {scaling!r}.")
    if not isinstance(model, models.Spatia):
        model = models.load(_cells.file_of(model or DEFAULT_WEIGHTS))
    if not isinstance(model, models.Spatia):
        raise TypeError(f"model must be a Spatia, not a {type(model).__name__}.")
    for modality, known in (("image", model.config.channels), ("genes", model.config.genes)):
        if modality in modalities and not known:
            raise ValueError(
                f"the model was trained without {modality}; leave it out, with modalities='image' or 'genes'."
            )
    data, table = _io.unpack(data, table_key, copy=copy)
    slides = _io.slides(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
        spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    c = model.config
    found = _cells.parts(
        data, table, slides, modalities=modalities, crop_um=None if c.adaptive else c.crop_um,
        crop_pixels=c.crop_pixels, layer=layer, image_key=image_key,
    )  # fmt: skip
    coverage = _cells.check_coverage(list(table.var_names), c.genes) if "genes" in modalities else 0.0
    cells = [_cells.cell_slide(part, c.genes, c.channels, channels, part.slide.name) for part in found]
    if scaling == "training":
        cells = [_cells.with_intensity(one, model.card["intensity"], c.channels) for one in cells]
    elif "genes" in modalities:
        cells = [one.standardised(model.target_sum, model.network.gene.standard.cpu().numpy()) for one in cells]
    target, size = settings.torch_device(device), batch_size or 512
    out = {level: np.full((table.n_obs, c.width), np.nan, np.float32) for level in levels}
    looks = []  # row, column and weight of the attention
    bar = progress(None, "embedding", total=sum(map(len, cells)), unit="cell")
    for part, one in zip(found, cells):
        rows = part.slide.rows
        levels_of = model.embed(
            one, part.inside, batch_size=size, device=target, levels=levels, update=bar.update, attention=attention
        )
        if attention:
            weight = levels_of.pop("attention").tocoo()
            looks.append((rows[weight.row], rows[weight.col], weight.data))
        for level, values in levels_of.items():
            out[level][rows] = values
    bar.close()
    if attention:
        row, column, weight = (np.concatenate(v) for v in zip(*looks))
        table.obsp[f"{key_added}_attention"] = sparse.csr_matrix((weight, (row, column)), (table.n_obs, table.n_obs))
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in out.values()]
    used = [name for i, name in enumerate(c.channels) if any(len(p.channels) and p.channels[i] >= 0 for p in cells)]
    params = {
        "model_sha256": model.sha256, "levels": list(levels), "modalities": list(modalities), "crop_um": c.crop_um,
        "scaling": scaling, "transductive": scaling == "slide",
        "spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    for level in set(LEVELS) - set(levels):  # of an earlier call: no longer what uns speaks of
        table.obsm.pop(f"{key_added}_{level}", None)
    if not attention:
        table.obsp.pop(f"{key_added}_attention", None)
    _io.write(
        table, key_added, arrays={**{f"_{level}": v for level, v in out.items()}, "": np.concatenate(unit, 1)},
        uns={"levels": list(levels), "gene_coverage": coverage, "channels": used, "params": params},
    )  # fmt: skip
    return data if copy else None
