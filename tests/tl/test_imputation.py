"""tl.impute_genes: slots, references with and without positions, leakage, errors."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata
from scipy import sparse, stats

import spatiaflow as sf
from spatiaflow.models.regression import gene_pearson

GENES = 20


def cells(name, n=400, seed=0, spatial=True, tissue=3):
    """Cells of two types in two halves of a tissue; another ``tissue`` has other types."""
    rng, rule = np.random.default_rng(seed), np.random.default_rng(tissue)
    xy = rng.uniform(0, 200, (n, 2))
    kind = (xy[:, 0] + rng.normal(0, 20, n) > 100).astype(int)
    rate = np.exp(rule.normal(0.8, 0.6, (2, GENES)))[kind] * rng.lognormal(0, 0.3, (n, 1))
    out = ad.AnnData(
        sparse.csr_matrix(rng.poisson(rate).astype(np.float32)),
        obs=pd.DataFrame(index=[f"{name}{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"G{g}" for g in range(GENES)]),
    )
    if spatial:
        out.obsm["spatial"] = xy
    out.obsm["picture"] = (kind[:, None] + 0.3 * rng.normal(size=(n, 3))).astype(np.float32)
    return out


@pytest.fixture(autouse=True)
def small(monkeypatch):
    from spatiaflow.train import imputer

    monkeypatch.setattr(imputer, "N_KERNEL", 100)


@pytest.fixture
def reference():
    return cells("r", 800, seed=1)


@pytest.fixture
def query():
    return cells("q", seed=2)


def hidden(query, n=5):
    return query[:, : GENES - n].copy()


def test_missing_genes_are_imputed_into_slots(query, reference):
    data = hidden(query)
    before = data.X.copy()
    assert sf.tl.impute_genes(data, reference=reference, use_rep="picture") is None
    assert list(data.uns["imputed"]["genes"]) == [f"G{g}" for g in range(15, 20)]
    for slot in ("imputed", "imputed_std"):
        assert data.obsm[slot].shape == (400, 5)
        assert data.obsm[slot].dtype == np.float32
        assert (data.obsm[slot] >= 0).all()
    assert (data.X != before).nnz == 0
    library = np.asarray(data.X.sum(1))
    per = data.uns["imputed"]["normalization"]["target_sum"]
    assert per == np.median(np.asarray(reference[:, data.var_names].X.sum(1)))
    y = np.log1p(query[:, 15:].X.toarray() * per / library)
    r = gene_pearson(y, data.obsm["imputed"])
    kind = query.obsm["spatial"][:, 0] > 100  # the difference of the types is all there is to be found
    possible = np.abs([stats.pearsonr(kind, y[:, g])[0] for g in range(5)])
    assert (r > possible - 0.05).all()
    assert np.abs(data.uns["imputed"]["reliability"] - r).max() < 0.2
    assert sf.get.expression(data, key="imputed").var["reliability"].gt(0).all()


@pytest.mark.parametrize("n", [300, 800])
def test_a_small_reference_is_warned_of(query, n, caplog, monkeypatch):
    monkeypatch.setattr(sf._settings.logger, "propagate", True)
    sf.tl.impute_genes(hidden(query), reference=cells("r", n, seed=1))
    assert ("300 reference cells are few" in caplog.text) == (n == 300)


def test_cells_that_are_in_the_reference_too_are_told_of(query, reference, caplog, monkeypatch):
    monkeypatch.setattr(sf._settings.logger, "propagate", True)
    named_alike = reference[:400].copy()
    named_alike.obs_names = query.obs_names
    sf.tl.impute_genes(hidden(query), reference=named_alike)
    assert "in the reference too" not in caplog.text
    both = ad.concat([query[:250], reference])
    both.obsm["spatial"] = np.r_[query.obsm["spatial"][:250], reference.obsm["spatial"]]
    sf.tl.impute_genes(hidden(query), reference=both)
    assert "of 400 cells of data are in the reference too" in caplog.text


def test_the_kernel_is_not_tried_for_genes_that_are_measured(query):
    sf.tl.impute_genes(query)
    assert list(query.uns["imputed"]["validation_scores"]) == ["genes", "genes+neighbors"]


def test_cells_without_positions_are_told_of(query, reference, caplog, monkeypatch):
    monkeypatch.setattr(sf._settings.logger, "propagate", True)
    caplog.set_level("INFO", logger=sf._settings.logger.name)
    del reference.obsm["spatial"]
    data = hidden(query)
    sf.tl.impute_genes(data, reference=reference)
    assert "the reference: no obsm['spatial']" in caplog.text and "data: no obsm" not in caplog.text
    assert "neighbors" not in data.uns["imputed"]["branches"]


def test_genes_that_the_reference_lacks_leave_no_trace(query, reference):
    """Neither in the library nor in any column: what the query alone measures may be garbage."""
    data, spoiled = query.copy(), query.copy()
    garbage = query.X.toarray()
    garbage[:, 15:] = np.random.default_rng(0).poisson(50, (400, 5))
    spoiled.X = sparse.csr_matrix(garbage)
    known = reference[:, :15].copy()
    known.obsm["spatial"] = reference.obsm["spatial"]
    for one in (data, spoiled):
        sf.tl.impute_genes(one, reference=known, genes=["G0", "G1"])
    np.testing.assert_array_equal(data.obsm["imputed"], spoiled.obsm["imputed"])
    np.testing.assert_array_equal(data.obsm["imputed_std"], spoiled.obsm["imputed_std"])


def test_second_call_gives_the_same(query, reference):
    one, other = (sf.tl.impute_genes(hidden(query), reference=reference, copy=True) for _ in range(2))
    np.testing.assert_array_equal(one.obsm["imputed"], other.obsm["imputed"])


def test_dissociated_reference_gives_no_neighbors(query):
    data = hidden(query)
    sf.tl.impute_genes(data, reference=cells("r", 800, seed=1, spatial=False))
    assert "neighbors" not in data.uns["imputed"]["branches"]
    assert np.isfinite(data.obsm["imputed"]).all()


def test_neighbors_never_cross_slides(reference):
    slides = [hidden(cells(name, 150, seed=i)) for i, name in enumerate("ab", 5)]
    both = ad.concat(slides, label="slide")
    known = reference.copy()
    known.obs["slide"] = "r"
    sf.tl.impute_genes(both, reference=known, library_key="slide", check=False)
    alone = slides[1]
    alone.obs["slide"] = "b"
    sf.tl.impute_genes(alone, reference=known, library_key="slide", check=False)
    np.testing.assert_allclose(both.obsm["imputed"][150:], alone.obsm["imputed"], atol=1e-5)


def test_denoised_counts_are_nearer_to_what_thinning_hid():
    whole = cells("d", 1500, seed=4)
    rng = np.random.default_rng(0)
    half = whole.copy()
    half.X = sparse.csr_matrix(rng.binomial(whole.X.toarray().astype(int), 0.5).astype(np.float32))
    rest = whole.X.toarray() - half.X.toarray()
    sf.tl.impute_genes(half)
    assert half.uns["imputed"]["denoised"].all()
    per, library = half.uns["imputed"]["normalization"]["target_sum"], np.asarray(half.X.sum(1))
    noisy, other = (np.log1p(v * per / library) for v in (half.X.toarray(), rest))
    errors = [np.mean((v - other) ** 2) for v in (half.obsm["imputed"], noisy)]
    assert errors[0] < 0.75 * errors[1]
    assert np.nanmean(gene_pearson(other, half.obsm["imputed"])) > np.nanmean(gene_pearson(other, noisy)) + 0.03


def test_genes_that_were_never_seen_are_finite_and_have_no_reliability(query, reference):
    counts = reference.X.toarray()
    counts[:, [2, 16]] = 0
    reference.X = sparse.csr_matrix(counts)
    data = hidden(query)
    sf.tl.impute_genes(data, reference=reference, genes=["G2", "G3", "G16", "G17"])
    assert np.isfinite(data.obsm["imputed"]).all()
    assert np.isfinite(data.obsm["imputed_std"]).all()
    np.testing.assert_array_equal(data.uns["imputed"]["reliability"][[0, 2]], 0)
    assert (data.obsm["imputed"][:, 2] == 0).all()


def test_spatialdata_gets_the_slots_in_its_table(recwarn):
    slides = [sf.datasets.simulated_tissue(n, seed=i) for i, n in enumerate((400, 300))]
    known, data = slides
    genes = list(known["table"].var_names[:3])
    data.tables["table"] = data["table"][:, 3:].copy()
    sf.tl.impute_genes(data, reference=known)
    assert list(data["table"].uns["imputed"]["genes"]) == genes
    assert data["table"].obsm["imputed"].shape == (data["table"].n_obs, 3)
    assert any(
        "neighbors" in name for name in data["table"].uns["imputed"]["validation_scores"]
    )  # centroids of the polygons
    assert not [w for w in recwarn if "mpp" in str(w.message)]


def test_many_genes_of_a_spatialdata_are_a_table_on_the_same_region(tmp_path, monkeypatch):
    from spatiaflow.tl import _imputation

    monkeypatch.setattr(_imputation, "MAX_SLOT", 2)
    known, data = (sf.datasets.simulated_tissue(300, seed=i) for i in range(2))
    data.tables["table"] = data["table"][:, 3:].copy()
    assert sf.tl.impute_genes(data, reference=known) is None
    data.write(tmp_path / "a.zarr")
    again = spatialdata.read_zarr(tmp_path / "a.zarr")["imputed"]
    np.testing.assert_array_equal(again.X, data["imputed"].X)
    assert again.uns["spatialdata_attrs"]["region"] == data["table"].uns["spatialdata_attrs"]["region"]
    assert list(again.var_names) == list(known["table"].var_names[:3])
    for table_key in ("table", "imputed"):
        found = sf.get.expression(data, key="imputed", table_key=table_key)
        np.testing.assert_array_equal(found.X, again.X)
        assert found is not data["imputed"]


def test_many_genes_come_as_a_table_of_their_own(query, reference, monkeypatch):
    from spatiaflow.tl import _imputation

    monkeypatch.setattr(_imputation, "MAX_SLOT", 4)
    data = hidden(query)
    out = sf.tl.impute_genes(data, reference=reference)
    assert "imputed" not in data.obsm
    assert list(out.var_names) == [f"G{g}" for g in range(15, 20)]
    assert out.obs_names.equals(data.obs_names)
    assert out.layers["std"].shape == out.shape == (400, 5)
    assert {"reliability", "denoised"} <= set(out.var)
    assert sf.get.expression(out, key="imputed").var_names.equals(out.var_names)


def test_result_survives_h5ad(query, reference, tmp_path):
    data = hidden(query)
    sf.tl.impute_genes(data, reference=reference)
    data.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_array_equal(again.obsm["imputed"], data.obsm["imputed"])
    assert again.uns["imputed"]["params"]["n_reference"] == 800


def test_a_trained_model_serves_panels_that_lack_some_of_its_genes(query, reference, tmp_path):
    model = sf.tl.train_imputation(reference)
    assert model.genes == list(reference.var_names)
    assert model.card["data"]["slide"]["n_obs"] == 800
    data = hidden(query)
    sf.tl.impute_genes(data, model=model.save(tmp_path / "panel"))
    assert list(data.uns["imputed"]["genes"]) == [f"G{g}" for g in range(15, 20)]
    assert 0 < data.uns["imputed"]["library_share"] < 1
    other = hidden(query)
    sf.tl.impute_genes(other, reference=reference)
    r = [np.corrcoef(data.obsm["imputed"][:, g], other.obsm["imputed"][:, g])[0, 1] for g in range(5)]
    assert min(r) > 0.8  # the other has a kernel as well
    sf.tl.impute_genes(data, model=model, genes=["G3", "G17"], key_added="both")
    np.testing.assert_array_equal(data.uns["both"]["denoised"], [True, False])
    with pytest.raises(ValueError, match="not both"):
        sf.tl.impute_genes(data, model=model, reference=reference)
    with pytest.raises(KeyError, match="not in the model"):
        sf.tl.impute_genes(data, model=model, genes=["ACTB"])
    with pytest.raises(KeyError, match="neighbors"):
        sf.tl.impute_genes(hidden(cells("q", spatial=False)), model=model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, r: {"genes": ["ACTB"], "reference": r}, KeyError, "not in the reference"),
        (lambda q, r: {"genes": ["G19"]}, KeyError, "neither reference= nor model="),
        (lambda q, r: {"reference": q}, ValueError, "no gene that data lack"),
        (lambda q, r: {"reference": r[:20].copy()}, ValueError, "20 cells"),
        (lambda q, r: {"reference": r, "use_rep": "X_none"}, KeyError, "X_none"),
        (lambda q, r: {"reference": r, "genes": ["G1", "G1"]}, ValueError, "twice"),
        (lambda q, r: {"reference": r, "genes": ["g19"]}, KeyError, "Is it 'G19'?"),
        (lambda q, r: {"reference": [r, r]}, TypeError, "reference must be one AnnData"),
    ],
)
def test_bad_input_says_what_is_wrong(query, reference, change, error, message):
    data = hidden(query)
    with pytest.raises(error, match=message):
        sf.tl.impute_genes(data, **change(data.copy(), reference))


def test_foreign_names_say_so(query, reference):
    reference.var_names = [f"ENSG{i}" for i in range(GENES)]
    with pytest.raises(ValueError, match="share 0 of 15 genes"):
        sf.tl.impute_genes(hidden(query), reference=reference)


def test_normalised_values_are_refused(query, reference):
    reference.X = reference.X * 0.5
    with pytest.raises(ValueError, match="not integer.*reference_layer="):
        sf.tl.impute_genes(hidden(query), reference=reference)


def test_bundled_weights_fill_in_genes_of_a_pancreas(mirror):
    whole = sf.datasets.xenium_pancreas()["table"]
    whole = whole[np.asarray(whole.X.sum(1)).ravel() >= 15].copy()
    names = [g for g in ("KRT19", "COL1A1", "CFTR", "CD3E", "VWF", "ACTA2") if g in whole.var_names]
    hidden = whole[:, ~whole.var_names.isin(names)].copy()
    sf.tl.impute_genes(hidden, model="imputation-pancreas-small", genes=names)
    library = np.asarray(hidden.X.sum(1))
    y = np.log1p(whole[:, names].X.toarray() * 100 / library)
    r = gene_pearson(y, hidden.obsm["imputed"])
    assert r.mean() > 0.3
    assert np.corrcoef(r, hidden.uns["imputed"]["reliability"])[0, 1] > 0.5


def test_each_of_several_objects_gets_its_own_values(query, reference):
    one, other = hidden(query), hidden(cells("p", 200, seed=6))
    alone = sf.tl.impute_genes(other, reference=reference, copy=True)
    both = sf.tl.impute_genes({"one": one, "other": other}, reference=reference, copy=True)
    assert list(both) == ["one", "other"]
    np.testing.assert_array_equal(both["other"].obsm["imputed"], alone.obsm["imputed"])
    assert sf.tl.impute_genes([one, other], reference=reference) is None
    np.testing.assert_array_equal(other.obsm["imputed"], alone.obsm["imputed"])


def test_parameters_name_the_model_where_there_is_one(query, reference):
    model, data = sf.tl.train_imputation(reference), hidden(query)
    sf.tl.impute_genes(data, model=model, random_state=4)
    params = data.uns["imputed"]["params"]
    assert (params["model"], params["model_sha256"], params["random_state"]) == ("Imputer", model.sha256, 4)
    sf.tl.impute_genes(data, reference=reference)
    assert "model_sha256" not in data.uns["imputed"]["params"]


def test_a_model_of_another_kind_is_refused_with_its_own_verb(query):
    with pytest.raises(TypeError, match=r"Imputer.*Spatia.*sf\.tl\.embed_spatia"):
        sf.tl.impute_genes(hidden(query), model="spatia-pancreas-small")


def reliabilities(data):
    uns = data.uns["imputed"]
    return np.asarray(uns["reliability"]), np.asarray(uns["reliability_reference"])


@pytest.mark.parametrize("by", ["reference", "model"])
def test_reliability_is_measured_again_in_the_query(by, query, reference):
    source = {"reference": reference} if by == "reference" else {"model": sf.tl.train_imputation(reference)}
    right, permuted = hidden(query), hidden(query)
    permuted.var_names = np.random.default_rng(0).permutation(permuted.var_names)
    other = hidden(cells("o", seed=2, tissue=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sf.tl.impute_genes(right, **source)
    for wrong in (permuted, other):
        with pytest.warns(
            UserWarning, match=r"less reliable here than in the reference.*promised 0\.[2-9].*same tissue"
        ):
            sf.tl.impute_genes(wrong, **source)
        now, promised = reliabilities(wrong)
        assert (now < 0.5 * promised).all()
    now, promised = reliabilities(right)
    assert (now <= promised).all()
    assert now.mean() > 0.75 * promised.mean()


def test_without_the_check_the_figure_is_that_of_the_reference(query, reference):
    data = hidden(query)
    data.var_names = data.var_names[::-1]
    sf.tl.impute_genes(data, reference=reference, check=False)
    np.testing.assert_array_equal(*reliabilities(data))


def test_denoised_genes_have_what_they_reached_themselves(query, reference):
    data = hidden(query)
    counts = data.X.toarray()
    counts[:, 4] = np.random.default_rng(0).poisson(3, 400)  # this gene is noise here
    data.X = sparse.csr_matrix(counts)
    sf.tl.impute_genes(data, reference=reference, genes=["G4", "G5", "G17"])
    now, promised = reliabilities(data)
    assert now[0] < 0.15 < promised[0]
    assert (now[1:] > 0.6 * promised[1:]).all()


def test_reference_cells_without_counts_teach_nothing(query, reference):
    data = hidden(query)
    counts = reference.X.tolil()
    counts[::10] = 0
    empty = reference.copy()
    empty.X = counts.tocsr()
    rest = reference[np.arange(800) % 10 > 0].copy()
    found, expected = (sf.tl.impute_genes(data, reference=one, copy=True) for one in (empty, rest))
    np.testing.assert_allclose(found.obsm["imputed"], expected.obsm["imputed"], atol=1e-5)
    np.testing.assert_allclose(found.uns["imputed"]["reliability"], expected.uns["imputed"]["reliability"], atol=1e-5)
    models = [sf.tl.train_imputation(one) for one in (empty, rest)]
    np.testing.assert_allclose(models[0].promised, models[1].promised, atol=1e-5)


def test_a_table_of_counts_is_never_replaced(reference, monkeypatch):
    sdata = sf.datasets.simulated_tissue(300, seed=0)
    known = sf.datasets.simulated_tissue(300, seed=1)["table"]
    table = sdata["table"][:, :50].copy()
    sdata["table"] = table
    monkeypatch.setattr("spatiaflow.tl._imputation.MAX_SLOT", 3)
    with pytest.raises(ValueError, match="the SpatialData has an element called 'table'"):
        sf.tl.impute_genes(sdata, reference=known, key_added="table")
    for _ in range(2):  # its own table is written again
        sf.tl.impute_genes(sdata, reference=known, key_added="more")
    assert "std" in sdata["more"].layers and sdata["table"] is table


def test_genes_that_differ_by_case_alone_are_named(query, reference):
    data = query.copy()
    data.var_names = [name.lower() if i >= 15 else name for i, name in enumerate(data.var_names)]
    with pytest.warns(
        UserWarning, match="5 genes are spelled differently in different objects, such as .g15. and .G15."
    ):
        sf.tl.impute_genes(data, reference=reference)


def test_few_shallow_reference_cells(query):
    reference = cells("r", 200, seed=1)
    counts = np.random.default_rng(0).binomial(reference.X.toarray().astype(int), 0.03).astype(np.float32)
    reference.X = sparse.csr_matrix(counts)
    data = hidden(query)
    assert np.quantile(counts[:, : GENES - 5].sum(1), 0.25) <= 1  # the lowest quantile is the lowest value
    sf.tl.impute_genes(data, reference=reference)
    assert np.isfinite(data.obsm["imputed"]).all() and np.isfinite(data.obsm["imputed_std"]).all()


def test_nothing_is_imputed_in_cells_without_counts(query, reference):
    data = hidden(query)
    expected = sf.tl.impute_genes(data[3:].copy(), reference=reference, check=False, copy=True)
    counts = data.X.toarray()
    counts[:3] = 0
    data.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match="3 cells have no counts of the shared genes"):
        sf.tl.impute_genes(data, reference=reference, check=False)
    for slot in ("imputed", "imputed_std"):
        assert np.isnan(data.obsm[slot][:3]).all() and np.isfinite(data.obsm[slot][3:]).all()
    assert np.corrcoef(data.obsm["imputed"][3:].ravel(), expected.obsm["imputed"].ravel())[0, 1] > 0.99
