"""How cells of one state would look in another: train the generator on pairs, and generate."""

from __future__ import annotations

import difflib
import tempfile
import time
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

import spatiaflow
from spatiaflow import _io
from spatiaflow._settings import logger, progress, resolve_seed, settings
from spatiaflow.tl import _cells
from spatiaflow.tl._images import LEVELS, CellImages, model_of, unscaled
from spatiaflow.tl._transitions import sources_of, targets_of

DEFAULT_WEIGHTS = "morphology-pancreas-small"


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
    max_epochs: int = 20,
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
    latents of an autoencoder that is fitted to the same images; under what is known of the source: its embedding, those of
    its niche and tissue, its neighbours and where they lie, the transition, and the mean shift of genes and morphology in
    it. Each pair counts by its confidence.

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
        ``"control"`` or ``"noise"``: where the flow begins.
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
        As in :func:`train_spatia`.
    layer
        Layer with raw counts, for the shift of genes.
    table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp
        As everywhere.
    batch_size
        Pairs a step, 64 by default.
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
    _io.known_names(
        ("n_neighbors", "noise", "n_latent", "patch_pixels", "width", "n_layers", "n_heads", "drop"), preset=preset
    )
    patch = (preset or {}).get("patch_pixels", MorphologyConfig.patch_pixels)
    if patch < SCALE or patch % SCALE or crop_pixels % patch:
        raise ValueError(
            f"patch_pixels={patch} must be a multiple of {SCALE}, and crop_pixels={crop_pixels} a multiple of it."
        )
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
        used = np.union1d(pairs.source, pairs.target)
        images, image_of = cells.images(used, Path(folder) / "images.npy")
        band = cells.far(validation)
        training, held_out = pairs.within(~band), pairs.within(band)
        if not len(training) or not len(held_out):
            raise ValueError(
                f"validation={validation:g} leaves {len(training)} pairs to train on and {len(held_out)} to choose the epoch by "
                f"(of {len(pairs)}); both are needed. Give another share, or more pairs."
            )
        autoencoder, rebuilt = train.fit_autoencoder(
            images, ~band[used], band[used], config.n_latent, max_epochs=max_epochs, seed=seed, device=target
        )
        surrogate, r2 = None, []
        if features:
            known = np.isfinite(profile[used]).all(1)
            surrogate, r2 = train.fit_surrogate(
                images, autoencoder, profile[used], known & ~band[used], known & band[used], seed=seed, device=target
            )
        network, history = train.fit_morphology(
            training, held_out, images, image_of, around, config, autoencoder, surrogate, losses=losses,
            weighted=weighted, exchange=exchange, max_epochs=max_epochs, batch_size=batch_size or 64,
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


def generate_morphology(
    data: AnnData | SpatialData,
    *,
    source: str,
    target: str,
    model=None,
    level: str = "cell",
    groupby: str | None = None,
    cells: list[str] | None = None,
    n_variants: int = 1,
    n_steps: int = 10,
    method: str = "heun",
    guidance: float = 0.0,
    trajectory: bool = False,
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
    key_added: str | None = None,
) -> AnnData:
    """Generate how cells of one state would look in another, where they are.

    The target-state morphology under observed transitions: what cells of the target state, matched by expression, look like in
    such surroundings. It is no forecast of what an intervention would do.

    Parameters
    ----------
    data
        Cells with an image, and with the embeddings that the model was trained with.
    source, target
        States; the model must know the transition.
    model
        :class:`spatiaflow.models.MorphologyFlow`, the path of one, or the name of weights that
        :func:`spatiaflow.datasets.weights` lists; ``"morphology-pancreas-small"`` when None, whose transitions are those of
        one pancreas.
    level
        ``"cell"``, or ``"niche"`` with a model that was trained on tiles; then ``table_key`` names them.
    groupby
        Column of ``.obs`` with the states; when None the one the model was trained with, or where there is none the model's own
        rule, if it has one (``model.states``).
    cells
        Names of the source cells; all of the state when None.
    n_variants
        Images a cell, from as many draws of noise.
    n_steps
        Evaluations of the network a cell.
    method
        ``"heun"``, ``"midpoint"`` or ``"euler"``.
    guidance
        Strength of classifier-free guidance; 0 is none.
    trajectory
        Also keep the images on the way.
    table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp
        As everywhere.
    batch_size
        Images generated at a time, 64 by default.
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None. The noise belongs to the cell's name, not to its row.
    key_added
        Also keep the result in a SpatialData: as a table of this name, on points at the source cells
        (``f"{key_added}_points"``), so that spatial queries find it.

    Returns
    -------
    AnnData, a row a generated cell: ``X``, its profile by :func:`spatiaflow.pp.image_profile`; ``.obsm["image"]``, n x channels x
    pixels x pixels, in the type and scale of the image, ``.obsm["source"]``, the source cells' alike, and with ``trajectory``
    ``.obsm["trajectory"]``, n x steps + 1 x channels x pixels x pixels; ``.obsm["spatial"]``, µm; ``.obs`` with
    ``source_cell``, ``transition``, ``niche``, ``variant`` and ``seed``; ``.uns["morphology"]`` with ``channels``, ``mpp``,
    ``intensity`` (background and bright end of each channel), ``times`` (of the trajectory) and ``params``.

    With ``key_added`` a SpatialData is also written into. Sets:

    ``data[key_added]`` : the same, as a table
    ``data[f"{key_added}_points"]`` : where its rows are; with several slides ``f"{key_added}_{slide}"``, one for each

    Raises
    ------
    KeyError
        The embeddings or the column of states are missing.
    TypeError
        ``model`` is a model of another kind.
    ValueError
        The embeddings were made by another model, the model does not know the transition, no cell is of the source state,
        channels differ, or ``key_added`` is given with an AnnData or taken by another element.
    """
    from spatiaflow import models
    from spatiaflow.models.flow import times_of
    from spatiaflow.models.morphology import MorphologyFlow
    from spatiaflow.pp import image_profile
    from spatiaflow.train.pairs import Pairs, conditions

    started, seed, where = time.perf_counter(), resolve_seed(random_state), settings.torch_device(device)
    _io.at_least_one(n_variants=n_variants, n_steps=n_steps, batch_size=batch_size)
    _io.slot_name(key_added)
    _io.one_of(("cell", "niche"), level=level)
    if cells is not None and (isinstance(cells, str) or not len(cells) or len(set(cells)) < len(cells)):
        raise ValueError("cells must be a list of names of cells, each once, or None for all of the source state.")
    if not isinstance(model, MorphologyFlow):
        model = models.load(_cells.file_of(model or DEFAULT_WEIGHTS))
    if not isinstance(model, MorphologyFlow):
        raise TypeError(
            f"model must be what sf.tl.train_morphology(...) returned or saved, not a {type(model).__name__}."
        )
    if level != model.card["level"]:
        raise ValueError(f"the model was trained on {model.card['level']}s: give level={model.card['level']!r}.")
    c, name = model.config, f"{source} -> {target}"
    if name not in c.transitions:
        near = difflib.get_close_matches(name, c.transitions, 3, 0.3) or c.transitions
        raise ValueError(f"the model does not know {name!r}; it knows {', '.join(map(repr, near))}.")
    found = CellImages.of(
        data, model.card["use_rep"], c.crop_um, c.crop_pixels, table_key=table_key, image_key=image_key, shapes_key=shapes_key,
        labels_key=labels_key, library_key=library_key, spatial_key=spatial_key, mpp=mpp,
    )  # fmt: skip
    if sorted(found.channels) != sorted(c.channels):
        raise ValueError(
            f"the image has channels {', '.join(found.channels)}; the model generates {', '.join(c.channels)}. Rename them "
            "with sdata.set_channel_names(...), or train a model on yours."
        )
    found.channels = tuple(c.channels)
    table, use_rep = found.table, model.card["use_rep"]
    made_by, known_by = model_of(table, use_rep), model.card["embedding_sha256"]
    width = found.embedding["cell"].shape[1]
    if width != c.n_embedding or (made_by and known_by and made_by != known_by):
        raise ValueError(
            f"obsm['{use_rep}_cell'] ({width} columns) was made by another model than the one that the generator was trained "
            f"with ({c.n_embedding} columns); run sf.tl.embed_spatia(data, model=...) with that one."
        )
    rows = _sources(table, groupby, model, source, target, cells, found.inside)
    shifts, niche_key = model.shifts[name], model.card["niche_key"]
    niche = table.obs[niche_key].astype(str).to_numpy()[rows] if niche_key in table.obs else np.full(len(rows), "")
    known = np.where(np.isin(niche, [*shifts]), niche, "")  # else the mean over all
    if unknown := sorted(set(niche) - set(shifts)):
        warnings.warn(
            f"the model was not trained on {name} in obs[{niche_key!r}] {', '.join(map(repr, unknown))}: the mean shift over all "
            "niches stands for its own there.",
            UserWarning,
            stacklevel=2,
        )
    shift = {kind: np.array([shifts[n][kind] for n in known]).reshape(len(rows), -1) for kind in ("genes", "profile")}
    one = np.ones(len(rows))
    place = np.full(len(rows), c.transitions.index(name))
    pairs = Pairs(
        rows, rows[:, None], one[:, None], one, place, shift["genes"], shift["profile"], place, LEVELS.index(level)
    )
    around = found.surroundings(c.n_neighbors)
    size, modules = batch_size or 64, (model.network.to(where), model.autoencoder.to(where))
    made, bar = {}, progress(None, "generating", total=len(rows) * n_variants, unit="cell")
    order = np.full(table.n_obs, -1)
    order[rows] = np.arange(len(rows))
    for part in found.parts:
        which = np.flatnonzero((order[part.slide.rows] >= 0) & part.inside)
        for some, crops in part.crops.batches(size, which):
            control = torch.from_numpy(found.scaled(crops, part, model.intensity)).to(where)
            here = order[part.slide.rows[some]]
            given = conditions(pairs, here, around).to(where)
            for variant in range(n_variants):
                noise = _noise(table.obs_names[rows[here]], seed, variant, model.latent_shape).to(where)
                states = model.generate(
                    control, given, noise, n_steps=n_steps, method=method, guidance=guidance, trajectory=trajectory
                ).cpu()
                found_here = {"image": states[-1] if trajectory else states, "source": control.cpu()}
                if trajectory:
                    found_here["trajectory"] = states.transpose(0, 1)
                for slot, values in found_here.items():
                    values = unscaled(values, model.intensity, c.channels, crops.numpy().dtype)
                    made.setdefault(slot, np.zeros((len(rows), n_variants, *values.shape[1:]), values.dtype))
                    made[slot][here, variant] = values
                bar.update(len(here))
    bar.close()
    for module in modules:
        module.cpu()
    made = {slot: values.reshape(-1, *values.shape[2:]) for slot, values in made.items()}
    profile = image_profile(made["image"], channels=c.channels, mpp=c.crop_um / c.crop_pixels, whole=level == "niche")
    repeated = np.repeat(np.arange(len(rows)), n_variants)
    variant = np.tile(np.arange(n_variants), len(rows))
    obs = pd.DataFrame(
        {"source_cell": table.obs_names[rows[repeated]].to_numpy(), "transition": name, "niche": niche[repeated],
         "variant": variant, "seed": seed},
        index=[f"{n}_{v}" for n, v in zip(table.obs_names[rows[repeated]], variant)],
    )  # fmt: skip
    out = AnnData(profile.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=profile.columns))
    for slot, values in made.items():
        out.obsm[slot] = values
    out.obsm["spatial"] = found.positions[rows[repeated]]
    out.uns["morphology"] = {
        "channels": list(c.channels), "mpp": c.crop_um / c.crop_pixels, "intensity": model.intensity,
        "times": times_of(n_steps, method),
        "params": {
            "source": source, "target": target, "level": level, "n_steps": n_steps, "method": method, "guidance": guidance,
            "random_state": seed, "spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started,
        },
    }  # fmt: skip
    if key_added is not None:
        slides = [part.slide for part in found.parts]
        _io.keep(data, key_added, out, slides, found.slide_of[rows[repeated]], out.obsm["spatial"])
    return out


def _sources(
    table: AnnData, groupby: str | None, model, source: str, target: str, cells, inside: np.ndarray
) -> np.ndarray:
    """Rows to start from; by the model's own rule for states where no column names them."""
    column = groupby or model.card["groupby"]
    if model.card["level"] == "niche":
        where, chosen = f"obsm[{column!r}]", sources_of(table, column, model.card["min_share"], source, target)
    elif groupby is None and column not in table.obs and model.states is not None:
        counts, _ = _io.counts(table, model.states.genes)
        logger.info("obs has no %r: states by the rule that comes with the model", column)
        where, chosen = "the model's rule", np.array(model.states(sparse.csr_matrix(counts)), dtype=str) == source
    else:
        states = _io.groups(table, column).astype(str).to_numpy()
        where, chosen = f"obs[{column!r}]", states == source
        if not (chosen & inside).any():
            near = difflib.get_close_matches(source, np.unique(states), 3, 0.4) or np.unique(states)[:8]
            raise ValueError(f"no cell of {where} in the image is {source!r}; there are {', '.join(map(repr, near))}.")
    if not (chosen & inside).any():
        raise ValueError(f"by {where} no {model.card['level']} in the image is {source!r}.")
    if cells is None:
        return np.flatnonzero(chosen & inside)
    rows = table.obs_names.get_indexer(list(cells))
    if (rows < 0).any():
        raise KeyError(f"obs_names has no {list(cells)[int(np.argmax(rows < 0))]!r}.")
    if (bad := ~(chosen & inside)[rows]).any():
        raise ValueError(
            f"{list(cells)[int(np.argmax(bad))]!r} is no cell of state {source!r} (by {where}) that lies in the image."
        )
    return rows


def _noise(names, seed: int, variant: int, shape) -> torch.Tensor:
    """Standard normal noise that belongs to the name of a cell."""
    draws = [
        np.random.default_rng([seed, variant, zlib.crc32(str(name).encode())]).standard_normal(shape, np.float32)
        for name in names
    ]
    return torch.from_numpy(np.stack(draws))
