"""The weight-free encoder: no direction, no batch, no scanner, and what its names say."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spatiaflow.models.encoders import _texture, load_encoder

RNG = np.random.default_rng(0)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tissue(mpp, n=4, um=112, seed=0):
    """H&E-like patches (n x 3 x h x w, uint8) of round nuclei on stroma; the same tissue at any resolution."""
    rng = np.random.default_rng(seed)
    size = round(um / mpp)
    axis = (torch.arange(size) + 0.5) * mpp
    out = []
    for _ in range(n):
        hematoxylin, eosin = torch.zeros(size, size), torch.full((size, size), 0.3)
        for x, y, radius in zip(rng.uniform(0, um, 40), rng.uniform(0, um, 40), rng.uniform(2.5, 5, 40)):
            distance = ((axis[None] - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
            hematoxylin += 0.5 * torch.sigmoid((radius - distance) / 0.7)
        eosin = eosin * (1 + 0.5 * torch.sin(axis / 6)[None])
        stains = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]), dim=1)
        density = torch.einsum("shw,sc->chw", torch.stack([hematoxylin, eosin]), stains)
        out.append((256 * 10**-density - 1).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(out)


@pytest.fixture(scope="module")
def texture():
    return load_encoder("texture")


def named(texture, patches):
    return dict(zip(texture.feature_names, texture(patches).T))


def test_texture_names_its_features(texture):
    out = texture(tissue(1.0))
    assert out.shape == (4, len(texture.feature_names)) == (4, 118)
    assert len(set(texture.feature_names)) == 118
    assert out.isfinite().all()
    assert out.dtype == torch.float32


@pytest.mark.parametrize("turn", [lambda p: p.rot90(1, (-2, -1)), lambda p: p.flip(-1), lambda p: p.flip(-2)])
def test_texture_has_no_direction(texture, turn):
    patches = tissue(1.0, n=8)
    expected = texture(patches)
    torch.testing.assert_close(texture(turn(patches)), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_texture_does_not_depend_on_the_batch(texture, size):
    patches = torch.cat([tissue(1.0, n=4), torch.from_numpy(RNG.integers(0, 255, (4, 3, 112, 112), dtype=np.uint8))])
    torch.testing.assert_close(
        torch.cat([texture(part) for part in patches.split(size)]), texture(patches), atol=1e-5, rtol=1e-5
    )


def test_texture_sees_the_tissue_and_not_the_pixels_of_the_scanner(texture):
    fine, coarse = tissue(0.25, n=12), tissue(0.5, n=12)
    a, b = (
        texture(F.interpolate(p.float(), (112, 112), mode="bilinear", antialias=True).round().byte())
        for p in (fine, coarse)
    )
    spread = texture(tissue(1.0, n=40, seed=1)).std(0)
    apart = ((a - b).abs() / (spread + 0.02)).mean(0)
    assert apart.median() < 0.1
    assert (apart < 0.5).float().mean() > 0.95


def test_texture_measures_what_its_names_say(texture):
    white = torch.full((1, 3, 112, 112), 250, dtype=torch.uint8)
    patch = tissue(1.0, n=1, seed=3)
    out, glass = named(texture, patch), named(texture, white)
    assert glass["tissue_fraction"] < 0.1 < 0.7 < out["tissue_fraction"]
    assert glass["lumen_fraction"] > 0.9
    # 40 nuclei in 112 x 112 µm, some of them merged, some at the border
    per_patch = (out["nuclei_log_density"].exp() - 0.2) * 1.12**2
    assert 20 < per_patch < 45
    stained = patch.clone()
    stained[:, 0] = (stained[:, 0] * 0.8).to(torch.uint8)  # less red light comes through
    assert named(texture, stained)["red_mean"] > out["red_mean"]
    assert glass["nuclear_fraction_0.2"] < 0.01 < out["nuclear_fraction_0.2"]
    dark_centre = white.clone()
    dark_centre[:, :, 52:60, 52:60] = torch.tensor([60, 40, 120], dtype=torch.uint8)[:, None, None]
    centre = named(texture, dark_centre)
    assert centre["centre_4um_nuclear"] > 5 * centre["centre_10um_nuclear"].abs() / 2 > 0


def test_fibres_are_coherent_and_grains_are_not(texture):
    stripes = torch.sin(torch.arange(112) / 2.0)[None].expand(112, 112)
    grains = torch.from_numpy(RNG.normal(size=(112, 112))).float()
    pair = torch.stack([stripes, grains])[:, None].mul(40).add(150).clamp(0, 255).to(torch.uint8).expand(2, 3, 112, 112)
    for name in ("hematoxylin_coherence_20um", "eosin_coherence_6um"):
        fibrous, grainy = named(texture, pair)[name]
        assert fibrous > 0.95 > 0.5 > grainy


def test_patterns_equal_a_slow_loop():
    patch = torch.from_numpy(RNG.integers(0, 255, (1, 3, 12, 16), dtype=np.uint8))
    found = torch.stack([v for k, v in _texture._patterns(patch).items() if k.startswith("pattern_2um")])[:, 0] ** 2
    levels = np.round(-1000 / 3 * np.log10((np.arange(256) + 1) / 256))
    grey = np.pad(levels[patch[0].numpy()].sum(0), 1, mode="edge")
    kernel = np.outer([1, 2, 1], [1, 2, 1])
    smooth = np.array([[(grey[i : i + 3, j : j + 3] * kernel).sum() for j in range(16)] for i in range(12)])
    padded, counts = np.pad(smooth, 2, mode="edge"), np.zeros(10)
    for i in range(12):
        for j in range(16):
            ring = [(-2, 0), (-2, 2), (0, 2), (2, 2), (2, 0), (2, -2), (0, -2), (-2, -2)]
            bits = [padded[i + 2 + dy, j + 2 + dx] > smooth[i, j] + 160 for dy, dx in ring]
            changes = sum(bits[k] != bits[k - 1] for k in range(8))
            counts[sum(bits) if changes <= 2 else 9] += 1
    np.testing.assert_allclose(found.numpy(), counts / counts.sum(), atol=1e-6)


def test_texture_refuses_sides_it_cannot_halve(texture):
    with pytest.raises(ValueError, match=r"multiples of 4.*\(30, 32\)"):
        texture(torch.zeros(1, 3, 30, 32, dtype=torch.uint8))
    assert [texture.patch_pixels(um) for um in (112.0, 155.0, 5.0)] == [112, 156, 8]
