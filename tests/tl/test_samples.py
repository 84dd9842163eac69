"""Joint draws: they belong to names, not to rows, neighbours err together, and a store holds what memory would."""

import errno

import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf


def test_draws_belong_to_names(quick, slide):
    test = slide("t", n=8, seed=7)
    options = {"model": quick, "n_samples": 6, "random_state": 3}
    right = sf.tl.sample_expression(test, **options)
    shuffled = test[np.random.default_rng(0).permutation(64)].copy()
    for one, more in ((shuffled, {}), (test, {"batch_size": 5}), (test, {"genes": ["G4", "G1"]})):
        found = sf.tl.sample_expression(one, **options, **more)[test.obs_names]
        np.testing.assert_allclose(sf.get.draws(found), sf.get.draws(right[:, found.var_names]), atol=1e-5)
    other = sf.tl.sample_expression(test, **options | {"random_state": 4})
    assert np.abs(sf.get.draws(other) - sf.get.draws(right)).max() > 0.1


def test_what_is_returned(quick, slide):
    test = slide("t", n=8, seed=7)
    test.obs["tissue"] = np.where(np.arange(64) < 5, 0.0, 1.0)
    before = test.copy()
    draws = sf.tl.sample_expression(test, model=quick, n_samples=3, new_donor=False)
    assert [name for name in draws.layers if name] == ["draw_000", "draw_001", "draw_002"]
    assert draws.X.dtype == draws.layers["draw_000"].dtype == np.float32
    np.testing.assert_allclose(draws.X, sf.get.draws(draws).mean(0), atol=1e-5)
    np.testing.assert_array_equal(np.isnan(draws.X).all(1), np.arange(64) < 5)
    np.testing.assert_array_equal(draws.obsm["spatial"], test.obsm["spatial"])
    said = draws.uns["draws"]
    assert (said["depth"], said["donor_effect"]) == (quick.usual_depth, "same donor")
    assert said["params"]["model_sha256"] == quick.sha256
    np.testing.assert_array_equal(draws.var["skill"], quick.skill)
    assert test.obs.equals(before.obs) and set(test.obsm) == set(before.obsm) and set(test.uns) == set(before.uns)
    assert not np.shares_memory(draws.obsm["spatial"], test.obsm["spatial"])


def test_writing_into_a_result_leaves_the_model_alone(quick, slide):
    test, skill = slide("t", n=6, seed=7), quick.skill.copy()
    sf.tl.predict_expression(test, model=quick)
    test.uns["stflow"]["skill"][:] = 0
    sf.tl.sample_expression(test, model=quick, n_samples=1).var["skill"] = 0.0
    np.testing.assert_array_equal(quick.skill, skill)


def test_neighbours_err_together(quick, slide):
    test = slide("t", n=8, seed=7)
    y = sf.get.draws(sf.tl.sample_expression(test, model=quick, n_samples=300, new_donor=False))
    error = (y - y.mean(0)) / np.maximum(y.std(0), 1e-6)
    covariance = np.einsum("dig,djg->ij", error, error) / error.shape[0] / error.shape[2]
    distance = np.linalg.norm(test.obsm["spatial"][:, None] - test.obsm["spatial"][None], axis=-1) * 0.5
    near = covariance[(distance > 0) & (distance < 250)].mean()
    far = covariance[distance > 900].mean()
    assert near > 0 and near > far + 0.01


def test_fewer_counts_are_more_noise(quick, slide):
    test = slide("t", n=8, seed=7)
    test.obs["counts"] = 1000.0
    test.obs.loc[test.obs_names[:20], "counts"] = 30.0
    options = {"model": quick, "n_samples": 60, "new_donor": False}
    spread = sf.get.draws(sf.tl.sample_expression(test, depth="counts", **options)).std(0).mean(1)
    assert spread[:20].mean() > 1.2 * spread[20:].mean()
    draws = sf.tl.sample_expression(test, depth=50, **options)
    assert draws.uns["draws"]["depth"] == 50
    step = np.expm1(sf.get.draws(draws)) * 50 / 1e4
    np.testing.assert_allclose(step, np.round(step), atol=1e-2)  # counts of a spot with 50 of them


def test_a_store_holds_what_memory_would(quick, tmp_path, slide):
    both = ad.concat([slide("a", n=6, seed=7), slide("b", n=6, seed=8)], uns_merge="first", label="slide")
    both = both[np.random.default_rng(0).permutation(72)].copy()  # rows of a slide are not together
    options = {"model": quick, "n_samples": 4, "library_key": "slide", "mpp": 0.5, "genes": ["G3", "G0"]}
    right = sf.tl.sample_expression(both, **options)
    found = sf.tl.sample_expression(both, store=tmp_path / "d.zarr", **options)
    again = ad.io.read_zarr(tmp_path / "d.zarr")
    for one in (found, again):
        np.testing.assert_array_equal(sf.get.draws(one), sf.get.draws(right))
        np.testing.assert_array_equal(one.X, right.X)
    assert not isinstance(found.layers["draw_000"], np.ndarray)  # it stays on disk
    assert again.uns["draws"]["depth"] == quick.usual_depth
    with pytest.raises(FileExistsError, match="exists and is not overwritten"):
        sf.tl.sample_expression(both, store=tmp_path / "d.zarr", **options)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sf.tl.sample_expression(both, store=tmp_path / "no" / "d.zarr", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["d.zarr"]


def test_nothing_half_written_stays(quick, tmp_path, monkeypatch, slide):
    def full(*args, **options):
        yield np.zeros((36, 12), np.float32)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(quick), "draws", full)
    with pytest.raises(OSError, match="the disk is full: .*d.zarr"):
        sf.tl.sample_expression(slide("t", n=6), model=quick, n_samples=2, store=tmp_path / "d.zarr")
    assert not list(tmp_path.iterdir())


def test_lists_and_dicts_come_back_in_their_form(quick, tmp_path, slide):
    a, b = slide("a", n=6, seed=7), slide("b", n=6, seed=8)
    alone = sf.tl.sample_expression(b, model=quick, n_samples=2)
    found = sf.tl.sample_expression({"a": a, "b": b}, model=quick, n_samples=2)
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"].X, alone.X)
    (listed,) = sf.tl.sample_expression([b], model=quick, n_samples=2)
    np.testing.assert_array_equal(listed.X, alone.X)
    with pytest.raises(ValueError, match="store must be the path of the draws of one object"):
        sf.tl.sample_expression([a, b], model=quick, n_samples=2, store=tmp_path / "d.zarr")


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [({"genes": ["G1", "nope"]}, KeyError, "predicts no 'nope'; it predicts"), ({"depth": "nope"}, KeyError, "obs has no 'nope'"),
     ({"depth": "words"}, ValueError, "must hold numbers"), ({"depth": "gaps"}, ValueError, "in 2 rows"),
     ({"depth": 0}, ValueError, "depth must be a positive number"), ({"depth": [5]}, ValueError, "depth must be a number"),
     ({"n_samples": 0}, ValueError, "n_samples"), ({"new_donor": "no"}, ValueError, "new_donor must be one of"),
     ({"store": 3}, ValueError, "store must be the path")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(quick, bad, error, match, slide):
    test = slide("t", n=6, seed=7)
    test.obs["words"], test.obs["gaps"] = "a", np.where(np.arange(36) < 2, np.nan, 5.0)
    with pytest.raises(error, match=match):
        sf.tl.sample_expression(test, model=quick, **{"n_samples": 2} | bad)
