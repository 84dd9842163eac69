"""One fit: what an interruption must not change."""

import re

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from spatiaflow._settings import logger, settings
from spatiaflow.train.fit import fit


class Batches(Dataset):
    epoch = 0

    def __len__(self):
        return 3

    def __getitem__(self, b):
        if b >= len(self):
            raise IndexError(b)
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * self.epoch + b))


class Noisy(L.LightningModule):
    """A network with dropout, so that its weights depend on the state of the random generator at every step."""

    def __init__(self, dies_in: int | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.dies_in, self.history = dies_in, {}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

    def training_step(self, batch, i):
        if self.current_epoch == self.dies_in and i == 1:
            raise KeyboardInterrupt
        return ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

    def validation_step(self, batch, _):
        self.log("val_loss", ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean(), batch_size=16)


def run(module, folder, resume=False):
    fit(
        module, Batches(), Batches(), max_epochs=5, patience=9, monitor="val_loss", seed=3, description="", resume=resume,
        checkpoint_dir=folder,
    )  # fmt: skip
    return torch.cat([p.detach().ravel() for p in module.parameters()])


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_inside_an_epoch_and_resumed_is_the_same(tmp_path, epoch):
    whole = run(Noisy(), tmp_path / "whole")
    with pytest.raises(BaseException):  # noqa: B017 - Lightning ends the process's run in its own way
        run(Noisy(dies_in=epoch), tmp_path / "killed")
    torch.testing.assert_close(run(Noisy(), tmp_path / "killed", resume=True), whole, rtol=0, atol=0)


def test_a_log_has_a_line_at_each_tenth_of_the_epochs_with_the_validation_score(capsys):
    with settings.override(progress=True):
        fit(Noisy(), Batches(), Batches(), max_epochs=20, patience=99, monitor="val_loss", seed=3, description="noisy")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    for k, line in enumerate(lines, 1):
        assert re.fullmatch(rf"noisy: {10 * k} %, epoch {2 * k} of 20, \d+ s, val_loss \d+\.\d+", line)


class Scripted(Noisy):
    """Its validation scores are known beforehand."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def validation_step(self, batch, _):
        self.log("val_loss", self.scores[self.current_epoch], batch_size=16)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (
            [0.5, 0.6, 0.7, 0.8, 0.9],
            "WARNING.*0.5 in the first epoch and is 0.9 in the last, 5; the weights of epoch 1",
        ),
        ([0.5, 0.4, 0.7, 0.8, 0.9], "INFO.*the weights of epoch 2 [(]0.4[)] are kept$"),
        ([0.5, 0.4, 0.3, 0.45, 0.4], None),
    ],
)
def test_a_score_that_got_worse_is_said_with_the_epoch_that_is_kept(tmp_path, caplog, scores, said):
    with settings.override(verbosity="info"):
        logger.propagate = True
        try:
            run(Scripted(scores), tmp_path)
        finally:
            logger.propagate = False
    found = {f"{r.levelname} {r.getMessage()}" for r in caplog.records if "val_loss" in r.getMessage()}
    assert len(found) == bool(said)
    assert not said or re.match(said, *found)
