"""Warnings of scales and of slides taken for one."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._io import Where
from spatiaflow._io._checks import Lattice
from spatiaflow._slides import gather


def messages(xy, mpp=1.0, obs=None, **uns):
    obs = pd.DataFrame(index=map(str, range(len(xy)))) if obs is None else obs
    table = ad.AnnData(np.ones((len(xy), 2), np.float32), obs=obs, obsm={"spatial": np.asarray(xy, float)}, uns=uns)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _io.places(table, Where(mpp=mpp))
    return [str(one.message) for one in found if issubclass(one.category, UserWarning)]


def grid(pitch, n=8):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2) * float(pitch)


def hexagonal(pitch, n=10):
    i, j = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n)))
    return np.column_stack([(i + j % 2 / 2) * pitch, j * pitch * np.sqrt(3) / 2])


@pytest.mark.parametrize("pitch", [200, 141, 100, 50, 25, 20, 16, 10, 8, 2])
def test_pitches_that_arrays_have(pitch):
    assert not messages(grid(pitch))


@pytest.mark.parametrize("pitch", [70, 4, 500])
def test_a_pitch_that_no_array_has(pitch):
    (found,) = messages(grid(pitch))
    assert f"{pitch} µm apart" in found
    assert "Check mpp" in found


def test_a_hexagonal_array_is_visium():
    assert not messages(hexagonal(100))
    (found,) = messages(hexagonal(50))  # a square array may have this pitch
    assert "100 would need mpp=2" in found
    assert Lattice(hexagonal(100)).hexagonal
    assert not Lattice(grid(100)).hexagonal


def test_tiles_know_their_size():
    assert not messages(grid(70), tiles={"params": {}})


@pytest.mark.parametrize(
    ("mpp", "fits"), [(0.2125, None), (0.01, "mpp=0.2125 would fit"), (8.0, "mpp=0.2125 would fit")]
)
def test_cells_too_close_or_too_far_apart(mpp, fits):
    cells = np.random.default_rng(0).uniform(0, 1000, (400, 2)) / 0.2125
    found = messages(cells, mpp)
    assert len(found) == (fits is not None)
    if fits:
        assert fits in found[0]


def test_cells_too_large_or_too_small():
    sdata = sf.datasets.simulated_tissue(100, seed=0)
    circles = sdata["nuclei"].copy()
    circles["geometry"] = circles.geometry.buffer(40)
    sdata["nuclei"] = circles
    with pytest.warns(UserWarning, match="its cells have .* µm² .median., but cells have 10 to 3,000 µm² .*would fit"):
        _io.places(sdata)


KINDS = ["object", "category", "string", "int"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sample", "fov", "library_id"])
def test_slides_that_lie_over_one_another_are_told_of(kind, name):
    xy = np.random.default_rng(0).uniform(0, 300, (100, 2))
    values = np.repeat([1, 2], 50) if kind == "int" else np.repeat(["a", "b"], 50)
    obs = pd.DataFrame({name: pd.Series(values).astype(kind)})
    obs.index = obs.index.astype(str)
    assert f"give library_key={name!r}" in messages(xy, obs=obs)[0]


def apart(n, seed):
    """Points that keep a distance, as cells of one slide do."""
    found = np.empty((0, 2))
    for point in np.random.default_rng(seed).uniform(0, 500, (4 * n, 2)):
        if len(found) < n and (np.hypot(*(found - point).T) > 10).all():
            found = np.vstack([found, point])
    return found


@pytest.mark.parametrize("name", ["animal", "Mouse ID", "slice"])
def test_slides_over_one_another_are_told_of_by_how_close_cells_are(name):
    xy = np.vstack([apart(500, seed) for seed in range(3)])
    obs = pd.DataFrame(
        {"type": np.arange(1500) % 4, name: np.repeat(["a", "b", "c"], 500)}, index=map(str, range(1500))
    )
    order = np.random.default_rng(9).permutation(1500)
    assert f"give library_key={name!r}" in messages(xy[order], obs=obs.iloc[order])[0]
    one = obs.iloc[:500].assign(type=np.random.default_rng(0).integers(0, 3, 500).astype(str))
    assert not any("library_key" in message for message in messages(xy[:500], obs=one))
    anywhere = np.random.default_rng(0).uniform(0, 500, (1500, 2))  # cells of thick tissue lie over one another, too
    assert not any("library_key" in message for message in messages(anywhere, obs=obs.iloc[order]))


def batches(genes=200, missing=0, mean=1.0, column="batch", split=150, mixed=False):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1, mean, genes), (300, genes)).astype(np.float32)
    counts[split:, :missing] = 0
    obs = pd.DataFrame({column: np.where(np.arange(300) < split, "a", "b")}, index=map(str, range(300)))
    table = ad.AnnData(sparse.csr_matrix(counts), obs=obs)
    table = table[rng.permutation(300)].copy() if mixed else table
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _io.check_measured(table, table.X, "mine")
    return [str(one.message) for one in found]


def test_genes_that_a_batch_did_not_measure():
    (told,) = batches(missing=40)
    assert told.split()[0] in ("33", "34", "35", "36", "37", "38", "39", "40")  # the others have few counts anywhere
    assert "obs['batch'] 'b'" in told and "outer join" in told
    assert batches(missing=40, column="mine")
    assert not batches()
    assert not batches(missing=40, column="cell_type", mixed=True)  # markers of a type are absent in others
    assert not batches(missing=40, mean=0.01)  # too few counts to tell
    assert not batches(missing=2)  # those of a chromosome, say
    assert not batches(missing=40, split=297)  # three cells tell nothing


def test_an_outer_join_is_a_warning():
    data, reference = (sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (0, 1))
    few = reference[:, ~reference.var_names.str.startswith("MORPH")]
    joined = ad.concat({"a": reference[:75], "b": few[75:]}, label="batch", join="outer")
    panel = data[:, few.var_names].copy()
    with pytest.warns(UserWarning, match="4 genes .first: 'MORPH1'. have no count in obs.'batch'. 'b'"):
        sf.tl.impute_genes(panel, reference=joined)


def told(table):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _io.check_measured(table, sparse.csr_matrix(table.X), None)
    return [str(one.message) for one in found]


def joined(*parts):
    """Objects joined as ``anndata.concat`` does it, without a column that tells them apart."""
    return ad.concat(parts, join="outer", index_unique="-")


@pytest.mark.parametrize("order", ["ab", "ba", "aba", "abab"])
def test_an_outer_join_without_a_column_of_batches(order):
    a, b = (sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (0, 1))
    parts = {"a": a, "b": b[:, ~b.var_names.str.match("MORPH|STATE")]}
    table = joined(*[parts[one] for one in order])
    (message,) = told(table)
    first = order.index("b")
    rows = f"150 rows from 'cell_0-{first}' to 'cell_149-{first}'"
    assert "6 genes (first: 'MORPH1') have no count in " + rows in message
    assert 'join with join="inner", give the samples as a list' in message
    assert not told(joined(*[parts["b"] for _ in order]))


def test_counts_are_gathered_with_the_warning():
    a, b = (sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (0, 1))
    with pytest.warns(UserWarning, match="10 genes .* have no count in 150 rows from 'cell_0-1' to 'cell_149-1'"):
        gather(joined(a, b[:, :-10]), need=("counts",), scaled=False)


def test_both_sides_of_an_outer_join_are_seen_or_one():
    a, b = (sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (0, 1))
    (message,) = told(joined(a[:, 10:], b[:, :-20]))
    assert "genes (first: " in message and "150 rows" in message


def test_an_outer_join_of_regions_is_told_by_their_names():
    a, b = (sf.datasets.simulated_tissue(150, seed=seed)["table"] for seed in (0, 1))
    table = joined(a, b[:, ~b.var_names.str.startswith("MORPH")])
    table.obs["tissue_region"] = np.repeat(["left", "right"], 150)
    table.uns["spatialdata_attrs"] = {"region_key": "tissue_region"}
    assert "4 genes (first: 'MORPH1') have no count in obs['tissue_region'] 'right'" in told(table)[0]


@pytest.mark.parametrize("sorted_by", ["cell_type", "niche", "state", "library", "axis_ratio"])
def test_tissue_in_any_order_is_no_outer_join(sorted_by):
    table = sf.datasets.simulated_tissue(300, seed=1)["table"]
    order = table.obs[sorted_by].argsort(kind="stable") if sorted_by in ("library", "axis_ratio") else None
    order = table.obs[sorted_by].astype(str).argsort(kind="stable") if order is None else order
    assert not told(table[order.to_numpy()])


@pytest.mark.parametrize("seed", range(5))
def test_genes_of_a_region_are_no_outer_join(seed):
    rng = np.random.default_rng(seed)
    place = np.arange(600) / 600
    middle, width = rng.uniform(0, 1, 200), rng.uniform(0.05, 0.3, 200)
    rate = 3 * np.exp(-(((place[:, None] - middle) / width) ** 2))
    counts = rng.poisson(np.c_[rate, np.ones((600, 100))]).astype(np.float32)
    assert not told(ad.AnnData(sparse.csr_matrix(counts)))


@pytest.mark.parametrize("section", ["her2st", "visium_ffpe", "starmap"])
def test_real_tissue_in_any_order_is_no_outer_join(mirror, section):
    if section == "starmap":
        tables = [table for _, table in _by(sf.datasets.starmap_mpfc(), "mouse")]
    elif section == "her2st":
        tables = [sf.datasets.her2st("C2")]
    else:
        tables = [sf.datasets.visium_ffpe("lungorganoid/V19D02-088_A1")]
    for table in tables:
        for values in (np.arange(table.n_obs), *np.asarray(table.obsm["spatial"]).T):
            assert not told(table[np.argsort(values, kind="stable")])


def _by(table, column):
    return [(name, table[table.obs[column] == name]) for name in table.obs[column].unique()]


def test_an_outer_join_of_arrays_is_refused_as_such():
    a, b = (sf.datasets.simulated_tissue(60, seed=seed)["table"] for seed in (0, 1))
    for part in (a, b):
        part.X = part.X.toarray()
    table = joined(a, b[:, 5:])
    with pytest.raises(
        ValueError, match="X has NaN .*outer join writes NaN .*join=.inner., or give the samples as a list"
    ):
        _io.counts(table)


def cut(genes=60, **columns):
    """Sixty genes, of which some are kept."""
    table = sf.datasets.simulated_tissue(60, seed=0)["table"]
    total = np.asarray(table.X.sum(1)).ravel()
    table.obs = table.obs.assign(**{name: factor * total for name, factor in columns.items()})
    table.raw = table
    table.var["highly_variable"] = np.arange(60) < genes
    return table[:, :genes].copy()


def of_library(*tables, layer=None):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        _io.check_library(list(tables), layer, "sf.tl.verb(data, genes=[...])")
    return [str(one.message) for one in found if one.category is UserWarning]


@pytest.mark.parametrize("column", ["total_counts", "n_counts", "nCount_Spatial", "transcript_counts", "n_umi"])
def test_fewer_counts_than_a_column_states_hint_at_a_cut(column):
    (message,) = of_library(cut(15, **{column: 1}))
    assert "the table has 15 genes, and they have" in message and f"of the counts in obs[{column!r}]" in message
    assert "Keep all genes in the table" in message and "sf.tl.verb(data, genes=[...])" in message
    whole = cut(60, **{column: 1.0})
    whole.var["highly_variable"] = False
    whole.obs[f"log1p_{column}"] = 1e9
    assert not of_library(whole)
    assert len(of_library(whole, cut(15, **{column: 1}), cut(10, **{column: 1}))) == 1


def test_other_signs_of_a_table_cut_to_some_genes():
    few = cut(20)
    assert "its raw has 60" in of_library(few)[0]
    few.raw = None
    assert "var['highly_variable'] is True for all" in of_library(few)[0]
    del few.var["highly_variable"]
    assert (
        "the table has 20 genes, and so few tell the depth only if the panel measures no others" in of_library(few)[0]
    )
    few.layers["counts"], few.X = few.X, None
    assert of_library(few, layer="counts")


@pytest.mark.parametrize("name", ["her2st", "starmap_mpfc", "mouse_olfactory_bulb"])
def test_whole_tables_are_not_taken_for_cut_ones(mirror, name):
    assert not of_library(getattr(sf.datasets, name)())
