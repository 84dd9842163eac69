"""Published methods are scored as ours are, and their settings are chosen without the labels they are scored by."""

import sys
import types

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import niches
import peers
import results


def test_a_setting_is_chosen_by_the_other_mice(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path))
    obs = pd.DataFrame({"mouse": pd.Categorical(list("abc") * 20), "layer": ["x"] * 30 + ["y"] * 30, "seconds": 1.0})
    right, wrong = (obs["layer"] == "x").to_numpy(int), np.arange(60) // 3 % 2
    only_a = np.where(obs["mouse"] == "a", right, wrong)
    not_a = np.where(obs["mouse"] == "a", wrong, right)
    peer = peers.NichePeer("peer", "numpy", "hops", (2, 1), None)
    found = {peers.OWN_NUMBER: np.arange(60), 2: only_a, 1: not_a}
    niches.add_peer(results.Table("niches"), peer, 0, obs, found)
    rows = results.read("niches")
    ari = results.pivot(rows[rows["metric"] == "layer ARI"], "method", "split")
    assert ari.loc["peer", "a"] == 1
    assert abs(ari.loc["peer, tuned", "a"]) < 0.1  # 1 hop is best of "b" and "c", and bad for "a"
    assert abs(ari.loc["peer, tuned", "b"]) < 0.1  # of "a" and "c" both are as good: the default
    assert results.select(rows, method="peer, number chosen", metric="niches")["value"].eq(60).all()


def test_a_method_with_one_value_has_no_tuned_row(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path))
    obs = pd.DataFrame({"mouse": pd.Categorical(list("ab") * 20), "layer": ["x", "x", "y", "y"] * 10, "seconds": 1.0})
    found = {peers.OWN_NUMBER: np.arange(40), 2: (obs["layer"] == "x").to_numpy(int)}
    niches.add_peer(results.Table("niches"), peers.NichePeer("peer", "numpy", "hops", (2,), None), 0, obs, found)
    rows = results.read("niches")
    assert set(rows["method"]) == {"peer", "peer, number chosen"}
    assert results.select(rows, method="peer", metric="layer ARI")["value"].eq(1).all()


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    out = ad.AnnData(rng.poisson(3, (60, 8)).astype(np.float32), obs=pd.DataFrame({"mouse": ["a"] * 30 + ["b"] * 30}))
    out.obs_names = [f"cell{i}" for i in range(60)]
    return out


def test_methods_do_not_see_hidden_genes(cells):
    hidden, seen = np.array([1, 5]), {}

    def method(seq, spatial, *_):
        seen.update(seq=seq, spatial=spatial)
        return spatial.X

    peers.imputed(method, [cells[:30], cells[30:]], cells, hidden, 100, 0)
    assert list(seen["spatial"].var_names) == [name for i, name in enumerate(cells.var_names) if i not in hidden]
    assert seen["seq"].shape == cells.shape


def test_values_of_hidden_genes_are_per_count_of_the_others():
    values = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    np.testing.assert_allclose(peers.per_shown(values, np.array([1]), 100), np.log1p([[50.0], [50.0]]))


def test_principal_vectors_are_chosen_in_the_reference(cells, monkeypatch):
    """A stand-in for SpaGE is right about a reference mouse at 30 vectors only."""
    calls = []

    def stand_in(spatial, rna, n_pv, genes_to_predict):
        calls.append((n_pv, len(spatial)))
        noise = np.random.default_rng(1).normal(size=(len(spatial), len(genes_to_predict)))
        if n_pv != 30 or len(spatial) == 60:
            return pd.DataFrame(noise)
        mouse = cells[:30] if len(rna) == 30 and rna.iloc[0].equals(logs.iloc[30]) else cells[30:]
        return pd.DataFrame(mouse[:, genes_to_predict].X)

    logs = pd.DataFrame(
        np.log1p(100 * cells.X / np.delete(cells.X, [1, 5], 1).sum(1, keepdims=True)), columns=cells.var_names
    )
    monkeypatch.setitem(sys.modules, "spagim", types.ModuleType("spagim"))
    monkeypatch.setitem(sys.modules, "spagim.main", types.SimpleNamespace(SpaGE=stand_in))
    left = cells[:, np.setdiff1d(np.arange(8), [1, 5])].copy()
    found = peers.spage_tuned(cells, left, np.array([1, 5]), 100, 0)
    assert found.shape == (60, 2)
    assert calls[-1] == (30, 60)
