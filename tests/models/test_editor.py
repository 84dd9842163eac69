from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow import models
from spatiaflow.models.autoencoder import Autoencoder
from spatiaflow.models.editor import Components, Edit, EditNetwork, MorphologyEditor, Surroundings, edited
from spatiaflow.models.morphology import MorphologyConfig, MorphologyFlow
from spatiaflow.models.slide import Slide
from spatiaflow.models.transport import per_unit

pytestmark = pytest.mark.usefixtures("own_draws")
GENES = [f"G{i}" for i in range(7)]


def counts(n=60, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(rng.gamma(2, 4, (n, 7))).astype(float))


def slide(n=60, seed=0):
    rng = np.random.default_rng(seed + 1)
    return Slide("s", [f"c{i}" for i in range(n)], xy=rng.uniform(0, 80, (n, 2)), counts=counts(n, seed), genes=GENES)


@pytest.fixture(scope="module")
def editor():
    """A small model that is not trained, whose every part matters."""
    config = MorphologyConfig(
        channels=["dapi", "rna"], transitions=["A -> B"], crop_pixels=16, n_components=4, n_neighbors=3, n_latent=4, width=32,
        n_layers=2, edit="flow", guidance=2.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EditNetwork(config).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
        shifts = {"A -> B": {"": {"genes": [0.5] * 7}, "gland": {"genes": [0.0, 1.0] + [0.0] * 5}}}
        return MorphologyEditor(
            network=network, autoencoder=Autoencoder(2, 4, 16), genes=GENES, components=Components.fit(counts(), 4),
            linear=torch.randn(4, 4), shifts=shifts, intensity={"dapi": [0.0, 1.0], "rna": [0.0, 2.0]}, history={},
            card={"use_rep": ""}, edits={"": Edit("flow", 3.0), "A -> B": Edit("linear", 1.0, 2.0)},
        )  # fmt: skip


class Gaussian:
    """The exact velocity from noise to N(means under conditions, 1): what a perfect network would say."""

    def __init__(self, weight, context):
        self.weight, self.context = weight, context

    def condition(self, s, own=None, around=None):
        return s.around @ self.context + (0 if own is not None else s.own @ self.weight)

    def __call__(self, x, t, mean):
        t = t[:, None]
        return mean + (2 * t - 1) / ((1 - t) ** 2 + t**2) * (x - t * mean)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_an_edit_moves_by_the_planted_effect_of_genes_times_guidance(guidance):
    g = torch.Generator().manual_seed(0)
    weight, context, z = (torch.randn(*shape, generator=g) for shape in ((3, 5), (2, 5), (40, 5)))
    s, shift = (
        Surroundings(torch.randn(40, 3, generator=g), torch.randn(40, 2, generator=g)),
        torch.randn(40, 3, generator=g),
    )
    network = Gaussian(weight, context)
    half, whole = edited(network, z, s, [shift / 2, shift], guidance=guidance, n_steps=20)
    expected = (1 + guidance) * shift @ weight
    torch.testing.assert_close(whole - z, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(half - z, expected / 2, atol=1e-3, rtol=1e-3)


def test_no_dose_is_no_change_and_fresh_noise_is_some(editor):
    z, s = torch.randn(6, 4), Surroundings(torch.randn(6, 4), torch.randn(6, 8))
    for n_steps in (1, 5):
        (same,) = edited(editor.network, z, s, [torch.zeros(6, 4)], guidance=5.0, n_steps=n_steps)
        assert torch.equal(same, z)
    (other,) = edited(editor.network, z, s, [torch.zeros(6, 4)], torch.randn(6, 4), guidance=5.0)
    assert not torch.isclose(other, z).all(1).any()


@pytest.mark.parametrize("edit", ["flow", "linear"])
def test_images_of_a_dose_of_0_are_the_source(editor, edit):
    editor.config = replace(editor.config, edit=edit)
    control, s = torch.randn(3, 2, 16, 16), Surroundings(torch.randn(3, 4), torch.randn(3, 8))
    none, half, whole = editor.edit(control, s, torch.randn(3, 4), doses=(0.0, 0.5, 1.0))
    torch.testing.assert_close(none, control, atol=1e-5, rtol=1e-4)
    assert not torch.equal(half, none) and not torch.equal(half, whole)
    part = editor.edit(control[:1], s.rows(slice(0, 1)), torch.zeros(1, 4))[0]
    torch.testing.assert_close(part, control[:1], atol=1e-5, rtol=1e-4)
    editor.config = replace(editor.config, edit="flow")


def test_a_transition_is_edited_in_its_own_way_unless_the_settings_say_how(editor, monkeypatch):
    monkeypatch.setattr(editor, "config", replace(editor.config, edit=None, guidance=None))
    monkeypatch.setattr(editor, "edits", {"": Edit("flow", 1.0), "A -> B": Edit("linear", 2.0, 0.5)})
    assert editor.edit_of("A -> B") == Edit("linear", 2.0, 0.5)
    assert editor.edit_of("B -> A") == editor.edit_of() == Edit("flow", 1.0)
    seen, kept = [], editor.edit

    def watched(control, s, change, noise, *, by, **options):
        seen.append(by)
        return kept(control, s, change, noise, by=by, **options)

    monkeypatch.setattr(editor, "edit", watched)
    images = torch.randn(2, 2, 16, 16)
    monkeypatch.setattr(editor, "read", lambda slides, rows, make, **_: make(images, np.array(["a", "b"]), rows))
    for edit in ("A -> B", {"G1": 1.0}, np.zeros((2, 4), np.float32)):
        editor.generate_cells([slide()], np.arange(2), edit, np.array(["", ""]))
    assert seen == [Edit("linear", 2.0, 0.5), Edit("flow", 1.0), Edit("flow", 1.0)]
    editor.config = replace(editor.config, edit="flow", guidance=4.0)
    assert editor.edit_of("A -> B") == Edit("flow", 4.0, 0.5)


def test_the_linear_map_moves_latents_by_its_strength(editor):
    control, s, change = (
        torch.randn(3, 2, 16, 16),
        Surroundings(torch.randn(3, 4), torch.randn(3, 8)),
        torch.randn(3, 4),
    )
    (twice,) = editor.edit(control, s, change, by=Edit("linear", strength=2.0))
    (other,) = editor.edit(control, s, 2 * change, by=Edit("linear"))
    torch.testing.assert_close(twice, other)
    assert not torch.equal(twice, editor.edit(control, s, change, by=Edit("linear"))[0])


def test_components_are_those_of_log_counts_and_shifts_are_differences_of_them():
    x, found = counts(), Components.fit(counts(), 6)
    own, depth = found.of(x, np.ones(7, bool))
    log = per_unit(x, float(found.unit)).toarray()
    expected = (log - log.mean(0)) @ found.axes.double().numpy()
    np.testing.assert_allclose(own, expected, atol=1e-4)
    assert own.var(0, ddof=1).mean() == pytest.approx(1, rel=1e-3) and abs(depth.mean()) < 1e-5
    np.testing.assert_allclose(found.shift(log[3] - log[8]), own[3] - own[8], atol=1e-4)


def test_a_gene_that_is_not_measured_counts_as_average():
    x, found, measured = counts(), Components.fit(counts(), 6), np.arange(7) != 2
    one, other = x.copy(), x.tolil()
    other[:, 2] = 0
    a, b = (found.of(sparse.csr_matrix(v), measured)[0] for v in (one, other))
    log = per_unit(sparse.csr_matrix(other), float(found.unit)).toarray()
    expected = (log - found.mean.numpy()) @ (found.axes.double().numpy() * measured[:, None])
    np.testing.assert_allclose(b, expected, atol=1e-4)
    assert a.shape == b.shape and np.isfinite(b).all()


def test_surroundings_follow_the_cell_not_its_row(editor):
    one, order = slide(), np.random.default_rng(3).permutation(60)
    whole = editor.components.surroundings([one], 3, 20.0)
    other = editor.components.surroundings([one.take(order)], 3, 20.0)
    for name in ("own", "around"):
        torch.testing.assert_close(getattr(other, name), getattr(whole, name)[order])
    moved = replace(one, xy=one.xy * np.array([-1, 1]) + 7)  # mirrored and elsewhere
    torch.testing.assert_close(editor.components.surroundings([moved], 3, 20.0).around, whole.around)
    for n in (1, 3):  # fewer cells than neighbours
        few = editor.components.surroundings([one.take(np.arange(n))], 3, 20.0)
        assert few.around.shape == (n, 8) and few.around.isfinite().all()


def test_an_edit_is_a_transition_in_its_niche_or_a_shift_of_genes(editor):
    found = editor.change("A -> B", np.array(["gland", "", "elsewhere"]))
    np.testing.assert_allclose(found[0], editor.components.axes[1], atol=1e-6)
    np.testing.assert_allclose(found[1], 0.5 * editor.components.axes.sum(0), atol=1e-5)
    np.testing.assert_array_equal(found[1], found[2])
    shifted = editor.change({"G1": 2.0, "G4": -1.0}, np.array(["", ""]))
    np.testing.assert_allclose(shifted[1], 2 * editor.components.axes[1] - editor.components.axes[4], atol=1e-6)


def test_guidance_leaves_out_the_genes_of_the_cell_alone(editor):
    s = Surroundings(torch.randn(3, 4), torch.randn(3, 8))
    without = editor.network.condition(s, torch.zeros(3, dtype=torch.bool))
    other = editor.network.condition(Surroundings(-s.own, s.around), torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(without, other)
    assert not torch.allclose(
        editor.network.condition(Surroundings(s.own, -s.around), torch.zeros(3, dtype=torch.bool)), without
    )


def test_save_and_load(editor, tmp_path):
    again = models.load(editor.save(tmp_path / "m.safetensors"), kind="MorphologyFlow")  # it does for one
    assert isinstance(again, MorphologyEditor) and again.config == editor.config and again.sha256 == editor.sha256
    assert again.edits == editor.edits
    arguments = torch.randn(2, 2, 16, 16), Surroundings(torch.randn(2, 4), torch.randn(2, 8)), torch.randn(2, 4)
    torch.testing.assert_close(again.edit(*arguments), editor.edit(*arguments))
    np.testing.assert_array_equal(again.change({"G1": 1.0}, np.array([""])), editor.change({"G1": 1.0}, np.array([""])))


def test_a_model_of_pairs_is_no_editor(network, tmp_path):
    autoencoder = Autoencoder(2, network.config.n_latent, network.config.crop_pixels)
    pairs = MorphologyFlow(
        network=network, autoencoder=autoencoder, surrogate=None, shifts={}, intensity={}, history={}, card={}
    )
    with pytest.raises(TypeError, match="must be a MorphologyEditor; this is a MorphologyFlow"):
        models.load(pairs.save(tmp_path / "pairs"), kind="MorphologyEditor")


def test_files_from_before_objectives_are_of_pairs(network):
    autoencoder = Autoencoder(2, network.config.n_latent, network.config.crop_pixels)
    description, tensors = MorphologyFlow(
        network=network, autoencoder=autoencoder, surrogate=None, shifts={}, intensity={}, history={}, card={}
    ).state()
    del description["config"]["objective"]
    assert MorphologyFlow.from_state(description, tensors).config.objective == "pairs"


def test_settings_are_checked():
    for bad, match in (
        ({"objective": "triples"}, "objective must be one of"),
        ({"edit": "none"}, "edit must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            MorphologyConfig(**bad)
    assert MorphologyConfig.of("pairs").objective == "pairs" and MorphologyConfig.of(None).objective == "genes"


def test_every_image_of_a_cell_comes_by_dose_then_sample(editor, monkeypatch):
    """The first sample has no noise, so it does not depend on how many there are."""
    found = {}

    def read(slides, rows, make, **options):
        control = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        return {k: v.numpy() for k, v in make(control, np.array(["a", "b", "c"]), np.array([0, 1, 2])).items()}

    monkeypatch.setattr(editor, "read", read)
    for n in (1, 3):
        found[n] = editor.generate_cells(
            [SimpleNamespace(align=lambda _: slide())], np.array([4, 7, 2]), "A -> B", np.array([""] * 3), doses=[0.5, 1],
            n_samples=n,
        )["image"]  # fmt: skip
    assert found[1].shape == (3, 2, 2, 16, 16) and found[3].shape == (3, 6, 2, 16, 16)
    np.testing.assert_array_equal(found[3][:, [0, 3]], found[1])
    assert not np.array_equal(found[3][:, 1], found[3][:, 0]) and not np.array_equal(found[3][:, 2], found[3][:, 1])
