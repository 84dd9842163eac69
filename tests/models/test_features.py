"""The network that compares images: it reads them in the scale of its training slides, and is saved as it is."""

import pytest
import torch

import spatiaflow as sf
from spatiaflow.models.features import FeaturesConfig, ImageFeatures

pytestmark = pytest.mark.usefixtures("own_draws")


def network(low=0.0, high=100.0):
    torch.manual_seed(0)
    config = FeaturesConfig(["dapi", "rna"], 0.4, {"dapi": [low, high], "rna": [0.0, 50.0]}, width=4, n_features=5)
    out = ImageFeatures(config).eval()
    with torch.no_grad():
        for values in out.parameters():
            values *= 3  # untrained, all features are nearly alike
    return out


@torch.inference_mode()
def test_background_and_bright_end_are_the_scale():
    x = 100 * torch.rand(3, 2, 16, 16)
    brighter = x.clone()
    brighter[:, 0] = 10 + 2 * x[:, 0]
    features = network()(x)
    assert features.shape == (3, 5)
    torch.testing.assert_close(network(10, 210)(brighter), features, rtol=1e-4, atol=1e-5)
    assert (network()(brighter) - features).abs().max() > 1e-3


@torch.inference_mode()
def test_what_is_saved_gives_the_same_features(tmp_path):
    x = 100 * torch.rand(2, 2, 16, 16)
    again = sf.models.load(network().save(tmp_path / "features"), kind="ImageFeatures")
    torch.testing.assert_close(again(x), network()(x), rtol=0, atol=0)
