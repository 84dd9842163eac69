"""Histology features without weights: the stains, nuclei and texture of an H&E patch.

Every statistic is a sum over the patch of something isotropic, so a patch that is turned by 90° or mirrored has the same
features. Lengths are in µm. Colour is optical density against a fixed white: staining is described, not removed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MPP = 1.0  # µm per pixel that patches are read at
PIXEL_MULTIPLE = 4  # wide smoothings are computed at a half and a quarter of the resolution

# optical density of hematoxylin, eosin and a residual in red, green, blue (Ruifrok and Johnston 2001), as in scikit-image
_STAINS = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1)
UNMIX = torch.linalg.inv(_STAINS)
_SCALES = (1.0, 1.5, 2.1, 3.0, 4.2, 6.0, 8.5, 12.0)  # µm; band i is what lies between scales i and i + 1
_NUCLEAR = 5  # bands below 6 µm: nuclei
_CENTRES = (4.0, 10.0)  # µm: a nucleus; a cell with its neighbours


def texture(patches: Tensor) -> Tensor:
    """Describe H&E patches.

    Parameters
    ----------
    patches
        n x 3 x h x w, 0 to 255, 1 µm per pixel; h and w are multiples of 4.

    Returns
    -------
    n x F float32, one column for each of :func:`names`.
    """
    if patches.shape[-2] % PIXEL_MULTIPLE or patches.shape[-1] % PIXEL_MULTIPLE:
        raise ValueError(f"sides of a patch must be multiples of {PIXEL_MULTIPLE} px, not {tuple(patches.shape[-2:])}.")
    return torch.stack(list(_features(patches).values()), 1)


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Names of the features, in the order of the columns."""
    return tuple(_features(torch.zeros(1, 3, 8, 8)))


def _features(patches: Tensor) -> dict[str, Tensor]:
    density = -torch.log10((patches.float() + 1) / 256)
    hematoxylin, eosin, residual = torch.einsum("nchw,cs->nshw", density, UNMIX.to(density)).unbind(1)
    smooth = _Smoother(patches.shape[-1])
    # nuclear scales stay at full resolution: nuclei are located in them
    levels = [smooth(hematoxylin, scale, whole=scale < 8) for scale in _SCALES]
    bands = _differences(levels)
    nuclear = torch.sigmoid((levels[0] - 0.2) / 0.02)
    return {
        **_colour(density, hematoxylin, eosin, smooth),
        **_scales("hematoxylin", bands, smooth),
        **_scales("eosin", _differences([smooth(eosin, scale) for scale in _SCALES]), smooth),
        **_nuclear_area(levels[0], nuclear, density, hematoxylin, eosin, smooth),
        **_nuclei(levels, bands, eosin, residual, smooth),
        **_centre(levels[0], nuclear, hematoxylin, eosin, bands),
        **_orientation("hematoxylin", levels[1], smooth),
        **_orientation("eosin", smooth(eosin, 1.5), smooth),
        **_patterns(patches),
    }


def _colour(density: Tensor, hematoxylin: Tensor, eosin: Tensor, smooth: _Smoother) -> dict[str, Tensor]:
    red, green, blue = density.unbind(1)
    out = {}
    for name, plane in zip(("red", "green", "blue", "hematoxylin", "eosin"), (red, green, blue, hematoxylin, eosin)):
        out[f"{name}_mean"], out[f"{name}_std"] = _mean(plane), _std(plane)
    out["hematoxylin_eosin_correlation"] = _correlation(hematoxylin, eosin)
    out["red_green_correlation"], out["red_blue_correlation"] = _correlation(red, green), _correlation(red, blue)
    grey = density.mean(1)
    out["tissue_fraction"] = _mean(torch.sigmoid((smooth(grey, 2.0) - 0.08) / 0.02))
    out["lumen_fraction"] = _mean(torch.sigmoid((0.08 - smooth(grey, 6.0)) / 0.02))  # and fat
    out["red_fraction"] = _mean(torch.sigmoid((eosin - 2 * hematoxylin - 0.15) / 0.05))  # blood, dense collagen
    return out


def _scales(name: str, bands: list[Tensor], smooth: _Smoother) -> dict[str, Tensor]:
    """Energy of each band, and energy of the bands of its envelope: how fine texture is clustered at coarser scales."""
    out = {}
    for scale, band in zip(_SCALES, bands):
        out[f"{name}_energy_{scale:g}um"] = torch.log(_std(band) + 1e-3)
    for scale, band in zip(_SCALES[:4], bands):
        envelope = band.abs()
        coarser = [coarse for coarse in (3.0, 6.0, 12.0, 24.0) if coarse >= 2 * scale]
        for coarse, ripple in zip(coarser, _differences([smooth(envelope, sigma) for sigma in coarser])):
            share = _mean(ripple.abs()) / (_mean(envelope) + 1e-3)
            out[f"{name}_envelope_{scale:g}um_{coarse:g}um"] = torch.log(share + 1e-2)
    return out


def _nuclear_area(
    fine: Tensor, nuclear: Tensor, density: Tensor, hematoxylin: Tensor, eosin: Tensor, smooth: _Smoother
) -> dict[str, Tensor]:
    """Area where hematoxylin is dense, its colour, outline and clumps, and the colour of the rest."""
    out = {}
    for threshold in (0.1, 0.15, 0.2, 0.3, 0.4):
        out[f"nuclear_fraction_{threshold:g}"] = _mean(torch.sigmoid((fine - threshold) / 0.02))
    inside, outside = _mean(nuclear) + 0.01, 1.01 - _mean(nuclear)
    for name, plane in zip(("red", "green", "blue", "eosin"), (*density.unbind(1), eosin)):
        out[f"nuclear_{name}"] = _mean(nuclear * plane) / inside
    for name, plane in zip(("red", "hematoxylin", "eosin"), (density[:, 0], hematoxylin, eosin)):
        out[f"stroma_{name}"] = _mean((1 - nuclear) * plane) / outside
    dx, dy = _gradient(nuclear)
    out["nuclear_outline"] = _mean((dx**2 + dy**2 + 1e-8).sqrt()) / inside  # long for small or ragged nuclei
    for sigma in (8.0, 16.0, 30.0):
        out[f"nuclear_clumps_{sigma:g}um"] = _std(smooth(nuclear, sigma))
    return out


def _nuclei(
    levels: list[Tensor], bands: list[Tensor], eosin: Tensor, residual: Tensor, smooth: _Smoother
) -> dict[str, Tensor]:
    """Nuclei as maxima of the hematoxylin bands: their density, and means over them."""
    contrast = torch.stack(bands[:_NUCLEAR]).amax(0)
    highest = F.max_pool2d(F.max_pool2d(contrast, (5, 1), 1, (2, 0)), (1, 5), 1, (0, 2))
    nuclei = (contrast >= highest) * torch.sigmoid((contrast - 0.03) / 0.006)
    found = {
        "hematoxylin_1um": levels[0],
        "hematoxylin_2um": levels[2],
        "hematoxylin_4um": levels[4],
        "eosin_3um": smooth(eosin, 3.0),
        "eosin_6um": smooth(eosin, 6.0),
        "residual_2um": smooth(residual, 2.0),
        "contrast": contrast,
        "energy_1um": bands[0] ** 2,
        "band_1.5um": bands[1],
        "coherence_3um": _coherence(levels[1], 3.0, smooth)[1],
        "coherence_12um": _coherence(levels[1], 12.0, smooth)[1],
        "log_neighbors": torch.log(smooth(nuclei, 15.0) * 1e4 + 0.5),
    }
    out = {"nuclei_log_density": torch.log(_mean(nuclei) * 1e4 / MPP**2 + 0.2)}
    for name, plane in found.items():
        weight = _pool(nuclei, nuclei.shape[-1] // plane.shape[-1])  # planes of wide scales are coarser
        out[f"nuclei_{name}"] = (_mean(weight * plane) + 2e-5 * _mean(plane)) / (_mean(weight) + 2e-5)
    return out


def _centre(
    fine: Tensor, nuclear: Tensor, hematoxylin: Tensor, eosin: Tensor, bands: list[Tensor]
) -> dict[str, Tensor]:
    """The cell at the centre against the patch."""
    dense = torch.sigmoid((fine - 0.4) / 0.02)
    planes = {"hematoxylin": hematoxylin, "eosin": eosin, "nuclear": nuclear, "dense": dense}
    out = {}
    for sigma in _CENTRES:
        if sigma == _CENTRES[0]:
            own = planes | {f"band_{scale:g}um": band for scale, band in zip(_SCALES[:_NUCLEAR], bands)}
        else:
            own = planes
        window = _centre_window(tuple(fine.shape[-2:]), sigma).to(fine)
        for name, plane in own.items():
            out[f"centre_{sigma:g}um_{name}"] = (plane * window).sum((-2, -1)) - _mean(plane)
    return out


def _orientation(name: str, plane: Tensor, smooth: _Smoother) -> dict[str, Tensor]:
    """Energy of the gradient, and whether gradients agree in direction over 6 and 20 µm, as in fibres."""
    dx, dy = _gradient(plane)
    out = {f"{name}_gradient": torch.log(_mean(dx**2 + dy**2) + 1e-6)}
    for sigma in (6.0, 20.0):
        out[f"{name}_coherence_{sigma:g}um"] = _coherence(plane, sigma, smooth)[0]
    return out


def _patterns(patches: Tensor) -> dict[str, Tensor]:
    """Histograms of rotation-invariant uniform local binary patterns of the optical density, at radius 2 and 4 µm.

    In integers, so that no comparison depends on the last bit of a float.
    """
    thousandths = torch.round(-1000 / 3 * torch.log10((torch.arange(256, device=patches.device) + 1) / 256))
    grey = F.pad(thousandths[patches.long()].sum(1)[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    grey = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    grey = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    half = grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]
    out = {}
    for radius, plane, margin in ((2, grey, 160), (4, half, 640)):  # a density of 0.01 times the weights summed
        h, w = plane.shape[1:]
        padded = F.pad(plane[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
        ring = ((-2, 0), (-2, 2), (0, 2), (2, 2), (2, 0), (2, -2), (0, -2), (-2, -2))
        denser = [padded[:, 2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w] > plane + margin for dy, dx in ring]
        count: Any = sum(bit.to(torch.uint8) for bit in denser)
        changes: Any = sum((a ^ b).to(torch.uint8) for a, b in zip(denser, denser[1:] + denser[:1]))
        code = torch.where(changes <= 2, count, torch.full_like(count, 9))  # 9: denser neighbours in several runs
        for value in range(10):
            out[f"pattern_{radius}um_{value}"] = _mean((code == value).float()).sqrt()
    return out


class _Smoother:
    """Gaussian smoothing by a width in µm, at the resolution that the width needs: whole, a half or a quarter."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, plane: Tensor, sigma: float, whole: bool = False) -> Tensor:
        has = self.width // plane.shape[-1]
        takes = max(has, 1 if whole or sigma < 3 else 2 if sigma < 8 else 4)
        rows, columns = (_blur_matrix(size, sigma / MPP / has, takes // has).to(plane) for size in plane.shape[-2:])
        return rows @ plane @ columns.T


@lru_cache(maxsize=256)
def _blur_matrix(size: int, sigma: float, shrink: int) -> Tensor:
    """Gaussian smoothing of a line and the mean of every ``shrink`` pixels, as a matrix; the ends are mirrored."""
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    source = (torch.arange(size)[:, None] + offsets) % (2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1))
    return matrix.unflatten(0, (size // shrink, shrink)).mean(1).float()


@lru_cache(maxsize=32)
def _centre_window(shape: tuple[int, int], sigma: float) -> Tensor:
    y, x = (torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) * MPP / sigma) ** 2) for size in shape)
    window = y[:, None] * x
    return window / window.sum()


def _differences(levels: list[Tensor]) -> list[Tensor]:
    """Bands between a plane's successive smoothings, each at the resolution of the coarser one."""
    return [_pool(a, a.shape[-1] // b.shape[-1]) - b for a, b in zip(levels, levels[1:])]


def _coherence(plane: Tensor, sigma: float, smooth: _Smoother) -> tuple[Tensor, Tensor]:
    """How parallel the gradients within ``sigma`` are, 0 to 1: of the patch (weighted by energy), and at each place."""
    dx, dy = _gradient(plane)
    xx, yy, xy = (smooth(product, sigma) for product in (dx * dx, dy * dy, dx * dy))
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
