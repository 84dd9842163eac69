"""Flow matching: the straight path, samplers along it, and time features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def interpolate(y0: Tensor, y1: Tensor, t: Tensor | float) -> Tensor:
    """Return y_t = (1 - t) y_0 + t y_1, the straight path from prior to data."""
    return (1 - t) * y0 + t * y1


def velocity(y_t: Tensor, endpoint: Tensor, t: Tensor | float) -> Tensor:
    """Return the velocity (y_1 - y_t) / (1 - t) towards an endpoint y_1 that was predicted at time t < 1."""
    return (endpoint - y_t) / (1 - t)


def schedule(n_steps: int, kind: str = "uniform") -> list[float]:
    """Return the times at which the network is evaluated.

    Parameters
    ----------
    n_steps
        Number of evaluations.
    kind
        ``"uniform"``: s / S for s = 0..S-1, as in the paper. ``"released"``: the first S - 1 points of linspace(0.01, 1, S), one
        evaluation less, as in the authors' code.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, not {n_steps}.")
    if kind == "uniform":
        return [s / n_steps for s in range(n_steps)]
    if kind == "released":
        if n_steps < 2:
            raise ValueError("the released schedule needs n_steps >= 2.")
        return torch.linspace(0.01, 1, n_steps).tolist()[:-1]
    raise ValueError(f"schedule must be 'uniform' or 'released', not {kind!r}.")


def sample(endpoint: Callable[[Tensor, float], Tensor], y: Tensor, times: list[float]) -> Tensor:
    """Integrate from draws ``y`` of the prior by Euler steps, and return the last predicted endpoint.

    Parameters
    ----------
    endpoint
        ``endpoint(y_t, t)`` predicts y_1.
    y
        Draws from the prior, n x genes.
    times
        Increasing evaluation times in [0, 1), from :func:`schedule`.
    """
    for t, t_next in zip(times, [*times[1:], None]):
        y_1 = endpoint(y, t)
        if t_next is None:
            return y_1
        y = y + (t_next - t) * velocity(y, y_1, t)
    raise ValueError("times is empty.")


def time_features(t: Tensor, n: int = 256, scale: float = 1000.0) -> Tensor:
    """Return sinusoidal features (len(t) x n) of times in [0, 1].

    ``scale=1000`` spreads the phases, so that similar times have different features. The authors' code uses 1, which keeps all
    phases within one radian.
    """
    rate = torch.exp(torch.arange(n // 2, device=t.device) * (-math.log(1e4) / (n // 2)))
    phase = scale * t[:, None] * rate
    return torch.cat([phase.cos(), phase.sin()], -1)


METHODS = {"euler": 1, "midpoint": 2, "heun": 2}  # evaluations per step


def times_of(n_evaluations: int, method: str = "heun") -> list[float]:
    """Return the times from 0 to 1 between which :func:`integrate` makes its steps."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}.")
    if (n := n_evaluations // METHODS[method]) < 1:
        raise ValueError(f"{method!r} needs at least {METHODS[method]} evaluations, not {n_evaluations}.")
    return [i / n for i in range(n + 1)]


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    n_evaluations: int,
    *,
    method: str = "heun",
    trajectory: bool = False,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps, with at most ``n_evaluations`` of the velocity.

    With ``trajectory=True`` all states are returned, as an array of (steps + 1) x the shape of ``x``.
    """
    states, times = [x], times_of(n_evaluations, method)
    for t, t_next in zip(times, times[1:]):
        step, v = t_next - t, velocity(x, t)
        if method == "midpoint":
            v = velocity(x + step / 2 * v, t + step / 2)
        elif method == "heun":
            v = (v + velocity(x + step * v, t_next)) / 2
        x = x + step * v
        states.append(x)
    return torch.stack(states) if trajectory else x
