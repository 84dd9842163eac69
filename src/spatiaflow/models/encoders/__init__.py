"""Image encoders: patches of tissue to feature vectors."""

from spatiaflow.models.encoders._image import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder"]
