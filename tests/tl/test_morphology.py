"""Training a generator of morphology on pairs: what it learns from, what its model notes, and what is refused."""

import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf
from _morphology import IMAGE, generate, paired_slide, tissue, train, trained
from _pairs import paired
from _pairs import tissue as two_states
from spatiaflow.tl._morphology import _pairs


@pytest.fixture(scope="module")
def slide():
    return paired_slide()


@pytest.fixture(scope="module")
def model():
    return trained()


def test_pairs_whose_source_was_dropped_are_refused(slide):
    data, table = sf._io.unpack(slide, copy=True)
    first = table.uns["transitions"]["source"].iloc[0]
    del data["table"]
    data["table"] = table[table.obs_names != first].copy()
    with pytest.raises(
        KeyError, match=f"uns..transitions.. names a source .*first: '{first}'.*pair_transitions.* once more"
    ):
        train(data)


def test_a_slide_given_twice_for_training_is_named(slide):
    with pytest.warns(UserWarning, match="'one' and 'two' have the same positions"), pytest.raises(KeyError):
        train({"one": slide, "two": slide}, profile_key="shape")


def test_shift_is_the_mean_difference_of_pairs(slide, model):
    """Nuclei of state B are half again as large: the shift of morphology of A -> B says so, that of A -> A does not."""
    place = model.config.profile.index("area_um2")
    assert model.shifts["A -> B"][""]["profile"][place] > 0.5
    assert abs(model.shifts["A -> A"][""]["profile"][place]) < 0.35


@pytest.mark.slow
def test_training_is_seeded_saved_and_notes_its_data(slide, model, tmp_path):
    again = train(slide)
    assert all(
        np.array_equal(a, b) for a, b in zip(model.network.state_dict().values(), again.network.state_dict().values())
    )
    loaded = sf.models.load(model.save(tmp_path / "m.safetensors"))
    one, other = (generate(slide, m, n_steps=1).obsm["image"] for m in (model, loaded))
    np.testing.assert_array_equal(one, other)
    assert model.card["pairs"]["A -> B"] > 40 and set(model.shifts) == {"A -> B", "A -> A"}
    assert {"train_flow", "val_flow", "train_alignment", "train_contrast"} <= set(model.history)
    assert model.card["surrogate_r2"]["rna_mean"] > 0.5


@pytest.mark.slow
def test_another_run_is_not_resumed(slide, tmp_path):
    options = {"max_epochs": 1, "profile_key": None, "checkpoint_dir": tmp_path}
    whole = train(slide, **options)
    again = train(slide, **options, resume=True)
    assert all(
        np.array_equal(a, b) for a, b in zip(whole.network.state_dict().values(), again.network.state_dict().values())
    )
    with pytest.raises(ValueError, match="holds another run: it differs in seed"):
        train(slide, **options, resume=True, random_state=7)


@pytest.mark.slow
def test_one_model_is_trained_on_several_objects(slide, model):
    """Two copies of a slide hold the same pairs twice: shifts stay, and each copy has its cells and pairs in the card."""
    with pytest.warns(UserWarning, match="'one' and 'two' have the same positions"):
        both = train({"one": slide, "two": slide}, max_epochs=1)
    assert (
        list(both.card["data"]) == ["one", "two"] and both.card["pairs"]["A -> B"] == 2 * model.card["pairs"]["A -> B"]
    )
    for kind in ("genes", "profile"):
        np.testing.assert_allclose(both.shifts["A -> B"][""][kind], model.shifts["A -> B"][""][kind], atol=2e-5)
    made = generate({"one": slide, "two": slide}, both, n_steps=1)
    np.testing.assert_array_equal(made["one"].X, made["two"].X)


@pytest.mark.slow
def test_losses_can_be_switched_off(slide):
    model = train(
        slide,
        max_epochs=1,
        config={"losses": {"alignment": 0, "contrast": 0}, "spatial": False, "start": "noise", "weighted": False},
    )
    assert {k for k in model.history if k.startswith("val_")} == {"val_loss", "val_flow"}


def test_what_cannot_be_trained_on_is_refused(slide):
    for bad, match in (
        ({"start": "middle"}, "start must be one of 'control', 'noise'"), ({"losses": {"flwo": 1}}, "losses has no 'flwo'"),
        ({"crop_pixels": 12}, "crop_pixels=12 must be a multiple of 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            train(slide, config=bad)
    with pytest.raises(TypeError, match="config must be a .*MorphologyConfig"):
        sf.tl.train_morphology(slide, config={"width": 3}, **IMAGE)
    with pytest.raises(KeyError, match="morphology_profile"):
        train(slide, profile_key="shape")
    bare = tissue(2)
    with pytest.raises(KeyError, match="pair_transitions"):
        train(bare)
    with pytest.raises(KeyError, match="embed_spatia"):
        train(bare, use_rep="X_spatia")


def test_pairs_are_those_of_the_plan_whose_cells_lie_in_the_image():
    """Beside a loop over pairs, of which some cells are the source of two transitions."""
    adata, _ = two_states(30, 50)
    adata.obs["state"] = pd.Categorical(adata.obs["state"].astype(str).where(np.arange(80) % 3 > 0, "C"))
    found = paired(adata, transitions=[("A", "B"), ("A", "C")], top_k=10)
    plan, state = adata.obsp["transition_plan"].toarray(), adata.obs["state"].to_numpy()
    rng = np.random.default_rng(0)
    place, inside = rng.permutation(80) + 7, rng.random(80) < 0.6
    names = ["A -> C", "A -> B"]  # in an order of their own
    pairs, niche = _pairs(adata, "transition", names, place, inside, 0)
    expected = []
    for one in found.itertuples():
        i = adata.obs_names.get_loc(one.source)
        share = plan[i] * inside * (state == one.transition[-1])
        if inside[i] and share.any():
            targets = {place[j]: share[j] / share.sum() for j in np.flatnonzero(share)}
            expected.append((place[i], names.index(one.transition), one.confidence, targets))
    assert 0 < len(expected) < len(found) and len(pairs) == len(niche) == len(expected)
    for k, (source, transition, confidence, targets) in enumerate(expected):
        assert (pairs.source[k], pairs.transition[k]) == (source, transition)
        assert pairs.confidence[k] == confidence
        kept = {j: share for j, share in zip(pairs.target[k], pairs.share[k]) if share > 0}
        assert kept == pytest.approx(targets)
