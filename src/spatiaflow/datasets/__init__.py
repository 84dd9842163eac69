"""Public tissue with a pinned hash, and simulated tissue whose truth is known."""

from spatiaflow.datasets._simulate import simulated_tissue
from spatiaflow.datasets._st import her2st, mouse_olfactory_bulb

__all__ = ["her2st", "mouse_olfactory_bulb", "simulated_tissue"]
