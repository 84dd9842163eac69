import time
from types import SimpleNamespace

import spatiaflow
from spatiaflow._io import Key, provenance


def test_names_of_slots():
    assert Key.obsm.std("stflow") == "stflow_std"
    assert Key.obsm.rate("stflow") == "stflow_rate"
    assert Key.obs.ood("stflow") == "stflow_ood"
    assert Key.obsm.level("X_spatia", "niche") == "X_spatia_niche"
    assert Key.obsm.encoder("uni") == "X_uni"


def test_provenance_says_what_repeats_a_call():
    model = SimpleNamespace(kind="STFlow", sha256="ab")
    found = provenance(time.perf_counter() - 2, model=model, random_state=0, n_samples=3)
    assert found.pop("seconds") >= 2
    assert found == {
        "spatiaflow": spatiaflow.__version__, "model": "STFlow", "model_sha256": "ab", "random_state": 0, "n_samples": 3,
    }  # fmt: skip
    assert "random_state" not in provenance(0.0)
