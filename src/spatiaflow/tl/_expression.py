"""Gene expression from histology by STFlow."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed, settings

if TYPE_CHECKING:
    from spatiaflow.models import Preset, STFlow


def train_stflow(
    data: AnnData | SpatialData | list[AnnData | SpatialData],
    *,
    features_key: str = "X_texture",
    genes: list[str] | int = 50,
    layer: str | None = None,
    target_sum: float | None = 1e4,
    preset: str | Preset = "default",
    validation: list[str] | float | None = None,
    max_epochs: int | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    devices: int | str = 1,
    precision: str = "32-true",
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    device: str | None = None,
    random_state: int | None = None,
) -> STFlow:
    """Train STFlow to predict expression from histology features, on one or many slides.

    Flow matching on all spots of a region jointly (Huang et al. 2025, section 3). Everything learned from data, the
    choice of genes, scaling, prior, stopping epoch, stack and uncertainty included, comes from the slides given: keep
    test slides out of ``data``.

    Parameters
    ----------
    data
        One object, or a list with one or more slides each. Needs ``.obsm[features_key]``, positions and raw counts.
    features_key
        Histology features, from :func:`spatiaflow.pp.encode_patches` or made elsewhere.
    genes
        Names, or how many of the genes with the largest variance of log-normalised expression (over all slides given;
        only genes that every slide measures).
    layer
        Layer with raw counts of all genes measured, for the library size is their sum; None reads ``X``.
    target_sum
        Expression is log1p of counts per ``target_sum``; None: log1p of raw counts (the convention of HEST).
    preset
        ``"default"`` (chosen by inner validation, stacked with ridge regression) or ``"paper"`` (the published
        configuration, 1,147,724 parameters at 1024 features and 50 genes), or a :class:`spatiaflow.models.Preset`.
    validation
        What is held out inside ``data`` to stop, stack and calibrate: None holds out each slide in turn (contiguous
        blocks where there are fewer than three), names hold out slides, a fraction (at most 0.5) one of 1 / fraction
        contiguous blocks of every slide.
    max_epochs
        Epochs of each network; the preset's when None.
    checkpoint_dir
        Folder for the state of the training; nothing is written when None.
    resume
        Go on from what ``checkpoint_dir`` holds.
    devices, precision
        Passed to :class:`lightning.Trainer`.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say.
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None.

    Returns
    -------
    :class:`spatiaflow.models.STFlow`, with ``.history``, ``.card``, ``.skill`` and ``.save(path)``.

    Raises
    ------
    KeyError
        Features, layer or genes are missing.
    ValueError
        Counts are not raw, values are not finite, the scale is unknown, or features differ between slides.

    See Also
    --------
    predict_expression : apply the model.

    Examples
    --------
    >>> model = sf.tl.train_stflow(adata, genes=["TYPE_epithelial1", "NICHE_gland1"], max_epochs=1)
    >>> model.skill.shape
    (2,)
    """
    from spatiaflow.models import PRESETS
    from spatiaflow.models.counts import log_normalize
    from spatiaflow.models.simple import SlideData
    from spatiaflow.train.stflow import fit_stflow

    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(PRESETS)} or a spatiaflow.models.Preset, not {preset!r}."
            )
        preset = PRESETS[preset]
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to go on with.")
    _io.at_least_one(max_epochs=max_epochs)
    _io.positive(target_sum=target_sum)
    found = _io.collect(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
        spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    tables = [table for _, table, _ in found]
    encoder = _io.same_encoder(tables, features_key)

    if genes is None or isinstance(genes, bool | float) or (isinstance(genes, int | np.integer) and genes < 1):
        raise ValueError(f"genes must be names, or how many genes (at least 1), not {genes!r}.")
    if not isinstance(genes, int | np.integer):
        genes = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        if not genes or len(set(genes)) < len(genes):
            raise ValueError("genes names no gene, or one of them twice.")
    names = genes if isinstance(genes, list) else _io.shared_genes(tables)
    parts, boxes = [], {}
    for _, table, slides in found:
        features = _io.features(table, features_key)
        library = _io.library_sizes(table, layer)
        for name, slide in slides.items():
            if len(slide.rows) < 2:
                raise ValueError(f"slide {name!r} has a single spot; leave it out of the training.")
            parts.append((table, slide, name, features, library))
            boxes[name] = {"n_obs": len(slide.rows), "box_um": [*slide.xy.min(0), *slide.xy.max(0)]}
    validation = _io.held_out(validation, boxes, largest=0.5)
    first = parts[0][3][0]
    if all((features == first).all() for _, _, _, features, _ in parts):
        raise ValueError(f"obsm[{features_key!r}] is the same in every row; there is nothing to learn from.")
    chosen = names if isinstance(genes, list) else _most_variable(parts, names, genes, layer, target_sum)
    training = []
    for table, slide, name, features, library in parts:
        counts, _ = _io.counts(table, chosen, layer, rows=slide.rows)
        counts, size = _io.dense(counts), library[slide.rows]
        y = log_normalize(counts, size, target_sum)
        training.append(SlideData(name, slide.xy, features[slide.rows], y, counts, size))
    target = settings.torch_device(device)
    pitch = float(np.median([slide.pitch for _, slide, *_ in parts]))
    card = {"data": boxes, "n_genes": len(chosen), "target_sum": target_sum, "spatiaflow": spatiaflow.__version__}
    logger.info("training STFlow on %d slide(s), %d spots, device %s", len(training), sum(map(len, training)), target)
    return fit_stflow(
        training, genes=chosen, encoder=encoder, target_sum=target_sum, preset=preset, pitch=pitch, card=card,
        validation=validation, max_epochs=max_epochs,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume,
        accelerator={"cuda": "gpu"}.get(target.type, target.type), devices=devices, precision=precision,
        seed=resolve_seed(random_state),
    )  # fmt: skip


def _most_variable(parts, names, n, layer, target_sum) -> list[str]:
    """Genes of the largest variance of log-normalised expression over the slides given, in blocks of genes."""
    from spatiaflow.models.counts import log_normalize

    variance = []
    for start in range(0, len(names), 1000):
        block = names[start : start + 1000]
        y = [
            log_normalize(
                _io.dense(_io.counts(table, block, layer, rows=slide.rows)[0]), library[slide.rows], target_sum
            )
            for table, slide, _, _, library in parts
        ]
        variance.append(np.concatenate(y).var(0))
    if n > len(names):
        logger.warning("genes=%d were asked for; the slides share %d, and all are taken", n, len(names))
    order = np.argsort(-np.concatenate(variance), kind="stable")
    return [names[i] for i in order[:n]]


def predict_expression(
    data: AnnData | SpatialData,
    *,
    model: STFlow | str | Path,
    features_key: str | None = None,
    n_samples: int = 1,
    n_steps: int | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    random_state: int | None = None,
    key_added: str = "stflow",
    copy: bool = False,
) -> AnnData | SpatialData | None:
    """Predict log-normalised expression of every spot from its histology, jointly over each slide.

    Integrates the flow from the model's prior to the data in ``n_steps`` evaluations (Huang et al. 2025, algorithm 1).
    Memory and time grow linearly with the number of spots. Noise belongs to the spot (its name, its slide and the
    seed), so neither the order of rows or slides nor ``batch_size`` changes the result.

    Parameters
    ----------
    data
        Needs ``.obsm[features_key]`` and positions; counts are not read.
    model
        A trained model, or the path of a saved one.
    features_key
        Features made by the encoder that the model was trained with; by default the key it was trained on.
    n_samples
        Draws from the prior; their mean is written.
    n_steps
        Evaluations of the network a draw; the preset's (5) when None.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say.
    batch_size
        Spots worked on at a time (512).
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None.
    key_added
        Name of the slots.
    copy
        Return a copy instead of writing into ``data``.

    Returns
    -------
    None, or with ``copy=True`` an object of the type given. Sets:

    ``.obsm[key_added]`` : float32 array (n_obs, n_genes), log1p counts per 10,000; columns are ``.uns[key_added]["genes"]``
    ``.obsm[f"{key_added}_std"]`` : same shape and unit; between-draw plus residual deviation learned on held-out slides
    ``.obs[f"{key_added}_ood"]`` : float in [0, 1], distance of the features to the training data as a quantile of it
    ``.uns[key_added]`` : dict with ``genes``, ``skill`` (CRPS skill over the marginal on held-out training slides),
        ``trusted`` (skill above 0), ``normalization``, ``between_share`` (of the variance, what differs between draws),
        ``degenerate_share`` (``preset="paper"``: spots whose local frame is arbitrary) and ``params``

    Raises
    ------
    KeyError
        No features at ``features_key``; the message gives the ``pp.encode_patches`` call that makes them.
    ValueError
        Features were made by another encoder or have the wrong width, are not finite, or the scale is unknown.

    Examples
    --------
    >>> sf.tl.predict_expression(adata, model=model, n_samples=3)
    >>> adata.obsm["stflow"].shape
    (79, 3)
    """
    from spatiaflow import models

    started = time.perf_counter()
    _io.at_least_one(n_samples=n_samples, n_steps=n_steps, batch_size=batch_size)
    _io.slot_name(key_added)
    if not isinstance(model, models.STFlow):
        model = models.load(model)
    data, table = _io.unpack(data, table_key, copy=copy)
    features_key = features_key or model.encoder["key"]
    _io.check_encoder(table, features_key, model.encoder)
    features = _io.features(table, features_key)
    slides = _io.slides(
        data, table_key=table_key, shapes_key=shapes_key, labels_key=labels_key, library_key=library_key,
        spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    names = table.obs_names.to_numpy().astype(str)
    jobs = []
    for slide in slides:
        if len(slide.rows) > 15 and abs(slide.pitch / model.pitch - 1) > 0.15:
            warnings.warn(
                f"spots of slide {slide.name!r} are {slide.pitch:.3g} µm apart; the model was trained at "
                f"{model.pitch:.3g} µm. Check mpp.",
                UserWarning,
                stacklevel=2,
            )
        order = np.argsort(names[slide.rows])  # noise goes by name, not by row
        jobs.append((slide.name, slide.rows[order], slide.xy[order]))
    result = model.predict(
        features, jobs, n_samples=n_samples, n_steps=n_steps, seed=resolve_seed(random_state), rows=batch_size or 512,
        device=settings.torch_device(device), progress=lambda jobs: progress(jobs, "predicting", unit="slide"),
    )  # fmt: skip
    annotated = np.concatenate([rows for _, rows, _ in jobs])
    if len(annotated) < table.n_obs:  # rows of a table that annotate another element
        rest = np.setdiff1d(np.arange(table.n_obs), annotated)
        for values in (result.mean, result.std, result.ood):
            values[rest] = np.nan
    params = {
        "model_sha256": model.sha256, "features_key": features_key, "encoder": model.encoder["id"], "n_samples": n_samples,
        "n_steps": n_steps or model.preset.n_steps, "random_state": resolve_seed(random_state),
        "standardize": model.standardize, "spatial_key": spatial_key, "n_vars": table.n_vars,
        "spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    _io.write(
        table, key_added, arrays={"": result.mean, "_std": result.std}, obs={"_ood": result.ood},
        uns={
            "genes": model.genes, "skill": model.skill, "trusted": model.skill > 0,
            "normalization": {"target_sum": model.target_sum if model.target_sum is not None else "raw", "log1p": True},
            "between_share": result.between_share, "degenerate_share": result.degenerate_share, "params": params,
        },
    )  # fmt: skip
    return data if copy else None
