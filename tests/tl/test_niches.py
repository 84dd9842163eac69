import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

import spatiaflow as sf

SETTINGS = {"key_added": "found", "random_state": 0}


@pytest.fixture(scope="module")
def slides():
    """Two slides with three planted niches, as AnnData in µm, and what is found in both together."""
    tables = [sf.datasets.simulated_tissue(400, seed=seed)["table"] for seed in (1, 2)]
    out = [
        ad.AnnData(t.X.copy(), obs=t.obs[["niche"]].copy(), var=t.var[[]].copy(), obsm={"spatial": np.asarray(t.obsm["spatial"])})
        for t in tables
    ]  # fmt: skip
    with sf.settings.override(progress=False, verbosity="warning"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sf.tl.cluster_niches(out, mpp=1, max_clusters=5, **SETTINGS)
    return out


@pytest.fixture
def embedded():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [200, 120, 80])
    x = (rng.normal(size=(3, 8))[truth] * 2 + rng.normal(size=(400, 8))).astype(np.float32)
    order = rng.permutation(400)
    obs = pd.DataFrame({"truth": truth.astype(str)}, index=[f"c{i}" for i in range(400)])
    return ad.AnnData(obs=obs, obsm={"E": x})[order].copy()


def noise(n=500, n_genes=40):
    rng = np.random.default_rng(1)
    cells = ad.AnnData(sparse.csr_matrix(rng.poisson(1.0, (n, n_genes)).astype(np.float32)))
    cells.obsm["spatial"] = rng.uniform(0, 10 * n**0.5, (n, 2))
    return cells


def test_planted_niches_and_their_number_are_found(slides):
    for slide in slides:
        assert adjusted_rand_score(slide.obs["niche"], slide.obs["found"]) > 0.85
    assert slides[0].uns["found"]["params"]["n_clusters"] == 3
    counts = sum(slide.obs["found"].value_counts(sort=False) for slide in slides)
    assert list(counts.index) == ["0", "1", "2"] and (np.diff(counts) <= 0).all()  # the largest first
    stability = slides[0].uns["found"]["stability"]
    assert stability["n_clusters"].tolist() == [2, 3, 4, 5]
    assert stability["agreement"][1] == stability["agreement"][1:].max() > 0.7
    assert (stability["error"] >= 0).all()


def test_confidence_is_how_often_it_is_right(slides):
    both = pd.concat([slide.obs for slide in slides])
    named = both.groupby("found", observed=True)["niche"].transform(lambda s: s.mode()[0]).astype(str)
    right = named == both["niche"].astype(str)
    assert both["found_confidence"].between(0, 1).all()
    assert both["found_confidence"].mean() == pytest.approx(right.mean(), abs=0.05)
    assert both["found_confidence"][right].mean() > both["found_confidence"][~right].mean() + 0.1


def test_order_of_rows_genes_and_slides_does_not_matter(slides):
    rng = np.random.default_rng(0)
    moved = {
        name: slide[rng.permutation(400), rng.permutation(slide.n_vars)].copy()
        for name, slide in zip("ba", slides[::-1])
    }
    sf.tl.cluster_niches(moved, mpp=1, n_clusters=3, **SETTINGS)
    for slide, again in zip(slides[::-1], moved.values()):
        assert (again.obs["found"] == slide.obs["found"][again.obs_names]).mean() > 0.995


def test_slides_of_one_object_and_of_a_list_give_the_same(slides):
    whole = ad.concat({"a": slides[0], "b": slides[1]}, label="slide", index_unique="-")
    sf.tl.cluster_niches(whole, mpp=1, n_clusters=3, library_key="slide", **SETTINGS)
    apart = np.concatenate([slide.obs["found"].astype(str) for slide in slides])
    assert (whole.obs["found"].astype(str).to_numpy() == apart).mean() > 0.995


def test_niches_are_carried_to_another_slide(slides, tmp_path):
    slides[0].write_h5ad(tmp_path / "a.h5ad")
    stored = ad.read_h5ad(tmp_path / "a.h5ad")
    again = sf.tl.cluster_niches(slides[0], mpp=1, model=stored, copy=True, **SETTINGS)
    pd.testing.assert_series_equal(again.obs["found"], slides[0].obs["found"])
    table = sf.datasets.simulated_tissue(400, seed=3)["table"]
    fewer = table[:, :40].copy()
    for new in (table, fewer):
        sf.tl.cluster_niches(new, mpp=1, model=stored, **SETTINGS)
        assert adjusted_rand_score(new.obs["niche"], new.obs["found"]) > 0.8
        assert new.uns["found"]["params"]["carried"] and not new.uns["found"]["stability"]


def test_halves_of_a_slide_give_what_the_whole_gives():
    table = sf.datasets.simulated_tissue(1200, seed=4)["table"]
    sf.tl.cluster_niches(table, mpp=1, n_clusters=3, **SETTINGS)
    y = np.asarray(table.obsm["spatial"])[:, 1]
    halves = [table[y < np.median(y)].copy(), table[y >= np.median(y)].copy()]
    sf.tl.cluster_niches(halves, mpp=1, n_clusters=3, **SETTINGS)
    found = pd.concat([half.obs["found"] for half in halves])[table.obs_names]
    assert adjusted_rand_score(table.obs["found"], found) > 0.9


def test_the_radius_is_physical(slides):
    """Positions in pixels of half a µm, and their scale, give the niches of positions in µm."""
    pixels = slides[0].copy()
    pixels.obsm["spatial"] = pixels.obsm["spatial"] * 2
    for slide, mpp in ((pixels, 0.5), (micro := slides[0].copy(), 1.0)):
        sf.tl.cluster_niches(slide, mpp=mpp, n_clusters=3, key_added="again", random_state=0)
    assert pixels.uns["again"]["params"]["niche_um"] == pytest.approx(micro.uns["again"]["params"]["niche_um"])
    assert (pixels.obs["again"] == micro.obs["again"]).all()
    near = sf.tl.cluster_niches(micro, mpp=1, n_clusters=3, niche_um=2.0, copy=True, **SETTINGS)
    assert adjusted_rand_score(near.obs["niche"], near.obs["found"]) < adjusted_rand_score(
        micro.obs["niche"], micro.obs["again"]
    )


def said_of_samples(data, **options):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sf.tl.cluster_niches(data, mpp=1, random_state=0, **options)
    return [str(one.message) for one in found if "hardly mix" in str(one.message)]


def test_slides_of_one_tissue_mix_and_a_shifted_one_does_not(slides, tmp_path):
    """Shifted: the genes of the third slide are called by each other's names, so all its niches are its own."""
    shift = slides[0].uns["found"]["shift"]
    assert list(shift["samples"]) == ["0", "1"] and (shift["mixing"] > 0.5).all() and shift["separation"] > 0.5
    table = sf.datasets.simulated_tissue(1200, seed=4)["table"]
    y = np.asarray(table.obsm["spatial"])[:, 1]
    halves = {name: table[part].copy() for name, part in (("low", y < np.median(y)), ("high", y >= np.median(y)))}
    assert not said_of_samples(halves, n_clusters=3)
    assert (halves["low"].uns["niche"]["shift"]["mixing"] > 0.6).all()
    other = sf.datasets.simulated_tissue(600, seed=5)["table"].copy()
    other = ad.AnnData(
        other.X[:, np.random.default_rng(0).permutation(60)], obs=other.obs, var=other.var, obsm=other.obsm
    )
    (said,) = said_of_samples({**halves, "other": other}, n_clusters=5)
    assert "apart: 'other' (0." in said and "pl.composition" in said
    shift = halves["low"].uns["niche"]["shift"]
    assert list(shift["samples"]) == ["low", "high", "other"]
    assert shift["mixing"][2] < 0.2 < shift["mixing"][:2].min()
    halves["low"].write_h5ad(tmp_path / "a.h5ad")
    stored = ad.read_h5ad(tmp_path / "a.h5ad").uns["niche"]["shift"]
    np.testing.assert_array_equal(stored["mixing"], shift["mixing"])


def test_a_new_sample_is_compared_with_those_of_the_model(slides):
    new, alone = sf.datasets.simulated_tissue(400, seed=3)["table"], slides[0].copy()
    assert not said_of_samples(new, model=slides[0], key_added="found")
    assert new.uns["found"]["shift"]["mixing"].shape == (1,) and new.uns["found"]["shift"]["mixing"][0] > 0.5
    wrong = ad.AnnData(new.X[:, ::-1].copy(), obs=new.obs[[]], var=new.var[[]], obsm=dict(new.obsm))
    assert said_of_samples(wrong, model=slides[0], key_added="found")
    sf.tl.cluster_niches(alone, mpp=1, n_clusters=3, random_state=0, key_added="alone")
    assert list(alone.uns["alone"]["shift"]) == ["separation"]


def test_slides_of_one_object_are_samples(slides):
    whole = ad.concat({"a": slides[0], "b": slides[1]}, label="slide", index_unique="-")
    sf.tl.cluster_niches(whole, mpp=1, n_clusters=3, library_key="slide", **SETTINGS)
    shift = whole.uns["found"]["shift"]
    assert list(shift["samples"]) == ["a", "b"]
    np.testing.assert_allclose(shift["mixing"], slides[0].uns["found"]["shift"]["mixing"], atol=0.02)


def test_no_structure_is_said_to_be_unstable():
    with pytest.warns(UserWarning, match="no number of niches is stable.*niche_stability"):
        sf.tl.cluster_niches(noise(), mpp=1, max_clusters=4)


@pytest.mark.parametrize(
    ("agreement", "chosen", "said"),
    [
        ({2: 0.95, 3: 0.6, 4: 0.5}, 3, "far better on 2 niches .*parts of two"),
        ({2: 0.2, 3: 0.6, 4: 0.58}, 3, r"nearly as stable: 4 \(0.58\)"),
        ({2: 0.2, 3: 0.6, 4: 0.9}, 4, "4 niches, the largest number tried.*max_clusters="),
        ({2: 0.9, 3: 0.9, 4: 0.5}, 3, None),
    ],
)
def test_a_doubtful_number_warns(agreement, chosen, said):
    from spatiaflow.tl._niches import _warn_of

    splits = {n: np.full(6, value) for n, value in agreement.items()}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _warn_of(splits, chosen, 4)
    assert len(found) == (said is not None)
    if said:
        with pytest.warns(UserWarning, match=said):
            _warn_of(splits, chosen, 4)


def test_an_embedding_is_clustered_by_itself(embedded):
    sf.tl.cluster_niches(embedded, use_rep="E", n_clusters=3)
    assert adjusted_rand_score(embedded.obs["truth"], embedded.obs["niche"]) > 0.9
    parts = {"one": embedded[:150].copy(), "two": embedded[150:].copy()}
    assert sf.tl.cluster_niches(parts, use_rep="E", n_clusters=3) is None
    found = np.concatenate([part.obs["niche"].astype(str) for part in parts.values()])
    assert (found == embedded.obs["niche"].astype(str).to_numpy()).all()
    with pytest.warns(UserWarning, match=r"nothing tells whether obsm\['E'\] of data was computed as that of model"):
        carried = sf.tl.cluster_niches(parts["one"], use_rep="E", model=embedded, copy=True)
    assert (carried.obs["niche"] == parts["one"].obs["niche"]).all()
    copies = sf.tl.cluster_niches(list(parts.values()), use_rep="E", n_clusters=2, key_added="two", copy=True)
    assert [one.n_obs for one in copies] == [150, 250] and "two" not in parts["one"].obs


def test_niches_of_an_embedding_are_carried_by_that_embedding_alone(embedded):
    sf.tl.cluster_niches(embedded, use_rep="E", n_clusters=3)
    other = embedded.copy()
    other.obsm["F"], other.obsm["E"] = other.obsm["E"], other.obsm["E"][:, :5]
    with pytest.raises(ValueError, match=r"model holds niches of obsm\['E'\], not of 'F'"):
        sf.tl.cluster_niches(other, use_rep="F", model=embedded)
    with pytest.raises(ValueError, match="has 8 and 5 columns"):
        sf.tl.cluster_niches(other, use_rep="E", model=embedded)


def test_cells_without_counts_do_not_move_the_niches_of_others():
    tables = [sf.datasets.simulated_tissue(300, seed=seed)["table"] for seed in (0, 1, 2)]
    counts = tables[0].X.tolil()
    counts[::10] = 0
    tables[0].X = counts.tocsr()
    sf.tl.cluster_niches(tables, n_clusters=3, mpp=1, **SETTINGS)
    assert min(adjusted_rand_score(table.obs["niche"], table.obs["found"]) for table in tables) > 0.8


def test_slides_on_one_array_are_found_in_any_order():
    one, other = (noise(300) for _ in range(2))
    other.X = sparse.csr_matrix(np.random.default_rng(5).poisson(1.0, other.shape).astype(np.float32))
    pairs = [[one.copy(), other.copy()], [other.copy(), one.copy()]]
    for pair in pairs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sf.tl.cluster_niches(pair, n_clusters=3, mpp=1, **SETTINGS)
    np.testing.assert_array_equal(pairs[0][0].obs["found"], pairs[1][1].obs["found"])


def test_a_small_panel_in_the_list_changes_no_other_sample(slides):
    carry = {"model": slides[0], "mpp": 1, "key_added": "found"}
    alone, beside, small = slides[1].copy(), slides[1].copy(), slides[1][:, ::2].copy()
    sf.tl.cluster_niches(alone, **carry)
    with pytest.warns(
        UserWarning, match="var_names of objects 'small' hold 50% of the 60 genes of the niches of model"
    ):
        sf.tl.cluster_niches({"whole": beside, "small": small}, **carry)
    pd.testing.assert_series_equal(beside.obs["found_confidence"], alone.obs["found_confidence"])
    assert (beside.obs["found"] == alone.obs["found"]).all()
    with pytest.raises(ValueError, match="15 of the 60 genes") as caught:
        sf.tl.cluster_niches([alone, slides[1][:, :15].copy()], **carry)
    assert caught.value.__notes__ == ["This is object '1' of data."]


def test_clear_errors(slides, embedded):
    with pytest.raises(ValueError, match="an embedding has none: give n_clusters="):
        sf.tl.cluster_niches(embedded, use_rep="E")
    with pytest.raises(KeyError, match="embed_spatia"):
        sf.tl.cluster_niches(embedded, use_rep="X_nothing", n_clusters=2)
    with pytest.raises(ValueError, match="share 0 genes.*use_rep="):
        sf.tl.cluster_niches(embedded)
    with pytest.raises(ValueError, match="n_clusters must be a whole number"):
        sf.tl.cluster_niches(slides[0], n_clusters=2.5)
    with pytest.raises(ValueError, match="max_clusters must be at least 3"):
        sf.tl.cluster_niches(slides[0], max_clusters=2)
    with pytest.raises(ValueError, match="too few cells"):
        sf.tl.cluster_niches(slides[0][:5].copy(), mpp=1, n_clusters=3)
    with pytest.raises(KeyError, match="has no niches under 'niche'"):
        sf.tl.cluster_niches(slides[0], mpp=1, model=slides[1])
    with pytest.raises(KeyError, match="under 'other'. It has niches under 'found': pass key_added='found'"):
        sf.tl.cluster_niches(slides[1], mpp=1, model=slides[0], key_added="other")
    with pytest.raises(ValueError, match="leave out use_rep="):
        sf.tl.cluster_niches(embedded, use_rep="E", model=slides[0], key_added="found")
    with pytest.raises(ValueError, match="15 of the 60 genes of the niches of model"):
        sf.tl.cluster_niches(slides[1][:, :15].copy(), mpp=1, model=slides[0], key_added="found")
    with pytest.raises(ValueError, match="which niche_um= cannot change"):
        sf.tl.cluster_niches(slides[1], mpp=1, model=slides[0], key_added="found", niche_um=200)


def test_niches_of_the_public_mice_are_their_layers(mirror):
    """All mice jointly, gold layers; pixels of .08 µm (docs/levels.md)."""
    with sf.settings.override(mirror=str(mirror)):
        mice = sf.datasets.starmap_mpfc()
    sf.tl.cluster_niches(mice, library_key="mouse", mpp=0.08, n_clusters=4)
    score = [adjusted_rand_score(one["layer"], one["niche"]) for _, one in mice.obs.groupby("mouse", observed=True)]
    assert np.mean(score) > 0.83
    assert mice.uns["niche"]["params"]["niche_um"] == pytest.approx(40, abs=2)
