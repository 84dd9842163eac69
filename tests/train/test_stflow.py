"""Training STFlow: the same model whatever happens on the way, and folds that hold out what they should."""

import dataclasses

import numpy as np
import pytest
import torch

import spatiaflow as sf
from spatiaflow.models import STFlowConfig

FAST = dataclasses.replace(STFlowConfig.of("default"), width=16, n_heads=2, max_epochs=3, regions=2)


def test_training_is_seeded_and_quiet(slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (sf.tl.train_stflow(slides, config=FAST, genes=4) for _ in range(2))
    assert one.sha256 == two.sha256
    assert not list(tmp_path.iterdir())  # no lightning_logs, no checkpoints
    assert len(one.networks) == 3
    assert set(one.card["data"]) == {"s0", "s1", "s2"}
    assert len(one.history["train_loss"]) == len(one.history["val_pearson"]) == 9


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


@pytest.mark.usefixtures("own_draws")
def test_paper_config_is_the_paper():
    from spatiaflow.models.stflow import Denoiser

    for size, count in (((1024, 50), 1_147_724), ((1536, 313), 1_483_624)):
        assert sum(p.numel() for p in Denoiser(STFlowConfig.of("paper").denoiser(*size)).parameters()) == count


@pytest.mark.parametrize(
    "change",
    [
        {"flow": False, "prior": "zero"}, {"prior": "gaussian"}, {"prior": "image", "residual": True}, {"n_neighbors": 0},
        {"prior": "zero"}, {"stack": False, "geometry": "frames", "ties": "cut", "prior": "zinb"}, {"geometry": "distance"},
    ],
)  # fmt: skip
def test_every_ablation_trains_and_predicts(slides, slide, change):
    model = sf.tl.train_stflow(slides, config=dataclasses.replace(FAST, max_epochs=1, **change), genes=4)
    test = slide("t", seed=7)
    sf.tl.predict_expression(test, model=model)
    assert np.isfinite(test.obsm["stflow"]).all()
    if model.prior.deterministic or not model.config.flow:
        with pytest.raises(ValueError, match="deterministic"):
            sf.tl.predict_expression(test, model=model, n_samples=2)


@pytest.mark.parametrize("validation", [["s2"], 0.3])
def test_validation_is_what_was_asked_for(slides, validation):
    model = sf.tl.train_stflow(slides, config=FAST, genes=4, validation=validation)
    assert len(model.networks) == 1


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
    data, arguments = slide(), {"config": FAST, "genes": 4, "max_epochs": 2, "checkpoint_dir": tmp_path}
    sf.tl.train_stflow(data, **arguments)
    if change == "data":
        data.X.data[0] += 1
    else:
        arguments |= {"seed": {"random_state": 1}, "max_epochs": {"max_epochs": 3}, "genes": {"genes": 3}}[change]
    with pytest.raises(ValueError, match=f"another run.*{change}"):
        sf.tl.train_stflow(data, resume=True, **arguments)
    sf.tl.train_stflow(data, **arguments)  # without resume it is overwritten


def test_whole_donors_are_held_out(slide):
    slides = [slide(f"s{i}", seed=i) for i in range(3)]
    for one, donor in zip(slides, "AAB"):
        one.obs["donor"] = donor
    model = sf.tl.train_stflow(slides, config=FAST, genes=4, donor_key="donor", max_epochs=1)
    assert len(model.networks) == 2  # one for each donor that is left out
    assert model.card["donors"] == ["A", "B"]
    assert model.donor_effect(True) == "prior, not learned"


def test_the_checkpoints_of_other_donors_are_refused(slide, tmp_path):
    slides = [slide(f"s{i}", seed=i) for i in range(2)]
    arguments = {"config": FAST, "genes": 4, "max_epochs": 1, "checkpoint_dir": tmp_path}
    sf.tl.train_stflow(slides, **arguments)
    for one, donor in zip(slides, "AB"):
        one.obs["donor"] = donor
    with pytest.raises(ValueError, match="another run.*donors"):
        sf.tl.train_stflow(slides, resume=True, donor_key="donor", **arguments)
