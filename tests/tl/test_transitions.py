import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

import spatiaflow as sf
from _pairs import paired, tissue


def test_slots(tmp_path):
    adata, _ = tissue(60, 80, niches=2)
    before = adata.X.copy()
    found = paired(adata, niche_key="niche", top_k=10)
    assert list(found.columns) == ["source", "target", "transition", "niche", "confidence"]
    state, niche = adata.obs["state"], adata.obs["niche"]
    assert (state[found["source"]] == "A").all() and (state[found["target"]] == "B").all()
    assert (niche[found["source"]].to_numpy() == niche[found["target"]].to_numpy()).all()
    assert (niche[found["source"]].to_numpy() == found["niche"]).all()
    assert set(found["source"]) == set(adata.obs_names[state == "A"]) and found["confidence"].between(0, 1).all()
    plan = adata.obsp["transition_plan"]
    assert plan.dtype == np.float32 and np.diff(plan.indptr).max() <= 10
    problems = adata.uns["transition_plan"]["problems"]
    rows = adata.obs_names.get_indexer(found["source"])
    mass = np.asarray(plan.sum(1)).ravel()
    assert (mass[rows] > 0).all() and mass[state == "B"].sum() == 0
    for niche, one in problems.set_index("niche").iterrows():
        here = rows[(found["niche"] == niche).to_numpy()]
        assert len(here) == one["n_source"]
        np.testing.assert_allclose(mass[here].mean(), one["mass"] * (1 - one["dropped"]), atol=0.02)
    for source, target in zip(found["source"], found["target"]):
        assert plan[adata.obs_names.get_loc(source), adata.obs_names.get_loc(target)] > 0
    assert (before != adata.X).nnz == 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(again.uns["transitions"], found, check_dtype=False)
    copy = sf.tl.pair_transitions(
        again,
        transitions=[("A", "B")],
        groupby="state",
        niche_key="niche",
        config=sf.models.PairingConfig(top_k=10),
        copy=True,
    )
    pd.testing.assert_frame_equal(copy.uns["transitions"], found)  # seeded


@pytest.mark.parametrize("pairs", ["sample", "argmax"])
def test_planted_matching_is_recovered(pairs):
    """Each cell of B is a cell of A after the shift: its pair lies within a fifth of the distance of two random cells."""
    adata, latent = tissue(400, 400, same=True, depth=20000)
    found = paired(adata, unbalanced=None, epsilon=0.005, pairs=pairs)
    names = adata.obs_names
    apart = latent[names.get_indexer(found["source"])] - latent[names.get_indexer(found["target"])]
    tolerance = 0.2 * np.sqrt(2 * 6)
    assert (np.linalg.norm(apart, axis=1) < tolerance).mean() >= 0.95
    problems = adata.uns["transition_plan"]["problems"]
    assert problems["marginal_error"].max() <= 1e-3


def test_confidence_does_not_depend_on_the_size_of_the_group():
    """Groups of 20 to 2,000, equal and not, drawn from one population: in one table, so that they share components."""
    sizes = [(20, 20), (20, 600), (600, 20), (100, 100), (600, 600), (2000, 2000)]
    parts = [tissue(n, m, seed=i)[0] for i, (n, m) in enumerate(sizes)]
    parts += [tissue(20, 20, seed=10 + i)[0] for i in range(5)]  # so small that one alone says little
    for i, part in enumerate(parts):
        part.obs["niche"] = str(min(i, len(sizes))) if i else str(len(sizes))
    adata = ad.concat(parts, index_unique="-")
    adata.obs["group"] = np.repeat([str(i) for i in range(len(parts))], [part.n_obs for part in parts])
    found = paired(adata, niche_key="group")
    mean = found.groupby("niche")["confidence"].mean()
    small = mean[["0", *map(str, range(len(sizes), len(parts)))]].mean()
    values = np.array([small, *mean[[str(i) for i in range(1, len(sizes))]]])
    assert np.ptp(values) <= 0.05, values


def test_confidence_ranks_those_without_a_counterpart_below():
    adata, _ = tissue(500, 500, unmatched=0.15)
    auc = {}
    for confidence in ("mass", "entropy", "peak"):
        found = paired(adata, confidence=confidence)
        alone = adata.obs["alone"].loc[found["source"]].to_numpy()
        auc[confidence] = roc_auc_score(~alone, found["confidence"])
    assert auc["mass"] >= 0.9 and auc["mass"] > max(auc["entropy"], auc["peak"])


def test_confidence_is_judged_alike_however_pairs_are_drawn():
    """A balanced plan gives every source its whole mass, and could not tell those without a counterpart."""
    adata, _ = tissue(200, 200, unmatched=0.15)
    drawn, balanced = (paired(adata, unbalanced=unbalanced) for unbalanced in (0.5, None))
    np.testing.assert_allclose(balanced["confidence"], drawn["confidence"])
    alone = adata.obs["alone"].loc[balanced["source"]].to_numpy()
    assert roc_auc_score(~alone, balanced["confidence"]) >= 0.9


def test_confidence_falls_with_noise():
    """Noise of measurement makes matches of two halves disagree; what is the cells' own costs mass."""
    by_depth = [paired(tissue(300, 300, depth=depth)[0])["confidence"].mean() for depth in (300, 100, 30, 10)]
    assert (np.diff(by_depth) < -0.01).all() and by_depth[-1] < 0.6 * by_depth[0], by_depth
    by_noise = [paired(tissue(300, 300, noise=noise)[0])["confidence"].mean() for noise in (0.0, 0.5, 1.0, 2.0)]
    assert (np.diff(by_noise) < 0).all(), by_noise


def test_niches_that_hold_one_state_only():
    adata, _ = tissue(60, 60)
    adata.obs["niche"] = np.where(adata.obs["state"] == "A", "x", "y")
    with pytest.warns(UserWarning, match="no niche holds 5 cells of both states"):
        found = paired(adata, niche_key="niche")
    assert (found["niche"] == "").all() and len(found) == 60
    adata.obs.loc[adata.obs_names[:3], "niche"] = None
    with pytest.warns(UserWarning, match="3 rows have no niche"):
        paired(adata, niche_key="niche")


def test_negative_control_pairs_disjoint_halves():
    adata, _ = tissue(80, 10)
    found = paired(adata, transitions=[("A", "A"), ("A", "B")])
    control = found[found["transition"] == "A -> A"]
    assert len(control) == 40 and not set(control["source"]) & set(control["target"])
    assert len(found) == 40 + 80


def test_other_terms_of_the_cost():
    adata, latent = tissue(150, 150)
    adata.obsm["where"] = latent[:, :2] + 0.0
    found = paired(adata, cost={"where": 1.0}, epsilon=0.005, unbalanced=None)
    names = adata.obs_names
    apart = latent[names.get_indexer(found["source"]), :2] - latent[names.get_indexer(found["target"]), :2]
    assert np.median(np.linalg.norm(apart, axis=1)) < 0.6
    assert paired(adata, cost={"genes": 1.0, "composition": 0.5}, mpp=1)["confidence"].gt(0).any()
    with pytest.raises(KeyError, match="obsm has no 'nothing'"):
        paired(adata, cost={"nothing": 1.0})
    with pytest.raises(ValueError, match="positive weight"):
        paired(adata, cost={"genes": 0.0})


def test_tiles_are_paired_by_the_shares_of_their_cells():
    adata, _ = tissue(1500, 1500)
    side = np.where(adata.obs["state"] == "A", 0, 400)  # A on the left, B on the right, both between
    adata.obsm["spatial"] = adata.obsm["spatial"] * [1.0, 1.0] + np.c_[side, np.zeros(len(side))]
    tiles = sf.pp.tiles(adata, tile_um=50, groupby="state", mpp=1)
    np.testing.assert_allclose(tiles.obsm["state"].sum(1), 1, rtol=1e-6)
    found = paired(tiles)
    share = pd.DataFrame(tiles.obsm["state"], tiles.obs_names, tiles.uns["tiles"]["state"])
    assert (share.loc[found["source"], "B"] < 0.05).all() and (share.loc[found["target"], "B"] >= 0.05).all()
    members = tiles.uns["tiles"]["members"]
    expected = (adata.obs["state"].to_numpy()[members == 3] == "B").mean()
    np.testing.assert_allclose(share["B"].iloc[3], expected, rtol=1e-6)


def test_rows_without_anything_to_compare_are_left_out():
    adata, _ = tissue(60, 60)
    adata.X[5] = 0
    adata.X[100] = 0
    with pytest.warns(UserWarning, match="2 rows have no counts"):
        found = paired(adata)
    assert (
        len(found) == 59
        and adata.obs_names[5] not in set(found["source"])
        and adata.obs_names[100] not in set(found["target"])
    )
    whole = tissue(60, 60)[0]
    assert found["confidence"].mean() == pytest.approx(paired(whole)["confidence"].mean(), abs=0.05)
    whole.obsm["shape"] = np.ones((120, 2))
    whole.obsm["shape"][7] = np.nan
    with pytest.warns(UserWarning, match="1 rows have no counts, or no value"):
        assert len(paired(whole, cost={"genes": 1.0, "shape": 1.0})) == 59
    with pytest.raises(ValueError, match="cost must be a dict"):
        paired(whole, cost="genes")


def test_the_order_of_rows_does_not_matter():
    adata, _ = tissue(80, 90, niches=2)
    other = adata[np.random.default_rng(1).permutation(170)].copy()
    one, two = (
        paired(a, niche_key="niche", transitions=[("A", "B"), ("A", "A")])
        .set_index(["transition", "source"])
        .sort_index()
        for a in (adata, other)
    )
    assert (one["target"] == two["target"]).mean() > 0.97  # but for rounding
    np.testing.assert_allclose(one["confidence"], two["confidence"], atol=1e-3)


def test_pairing_samples_of_an_outer_join_is_a_warning():
    one, other = tissue(60, 80, seed=0)[0], tissue(60, 80, seed=1)[0]
    joined = ad.concat([one, other[:, :100]], join="outer", index_unique="-")
    with pytest.warns(
        UserWarning, match="genes .* have no count in 140 rows from 'c0-1' to 'c139-1', and many elsewhere"
    ):
        paired(joined)


def test_bad_input():
    adata, _ = tissue(30, 30)
    with pytest.raises(ValueError, match="no state 'C'; did you mean"):
        paired(adata, transitions=[("A", "C")])
    with pytest.raises(ValueError, match="fewer than min_cells=50"):
        paired(adata, min_cells=50)
    with pytest.raises(KeyError, match="obs has no 'stat'"):
        paired(adata, groupby="stat")
    for bad in ([], ["A"], [("A",)], [("A", "B"), ("A", "B")]):
        with pytest.raises(ValueError, match="transitions"):
            paired(adata, transitions=bad)
    with pytest.raises(ValueError, match="confidence must be one of"):
        paired(adata, confidence="certain")
    with pytest.raises(ValueError, match="config must be one of 'default'"):
        sf.tl.pair_transitions(adata, transitions=("A", "B"), groupby="state", config="fast")
    with pytest.raises(ValueError, match="epsilon must be a positive number"):
        sf.models.PairingConfig(epsilon=0)
    assert paired(adata, transitions=("A", "B"))["transition"].eq("A -> B").all()
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="raw counts"):
        paired(adata)


def test_a_state_cannot_hold_an_arrow():
    table = sf.datasets.simulated_tissue(100, seed=1)["table"]
    table.obs["state"] = table.obs["state"].astype(str).replace("A", "x -> y")
    with pytest.raises(ValueError, match="a state cannot be called 'x -> y'"):
        sf.tl.pair_transitions(table, transitions=[("x -> y", "B")], groupby="state")
