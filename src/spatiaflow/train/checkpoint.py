"""The folder of a training: one run at a time, files that are checked before they are used, and nothing of anyone else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from spatiaflow import _files, _runs
from spatiaflow._runs import BEST, FINISHED, NEWEST
from spatiaflow.models import _base
from spatiaflow.models.preprocess import spread
from spatiaflow.models.slide import Slide


@contextmanager
def claim(folder: Path, resume: bool, **run) -> Iterator[None]:
    """Hold the folder of a training, as :func:`spatiaflow._runs.claim` does; its helper processes have it already."""
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    with _runs.claim(folder, resume, **run):
        yield


def identity(slides: Sequence[Slide]) -> dict[str, Any]:
    """What tells the cells of one run from those of another, for :func:`claim`: all positions, some counts and images."""
    pictured = [s for s in slides if s.crops is not None]
    rows = [np.flatnonzero(s.crops.inside) for s in pictured]
    return {
        "slides": tuple(s.name for s in slides),
        "data": [v for s in slides for v in (s.xy, s.features, None if s.crops is None else s.crops.range)],
        "counts": [s.counts[spread(len(s), 4000)] for s in slides if s.counts is not None],
        "images": [s.crops.read(r[spread(len(r), 64)]).numpy() for s, r in zip(pictured, rows)],
    }


class Files(TorchCheckpointIO):
    """Lightning's checkpoints, written atomically beside their place: its own go through /tmp, from where a move is a copy."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        """Write a checkpoint that is whole or not there."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with _files.atomic(path) as temporary:
            torch.save(checkpoint, temporary)


def check_newest(folder: Path, network: dict[str, Tensor]) -> Path | None:
    """Path of the checkpoint to go on from, after it and the best weights were checked; None where there is none.

    Parameters
    ----------
    network
        Tensors of the network that will take them.

    Raises
    ------
    ValueError
        One of the files is damaged, empty or of something else.
    """
    path = folder / NEWEST
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise _damaged(path, str(error).strip().split("\n")[0]) from error
    wanted = {"state_dict", "callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch"}
    if not isinstance(found, dict) or not wanted <= set(found):
        raise _damaged(path, "it holds something else than the state of a training")
    try:
        _base.check_tensors(found["state_dict"], network)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    read_weights(folder / BEST, network)
    return path


def read_weights(path: Path, network: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Description and tensors of a file of weights in the folder of a run.

    Raises
    ------
    ValueError
        It is missing, damaged, or holds another network.
    """
    try:
        description, tensors = _base.read(path)
        _base.check_tensors(tensors, network)
    except (ValueError, FileNotFoundError) as error:
        raise _damaged(path, str(error)) from error
    return description, tensors


def _damaged(path: Path, found: str) -> ValueError:
    gone = [path, path.with_name(NEWEST)] if path.name == BEST else [path]
    return ValueError(
        f"{str(path)!r} is damaged, or not of this run: {found}. Expected: what the training writes there. Remove "
        f"{' and '.join(repr(str(one)) for one in gone)} and repeat the call with resume=True: this network is then trained "
        f"from {'its last epoch' if path.name == FINISHED else 'the start'}, with the same result."
    )
