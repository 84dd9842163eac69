"""From images to crops and features."""

from spatiaflow.pp._crops import Crops, crops
from spatiaflow.pp._encode import encode_patches
from spatiaflow.pp._morphology import morphology_profile
from spatiaflow.pp._tiles import tiles

__all__ = ["Crops", "crops", "encode_patches", "morphology_profile", "tiles"]
