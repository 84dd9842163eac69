"""Training STFlow: the same model from the same seed, and folds that hold out what they should."""

import dataclasses

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from small import FAST

import spatiaflow as sf
from spatiaflow.models.slide import Slide
from spatiaflow.train.stflow import train_stflow


def test_training_is_seeded_and_quiet(slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (sf.tl.train_stflow(slides, config=FAST, genes=4) for _ in range(2))
    assert one.sha256 == two.sha256
    assert not list(tmp_path.iterdir())  # no lightning_logs, no checkpoints
    assert len(one.networks) == 3
    assert set(one.card["data"]) == {"s0", "s1", "s2"}
    assert len(one.history["train_loss"]) == len(one.history["val_pearson"]) == 9
    assert one.card["law"] == two.card["law"]
    assert one.card["law"]["chosen"] in one.card["law"]
    path = one.save(tmp_path / "model")
    assert sf.models.load(path).card["law"] == one.card["law"]


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


def remembered(name, rng):
    """A serial section: features tell the place alone, and what is expressed there only a sibling knows."""
    xy = rng.uniform(0, 2000, (90, 2))
    places = np.stack(np.meshgrid(*2 * [np.arange(200, 2000, 400)]), -1).reshape(-1, 2)
    features = np.exp(-(cdist(xy, places) ** 2) / (2 * 250**2)).astype(np.float32)
    rate = np.exp(1 + features @ np.random.default_rng(0).normal(0, 1, (len(places), 6)))
    fold = (3 * xy[:, 0] / 2000).astype(int).astype(str)
    parts = {"library": np.full(90, 100.0), "genes": tuple("abcdef"), "features": features, "labels": fold}
    return Slide(name, [f"{name}{i}" for i in range(90)], xy=xy, counts=sparse.csr_matrix(rng.poisson(rate)), **parts)


@pytest.mark.usefixtures("own_draws")
def test_folds_are_held_out_over_all_slides_so_that_place_is_not_rewarded():
    slides = [remembered(name, np.random.default_rng(i + 2)) for i, name in enumerate("xyz")]
    scores = {}
    for name, given in {"folds": slides, "slides": [dataclasses.replace(s, labels=None) for s in slides]}.items():
        model = train_stflow(given, FAST, encoder={"id": "place"}, target_sum=None, max_epochs=1)
        scores[name] = model.card["validation_scores"]["ridge, slide"]
        assert len(model.networks) == 3
        assert set(model.card["data"]) == set("xyz")
    assert scores["slides"] > 0.6 > 0.3 > scores["folds"]


def test_whole_donors_are_held_out(slide):
    slides = [slide(f"s{i}", seed=i) for i in range(3)]
    for one, donor in zip(slides, "AAB"):
        one.obs["donor"] = donor
    model = sf.tl.train_stflow(slides, config=FAST, genes=4, donor_key="donor", max_epochs=1)
    assert len(model.networks) == 2  # one for each donor that is left out
    assert model.card["donors"] == ["A", "B"]
    assert model.donor_effect(True) == "prior, not learned"


@pytest.mark.parametrize(("n_donors", "made"), [(1, True), (3, False), (4, True)])
def test_flows_are_made_where_enough_donors_can_judge_them(slide, monkeypatch, n_donors, made):
    asked = []
    monkeypatch.setattr("spatiaflow.train.stflow._Fold.field_flow", lambda fold, seed: asked.append(seed))
    slides = [slide(f"s{i}", seed=i) for i in range(4)]
    for i, one in enumerate(slides):
        one.obs["donor"] = str(i % n_donors)
    sf.tl.train_stflow(slides, config=FAST, genes=4, donor_key="donor", max_epochs=1)
    assert bool(asked) == made


def tissue_that_shows_its_depth(seed: int) -> Slide:
    """Spots with the depth and a pattern among their features; the first four genes follow neither, the others the pattern."""
    rng = np.random.default_rng(seed)
    depth, pattern, other = rng.normal(size=(3, 225))
    library = np.rint(400 * np.exp(0.7 * depth))
    log_rate = np.log(0.002) + np.outer(pattern, np.repeat([0.0, 0.8], 4))
    counts = sparse.csr_matrix(rng.poisson(library[:, None] * np.exp(log_rate)).astype(np.float32))
    xy = 100 * np.stack(np.meshgrid(np.arange(15.0), np.arange(15.0)), -1).reshape(-1, 2)
    features = np.stack([depth, pattern, other], 1).astype(np.float32)
    names = np.array([f"spot{i}" for i in range(225)])
    return Slide(f"s{seed}", names, xy, counts=counts, library=library, genes=tuple("abcdefgh"), features=features)


@pytest.mark.usefixtures("own_draws")
def test_rates_do_not_follow_the_depth_and_expected_measurements_do():
    """Log expression of a rare gene depends on the depth of its spot; the rate of the gene does not."""
    *train, test = (tissue_that_shows_its_depth(seed) for seed in range(4))
    model = train_stflow(train, FAST, encoder={"id": "planted"})
    found = model.predict([test], new_donor=False)
    depth, pattern, _ = test.features.T

    def slopes(values):
        return np.linalg.lstsq(np.stack([depth, pattern, np.ones(225)], 1), values, rcond=None)[0][:2]

    of_rates, of_means = slopes(np.log(found.rate)), slopes(found.mean)
    assert np.abs(of_rates[0]).mean() < 0.12
    np.testing.assert_allclose(of_rates[1].reshape(2, 4).mean(1), [0, 0.8], atol=0.2)
    truth = slopes(test.log_normalized().toarray())
    assert truth[0, :4].mean() > 0.3
    np.testing.assert_allclose(of_means[0, :4].mean(), truth[0, :4].mean(), rtol=0.4)
    draws = np.mean(list(model.draws(test, 60, new_donor=False)), 0)  # all spots have one depth
    assert np.abs(slopes(draws)[0, :4]).mean() < 0.15
