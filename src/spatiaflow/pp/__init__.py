"""From images to features."""

from spatiaflow.pp._encode import encode_patches

__all__ = ["encode_patches"]
