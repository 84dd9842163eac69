"""Turn images of cells to a canonical orientation. Cells have no preferred orientation, so models need not learn it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WINDOW = 0.15  # standard deviation of the window in which the long axis is found, as a fraction of the image side


def _steps() -> Tensor:
    """Return the matrix of each of the eight turns for offsets (x, y): 8 x 2 x 2."""
    quarter, mirror = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.diag(torch.tensor([-1.0, 1.0]))
    turns = [torch.linalg.matrix_power(quarter, k % 4) for k in range(8)]
    return torch.stack([mirror @ turn if k >= 4 else turn for k, turn in enumerate(turns)])


STEPS = _steps()


def turned(x: Tensor, turns: np.ndarray) -> Tensor:
    """Turn each image (n x C x p x p) by a multiple of 90 degrees (turns % 4) and mirror it (turns >= 4)."""
    out = torch.empty_like(x)
    for k in np.unique(turns):
        which = torch.from_numpy(turns == k)
        one = torch.rot90(x[which], int(k) % 4, (2, 3))
        out[which] = one.flip(3) if k >= 4 else one
    return out


def turned_offsets(offset: Tensor, turns: np.ndarray) -> Tensor:
    """Turn offsets around images (n x k x 2; x, y) in the way in which :func:`turned` turns the images."""
    return torch.einsum("nkj,nij->nki", offset, STEPS.to(offset)[turns])


def inverse(turns: np.ndarray) -> np.ndarray:
    """Return the inverse turns. A reflection is its own inverse."""
    return np.where(turns < 4, -turns % 4, turns)


def canonical(images: Tensor) -> np.ndarray:
    """Return the turn of each image (n x C x p x p) that brings the long axis of its central object between 0 and 45 degrees."""
    x = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1] - 0.5
    x, y = x[None], -x[:, None]  # 1 x p and p x 1; rows go down
    window = (-(x**2 + y**2) / (2 * WINDOW**2)).exp()
    axis = window * (x**2 - y**2 + 2 * x * y + 1e-3 * x)  # the last term distinguishes the two ends of the axis
    flat = images.mean(1, keepdim=True)
    scores = [(turned(flat, np.full(len(flat), k)) * axis).flatten(1).sum(1) for k in range(8)]
    return torch.stack(scores).argmax(0).cpu().numpy()
