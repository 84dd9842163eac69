import anndata as ad
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

import spatiaflow as sf


@pytest.fixture(scope="module")
def slides():
    """Two slides, clustered together."""
    out = [sf.datasets.simulated_tissue(400, seed=seed)["table"] for seed in (1, 2)]
    with sf.settings.override(progress=False, verbosity="warning"):
        sf.tl.cluster_cells(out, random_state=0)
    return out


def test_planted_types_are_found_in_all_slides_together(slides):
    for table in slides:
        assert adjusted_rand_score(table.obs["cell_type"], table.obs["cell_cluster"]) > 0.6
    counts = sum(table.obs["cell_cluster"].value_counts(sort=False) for table in slides)
    assert (np.diff(counts) <= 0).all() and counts.index[0] == "0"
    both = [
        table.obs.groupby("cell_cluster", observed=True)["cell_type"].agg(lambda s: s.mode()[0]) for table in slides
    ]
    assert (both[0] == both[1])[:4].all()  # a cluster is the same type on both


def test_the_finest_stable_resolution_is_taken(slides):
    found, params = slides[0].uns["cell_cluster"]["stability"], slides[0].uns["cell_cluster"]["params"]
    assert found["agreement"].shape == found["resolution"].shape == found["error"].shape == found["n_clusters"].shape
    stable = found["resolution"][found["agreement"] >= found["agreement"].max() - 0.1]
    assert params["resolution"] == stable.max()
    assert params["n_clusters"] == slides[0].obs["cell_cluster"].cat.categories.size


def test_order_of_rows_does_not_matter(slides):
    order = np.random.default_rng(0).permutation(400)
    one = sf.tl.cluster_cells(slides[0], resolution=0.5, key_added="k", random_state=0, copy=True)
    other = slides[0][order].copy()
    sf.tl.cluster_cells(other, resolution=0.5, key_added="k", random_state=0)
    assert adjusted_rand_score(one.obs["k"][other.obs_names], other.obs["k"]) > 0.99
    assert not one.uns["k"]["stability"]


def test_capture_that_differs_between_slides_makes_no_clusters(slides):
    first, second = slides[0].copy(), slides[0].copy()
    second.X = (second.X.multiply(np.random.default_rng(0).choice([1, 4], second.n_vars))).tocsr().astype(np.float32)
    sf.tl.cluster_cells([first, second], resolution=0.3, random_state=0)
    assert adjusted_rand_score(first.obs["cell_cluster"], second.obs["cell_cluster"]) > 0.7


def test_an_embedding_keeps_its_scale():
    """Large components tell the groups apart; small ones are noise, and are not blown up."""
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=300)
    x = np.hstack([10 * np.eye(3)[truth] + rng.normal(size=(300, 3)), 0.3 * rng.normal(size=(300, 40))])
    cells = ad.AnnData(np.zeros((300, 1)), obsm={"E": x.astype(np.float32)})
    sf.tl.cluster_cells(cells, use_rep="E", resolution=0.1)
    assert adjusted_rand_score(truth, cells.obs["cell_cluster"]) > 0.95


def test_clear_errors(slides):
    with pytest.raises(KeyError, match="embed_spatia"):
        sf.tl.cluster_cells(slides[0], use_rep="X_nothing")
    with pytest.raises(ValueError, match="resolution must be a positive number"):
        sf.tl.cluster_cells(slides[0], resolution=0)
    with pytest.raises(ValueError, match="too few cells"):
        sf.tl.cluster_cells(slides[0][:5].copy())
    with pytest.raises(ValueError, match="share 0 genes"):
        sf.tl.cluster_cells([slides[0], slides[1][:, :0].copy()])


def test_cells_without_counts_have_no_cluster_and_move_no_other():
    table = sf.datasets.simulated_tissue(400, seed=1)["table"]
    counts = table.X.tolil()
    counts[:40] = 0
    table.X = counts.tocsr()
    rest = table[40:].copy()
    with pytest.warns(UserWarning, match="40 cells have no counts"):
        sf.tl.cluster_cells(table, resolution=0.5, random_state=0)
    sf.tl.cluster_cells(rest, resolution=0.5, random_state=0)
    assert table.obs["cell_cluster"][:40].isna().all()
    assert adjusted_rand_score(rest.obs["cell_cluster"], table.obs["cell_cluster"][40:]) > 0.95
    counts[:] = 0
    table.X = counts.tocsr()
    with pytest.raises(ValueError, match="X holds no counts"):
        sf.tl.cluster_cells(table)


def test_genes_that_differ_by_case_alone_are_named():
    one, other = (sf.datasets.simulated_tissue(100, seed=seed)["table"] for seed in (1, 2))
    other.var_names = [name.lower() if i < 12 else name for i, name in enumerate(other.var_names)]
    with pytest.warns(UserWarning, match="12 genes are spelled differently in different objects"):
        sf.tl.cluster_cells([one, other], resolution=0.5)
