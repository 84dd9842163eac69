"""Train the network that generated images are compared by: counts and morphology of a cell from its image.

    python benchmarks/features.py pancreas.zarr

On the cells at x < 16500 px of the slide that ``benchmarks/weights.py`` describes. Nothing else is trained or conditioned
by it. No augmentation but turns and mirrors: brightness and size are to be told apart.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

import spatiaflow as sf
from spatiaflow.models.counts import log_likelihood
from spatiaflow.models.features import FeaturesConfig, ImageFeatures
from spatiaflow.models.orientation import turned
from weights import WHERE, training_part


def train(store: str, *, epochs: int, crop_um: float, pixels: int, seed: int) -> ImageFeatures:
    part = training_part(store)
    table, crops = part["table"], sf.pp.crops(part, mpp=1, crop_um=crop_um, crop_pixels=pixels)
    sf.pp.morphology_profile(part, mpp=1)
    profile = table.obsm["morphology"].to_numpy(np.float32)
    profile = torch.from_numpy((profile - np.nanmean(profile, 0)) / np.nanstd(profile, 0))
    counts = sparse.csr_matrix(table.X).astype(np.float32)
    total = np.asarray(counts.sum(0)).ravel()
    channels = [str(c).lower() for c in crops.channels]
    intensity = {name: np.round(ends, 3).tolist() for name, ends in zip(channels, crops.intensity())}
    torch.manual_seed(seed)
    network = ImageFeatures(FeaturesConfig(channels, crop_um / pixels, intensity))
    genes, shape = nn.Linear(network.num_features, counts.shape[1]), nn.Linear(network.num_features, profile.shape[1])
    genes.bias.data = torch.from_numpy(np.log((total + 0.5) / total.sum())).float()
    log_theta = nn.Parameter(torch.zeros(counts.shape[1]))
    rng, images = np.random.default_rng(seed), crops.read(np.arange(len(crops))).numpy()
    held = np.arange(len(images)) % 20 == 0
    rows = np.flatnonzero(~held)
    weights = [*network.parameters(), *genes.parameters(), *shape.parameters(), log_theta]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=0.01)
    n = len(rows) // 256
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * n, pct_start=0.1)

    def losses(batch, turn):
        with torch.autocast("cpu", torch.bfloat16):
            z = network(turned(torch.from_numpy(images[batch]), turn))
        z, seen, known = z.float(), torch.from_numpy(counts[batch].toarray()), profile[batch].isfinite().all(1)
        mean = seen.sum(1, keepdim=True) * torch.exp(genes(z).clamp(-15, 3))
        likelihood = -log_likelihood(seen, mean.clamp_min(1e-6), F.softplus(log_theta) + 0.01).mean()
        return likelihood, F.smooth_l1_loss(shape(z)[known], profile[batch][known])

    for epoch in range(epochs):
        network.train()
        for batch in np.array_split(rng.permutation(rows), n):
            likelihood, misfit = losses(batch, rng.integers(0, 8, len(batch)))
            optimizer.zero_grad()
            (likelihood + 0.1 * misfit).backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            some = np.flatnonzero(held)
            found = [v.item() for v in losses(some, np.zeros(len(some), int))]
        print(f"epoch {epoch}: held-out likelihood {found[0]:.4f}, morphology {found[1]:.4f}", flush=True)
    with torch.inference_mode():  # features of the training cells get mean 0 and variance 1
        z = torch.cat([network(torch.from_numpy(images[some])) for some in np.array_split(rows, 100)])
        last, std = network.layers[-1], z.std(0)
        last.weight.data, last.bias.data = last.weight / std[:, None], (last.bias - z.mean(0)) / std
    xy = crops.xy
    network.card = {
        "data": "Xenium, human pancreas, x < 16500 px", "n_obs": len(rows), "last_cell_px": [*map(float, xy.max(0))],
        "command": "python benchmarks/features.py", "epochs": epochs, "seed": seed,
        "held_out": dict(zip(("genes", "profile"), found)),
    }  # fmt: skip
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--crop-um", type=float, default=13.6)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WHERE / "cell-features-small.safetensors")
    a = parser.parse_args()
    print(train(a.store, epochs=a.epochs, crop_um=a.crop_um, pixels=a.pixels, seed=a.seed).save(a.out))
