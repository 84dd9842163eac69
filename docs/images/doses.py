"""Draw ``doses.png`` of docs/morphology.md: a fibroblast of the pancreas towards another state, and with more of two genes.

python docs/images/doses.py     # the bundled weights and the public region (or settings.mirror); a minute
"""

from pathlib import Path

import anndata as ad
import numpy as np

import spatiaflow as sf

data = sf.datasets.xenium_pancreas()
table, model = data["table"], sf.models.load(sf.datasets.weights("morphology-pancreas-genes"))
states = np.array(model.states(table[:, model.states.genes].X), dtype=str)
cells = list(table.obs_names[states == "SFRP4/LTBP2"][:40])
options = {"model": model, "cells": cells, "source": "SFRP4/LTBP2", "dose": [0, 0.25, 0.5, 0.75, 1]}
edits = [
    sf.tl.generate_morphology(data, **options, **edit)
    for edit in ({"target": "COL5A2/THBS2"}, {"shift": {"CFTR": 1.0}}, {"shift": {"PECAM1": 1.0}})
]
both = ad.concat(edits, uns_merge="first", index_unique="-")
figure = sf.pl.morphology_dose(both, cell=cells[7], return_fig=True)
figure.savefig(Path(__file__).parent / "doses.png", dpi=150)
