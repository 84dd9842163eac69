"""One fit: what an interruption must not change."""

import re
import shutil

import pytest
import torch
from noisy import Batches, Noisy, run

from spatiaflow._settings import logger, settings
from spatiaflow.train.fit import fit


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_inside_an_epoch_and_resumed_is_the_same(tmp_path, epoch):
    whole = run(Noisy(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Noisy(dies_in=epoch), tmp_path / "killed")
    torch.testing.assert_close(run(Noisy(), tmp_path / "killed", resume=True), whole, rtol=0, atol=0)


def test_a_log_has_a_line_at_each_tenth_of_the_epochs_with_the_validation_score(capsys):
    with settings.override(progress=True):
        fit(Noisy(), Batches(), Batches(), max_epochs=20, patience=99, monitor="val_loss", seed=3, description="noisy")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    for k, line in enumerate(lines, 1):
        left = r", [\d.,]+ epoch/s, \d+ s left" if k < 10 else ""
        assert re.fullmatch(rf"noisy: {10 * k} %, epoch {2 * k} of 20, \d+ s{left}, val_loss \d+\.\d+", line)


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


def test_a_folder_that_was_moved_keeps_its_best_epoch(tmp_path):
    """The first epoch is the best: a run that forgot it would take a later one."""

    class Rising(Noisy):
        def validation_step(self, batch, _):
            self.log("val_loss", float(self.current_epoch), batch_size=16)

    whole = run(Rising(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Rising(dies_in=3), tmp_path / "killed")
    shutil.move(tmp_path / "killed", tmp_path / "moved")
    torch.testing.assert_close(run(Rising(), tmp_path / "moved", resume=True), whole, rtol=0, atol=0)


def test_a_run_that_stopped_early_is_not_trained_further(tmp_path):
    """Cut off between its last epoch and its save: another epoch would give another model."""

    class Dipping(Noisy):  # the loss falls again after the run has stopped
        def validation_step(self, batch, _):
            self.log("val_loss", [0.0, 1.0, 2.0, -1.0, -2.0][self.current_epoch], batch_size=16)

    module = Dipping()
    whole = run(module, tmp_path, patience=2)
    assert module.history["epoch"] == [0, 1, 2]
    again = Dipping()
    torch.testing.assert_close(run(again, tmp_path, resume=True, patience=2), whole, rtol=0, atol=0)
    assert again.history == module.history


def test_a_loss_that_is_no_number_keeps_some_weights(tmp_path):
    class Lost(Noisy):
        def validation_step(self, batch, _):
            self.log("val_loss", float("nan"), batch_size=16)

    whole = run(Lost(), tmp_path)
    torch.testing.assert_close(run(Lost(), tmp_path, resume=True), whole, rtol=0, atol=0)
