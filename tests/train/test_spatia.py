"""What the losses of SPATIA may see, and trainings of a tiny one."""

import dataclasses
import shutil

import numpy as np
import pytest
import spatialdata as sd
import torch

import spatiaflow as sf
from _spatia import TINY, edited, embedded, image_like, tiny, train
from spatiaflow.models.fusion import Surroundings
from spatiaflow.models.spatia import LOSSES, SpatiaConfig, SpatiaNetwork
from spatiaflow.train.spatia import MEMORY, CellTraining, ContextTraining, nearest_hidden

SHORT = tiny(batches_per_epoch=2)


@pytest.mark.usefixtures("own_draws")
def test_context_asks_for_hidden_cells_and_never_sees_them():
    n, rng = 200, np.random.default_rng(0)
    config = SpatiaConfig(genes=[f"g{i}" for i in range(20)], width=32, gene_layers=1, anchor_um=40.0)
    xy, network = rng.uniform(0, 150, (n, 2)), SpatiaNetwork(config)
    around = Surroundings.of(xy, config)
    absent = torch.from_numpy(rng.random(n) < 0.25)
    target, found = nearest_hidden(absent, around.neighbors)
    for i in range(n):
        known = [j for j, real in zip(around.neighbors.index[i].tolist(), around.neighbors.mask[i]) if real]
        hidden = [j for j in known if absent[j]]
        assert bool(found[i]) == bool(hidden)
        if hidden:
            assert target[i] == min(hidden, key=lambda j: np.linalg.norm(xy[j] - xy[i]))
    assert (target[absent] == torch.arange(n)[absent]).all() and found.float().mean() > 0.8

    module = ContextTraining(network, {"niche": 1.0, "tissue": 1.0}, 40.0)
    cells = torch.randn(n, config.width, requires_grad=True)
    counts = torch.from_numpy(rng.poisson(2.0, (n, 20)).astype(np.float32))
    measured, standard = torch.ones(counts.shape, dtype=bool), network.gene.standard[None]
    batch = {"cells": cells, "counts": counts, "measured": measured, "standard": standard, "around": around}
    sum(module.losses(batch, torch.Generator().manual_seed(1)).values()).backward()
    absent = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.25
    assert (cells.grad[absent] == 0).all()
    assert (cells.grad[~absent].abs().sum(1) > 0).all()


@pytest.fixture(scope="module")
def slides():
    with sf.settings.override(progress=False, verbosity="warning"):
        return [sf.datasets.simulated_tissue(200, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def history(slides):
    with sf.settings.override(progress=False, verbosity="warning"):
        return train(slides, config=tiny(losses={"reconstruction": 0.05}), max_epochs=6).history


def test_every_loss_is_logged_and_can_be_switched_off(slides, history):
    for name in LOSSES:
        assert f"val_{name}" in history
        assert np.isfinite(history[f"train_{name}"]).all()
    off = train(slides[:1], config=tiny(losses=dict.fromkeys(LOSSES, 0.0) | {"genes": 1.0}), max_epochs=1)
    assert {k for k in off.history if k.startswith("val_")} == {"val_loss", "val_genes"}


def test_patches_are_reconstructed_where_there_are_no_genes():
    assert not SpatiaConfig(genes=["a"], channels=["x"]).loss_weights["reconstruction"]
    assert SpatiaConfig(channels=["x"]).loss_weights["reconstruction"] == LOSSES["reconstruction"]
    assert SpatiaConfig(genes=["a"], losses={"reconstruction": 0.1}).loss_weights["reconstruction"] == 0.1


def test_a_model_with_two_crops_is_trained_saved_and_used(slides, tmp_path):
    config = tiny(wide=3.0, batches_per_epoch=2, losses={"reconstruction": 0.05})
    model = train(slides[:1], config=config, max_epochs=1)
    assert "12 and 36 µm" in repr(model) and np.isfinite(model.history["val_loss"]).all()
    found, again = (
        embedded(slides[1], one, modalities="image").obsm["X_spatia_cell"]
        for one in (model, model.save(tmp_path / "model"))
    )
    np.testing.assert_array_equal(found, again)
    narrow = train(slides[:1], config=tiny(batches_per_epoch=2), max_epochs=1)
    assert narrow.network.image.around is None and "36" not in repr(narrow)


def test_what_is_kept_is_a_moving_average_of_the_weights(slides, monkeypatch):
    seen = []

    class Watched(CellTraining):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append(self.network.rates.weight.detach().double().clone())

    monkeypatch.setattr("spatiaflow.train.spatia.CellTraining", Watched)
    losses = {"niche": 0.0, "tissue": 0.0, "contrast": 0.0}
    model = train(slides[:1], config=tiny(losses=losses, batches_per_epoch=12), max_epochs=1)
    average = seen[0]
    for n, weight in enumerate(seen[1:], 1):
        share = max(9 / (10 + n), 1 - MEMORY)
        average = (1 - share) * average + share * weight
    torch.testing.assert_close(model.network.rates.weight.double(), average, atol=1e-6, rtol=1e-4)
    assert (average - seen[-1]).abs().max() > 1e-4


@pytest.mark.slow
def test_training_lowers_every_loss(history):
    for name in ("genes", "image_to_genes", "reconstruction", "niche", "tissue"):
        assert history[f"train_{name}"][-1] < history[f"train_{name}"][0], name


def test_the_context_is_trained_with_dropout(slides, monkeypatch):
    from spatiaflow.train.spatia import ContextTraining

    modes, losses = set(), ContextTraining.losses

    def watched(self, b, g):
        modes.add((self.training, self.network.niche_layers.training))
        return losses(self, b, g)

    monkeypatch.setattr(ContextTraining, "losses", watched)
    train(slides, max_epochs=1)
    assert modes == {(True, True), (False, False)}


@pytest.mark.slow
def test_training_is_seeded_and_resumes(slides, tmp_path, monkeypatch):
    short = {"max_epochs": 3, "config": SHORT}
    whole = train(slides, **short, checkpoint_dir=tmp_path / "a")
    assert train(slides, **short).sha256 == whole.sha256

    from spatiaflow.train.spatia import ContextTraining

    class Killed(Exception):
        pass

    def stop(self):
        if self.current_epoch == 1:
            raise Killed

    monkeypatch.setattr(ContextTraining, "on_train_epoch_start", stop, raising=False)
    with pytest.raises(Killed):
        train(slides, **short, checkpoint_dir=tmp_path / "b")
    monkeypatch.undo()
    resumed = train(slides, **short, checkpoint_dir=tmp_path / "b", resume=True)
    assert resumed.sha256 == whole.sha256
    assert resumed.history["epoch"] == [0, 1, 2]


def test_one_modality_and_going_on(slides):
    genes = train([s["table"] for s in slides], modalities="genes", mpp=1, image_key=None)
    assert not genes.config.channels
    with pytest.raises(ValueError, match="trained without image"):
        embedded(slides[0], genes)
    quick = sf.models.SpatiaConfig(batches_per_epoch=TINY["batches_per_epoch"])  # its sizes are not taken
    more = sf.tl.train_spatia([slides[0]["table"]], modalities="genes", mpp=1, init=genes, config=quick, max_epochs=1)
    assert more.config == genes.config
    image = train(slides, modalities="image", config=tiny(losses={"reconstruction": 1.0}))
    assert embedded(slides[0], image, modalities="image").obsm["X_spatia"].shape == (200, 96)


@pytest.fixture(scope="module")
def corpus(slides, tmp_path_factory):
    """Two stores: one with fewer genes and without two channels, of another tissue."""
    folder = tmp_path_factory.mktemp("corpus")
    slides[0].write(folder / "a.zarr")
    few = slides[1]["table"][:, 5:].copy()
    image = slides[1]["fluorescence"]
    edited(slides[1], table=few, fluorescence=image_like(slides[1], image.values[:2], image.c.values[:2])).write(
        folder / "b.zarr"
    )
    manifest = folder / "corpus.csv"
    manifest.write_text("store,tissue,image_key\na.zarr,gland,fluorescence\nb.zarr,skin,fluorescence\n")
    return manifest


@pytest.mark.slow
def test_a_corpus_on_disk_trains_as_objects_in_memory_do(corpus, slides):
    on_disk = sf.tl.train_spatia(corpus, max_epochs=2, config=SHORT)
    objects = [sd.read_zarr(corpus.parent / name) for name in ("a.zarr", "b.zarr")]
    in_memory = train(objects, config=SHORT)
    assert on_disk.config.pitch_um == pytest.approx(in_memory.config.pitch_um, rel=1e-6)
    assert dataclasses.replace(on_disk.config, pitch_um=in_memory.config.pitch_um) == in_memory.config
    assert len(on_disk.config.genes) == slides[0]["table"].n_vars and len(on_disk.config.channels) == 4
    # positions are kept in single precision; tissues weigh as one slide each here
    np.testing.assert_allclose(on_disk.history["train_loss"], in_memory.history["train_loss"], rtol=2e-3)
    assert set(on_disk.card["data"]) == {"a:nuclei", "b:nuclei"}


@pytest.mark.slow
def test_batches_may_be_read_by_other_processes(corpus):
    alone = sf.tl.train_spatia(corpus, max_epochs=2, config=SHORT)
    helped = sf.tl.train_spatia(corpus, max_epochs=2, config=tiny(batches_per_epoch=2, num_workers=2))
    assert helped.sha256 == alone.sha256


def test_a_corrupted_chunk_is_an_error_and_not_black(corpus, tmp_path):
    shutil.copytree(corpus.parent, tmp_path / "c")
    for chunk in (tmp_path / "c" / "a.zarr" / "images" / "fluorescence").rglob("*"):
        if chunk.is_file() and "json" not in chunk.name and chunk.name[0] != ".":
            chunk.write_bytes(b"\x07" * chunk.stat().st_size)
    with pytest.raises(OSError, match="of an image could not be read"):
        sf.tl.train_spatia(tmp_path / "c" / "corpus.csv", max_epochs=1, config=SHORT)
    with pytest.raises(OSError, match="of an image could not be read"):
        train([sd.read_zarr(tmp_path / "c" / "a.zarr")])
