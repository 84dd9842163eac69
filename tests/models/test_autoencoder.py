"""The autoencoder of cell images: latents and grain together are the image, and the loss is the evidence lower bound."""

import pytest
import torch

from spatiaflow.models.autoencoder import Autoencoder

pytestmark = pytest.mark.usefixtures("own_draws")


@pytest.fixture
def model():
    torch.manual_seed(0)
    out = Autoencoder(2, n_latent=6, pixels=16, width=4)
    out.pixel_mean.fill_(30)
    out.pixel_std.fill_(12)
    out.latent_mean.fill_(0.3)
    out.latent_std.fill_(0.5)
    return out


def test_an_image_is_its_latents_and_its_grain(model):
    x = 40 * torch.rand(3, 2, 16, 16)
    z = model.encode(x)
    assert z.shape == (3, 6)
    torch.testing.assert_close(model.decode(z, model.grain(x, z)), x, rtol=1e-4, atol=1e-3)
    assert (model.decode(z) - x).abs().max() > 1, "without the grain it is smooth"


def test_the_loss_is_the_weighted_evidence_lower_bound(model):
    x, noise = 40 * torch.rand(3, 2, 16, 16), torch.randn(3, 6)
    mean, log_variance = model.posterior(x)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected, log_std = model.expected(mean + noise * posterior.stddev)
    pixel = torch.distributions.Normal(expected, log_std.exp())
    misfit = -pixel.log_prob((x - 30) / 12) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    prior = torch.distributions.Normal(torch.zeros(6), torch.ones(6))
    divergence = torch.distributions.kl_divergence(posterior, prior).sum() / x.numel()
    right = (pixel.stddev * misfit).mean() + pixel.stddev.mean() * divergence
    torch.testing.assert_close(model.loss(x, noise), right)
