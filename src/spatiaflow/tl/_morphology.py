"""Train a generator of cell images on pairs of cells of two states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import resolve_seed, settings
from spatiaflow._slides import check_together
from spatiaflow._slides.crops import share_memory
from spatiaflow.models.slide import Slide
from spatiaflow.tl._embedding import check_alike, made_by
from spatiaflow.tl._images import LEVELS, cells_with_images, channels_of, is_tiles, placed, with_channels
from spatiaflow.tl._transitions import standardised, targets_of

if TYPE_CHECKING:
    from spatiaflow.models.morphology import MorphologyConfig, MorphologyFlow
    from spatiaflow.train.pairs import Pairs


@verb
def train_morphology(
    data: AnnData | SpatialData | Sequence[AnnData | SpatialData] | Mapping[str, AnnData | SpatialData],
    *,
    pairs_key: str = "transition",
    use_rep: str = "X_spatia",
    profile_key: str | None = "morphology",
    config: MorphologyConfig | str | None = None,
    validation: float = 0.1,
    max_epochs: int = 10,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
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
) -> MorphologyFlow:
    """Train a generator of cell images for the transitions that :func:`pair_transitions` found and for any shift of genes.

    The default model is one flow from noise to the images of all cells, under their genes, depth and neighbours. To edit a cell,
    its image goes back to noise under its own genes, and forward under shifted ones. Pairs say by how much the genes of one state
    differ from those of another, in each niche. A linear map from genes to images is fitted beside it. Each transition is edited
    by the one that is nearer to real cells of the target state in the held-out band, at its best strength: ``model.edits``.
    What was compared is in ``model.card["validation_scores"]``, relative to unchanged cells (1).

    ``config="pairs"`` trains SPATIA's published objective: a flow from the image of a source cell, with noise, to the image of
    its target, conditioned on embeddings, the transition, and the mean shift of genes and morphology in it.

    Both run between latents of an autoencoder that is fitted to the same images, all in a canonical orientation.

    Parameters
    ----------
    data
        Cells with an image, raw counts and pairs, and for a model of pairs embeddings and morphology: one object, or a list or
        dict of them, on which one model is trained. A table of :func:`spatiaflow.pp.tiles` trains a model of niches, by pairs:
        make it with ``pp.tiles(sdata, groupby=..., pool=[...], key_added="tiles")``, and give ``table_key="tiles"`` and a config
        whose ``crop_um`` is the side of a tile.
    pairs_key
        ``key_added`` of :func:`pair_transitions`.
    use_rep
        Pairs: embeddings of the levels: ``.obsm[f"{use_rep}_cell"]``, ``_niche`` and ``_tissue``.
    profile_key
        Pairs: DataFrame of :func:`spatiaflow.pp.morphology_profile` in ``.obsm``. None trains without the alignment loss and
        without the shift of morphology.
    config
        Sizes and training settings: a :class:`spatiaflow.models.MorphologyConfig`, or ``"default"`` (genes) or ``"pairs"``.
        None: the defaults.
    validation
        Share of each slide that is held out as a band, to choose the epoch and the edit.
    max_epochs
        Epochs. One is at least 200 steps of the flow, and 300 of the autoencoder up to 3,000 in all.
    checkpoint_dir, resume
        Folder for checkpoints, for this run alone, and whether to continue the run that it holds. A continued run gives the
        model of an uninterrupted one.
    layer
        Layer with raw counts. None reads ``X``.
    table_key, image_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key, spatial_key, mpp
        Column of ``.obs`` with the slides, slot of the positions, and µm per unit of them.
    device
        Where to train; ``settings.device`` when None.
    random_state
        Seed; ``settings.seed`` when None.

    Returns
    -------
    :class:`spatiaflow.models.MorphologyEditor`, or with ``config="pairs"`` a :class:`spatiaflow.models.MorphologyFlow`, with
    ``.history``, ``.card`` and ``.save(path)``.

    Raises
    ------
    KeyError
        Pairs, embeddings or morphology are missing.
    ValueError
        Tiles, ``use_rep`` or ``profile_key`` without ``objective="pairs"`` in the config, a transition has no pairs, no pair
        lies in the image, ``validation`` leaves none, or ``checkpoint_dir`` holds another run or a damaged file.
    RuntimeError
        Another run uses ``checkpoint_dir``; the message names it.
    OSError
        The disk is full.

    Warns
    -----
    UserWarning
        Held-out cells of a state are too few to choose the edit, which is then chosen on cells that were trained on.

    Examples
    --------
    A small network for one epoch takes about 20 seconds:

    >>> config = sf.models.MorphologyConfig(crop_um=16, crop_pixels=16, width=32, n_layers=2)
    >>> model = sf.tl.train_morphology(
    ...     sdata, image_key="fluorescence", config=config, validation=0.2, max_epochs=1
    ... )
    >>> model
    MorphologyEditor: 60 genes, A -> B; channels dapi, bound, rna, prot
    """
    from spatiaflow.models.morphology import MorphologyConfig
    from spatiaflow.train import editor, morphology, pairs

    where = Where(table_key, image_key, shapes_key, labels_key, library_key, spatial_key, mpp)
    seed, config = resolve_seed(random_state), MorphologyConfig.of(config)
    if resume and checkpoint_dir is None:
        raise ValueError("resume=True needs the checkpoint_dir of the run to continue.")
    _io.at_least_one(max_epochs=max_epochs)
    _io.share(validation=validation)
    objects, by_pairs = _io.objects_of(data), config.objective == "pairs"
    if not by_pairs and (use_rep != "X_spatia" or profile_key not in ("morphology", None)):
        raise ValueError(
            'use_rep and profile_key are read by a model of pairs alone: give config="pairs", or leave them out.'
        )
    slides: list[Slide] = []
    tables: list[AnnData] = []
    rows: list[tuple[list[Slide], int]] = []
    cut: dict[str, Any] = {"crop_um": config.crop_um, "crop_pixels": config.crop_pixels}
    for label, one in objects.items():
        own = cells_with_images(
            {label: one} if len(objects) > 1 else one, where, use_rep if by_pairs else None, counts=True, layer=layer,
            together=False, **cut,
        )  # fmt: skip
        table = _io.unpack(one, table_key)[1]
        rows.append((own, sum(map(len, slides))))
        tables.append(table)
        slides += own
    check_together(slides)
    share_memory(slides)
    params = _same_params(tables, pairs_key)
    level = _level(tables[0], by_pairs)
    found = [
        _pairs(table, pairs_key, params["transitions"], *placed(table, *own), LEVELS.index(level))
        for table, own in zip(tables, rows)
    ]
    config = replace(config, channels=channels_of(slides), transitions=params["transitions"])
    about = {name: params[name] for name in ("pairs", "groupby", "niche_key", "min_share")} | {"level": level}
    about |= {
        "clustering_sha256": _one_clustering(dict(zip(objects, tables)), (params["groupby"], params["niche_key"]))
    }
    options: dict[str, Any] = {
        "validation": validation, "max_epochs": max_epochs, "resume": resume, "seed": seed,
        "checkpoint_dir": None if checkpoint_dir is None else Path(checkpoint_dir), "device": settings.torch_device(device),
    }  # fmt: skip
    arguments = (
        with_channels(slides, config.channels), pairs.stacked([one for one, _ in found]),
        np.concatenate([niche for _, niche in found]),
    )  # fmt: skip
    if not by_pairs:
        return editor.train_editor(*arguments, config, about=about | {"use_rep": ""}, **options)
    profile, features = _profile(tables, [own for own, _ in rows], profile_key)
    check_alike(tables, use_rep, [slide.features.shape[1] for slide in slides], "the objects of data")
    about |= {"use_rep": use_rep} | made_by(tables[0], use_rep)
    return morphology.train_morphology(
        *arguments, replace(config, profile=features), profile=profile, about=about, **options
    )


def _level(table: AnnData, by_pairs: bool) -> str:
    """Return whether rows are cells or tiles; refuse tiles without pairs: a tile is no cell with neighbours."""
    if not is_tiles(table):
        return "cell"
    if not by_pairs:
        raise ValueError(
            "the table holds tiles, which only a model of pairs is trained on: give "
            "config=sf.models.MorphologyConfig(objective='pairs', crop_um=...)."
        )
    return "niche"


def _same_params(tables: Sequence[AnnData], key: str) -> dict:
    """Return what the pairs of all tables have in common: how states are told apart, and pairs of each transition."""
    out: dict = {}
    for table in tables:
        if Key.uns.pairs(key) not in table.uns or Key.obsp.plan(key) not in table.obsp:
            raise KeyError(
                f"uns has no {Key.uns.pairs(key)!r}; run sf.tl.pair_transitions(data, transitions=..., groupby=...) first."
            )
        found, params = table.uns[Key.uns.pairs(key)], table.uns[Key.uns.plan(key)]["params"]
        own = {name: params[name] for name in ("groupby", "niche_key", "min_share")}
        if out and own != {name: out[name] for name in own}:
            raise ValueError(f"the pairs of the objects were made in different ways: {own} and others. Pair all alike.")
        out = out or own | {"pairs": {}}
        for name in map(str, params["transitions"]):
            out["pairs"][name] = out["pairs"].get(name, 0) + int((found["transition"] == name).sum())
    return out | {"transitions": list(out["pairs"])}


def _one_clustering(tables: Mapping[str, AnnData], columns: Sequence[str]) -> dict[str, str]:
    """Return which run found the clusters in each column, where one did; refuse those of several runs."""
    for key in columns:
        if (apart := _io.different_clusterings(tables, key)) is not None:
            raise ValueError(
                f"obs[{key!r}] of objects {apart[0]!r} and {apart[1]!r} comes from separate runs, so equal numbers do not mean "
                "the same cluster. Run sf.tl.cluster_niches or sf.tl.cluster_cells on the whole list, then pair again."
            )
    found = {key: max(_io.clustering_of(table, key) for table in tables.values()) for key in columns}
    return {key: run for key, run in found.items() if run}


def _profile(
    tables: Sequence[AnnData], slides: Sequence[Sequence[Slide]], key: str | None
) -> tuple[np.ndarray, list[str]]:
    """Return the standardised morphology of all cells, one slide after the other, and the names of its columns."""
    if key is None:
        return np.zeros((sum(len(slide) for own in slides for slide in own), 0)), []
    frames = [_io.morphology(table, key, "profile_key") for table in tables]
    names = [name for name in frames[0].columns if all(name in frame for frame in frames)]
    parts = [frame[names].iloc[slide.rows] for frame, own in zip(frames, slides) for slide in own]
    return standardised(pd.concat(parts)), [*map(str, names)]


def _pairs(
    table: AnnData, key: str, names: list[str], place: np.ndarray, inside: np.ndarray, level: int
) -> tuple[Pairs, np.ndarray]:
    """Return the pairs of a table whose cells lie inside the image, and the niche of each."""
    from spatiaflow.train.pairs import Pairs, shares

    found, params = table.uns[Key.uns.pairs(key)], table.uns[Key.uns.plan(key)]["params"]
    source = table.obs_names.get_indexer(found["source"])
    if (source < 0).any():
        raise KeyError(
            f"uns[{Key.uns.pairs(key)!r}] names a source that is no row of the table (first: "
            f"{found['source'].iloc[int(np.argmax(source < 0))]!r}). If rows were dropped, run sf.tl.pair_transitions(data, ...) "
            "once more."
        )
    transition = pd.Index(names).get_indexer(found["transition"])
    allowed = np.zeros((len(names), table.n_obs), bool)
    for name, rows in targets_of(table, params).items():
        allowed[names.index(name), rows] = inside[rows]
    # a cell may be the source of several transitions, whose targets stand in one row of the plan
    target, share = shares(sparse.csr_matrix(table.obsp[Key.obsp.plan(key)])[source], allowed[transition])
    kept = np.flatnonzero(inside[source] & (share.sum(1) > 0))
    n = len(source)
    pairs = Pairs(
        place[source], place[target].clip(0), share, found["confidence"].to_numpy(float), transition, np.zeros((n, 0)),
        np.zeros((n, 0)), np.zeros(n, int), level,
    )  # fmt: skip
    return pairs.rows(kept), found["niche"].astype(str).to_numpy()[kept]
