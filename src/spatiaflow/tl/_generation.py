"""Generate images of cells as they would look in another state, by a trained model."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from spatiaflow.tl._embedding import made_by
from spatiaflow.tl._images import cells_with_images, channels_of, is_tiles, placed, with_channels
from spatiaflow.tl._transitions import state_shares
from spatiaflow.tl._trust import warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models.morphology import MorphologyFlow

DEFAULT_WEIGHTS = "morphology-pancreas-genes"
BATCH = 256  # images that are generated at a time
BRIGHTNESS = 5  # largest plausible ratio of the bright ends of two slides; 8 and 16 bits differ by more


@verb
@_io.each_object
def generate_morphology(
    data: AnnData | SpatialData,
    *,
    source: str | None = None,
    target: str | None = None,
    shift: Mapping[str, float] | None = None,
    dose: float | Sequence[float] = 1.0,
    model: MorphologyFlow | str | Path | None = None,
    cells: Sequence[str] | None = None,
    n_samples: int = 1,
    n_steps: int = 5,
    layer: str | None = None,
    table_key: str = "table",
    image_key: str | None = None,
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    device: str | None = None,
    random_state: int | None = None,
    key_added: str | None = None,
) -> AnnData:
    """Generate images of cells as they would look in another state, or with other genes, in their place in the tissue.

    A model of genes edits each cell: its image goes back to noise under its own genes, and forward under genes that are shifted
    towards the target state, or by ``shift``. The images show what cells with such genes look like in such surroundings. They are
    no forecast of what an intervention would do.

    Parameters
    ----------
    data
        Cells with an image and with raw counts in ``X`` (for a model of pairs, with the embeddings that it was trained with); or
        a list or dict of such objects. With a model of niches, a table of tiles.
    source, target
        States, from the column that the model was trained with; where it is missing, by the model's own rule, if it has one
        (``model.states``). The model must know the transition. With ``shift``, ``source`` may be given alone, to edit its cells.
    shift
        Instead of ``target``: by how much to change the log counts (per median cell) of some genes, such as ``{"COL17A1": 1.0}``.
        Only for models of genes.
    dose
        Share of the edit, or several: 0 leaves a cell as it is, .5 goes half the way. Outside of 0 to 1 the edit is extrapolated,
        with a warning. For a model of pairs, a place on the path
        from the source (0, with noise) to the target (1), at the end of one of its steps.
    model
        :class:`spatiaflow.models.MorphologyEditor` (of genes) or :class:`spatiaflow.models.MorphologyFlow` (of pairs), the path
        of one, or the name of weights that :func:`spatiaflow.datasets.weights` lists. None:
        ``"morphology-pancreas-genes"``, of one pancreas. Set
        ``model.config.guidance`` for another strength of guidance, ``model.config.edit`` for another way to edit.
    cells
        Names of the source cells. None: all cells of the state; without ``source`` all cells of the table.
    n_samples
        Images of each cell and dose. For a model of pairs each is a draw of noise. A model of genes makes the first without noise
        and mixes 30 % of fresh noise into the others.
    n_steps
        Steps of Heun's method. Each evaluates the network twice.
    layer
        Layer with raw counts, which a model of genes reads; None reads ``X``.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, spatial_key, mpp
        Column of ``.obs`` with the slides, slot of the positions, and µm per unit of them.
    device
        Where to compute; ``settings.device`` when None.
    random_state
        Seed; ``settings.seed`` when None. The noise depends on the cell's name, not on its row.
    key_added
        Also keep the result in the SpatialData: as a table of this name, on points at the source cells
        (``f"{key_added}_points"``), so that spatial queries find it.

    Returns
    -------
    AnnData with one row a generated cell, by source cell, dose and sample: ``X``, its profile by
    :func:`spatiaflow.pp.image_profile`; ``.obsm["image"]``, n x channels x pixels x pixels, in the scale of the image (8 bits as
    such, more as float32), and ``.obsm["source"]``, the same of the source cells; ``.obsm["spatial"]``, µm; ``.obs`` with
    ``source_cell``, ``transition`` ("A -> B", or the shift in words), ``niche``, ``dose``, ``sample``, ``seed`` and, for
    models of genes, ``confidence``: of the training pairs from which the shift in this niche was learned (NaN with ``shift``);
    ``.uns["morphology"]`` with ``channels``, ``mpp``, ``intensity`` (background and bright end of each channel) and ``params``.

    With ``key_added`` a SpatialData is also written into. Sets:

    ``data[key_added]`` : the same, as a table
    ``data[f"{key_added}_points"]`` : where its rows are; with several slides ``f"{key_added}_{slide}"``, one for each

    Raises
    ------
    KeyError
        The embeddings, the column of states or a gene of ``shift`` are missing.
    TypeError
        ``model`` is a model of another kind.
    ValueError
        The embeddings were made by another model, the model does not know the transition or knows no genes, it was trained on
        tiles and these are cells (or the reverse), no cell is of the source state, channels differ, under half of the model's
        genes are measured, or ``key_added`` is given with an AnnData or is the name of another element.

    Warns
    -----
    UserWarning
        Data differ from the training data: over a third of the source cells have a score above 0.95 in
        ``.obs["X_spatia_ood"]`` (absent: not compared), or are brighter or darker in a channel than 95 % of the sources of this
        transition in training; genes are missing; or the image is many times brighter or darker. Source cells have no niche, or
        one that training did not see. A dose lies outside of 0 to 1.
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
    _io.slot_name(key_added)
    cells, doses = _io.names(cells, "cells"), _doses(dose)
    model = cast("MorphologyFlow", resolve(model, "MorphologyFlow", default=DEFAULT_WEIGHTS))
    edit, name = _edit(model, source, target, shift, doses, n_steps)
    table, c, level = _io.unpack(data, table_key)[1], model.config, model.card["level"]
    _check_table(table, table_key, model)
    _check_clusters(table, model)
    slides = _as_in_training(_slides_for(data, where, table, model, layer), model)
    place, inside = placed(table, slides)
    rows = _sources(table, model, source, target, cells, inside, layer)
    _compare(model, table, slides, rows, place[rows], name)
    niche = _niches(table, rows, model, name) if shift is None else np.full(len(rows), "")
    with progress(None, "generating", total=len(rows), unit="cell") as bar:
        made = model.generate_cells(
            slides, place[rows], edit, niche, doses=doses, n_samples=n_samples, n_steps=n_steps,
            batch_size=BATCH, seed=seed, device=settings.torch_device(device), update=bar.update,
        )  # fmt: skip
    own = {str(channel).lower(): str(channel) for slide in slides for channel in slide.crops.channels}
    channels, scale = [own[channel] for channel in c.channels], c.crop_um / c.crop_pixels  # as the image calls them
    profile = measured(made["image"], channels, scale, whole=level == "niche")
    obs = _described(table.obs_names[rows], name, niche, doses, n_samples, seed, model)
    out = AnnData(profile.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=profile.columns), obsm=made)
    at = place[np.repeat(rows, len(doses) * n_samples)]
    out.obsm[Key.obsm.spatial] = np.concatenate([slide.xy for slide in slides])[at]
    out.uns["morphology"] = {
        "channels": channels, "mpp": scale,
        "intensity": {own[channel]: ends for channel, ends in model.intensity.items()},
        "params": _io.provenance(
            started, model=model, random_state=seed, source=source or "", target=target or "", shift=dict(shift or {}),
            dose=doses, level=level, n_samples=n_samples, n_steps=n_steps, **_way(model, edit),
        ),
    }  # fmt: skip
    if key_added is not None:
        which = np.repeat(np.arange(len(slides)), [len(slide) for slide in slides])[at]
        _io.keep(data, key_added, out, slides, which, out.obsm[Key.obsm.spatial])
    return out


def _compare(
    model: MorphologyFlow, table: AnnData, slides: Sequence[Slide], rows: np.ndarray, place: np.ndarray, name: str
) -> None:
    """Warn where sources are unlike those that the model learned from: by their embeddings, and by how bright they are."""
    from spatiaflow.models.preprocess import stain_levels

    ood, stains = Key.obs.ood(model.card["use_rep"]), model.card.get("source_stains", {}).get(name)
    warn_of_difference(
        ood=table.obs[ood].to_numpy()[rows] if ood in table.obs else None,
        stains=(stain_levels(slides, place), stains) if stains else None,
    )


def _way(model: MorphologyFlow, edit: str | Mapping[str, float]) -> dict[str, Any]:
    """Return how a model edits, for the record."""
    from spatiaflow.models.editor import MorphologyEditor

    if not isinstance(model, MorphologyEditor):
        return {"guidance": model.config.guidance or 0.0}
    by = model.edit_of(edit if isinstance(edit, str) else "")
    return {"edit": by.kind} | ({"strength": by.strength} if by.kind == "linear" else {"guidance": by.guidance})


def _doses(dose: float | Sequence[float]) -> list[float]:
    """Return doses as a list, after a check."""
    doses = [dose] if isinstance(dose, Real) else list(dose) if isinstance(dose, Sequence | np.ndarray) else []
    if not doses or not all(isinstance(one, Real) and np.isfinite(one) for one in doses) or len({*doses}) < len(doses):
        raise ValueError(f"dose must be a number, or a list of different ones such as [0, 0.5, 1], not {dose!r}.")
    return [float(one) for one in doses]


def _edit(
    model: MorphologyFlow, source: str | None, target: str | None, shift: Mapping[str, float] | None, doses: list[float],
    n_steps: int,
) -> tuple[Any, str]:  # fmt: skip
    """Return the edit, a transition or a shift of genes, and its name; refuse what the model does not know."""
    from spatiaflow.models.editor import MorphologyEditor

    genes = model.genes if isinstance(model, MorphologyEditor) else []
    if (shift is None) == (target is None) or (target is not None and source is None):
        raise ValueError("give source= and target=, two states; or shift=, such as {'COL17A1': 1.0}, and not target=.")
    if genes and (bad := [d for d in doses if not 0 <= d <= 1]):
        warn(
            f"dose={bad[0]:g} lies outside of 0 to 1: it is extrapolated, and such cells may look like no cell of the tissue."
        )
    if not genes and (bad := [d for d in doses if not 0 <= d <= 1 or abs(d * n_steps - round(d * n_steps)) > 1e-6]):
        raise ValueError(
            f"dose={bad[0]:g} is no step of a model of pairs; with n_steps={n_steps} it takes 0, {1 / n_steps:g}, ... to 1. A "
            "model of genes takes any: sf.tl.train_morphology(data, config='default')."
        )
    if shift is None:
        name, known = f"{source} -> {target}", model.config.transitions
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.3) or known
            raise ValueError(f"the model does not know {name!r}; it knows {', '.join(map(repr, near))}.")
        return name, name
    if not genes:
        raise ValueError(
            f"shift= needs a model of genes; this one knows pairs of states: {', '.join(map(repr, model.config.transitions))}. "
            "Train one by sf.tl.train_morphology(data, config='default'), or give model='morphology-pancreas-genes'."
        )
    if (
        not isinstance(shift, Mapping)
        or not shift
        or not all(isinstance(v, Real) and np.isfinite(v) for v in shift.values())
    ):
        raise ValueError(
            f"shift must be a dict of genes and changes of log counts, such as {{'COL17A1': 1.0}}, not {shift!r}."
        )
    if missing := [gene for gene in shift if gene not in genes]:
        spelled = {gene.lower(): gene for gene in genes}
        near = [spelled[one] for one in difflib.get_close_matches(str(missing[0]).lower(), spelled, 3, 0.6)]
        raise KeyError(f"the model knows no gene {missing[0]!r}{'; it knows ' + ', '.join(near) if near else ''}.")
    return {gene: float(value) for gene, value in shift.items()}, ", ".join(f"{g} {v:+g}" for g, v in shift.items())


def _described(
    names: pd.Index, edit: str, niche: np.ndarray, doses: list[float], n_samples: int, seed: int, model: MorphologyFlow
) -> pd.DataFrame:
    """Return what ``.obs`` says of generated cells: by source cell, dose and sample."""
    n, each = len(names), len(doses) * n_samples
    obs = pd.DataFrame(
        {
            "source_cell": np.repeat(names.to_numpy(), each), "transition": edit, "niche": np.repeat(niche, each),
            "dose": np.tile(np.repeat(doses, n_samples), n), "sample": np.tile(np.arange(n_samples), n * len(doses)),
            "seed": seed,
        },
        index=[f"{cell}_{i}" for cell in names for i in range(each)],
    )  # fmt: skip
    if model.config.objective == "genes":
        shifts = model.shifts.get(edit, {})
        known = {one: shifts.get(one, shifts.get("", {})).get("confidence", np.nan) for one in set(niche)}
        obs["confidence"] = obs["niche"].map(known).astype(float)
    return obs


def _slides_for(
    data: AnnData | SpatialData, where: Where, table: AnnData, model: MorphologyFlow, layer: str | None
) -> list[Slide]:
    """Return slides with crops and what else the model reads: embeddings of its own model, or counts of its genes."""
    c = model.config
    size: dict[str, Any] = {"crop_um": c.crop_um, "crop_pixels": c.crop_pixels}
    if c.objective == "pairs":
        slides = cells_with_images(data, where, model.card["use_rep"], **size)
        _check_embeddings(table, slides, model)
        return slides
    slides, genes = cells_with_images(data, where, None, counts=True, layer=layer, **size), set(model.genes)
    for slide in slides:
        if missing := sorted(genes - set(slide.genes)):
            if 2 * len(missing) > len(genes):
                raise ValueError(
                    f"slide {slide.name!r} has {len(genes) - len(missing)} of the model's {len(genes)} genes; it needs half of "
                    f"them. Missing are {', '.join(missing[:5])} ... Are the names of the same kind (symbols, Ensembl)?"
                )
            warn(f"slide {slide.name!r} lacks {len(missing)} of the model's {len(genes)} genes: they count as average.")
    return slides


def _check_table(table: AnnData, table_key: str, model: MorphologyFlow) -> None:
    """Refuse cells for a model of tiles, and tiles for a model of cells."""
    if is_tiles(table) != (model.card["level"] == "niche"):
        have, need = ("tiles", "cells") if is_tiles(table) else ("cells", "tiles of sf.pp.tiles")
        raise ValueError(
            f"the table {table_key!r} holds {have}; the model was trained on {need}. Give table_key= of them."
        )


def _check_clusters(table: AnnData, model: MorphologyFlow) -> None:
    """Refuse states or niches that are clusters of another run than those that the generator was trained with."""
    for key, run in model.card.get("clustering_sha256", {}).items():
        if (own := _io.clustering_of(table, key)) and own != run:
            raise ValueError(
                f"obs[{key!r}] comes from another run of clustering than that of the training data, so equal numbers do not mean "
                f"the same cluster. Carry niches: sf.tl.cluster_niches(data, model=training_data, key_added={key!r}). Or cluster "
                "all samples together before training. If you matched them yourself, rename them in both."
            )


def _check_embeddings(table: AnnData, slides: Sequence[Slide], model: MorphologyFlow) -> None:
    """Refuse embeddings that were made in another way than those that the generator was trained with."""
    use_rep, width = model.card["use_rep"], slides[0].features.shape[1] // 3
    made, known = made_by(table, use_rep), {k: v for k, v in model.card.items() if k.startswith("embedding_") and v}
    if width != model.config.n_embedding or any(
        made[name] != known.get(name, made[name]) for name in made if made[name]
    ):
        how = ", ".join(known.get("embedding_modalities", []))
        raise ValueError(
            f"obsm['{use_rep}_cell'] ({width} columns) was made by another model, or in another way, than what the generator was "
            f"trained with ({model.config.n_embedding} columns{f' from {how}' if how else ''}). Run sf.tl.embed_spatia(data, "
            "model=..., modalities=..., scaling=...) as it was run then."
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
    if niche_key not in table.obs and len(model.shifts[name]) > 1:
        logger.info("obs has no %r: the mean shift over all niches is used", niche_key)
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
    table: AnnData, model: MorphologyFlow, source: str | None, target: str | None, cells: Sequence[str] | None,
    inside: np.ndarray, layer: str | None,
) -> np.ndarray:  # fmt: skip
    """Return the rows of the source cells; by the model's own rule for states where no column names them."""
    column = model.card["groupby"]
    if source is None:
        where, chosen = "all rows", np.ones(table.n_obs, bool)
    elif model.card["level"] == "niche":
        where, chosen = (
            f"obsm[{column!r}]",
            state_shares(table, column, model.card["min_share"]).is_source(source, target or ""),
        )
    elif column not in table.obs and model.states is not None:
        if missing := sorted(set(model.states.genes) - set(map(str, table.var_names))):
            raise KeyError(
                f"obs has no {column!r}, and the model's rule for states needs {len(missing)} genes that var_names lack, such as "
                f"{', '.join(missing[:3])}. Write the state of each cell into obs[{column!r}]."
            )
        counts, _ = _io.counts(table, model.states.genes, layer)
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
