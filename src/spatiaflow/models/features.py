"""A small network whose features compare generated with real images of cells. No generator is trained on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from spatiaflow.models import _base


@dataclass
class FeaturesConfig:
    """Images that a feature network reads, and its sizes.

    Attributes
    ----------
    channels, mpp
        Names of the channels, and µm per pixel of the images.
    intensity
        Background and bright end of each channel, which become 0 and 1.
    width, n_features
        Filters of the first layer, and number of features.
    """

    channels: list[str]
    mpp: float
    intensity: dict[str, list[float]]
    width: int = 24
    n_features: int = 64


class ImageFeatures(_base.Model, nn.Module):
    """Features of images of cells. It can replace the Inception network in the distances of torchmetrics.

    Attributes
    ----------
    config
        Channels, scale and sizes.
    card
        Training data, settings and versions.

    Examples
    --------
    >>> network = sf.models.load(sf.datasets.weights("cell-features-small"))
    >>> network(sf.pp.crops(sdata, image_key="fluorescence").read([0, 5])).shape
    torch.Size([2, 64])
    """

    verb = "sf.metrics.image_features"
    low: Tensor
    span: Tensor

    def __init__(self, config: FeaturesConfig, card: dict | None = None) -> None:
        super().__init__()
        self.config, self.genes, self.card, self.num_features = config, (), card or {}, config.n_features
        n, layers = len(config.channels), []
        for step, out in enumerate((1, 2, 4)):
            out *= config.width
            for stride in (2, 1) if step else (1, 2):
                layers += [nn.Conv2d(n, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                n = out
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, config.n_features))
        ends = torch.tensor([config.intensity[name] for name in config.channels], dtype=torch.float32)
        self.register_buffer("low", ends[:, 0, None, None], persistent=False)
        self.register_buffer("span", (ends[:, 1] - ends[:, 0])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (n x f) of images (n x C x p x p) in the scale of the training slides."""
        return self.layers((images.to(self.low.dtype) - self.low) / self.span)

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return description and tensors."""
        return {"config": asdict(self.config), "card": self.card}, dict(self.state_dict())

    @classmethod
    def from_state(cls, description: dict, tensors: dict[str, Tensor]) -> ImageFeatures:
        """Rebuild a network from the description and tensors of its file."""
        out = cls(FeaturesConfig(**description["config"]), description["card"])
        _base.fill(out, tensors)
        return out.eval()
