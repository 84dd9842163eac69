import numpy as np
import torch

from spatiaflow.models.slide import Slide
from spatiaflow.models.stflow import PRIORS, STFlowConfig
from spatiaflow.train.batches import Regions, region

RNG = np.random.default_rng(0)


def tissue(n_slides=2, n=40):
    """Slides whose features and truth repeat the position, so that rows can be told apart."""
    places = [RNG.uniform(0, 1000, (n, 2)) for _ in range(n_slides)]
    slides = [Slide(f"s{i}", np.arange(n).astype(str), xy, features=xy) for i, xy in enumerate(places)]
    return slides, [xy + 1 for xy in places], [xy + 2 for xy in places]


def test_a_region_is_its_centre_and_the_nearest_rows():
    xy = RNG.uniform(0, 1000, (50, 2))
    for seed in range(10):
        rows = region(xy, np.random.default_rng(seed))
        distances = [np.sort(np.linalg.norm(xy - c, axis=1))[: len(rows)] for c in xy[rows]]
        own = [np.sort(np.linalg.norm(xy[rows] - c, axis=1)) for c in xy[rows]]
        assert any(np.allclose(a, b) for a, b in zip(distances, own))


def test_a_batch_keeps_rows_together_and_depends_on_seed_epoch_and_number_only():
    config = STFlowConfig(residual=True, regions=3)
    one, two = (Regions(*tissue_of, config, PRIORS["zero"](), 5) for tissue_of in [tissue()] * 2)
    assert len(one) == 3
    for b in (2, 0, 1):
        batch, again = one[b], two[b]
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        torch.testing.assert_close(batch["y"], batch["features"] + 1)
        torch.testing.assert_close(batch["base"], batch["features"] + 2)
    two.epoch = 1
    assert not torch.equal(one[0]["t"][:1], two[0]["t"][:1])
