"""Gene expression from histology by STFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io, datasets
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, resolve_seed, settings
from spatiaflow._slides import gather
from spatiaflow.tl._trust import check_pitch, check_stain, stain_range, warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models import Slide, STFlow, STFlowConfig

Data: TypeAlias = AnnData | SpatialData


@verb
def train_stflow(
    data: Data | Sequence[Data] | Mapping[str, Data],
    *,
    use_rep: str = "X_texture",
    genes: int | Sequence[str] = 50,
    layer: str | None = None,
    target_sum: float | None = 1e4,
    config: str | STFlowConfig = "default",
    donor_key: str | None = None,
    fold_key: str | None = None,
    validation: Sequence[str] | float | None = None,
    max_epochs: int | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
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

    The model learns by flow matching on all spots of a region jointly (Huang et al. 2025, section 3). Everything that is
    learned comes from the slides given: genes, scaling, prior, stopping epoch, stack and uncertainty. Keep test slides out
    of ``data``.

    Parameters
    ----------
    data
        One object, or a list or dict of objects, with one or more slides each. Needs ``.obsm[use_rep]``, positions and raw
        counts.
    use_rep
        Histology features, from :func:`spatiaflow.pp.encode_patches` or made elsewhere.
    genes
        Names, or how many of the genes with the largest variance of log-normalised expression within slides. Only genes
        that every slide measures are considered.
    layer
        Layer with raw counts of all measured genes, whose sum is the library size. None reads ``X``.
    target_sum
        Expression is log1p of counts per ``target_sum``. None: log1p of raw counts (the convention of HEST).
    config
        ``"default"`` (chosen by inner validation, stacked with simple models such as ridge regression), ``"paper"`` (the
        published configuration; 1,147,724 parameters at 1024 features and 50 genes), or a
        :class:`spatiaflow.models.STFlowConfig`.
    donor_key
        Column of ``.obs`` that names the donor of each slide. With two donors or more, whole donors are held out in turn. None:
        all slides are of one donor.
    fold_key
        Column of ``.obs`` with the fold of each spot. Spots of a fold are held out together, over all slides. Use it for
        serial sections of one donor, with regions of the registered sections as folds, if the model is for other donors:
        leaving out a section rewards what is known of the place (see ``docs/uncertainty.md``).
    validation
        What is held out inside ``data`` to stop, stack and calibrate. None holds out each fold or donor in turn; with one donor
        each slide, or contiguous bands where there are fewer than three slides. Names hold out slides. A fraction of at most
        0.5 holds out one of 1 / fraction contiguous bands of every slide.
    max_epochs
        Epochs of each network; the config's when None.
    checkpoint_dir
        Folder for the state of the training, for this run alone. Nothing is written when None.
    resume
        Continue from what ``checkpoint_dir`` holds. The model is that of an uninterrupted run.
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
        Features, layer, genes or a column of ``.obs`` are missing.
    ValueError
        Counts are not raw, values are not finite, the scale is unknown, features differ between slides, a slide has
        fewer than two spots on tissue with counts, ``fold_key`` names fewer than two folds or none for some spots or stands
        beside ``validation``, or ``checkpoint_dir`` holds another run or a damaged file.
    RuntimeError
        Another run uses ``checkpoint_dir``; the message names it.
    OSError
        The disk is full.

    Warns
    -----
    Spots on glass (``.obs["tissue"]`` below 0.05) and spots without any counts are left out, and their number is logged.

    UserWarning
        A table seems to be cut to some of its genes: it has at most 50, or far fewer counts than a column of ``.obs`` such as
        ``total_counts``, or half of the genes of ``.raw``, or highly variable ones alone. The library size is the sum over all
        genes. Or samples seem to be joined of which some did not measure some genes.

    See Also
    --------
    predict_expression : apply the model.

    Examples
    --------
    >>> model = sf.tl.train_stflow(adata, genes=["TYPE_epithelial1", "NICHE_gland1"], max_epochs=1)
    >>> model.skill.shape
    (2,)
    """
    from spatiaflow.models import STFlowConfig
    from spatiaflow.train.stflow import train_stflow as train

    chosen_config, seed, target = STFlowConfig.of(config), resolve_seed(random_state), settings.torch_device(device)
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to continue.")
    _io.at_least_one(None, max_epochs=max_epochs)
    _io.positive(None, target_sum=target_sum)
    names = _gene_names(genes)
    where = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    tables = [_io.unpack(one, table_key)[1] for one in _io.objects_of(data).values()]
    encoder = _io.same_encoder(tables, use_rep) | stain_range(_io.stain(tables, use_rep))
    shared = _io.shared_genes(tables) if names is None else names
    slides = gather(
        data, where, need=("counts", "features"), layer=layer, use_rep=use_rep, donor_key=donor_key, fold_key=fold_key
    )
    _check_training(slides, shared, use_rep)
    if target_sum is not None:
        _io.check_library(tables, layer, "sf.tl.train_stflow(data, genes=[...])")
    slides = [_usable(slide).align(shared) for slide in slides]
    if names is None:
        kept = _most_variable(slides, int(cast("int", genes)), target_sum)
        slides = [slide.align(kept) for slide in slides]
    held_out = _io.held_out(validation, [slide.name for slide in slides], largest=0.5)
    if fold_key is not None:
        _check_folds(slides, fold_key, validation)
    logger.info("training STFlow on %d slide(s), %d spots, device %s", len(slides), sum(map(len, slides)), target)
    return train(
        slides, chosen_config, encoder=encoder, target_sum=target_sum, validation=held_out, max_epochs=max_epochs,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume,
        accelerator={"cuda": "gpu"}.get(target.type, target.type), seed=seed,
    )  # fmt: skip


def _gene_names(genes: int | Sequence[str]) -> list[str] | None:
    """Names of genes; None where ``genes`` is how many of them."""
    if genes is None or isinstance(genes, bool | float) or (isinstance(genes, int | np.integer) and genes < 1):
        raise ValueError(f"genes must be names, or how many genes (at least 1), not {genes!r}.")
    if isinstance(genes, int | np.integer):
        return None
    return _io.names(genes, "genes")


def _check_training(slides: list[Slide], genes: Sequence[str], use_rep: str) -> None:
    """Refuse slides that nothing can be learned from."""
    for slide in slides:
        if len(slide) < 2:
            raise ValueError(f"slide {slide.name!r} has a single spot; leave it out of the training.")
        measured = set(slide.genes)
        if missing := [gene for gene in genes if gene not in measured]:
            listed = ", ".join(map(repr, missing[:3]))
            raise KeyError(
                f"{len(missing)} of {len(genes)} genes are not in var_names of slide {slide.name!r} (first: {listed})."
            )
    first = slides[0].features[0]
    if all((slide.features == first).all() for slide in slides):
        raise ValueError(f"obsm[{use_rep!r}] is the same in every row; there is nothing to learn from.")


def _check_folds(slides: list[Slide], fold_key: str, validation: object) -> None:
    """Refuse folds that leave nothing to train on, or nothing to do."""
    if validation is not None:
        raise ValueError("fold_key and validation both say what is held out; give one of them.")
    folds = {label for slide in slides for label in slide.labels}
    if len(folds) < 2:
        raise ValueError(f"obs[{fold_key!r}] must name at least 2 folds; it names {', '.join(map(repr, folds))}.")


def _usable(slide: Slide) -> Slide:
    """A slide without spots that say nothing of tissue: on glass, or without any counts."""
    glass, empty = ~slide.on_tissue, slide.library == 0
    if not (glass | empty).any():
        return slide
    logger.warning(
        "slide %r: %d spots on glass and %d more without any counts are left out of the training",
        slide.name, glass.sum(), (empty & ~glass).sum(),
    )  # fmt: skip
    kept = slide.take(~glass & ~empty)
    if len(kept) < 2:
        raise ValueError(
            f"slide {slide.name!r} has {len(kept)} spots on tissue with counts; leave it out of the training. If its patches "
            "do show tissue, remove obs['tissue'] and train again."
        )
    return kept


def _most_variable(slides: list[Slide], n: int, target_sum: float | None) -> list[str]:
    """The genes whose log-normalised expression varies most within slides, on average; found in blocks of genes.

    Over all slides together, half of the variance of the genes that lead is between donors.
    """
    from spatiaflow.models.counts import log_normalize

    names, variance = list(slides[0].genes), []
    for start in range(0, len(names), 1000):
        block = slice(start, start + 1000)
        y = [log_normalize(s.counts[:, block].toarray().astype(np.float64), s.library, target_sum) for s in slides]
        variance.append(np.mean([values.var(0) for values in y], 0))
    if n > len(names):
        logger.warning("genes=%d were requested; the slides share %d, and all are used", n, len(names))
    order = np.argsort(-np.concatenate(variance), kind="stable")
    return [names[i] for i in order[:n]]


@verb
@_io.each_object
def predict_expression(
    data: Data | Sequence[Data] | Mapping[str, Data],
    *,
    model: STFlow | str | Path,
    use_rep: str | None = None,
    n_samples: int = 1,
    n_steps: int | None = None,
    new_donor: bool = True,
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
) -> Data | list[Data] | dict[str, Data] | None:
    """Predict log-normalised expression of every spot from its histology, jointly over each slide.

    Integrates the flow from the model's prior to the data in ``n_steps`` evaluations (Huang et al. 2025, algorithm 1).
    Memory and time grow linearly with the number of spots. Noise belongs to the spot (its name, its slide and the seed), so
    the order of rows and ``batch_size`` do not change the result.

    Spots on glass (``.obs["tissue"]`` below 0.05, see :func:`spatiaflow.pp.encode_patches`) get the training mean of every
    gene, and a high ``ood``. They change nothing for the others: neither how features are scaled nor who is whose neighbour.

    Parameters
    ----------
    data
        One object, or a list or dict of objects. Needs ``.obsm[use_rep]`` and positions; counts are not read.
    model
        A trained model, the path of a saved one, or the name of weights.
    use_rep
        Features from the encoder that the model was trained with. None takes the slot it was trained on.
    n_samples
        Draws from the prior; their mean is written.
    n_steps
        Evaluations of the network for each draw; the config's (5) when None.
    new_donor
        Whether the donor of these slides is not in the training data. True gives wider intervals: genes then have other levels.
        False: the slides are further sections of a donor that the model was trained on.
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
    None, or with ``copy=True`` what was given. Sets:

    ``.obsm[key_added]`` : float32 array (n_obs, n_genes), log1p counts per 10,000; columns are ``.uns[key_added]["genes"]``. What
        a measurement is expected to give. It varies with the depth of spots too, as far as the image shows it
    ``.obsm[f"{key_added}_rate"]`` : same shape, share of the gene in the counts of a spot, whatever its depth. Draws rest on
        it
    ``.obsm[f"{key_added}_std"]`` : same shape, in the unit of ``.obsm[key_added]``; standard deviation of a measured
        value, learned on held-out slides
    ``.obs[f"{key_added}_ood"]`` : float in [0, 1], distance of the features to the training data as a quantile of it
    ``.obs[f"{key_added}_depth"]`` : float, predicted library size, the sum of counts over all genes
    ``.uns[key_added]`` : dict with ``genes``, ``skill`` (CRPS skill over the marginal on held-out training slides),
        ``trusted`` (the pattern holds on other slides, with ``new_donor`` on those of another donor; one in ten may be wrong),
        ``normalization``, ``donor_effect`` (what the uncertainty of a slide's level rests on: ``"same donor"``,
        ``"learned"`` or ``"prior, not learned"``), ``degenerate_share`` (``config="paper"``: spots whose local frame is
        arbitrary) and ``params``, where ``standardized_on`` says for each slide by how many of its own spots on tissue features
        were scaled, or ``"training"``: by the training data (always so of fewer than 20 spots), and ``n_glass`` counts spots on
        glass

    Raises
    ------
    KeyError
        No features at ``use_rep``; the message gives the ``pp.encode_patches`` call that makes them.
    TypeError
        ``model`` is a model of another kind.
    ValueError
        Features come from another encoder or have the wrong width, are not finite, or the scale is unknown.

    Warns
    -----
    UserWarning
        Data differ from the training data: over a third of the spots on tissue have an out-of-domain
        score above 0.95, spots are not as far apart, or the stain is another one (the median optical density of hematoxylin
        or eosin lies outside of the quartiles of all training slides). What older models do not store is not compared.

    Examples
    --------
    >>> sf.tl.predict_expression(adata, model=model, n_samples=3)
    >>> adata.obsm["stflow"].shape
    (79, 3)
    """
    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.at_least_one(n_samples=n_samples)
    _io.at_least_one(None, n_steps=n_steps, batch_size=batch_size)
    _io.slot_name(key_added)
    model = cast("STFlow", datasets.resolve(model, "STFlow"))
    where = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    data, table = _io.unpack(data, table_key, copy=copy)
    use_rep = use_rep or model.encoder["key"]
    _io.check_encoder(table, use_rep, model.encoder)
    slides = gather(data, where, need=("features",), use_rep=use_rep)
    check_pitch(slides, model)
    check_stain(_io.stain([table], use_rep), model)
    result = model.predict(
        slides, n_samples=n_samples, n_steps=n_steps, new_donor=new_donor, seed=seed, batch_size=batch_size or 512,
        device=settings.torch_device(device), progress=lambda found: progress(found, "predicting", unit="slide"),
    )  # fmt: skip
    warn_of_difference(ood=result.ood[np.concatenate([slide.on_tissue for slide in slides])])
    rows = np.concatenate([slide.rows for slide in slides])
    mean, rate, std = (np.full((table.n_obs, len(model.genes)), np.nan, np.float32) for _ in range(3))
    ood, depth = (np.full(table.n_obs, np.nan, np.float32) for _ in range(2))  # NaN: rows that annotate another element
    mean[rows], rate[rows], std[rows], ood[rows], depth[rows] = (
        result.mean, result.rate, result.std, result.ood, result.depth,
    )  # fmt: skip
    params = _io.provenance(
        started, model=model, random_state=seed, use_rep=use_rep, encoder=model.encoder["id"], n_samples=n_samples,
        n_steps=n_steps or model.config.n_steps, new_donor=new_donor, standardize=model.standardize, spatial_key=spatial_key,
        n_vars=table.n_vars, n_obs=table.n_obs, training_library=float(np.median(model.arrays["libraries"])),
        standardized_on=[str(n) if n else "training" for n in result.standardized_on], n_glass=result.n_glass,
    )  # fmt: skip
    _io.write(
        table, key_added, arrays={"": mean, Key.obsm.rate(""): rate, Key.obsm.std(""): std},
        obs={Key.obs.ood(""): ood, Key.obs.depth(""): depth},
        uns={
            "genes": model.genes, "skill": model.skill, "trusted": model.trusted(new_donor),
            "normalization": {"target_sum": model.target_sum if model.target_sum is not None else "raw", "log1p": True},
            "donor_effect": model.donor_effect(new_donor),
            "degenerate_share": result.degenerate_share, "params": params,
        },
    )  # fmt: skip
    _io.remember(data, slides, mpp, spatial_key)
    return data if copy else None
