"""How data differ from what a model was trained on: what its scores, measured on the training data, do not cover."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from spatiaflow._settings import warn

if TYPE_CHECKING:
    from spatiaflow.models import Slide, STFlow

COVERAGE = 0.5  # of genes or channels; with this share or less a warning
DEPTH = 3.0  # times the counts of the training data, or one over it
MIN_IMAGES = 10  # of few, a third may differ by chance
BEYOND, OOD_SHARE = 0.95, 1 / 3  # share of rows with a higher out-of-domain score; .05 in training


def warn_of_difference(
    *,
    genes: tuple[int, int] | None = None,
    channels: tuple[int, int] | None = None,
    depth: tuple[float, float] | None = None,
    ood: np.ndarray | None = None,
    stains: tuple[np.ndarray, dict[str, list[float]]] | None = None,
) -> None:
    """Warn once of everything that differs, with both figures. What a model does not store is None and not compared.

    Parameters
    ----------
    genes, channels
        How many of the model's are in the data, and how many it has.
    depth
        Median counts of a row in the data, and what it was in training.
    ood
        Out-of-domain scores of the rows; NaN counts for nothing.
    stains
        Mean of each channel over the image of each row (n x channels), and by channel the 5, 50 and 95 % quantiles in training.
    """
    found = []
    for name, pair in (("genes", genes), ("channels", channels)):
        if pair is not None and pair[0] <= COVERAGE * pair[1]:
            found.append(f"they have {pair[0]} of its {pair[1]} {name}")
    if depth is not None and min(depth) > 0 and not 1 / DEPTH < depth[0] / depth[1] < DEPTH:
        found.append(f"a median of {depth[0]:.4g} counts per row, in training {depth[1]:.4g}")
    known = np.zeros(0) if ood is None else ood[np.isfinite(ood)]
    if len(known) and (share := float((known > BEYOND).mean())) > OOD_SHARE:
        found.append(
            f"{share:.0%} of the rows have an out-of-domain score above {BEYOND}, in training {1 - BEYOND:.0%}"
        )
    found += _other_stains(*stains) if stains is not None else []
    if found:
        warn(
            f"data differ from what the model was trained on: {'; '.join(found)}. Results can be worse than the model's scores "
            "say. Compare some with measured values, or train on data like these."
        )


def _other_stains(levels: np.ndarray, known: dict[str, list[float]]) -> list[str]:
    """Say which stain lies beyond the 5 or 95 % quantile of training in many rows, the worst one."""
    if len(levels) < MIN_IMAGES:
        return []
    ends = np.array([*known.values()])  # channels x quantiles
    shares = np.stack([(levels < ends[:, 0]).mean(0), (levels > ends[:, 2]).mean(0)])
    side, channel = np.unravel_index(shares.argmax(), shares.shape)
    if shares[side, channel] <= OOD_SHARE:
        return []
    name, now, then = list(known)[channel], np.median(levels[:, channel]), ends[channel, 1]
    return [
        f"the images of {shares[side, channel]:.0%} of the rows are {('darker', 'brighter')[side]} in {name!r} than 95% of those "
        f"in training (median {now:.2g}, in training {then:.2g} of the bright end)"
    ]


def stain_range(stain: dict[str, np.ndarray] | None) -> dict:
    """Entry ``"stain"`` of a model's encoder: lowest and highest quartile of each stain in the training slides."""
    if stain is None:
        return {}
    return {"stain": {name: [float(q[:, 0].min()), float(q[:, 2].max())] for name, q in stain.items()}}


def check_stain(stain: dict[str, np.ndarray] | None, model: STFlow) -> None:
    """Warn once where the median of a slide's stain lies outside of the quartiles of all training slides."""
    found = []
    for name, (low, high) in model.encoder.get("stain", {}).items() if stain is not None else ():
        medians = cast("dict", stain)[name][:, 1]
        far = medians[np.argmax(np.maximum(low - medians, medians - high))]
        if not low <= far <= high:
            found.append(f"a median of {far:.2f} of {name}, in training {low:.2f} to {high:.2f}")
    if found:
        warn(
            f"the stain differs from what the model was trained on (optical density: {'; '.join(found)}). Predictions can be "
            "worse. To compare: squidpy.experimental.im.normalize_stains(sdata, image_key, reference) brings a picture to the "
            "stain of a training slide, with reference = fit_stain_reference(..., method='reinhard'); then encode it again."
        )


def check_pitch(slides: list[Slide], model: STFlow) -> None:
    """Warn of slides whose spots are not as far apart as those the model was trained on."""
    for slide in slides:
        if len(slide) > 15 and abs(slide.pitch / model.pitch - 1) > 0.15:
            warn(
                f"spots of slide {slide.name!r} are {slide.pitch:.3g} µm apart; the model was trained at "
                f"{model.pitch:.3g} µm. Check mpp."
            )
