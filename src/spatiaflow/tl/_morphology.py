"""How cells of one state would look in another: train the generator on pairs."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import resolve_seed, settings
from spatiaflow.tl._images import LEVELS, CellImages, model_of
from spatiaflow.tl._transitions import targets_of

MORE_IMAGES = 20_000  # of any cells, that the autoencoder also sees


def train_morphology(
    data: AnnData | SpatialData,
    *,
    pairs_key: str = "transition",
    use_rep: str = "X_spatia",
    level: str = "cell",
    profile_key: str | None = "morphology",
    spatial: bool = True,
    start: str = "control",
    weighted: bool = True,
    exchange: bool = True,
    losses: dict[str, float] | None = None,
    preset: dict | None = None,
    crop_um: float = 20.4,
    crop_pixels: int = 48,
    validation: float = 0.1,
    max_epochs: int = 10,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    devices: int | str = 1,
    precision: str = "32-true",
    layer: str | None = None,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    random_state: int | None = None,
):
    """Train a generator of cell images under the transitions that :func:`pair_transitions` found.

    A flow from the image of a source cell (with noise, so that it has more than one outcome) to the image of its target, between
    latents of an autoencoder that is fitted to the same images, all laid upright; under what is known of the source: its
    embedding, those of its niche and tissue, its neighbours and where they lie, the transition, and the mean shift of genes and
    morphology in it. Each pair counts by its confidence.

    Parameters
    ----------
    data
        Cells with an image, with pairs, embeddings and morphology.
    pairs_key
        ``key_added`` of :func:`pair_transitions`.
    use_rep
        Embeddings of the levels: ``.obsm[f"{use_rep}_cell"]``, ``_niche`` and ``_tissue``.
    level
        ``"cell"``, or ``"niche"`` for a table of tiles: ``pp.tiles(sdata, groupby=..., pool=[...], key_added="tiles")``, then
        ``table_key="tiles"`` and ``crop_um`` the side of a tile.
    profile_key
        DataFrame of :func:`spatiaflow.pp.morphology_profile` in ``.obsm``; None does without the alignment loss and the
        shift of morphology.
    spatial
        Condition on niche, tissue and neighbours.
    start
        ``"control"``, the image of the source cell with noise added, or ``"noise"``: where the flow begins.
    weighted
        Weigh pairs by their confidence.
    exchange
        Let sources of one niche that are alike exchange their targets in each batch, so that images lie near each other
        (minibatch optimal transport): paths are shorter, and more of the source is kept.
    losses
        Weights of ``"flow"``, ``"alignment"`` (sliced Wasserstein distance of the morphology that a small network reads off
        generated and real images) and ``"contrast"`` (another transition's conditions must fit worse); 0 switches one off.
    preset
        Other hyper-parameters by name, see :class:`spatiaflow.models.MorphologyConfig`.
    crop_um, crop_pixels
        Side of the images on the tissue and in pixels.
    validation
        Share of each slide held out as a band, to choose the epoch.
    max_epochs, checkpoint_dir, resume, devices, precision
        As in :func:`train_spatia`; an epoch is 200 steps at least, and 300 of the autoencoder, up to 3,000.
    layer
        Layer with raw counts, for the shift of genes.
    table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp
        As everywhere.
    batch_size
        Pairs a step, 128 by default.
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None.

    Returns
    -------
    :class:`spatiaflow.models.MorphologyFlow`, with ``.history``, ``.card`` and ``.save(path)``.

    Raises
    ------
    KeyError
        Pairs, embeddings or morphology are missing.
    ValueError
        A transition has no pairs, no pair lies in the image, none is left by ``validation``, or ``losses`` or ``preset``
        hold an unknown name.

    Examples
    --------
    A small network for one epoch, so that it takes seconds:

    >>> model = sf.tl.train_morphology(
    ...     sdata, image_key="fluorescence", crop_um=16, crop_pixels=16, preset={"width": 32, "n_layers": 2},
    ...     validation=0.2, max_epochs=1,
    ... )
    >>> model
    MorphologyFlow: A -> B; channels dapi, bound, rna, prot
    """
    from spatiaflow.models.morphology import SCALE, MorphologyConfig, MorphologyFlow
    from spatiaflow.train import morphology as train

    seed, target = resolve_seed(random_state), settings.torch_device(device)
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to go on with.")
    _io.at_least_one(max_epochs=max_epochs, batch_size=batch_size, crop_pixels=crop_pixels)
    _io.positive(crop_um=crop_um)
    _io.one_of(("control", "noise"), start=start)
    _io.one_of(("cell", "niche"), level=level)
    _io.known_names(train.LOSSES, losses=losses)
    _io.known_names(("n_neighbors", "noise", "n_latent", "width", "n_layers", "n_heads", "drop"), preset=preset)
    if crop_pixels % SCALE:
        raise ValueError(f"crop_pixels={crop_pixels} must be a multiple of {SCALE}.")
    cells = CellImages.of(
        data, use_rep, crop_um, crop_pixels, table_key=table_key, image_key=image_key, shapes_key=shapes_key,
        labels_key=labels_key, library_key=library_key, spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    table = cells.table
    if f"{pairs_key}s" not in table.uns or f"{pairs_key}_plan" not in table.obsp:
        raise KeyError(
            f"uns has no {pairs_key + 's'!r}; run sf.tl.pair_transitions(data, transitions=..., groupby=...) first."
        )
    found = table.uns[f"{pairs_key}s"]
    params = table.uns[f"{pairs_key}_plan"]["params"]
    names = [*params["transitions"]]
    profile, features = _profile(table, profile_key)
    pairs, shifts = _pairs(table, found, table.obsp[f"{pairs_key}_plan"], params, profile, layer, cells.inside)
    pairs.level = LEVELS.index(level)
    config = MorphologyConfig(
        channels=list(cells.channels), transitions=names, profile=features, crop_um=crop_um, crop_pixels=crop_pixels,
        n_embedding=cells.embedding["cell"].shape[1], n_genes=pairs.genes.shape[1], spatial=spatial, start=start,
        **(preset or {}),
    )  # fmt: skip
    around = cells.surroundings(config.n_neighbors)
    where = tempfile.TemporaryDirectory() if checkpoint_dir is None else nullcontext(checkpoint_dir)
    with where as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        others = np.random.default_rng(seed).permutation(np.flatnonzero(cells.inside))[:MORE_IMAGES]
        used = np.union1d(np.union1d(pairs.source, pairs.target), others)
        images, place = cells.images(used, Path(folder) / "images.npy")
        band = cells.far(validation)
        training, held_out = pairs.within(~band), pairs.within(band)
        if not len(training) or not len(held_out):
            raise ValueError(
                f"validation={validation:g} leaves {len(training)} pairs to train on and {len(held_out)} to choose the epoch by "
                f"(of {len(pairs)}); both are needed. Give another share, or more pairs."
            )
        autoencoder, rebuilt = train.fit_autoencoder(
            images,
            ~band[used],
            band[used],
            config.n_latent,
            n_steps=min(3000, 300 * max_epochs),
            seed=seed,
            device=target,
        )
        latents, turns = train.encoded(images, autoencoder)
        around.turn(used, turns)
        surrogate, r2 = None, []
        if features:
            known = np.isfinite(profile[used]).all(1)
            surrogate, r2 = train.fit_surrogate(
                latents, profile[used], known & ~band[used], known & band[used], seed=seed, device=target
            )
        network, history = train.fit_morphology(
            training, held_out, latents, place, around, config, surrogate, losses=losses,
            weighted=weighted, exchange=exchange, max_epochs=max_epochs, batch_size=batch_size or 128,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume,
            accelerator={"cuda": "gpu"}.get(target.type, target.type), devices=devices, precision=precision, seed=seed,
        )  # fmt: skip
        del images
        (Path(folder) / "images.npy").unlink()
    card = {
        "data": cells.boxes, "use_rep": use_rep, "embedding_sha256": model_of(table, use_rep), "level": level,
        "pairs": {n: int((found["transition"] == n).sum()) for n in names},
        "autoencoder_r2": dict(zip(cells.channels, map(float, rebuilt))),
        "surrogate_r2": dict(zip(features, map(float, r2))), "weighted": weighted, "exchange": exchange,
        "groupby": params["groupby"], "niche_key": params["niche_key"], "min_share": params["min_share"],
        "spatiaflow": spatiaflow.__version__,
    }  # fmt: skip
    return MorphologyFlow(
        network=network, autoencoder=autoencoder, surrogate=surrogate, shifts=shifts, intensity=cells.intensity,
        history=history, card=card,
    )  # fmt: skip


def _profile(table: AnnData, key: str | None) -> tuple[np.ndarray, list[str]]:
    """Standardised morphology (n x features) and its names."""
    if key is None:
        return np.zeros((table.n_obs, 0)), []
    frame = _io.morphology(table, key)
    values = frame.to_numpy(float)
    spread = np.nanstd(values, 0)
    return (values - np.nanmean(values, 0)) / np.where(spread > 0, spread, 1), [*map(str, frame.columns)]


def _pairs(table, found: pd.DataFrame, plan, params: dict, profile, layer, inside):
    """Sources with the rows of their plan, and the mean shift of each transition and niche."""
    from spatiaflow.train.pairs import Pairs, mean_shift, shares

    counts = sparse.csr_matrix(_io.counts(table, None, layer)[0])
    total = np.asarray(counts.sum(1)).ravel().clip(1)
    log = sparse.csr_matrix(sparse.diags(float(np.median(total)) / total) @ counts).log1p()
    measured = np.nan_to_num(profile)
    source = table.obs_names.get_indexer(found["source"])
    if (source < 0).any():
        raise KeyError(f"uns names a source that is no row: {found['source'].iloc[int(np.argmax(source < 0))]!r}.")
    names = [*params["transitions"]]
    transition = pd.Index(names).get_indexer(found["transition"])
    allowed = np.zeros((len(names), table.n_obs), bool)
    for i, rows in enumerate(targets_of(table, params).values()):
        allowed[i, rows] = inside[rows]
    # a cell may be the source of several transitions, whose targets stand in one row of the plan
    target, share = shares(sparse.csr_matrix(plan)[source], allowed[transition])
    pairs = Pairs(
        source, target, share, found["confidence"].to_numpy(float), transition, np.zeros((len(source), log.shape[1])),
        np.zeros((len(source), measured.shape[1])), np.zeros(len(source), int),
    )  # fmt: skip
    kept = inside[source] & (share.sum(1) > 0)
    shifts = {}
    for i, name in enumerate(names):
        if not (here := kept & (transition == i)).any():
            raise ValueError(f"{name} has no pair whose cells lie in the image.")
        shifts[name] = {}
        for niche in ["", *sorted({n for n in found["niche"][here] if n})]:  # "": all together
            which = np.flatnonzero(here & ((found["niche"] == niche).to_numpy() if niche else True))
            pairs.group[which] = pairs.group.max() + 1
            pairs.genes[which], pairs.profile[which] = (mean_shift(pairs.rows(which), v) for v in (log, measured))
            shifts[name][niche] = {
                kind: np.round(getattr(pairs, kind)[which[0]], 5).tolist() for kind in ("genes", "profile")
            }
    return pairs.rows(np.flatnonzero(kept)), shifts
