"""Weight-free features of H&E patches: colour, unmixed stains, nuclei as blobs, and texture. No direction is preferred."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

MPP = 1.0  # µm per pixel that patches are read at
# optical density of hematoxylin, eosin and a residual (Ruifrok and Johnston 2001), rows of unit length
_STAINS = F.normalize(torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]]), dim=1)
_UNMIX = torch.linalg.inv(_STAINS)
_SCALES = (1.0, 1.5, 2.1, 3.0, 4.2, 6.0, 8.5, 12.0)  # µm; nuclei are 2-4, their clusters above


@cache
def _blur_matrix(size: int, sigma: float) -> Tensor:
    """Gaussian blur of a line as a matrix, mirrored at the ends: exact, symmetric, and one product an axis."""
    reach = max(1, math.ceil(4 * sigma))
    t = torch.arange(-reach, reach + 1)
    weight = torch.exp(-0.5 * (t.double() / sigma) ** 2)
    index = (torch.arange(size)[:, None] + t) % (2 * size)
    index = torch.where(index >= size, 2 * size - 1 - index, index)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, index, (weight / weight.sum()).expand(size, -1)).float()


def _blur(x: Tensor, sigma: float) -> Tensor:
    return _blur_matrix(x.shape[-2], sigma) @ x @ _blur_matrix(x.shape[-1], sigma).T


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (p[..., 1:-1, 2:] - p[..., 1:-1, :-2]) / 2, (p[..., 2:, 1:-1] - p[..., :-2, 1:-1]) / 2


def texture(patches: Tensor) -> Tensor:
    """Return features (n x 116) of RGB patches (uint8, n x 3 x h x w) at 1 µm per pixel.

    Unchanged when a patch is turned by 90° or mirrored.
    """
    x = patches.float()
    h, w = x.shape[-2:]
    density = -torch.log10((x + 1) / 256)  # against a fixed white
    stains = torch.einsum("nchw,cs->nshw", density, _UNMIX)
    hematoxylin, eosin, total = stains[:, 0], stains[:, 1], density.mean(1)
    y, z = ((torch.arange(size) - (size - 1) / 2) * MPP for size in (h, w))
    radius2 = y[:, None] ** 2 + z[None] ** 2
    windows = [torch.exp(-0.5 * radius2 / r**2) for r in (8.0, 20.0)]  # the cell at the centre, and its surroundings
    windows = [k / k.sum() for k in windows]
    out = []

    def mean(m: Tensor) -> Tensor:
        return m.mean((-1, -2))

    def at_centre(m: Tensor, average: Tensor) -> None:
        out.extend((m * k).sum((-1, -2)) - average for k in windows)

    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    for m in (*density.unbind(1), hematoxylin, eosin):
        average, spread = mean(m), m.std((-1, -2)) + 1e-3
        out += [average, spread, mean((m - average[:, None, None]) ** 3) / spread**3]
        out += list(torch.quantile(m.flatten(1), quantiles, dim=1))
        at_centre(m, average)
    out.append(mean(hematoxylin * eosin) - mean(hematoxylin) * mean(eosin))
    out.append(mean(torch.sigmoid((_blur(total, 2 / MPP) - 0.08) / 0.02)))  # tissue, not glass
    out.append(mean(torch.sigmoid((0.08 - _blur(total, 6 / MPP)) / 0.02)))  # lumen and fat

    levels = {}
    for name, m in (("hematoxylin", hematoxylin), ("eosin", eosin)):
        levels[name] = g = [_blur(m, s / MPP) for s in _SCALES]
        for fine, coarse in zip(g, g[1:]):
            band = fine - coarse
            spread = band.std((-1, -2)) + 1e-3
            out += [torch.log(spread), mean(band**3) / spread**3]
    g = levels["hematoxylin"]
    for fine, coarse in ((1, 4), (3, 6)):  # nuclei: maxima of the blob response at two sizes
        band = g[fine] - g[coarse]
        peak = ((band >= F.max_pool2d(band[:, None], 5, 1, 2)[:, 0]) & (band > 0.03)).float()
        count = peak.sum((-1, -2))
        level = (g[fine] * peak).sum((-1, -2)) / (count + 1)
        out += [torch.log(count / (h * w * MPP**2) * 1e4 + 1), level, (band * peak).sum((-1, -2)) / (count + 1)]
    for threshold in (0.15, 0.2, 0.3, 0.4):
        nuclei = torch.sigmoid((g[0] - threshold) / 0.02)
        share = mean(nuclei)
        out.append(share)
        at_centre(nuclei, share)
        if threshold == 0.2:
            dx, dy = _gradient(nuclei)
            out.append(
                mean((dx**2 + dy**2 + 1e-12).sqrt()) / (share + 0.01)
            )  # outline per area: small or ragged nuclei
            out.append(mean(nuclei * eosin) / (share + 0.01))
            out.append(mean((1 - nuclei) * eosin) / (1.01 - share))
            out += [_blur(nuclei, s / MPP).std((-1, -2)) for s in (8.0, 16.0)]  # crowding
    for m in (g[1], levels["eosin"][1]):  # fibres: do gradients within 6 and 20 µm agree in direction?
        dx, dy = _gradient(m)
        out.append(torch.log(mean(dx**2 + dy**2) + 1e-6))
        for s in (6.0, 20.0):
            a, b, c = (_blur(v, s / MPP) for v in (dx * dx, dy * dy, dx * dy))
            out.append(mean(((a - b) ** 2 + 4 * c**2 + 1e-12).sqrt()) / (mean(a + b) + 1e-6))
    return torch.stack(out, 1)
