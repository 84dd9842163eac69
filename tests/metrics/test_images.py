import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import spatiaflow as sf

CHANNELS = ["dapi", "bound", "rna", "prot"]


@pytest.fixture(scope="module")
def images():
    """Real nuclei if simulated ones can be called so: 4 stains, 13.6 µm."""
    sdata = sf.datasets.simulated_tissue(700, seed=3)
    crops = sf.pp.crops(sdata, image_key="fluorescence", crop_um=20.4, crop_pixels=48)
    return crops.read(np.arange(len(crops))).numpy()


ENDS = dict.fromkeys(CHANNELS, (0.0, 220.0))


def features(images, **options):
    return sf.metrics.image_features(images, **({"channels": CHANNELS, "mpp": 0.425, "intensity": ENDS} | options))


def middle(images, width=32):
    start = (images.shape[-1] - width) // 2
    return images[..., start : start + width, start : start + width]


def distance(images, changed):
    a, b = features(middle(images[::2])), features(middle(changed[1::2]))
    return sf.metrics.kernel_distance(a, b)


def zoomed(images, factor):
    x = torch.nn.functional.interpolate(torch.from_numpy(images).float(), scale_factor=factor, mode="bilinear")
    return x.numpy()


@pytest.mark.parametrize(
    "change",
    [
        [lambda x, s=s: gaussian_filter(x.astype(np.float32), (0, 0, s, s)) for s in (0, 0.7, 1.2, 2.0)],
        [lambda x, g=g: x * np.float32(g) for g in (1, 0.9, 0.75, 0.5)],
        [lambda x, z=z: zoomed(x, z) for z in (1, 1.1, 1.25, 1.5)],
    ],
    ids=["blur", "brightness", "size"],
)
def test_distance_rises_with_the_change(images, change):
    found = [distance(images, f(images)) for f in change]
    assert all(b > a for a, b in zip(found, found[1:])), found
    assert found[0] < 0.2 * found[1]  # no change at all is near 0


def test_channels_by_name_and_scale(images):
    known = features(images)
    assert known.shape == (len(images), 64) and np.isfinite(known).all()
    order = [2, 0, 3, 1]
    other = features(images[:, order], channels=[CHANNELS[i].upper() for i in order])
    np.testing.assert_allclose(other, known, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features(images, batch_size=7), known, rtol=1e-4, atol=1e-4)
    twice = images.repeat(2, -1).repeat(2, -2)
    np.testing.assert_allclose(features(twice, mpp=0.2125), known, rtol=0.2, atol=0.5)
    assert np.abs(features(images[:, :1], channels=["dapi"]) - known).max() > 0.1
    with pytest.raises(ValueError, match="none of the channels"):
        features(images[:, :1], channels=["tubulin"])
    with pytest.raises(ValueError, match="Pass mpp="):
        features(images, mpp=None)
    with pytest.raises(ValueError, match="images must be n x 4"):
        features(images[:, :2])


def test_it_stands_for_inception_in_torchmetrics(images):
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = sf.models.load(sf.datasets.weights("cell-features-small"))
    a, b = (torch.from_numpy(middle(part)) for part in (images[:350], (images[350:] * 0.8).astype(np.uint8)))
    reference = FrechetInceptionDistance(feature=network, normalize=False, input_img_size=(4, 32, 32))
    reference.update(a, real=True)
    reference.update(b, real=False)
    expected = reference.compute().item()
    with pytest.raises(ValueError, match="640 rows"):
        sf.metrics.frechet_distance(*(features(v.numpy()) for v in (a, b)))
    one, other = (
        np.concatenate([features(v.numpy(), intensity=None)] * 2) for v in (a, b)
    )  # rows twice: the same sample
    assert sf.metrics.frechet_distance(one, other) == pytest.approx(expected, rel=0.02)
