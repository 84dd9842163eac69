"""How cells of one state would look in another: generate their images by a trained model."""

from __future__ import annotations

import difflib
import time
import warnings
import zlib

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
from spatiaflow.tl._transitions import state_shares

DEFAULT_WEIGHTS = "morphology-pancreas-small"
UNLIKE = 5  # times as bright or as dark: no stain varies so much, bits do


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
        Images generated at a time, 256 by default.
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

    Examples
    --------
    >>> made = sf.tl.generate_morphology(
    ...     sdata, source="A", target="B", model="morphology-simulated-small", image_key="fluorescence"
    ... )
    >>> made.obsm["image"].shape
    (46, 4, 32, 32)
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
    _check_brightness(found.intensity, model.intensity)
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
    size, modules = batch_size or 256, (model.network.to(where), model.autoencoder.to(where))
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
                noise = _noise(table.obs_names[rows[here]], seed, variant, c.n_latent).to(where)
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
    own = {str(name).lower(): str(name) for part in found.parts for name in part.crops.channels}
    channels = [own[name] for name in c.channels]  # as the image calls them
    profile = image_profile(made["image"], channels=channels, mpp=c.crop_um / c.crop_pixels, whole=level == "niche")
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
        "channels": channels, "mpp": c.crop_um / c.crop_pixels,
        "intensity": {own[name]: ends for name, ends in model.intensity.items()},
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


def _check_brightness(own: dict[str, list[float]], known: dict[str, list[float]]) -> None:
    """Warn where the crops, scaled as those of the training slides, can only come out white or black."""
    ratio = {name: (own[name][1] - own[name][0]) / max(known[name][1] - known[name][0], 1e-9) for name in known}
    name = max(ratio, key=lambda name: abs(np.log(max(ratio[name], 1e-9))))
    if not 1 / UNLIKE < np.median([*ratio.values()]) < UNLIKE:
        warnings.warn(
            f"the bright end of channel {name!r} is {own[name][1]:.4g}; in the training slides it was {known[name][1]:.4g}. "
            "Crops are scaled as they were there and come out white or black (8 bits against 16?). Bring the image to the "
            "scale of model.intensity, or train a model on this slide.",
            UserWarning,
            stacklevel=3,
        )


def _sources(
    table: AnnData, groupby: str | None, model, source: str, target: str, cells, inside: np.ndarray
) -> np.ndarray:
    """Rows to start from; by the model's own rule for states where no column names them."""
    column = groupby or model.card["groupby"]
    if model.card["level"] == "niche":
        where, chosen = (
            f"obsm[{column!r}]",
            state_shares(table, column, model.card["min_share"]).is_source(source, target),
        )
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


def _noise(names, seed: int, variant: int, n: int) -> torch.Tensor:
    """Standard normal noise (cells x n) that belongs to the name of a cell."""
    draws = [
        np.random.default_rng([seed, variant, zlib.crc32(str(name).encode())]).standard_normal(n, np.float32)
        for name in names
    ]
    return torch.from_numpy(np.stack(draws))
