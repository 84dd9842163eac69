"""Histology features without weights: stain colour, nuclei and texture of an H&E patch.

Every statistic is a sum over the patch of something isotropic, so rotating by 90 degrees or mirroring the patch changes
nothing. Lengths are in micrometres. Colour is optical density against a fixed white: staining is described, not removed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

PIXEL_MULTIPLE = 4  # the coarsest of the three resolutions below, in pixels

# optical density of hematoxylin, eosin and a residual in red, green, blue: Ruifrok and Johnston 2001, as in scikit-image
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64)
_UNMIX = torch.linalg.inv(_STAINS / _STAINS.norm(dim=1, keepdim=True)).float()

_SCALES = (1.0, 1.5, 2.1, 3.0, 4.2, 6.0, 8.5, 12.0)  # µm; band i lies between scales i and i + 1
_NUCLEAR_DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4)  # of hematoxylin


def texture_features(patches: Tensor, um_per_px: float = 1.0) -> tuple[Tensor, list[str]]:
    """Describe H&E patches.

    Parameters
    ----------
    patches
        n x 3 x H x W, 0 to 255, float; H and W are multiples of 4.
    um_per_px
        Micrometres per pixel; made for about 1.

    Returns
    -------
    Features (n x F) and their names.
    """
    density = -torch.log10((patches + 1) / 256)
    stains = torch.einsum("nchw,cs->nshw", density, _UNMIX.to(patches))
    hematoxylin, eosin, residual = stains.unbind(1)
    grey = density.mean(1)
    smooth = _Smoother(patches.shape[-1], um_per_px)
    out: dict[str, Tensor] = {}

    # colour
    for name, plane in zip(("red", "green", "blue", "hematoxylin", "eosin"), (*density.unbind(1), hematoxylin, eosin)):
        out[f"{name}_mean"], out[f"{name}_std"] = _mean(plane), _std(plane)
    out["hematoxylin_eosin_correlation"] = _correlation(hematoxylin, eosin)
    out["red_green_correlation"] = _correlation(density[:, 0], density[:, 1])
    out["red_blue_correlation"] = _correlation(density[:, 0], density[:, 2])
    out["tissue_fraction"] = _mean(torch.sigmoid((smooth(grey, 2.0) - 0.08) / 0.02))
    out["lumen_fraction"] = _mean(torch.sigmoid((0.08 - smooth(grey, 6.0)) / 0.02))
    out["blood_fraction"] = _mean(torch.sigmoid((eosin - 2 * hematoxylin - 0.15) / 0.05))

    # energy per scale, and the energy of its envelope: how a texture of one scale is clustered at coarser ones
    levels = [smooth(hematoxylin, scale, whole=scale < 8) for scale in _SCALES]
    hematoxylin_bands = _differences(levels)
    for name, bands in (
        ("hematoxylin", hematoxylin_bands),
        ("eosin", _differences([smooth(eosin, scale) for scale in _SCALES])),
    ):
        for i, (scale, band) in enumerate(zip(_SCALES, bands)):
            out[f"{name}_energy_{scale:g}um"] = torch.log(_std(band) + 1e-3)
            if i < 4:
                envelope = band.abs()
                level = _mean(envelope) + 1e-3
                coarser = [coarse for coarse in (3.0, 6.0, 12.0, 24.0) if coarse >= 2 * scale]
                for coarse, ripple in zip(coarser, _differences([smooth(envelope, width) for width in coarser])):
                    out[f"{name}_envelope_{scale:g}um_{coarse:g}um"] = torch.log(_mean(ripple.abs()) / level + 1e-2)

    # nuclear area: its colour, its outline, its clumps, and what surrounds it
    fine = levels[0]
    for threshold in _NUCLEAR_DENSITIES:
        out[f"nuclear_fraction_{threshold:g}"] = _mean(torch.sigmoid((fine - threshold) / 0.02))
    nuclear = torch.sigmoid((fine - 0.2) / 0.02)
    inside, outside = _mean(nuclear) + 0.01, 1.01 - _mean(nuclear)
    for name, plane in zip(("red", "green", "blue", "eosin"), (*density.unbind(1), eosin)):
        out[f"nuclear_{name}"] = _mean(nuclear * plane) / inside
    for name, plane in (("red", density[:, 0]), ("hematoxylin", hematoxylin), ("eosin", eosin)):
        out[f"stroma_{name}"] = _mean((1 - nuclear) * plane) / outside
    dx, dy = _gradient(nuclear)
    out["nuclear_outline"] = _mean((dx**2 + dy**2 + 1e-8).sqrt()) / inside
    for scale in (8.0, 16.0, 30.0):
        out[f"nuclear_clumps_{scale:g}um"] = _std(smooth(nuclear, scale))

    # nuclei as maxima of the hematoxylin bands: how many, and the mean nucleus
    contrast = torch.stack(hematoxylin_bands[:5]).amax(0)
    highest = F.max_pool2d(F.max_pool2d(contrast, (5, 1), 1, (2, 0)), (1, 5), 1, (0, 2))
    nuclei = (contrast >= highest) * torch.sigmoid((contrast - 0.03) / 0.006)
    out["nuclei_log_density"] = torch.log(_mean(nuclei) * 1e4 / um_per_px**2 + 0.2)
    at_nuclei = {
        "hematoxylin_1um": fine,
        "hematoxylin_2um": levels[2],
        "hematoxylin_4um": levels[4],
        "eosin_3um": smooth(eosin, 3.0),
        "eosin_6um": smooth(eosin, 6.0),
        "residual_2um": smooth(residual, 2.0),
        "contrast": contrast,
        "band_1um": hematoxylin_bands[0] ** 2,
        "band_1.5um": hematoxylin_bands[1],
        "coherence_3um": _coherence(levels[1], 3.0, smooth)[1],
        "coherence_12um": _coherence(levels[1], 12.0, smooth)[1],
        "log_neighbors": torch.log(smooth(nuclei, 15.0) * 1e4 / um_per_px**2 + 0.5),
    }
    for name, plane in at_nuclei.items():
        weight = _pool(nuclei, nuclei.shape[-1] // plane.shape[-1])  # planes of wide scales are coarser
        out[f"nuclei_{name}"] = (_mean(weight * plane) + 2e-5 * _mean(plane)) / (_mean(weight) + 2e-5)

    # orientation: energy of the gradient, and how parallel gradients are over 6 and 20 µm (fibres)
    for name, plane in (("hematoxylin", levels[1]), ("eosin", smooth(eosin, 1.5))):
        dx, dy = _gradient(plane)
        out[f"{name}_gradient"] = torch.log(_mean(dx**2 + dy**2) + 1e-6)
        for scale in (6.0, 20.0):
            out[f"{name}_coherence_{scale:g}um"] = _coherence(plane, scale, smooth)[0]

    for radius, patterns in zip((2, 4), local_binary_patterns(patches)):
        out.update({f"pattern_{radius}px_{i}": patterns[:, i].sqrt() for i in range(10)})
    return torch.stack(list(out.values()), 1), list(out)


def local_binary_patterns(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Histograms (n x 10) of rotation-invariant uniform local binary patterns of the optical density, radius 2 and 4 px.

    In integers, so that a comparison never hangs on the last bit of a float: flips and batches leave it as it is.
    """
    levels = torch.round(-1000 / 3 * torch.log10((torch.arange(256, device=patches.device) + 1) / 256))
    grey = levels[patches.round().long().clamp_(0, 255)].sum(1)
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    grey = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    grey = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    half = grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]
    return _pattern_histogram(grey, margin=160), _pattern_histogram(half, margin=640)  # a density of 0.01


def _pattern_histogram(grey: Tensor, margin: int) -> Tensor:
    """Count, at each pixel, the neighbours at distance 2 that are denser; 9 where they are in more than one run."""
    h, w = grey.shape[1:]
    padded = F.pad(grey[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
    ring = ((-2, 0), (-2, 2), (0, 2), (2, 2), (2, 0), (2, -2), (0, -2), (-2, -2))
    denser = [padded[:, 2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w] > grey + margin for dy, dx in ring]
    count = sum(bit.to(torch.uint8) for bit in denser)
    changes = sum((a ^ b).to(torch.uint8) for a, b in zip(denser, denser[1:] + denser[:1]))
    code = torch.where(changes <= 2, count, torch.full_like(count, 9))
    return torch.stack([_mean((code == value).float()) for value in range(10)], 1)


class _Smoother:
    """Gaussian smoothing by a width in µm, at the resolution that the width needs: whole, a half or a quarter."""

    def __init__(self, width: int, um_per_px: float):
        self.width, self.um_per_px = width, um_per_px

    def __call__(self, plane: Tensor, sigma: float, whole: bool = False) -> Tensor:
        has = self.width // plane.shape[-1]
        takes = max(has, 1 if whole or sigma < 3 else 2 if sigma < 8 else 4)
        sigma = sigma / self.um_per_px / has
        rows, columns = (_blur_matrix(size, sigma, takes // has).to(plane) for size in plane.shape[-2:])
        return rows @ plane @ columns.T


@lru_cache(maxsize=256)
def _blur_matrix(size: int, sigma: float, shrink: int) -> Tensor:
    """Gaussian smoothing along one axis and the mean of every ``shrink`` pixels as a matrix, the border mirrored."""
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
    return matrix.unflatten(0, (size // shrink, shrink)).mean(1).float()


def _differences(levels: list[Tensor]) -> list[Tensor]:
    """Bands between a plane's successive smoothings, each at the resolution of the coarser one."""
    return [_pool(a, a.shape[-1] // b.shape[-1]) - b for a, b in zip(levels, levels[1:])]


def _coherence(plane: Tensor, scale: float, smooth: _Smoother) -> tuple[Tensor, Tensor]:
    """How parallel the gradients are over ``scale`` µm, 0 to 1: the patch's value (weighted by energy), and the map."""
    dx, dy = _gradient(plane)
    xx, yy, xy = (smooth(product, scale) for product in (dx * dx, dy * dy, dx * dy))
    parallel, energy = ((xx - yy) ** 2 + 4 * xy**2 + 1e-12).sqrt(), xx + yy
    return _mean(parallel) / (_mean(energy) + 1e-6), parallel / (energy + 1e-5)


def _gradient(plane: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(plane[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def _pool(plane: Tensor, factor: int) -> Tensor:
    return plane if factor == 1 else F.avg_pool2d(plane[:, None], factor)[:, 0]


def _mean(plane: Tensor) -> Tensor:
    return plane.mean((-2, -1))


def _std(plane: Tensor) -> Tensor:
    return (plane - plane.mean((-2, -1), keepdim=True)).square().mean((-2, -1)).sqrt()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    covariance = _mean(a * b) - _mean(a) * _mean(b)
    return covariance / ((_std(a) + 1e-2) * (_std(b) + 1e-2))
