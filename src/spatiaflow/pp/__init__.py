"""From images to crops and features."""

from spatiaflow._process import unchanged

with unchanged():
    from spatiaflow._slides.crops import Crops
    from spatiaflow.pp._crops import crops
    from spatiaflow.pp._encode import encode_patches
    from spatiaflow.pp._grid import grid
    from spatiaflow.pp._morphology import image_profile, morphology_profile
    from spatiaflow.pp._tiles import tiles

__all__ = ["Crops", "crops", "encode_patches", "grid", "image_profile", "morphology_profile", "tiles"]
