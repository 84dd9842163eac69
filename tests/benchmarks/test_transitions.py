"""benchmarks/transitions.py: the band that scores exocrine cells shares no cell with the training part."""

import numpy as np

import spatiaflow as sf
import transitions


def test_a_band_and_its_margins_are_no_part_of_the_training_part(monkeypatch):
    whole = sf.datasets.simulated_tissue(400, seed=0)
    x = whole["table"].obsm["spatial"][:, 0] / transitions.MPP
    monkeypatch.setattr(transitions, "BAND", (np.quantile(x, 0.4), np.quantile(x, 0.6)))
    monkeypatch.setattr(transitions, "MARGIN", np.ptp(x) / 20)
    other = sf.datasets.simulated_tissue(50, seed=1)
    parts = transitions.with_band({"train": whole, "test": other})
    train, band = parts["train"]["table"], parts["band"]["table"]
    assert parts["test"] is other
    assert band.n_obs == 80
    assert not set(train.obs_names) & set(band.obs_names)
    gap = np.abs(train.obsm["spatial"][:, None, 0] - band.obsm["spatial"][None, :, 0]).min() / transitions.MPP
    assert gap > transitions.MARGIN * 0.9
    assert train.n_obs + band.n_obs < 400
    assert np.array_equal(train.X.toarray(), whole["table"][train.obs_names].X.toarray())
