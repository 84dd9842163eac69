"""Which generator of cell images: backbones and starts of the path between latents, at equal CPU seconds on one core.

    python benchmarks/morphology_design.py pancreas.zarr --cache features --seconds 200 --designs chosen U-Net

Trained on x < 16500 px, judged on 17000-19000 by the energy distance of morphology profiles to the real targets there and
by the share of the true shift that is shown; neither the test part nor the feature network is touched. All designs share one
autoencoder, whose time is not counted. ``U-Net`` needs diffusers.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import spatiaflow as sf
from morphology import FIT_AUTOENCODER, Images, Pancreas, once, over_niches, write
from morphology_weights import NOISE, paired, share
from spatiaflow.models.morphology import SCALE, MorphologyNetwork
from spatiaflow.train import morphology as train


class UNet(MorphologyNetwork):
    """UNet2DConditionModel of diffusers, with attention to the neighbours at its lowest resolution."""

    def __init__(self, c):
        from diffusers import UNet2DConditionModel

        super().__init__(c)
        del self.into, self.out, self.blocks, self.norm, self.time, self.place
        width, side = (64, 128), c.crop_pixels // SCALE
        self.unet = UNet2DConditionModel(
            sample_size=side, in_channels=c.n_latent, out_channels=c.n_latent, block_out_channels=width, layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, cross_attention_dim=c.width, attention_head_dim=32, class_embed_type="identity",
        )  # fmt: skip
        self.given = nn.Linear(c.width, 4 * width[0])
        nn.init.zeros_(self.unet.conv_out.weight)

    def forward(self, x, t, control, condition, around):
        return self.unet(x, 1000 * t, around, class_labels=self.given(F.silu(condition))).sample


DESIGNS = {  # backbone, preset, start of the path, whether sources exchange targets
    "chosen": (MorphologyNetwork, {}, "control", True),
    "U-Net": (UNet, {}, "control", True),
    "patches of 4 px": (MorphologyNetwork, {"patch_pixels": 4}, "control", True),
    "targets as drawn": (MorphologyNetwork, {}, "control", False),
    "no noise": (MorphologyNetwork, {"noise": 0.0}, "control", True),
    "noise .5": (MorphologyNetwork, {"noise": 0.5}, "control", True),
    "from noise": (MorphologyNetwork, {}, "noise", True),
}
FIT_SURROGATE, FIT = train.fit_surrogate, train.fit_morphology


def fitted(part, name: str, seconds: float, seed: int):
    """A model of one design after ``seconds`` of training on one core, and its steps."""
    network, preset, start, exchange = DESIGNS[name]
    train.MorphologyNetwork = network
    taken = {}

    def in_time(training, held_out, images, image_of, around, config, autoencoder, surrogate, **options):
        module = train.MorphologyTraining(network(config), autoencoder, surrogate, {"flow": 1.0})
        batches = train.PairBatches(
            training, images, image_of, around, 8, options["batch_size"], seed, exchange=exchange
        )
        for i in range(8):  # what a step costs; the first two are slower
            if i == 2:
                began = time.process_time()
            sum(module.losses(module.network, batches[i]).values()).backward()
        taken["steps"] = int(seconds / ((time.process_time() - began) / 6))
        options |= {"max_epochs": 1, "batches_per_epoch": taken["steps"]}
        return FIT(training, held_out, images, image_of, around, config, autoencoder, surrogate, **options)

    train.fit_morphology = in_time
    began = time.process_time()
    model = sf.tl.train_morphology(
        part, crop_um=13.6, crop_pixels=32, start=start, preset={"noise": NOISE} | preset, mpp=1,
        validation=0.05, losses={"alignment": 0.0, "contrast": 0.0}, exchange=exchange, random_state=seed,
    )  # fmt: skip
    return model, taken | {"CPU seconds, all": time.process_time() - began}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="design", help="of the table of results")
    parser.add_argument(
        "--like", help="file of a generator whose autoencoder and surrogate all designs take; else they are fitted"
    )
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), choices=list(DESIGNS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    part, _ = paired(a.store, a.cache)
    data = Pancreas(a.store, a.cache, 13.6, 32)
    # one autoencoder for all, and one surrogate, which nothing reads here, since no run aligns
    if a.like:
        share(sf.models.load(a.like))
    else:
        train.fit_autoencoder = once(FIT_AUTOENCODER)
        train.fit_surrogate = once(lambda *x, **options: FIT_SURROGATE(*x, max_epochs=1, **options))
    table, rng, rows = data.table["validation"], np.random.default_rng(0), []

    def measured(images, where, cells, scale=None):
        profile = sf.pp.image_profile(images, channels=list(data.crops[where].channels), mpp=data.mpp).to_numpy()
        mean, std = scale or (np.nanmean(profile, 0), np.nanstd(profile, 0))
        niche = data.table[where].obs["niche"].astype(str).to_numpy()[cells]
        there = np.zeros((len(cells), 1))  # no features: only morphology is compared
        return Images(there, np.nan_to_num((profile - mean) / std), niche, np.zeros(len(cells), int)), (mean, std)

    real = {}
    for name in part["table"].uns["transition_plan"]["params"]["transitions"]:
        source, target = name.split(" -> ")
        if source == target:
            continue
        cells = {s: np.sort(rng.permutation(data.rows("validation", s))[: a.cells]) for s in (source, target)}
        known = np.sort(rng.permutation(data.rows("train", target))[: a.cells])
        scale = measured(data.images("train", known), "train", known)[1]
        before, wanted = (measured(data.images("validation", r), "validation", r, scale)[0] for r in cells.values())
        real[name] = cells[source], before, wanted, scale
    for design in a.designs:
        model, cost = fitted(part, design, a.seconds, a.seed)
        for name, (cells, before, wanted, scale) in real.items():
            source, target = name.split(" -> ")
            for n, method in ((10, "heun"), (10, "euler")):
                made = sf.tl.generate_morphology(
                    data.parts["validation"], source=source, target=target, model=model, mpp=1, n_steps=n, method=method,
                    cells=list(table.obs_names[cells]), random_state=a.seed,
                )  # fmt: skip
                shown = measured(made.obsm["image"], "validation", cells, scale)[0]
                draw = [np.ones(1)]
                effect = sf.metrics.effect_recovery(before.profile, shown.profile, wanted.profile)
                rows.append({
                    "design": design, "transition": name, "evaluations": f"{method} {n}",
                    "energy": over_niches(shown, wanted, draw)["energy"][0],
                    "energy of a copy": over_niches(before, wanted, draw)["energy"][0], "share": effect["share"],
                    "cosine": effect["cosine"], "held-out flow loss": model.history["val_flow"][-1], **cost,
                })  # fmt: skip
        write(a.name, rows)
