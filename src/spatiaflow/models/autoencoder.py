"""Images of cells to a vector of latents and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE = 8  # pixels of the image to a pixel of the coarsest layer


class Residual(nn.Module):
    """Two convolutions with a shortcut. There is no normalisation, which would lose the brightness of an image."""

    def __init__(self, d: int):
        super().__init__()
        self.layers = nn.Sequential(nn.SiLU(), nn.Conv2d(d, d, 3, 1, 1), nn.SiLU(), nn.Conv2d(d, d, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images n x d x p x p."""
        return x + self.layers(x)


class Autoencoder(nn.Module):
    """Images to a vector of latents and back. The flow runs between latents.

    This is a variational autoencoder with a mean and a standard deviation for every pixel. The *grain* is what an image holds
    beyond its latents, in these standard deviations. Added at other latents it has the strength that fits there, and does not
    draw the edges of the image it came from. Images must be in their canonical orientation.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, n_channels: int, n_latent: int = 128, pixels: int = 32, width: int = 32):
        super().__init__()
        n, a, b, side = n_channels, width, 2 * width, pixels // SCALE
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * n, a, 3, 1, 1), Residual(a),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 1), Residual(b), nn.SiLU(),
            nn.PixelUnshuffle(2), nn.Conv2d(4 * b, b, 1), Residual(b), nn.SiLU(),
            nn.Flatten(), nn.Linear(b * side**2, 2 * n_latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(n_latent, b * side**2), nn.Unflatten(1, (b, side, side)), Residual(b),
            nn.Conv2d(b, 4 * b, 1), nn.PixelShuffle(2), Residual(b),
            nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2), Residual(a), nn.SiLU(),
            nn.Conv2d(a, 2 * a, 3, 1, 1), nn.PixelShuffle(2), nn.SiLU(), nn.Conv2d(a // 2, 2 * n, 3, 1, 1),
        )  # fmt: skip
        for name, shape in (("pixel", (1, n, 1, 1)), ("latent", (1, n_latent))):  # of training images
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.ones(shape))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the raw latents of images (n x C x p x p)."""
        mean, log_variance = self.encoder((x - self.pixel_mean) / self.pixel_std).chunk(2, 1)
        return mean, log_variance.clamp(-10, 4)

    def expected(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of every pixel of standardised images, from raw latents."""
        mean, log_std = self.decoder(z).chunk(2, 1)
        return mean, log_std.clamp(-3.5, 1.5)

    def encode(self, x: Tensor) -> Tensor:
        """Return latents (n x d), with mean 0 and standard deviation 1, of images (n x C x p x p)."""
        return (self.posterior(x)[0] - self.latent_mean) / self.latent_std

    def grain(self, x: Tensor, z: Tensor) -> Tensor:
        """Return what images (n x C x p x p) hold beyond their latents, in standard deviations."""
        mean, log_std = self.expected(z * self.latent_std + self.latent_mean)
        return ((x - self.pixel_mean) / self.pixel_std - mean) * (-log_std).exp()

    def decode(self, z: Tensor, grain: Tensor | None = None) -> Tensor:
        """Return images of latents, smooth or with this grain."""
        mean, log_std = self.expected(z * self.latent_std + self.latent_mean)
        if grain is not None:
            mean = mean + log_std.exp() * grain
        return mean * self.pixel_std + self.pixel_mean

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the negative evidence lower bound per pixel. ``noise`` is standard normal, in the shape of the latents.

        Pixels are weighted by their predicted standard deviation, so that the mean is fitted also where that is large
        (Seitzer, Tavakoli, Antic and Martius, 2022).
        """
        mean, log_variance = self.posterior(x)
        expected, log_std = self.expected(mean + noise * (0.5 * log_variance).exp())
        misfit = 0.5 * (((x - self.pixel_mean) / self.pixel_std - expected) * (-log_std).exp()) ** 2 + log_std
        weight = log_std.exp().detach()
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum() / x.numel()
        return (weight * misfit).mean() + weight.mean() * divergence
