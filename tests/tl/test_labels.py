import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import f1_score

import spatiaflow as sf


def annotate(*data, **options):
    """By the embedding alone."""
    return sf.tl.annotate(*data, **{"use_rep": "X_spatia"} | options)


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [200, 120, 80])
    x = rng.normal(size=(3, 8))[truth] * 2 + rng.normal(size=(400, 8))
    order = rng.permutation(400)
    adata = ad.AnnData(
        obs=pd.DataFrame({"truth": np.array(["a", "b", "c"])[truth]}, index=[f"c{i}" for i in range(400)])
    )
    adata.obsm["X_spatia"] = adata.obsm["X_spatia_niche"] = x.astype(np.float32)
    return adata[order].copy()


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_labels_are_carried_and_given_ones_kept(cells, method):
    partly = cells.obs["truth"].where(np.arange(400) < 150)
    partly.iloc[0] = "b" if partly.iloc[0] != "b" else "a"  # a wrong label is still what the user gave
    cells.obs["partly"] = pd.Categorical(partly)
    annotate(cells, labels="partly", method=method)
    found = cells.obs["annotation"]
    assert (found[:150].astype(str) == partly[:150]).all()
    assert (cells.obs["annotation_confidence"][:150] == 1).all()
    assert (found[150:].astype(str) == cells.obs["truth"][150:]).mean() > 0.85
    assert list(found.cat.categories) == ["a", "b", "c", "unknown"]


def test_confidence_is_how_often_it_is_right(cells):
    rng = np.random.default_rng(2)
    noisy = cells.obsm["X_spatia"] + rng.normal(0, 2.0, (400, 8))  # hard: the classes overlap
    cells.obsm["X_spatia"] = noisy.astype(np.float32)
    annotate(cells[200:].copy(), labels="truth")
    test = cells[200:].copy()
    annotate(test, labels="truth", reference=cells[:200].copy(), threshold=0.0)
    right = (test.obs["annotation"].astype(str) == test.obs["truth"]).mean()
    assert test.obs["annotation_confidence"].mean() == pytest.approx(right, abs=0.08)
    assert test.uns["annotation"]["held_out_accuracy"] == pytest.approx(right, abs=0.08)


def test_below_the_threshold_it_is_unknown(cells):
    reference, rest = cells[:300].copy(), cells[300:].copy()
    rest.obsm["X_spatia"][:20] = 0.0  # between the classes
    annotate(rest, labels="truth", reference=reference, threshold=0.95)
    low = rest.obs["annotation_confidence"] < 0.95
    assert (rest.obs["annotation"][low] == "unknown").all()
    assert (rest.obs["annotation"][~low] != "unknown").all()
    assert low.any()


def test_clear_errors(cells):
    with pytest.raises(KeyError, match="embed_spatia"):
        annotate(cells, labels="truth", use_rep="X_nothing")
    with pytest.raises(KeyError, match="obs has no 'typo'"):
        annotate(cells, labels="typo")
    cells.obs["one"] = "a"
    with pytest.raises(ValueError, match="at least two"):
        annotate(cells, labels="one")
    cells.uns["X_spatia"] = {"params": {"model_sha256": "x"}}
    other = cells.copy()
    other.uns["X_spatia"] = {"params": {"model_sha256": "y"}}
    with pytest.raises(ValueError, match="different models"):
        annotate(cells, labels="truth", reference=other)


def test_what_cannot_be_a_label_or_an_embedding(cells):
    cells.obs["text"] = np.where(
        np.arange(400) < 150, cells.obs["truth"], "nan"
    )  # what astype(str) makes of missing values
    annotate(cells, labels="text")
    assert list(cells.obs["annotation"].cat.categories) == ["a", "b", "c", "unknown"]
    cells.obs["number"] = np.random.default_rng(0).random(400)
    with pytest.raises(ValueError, match="numbers are no classes"):
        annotate(cells, labels="number")
    cells.obs["two"] = pd.Categorical(np.r_[["a", "b"], [None] * 398])
    with pytest.raises(ValueError, match="two cells a class"):
        annotate(cells, labels="two")
    with pytest.raises(ValueError, match="threshold must be a number between 0 and 1"):
        annotate(cells, labels="truth", threshold=5)
    other = cells.copy()
    other.obsm["X_spatia"] = other.obsm["X_spatia"][:, :5]
    with pytest.raises(ValueError, match="of data and the reference has 8 and 5 columns"):
        annotate(cells, labels="truth", reference=other)
    for adata, levels in ((cells, ["cell", "niche"]), (other, ["niche", "cell"])):
        adata.uns["X_spatia"] = {"params": {"model_sha256": "1", "levels": levels}}
    with pytest.raises(ValueError, match="of other levels"):
        annotate(cells, labels="truth", reference=other)


def test_labels_of_a_list_are_pooled(cells):
    first, second, third = cells[:150].copy(), cells[150:300].copy(), cells[300:].copy()
    first.obs["known"] = first.obs["truth"].where(first.obs["truth"] != "c")
    second.obs["known"] = second.obs["truth"].where(second.obs["truth"] == "c")  # "c" is labelled on this slide alone
    annotate([first, second, third], labels="known", threshold=0.0)
    for part in (first, second, third):
        assert list(part.obs["annotation"].cat.categories) == ["a", "b", "c", "unknown"]
        assert (part.obs["annotation"].astype(str) == part.obs["truth"]).mean() > 0.8
    by_reference = annotate(third, labels="known", reference=[first, second], threshold=0.0, copy=True)
    assert (by_reference.obs["annotation"] == third.obs["annotation"]).mean() > 0.95
    second.uns["X_spatia"], first.uns["X_spatia"] = ({"params": {"model_sha256": x}} for x in "xy")
    with pytest.raises(ValueError, match="the objects of data was made by different models"):
        annotate([first, second], labels="known")


@pytest.mark.parametrize("name", ["Unknown", "NA", "n/a", "Unassigned", "unlabeled", " ", "-1"])
def test_cells_without_a_label_have_it_filled_in_whatever_they_are_called(cells, name):
    cells.obs["known"] = cells.obs["truth"].where(np.arange(400) < 200)
    expected = annotate(cells, labels="known", copy=True)
    cells.obs["known"] = cells.obs["known"].fillna(name)
    annotate(cells, labels="known")
    assert (cells.obs["annotation"] == expected.obs["annotation"]).all()
    assert cells.uns["annotation"]["classes"].tolist() == ["a", "b", "c"]


def test_none_is_the_name_of_a_class(cells):
    cells.obs["state"] = cells.obs["truth"].replace("a", "none")
    annotate(cells, labels="state")
    assert cells.uns["annotation"]["classes"].tolist() == ["b", "c", "none"]


@pytest.mark.parametrize("differs", [{"modalities": ["genes"]}, {"scaling": "training"}])
def test_embeddings_that_the_same_model_made_otherwise_are_refused(cells, differs):
    other = cells.copy()
    made = {"model_sha256": "1", "levels": ["cell"], "modalities": ["genes", "image"], "scaling": "slide"}
    for adata, params in ((cells, made), (other, made | differs)):
        adata.uns["X_spatia"] = {"params": params}
    with pytest.raises(ValueError, match="modalities or scaling"):
        annotate(cells, labels="truth", reference=other)
    with pytest.raises(ValueError, match="modalities or scaling"):
        sf.tl.cluster_niches([cells, other], use_rep="X_spatia", n_clusters=2)


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_genes_tell_types_that_the_embedding_does_not(method):
    """Genes are standardised slide by slide: capture that differs between data and reference does no harm."""
    first, second = (sf.datasets.simulated_tissue(300, seed=seed)["table"] for seed in (1, 2))
    second.X = second.X.multiply(np.random.default_rng(0).choice([1, 3], second.n_vars)).tocsr().astype(np.float32)
    for table in (first, second):
        table.obsm["X_spatia"] = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    both = sf.tl.annotate(second, labels="cell_type", reference=first, threshold=0.0, method=method, copy=True)
    genes = sf.tl.annotate(
        second, labels="cell_type", reference=first, threshold=0.0, method=method, use_rep="X", copy=True
    )
    blind = annotate(second, labels="cell_type", reference=first, threshold=0.0, method=method, copy=True)
    right = [
        (one.obs["annotation"].astype(str) == one.obs["cell_type"].astype(str)).mean() for one in (both, genes, blind)
    ]
    assert min(right[:2]) > 0.8 > right[2] + 0.2
    with pytest.raises(ValueError, match="share 0 genes.*give use_rep="):
        sf.tl.annotate(second[:, :0].copy(), labels="cell_type", reference=first)


def test_types_of_the_public_mice_by_their_genes(mirror):
    """Two mice label the third (macro-F1 .761 by logistic regression on all genes)."""
    with sf.settings.override(mirror=str(mirror)):
        mice = sf.datasets.starmap_mpfc()
    score = []
    for mouse in mice.obs["mouse"].cat.categories:
        test, others = (mice[which].copy() for which in (mice.obs["mouse"] == mouse, mice.obs["mouse"] != mouse))
        sf.tl.annotate(test, labels="cell_type", reference=others, library_key="mouse", use_rep="X", threshold=0.0)
        score.append(f1_score(test.obs["cell_type"].astype(str), test.obs["annotation"].astype(str), average="macro"))
    assert np.mean(score) >= 0.755, score


@pytest.fixture(scope="module")
def types():
    """Labelled cells of a slide, and another slide."""
    return [sf.datasets.simulated_tissue(n, seed=seed)["table"] for n, seed in ((600, 0), (900, 1))]


def share_right(table):
    return (table.obs["annotation"].astype(str) == table.obs["cell_type"].astype(str)).mean()


def test_cells_of_one_type_alone_are_told_by_the_reference(types):
    known, other = types
    sorted_cells = other[other.obs["cell_type"] == "epithelial"].copy()
    with pytest.warns(UserWarning, match="get another label when genes are standardised by the labelled slides"):
        sf.tl.annotate(sorted_cells, labels="cell_type", reference=known, use_rep="X")
    assert share_right(sorted_cells) < 0.6  # what the warning is about
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.tl.annotate(sorted_cells, labels="cell_type", reference=known, use_rep="X", scaling="reference")
        assert share_right(sorted_cells) > 0.95
        whole = other.copy()
        sf.tl.annotate(whole, labels="cell_type", reference=known, use_rep="X")
    assert share_right(whole) > 0.95


def test_by_the_reference_a_cell_does_not_depend_on_the_others(types):
    known, other = types
    options = {"labels": "cell_type", "reference": known, "use_rep": "X", "scaling": "reference"}
    whole = sf.tl.annotate(other, **options, copy=True)
    one = sf.tl.annotate(other[:1].copy(), **options, copy=True)
    assert one.obs["annotation"].iloc[0] == whole.obs["annotation"].iloc[0]
    assert one.obs["annotation_confidence"].iloc[0] == pytest.approx(
        whole.obs["annotation_confidence"].iloc[0], abs=1e-3
    )


def test_cells_without_counts_are_unknown_and_shallow_ones_a_warning(types):
    known, other = (table.copy() for table in types)
    counts = other.X.tolil()
    counts[:50] = 0
    other.X = counts.tocsr()
    with pytest.warns(UserWarning, match="50 cells have no counts"):
        sf.tl.annotate(other, labels="cell_type", reference=known, use_rep="X", threshold=0)
    assert (other.obs["annotation"][:50] == "unknown").all() and (other.obs["annotation_confidence"][:50] == 0).all()
    assert share_right(other[50:]) > 0.95
    other.obs["some"] = other.obs["cell_type"].where(np.arange(other.n_obs) < 300)
    with pytest.warns(UserWarning, match="50 cells have no counts"):
        sf.tl.annotate(other, labels="some", use_rep="X")
    assert share_right(other[:300]) == 1 and share_right(other[300:]) > 0.95  # a label that was given stays
    rng = np.random.default_rng(0)
    shallow = types[1].copy()
    shallow.X = sparse.csr_matrix(rng.binomial(shallow.X.toarray().astype(int), 0.15).astype(np.float32))
    with pytest.warns(UserWarning, match="fewer counts than 99% of the labelled cells"):
        sf.tl.annotate(shallow, labels="cell_type", reference=known, use_rep="X")


def test_labels_that_missing_values_made_floats_are_those_of_integers(types):
    one, other = (table.copy() for table in types)
    for table in (one, other):
        table.obs["k"] = table.obs["cell_type"].cat.codes.astype(int)
    other.obs["k"] = other.obs["k"].astype(float).where(np.arange(other.n_obs) < 300)
    sf.tl.annotate([one, other], labels="k", use_rep="X")
    assert other.uns["annotation"]["classes"].tolist() == ["0", "1", "2", "3"]
    assert other.uns["annotation"]["held_out_accuracy"] > 0.9


def test_the_order_of_labelled_cells_does_not_matter(types):
    known, other = types
    known = known[:150].copy()  # few, so that folds matter
    expected = sf.tl.annotate(other, labels="cell_type", reference=known, use_rep="X", copy=True)
    for seed in range(3):
        mixed = known[np.random.default_rng(seed).permutation(known.n_obs)].copy()
        found = sf.tl.annotate(other, labels="cell_type", reference=mixed, use_rep="X", copy=True)
        assert (found.obs["annotation"] == expected.obs["annotation"]).all()
        change = found.obs["annotation_confidence"] - expected.obs["annotation_confidence"]
        assert abs(change).max() < 1e-3
        assert found.uns["annotation"]["params"]["temperature"] == expected.uns["annotation"]["params"]["temperature"]


def test_counts_of_the_reference_may_be_in_another_layer(types):
    known, other = types
    expected = sf.tl.annotate(other, labels="cell_type", reference=known, use_rep="X", copy=True)
    layered = known.copy()
    layered.layers["counts"], layered.X = layered.X, layered.X * np.float32(0.3)
    found = sf.tl.annotate(
        other, labels="cell_type", reference=layered, reference_layer="counts", use_rep="X", copy=True
    )
    pd.testing.assert_frame_equal(found.obs, expected.obs)
