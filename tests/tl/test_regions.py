"""Regions: their means are those of the draws, differences share the slide, and what is not trusted says so."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import spatiaflow as sf


@pytest.fixture
def test(slide):
    """A slide with three regions, spots without one, an unused category, and glass."""
    adata = slide("t", n=10, seed=7)
    x = adata.obsm["spatial"][:, 0]
    names = np.select([x > 2500, x > 1200], ["stroma", "tumour"], "fat").astype(object)
    names[::17] = None
    adata.obs["region"] = pd.Categorical(names, ["tumour", "stroma", "fat", "nerve"])
    adata.obs["tissue"] = np.where(np.arange(100) % 13, 1.0, 0.0)
    return adata


def by_hand(draws, rows, weights=None):
    """Mean of some rows in each draw, draws x genes (or one set)."""
    means = np.nanmean(sf.get.draws(draws)[:, rows].astype(float), 1)
    return means if weights is None else means[:, weights].mean(1)


def test_means_and_differences_are_those_of_the_draws(quick, test):
    options = {"model": quick, "n_samples": 40, "random_state": 2}
    before = test.copy()
    draws = sf.tl.sample_expression(test, **options)
    found = sf.tl.summarize_expression(test, groupby="region", level=0.8, **options)
    assert list(found["region"].unique()) == ["tumour", "stroma", "fat"]
    assert list(found["gene"][:12]) == quick.genes
    for region, part in found.groupby("region"):
        rows = np.flatnonzero(test.obs["region"] == region)
        means = by_hand(draws, rows)
        np.testing.assert_allclose(part["mean"], means.mean(0), atol=1e-5)
        np.testing.assert_allclose(part["std"], means.std(0, ddof=1), atol=1e-5)
        np.testing.assert_allclose(part[["lower", "upper"]].T, np.quantile(means, [0.1, 0.9], axis=0), atol=1e-5)
        assert (part["n_spots"] == np.isfinite(draws.X[rows, 0]).sum()).all()
    sets = {"few": ["G1", "G7", "G3"], "one": ["G2"]}
    found = sf.tl.summarize_expression(
        test, groupby="region", gene_sets=sets, contrast=("tumour", "fat"), level=0.8, **options
    )
    assert found["region"].tolist() == ["tumour - fat"] * 2 and found["gene_set"].tolist() == ["few", "one"]
    for (_, row), genes in zip(found.iterrows(), sets.values()):
        columns = draws.var_names.get_indexer(genes)
        tumour, fat = (
            by_hand(draws, np.flatnonzero(test.obs["region"] == name), columns) for name in ("tumour", "fat")
        )
        np.testing.assert_allclose(
            [row["mean"], row["lower"], row["upper"]], [(tumour - fat).mean(), *np.quantile(tumour - fat, [0.1, 0.9])],
            atol=1e-5,
        )  # fmt: skip
    assert test.obs.equals(before.obs) and set(test.obsm) == set(before.obsm) and set(test.uns) == set(before.uns)


def test_the_effect_of_the_donor_cancels_within_a_slide(quick, test):
    options = {"model": quick, "groupby": "region", "n_samples": 200}
    means = sf.tl.summarize_expression(test, **options).pivot(index="gene", columns="region", values="std")
    difference = sf.tl.summarize_expression(test, contrast=("tumour", "stroma"), **options).set_index("gene")["std"]
    independent = np.sqrt(means["tumour"] ** 2 + means["stroma"] ** 2)
    assert (difference < 0.6 * independent[difference.index]).all()


def test_a_region_on_glass_is_named_and_sets_say_of_how_many_genes(quick, test):
    test.obs["tissue"] = np.where(test.obs["region"] == "fat", 0.0, 1.0)
    with pytest.warns(UserWarning, match=r"obs\['region'\]: 'fat' have no spot on tissue"):
        found = sf.tl.summarize_expression(test, model=quick, groupby="region", n_samples=20)
    assert list(found["region"].unique()) == ["tumour", "stroma"]
    assert (found["n_genes"] == 1).all()
    sets = {"two": quick.genes[:2], "half": [quick.genes[0], "not a gene"]}
    with pytest.warns(UserWarning, match="1 of 4 genes are not predicted"):
        found = sf.tl.summarize_expression(
            test, model=quick, groupby="region", gene_sets=sets, contrast=("tumour", "stroma")
        )
    assert found.set_index("gene_set")["n_genes"].to_dict() == {"two": 2, "half": 1}


def test_a_region_is_pooled_over_slides_by_spots(quick, slide):
    both = ad.concat([slide("a", n=8, seed=7), slide("b", n=5, seed=8)], uns_merge="first", label="slide")
    both.obs["region"] = np.where(np.arange(89) % 3, "x", "y")
    options = {"model": quick, "n_samples": 20, "library_key": "slide", "mpp": 0.5}
    draws = sf.tl.sample_expression(both, **options)
    found = sf.tl.summarize_expression(both, groupby="region", **options)
    for region, part in found.groupby("region"):
        means = by_hand(draws, np.flatnonzero(both.obs["region"] == region))
        np.testing.assert_allclose(part[["mean", "std"]].T, [means.mean(0), means.std(0, ddof=1)], atol=1e-5)


@pytest.mark.filterwarnings("ignore:data differ")
def test_what_is_trusted(quick, test, monkeypatch):
    trusted = np.isin(quick.genes, ["G0", "G1"])
    monkeypatch.setattr(quick, "trusted", lambda new_donor: trusted)
    sets = {"most": ["G0", "G1", "G7"], "half": ["G0", "G7"]}
    options = {"model": quick, "groupby": "region", "n_samples": 20}
    found = sf.tl.summarize_expression(test, gene_sets=sets, **options)
    assert found["trusted"].tolist() == [True, False] * 3
    fat = (test.obs["region"] == "fat").to_numpy()
    test.obsm["X_texture"][fat] *= 30  # far from anything in training
    found = sf.tl.summarize_expression(test, **options)
    assert set(found.loc[found["trusted"], "gene"]) == {"G0", "G1"}
    assert set(found.loc[found["trusted"], "region"]) == {"tumour", "stroma"}
    found = sf.tl.summarize_expression(test, contrast=("tumour", "fat"), **options)
    assert not found["trusted"].any()


def test_samples_have_a_column_and_are_as_alone(quick, test, slide):
    other = slide("u", n=6, seed=8)
    other.obs["region"] = "stroma"
    options = {"model": quick, "groupby": "region", "n_samples": 20}
    found = sf.tl.summarize_expression({"one": test, "two": other}, **options)
    assert found.groupby("sample")["region"].unique().map(list).to_dict() == {
        "one": ["tumour", "stroma", "fat"],
        "two": ["stroma"],
    }
    alone = sf.tl.summarize_expression(test, **options)
    pd.testing.assert_frame_equal(found[found["sample"] == "one"].drop(columns="sample"), alone)
    assert alone["donor_effect"].unique().tolist() == ["prior, not learned"]
    assert alone["depth"].unique().tolist() == [quick.usual_depth]
    with pytest.warns(UserWarning, match="1 samples lack a region of the contrast .*'1' 'tumour'"):
        found = sf.tl.summarize_expression([test, other], contrast=("tumour", "stroma"), **options)
    assert found["sample"].unique().tolist() == ["0"]


def test_sets_from_a_file_and_genes_that_are_not_predicted(quick, test, tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("first\thttp://x\tG0\tG1\tG0\tFOXP3\nsecond\t\tG5\tCD4\tCD8A\n")
    options = {"model": quick, "groupby": "region", "n_samples": 20}
    with pytest.warns(UserWarning, match="3 of 6 genes are not predicted .*'second', of which 1 of 3 remain"):
        found = sf.tl.summarize_expression(test, gene_sets=path, **options)
    assert found["gene_set"].unique().tolist() == ["first", "second"]
    right = sf.tl.summarize_expression(test, gene_sets={"a": ["G0", "G1"], "b": ["G5"]}, **options)
    np.testing.assert_array_equal(found["mean"], right["mean"])
    path.write_text("first\tG0\n")
    with pytest.raises(ValueError, match="no GMT file: line 1"):
        sf.tl.summarize_expression(test, gene_sets=path, **options)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [({"contrast": ("tumour", "nope")}, KeyError, "no 'nope'; it has 'tumour', 'stroma', 'fat'"),
     ({"contrast": "tumour"}, ValueError, "must name two regions"), ({"contrast": ("fat", "fat")}, ValueError, "'fat' twice"),
     ({"contrast": ("tumour", "nerve")}, KeyError, "no 'nerve'"), ({"groupby": "nope"}, KeyError, "obs has no 'nope'"),
     ({"groupby": "empty"}, ValueError, "no spot on tissue in any region"),
     ({"gene_sets": {"a": ["CD4"]}}, ValueError, r"gene_sets\['a'\]: the model predicts none of its 1 genes"),
     ({"gene_sets": {}}, ValueError, "gene_sets is empty"), ({"gene_sets": ["G0"]}, ValueError, "must be a dict"),
     ({"gene_sets": {3: ["G0"]}}, ValueError, "must be a name"), ({"gene_sets": {"a": []}}, ValueError, "is empty"),
     ({"gene_sets": "nope.gmt"}, FileNotFoundError, "there is no file 'nope.gmt'"),
     ({"level": 1.0}, ValueError, "level must lie"), ({"level": "x"}, ValueError, "level must be"),
     ({"n_samples": 19}, ValueError, "too few for level=0.9; 20 or more")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(quick, test, bad, error, match):
    test.obs["empty"] = pd.Categorical([None] * 100, ["a"])
    with pytest.raises(error, match=match):
        sf.tl.summarize_expression(test, model=quick, **{"groupby": "region", "n_samples": 20} | bad)
