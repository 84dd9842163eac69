import warnings

import anndata as ad
import numpy as np
import pytest
import torch

import spatiaflow as sf
from spatiaflow._io import Where
from spatiaflow._slides import gather


def test_slides_hold_the_rows_of_their_table(slide):
    adata = slide("a")
    (one,) = gather(adata, need=("counts", "features"), use_rep="X_texture")
    assert (one.name, one.genes) == ("a", tuple(adata.var_names))
    assert list(one.obs_names) == list(adata.obs_names)
    np.testing.assert_array_equal(one.counts.toarray(), adata.X.toarray())
    np.testing.assert_array_equal(one.library, adata.X.sum(1, dtype=float).A1)
    np.testing.assert_array_equal(one.features, adata.obsm["X_texture"])
    np.testing.assert_allclose(one.xy, adata.obsm["spatial"] * 0.5)


def test_features_of_a_whole_table_are_not_copied(slide):
    adata = slide("a")
    (one,) = gather(adata, need=("features",), use_rep="X_texture")
    assert np.shares_memory(one.features, adata.obsm["X_texture"])


def test_names_of_lists_and_dicts(slide):
    pair = [slide("a"), slide("a", seed=1)]
    assert [s.name for s in gather(pair)] == ["a", "a'"]
    assert [s.name for s in gather({"x": pair[0], "y": pair[1]})] == ["x", "y"]


def test_several_slides_of_one_table(slide):
    both = ad.concat({"a": slide("a"), "b": slide("b", seed=1)}, label="section")
    both = both[np.random.default_rng(0).permutation(both.n_obs)].copy()
    found = gather(both, Where(library_key="section", mpp=0.5), need=("counts",))
    assert sorted(s.name for s in found) == ["a", "b"]
    for one in found:
        assert (both.obs["section"].iloc[one.rows] == one.name).all()
        np.testing.assert_array_equal(one.counts.toarray(), both.X[one.rows].toarray())
    assert sorted(np.concatenate([s.rows for s in found])) == list(range(both.n_obs))


def test_an_unknown_need_an_empty_list_and_a_slide_given_twice(slide):
    with pytest.raises(ValueError, match="need must be among counts, features, crops, not colours"):
        gather(slide(), need=("colours",))
    with pytest.raises(ValueError, match="data is empty"):
        gather([])
    with pytest.warns(UserWarning, match="have the same positions"):
        gather([slide(), slide()])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gather([slide(), slide()], together=False)


@pytest.mark.parametrize(("kind", "white"), [(np.uint16, 65535), (np.uint16, 255), (np.float32, 1.0)])
def test_models_read_a_picture_of_any_depth_as_uint8(kind, white):
    sdata = sf.datasets.simulated_tissue(40, seed=0)
    other = sf.datasets.simulated_tissue(40, seed=0)
    image = other["he"]
    other["he"] = image.copy(data=(image.data.astype(np.float64) * (white / 255)).astype(kind))
    where = Where(image_key="he")
    first, second = (
        gather(one, where, need=["crops"], crop_um=16.0)[0].crops.read(np.arange(40)) for one in (sdata, other)
    )
    assert first.dtype == second.dtype == torch.uint8
    np.testing.assert_allclose(second.int(), first.int(), atol=1)


def test_a_slide_has_one_donor(slide):
    one, two = slide("s0"), slide("s1", seed=1)
    one.obs["donor"], two.obs["donor"] = "A", "B"
    found = gather([one, two], need=("features",), use_rep="X_texture", donor_key="donor")
    assert [s.donor for s in found] == ["A", "B"]
    with pytest.raises(KeyError, match="obs has no 'patient'"):
        gather(one, donor_key="patient")
    one.obs.loc[one.obs_names[:3], "donor"] = "B"
    with pytest.raises(ValueError, match="must name one donor for each slide; slide .* has 2"):
        gather(one, donor_key="donor")
