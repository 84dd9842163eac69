"""Draw ``doses.png``: a tumour cell of the pancreas towards another state, and with more of a gene."""

from pathlib import Path

import numpy as np

import spatiaflow as sf

data = sf.datasets.xenium_pancreas()
table, model = data["table"], sf.models.load(sf.datasets.weights("morphology-pancreas-genes"))
states = np.array(model.states(table[:, model.states.genes].X), dtype=str)
cells = list(table.obs_names[states == "MKI67/UBE2C"][:40])
options = {"model": model, "cells": cells, "dose": [0, 0.25, 0.5, 0.75, 1]}
edits = [
    sf.tl.generate_morphology(data, source="MKI67/UBE2C", target="COL17A1/SERPINB3", **options),
    sf.tl.generate_morphology(data, source="MKI67/UBE2C", shift={"MKI67": -1.0}, **options),
    sf.tl.generate_morphology(data, source="MKI67/UBE2C", shift={"SERPINB3": 1.0}, **options),
]

sf.pl.morphology_dose(edits, return_fig=True).savefig(Path(__file__).parent / "doses.png", dpi=150)
