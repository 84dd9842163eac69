"""Train a network with Lightning, without its log messages. Training can be resumed, and the best weights are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from scipy import sparse
from torch.utils.data import DataLoader, Dataset

from spatiaflow._settings import logger, progress

NEWEST, BEST, RUN = "last.ckpt", "best.ckpt", "run.json"


def claim(folder: Path, resume: bool, **run) -> None:
    """Note in a checkpoint folder what a run is made of; when resuming, refuse the state of another run.

    Parameters
    ----------
    run
        Settings (anything with a faithful ``repr``) and arrays, by name; a list of them counts as one.
    """
    now = {name: _digest(value) for name, value in run.items()}
    note = folder / RUN
    if resume and any(folder.rglob("*.ckpt")):
        known = json.loads(note.read_text()) if note.exists() else {}
        if other := [name for name in now if known.get(name) != now[name]]:
            raise ValueError(
                f"{str(folder)!r} holds another run: it differs in {', '.join(other)}. Give the arguments and data of that "
                "run, or another checkpoint_dir."
            )
    if not resume:  # remove files of an earlier run; after an early interruption they would be taken for this run's
        for old in [*folder.rglob("*.ckpt"), *folder.glob("fold_*")]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now, indent=1))


def _digest(value) -> str:
    digest = hashlib.sha256()
    for one in value if isinstance(value, list) else [value]:
        if sparse.issparse(one):
            parts = [one.data, one.indices, one.indptr]
        else:
            parts = [one] if isinstance(one, np.ndarray) else [np.frombuffer(repr(one).encode(), np.uint8)]
        for part in parts:
            digest.update(f"{part.shape}{part.dtype}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def fit(
    module: Any,  # LightningModule with a history
    training: Dataset,
    validation: Dataset,
    *,
    max_epochs: int,
    patience: int,
    monitor: str,
    seed: int,
    description: str,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    devices: int | str = 1,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    workers: int = 0,
) -> None:
    """Train ``module`` and leave it with the weights of its best validation epoch.

    With ``checkpoint_dir`` the state of the last epoch is kept there; ``resume`` goes on from it and gives what an
    uninterrupted run gives. Nothing is written anywhere else.
    """
    where = tempfile.TemporaryDirectory() if checkpoint_dir is None else nullcontext(checkpoint_dir)
    with where as folder, _quiet_lightning(), torch.random.fork_rng():
        best = ModelCheckpoint(
            folder, BEST.removesuffix(".ckpt"), monitor, save_weights_only=True, enable_version_counter=False
        )
        epochs = _Epochs(training, seed, description)
        callbacks = [EarlyStopping(monitor, patience=patience), best, epochs]
        if checkpoint_dir is not None:
            last = ModelCheckpoint(folder, NEWEST.removesuffix(".ckpt"), enable_version_counter=False)
            callbacks.append(last)
        trainer = L.Trainer(
            accelerator=accelerator, devices=devices, precision=precision, max_epochs=max_epochs, logger=False,
            callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            gradient_clip_val=1.0, default_root_dir=folder, log_every_n_steps=1,
        )  # fmt: skip
        newest = Path(folder) / NEWEST
        trainer.fit(
            module,
            DataLoader(training, batch_size=None, num_workers=workers),
            DataLoader(validation, batch_size=None),
            ckpt_path=newest if resume and _readable(newest) else None,
            weights_only=True,
        )
        saved = torch.load(Path(folder) / BEST, weights_only=True, map_location="cpu")
        module.load_state_dict(saved["state_dict"])
        module.history = epochs.history  # needed if the run was already complete when it was resumed
        _warn_if_worse(module.history.get(monitor, []), monitor, description)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's messages and warnings away."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|Checkpoint directory|log_every_n_steps|LeafSpec).*")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels):
                one.setLevel(level)


def _warn_if_worse(scores: list[float], monitor: str, description: str) -> None:
    """Say which epoch is kept where training did not improve on the first one, or ended worse than it."""
    if len(scores) < 2 or scores[-1] <= scores[0]:
        return
    kept = int(np.nanargmin(scores))
    logger.log(
        logging.INFO if kept else logging.WARNING,
        "%s: %s was %.4g in the first epoch and is %.4g in the last, %d; the weights of epoch %d (%.4g) are kept%s",
        description or "training", monitor, scores[0], scores[-1], len(scores), kept + 1, scores[kept],
        "" if kept else ". Nothing improved on the first epoch: lower config.learning_rate, or give more data",
    )  # fmt: skip


def _readable(checkpoint: Path) -> bool:
    if not checkpoint.exists():
        return False
    try:
        torch.load(checkpoint, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        logger.warning("%s is damaged: this network starts anew", checkpoint)
        return False
    return True


class _Epochs(Callback):
    """Seeds every epoch by its number, collects the history, and shows one progress bar."""

    def __init__(self, training: Dataset, seed: int, description: str):
        self.training, self.seed, self.description = training, seed, description
        self.history: dict[str, list[float]] = {}
        self.bar: Any = None

    def on_train_start(self, trainer, module):
        self.bar = progress(None, self.description, total=trainer.max_epochs, unit="epoch")
        self.bar.update(trainer.current_epoch)

    def on_train_epoch_start(self, trainer, module):
        self.training.epoch = trainer.current_epoch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:  # for dropout. Not earlier: the loader draws too, and a resumed run makes it at another time
            torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)
            if trainer.current_epoch:
                torch.empty((), dtype=torch.int64).random_()  # the loader makes this draw in every later epoch

    def on_train_epoch_end(self, trainer, module):
        row = {"epoch": trainer.current_epoch} | {k: float(v) for k, v in trainer.callback_metrics.items()}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        module.history = self.history
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k != "epoch"})
        self.bar.update()

    def on_train_end(self, trainer, module):
        self.bar.close()

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]
