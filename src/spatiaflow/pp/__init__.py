"""From images to features."""

from spatiaflow.pp._encode import encode_patches
from spatiaflow.pp._morphology import morphology_profile

__all__ = ["encode_patches", "morphology_profile"]
