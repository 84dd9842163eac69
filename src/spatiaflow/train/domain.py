"""What SPATIA remembers of its training cells, so that it can tell how far others are from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from spatiaflow.models.ood import Domain
from spatiaflow.models.preprocess import spread
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import Spatia

N_CELLS = 8000  # of all slides together
N_BANDS = 4  # of each of one or two slides: distances are measured between parts of tissue


@torch.inference_mode()
def fit_domains(model: Spatia, slides: Sequence[Slide]) -> dict[str, Domain]:
    """Statistics of the training cells by modality, see :meth:`spatiaflow.models.Spatia.inputs`.

    Parameters
    ----------
    slides
        Training slides in the model's genes and channels; cells inside their images.
    """
    groups = list(slides)
    if len(groups) < 3:
        groups = [band for slide in groups for band in slide.bands(N_BANDS) if len(band) > 1]
    device = next(model.network.parameters()).device
    values: dict[str, list[np.ndarray]] = {}
    for part in groups:
        part = part.take(spread(len(part), N_CELLS // len(groups)))
        found: dict[str, list[np.ndarray]] = {}
        for rows, crops in model.batches(part, 512):
            image, _ = model.tokens(replace(part, counts=None), None, rows, crops, device)
            for name, read in model.inputs(part, rows, image).items():
                found.setdefault(name, []).append(read)
        for name, some in found.items():
            values.setdefault(name, []).append(np.concatenate(some))
    return {name: Domain.fit(parts) for name, parts in values.items() if len(parts) > 1}
