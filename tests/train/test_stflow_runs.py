"""Training STFlow with checkpoints: the same model whatever happens on the way, and no checkpoints of another run."""

import numpy as np
import pytest
import torch
from small import FAST

import spatiaflow as sf


def test_killed_and_resumed_equals_uninterrupted(slides, tmp_path):
    from spatiaflow.train import batches

    whole = sf.tl.train_stflow(slides, config=FAST, genes=4)
    calls, original = [], batches.Regions.__getitem__

    def die(self, b):
        calls.append(b)
        if len(calls) == 8:  # in the second network's first epochs
            raise KeyboardInterrupt
        return original(self, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Regions, "__getitem__", die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            sf.tl.train_stflow(slides, config=FAST, genes=4, checkpoint_dir=tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))
    resumed = sf.tl.train_stflow(slides, config=FAST, genes=4, checkpoint_dir=tmp_path, resume=True)
    assert resumed.sha256 == whole.sha256
    np.testing.assert_equal(resumed.history, whole.history)
    for path in tmp_path.rglob("*.ckpt"):
        torch.load(path, weights_only=True)


def test_networks_of_a_run_that_was_overwritten_are_gone(slide, tmp_path, monkeypatch):
    from spatiaflow.train import stflow

    slides = [slide(name, n=6, seed=i) for i, name in enumerate(["a", "b", "c"])]
    arguments = {"config": FAST, "genes": 4, "max_epochs": 2}
    clean = sf.tl.train_stflow(slides, random_state=1, **arguments)
    sf.tl.train_stflow(slides, random_state=0, checkpoint_dir=tmp_path, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(stflow, "fit", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sf.tl.train_stflow(slides, random_state=1, checkpoint_dir=tmp_path, **arguments)
    resumed = sf.tl.train_stflow(slides, random_state=1, checkpoint_dir=tmp_path, resume=True, **arguments)
    assert resumed.sha256 == clean.sha256


@pytest.mark.parametrize("change", ["seed", "max_epochs", "genes", "data"])
def test_the_checkpoints_of_another_run_are_refused(slide, tmp_path, change):
    data, arguments = slide(), {"config": FAST, "genes": 4, "max_epochs": 1, "checkpoint_dir": tmp_path}
    sf.tl.train_stflow(data, **arguments)
    if change == "data":
        data.X.data[0] += 1
    else:
        arguments |= {"seed": {"random_state": 1}, "max_epochs": {"max_epochs": 2}, "genes": {"genes": 3}}[change]
    with pytest.raises(ValueError, match=f"another run.*{change}"):
        sf.tl.train_stflow(data, resume=True, **arguments)
    if change == "data":
        sf.tl.train_stflow(data, **arguments)  # without resume it is overwritten


def test_the_checkpoints_of_other_donors_are_refused(slide, tmp_path):
    slides = [slide(f"s{i}", seed=i) for i in range(2)]
    arguments = {"config": FAST, "genes": 4, "max_epochs": 1, "checkpoint_dir": tmp_path}
    sf.tl.train_stflow(slides, **arguments)
    for one, donor in zip(slides, "AB"):
        one.obs["donor"] = donor
    with pytest.raises(ValueError, match="another run.*donors"):
        sf.tl.train_stflow(slides, resume=True, donor_key="donor", **arguments)
