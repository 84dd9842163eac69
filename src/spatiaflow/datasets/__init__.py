"""Public datasets, checked by sha256, and simulated tissue with a known truth."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow.datasets._merfish import merfish_mouse_brain
    from spatiaflow.datasets._simulate import simulated_tissue
    from spatiaflow.datasets._st import her2st, mouse_olfactory_bulb
    from spatiaflow.datasets._starmap import starmap_mpfc
    from spatiaflow.datasets._visium import visium_ffpe
    from spatiaflow.datasets._weights import resolve as resolve  # used by verbs to load what model= names
    from spatiaflow.datasets._weights import weights
    from spatiaflow.datasets._xenium import xenium_pancreas

__all__ = [
    "her2st",
    "merfish_mouse_brain",
    "mouse_olfactory_bulb",
    "simulated_tissue",
    "starmap_mpfc",
    "visium_ffpe",
    "weights",
    "xenium_pancreas",
]
