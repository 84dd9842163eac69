"""Generate images of cells as they would look in another state, by a trained model."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, progress, resolve_seed, settings, warn
from spatiaflow.datasets._weights import resolve
from spatiaflow.models.slide import Slide
from spatiaflow.tl._images import (
    cells_with_images,
    channels_of,
    is_tiles,
    model_of,
    placed,
    with_channels,
)
from spatiaflow.tl._transitions import state_shares
from spatiaflow.tl._trust import warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models.morphology import MorphologyFlow

DEFAULT_WEIGHTS = "morphology-pancreas-small"
BRIGHTNESS = 5  # largest plausible ratio of the bright ends of two slides; 8 and 16 bits differ by more


@verb
@_io.each_object
def generate_morphology(
    data: AnnData | SpatialData,
    *,
    source: str,
    target: str,
    model: MorphologyFlow | str | Path | None = None,
    groupby: str | None = None,
    cells: Sequence[str] | None = None,
    n_samples: int = 1,
    n_steps: int = 5,
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
    """Generate images of cells of one state as they would look in another state, in their place in the tissue.

    The images show what cells of the target state, matched by expression, look like in such surroundings. They are no forecast
    of what an intervention would do.

    Parameters
    ----------
    data
        Cells with an image, and with the embeddings that the model was trained with; or a list or dict of such objects. With a
        model of niches, a table of tiles.
    source, target
        States. The model must know the transition.
    model
        :class:`spatiaflow.models.MorphologyFlow`, the path of one, or the name of weights that
        :func:`spatiaflow.datasets.weights` lists. None: ``"morphology-pancreas-small"``, with the transitions of one pancreas.
        Set ``model.config.guidance`` for classifier-free guidance.
    groupby
        Column of ``.obs`` with the states. None: the column that the model was trained with; where it is missing, the model's
        own rule, if it has one (``model.states``).
    cells
        Names of the source cells. None: all cells of the state.
    n_samples
        Images of each cell, from as many draws of noise.
    n_steps
        Steps of Heun's method. Each evaluates the network twice.
    trajectory
        Also keep the images at the steps in between.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, spatial_key, mpp
        Column of ``.obs`` with the slides, slot of the positions, and µm per unit of them.
    batch_size
        Images that are generated at a time, 256 when None.
    device
        Where to compute; ``settings.device`` when None.
    random_state
        Seed; ``settings.seed`` when None. The noise depends on the cell's name, not on its row.
    key_added
        Also keep the result in the SpatialData: as a table of this name, on points at the source cells
        (``f"{key_added}_points"``), so that spatial queries find it.

    Returns
    -------
    AnnData with one row a generated cell: ``X``, its profile by :func:`spatiaflow.pp.image_profile`; ``.obsm["image"]``, n x
    channels x pixels x pixels, in the type and scale of the image, and ``.obsm["source"]``, the same of the source cells; with
    ``trajectory`` ``.obsm["trajectory"]``, n x n_steps + 1 x channels x pixels x pixels; ``.obsm["spatial"]``, µm; ``.obs``
    with ``source_cell``, ``transition``, ``niche``, ``sample`` and ``seed``; ``.uns["morphology"]`` with ``channels``, ``mpp``,
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
        The embeddings were made by another model, the model does not know the transition, it was trained on tiles and these are
        cells (or the reverse), no cell is of the source state, channels differ, or ``key_added`` is given with an AnnData or is
        the name of another element.

    Warns
    -----
    UserWarning
        Data differ from the training data: over a third of the source cells have a score above 0.95 in
        ``.obs["X_spatia_ood"]`` (absent: not compared), or the image is many times brighter or darker. Source cells
        have no niche, or one that training did not see.
        What older models do not store is not compared.

    Examples
    --------
    >>> made = sf.tl.generate_morphology(
    ...     sdata, source="A", target="B", model="morphology-simulated-small", image_key="fluorescence"
    ... )
    >>> made.obsm["image"].shape
    (46, 4, 32, 32)
    """
    from spatiaflow.pp._morphology import measured

    where = Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    started, seed = time.perf_counter(), resolve_seed(random_state)
    _io.at_least_one(n_samples=n_samples, n_steps=n_steps)
    _io.at_least_one(None, batch_size=batch_size)
    _io.slot_name(key_added)
    cells = _io.names(cells, "cells")
    model = cast("MorphologyFlow", resolve(model, "MorphologyFlow", default=DEFAULT_WEIGHTS))
    name = f"{source} -> {target}"
    table, c, level = _io.unpack(data, table_key)[1], model.config, model.card["level"]
    _check_table(table, table_key, model, name)
    use_rep = model.card["use_rep"]
    slides = cells_with_images(data, where, use_rep, crop_um=c.crop_um, crop_pixels=c.crop_pixels)
    _check_embeddings(table, slides, model)
    slides = _as_in_training(slides, model)
    place, inside = placed(table, slides)
    rows = _sources(table, groupby, model, source, target, cells, inside)
    if (ood := Key.obs.ood(use_rep)) in table.obs:
        warn_of_difference(ood=table.obs[ood].to_numpy()[rows])
    niche = _niches(table, rows, model, name)
    with progress(None, "generating", total=len(rows) * n_samples, unit="cell") as bar:
        made = model.generate_cells(
            slides, place[rows], name, niche, n_samples=n_samples, n_steps=n_steps, trajectory=trajectory,
            batch_size=batch_size or 256, seed=seed, device=settings.torch_device(device), update=bar.update,
        )  # fmt: skip
    own = {str(channel).lower(): str(channel) for slide in slides for channel in slide.crops.channels}
    channels, scale = [own[channel] for channel in c.channels], c.crop_um / c.crop_pixels  # as the image calls them
    profile = measured(made["image"], channels, scale, whole=level == "niche")
    repeated, sample = np.repeat(np.arange(len(rows)), n_samples), np.tile(np.arange(n_samples), len(rows))
    names = table.obs_names[rows[repeated]]
    obs = pd.DataFrame(
        {"source_cell": names.to_numpy(), "transition": name, "niche": niche[repeated], "sample": sample, "seed": seed},
        index=[f"{cell}_{i}" for cell, i in zip(names, sample)],
    )
    out = AnnData(profile.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=profile.columns), obsm=made)
    at = place[rows[repeated]]
    out.obsm[Key.obsm.spatial] = np.concatenate([slide.xy for slide in slides])[at]
    out.uns["morphology"] = {
        "channels": channels, "mpp": scale,
        "intensity": {own[channel]: ends for channel, ends in model.intensity.items()},
        "times": [i / n_steps for i in range(n_steps + 1)],
        "params": _io.provenance(
            started, model=model, random_state=seed, source=source, target=target, level=level, n_samples=n_samples,
            n_steps=n_steps, guidance=c.guidance,
        ),
    }  # fmt: skip
    if key_added is not None:
        which = np.repeat(np.arange(len(slides)), [len(slide) for slide in slides])[at]
        _io.keep(data, key_added, out, slides, which, out.obsm[Key.obsm.spatial])
    return out


def _check_table(table: AnnData, table_key: str, model: MorphologyFlow, name: str) -> None:
    """Refuse a transition that the model does not know, and cells for a model of tiles or tiles for a model of cells."""
    known = model.config.transitions
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.3) or known
        raise ValueError(f"the model does not know {name!r}; it knows {', '.join(map(repr, near))}.")
    if is_tiles(table) != (model.card["level"] == "niche"):
        have, need = ("tiles", "cells") if is_tiles(table) else ("cells", "tiles of sf.pp.tiles")
        raise ValueError(
            f"the table {table_key!r} holds {have}; the model was trained on {need}. Give table_key= of them."
        )


def _check_embeddings(table: AnnData, slides: Sequence[Slide], model: MorphologyFlow) -> None:
    """Refuse embeddings of another model than the one whose embeddings the generator was trained with."""
    use_rep, width = model.card["use_rep"], slides[0].features.shape[1] // 3
    made_by, known_by = model_of(table, use_rep), model.card["embedding_sha256"]
    if width != model.config.n_embedding or (made_by and known_by and made_by != known_by):
        raise ValueError(
            f"obsm['{use_rep}_cell'] ({width} columns) was made by another model than the one that the generator was trained "
            f"with ({model.config.n_embedding} columns). Run sf.tl.embed_spatia(data, model=...) with that one."
        )


def _as_in_training(slides: Sequence[Slide], model: MorphologyFlow) -> list[Slide]:
    """Return the slides with crops in the channels and scale of the training slides."""
    from spatiaflow.models.preprocess import intensity_of

    found, channels = channels_of(slides), model.config.channels
    if sorted(found) != sorted(channels):
        raise ValueError(
            f"the image has channels {', '.join(found)}; the model generates {', '.join(channels)}. Rename them with "
            "sdata.set_channel_names(...), or train a model on yours."
        )
    _check_brightness(intensity_of(with_channels(slides, channels), channels), model.intensity)
    return with_channels(slides, channels, model.intensity)


def _niches(table: AnnData, rows: np.ndarray, model: MorphologyFlow, name: str) -> np.ndarray:
    """Return the niche of each source, "" where there is none; warn of these, and of niches that training did not see."""
    niche_key = model.card["niche_key"]
    niche = _io.as_text(table.obs[niche_key])[rows] if niche_key in table.obs else np.full(len(rows), "")
    if niche_key in table.obs and (missing := int((niche == "").sum())):
        warn(
            f"{missing} source cells have no niche in obs[{niche_key!r}]: the mean shift over all niches is used there."
        )
    if unknown := sorted(set(niche) - set(model.shifts[name])):
        warn(
            f"the model was not trained on {name} in obs[{niche_key!r}] {', '.join(map(repr, unknown))}: the mean shift over all "
            "niches is used there."
        )
    return niche


def _check_brightness(own: dict[str, list[float]], known: dict[str, list[float]]) -> None:
    """Warn where the crops, scaled as those of the training slides, would be white or black all over."""
    ratio = {name: (own[name][1] - own[name][0]) / max(known[name][1] - known[name][0], 1e-9) for name in known}
    name = max(ratio, key=lambda name: abs(np.log(max(ratio[name], 1e-9))))
    if not 1 / BRIGHTNESS < np.median([*ratio.values()]) < BRIGHTNESS:
        warn(
            f"the bright end of channel {name!r} is {own[name][1]:.4g}; in the training slides it was {known[name][1]:.4g}. "
            "Crops are scaled as they were there and come out white or black (8 bits against 16?). Bring the image to the "
            "scale of model.intensity, or train a model on this slide."
        )


def _sources(
    table: AnnData, groupby: str | None, model: MorphologyFlow, source: str, target: str, cells: Sequence[str] | None,
    inside: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Return the rows of the source cells; by the model's own rule for states where no column names them."""
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
        states = _io.as_text(_io.groups(table, column))
        where, chosen = f"obs[{column!r}]", states == source
        if not (chosen & inside).any():
            there = sorted(set(states) - {""})
            near = difflib.get_close_matches(source, there, 3, 0.4) or there[:8]
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
