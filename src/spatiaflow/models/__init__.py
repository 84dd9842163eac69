"""The models, in torch only; each is one file that reads like its paper. Imported when first used (PEP 562)."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from spatiaflow._process import unchanged as _unchanged

if _TYPE_CHECKING:
    from spatiaflow.models._base import load as load
    from spatiaflow.models.editor import MorphologyEditor as MorphologyEditor
    from spatiaflow.models.features import ImageFeatures as ImageFeatures
    from spatiaflow.models.imputer import Imputer as Imputer
    from spatiaflow.models.morphology import MorphologyConfig as MorphologyConfig
    from spatiaflow.models.morphology import MorphologyFlow as MorphologyFlow
    from spatiaflow.models.morphology import States as States
    from spatiaflow.models.slide import Slide as Slide
    from spatiaflow.models.spatia import Spatia as Spatia
    from spatiaflow.models.spatia import SpatiaConfig as SpatiaConfig
    from spatiaflow.models.stflow import STFlow as STFlow
    from spatiaflow.models.stflow import STFlowConfig as STFlowConfig
    from spatiaflow.models.transport import PairingConfig as PairingConfig

_WHERE = {
    "STFlow": "stflow", "STFlowConfig": "stflow", "Spatia": "spatia", "SpatiaConfig": "spatia",
    "MorphologyEditor": "editor", "MorphologyFlow": "morphology", "MorphologyConfig": "morphology", "States": "morphology",
    "Imputer": "imputer",
    "ImageFeatures": "features", "PairingConfig": "transport", "Slide": "slide",
}  # fmt: skip
__all__ = [*sorted(_WHERE), "load"]


def __getattr__(name: str) -> _Any:
    # slide.py needs no torch, and the figures load it
    with _unchanged():
        return _imported(name)


def _imported(name: str) -> _Any:
    if name == "load":  # all kinds must be known before a file can be read
        for module in sorted(set(_WHERE.values())):
            _import_module(f"spatiaflow.models.{module}")
        return _import_module("spatiaflow.models._base").load
    if name in _WHERE:
        return getattr(_import_module(f"spatiaflow.models.{_WHERE[name]}"), name)
    if name == "encoders":
        return _import_module("spatiaflow.models.encoders")
    raise AttributeError(f"module 'spatiaflow.models' has no attribute {name!r}; it has {', '.join(__all__)}, encoders")
