"""One fit: what an interruption must not change."""

import shutil

import pytest
import torch
from noisy import Noisy, run


@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_inside_an_epoch_and_resumed_is_the_same(tmp_path, epoch):
    whole = run(Noisy(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Noisy(dies_in=epoch), tmp_path / "killed")
    torch.testing.assert_close(run(Noisy(), tmp_path / "killed", resume=True), whole, rtol=0, atol=0)


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
