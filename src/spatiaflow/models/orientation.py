"""Images of cells laid alike: a cell has no up, so how it lies need not be learned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MIDDLE = 0.15  # of the side of an image: standard deviation of the window in which its long axis is looked for


def _steps() -> Tensor:
    """What each of the eight turns does to an offset (x, y): 8 x 2 x 2."""
    quarter, mirror = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.diag(torch.tensor([-1.0, 1.0]))
    turns = [torch.linalg.matrix_power(quarter, k % 4) for k in range(8)]
    return torch.stack([mirror @ turn if k >= 4 else turn for k, turn in enumerate(turns)])


STEPS = _steps()


def turned(x: Tensor, turns: np.ndarray) -> Tensor:
    """Images (n x C x p x p) each turned by a multiple of 90 degrees (turns % 4) and mirrored (turns >= 4)."""
    out = torch.empty_like(x)
    for k in np.unique(turns):
        which = torch.from_numpy(turns == k)
        one = torch.rot90(x[which], int(k) % 4, (2, 3))
        out[which] = one.flip(3) if k >= 4 else one
    return out


def turned_offsets(offset: Tensor, turns: np.ndarray) -> Tensor:
    """Offsets (n x k x 2; x, y) of what lies around images that :func:`turned` turns."""
    return torch.einsum("nkj,nij->nki", offset, STEPS.to(offset)[turns])


def back(turns: np.ndarray) -> np.ndarray:
    """Turns that undo these; a reflection is its own inverse."""
    return np.where(turns < 4, -turns % 4, turns)


def upright(images: Tensor) -> np.ndarray:
    """Turn of each image (n x C x p x p) that brings the long axis of what lies in its middle between 0 and 45 degrees."""
    x = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1] - 0.5
    x, y = x[None], -x[:, None]  # 1 x p and p x 1; rows go down
    middle = (-(x**2 + y**2) / (2 * MIDDLE**2)).exp()
    axis = middle * (x**2 - y**2 + 2 * x * y + 1e-3 * x)  # the last term tells one end of the axis from the other
    flat = images.mean(1, keepdim=True)
    found = [(turned(flat, np.full(len(flat), k)) * axis).flatten(1).sum(1) for k in range(8)]
    return torch.stack(found).argmax(0).cpu().numpy()
