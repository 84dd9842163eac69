import dataclasses
import json
import pickle
import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import spatiaflow as sf
from spatiaflow.models import STFlowConfig
from spatiaflow.models.regression import gene_pearson

FAST = dataclasses.replace(STFlowConfig.of("default"), width=16, n_heads=2, max_epochs=3, regions=2)
ALONE = dataclasses.replace(FAST, stack=False, max_epochs=1)  # for what is said before anything is trained


def log(adata, genes, target_sum=1e4):
    x = adata.X.toarray()
    return np.log1p(x / x.sum(1, keepdims=True) * target_sum)[:, [adata.var_names.get_loc(g) for g in genes]]


def predicted(adata, model, **kwargs):
    out = sf.tl.predict_expression(adata, model=model, copy=True, **kwargs)
    return out.obsm["stflow"]


def test_planted_genes_are_recovered_and_noise_is_not_trusted(slide, model):
    test = slide("t", seed=7)
    sf.tl.predict_expression(test, model=model, n_samples=4)
    r = dict(zip(model.genes, gene_pearson(log(test, model.genes), test.obsm["stflow"])))
    assert np.mean([r[f"G{g}"] for g in range(6)]) > 0.5
    assert np.mean([r[f"G{g}"] for g in range(6, 9)]) > 0.25  # three times the standard error of noise
    assert max(abs(r[f"G{g}"]) for g in range(9, 12)) < 0.35
    skill = dict(zip(model.genes, model.skill))
    assert min(skill[f"G{g}"] for g in range(6)) > max(skill[f"G{g}"] for g in range(9, 12))


def test_slots_types_and_provenance(slide, model):
    test = slide("t", seed=7)
    assert sf.tl.predict_expression(test, model=model) is None
    assert test.obsm["stflow"].dtype == test.obsm["stflow_std"].dtype == np.float32
    assert test.obsm["stflow"].shape == test.obsm["stflow_std"].shape == (144, 12)
    assert (test.obsm["stflow_std"] > 0).all()
    assert test.obs["stflow_ood"].between(0, 1).all()
    params = test.uns["stflow"]["params"]
    assert params["model_sha256"] == model.sha256
    assert params["n_steps"] == 5
    assert list(test.uns["stflow"]["genes"]) == model.genes


def test_noise_belongs_to_the_spot(slide, model):
    test = slide("t", n=8, seed=7)
    expected = predicted(test, model, n_samples=2)
    shuffled = test[np.random.default_rng(0).permutation(test.n_obs)].copy()
    again = sf.tl.predict_expression(shuffled, model=model, n_samples=2, copy=True)[test.obs_names]
    np.testing.assert_allclose(again.obsm["stflow"], expected, atol=1e-5)
    for size in (1, 37, 1000):
        np.testing.assert_allclose(predicted(test, model, n_samples=2, batch_size=size), expected, atol=1e-5)


def test_slides_do_not_see_each_other(slide, model):
    a, b = slide("a", seed=7), slide("b", seed=8)
    for order in ([a, b], [b, a]):
        both = ad.concat(order, uns_merge="same", label="slide", keys=[o.obs_names[0][0] for o in order])
        both.uns["X_texture"] = a.uns["X_texture"]
        sf.tl.predict_expression(both, model=model, library_key="slide", mpp=0.5)
        for one in (a, b):
            np.testing.assert_allclose(both[one.obs_names].obsm["stflow"], predicted(one, model), atol=1e-5)


def test_same_seed_same_result_other_seed_other_draw(slide, model):
    test = slide("t", seed=7)
    first = predicted(test, model, random_state=1)
    np.testing.assert_array_equal(first, predicted(test, model, random_state=1))
    assert np.abs(first - predicted(test, model, random_state=2)).max() > 1e-4


def test_rotation_of_the_slide_changes_nothing(slide, model):
    test = slide("t", seed=7)
    turned = test.copy()
    c, s = np.cos(0.7), np.sin(0.7)
    turned.obsm["spatial"] = test.obsm["spatial"] @ np.array([[c, -s], [s, c]]) * [-1, 1] + 1e5
    np.testing.assert_allclose(predicted(turned, model), predicted(test, model), atol=1e-4)


def test_save_and_load_are_bit_equal(slide, model, tmp_path):
    path = model.save(tmp_path / "model")
    again = sf.models.load(path)
    test = slide("t", seed=7)
    np.testing.assert_array_equal(predicted(test, again), predicted(test, model))
    assert (again.genes, again.card, again.history) == (model.genes, json.loads(json.dumps(model.card)), model.history)
    assert again.sha256 == model.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "one bit", "foreign", "pickled", "other tensors"])
def test_bad_weights_are_refused(model, tmp_path, damage):
    from safetensors.torch import save_file

    path = model.save(tmp_path / "model")
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif damage == "corrupted":
        path.write_bytes(b"\xff" * 64 + good[64:])
    elif damage == "one bit":  # in the last tensor, where the format itself notices nothing
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "pickled":
        path.write_bytes(pickle.dumps({"weights": 1}))
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    else:
        from spatiaflow.models import _base

        description, tensors = _base.read(path)
        tensors.pop("members.global.ridge.intercept")
        path.unlink()
        _base.save(path, description.pop("kind"), description, tensors)
    with pytest.raises(ValueError, match=r"safetensors|spatiaflow model|STFlow model"):
        sf.models.load(path)
    with pytest.raises(FileNotFoundError):
        sf.models.load(tmp_path / "none.safetensors")


def test_test_slides_touch_nothing(slides, slide, model):
    """Predicting reads no counts."""
    test = slide("t", seed=7)
    garbage = test.copy()
    garbage.X = sparse.csr_matrix(np.full(test.shape, 7.0, np.float32))
    np.testing.assert_array_equal(predicted(test, model), predicted(garbage, model))


def test_one_slide_and_raw_convention(slides):
    model = sf.tl.train_stflow(slides[0], config=FAST, genes=["G3", "G1"], target_sum=None)
    assert model.genes == ["G3", "G1"]
    out = sf.tl.predict_expression(slides[1], model=model, copy=True)
    assert out.uns["stflow"]["normalization"]["target_sum"] == "raw"


def test_few_spots(slide, model):
    test = slide("t", seed=7)
    for n in (1, 2, 5):
        few = test[:n].copy()
        sf.tl.predict_expression(few, model=model)
        assert np.isfinite(few.obsm["stflow"]).all()
        assert few.obsm["stflow"].shape == (n, 12)


def in_folds(n, missing=0):
    def change(adata):
        fold = [str(i % n) for i in range(adata.n_obs)]
        adata.obs["fold"] = [None] * missing + fold[missing:]

    return change


BAD_TRAINING = {
    "nan features": (lambda a: a.obsm["X_texture"].__setitem__((0, 0), np.nan), {}, ValueError, "X_texture.*NaN"),
    "inf counts": (lambda a: a.X.data.__setitem__(0, np.inf), {}, ValueError, "X has NaN or infinite"),
    "negative": (lambda a: a.X.data.__setitem__(0, -1), {}, ValueError, "negative"),
    "not integer": (lambda a: a.X.data.__setitem__(0, 0.5), {}, ValueError, "not integer.*layer="),
    "duplicated genes": (
        lambda a: setattr(a, "var_names", ["G0", *a.var_names[:-1]]),
        {},
        ValueError,
        "var_names_make_unique",
    ),
    "duplicated obs": (
        lambda a: setattr(a, "obs_names", ["x", "x", *a.obs_names[2:]]),
        {},
        ValueError,
        "obs_names_make_unique",
    ),
    "no features": (lambda a: a.obsm.pop("X_texture"), {}, KeyError, "encode_patches"),
    "no positions": (lambda a: a.obsm.pop("spatial"), {}, KeyError, "spatial"),
    "nan position": (lambda a: a.obsm["spatial"].__setitem__((3, 0), np.nan), {}, ValueError, "positions"),
    "no mpp": (lambda a: a.uns.pop("spatial"), {}, ValueError, "mpp="),
    "unknown gene": (lambda a: None, {"genes": ["G1", "NOPE"]}, KeyError, "NOPE"),
    "unknown layer": (lambda a: None, {"layer": "raw"}, KeyError, "layers has no 'raw'"),
    "unknown config": (lambda a: None, {"config": "best"}, ValueError, "config must be one of"),
    "unknown slide": (lambda a: None, {"validation": ["z"]}, ValueError, "validation"),
    "resume nothing": (lambda a: None, {"resume": True}, ValueError, "checkpoint_dir"),
    "one spot": (lambda a: a._inplace_subset_obs([0]), {}, ValueError, "single spot"),
    "no spot": (lambda a: a._inplace_subset_obs([]), {}, ValueError, "no rows"),
    "constant features": (lambda a: a.obsm["X_texture"].fill(1), {}, ValueError, "same in every row"),
    "nothing to train on": (lambda a: None, {"validation": ["s0"]}, ValueError, "at least one must be left"),
    "no epoch": (lambda a: None, {"max_epochs": 0}, ValueError, "max_epochs"),
    "no target": (lambda a: None, {"target_sum": 0}, ValueError, "target_sum"),
    "negative seed": (lambda a: None, {"random_state": -1}, ValueError, "random_state"),
    "no genes": (lambda a: None, {"genes": 12.0}, ValueError, "genes must be names"),
    "no whole seed": (lambda a: None, {"random_state": np.random.default_rng(0)}, ValueError, "random_state"),
    "half is most": (lambda a: None, {"validation": 0.8}, ValueError, "not above 0.5"),
    "an empty list": (lambda a: None, {"validation": []}, ValueError, "validation is empty"),
    "a number of slides": (lambda a: None, {"validation": 1}, ValueError, "validation as a fraction"),
    "no such device": (lambda a: None, {"device": "tpu"}, ValueError, "device 'tpu'"),
    "one fold": (in_folds(1), {"fold_key": "fold"}, ValueError, "at least 2 folds; it names '0'"),
    "rows without a fold": (
        in_folds(3, missing=5),
        {"fold_key": "fold"},
        ValueError,
        "5 of .* rows of slide 's0' have none",
    ),
    "two ways to hold out": (in_folds(2), {"fold_key": "fold", "validation": 0.5}, ValueError, "give one of them"),
}


@pytest.mark.parametrize(
    "bad", [{"n_steps": 0}, {"n_samples": 0}, {"batch_size": 0}, {"batch_size": 2.5}, {"key_added": ""}]
)
def test_bad_arguments_are_named(slide, model, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        sf.tl.predict_expression(slide("t", seed=7), model=model, **bad)


def test_a_model_is_needed(slide):
    with pytest.raises(TypeError, match="path of a saved one"):
        sf.tl.predict_expression(slide("t", seed=7), model=None)
    with pytest.raises(ValueError, match="data is empty"):
        sf.tl.train_stflow([])


def test_a_slide_given_twice_and_a_foreign_scale_are_noticed(slide):
    with pytest.warns(UserWarning, match="'s0' and \"s0'\" have the same positions"):
        sf.tl.train_stflow([slide(), slide()], config=ALONE, genes=4)
    far = slide("far", seed=2)
    far.uns["spatial"]["far"]["metadata"]["microns_per_pixel"] *= 3
    with pytest.warns(UserWarning, match="'far' are 585 µm apart, those of the others 195"):
        sf.tl.train_stflow([slide(), slide("s1", seed=1), far], config=ALONE, genes=4)


def test_a_name_to_hold_out_is_one_name(slide):
    slides = [slide(name, n=6, seed=i) for i, name in enumerate(["A1", "A2", "A10"])]
    one = sf.tl.train_stflow(slides, config=FAST, genes=4, validation="A10")
    same = sf.tl.train_stflow(slides, config=FAST, genes=4, validation=["A10"])
    assert one.sha256 == same.sha256


@pytest.mark.slow
def test_printed_arrays_are_arrays(mirror):
    """Spots of her2st are jittered: a wrong scale and slides mixed in one table are noticed all the same."""
    with sf.settings.override(mirror=str(mirror)):
        slides = [sf.datasets.her2st(section) for section in ("C2", "C3")]
    for one in slides:
        one.obsm["X_f"] = np.random.default_rng(0).normal(size=(one.n_obs, 4)).astype(np.float32)
        scale = one.uns.pop("spatial")[one.obs["library_id"].iloc[0]]["metadata"]["microns_per_pixel"]
    options = {"config": ALONE, "genes": 4, "use_rep": "X_f"}
    with pytest.warns(UserWarning, match="array have a pitch"):
        sf.tl.train_stflow(slides, mpp=2 * scale, **options)
    with pytest.warns(UserWarning, match="give library_key='library_id'"):
        sf.tl.train_stflow(ad.concat(slides), mpp=scale, **options)


def test_features_of_unknown_origin_are_noticed(slide, model):
    test = slide("t", seed=7)
    known = test.uns.pop("X_texture")
    with pytest.warns(UserWarning, match="where obsm.*comes from is unknown.*patch_um=112"):
        sf.tl.predict_expression(test, model=model)
    bare = [slide(name, seed=i) for i, name in enumerate("ab")]
    for one in bare:
        del one.uns["X_texture"]
    blind = sf.tl.train_stflow(bare, config=ALONE, genes=4)
    test.uns["X_texture"] = known
    sf.tl.predict_expression(test, model=blind)  # the model knows no better: not refused


def test_positions_may_have_another_name(slide, model):
    test = slide("t", seed=7)
    test.obsm["X_pos"] = test.obsm.pop("spatial")
    sf.tl.predict_expression(test, model=model, spatial_key="X_pos")
    assert "X_pos" in sf.get.expression(test).obsm
    plt.close(sf.pl.expression(test, "G0", spatial_key="X_pos", return_fig=True))


def test_measured_values_of_a_table_cut_to_some_genes_are_noticed(slide, model):
    test = slide("t", seed=7)
    sf.tl.predict_expression(test, model=model)
    few = test[:, model.genes[:2]].copy()
    few.uns["stflow"]["genes"] = test.uns["stflow"]["genes"]
    with pytest.warns(UserWarning, match="library size"):
        plt.close(sf.pl.expression(few, model.genes[0], return_fig=True))


@pytest.mark.parametrize("target_sum", [1e4, None])
def test_training_on_a_table_cut_to_some_genes_is_noticed(slide, target_sum):
    whole = slide(n=6, n_genes=80)
    few = whole[:, :20].copy()
    options = {"config": ALONE, "target_sum": target_sum}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sf.tl.train_stflow(whole, genes=list(few.var_names), **options)
        assert not [one for one in found if "library size" in str(one.message)]
        sf.tl.train_stflow(few, genes=20, **options)
    said = [str(one.message) for one in found if "library size" in str(one.message)]
    assert len(said) == (target_sum is not None)  # raw counts have no need of it
    assert all("the table has 20 genes" in one and "sf.tl.train_stflow(data, genes=[...])" in one for one in said)


def test_several_slides_in_one_table_are_noticed(slide):
    both = ad.concat({"a": slide("a"), "b": slide("b", seed=1)}, label="section")
    both.obsm["spatial"][both.obs["section"] == "b"] += 70  # neither array's spots lie on the other's
    with pytest.warns(UserWarning, match="give library_key='section'"):
        sf.tl.train_stflow(both, config=ALONE, genes=4, mpp=0.5)


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_input_is_a_clear_error(slide, case):
    spoil, kwargs, error, message = BAD_TRAINING[case]
    data = slide()
    spoil(data)
    with pytest.raises(error, match=message):
        sf.tl.train_stflow(data, **({"config": ALONE, "genes": 4} | kwargs))


def test_foreign_features_are_refused(slide, model):
    test = slide("t", seed=7)
    test.uns["X_texture"] = test.uns["X_texture"] | {"patch_um": 55.0}
    with pytest.raises(ValueError, match="patch_um 55.0.*patch_um 112.0"):
        sf.tl.predict_expression(test, model=model)
    test.obsm["X_texture"] = test.obsm["X_texture"][:, :5]
    with pytest.raises(ValueError, match="n_features 5"):
        sf.tl.predict_expression(test, model=model)
    del test.obsm["X_texture"]
    with pytest.raises(KeyError, match="encoder='texture'"):
        sf.tl.predict_expression(test, model=model)


def test_wrong_scale_warns_with_both_numbers(slide, model):
    test = slide("t", seed=7)
    with pytest.warns(UserWarning, match="spots are 39.* µm apart"):
        sf.tl.predict_expression(test, model=model, mpp=1.0)


@pytest.fixture(scope="module")
def usual(slide):
    """The hash of a model of counts in their usual form."""
    return sf.tl.train_stflow(slide(n=8), config=FAST, genes=4).sha256


@pytest.mark.parametrize("form", ["dense", "int", "csc", "backed", "view"])
def test_any_form_of_X(slide, usual, tmp_path, form):
    data = slide(n=8)
    if form == "dense":
        data.X = data.X.toarray()
    elif form == "int":
        data.X = data.X.astype(np.int64)
    elif form == "csc":
        data.X = data.X.tocsc()
    elif form == "backed":
        data.write_h5ad(tmp_path / "x.h5ad")
        data = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
        with pytest.raises(ValueError, match="to_memory"):
            sf._io.unpack(data, copy=True)
    else:
        data = data[:]
    assert sf.tl.train_stflow(data, config=FAST, genes=4).sha256 == usual


def test_duplicated_and_overlapping_positions_warn(slide, model):
    test = slide("t", seed=7)
    both = ad.concat([test, slide("u", seed=7)])
    both.uns["X_texture"] = test.uns["X_texture"]
    with pytest.warns(UserWarning, match="library_key="):
        sf.tl.predict_expression(both, model=model, mpp=0.5)
    assert np.isfinite(both.obsm["stflow"]).all()


def test_h5ad_round_trip_and_get(slide, model, tmp_path):
    test = slide("t", seed=7)
    sf.tl.predict_expression(test, model=model)
    test.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad")
    np.testing.assert_array_equal(again.obsm["stflow"], test.obsm["stflow"])
    out = sf.get.expression(again)
    assert list(out.var_names) == model.genes
    np.testing.assert_array_equal(out.X, test.obsm["stflow"])
    np.testing.assert_array_equal(out.layers["std"], test.obsm["stflow_std"])
    np.testing.assert_array_equal(out.layers["rate"], test.obsm["stflow_rate"])
    assert (out.layers["rate"] > 0).all()
    assert "spatial" in out.obsm
    with pytest.raises(KeyError, match="predict_expression"):
        sf.get.expression(again, key="nothing")


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Index])
def test_genes_by_name_in_any_sequence(slides, kind):
    names = list(slides[0].var_names[[3, 1]])
    assert sf.tl.train_stflow(slides, config=ALONE, genes=kind(names)).genes == names


@pytest.mark.parametrize("genes", [[], ["g1", "g1"], 0, -1, True])
def test_genes_that_make_no_sense(slides, genes):
    with pytest.raises(ValueError, match="genes"):
        sf.tl.train_stflow(slides, config=ALONE, genes=genes)


def test_a_gene_that_is_never_seen_shows_no_skill(slides):
    silent = [s.copy() for s in slides]
    for s in silent:
        s.X = s.X.multiply((np.arange(s.n_vars) != 0)[None]).tocsr()
    model = sf.tl.train_stflow(silent, config=FAST, genes=list(slides[0].var_names[:3]))
    assert model.skill[0] == 0


def with_glass(adata, n):
    """The slide with ``n`` spots on glass beside it: flat features, no counts."""
    glass = adata[:n].copy()
    glass.obs_names = [f"glass_{i}" for i in range(n)]
    glass.obsm["spatial"] = adata.obsm["spatial"][:n] - [0, 1.03 * np.ptp(adata.obsm["spatial"][:, 1])]
    glass.obsm["X_texture"] = np.full((n, 8), -25, np.float32) + np.arange(8, dtype=np.float32)
    glass.X = sparse.csr_matrix(glass.shape, dtype=np.float32)
    out = ad.concat([glass, adata])
    out.uns = adata.uns
    out.obs["tissue"] = np.repeat([0.0, 1.0], [n, adata.n_obs]).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def by_slide(slides):
    """A model that scales each slide by its own spots."""
    own = dataclasses.replace(FAST, standardize="slide")
    return sf.tl.train_stflow(slides, genes=12, config=own, max_epochs=2)


@pytest.mark.parametrize("n_samples", [1, 3])
def test_glass_changes_nothing_for_tissue(slide, by_slide, n_samples):
    clean, dirty = slide("t", seed=7), with_glass(slide("t", seed=7), 80)
    for one in (clean, dirty):
        sf.tl.predict_expression(one, model=by_slide, n_samples=n_samples)
    for key in ("stflow", "stflow_rate", "stflow_std"):
        np.testing.assert_array_equal(dirty.obsm[key][80:], clean.obsm[key])
    np.testing.assert_array_equal(dirty.obs["stflow_ood"][80:], clean.obs["stflow_ood"])
    np.testing.assert_allclose(dirty.obsm["stflow"][:80], by_slide.arrays["mean"][None].repeat(80, 0), rtol=1e-6)
    assert (dirty.obs["stflow_ood"][:80] == 1).all()
    params = dirty.uns["stflow"]["params"]
    assert (list(params["standardized_on"]), params["n_glass"]) == (["144"], 80)


def test_a_slide_of_glass_is_the_training_mean(slide, by_slide):
    only = with_glass(slide("t", seed=7), 30)[:30].copy()
    sf.tl.predict_expression(only, model=by_slide)
    np.testing.assert_allclose(only.obsm["stflow"][0], by_slide.arrays["mean"], rtol=1e-6)
    assert np.isfinite(only.obsm["stflow_std"]).all()


def test_few_spots_are_scaled_by_the_training_data(slide, by_slide):
    few, more = slide("t", seed=7)[:19].copy(), slide("t", seed=7)[:20].copy()
    for one, expected in ((few, "training"), (more, "20")):
        sf.tl.predict_expression(one, model=by_slide)
        assert list(one.uns["stflow"]["params"]["standardized_on"]) == [expected]
    x = few.obsm["X_texture"]
    expected = np.float32((x - by_slide.members.mean) / by_slide.members.std)
    np.testing.assert_array_equal(by_slide.members.scaled(x, "slide")[:], expected)


def test_training_leaves_out_glass_and_empty_spots(slides, slide, caplog):
    dirty = [with_glass(one, 40) for one in slides]
    dirty[1].X[50] = 0  # on tissue, without counts
    kept = [slides[0], slides[1][np.arange(144) != 10].copy(), slides[2]]
    sf._settings.logger.propagate = True
    try:
        model, expected = (sf.tl.train_stflow(some, genes=12, config=FAST, max_epochs=1) for some in (dirty, kept))
    finally:
        sf._settings.logger.propagate = False
    assert "slide 's1': 40 spots on glass and 1 more without any counts are left out" in caplog.text
    assert model.sha256 == expected.sha256
