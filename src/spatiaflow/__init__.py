"""scanpy-style verbs over deep generative models of tissue."""

from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError, version

from spatiaflow._settings import settings

try:
    __version__ = version("spatiaflow")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

_SUBMODULES = ("datasets", "get", "metrics", "models", "pl", "pp", "tl")
__all__ = ["settings", *_SUBMODULES]


def __getattr__(name: str):
    # PEP 562: torch (1.4 s) and squidpy (3.7 s) are imported when first needed, not by `import spatiaflow`
    if name in _SUBMODULES:
        return _import_module(f"spatiaflow.{name}")
    raise AttributeError(f"module 'spatiaflow' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
