"""What a network sees of a slide: its crops in the model's channels and scale, its genes in the vocabulary, standardised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from spatiaflow.models.slide import CropReader, Slide

if TYPE_CHECKING:
    from spatiaflow.models.spatia import SpatiaConfig


SEEN = -0.5, 2.0  # what a model sees of pixels, background 0 and bright end 1


def scaled(crops: Tensor, intensity: np.ndarray, places: np.ndarray) -> Tensor:
    """Crops in the model's channels, background 0 and bright end 1.

    Parameters
    ----------
    crops
        n x slide channels x p x p, any dtype; or the channels of several crops one after the other.
    intensity
        Background and bright end of each slide channel.
    places
        For each channel of the model its place on the slide, or -1: missing, left at 0.
    """
    low, high = (torch.from_numpy(np.asarray(v, np.float32))[:, None, None] for v in intensity.T)
    x = ((crops.float().unflatten(1, (-1, len(low))) - low) / (high - low)).clamp(*SEEN)  # n x crops x channels x p x p
    out = x.new_zeros(*x.shape[:2], len(places), *x.shape[3:])
    have = np.flatnonzero(places >= 0)
    out[:, :, have] = x[:, :, places[have]]
    return out.flatten(1, 2)


def beyond(crops: Tensor, intensity: np.ndarray, places: np.ndarray) -> Tensor:
    """By how much pixels are brighter or darker than :func:`scaled` lets a model see, n x model channels x p x p; mostly 0."""
    low, high = (torch.from_numpy(np.asarray(v, np.float32))[:, None, None] for v in intensity.T)
    x = crops.float()
    return (x - x.clamp(*(low + end * (high - low) for end in SEEN)))[:, places]


def unscaled(
    x: Tensor, intensity: Mapping[str, Sequence[float]], channels: Sequence[str], dtype: np.dtype,
    cut: Tensor | None = None,
) -> np.ndarray:  # fmt: skip
    """Images of a model in the scale and type of a slide: what :func:`scaled` undoes.

    Parameters
    ----------
    x
        ... x channels x p x p, background 0 and bright end 1.
    intensity
        Background and bright end of each channel by name.
    dtype
        Whole numbers are rounded and clipped; everything else becomes float32.
    cut
        What :func:`beyond` found, to be given back.
    """
    low, high = np.array([intensity[name] for name in channels]).T[:, :, None, None]
    values = x.numpy() * (high - low) + low
    if cut is not None:
        values = values + cut.numpy()
    if np.issubdtype(dtype, np.integer):
        return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)
    return values.astype(np.float32)


def intensity_of(slides: Sequence[Slide], channels: Sequence[str]) -> dict[str, list[float]]:
    """Return background and bright end of each channel of a model: medians over the slides that have it.

    Crops of the slides are matched with the channels, see :meth:`spatiaflow.pp.Crops.matched`.
    """
    out = {}
    for i, name in enumerate(channels):
        crops = [s.crops for s in slides if s.crops is not None and s.crops.places[i] >= 0]
        if crops:
            out[name] = [float(v) for v in np.median([c.range[c.places[i]] for c in crops], 0)]
    return out


def stain_levels(slides: Sequence[Slide], rows: np.ndarray) -> np.ndarray:
    """Mean of each channel of a model over the crops of some cells, n x channels: background 0, bright end 1.

    Crops of the slides are matched with the channels. ``rows`` are places among the cells of all slides, one slide after the
    other. Of many that are inside their image 2,000 are read.
    """
    first = np.cumsum([0, *map(len, slides)])
    rows = np.unique(rows)
    rows = rows[np.concatenate([slide.crops.inside for slide in slides])[rows]]
    rows, found = rows[spread(len(rows), 2000)], []
    for slide, start, end in zip(slides, first, first[1:]):
        own = rows[(rows >= start) & (rows < end)] - start
        if len(own):
            found += [
                scaled(crops, slide.crops.range, slide.crops.places).mean((2, 3)).numpy()
                for _, crops in slide.crops.batches(512, own)
            ]
    return np.concatenate(found) if found else np.zeros((0, len(slides[0].crops.places)), np.float32)


def gene_standard(
    counts: sparse.csr_matrix, measured: np.ndarray, target_sum: float, usual: np.ndarray | None = None
) -> np.ndarray:
    """How a slide's genes are standardised, 3 x genes, float32.

    Parameters
    ----------
    counts
        Of its cells, n x genes.
    measured
        Genes on its panel, bool.
    usual
        What the training data have; few cells lean on it, as if 50 of its cells were among them.

    Returns
    -------
    Mean and deviation of log1p(counts per ``target_sum``), and the log of the share of all counts.
    """
    counts = sparse.csr_matrix(counts, dtype=np.float64)
    n, total = counts.shape[0], np.asarray(counts.sum(1))
    values = counts.multiply(target_sum / np.maximum(total, 1)).tocsr().log1p()
    centre, square = (np.asarray(v.sum(0)).ravel() / max(n, 1) for v in (values, values.multiply(values)))
    share = (np.asarray(counts.sum(0)).ravel() + 0.5) / max(total.sum(), 1)
    if usual is not None:
        own = n / (n + 50)
        centre, square, share = (
            own * now + (1 - own) * known
            for now, known in ((centre, usual[0]), (square, usual[0] ** 2 + usual[1] ** 2), (share, np.exp(usual[2])))
        )
    spread = np.sqrt(np.maximum(square - centre**2, 0))
    out = np.stack([centre, np.where(spread < 1e-3, 1.0, spread), np.log(share)])
    return np.where(measured, out, [[0.0], [1.0], [0.0]]).astype(np.float32)


def standard_of(slide: Slide, target_sum: float, usual: np.ndarray | None = None) -> np.ndarray | None:
    """How the genes of a slide are standardised by its own cells, see :func:`gene_standard`; None without counts.

    Cells on glass and cells without any counts are left out.
    """
    if slide.counts is None:
        return None
    stored, rows = not sparse.issparse(slide.counts), np.flatnonzero(slide.on_tissue)
    counts = slide.counts[rows[spread(len(rows), 4000)] if stored else rows]
    return gene_standard(counts[np.asarray(counts.sum(1)).ravel() > 0], slide.measured, target_sum, usual)


def pooled_standard(standards: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Mean and deviation of several slides together, from those of each (:func:`gene_standard`), weighted by their cells."""
    found, weight = np.stack(standards).astype(np.float64), np.asarray(sizes, float)
    centre, square, share = (
        np.average(values, axis=0, weights=weight)
        for values in (found[:, 0], found[:, 1] ** 2 + found[:, 0] ** 2, np.exp(found[:, 2]))
    )
    return np.stack([centre, np.sqrt(np.maximum(square - centre**2, 1e-6)), np.log(share)]).astype(np.float32)


def usual_depth(slides: Sequence[Slide]) -> float:
    """Median counts of a cell, at least 1; 1 without counts."""
    depth = [np.asarray(s.counts[spread(len(s), 4000)].sum(1)).ravel() for s in slides if s.counts is not None]
    return max(float(np.median(np.concatenate(depth))), 1.0) if depth else 1.0


def spread(n: int, most: int) -> np.ndarray:
    """At most ``most`` evenly spaced rows of ``n``."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


def in_vocabulary(slide: Slide, config: SpatiaConfig, channels: Mapping[str, str] | None = None) -> Slide:
    """The slide with a model's genes and channels. What the slide lacks is masked.

    Parameters
    ----------
    channels
        The model's names of channels that the image calls otherwise.
    """
    crops = slide.crops
    if crops is not None:
        crops = crops.matched(config.channels, channels, slide.name)
    slide = slide.align(config.genes)
    measured = np.zeros(0, bool) if slide.measured is None else slide.measured
    return replace(slide, crops=crops, measured=measured)


def relative_scale(crops: CropReader, rows: np.ndarray, c: SpatiaConfig) -> Tensor:
    """Size of a pixel of some crops over the usual one, n."""
    if not c.adaptive:
        return torch.ones(len(rows))
    return torch.from_numpy(crops.scale[rows] * c.crop_pixels / c.crop_um).float()


def full(parts: Iterator[tuple[np.ndarray, Tensor]], size: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Join parts (rows, crops) to batches of one size: for each new size convolutions are planned, and kept, anew."""
    held, n = [], 0
    for part in parts:
        held.append(part)
        n += len(part[0])
        if n >= size:
            rows, crops = np.concatenate([r for r, _ in held]), torch.cat([x for _, x in held])
            yield rows[:size], crops[:size]
            held, n = [(rows[size:], crops[size:])], n - size
    if n:
        yield np.concatenate([r for r, _ in held]), torch.cat([x for _, x in held])
