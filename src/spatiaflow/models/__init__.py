"""The models, in torch only; each is one file that reads like its paper. Imported when first used (PEP 562)."""

from importlib import import_module as _import_module

_WHERE = {
    "STFlow": "stflow", "STFlowConfig": "stflow", "Spatia": "spatia", "SpatiaConfig": "spatia",
    "MorphologyFlow": "morphology", "MorphologyConfig": "morphology", "States": "morphology", "Imputer": "imputer",
    "ImageFeatures": "features", "PairingConfig": "transport", "Slide": "slide",
}  # fmt: skip
__all__ = [*sorted(_WHERE), "load"]


def __getattr__(name: str):
    # slide.py needs no torch, and the figures load it
    if name == "load":  # all kinds must be known before a file can be read
        for module in sorted(set(_WHERE.values())):
            _import_module(f"spatiaflow.models.{module}")
        return _import_module("spatiaflow.models._base").load
    if name in _WHERE:
        return getattr(_import_module(f"spatiaflow.models.{_WHERE[name]}"), name)
    try:
        return _import_module(f"spatiaflow.models.{name}")
    except ModuleNotFoundError:
        raise AttributeError(f"module 'spatiaflow.models' has no attribute {name!r}") from None
