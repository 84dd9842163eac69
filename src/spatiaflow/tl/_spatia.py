"""Cell, niche and tissue embeddings by SPATIA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, resolve_seed, settings
from spatiaflow.datasets._weights import resolve
from spatiaflow.models.slide import LEVELS
from spatiaflow.tl._trust import warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models import Spatia, SpatiaConfig
    from spatiaflow.models.slide import Slide

DEFAULT_WEIGHTS = "spatia-pancreas-small"
MODALITIES = ("image", "genes")
MIN_COVERAGE = 0.1  # of the model's genes: with fewer an embedding would rest on what the model was never shown


@verb
def train_spatia(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData] | str | Path,
    *,
    modalities: Sequence[str] | str = ("image", "genes"),
    init: Spatia | str | Path | None = None,
    genes: str | Sequence[str] | None = None,
    channels: Mapping[str, str] | None = None,
    layer: str | None = None,
    config: SpatiaConfig | str | None = None,
    validation: Sequence[str] | float = 0.1,
    max_epochs: int = 20,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
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

    Cells predict their hidden genes, their genes from their image, and the genes of hidden neighbours from their
    surroundings. :class:`spatiaflow.models.SpatiaConfig` lists the losses.

    Parameters
    ----------
    data
        One object, or a list or dict of objects with one or more slides each. Panels and channels may differ between
        slides: what a slide lacks is masked. Or the path of a manifest, a CSV with one SpatialData store per row (columns
        ``store`` and, where needed, ``tissue``, ``platform``, ``table_key``, ``image_key``, ``shapes_key``, ``labels_key``,
        ``library_key``, ``mpp``). Counts and images of a manifest stay on disk and are read region by region.
    modalities
        ``"image"``, ``"genes"`` or both.
    init
        A model to continue from: a model, the path of a saved one, or the name of weights. Its vocabulary and sizes are
        kept.
    genes
        Vocabulary; all genes of all slides when None.
    channels
        Names of channels that the model calls otherwise, ``{"DAPI": "dapi"}``.
    layer
        Layer with raw counts; None reads ``X``.
    config
        A :class:`spatiaflow.models.SpatiaConfig` with sizes (such as ``crop_um`` and ``width``), losses and devices;
        ``"default"`` when None.
    validation
        Names of slides, or the fraction of each slide that is held out as one contiguous band with a gap beside it. The
        epoch is chosen on it.
    max_epochs
        Epochs.
    checkpoint_dir
        Folder for the state of the training, for this run alone; nothing is written when None.
    resume
        Continue from what ``checkpoint_dir`` holds. The model is that of an uninterrupted run.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not state it. For
        a SpatialData, µm per unit of its coordinate system.
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
        Counts are not raw, the scale is unknown, an image is smaller than a crop, a loss or gene is unknown, or
        ``checkpoint_dir`` holds another run or a damaged file.
    TypeError
        ``init`` or ``config`` is of another kind.
    RuntimeError
        Another run uses ``checkpoint_dir``; the message names it.
    OSError
        The disk is full.

    See Also
    --------
    embed_spatia : apply the model.

    Examples
    --------
    A small network and a few batches take seconds:

    >>> slides = [sf.datasets.simulated_tissue(80, seed=seed) for seed in (1, 2)]
    >>> small = sf.models.SpatiaConfig(width=32, crop_pixels=16, batches_per_epoch=4)
    >>> model = sf.tl.train_spatia(slides, image_key="fluorescence", config=small, max_epochs=1)
    >>> model
    Spatia: 60 genes, channels dapi, bound, rna, prot, width 32, 20.4 µm crops
    >>> sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence")
    """
    from spatiaflow import models
    from spatiaflow._slides.crops import share_memory
    from spatiaflow.train.spatia import train_spatia as train

    where = _io.Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    modalities = check_modalities(modalities)
    _io.at_least_one(max_epochs=max_epochs)
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to continue.")
    config = models.SpatiaConfig.of(config)
    if init is not None:
        init = cast("Spatia", resolve(init, "Spatia", argument="init"))
        config = config.with_sizes_of(init.config)
    genes = _io.names(genes, "genes")
    _io.renames(channels=channels)
    if validation is None:
        raise ValueError("validation must be a fraction, or names of slides, not None.")
    slides = cells(data, where, modalities, config, layer)
    share_memory(slides)
    _io.check_spelling([slide.genes for slide in slides])
    if single := [slide.name for slide in slides if len(slide) < 2]:
        raise ValueError(f"slide {single[0]!r} has a single cell; leave it out of the training.")
    if init is not None and "genes" in modalities:
        for slide in slides:
            gene_coverage(slide.genes, config.genes)
    target = settings.torch_device(device)
    return train(
        slides, config, genes=genes, channels=channels, init=init,
        validation=cast("Any", _io.held_out(validation, [slide.name for slide in slides])), max_epochs=max_epochs,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume,
        accelerator={"cuda": "gpu"}.get(target.type, target.type), seed=resolve_seed(random_state),
    )  # fmt: skip


@verb
@_io.each_object
def embed_spatia(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    model: Spatia | str | Path | None = None,
    levels: Sequence[str] | str = ("cell", "niche", "tissue"),
    modalities: Sequence[str] | str = ("image", "genes"),
    channels: Mapping[str, str] | None = None,
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
) -> AnnData | SpatialData | list | dict | None:
    """Embed every cell by itself, in its niche and in its tissue.

    The cell level fuses a cell's image and its genes. The niche level adds the cells around it, the tissue level several
    hundred µm around it. Nothing is random: the same call gives the same values. Images are read part by part.

    Parameters
    ----------
    data
        Cells with positions, and raw counts or an image or both; or a list or dict of such objects.
    model
        A trained model, the path of a saved one, or the name of weights that :func:`spatiaflow.datasets.weights` lists;
        "spatia-pancreas-small" when None.
    levels
        ``"cell"``, ``"niche"``, ``"tissue"``, or some of them.
    modalities
        ``"image"``, ``"genes"`` or both. A modality that is left out is replaced by a learned token.
    channels
        Names of the image's channels that the model calls otherwise, ``{"DAPI": "dapi"}``. Channels that the model
        does not know are left out. Channels that the image lacks are masked.
    layer
        Layer with raw counts; None reads ``X``.
    scaling
        How image intensities and genes are scaled. ``"slide"``: by the slide's own cells (percentiles; mean and standard
        deviation of each gene). This reduces differences of stain, exposure and batch, but an embedding then depends on
        all cells of the slide (transductive; recorded in ``params``). ``"training"``: by the training slides, for a part
        of a slide or a slide of unusual composition.
    attention
        Also write how much each neighbour weighs in a cell's niche.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData; ``image_key`` may be omitted where one image shares the cells' coordinate system.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not state it. For
        a SpatialData, µm per unit of its coordinate system.
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
    None, or with ``copy=True`` what was given. Sets:

    ``.obsm[f"{key_added}_cell"]``, ``[f"{key_added}_niche"]``, ``[f"{key_added}_tissue"]`` : float32 array (n_obs, width). Of a
        model with ``context="means"`` the cell level has 30 components of genes before these columns, and niche and tissue
        have 3 x 30 means of components
    ``.obsm[key_added]`` : float32 array, the levels side by side, each scaled to unit norm
    ``.obs[f"{key_added}_ood"]`` : float32 in [0, 1], how far a cell's image and genes, as the model encodes them, are from the
        training cells, as a quantile of distances among these; not written by models that hold no statistics of them
    ``.obsp[f"{key_added}_attention"]`` : CSR (n_obs, n_obs), with ``attention=True``; each row sums to 1
    ``.uns[key_added]`` : dict with ``levels``, ``gene_coverage``, ``channels`` (those used) and ``params``

    Raises
    ------
    KeyError
        An element is missing, or the model knows no channel of the image.
    ValueError
        Too few of the model's genes are measured, counts are not raw, or the scale is unknown.
    TypeError
        ``model`` is of another kind.

    Warns
    -----
    UserWarning
        Data differ from the training data: half of the model's genes or channels or more are missing, the
        median count differs by a factor of three, or over a third of the cells have an out-of-domain score above 0.95.
        What older models do not store is not compared.

    Examples
    --------
    >>> sf.tl.embed_spatia(sdata, modalities="image", image_key="fluorescence")
    >>> sdata["table"].obsm["X_spatia_niche"].shape
    (300, 128)
    """
    started = time.perf_counter()
    where = _io.Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    modalities, levels = check_modalities(modalities), check_levels(levels)
    _io.at_least_one(None, batch_size=batch_size)
    _io.slot_name(key_added)
    _io.one_of(("slide", "training"), scaling=scaling)
    _io.renames(channels=channels)
    model = cast("Spatia", resolve(model, "Spatia", default=DEFAULT_WEIGHTS))
    check_trained(model, modalities)
    data, table = _io.unpack(data, table_key, copy=copy)
    slides = cells(data, where, modalities, model.config, layer)
    coverage = gene_coverage(table.var_names, model.config.genes) if "genes" in modalities else 0.0
    ready = [model.prepare(slide, channels=channels, scaling=scaling) for slide in slides]
    found, ood = _embedded(
        model, ready, table.n_obs, levels=levels, attention=attention, batch_size=batch_size or 512,
        device=settings.torch_device(device),
    )  # fmt: skip
    _compare(model, [slide for slide, _ in ready], coverage, ood)
    table.obs.drop(columns=Key.obs.ood(key_added), errors="ignore", inplace=True)
    if not np.isfinite(ood).any():
        logger.info(
            "the model holds no statistics of its training cells: obs[%r] is not written", Key.obs.ood(key_added)
        )
    for level in set(LEVELS) - set(levels):  # of an earlier call, which uns no longer describes
        table.obsm.pop(Key.obsm.level(key_added, level), None)
    table.obsp.pop(Key.obsp.attention(key_added), None)
    if attention:
        table.obsp[Key.obsp.attention(key_added)] = found.pop("attention")
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in found.values()]
    params = _io.provenance(
        started, model=model, levels=list(levels), modalities=list(modalities), crop_um=model.config.crop_um,
        scaling=scaling, transductive=scaling == "slide",
    )  # fmt: skip
    _io.write(
        table, key_added, arrays={**{Key.obsm.level("", level): v for level, v in found.items()}, "": np.concatenate(unit, 1)},
        obs={Key.obs.ood(""): ood} if np.isfinite(ood).any() else {},
        uns={
            "levels": list(levels), "gene_coverage": coverage, "params": params,
            "channels": _channels_used(model.config.channels, [slide for slide, _ in ready]),
        },
    )  # fmt: skip
    _io.remember(data, slides, mpp, spatial_key)
    return data if copy else None


def _compare(model: Spatia, slides: Sequence[Slide], coverage: float, ood: np.ndarray) -> None:
    """Warn where the slides differ from those that the model was trained on."""
    genes = channels = depth = None
    if slides[0].counts is not None:
        genes = round(coverage * len(model.config.genes)), len(model.config.genes)
        counts = np.concatenate([np.asarray(slide.counts.sum(1)).ravel() for slide in slides])
        depth = float(np.median(counts)), model.usual_depth(slides[0])
    if slides[0].crops is not None:
        channels = len(_channels_used(model.config.channels, slides)), len(model.config.channels)
    warn_of_difference(genes=genes, channels=channels, depth=depth, ood=ood)


def _embedded(
    model: Spatia,
    ready: list[tuple[Slide, np.ndarray | None]],
    n_obs: int,
    *,
    levels: Sequence[str],
    attention: bool,
    **options,
) -> tuple[dict[str, np.ndarray | sparse.csr_matrix], np.ndarray]:
    """Embeddings of all rows of a table by level, n_obs x width, with ``attention`` its matrix; out-of-domain scores, n_obs."""
    out: dict[str, Any] = {}
    ood = np.full(n_obs, np.nan, np.float32)
    weights = []  # row, column and weight of the attention
    bar = progress(None, "embedding", total=sum(len(slide) for slide, _ in ready), unit="cell")
    for slide, standard in ready:
        found = model.embed(slide, standard, levels=levels, attention=attention, update=bar.update, **options)
        if attention:
            weight = cast("Any", found.pop("attention")).tocoo()
            weights.append((slide.rows[weight.row], slide.rows[weight.col], weight.data))
        ood[slide.rows] = found.pop("ood")
        for level, values in found.items():
            out.setdefault(level, np.full((n_obs, values.shape[1]), np.nan, np.float32))[slide.rows] = values
    bar.close()
    if attention:
        row, column, weight = (np.concatenate(v) for v in zip(*weights))
        out["attention"] = sparse.csr_matrix((weight, (row, column)), (n_obs, n_obs))
    return out, ood


def cells(
    data, where: _io.Where, modalities: Sequence[str], config: SpatiaConfig, layer: str | None = None
) -> list[Slide]:
    """Slides with what a model looks at: counts, crops of its size, or both."""
    from spatiaflow._slides import gather
    from spatiaflow._slides.crops import check_inside

    need = [{"image": "crops", "genes": "counts"}[name] for name in modalities]
    crop_um = None if config.adaptive else config.crop_um
    slides = gather(
        data, where, need=need, layer=layer, crop_um=crop_um, crop_pixels=config.crop_pixels, crop_wide=config.wide
    )
    for slide in slides:
        if slide.crops is not None:
            check_inside(slide.crops, slide.name)
    return slides


def check_modalities(modalities: Sequence[str] | str) -> tuple[str, ...]:
    """Return modalities as a tuple, after a check of their names."""
    chosen = tuple(_io.names(modalities, "modalities") or ())
    if not chosen or set(chosen) - set(MODALITIES):
        raise ValueError(f"modalities must be 'image', 'genes' or both, not {modalities!r}.")
    return chosen


def check_levels(levels: Sequence[str] | str) -> tuple[str, ...]:
    """Return levels as a tuple, after a check of their names."""
    chosen = tuple(_io.names(levels, "levels") or ())
    if not chosen or set(chosen) - set(LEVELS):
        raise ValueError(f"levels must be among {', '.join(LEVELS)}, not {levels!r}.")
    return chosen


def check_trained(model: Spatia, modalities: Sequence[str]) -> None:
    """Refuse a modality that the model was trained without."""
    for modality, known in (("image", model.config.channels), ("genes", model.config.genes)):
        if modality in modalities and not known:
            raise ValueError(f"the model was trained without {modality}. Give modalities='image' or 'genes' alone.")


def gene_coverage(have: Sequence[str], genes: Sequence[str]) -> float:
    """Return the share of the model's genes that are measured; refuse a table that measures too few."""
    n = len(set(genes) & set(have))
    if n < max(1, MIN_COVERAGE * len(genes)):
        raise ValueError(
            f"var_names hold {n} of the model's {len(genes)} genes; at least {MIN_COVERAGE:.0%} are needed. The model's "
            f"genes are such as {', '.join(genes[:5])}: check that identifiers are of one kind (symbols or Ensembl, human "
            "or mouse). modalities='image' needs no genes. On other tissue train a model with sf.tl.train_spatia(data)."
        )
    if n < len(genes):
        logger.info("%d of the model's %d genes are measured; the others are masked", n, len(genes))
    return n / len(genes)


def _channels_used(channels: Sequence[str], slides: Sequence[Slide]) -> list[str]:
    """Channels of the model that at least one slide has."""
    places = [slide.crops.places for slide in slides if slide.crops is not None]
    return [name for i, name in enumerate(channels) if any(place[i] >= 0 for place in places)]
