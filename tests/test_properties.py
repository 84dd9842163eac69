"""Random small objects, over every verb: a result, or an error that says what is wrong and where, and no other change."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import sparse

from _verbs import VERBS, expected, outcome, same, table_of
from _verbs import given as clean
from spatiaflow import _io

pytestmark = pytest.mark.filterwarnings("ignore")
REFUSED = (ValueError, KeyError, TypeError, OSError)
# they write a row for every cell; the folds of annotate follow the order of the rows
KEYED = [name for name, verb in VERBS.items() if "copy" in verb.arguments and name != "tl.annotate"]


def profile(n):
    quick = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}
    return settings(derandomize=True, database=None, max_examples=n, **quick)


def over(names=tuple(VERBS)):
    return pytest.mark.parametrize("verb", names)


# changes that no result depends on
HARMLESS = {
    "float64": lambda t, rng: setattr(t, "X", t.X.astype(float)),
    "int32": lambda t, rng: setattr(t, "X", t.X.astype(np.int32)),
    "dense": lambda t, rng: setattr(t, "X", t.X.toarray() if sparse.issparse(t.X) else t.X),
    "CSC": lambda t, rng: setattr(t, "X", sparse.csc_matrix(t.X)),
    "empty group": lambda t, rng: t.obs.__setitem__("cell_type", t.obs["cell_type"].cat.add_categories(["none of them"])),
    "text column": lambda t, rng: t.obs.__setitem__("cell_type", t.obs["cell_type"].astype(str)),
    "nullable text": lambda t, rng: t.obs.__setitem__("cell_type", t.obs["cell_type"].astype(str).astype("string")),
    "more columns": lambda t, rng: t.obs.__setitem__("名前 1/2", pd.array([None, *range(t.n_obs - 1)], dtype="Int64")),
    "column of numbers": lambda t, rng: t.obs.__setitem__("n", rng.normal(size=t.n_obs)),
    "float64 features": lambda t, rng: t.obsm.__setitem__("F", t.obsm["F"].astype(float)),
    "features as a frame": lambda t, rng: t.obsm.__setitem__("F", pd.DataFrame(t.obsm["F"], t.obs_names)),
    "sparse features": lambda t, rng: t.obsm.__setitem__("F", sparse.csr_matrix(t.obsm["F"])),
    "another layer": lambda t, rng: t.layers.__setitem__("scaled", rng.normal(size=t.shape)),
    "more of uns": lambda t, rng: t.uns.update({"X": 3, "E": None, "F_": [1], "log1p": {"base": None}, "spatial_neighbors": "x"}),
}  # fmt: skip


def _counts(t, change):
    if t.X is None:
        return
    X = t.X.toarray() if sparse.issparse(t.X) else np.array(t.X)
    change(X)
    t.X = sparse.csr_matrix(X) if sparse.issparse(t.X) else X


def _put(values, at, value):
    values[at] = value


# changes after which a verb may refuse
HARMFUL = {
    "row without counts": lambda t, rng: _counts(t, lambda X: _put(X, slice(0, 3), 0)),
    "no counts": lambda t, rng: _counts(t, lambda X: _put(X, slice(None), 0)),
    "constant gene": lambda t, rng: _counts(t, lambda X: _put(X, (slice(None), 0), 5)),
    "huge": lambda t, rng: _counts(t, lambda X: _put(X, (0, 0), 2.0**30)),
    "infinite": lambda t, rng: _counts(t, lambda X: _put(X, (0, 0), np.inf)),
    "NaN": lambda t, rng: _counts(t, lambda X: _put(X, (0, 0), np.nan)),
    "negative": lambda t, rng: _counts(t, lambda X: _put(X, (0, 0), -1)),
    "fractions": lambda t, rng: _counts(t, lambda X: X.__imul__(0.37)),
    "gene twice": lambda t, rng: setattr(t, "var_names", [t.var_names[0], *t.var_names[:-1]]),
    "cell twice": lambda t, rng: setattr(t, "obs_names", [t.obs_names[0], *t.obs_names[:-1]]),
    "other genes": lambda t, rng: setattr(t, "var_names", [f"ENSG{i:08d}" for i in range(t.n_vars)]),
    "names of numbers": lambda t, rng: setattr(t, "var_names", [str(i) for i in range(t.n_vars)]),
    "missing group": lambda t, rng: t.obs.__setitem__("cell_type", t.obs["cell_type"].where(np.arange(t.n_obs) > 5)),
    "one group": lambda t, rng: t.obs.__setitem__("cell_type", "fibroblast"),
    "numbers as groups": lambda t, rng: t.obs.__setitem__("cell_type", rng.integers(0, 3, t.n_obs)),
    "many groups": lambda t, rng: t.obs.__setitem__("cell_type", t.obs_names.to_numpy()),
    "no label": lambda t, rng: t.obs.__setitem__("label", pd.Categorical([None] * t.n_obs)),
    "labels true and false": lambda t, rng: t.obs.__setitem__("label", rng.random(t.n_obs) < 0.5),
    "position NaN": lambda t, rng: t.obsm["spatial"].__setitem__((1, 0), np.nan),
    "positions alike": lambda t, rng: t.obsm.__setitem__("spatial", np.full((t.n_obs, 2), 50.0)),
    "positions in a line": lambda t, rng: t.obsm.__setitem__("spatial", t.obsm["spatial"] * [1, 0] + [0, 50]),
    "positions huge": lambda t, rng: t.obsm.__setitem__("spatial", t.obsm["spatial"] * 1e9),
    "positions negative": lambda t, rng: t.obsm.__setitem__("spatial", t.obsm["spatial"] - 1e4),
    "no positions": lambda t, rng: t.obsm.pop("spatial"),
    "features NaN": lambda t, rng: t.obsm["F"].__setitem__((0, 0), np.nan),
    "features constant": lambda t, rng: t.obsm["F"].fill(1.0),
    "features huge": lambda t, rng: t.obsm["F"].__imul__(np.float32(1e30)),
    "one feature": lambda t, rng: t.obsm.__setitem__("F", t.obsm["F"][:, :1]),
    "no feature": lambda t, rng: t.obsm.__setitem__("F", t.obsm["F"][:, :0]),
    "text as features": lambda t, rng: t.obsm.__setitem__("F", t.obsm["F"].astype(str)),
    "embedding NaN": lambda t, rng: t.obsm["E_cell"].__setitem__((0, 0), np.nan),
    "no X": lambda t, rng: setattr(t, "X", None),
    "no uns": lambda t, rng: t.uns.clear(),
    "no obs": lambda t, rng: setattr(t, "obs", t.obs[[]].copy()),
}  # fmt: skip
ROWS = st.sampled_from([1, 2, 3, 7, 20, 51, 80])
GENES = st.sampled_from([1, 2, 6, 30])


def changed_by(data, names, changes, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        changes[name](table_of(data), rng)
    return data


@over()
def test_what_no_result_depends_on(verb):
    @given(st.sets(st.sampled_from(sorted(HARMLESS)), min_size=1, max_size=4), st.sampled_from(VERBS[verb].kinds))
    @profile(2 if VERBS[verb].slow else 6)
    def check(names, kind):
        found = outcome(verb, changed_by(clean(verb, kind), sorted(names), HARMLESS))
        right = expected(verb, kind)
        if verb in ("get.expression", "tl.sample_expression"):  # obs comes along
            found, right = ({k: v for k, v in one.items() if " obs" not in k} for one in (found, right))
        same(found, right)

    check()


@over()
def test_a_result_or_an_error_that_names_the_slot(verb):
    @given(st.sets(st.sampled_from(sorted(HARMFUL)), min_size=1, max_size=2), st.sampled_from(VERBS[verb].kinds))
    @profile(4 if VERBS[verb].slow else 14)
    def check(names, kind):
        data = changed_by(clean(verb, kind), sorted(names), HARMFUL)
        try:
            outcome(verb, data)
        except REFUSED:
            return

    check()


@over([name for name, verb in VERBS.items() if name != "pl.attention"])
def test_few_rows_and_genes(verb):
    @given(ROWS, GENES, st.integers(0, 3))
    @profile(3 if VERBS[verb].slow else 8)
    def check(n, n_genes, seed):
        rng = np.random.default_rng(seed)
        data = clean(verb, "AnnData") if "AnnData" in VERBS[verb].kinds else None
        if data is None:
            return
        part = data[np.sort(rng.permutation(80)[:n]), np.sort(rng.permutation(30)[:n_genes])].copy()
        try:
            found = outcome(verb, part)
        except REFUSED:
            return
        for path, values in found.items():
            if path.startswith("obsm") and isinstance(values, np.ndarray) and values.dtype.kind == "f":
                assert len(values) == n and np.isfinite(values).all(), path

    check()


@over(KEYED)
def test_the_order_of_rows_and_genes_does_not_matter(verb):
    @given(st.integers(0, 99), st.sampled_from(VERBS[verb].kinds))
    @profile(3)
    def check(seed, kind):
        rng = np.random.default_rng(seed)
        right = clean(verb, kind)
        data = clean(verb, kind)
        turned = table_of(data)[rng.permutation(80)][:, rng.permutation(30)].copy()
        if isinstance(data, AnnData):
            data = turned
        else:
            data["table"] = turned
        outcome(verb, right)
        outcome(verb, data)
        one, other = table_of(right), table_of(data)
        other = other[one.obs_names]
        for key in one.obsm:
            np.testing.assert_allclose(np.asarray(other.obsm[key]), np.asarray(one.obsm[key]), 1e-3, 1e-3, err_msg=key)
        for name in one.obs.columns:
            if one.obs[name].dtype.kind == "f":
                np.testing.assert_allclose(other.obs[name], one.obs[name], 1e-3, 1e-3, err_msg=name)
            elif name not in ("region", "instance"):
                assert list(_io.as_text(other.obs[name])) == list(_io.as_text(one.obs[name])), name

    check()
