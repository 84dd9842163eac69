"""One fit of one network by Lightning: quiet, resumable, best weights kept."""

from __future__ import annotations

import logging
import math
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from torch.utils.data import DataLoader, Dataset

from spatiaflow._settings import logger, progress
from spatiaflow.models import _base
from spatiaflow.train.checkpoint import BEST, NEWEST, Files, check_newest, read_weights


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

    Raises
    ------
    ValueError
        With ``resume``: a file in ``checkpoint_dir`` is damaged or of something else.
    """
    where = tempfile.TemporaryDirectory() if checkpoint_dir is None else nullcontext(checkpoint_dir)
    with where as folder, _quiet_lightning(), torch.random.fork_rng():
        newest = check_newest(Path(folder), module.state_dict()) if resume else None
        epochs = _Epochs(training, seed, description)
        kept = _Kept(Path(folder), monitor, newest=checkpoint_dir is not None)
        trainer = L.Trainer(
            accelerator=accelerator, devices=devices, precision=precision, max_epochs=max_epochs, logger=False,
            callbacks=[EarlyStopping(monitor, patience=patience), epochs, kept], plugins=[Files()],
            enable_checkpointing=True, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            gradient_clip_val=1.0, default_root_dir=folder, log_every_n_steps=1,
        )  # fmt: skip
        with _interrupts():
            trainer.fit(
                module,
                DataLoader(training, batch_size=None, num_workers=workers),
                DataLoader(validation, batch_size=None),
                ckpt_path=newest,
                weights_only=True,
            )
        module.load_state_dict(read_weights(kept.folder / BEST, module.state_dict())[1])
        module.history = epochs.history  # also of a run that was done before it was resumed
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


@contextmanager
def _interrupts() -> Iterator[None]:
    """Let an interrupt be one: Lightning turns it into SystemExit and has the process ignore all later ones."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


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
        if batch_idx == 0:  # dropout; not earlier: a resumed run makes its loader, which draws too, at another moment
            torch.manual_seed(self.seed * 1_000_003 + trainer.current_epoch)
            if trainer.current_epoch:
                torch.empty((), dtype=torch.int64).random_()  # the draw of the loader of every later epoch

    def on_train_epoch_end(self, trainer, module):
        row = {"epoch": trainer.current_epoch} | {k: float(v) for k, v in trainer.callback_metrics.items()}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        module.history = self.history
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k != "epoch"})
        self.bar.update()

    def on_train_end(self, trainer, module):
        self.bar.close()

    def on_exception(self, trainer, module, exception):
        if self.bar is not None:
            self.bar.close()

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]


class _Kept(Checkpoint):
    """Writes the best weights, then the state of the last epoch, at the end of every epoch.

    In this order: a run that is cut off in between repeats the epoch, and writes the same best weights again. Lightning's own
    callback remembers the folder, so that a folder that was moved would lose what its best epoch was.
    """

    def __init__(self, folder: Path, monitor: str, newest: bool):
        self.folder, self.monitor, self.newest = folder, monitor, newest
        self.best: float | None = None
        self.stopped = False

    def setup(self, trainer, module, stage):
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))  # that of the first process

    def on_train_start(self, trainer, module):
        trainer.should_stop = self.stopped  # a run that was cut off after its last epoch has no other

    def on_train_epoch_end(self, trainer, module):
        self.stopped = trainer.should_stop
        value = float(trainer.callback_metrics[self.monitor])
        value = math.inf if math.isnan(value) else value
        if self.best is None or value < self.best:
            self.best = value
            if trainer.is_global_zero:
                _base.save(self.folder / BEST, type(module).__name__, {}, module.state_dict())
        if self.newest:
            trainer.save_checkpoint(self.folder / NEWEST)
        trainer.strategy.barrier()

    def state_dict(self):
        return {"best": self.best, "stopped": self.stopped}

    def load_state_dict(self, state):
        self.best, self.stopped = state["best"], state["stopped"]
