"""Features for the comparison of images of cells."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike

from spatiaflow._process import verb

if TYPE_CHECKING:
    from spatiaflow.models import ImageFeatures

NETWORK = "cell-features-small"


@verb
def image_features(
    images: ArrayLike,
    *,
    channels: list[str],
    mpp: float | None = None,
    intensity: dict[str, tuple[float, float]] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Features of images of cells, for :func:`kernel_distance`, :func:`frechet_distance` and :func:`memorised`.

    The features come from a small bundled network (``datasets.weights("cell-features-small")``). It was trained to predict counts
    and morphology from images of a Xenium slide (stains ``dapi``, ``bound``, ``rna``, ``prot``). No generator and no loss uses
    it. Compare only numbers of the same stains, scale and slide, and report how many images there were.

    Parameters
    ----------
    images
        Array, n x channels x pixels x pixels, in the scale of the slide, such as ``made.obsm["image"]`` of generated cells;
        ``made.uns["morphology"]`` holds their channels and mpp.
    channels
        Names of the channels. Channels that the network does not know are ignored. Missing ones are filled with background.
    mpp
        µm per pixel.
    intensity
        Background and bright end of every channel, such as ``model.intensity`` of a generator, or percentiles of the real images.
        Use the same values for all images that are compared. None takes those of the slide that the network was trained on.
    batch_size
        Number of images per batch.

    Returns
    -------
    Array, n x 64; on the cells that the network was trained on each feature has mean 0 and variance 1.

    Raises
    ------
    ValueError
        No channel is known to the network, images are of another shape, or ``mpp`` is missing.

    Examples
    --------
    >>> crops = sf.pp.crops(sdata, image_key="fluorescence")
    >>> images = crops.read(np.arange(10)).numpy()
    >>> sf.metrics.image_features(images, channels=crops.channels, mpp=20.4 / 48).shape
    (10, 64)
    """
    import torch
    from torch.nn import functional as F

    if mpp is None:
        raise ValueError("the size of a pixel is unknown. Pass mpp= (µm per pixel).")
    images = np.asarray(images)
    have = [str(name).lower() for name in channels]
    if images.ndim != 4 or images.shape[1] != len(have):
        raise ValueError(f"images must be n x {len(have)} channels x pixels x pixels; they are {images.shape}.")
    network = _network()
    wanted = network.config.channels
    if not set(have) & set(wanted):
        raise ValueError(f"none of the channels {', '.join(have)} is known to the network ({', '.join(wanted)}).")
    ends = network.config.intensity | {str(k).lower(): v for k, v in (intensity or {}).items()}
    low, high = np.array([ends[name] for name in wanted], np.float32).T[:, :, None, None]
    gain = network.span / torch.from_numpy(high - low)
    out = []
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(images)), max(1, -(-len(images) // batch_size))):
            x = torch.from_numpy(np.asarray(images[rows], np.float32))
            x = torch.cat([
                x[:, [have.index(name)]] if name in have else torch.full((len(x), 1, *x.shape[2:]), low[i].item())
                for i, name in enumerate(wanted)
            ], 1)  # fmt: skip
            x = (x - torch.from_numpy(low)) * gain + network.low
            if not np.isclose(mpp, network.config.mpp, rtol=0.01):
                x = F.interpolate(x, scale_factor=mpp / network.config.mpp, mode="bilinear", antialias=True)
            out.append(network(x).numpy())
    return np.concatenate(out).astype(np.float64)


@lru_cache(1)
def _network() -> ImageFeatures:
    from spatiaflow import datasets

    return cast("ImageFeatures", datasets.resolve(NETWORK, "ImageFeatures"))
