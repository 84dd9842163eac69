"""Morphology under a transition.

python benchmarks/morphology.py simulated          planted shift of area and elongation, niche by niche
python benchmarks/morphology.py bundled            the same of the weights that come with the package, on another slide
python benchmarks/morphology.py tiles              tiles with some of state A to such with some of B, on simulated tissue
python benchmarks/morphology.py speed              cells a second
python benchmarks/morphology.py pancreas --store pancreas.zarr --cache features --folder runs (or --weights FILE)
                                                   generated cells of the test part against real ones, baselines and variants

Pancreas: states and transitions by ``benchmarks/transitions.py``; trained on x < 16500 px, tested on x > 19500. Distances are
unbiased and at equal n in each niche, the mean over niches that hold ``MIN_CELLS`` of both states; intervals by bootstrap over
blocks of 500 um of the test part, in which a cell is never compared with itself. ``KID minus ours`` is above 0 where ours is
nearer to real targets. ``heun 10``: Heun's method with 10 evaluations of the network, 5 steps.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import results
import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.models.morphology import MorphologyConfig
from spatiaflow.train import morphology as fitting
from transitions import embedded, fit_states, with_band

FIT_AUTOENCODER = fitting.fit_autoencoder


def once(function):
    """What a function returns on its first call, on every call."""
    found = []

    def first(*arguments, **options):
        found[:] = found or [function(*arguments, **options)]
        return found[0]

    return first


# ---- simulated tissue --------------------------------------------------------------------------------------------


def with_embeddings(sdata, pca=None, genes=slice(None)):
    """Components of expression of the cell, and their means over 12 and 50 neighbours, as its three levels."""
    from sklearn.decomposition import PCA

    table = sdata["table"]
    counts = table.X.toarray()[:, genes]
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 200)
    pca = pca or PCA(16, random_state=0).fit(x)
    z, xy = pca.transform(x).astype(np.float32) / 2, table.obsm["spatial"]
    near = cKDTree(xy).query(xy, k=50)[1]
    table.obsm["E_cell"], table.obsm["E_niche"], table.obsm["E_tissue"] = z, z[near[:, :12]].mean(1), z[near].mean(1)
    return pca


def shares(cells, real: pd.DataFrame, made) -> dict[str, dict[str, float]]:
    """Share of the planted change from A to B that generated cells show, by niche and feature; ``real``: morphology of all."""

    def measured(found):
        return found.assign(elongation=found["major_axis_um"] / found["minor_axis_um"])[["area_um2", "elongation"]]

    real, shown, out = measured(real), measured(made.to_df()), {}
    state, niche = (cells.obs[name].astype(str).to_numpy() for name in ("state", "niche"))
    at = niche[cells.obs_names.get_indexer(made.obs["source_cell"])]  # a model without context knows no niches
    for group in np.unique(niche):
        before, after = (real[(niche == group) & (state == s)] for s in "AB")
        now = shown[at == group]
        planted = after.mean() - before.mean()
        share = (now.mean() - before.mean()) / planted
        error = np.sqrt(sum(v.var() / len(v) for v in (now, before, after))) / planted.abs()
        for feature in planted.index:
            out[f"{group}, {feature}"] = {
                "share shown": share[feature], "off by": abs(1 - share[feature]), "standard error": error[feature],
                "cells": len(now), "planted shift": planted[feature],
            }  # fmt: skip
    return out


def bundled(a, table: results.Table) -> None:
    """What the weights that come with the package show on a simulated slide that they were not trained on."""
    data, runs = "simulated:bundled", (10, 40)
    if not table.lacks(data, "", 0, [f"heun {n}" for n in runs]):
        return
    sdata, image = sf.datasets.simulated_tissue(6000, seed=3), {"image_key": "fluorescence"}
    sf.tl.embed_spatia(sdata, modalities="image", **image)
    cells, real = sdata["table"], sf.pp.image_profile(sf.pp.crops(sdata, crop_um=16.0, crop_pixels=32, **image))
    copies, b = (real[(cells.obs["state"] == s).to_numpy()] for s in "AB")
    for n in runs:
        made = sf.tl.generate_morphology(
            sdata, source="A", target="B", model="morphology-simulated-small", n_steps=n // 2, **image
        )
        z = [((x - b.mean()) / b.std()).fillna(0).to_numpy() for x in (made.to_df(), copies, b)]
        for split, found in shares(cells, real, made).items():
            table.add(data, split, 0, f"heun {n}", found)
        table.add(data, "", 0, "copy of the source", {"energy": sf.metrics.energy_distance(z[1], z[2])})
        table.add(data, "", 0, f"heun {n}", {"energy": sf.metrics.energy_distance(z[0], z[2])})


def simulated(a, table: results.Table) -> None:
    """How much of the planted shift of nuclei generated cells show in each niche, with and without spatial context.

    State B acts by niche. Niches show in genes and stains of the cell itself, which would make context needless: only nuclei
    are generated, and embeddings are of the genes that follow no niche.
    """
    image, data = {"image_key": "dapi"}, "simulated:state by niche"
    fitting.fit_autoencoder = once(FIT_AUTOENCODER)  # one for all, of images of the first slide
    for seed in range(a.seeds):
        if not table.lacks(data, "", seed, ["with context", "without context"]):
            continue
        train, test = (
            sf.datasets.simulated_tissue(n, seed=100 + 10 * seed + i, state_by_niche=True)
            for i, n in enumerate((a.train, a.test))
        )
        for sdata in (train, test):
            sdata["dapi"] = sdata["fluorescence"].sel(c=["dapi"])
        genes = (train["table"].var["driver"] != "niche").to_numpy()
        with_embeddings(test, with_embeddings(train, genes=genes), genes)
        sf.pp.morphology_profile(train, **image)
        real = sf.pp.image_profile(sf.pp.crops(test, crop_um=16.0, crop_pixels=a.pixels, **image))
        config = MorphologyConfig(objective="pairs", crop_um=16.0, crop_pixels=a.pixels, losses={"contrast": 0})
        for context in (True, False):
            sf.tl.pair_transitions(
                train, transitions=[("A", "B")], groupby="state", niche_key="niche" if context else None, random_state=seed
            )  # fmt: skip
            start = time.perf_counter()
            model = sf.tl.train_morphology(
                train, use_rep="E", config=replace(config, spatial=context), max_epochs=a.epochs, random_state=seed, **image
            )  # fmt: skip
            seconds = time.perf_counter() - start
            made = sf.tl.generate_morphology(test, source="A", target="B", model=model, random_state=seed, **image)
            method = "with context" if context else "without context"
            for split, found in shares(test["table"], real, made).items():
                table.add(data, split, seed, method, found)
            table.add(data, "", seed, method, {"seconds": seconds})
    table.add_run(data, "")


def tiles(a, table: results.Table) -> None:
    """Whole tiles of 25 um: how much of the difference between those with state A alone and those with B is shown."""
    image, data, options = {"image_key": "fluorescence"}, "simulated:tiles", {"table_key": "tiles"}
    pool = ["E_cell", "E_niche", "E_tissue", "morphology"]
    for seed in range(a.seeds):
        if not table.lacks(data, "", seed, "run"):
            continue
        train, test = (
            sf.datasets.simulated_tissue(n, seed=100 + 10 * seed + i) for i, n in enumerate((a.train, a.test))
        )
        with_embeddings(test, with_embeddings(train))
        for sdata in (train, test):
            sf.pp.morphology_profile(sdata, **image)
            sf.pp.tiles(sdata, tile_um=25, groupby="state", pool=pool, key_added="tiles")
        sf.tl.pair_transitions(train, transitions=[("A", "B")], groupby="state", random_state=seed, **options)
        config = MorphologyConfig(objective="pairs", crop_um=25.0, crop_pixels=a.pixels, losses={"contrast": 0})
        model = sf.tl.train_morphology(
            train, use_rep="E", config=config, max_epochs=a.epochs, random_state=seed, **options, **image
        )
        made = sf.tl.generate_morphology(
            test, source="A", target="B", model=model, random_state=seed, **options, **image
        )
        share = pd.DataFrame(
            test["tiles"].obsm["state"], test["tiles"].obs_names, list(test["tiles"].uns["tiles"]["state"])
        )
        crops = sf.pp.crops(test, crop_um=25.0, crop_pixels=a.pixels, **options, **image)
        inside = ((crops.xy > 0) & (crops.xy < np.array(test["fluorescence"].shape[:0:-1]))).all(1)
        states = {"A": (share["A"] >= 0.05) & (share["B"] < 0.05), "B": share["B"] >= 0.05}
        real = {}
        for state, chosen in states.items():
            which = np.flatnonzero(chosen.to_numpy() & inside)
            images = crops.read(which).numpy()
            real[state] = sf.pp.image_profile(images, channels=list(crops.channels), mpp=25 / a.pixels, whole=True)
        columns = [c for c in real["A"] if c in made.var_names]
        for feature in columns:
            before, after, now = real["A"][feature], real["B"][feature], pd.Series(made[:, feature].X.ravel())
            planted = after.mean() - before.mean()
            spread = np.sqrt(sum(v.var() / len(v) for v in (before, after)))
            table.add(data, feature, seed, "sources", {"mean": before.mean()})
            table.add(data, feature, seed, "targets", {
                "mean": after.mean(), "difference in standard errors": planted / spread,
            })  # fmt: skip
            table.add(data, feature, seed, "generated", {
                "mean": now.mean(), "share shown": (now.mean() - before.mean()) / planted,
                "standard error": np.sqrt(sum(v.var() / len(v) for v in (before, after, now))) / abs(planted),
            })  # fmt: skip
        table.add_run(data, "", seed, sources=len(real["A"]), targets=len(real["B"]))


def speed(a, table: results.Table) -> None:
    """Cells generated a second at 48 px, profiles measured; what the network has learned does not matter."""
    data, runs = "simulated:speed", (10, 4)
    if not table.lacks(data, "", 0, [f"heun {n}" for n in runs]):
        return
    sdata, image = sf.datasets.simulated_tissue(2000, seed=0), {"image_key": "fluorescence"}
    with_embeddings(sdata)
    sf.pp.morphology_profile(sdata, **image)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    model = sf.tl.train_morphology(sdata, use_rep="E", config="pairs", max_epochs=1, **image)
    for n in runs:
        start = time.perf_counter()
        made = sf.tl.generate_morphology(sdata, source="A", target="B", model=model, n_steps=n // 2, **image)
        seconds = time.perf_counter() - start
        table.add(data, "", 0, f"heun {n}", {"cells a second": made.n_obs / seconds})
    table.add_run(
        data, "", 0, pixels=model.config.crop_pixels, channels=len(model.config.channels), cells=made.n_obs,
        threads=torch.get_num_threads(),
    )  # fmt: skip


# ---- pancreas ----------------------------------------------------------------------------------------------------

MIN_CELLS, BLOCK_UM, OURS = 30, 500.0, "generated, heun 10"
GAINS = {  # what a part of training is worth: without it, with it, seed by seed
    "gain of weighting": ("generated, unweighted", OURS),
    "gain of weighting, pairs spoiled": ("generated, spoiled-unweighted", "generated, spoiled"),
    "gain of alignment": ("generated, unaligned", OURS),
    "gain of spatial context": ("generated, nospace", OURS),
}


@dataclass
class Images:
    """A sample of images as it is scored."""

    features: np.ndarray  # n x 64
    profile: np.ndarray  # n x f, in standard deviations of the training targets
    niche: np.ndarray  # n
    block: np.ndarray  # n, of the cell, or of the source it was made from

    def rows(self, which) -> "Images":
        return Images(*(v[which] for v in (self.features, self.profile, self.niche, self.block)))


def kernels(a: Images, b: Images) -> dict[str, np.ndarray]:
    """Both distances are means of a kernel: within a, plus within b, less twice between."""
    d = a.features.shape[1]
    return {"KID": (a.features @ b.features.T / d + 1) ** 3, "energy": -cdist(a.profile, b.profile)}


def distances(a: Images, b: Images, draws: list) -> dict[str, np.ndarray]:
    """KID and energy distance under weights of blocks: one value a draw. A cell is not compared with itself."""
    aa, bb, ab = kernels(a, a), kernels(b, b), kernels(a, b)
    out = {name: np.empty(len(draws)) for name in aa}
    for i, weight in enumerate(draws):
        x, y = weight[a.block], weight[b.block]
        for name, values in out.items():
            within = [
                (w @ k[name] @ w - w**2 @ np.diag(k[name])) / (w.sum() ** 2 - w @ w) for w, k in ((x, aa), (y, bb))
            ]
            values[i] = within[0] + within[1] - 2 * (x @ ab[name] @ y) / (x.sum() * y.sum())
    return out


def over_niches(a: Images, b: Images, draws: list, seed: int = 0) -> dict[str, np.ndarray]:
    """Mean over niches of the distances at equal n."""
    rng, found = np.random.default_rng(seed), []
    for niche in np.unique(b.niche):
        rows = [np.flatnonzero(one.niche == niche) for one in (a, b)]
        if (n := min(map(len, rows))) < MIN_CELLS:
            continue
        one, other = (s.rows(np.sort(rng.permutation(r)[:n])) for s, r in zip((a, b), rows))
        found.append(distances(one, other, draws))
    if not found:
        raise SystemExit(f"no niche holds {MIN_CELLS} images of both samples: give more --cells")
    return {name: np.nanmean([f[name] for f in found], 0) for name in found[0]}


def block_draws(block: np.ndarray, n: int = 300, seed: int = 0) -> list[np.ndarray]:
    """How often each block is drawn: once each, then in ``n`` resamples; the last place is for images of no test block."""
    rng, there = np.random.default_rng(seed), np.unique(block)
    draws = [there, *(rng.choice(there, len(there)) for _ in range(n))]
    return [np.append(np.bincount(draw, minlength=block.max() + 1), 1.0) for draw in draws]


class Pancreas:
    """Real images of the parts, and how any images are measured."""

    def __init__(self, store: str, cache: Path | None, crop_um: float, pixels: int, band: bool = False):
        self.parts = embedded(store, cache)
        self.states = fit_states(self.parts)
        if band:
            self.parts = with_band(self.parts)
        self.mpp = crop_um / pixels
        self.crops = {
            name: sf.pp.crops(part, mpp=1, crop_um=crop_um, crop_pixels=pixels) for name, part in self.parts.items()
        }
        self.table = {name: part["table"] for name, part in self.parts.items()}
        xy = {name: _io.places(part, _io.Where(mpp=1))[0].xy for name, part in self.parts.items()}
        self.block = {name: sf.metrics.spatial_blocks(v, BLOCK_UM) for name, v in xy.items()}
        self.mean = self.std = None

    def rows(self, part: str, state: str) -> np.ndarray:
        return np.flatnonzero((self.table[part].obs["state"] == state).to_numpy())

    def images(self, part: str, rows: np.ndarray) -> np.ndarray:
        return self.crops[part].read(rows).numpy()

    def sample(self, images: np.ndarray, part: str, rows: np.ndarray) -> Images:
        """Images that stand for the cells ``rows`` of a part."""
        channels = list(self.crops[part].channels)
        profile = sf.pp.image_profile(images, channels=channels, mpp=self.mpp).to_numpy()
        if self.mean is None:  # the first sample: training targets
            self.mean, self.std = np.nanmean(profile, 0), np.nanstd(profile, 0)
        profile = np.nan_to_num((profile - self.mean) / self.std)
        features = sf.metrics.image_features(images, channels=channels, mpp=self.mpp)
        niche = self.table[part].obs["niche"].astype(str).to_numpy()[rows]
        return Images(features, profile, niche, self.block[part][rows])


def matched(images: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Intensities of each channel mapped so that those of ``source`` get the distribution of those of ``target``."""
    out = np.empty_like(images)
    for c in range(images.shape[1]):
        old, new = (np.quantile(v[:, c], np.linspace(0, 1, 1001)) for v in (source, target))
        out[:, c] = np.interp(images[:, c], old + 1e-6 * np.arange(len(old)), new)
    return out


def effect(before: Images, shown: Images, wanted: Images) -> dict[str, float]:
    """Recovery of the true shift over all cells, and the mean over niches."""
    found = {
        f"effect, {k}": v for k, v in sf.metrics.effect_recovery(before.profile, shown.profile, wanted.profile).items()
    }
    niches = []
    for niche in np.unique(wanted.niche):
        some = [one.profile[one.niche == niche] for one in (before, shown, wanted)]
        if min(map(len, some)) >= MIN_CELLS:
            niches.append(sf.metrics.effect_recovery(*some))
    return found | {f"effect in niches, {k}": v for k, v in pd.DataFrame(niches).mean().items()}


def gain(without: list, having: list) -> dict[str, float]:
    """How much farther from real targets models are without a part of training, seed by seed, with an interval over blocks."""
    row = {"seeds": len(having)}
    for metric in having[0]:
        each = np.stack([a[metric] - b[metric] for a, b in zip(without, having)])  # seeds x draws
        low, high = np.nanquantile(each.mean(0)[1:], (0.025, 0.975))
        row |= {
            metric: each.mean(0)[0], f"{metric}, low": low, f"{metric}, high": high,
            f"{metric}, sd of seeds": pd.Series(each[:, 0]).std(),
        }  # fmt: skip
    return row


def generators(a) -> dict[str, list]:
    """Models by variant, one a seed; the first are ours."""
    if (a.weights is None) == (a.folder is None):
        raise SystemExit("give --weights FILE or --folder FOLDER: benchmarks/morphology_weights.py makes both")
    if a.weights:
        return {"ours": [sf.models.load(a.weights)]}
    found = {}
    for path in sorted(a.folder.glob("*-[0-9]*.safetensors")):
        found.setdefault(path.stem.rsplit("-", 1)[0], []).append(sf.models.load(path))
    return {"ours": found.pop("ours"), **found}


def pancreas(a, table: results.Table) -> None:
    """Distances to real targets; of several seeds the mean, with the standard deviation over seeds."""
    models = generators(a)
    model = models["ours"][0]
    methods = [OURS, *(f"generated, {key}" for key in models if key != "ours")]
    if not any(table.lacks(f"pancreas:{name}", a.part, "mean", methods) for name in model.config.transitions):
        return
    data = Pancreas(a.store, a.cache, model.config.crop_um, model.config.crop_pixels)
    rng, where = np.random.default_rng(0), a.part
    for name in model.config.transitions:
        label = f"pancreas:{name}"
        source, target = name.split(" -> ")
        parts = {(p, s): data.rows(p, s) for p in ("train", where) for s in (source, target)}
        if source == target:  # the negative control: halves of one state, by turns
            for p in ("train", where):
                shuffled = rng.permutation(parts[p, source])
                parts[p, source], parts[p, "half"] = np.sort(shuffled[::2]), np.sort(shuffled[1::2])
            target = "half"
        parts = {key: np.sort(rng.permutation(r)[: a.cells]) for key, r in parts.items()}
        real = {key: data.images(key[0], r) for key, r in parts.items()}
        data.mean = None
        known = data.sample(real["train", target], "train", parts["train", target])
        wanted = data.sample(real[where, target], where, parts[where, target])
        here = parts[where, source]
        draws = block_draws(np.concatenate([data.block[where][parts[where, s]] for s in (source, target)]))
        x = {p: np.asarray(data.table[p].obsm["X_spatia_cell"]) for p in ("train", where)}
        nearest = cKDTree(x["train"][parts["train", target]]).query(x[where][here])[1]
        mean = {
            n: real["train", target][known.niche == n].mean(0).astype(np.uint8)
            for n in np.unique(data.table["train"].obs["niche"].astype(str)) if (known.niche == n).any()
        }  # fmt: skip
        control = real[where, source]
        niche = data.table[where].obs["niche"].astype(str).to_numpy()[here]
        images = {
            "copy of the source": control,
            "source, histogram of the target": matched(control, real["train", source], real["train", target]),
            "nearest training target": real["train", target][nearest],
            "mean training target": np.stack([mean.get(n, real["train", target].mean(0).astype(np.uint8)) for n in niche]),
        }  # fmt: skip
        images = {key: [one] for key, one in images.items()}
        runs = {OURS: (models["ours"], 10)}
        if not a.quick:
            runs["generated, heun 200, one seed"] = (models["ours"][:1], 200)
            runs["generated, heun 10, one seed"] = (models["ours"][:1], 10)
        runs |= {f"generated, {key}": (other, 10) for key, other in models.items() if key != "ours"}
        seconds = {}
        for key, (made_by, n) in runs.items():
            start = time.perf_counter()
            images[key] = [
                sf.tl.generate_morphology(
                    data.parts[where], source=source, target=name.split(" -> ")[1], model=one, mpp=1, n_steps=n // 2,
                    cells=list(data.table[where].obs_names[here]), random_state=seed,
                ).obsm["image"]
                for seed, one in enumerate(made_by)
            ]  # fmt: skip
            seconds[key] = (time.perf_counter() - start) / len(here) / len(made_by)
        samples = {key: [data.sample(one, where, here) for one in some] for key, some in images.items()}
        halves = [wanted.rows(np.arange(i, len(wanted.niche), 2)) for i in (0, 1)]
        known.block[:] = len(draws[0]) - 1
        found = {key: [over_niches(one, wanted, draws) for one in some] for key, some in samples.items()}
        found["real targets, half against half"] = [over_niches(*halves, draws)]
        found["training targets"] = [over_niches(known, wanted, draws)]
        ours = {metric: np.mean([one[metric] for one in found[OURS]], 0) for metric in found[OURS][0]}
        for key, some in found.items():
            row = {"seeds": len(some), "seconds a cell": seconds.get(key, np.nan)}
            for metric in ours:
                v = np.mean([one[metric] for one in some], 0)
                for score, one in ((metric, v), (f"{metric} minus ours", v - ours[metric])):
                    low, high = np.nanquantile(one[1:], (0.025, 0.975))
                    row |= {score: one[0], f"{score}, low": low, f"{score}, high": high}
                row[f"{metric}, sd of seeds"] = pd.Series([one[metric][0] for one in some]).std()
            if key in samples:
                before = samples["copy of the source"][0]
                each = [
                    effect(before, one, wanted)
                    | {
                        "shift": np.linalg.norm(one.profile.mean(0) - before.profile.mean(0)),
                        "true shift": np.linalg.norm(wanted.profile.mean(0) - before.profile.mean(0)),
                        "memorised": sf.metrics.memorised(one.features, known.features, wanted.features),
                        "spread": one.features.std(0).mean() / wanted.features.std(0).mean(),
                    }
                    for one in samples[key]
                ]
                row |= pd.DataFrame(each).mean().to_dict()
            for seed, one in enumerate(some):
                table.add(label, where, seed, key, {metric: values[0] for metric, values in one.items()})
            table.add(label, where, "mean", key, row)
        for key, (one, other) in GAINS.items():
            if {one, other} <= set(found) and len(found[one]) == len(found[other]):
                for seed, (x, y) in enumerate(zip(found[one], found[other])):
                    table.add(label, where, seed, key, {metric: x[metric][0] - y[metric][0] for metric in x})
                table.add(label, where, "mean", key, gain(found[one], found[other]))
        table.add(label, where, "", "run", {"cells": len(here), "target cells": len(wanted.niche)})
    table.add_run("pancreas", where)


COMMANDS = {"simulated": simulated, "bundled": bundled, "tiles": tiles, "speed": speed, "pancreas": pancreas}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("what", choices=list(COMMANDS))
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--train", type=int, default=30_000, help="simulated cells to train on")
    out.add_argument("--test", type=int, default=6000, help="cells of the simulated slide that is scored")
    out.add_argument("--epochs", type=int, default=10, help="of training on simulated tissue")
    out.add_argument("--pixels", type=int, default=32, help="side of a crop of simulated tissue")
    out.add_argument("--store")
    out.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    out.add_argument("--weights", help="file of a generator, by benchmarks/morphology_weights.py")
    out.add_argument("--folder", type=Path, help="of variants and seeds, by benchmarks/morphology_weights.py --folder")
    out.add_argument(
        "--part", default="test", choices=["validation", "test"], help="validation: 17000-19000, for choices"
    )
    out.add_argument("--cells", type=int, default=1000, help="most cells of a state that are scored")
    out.add_argument("--quick", action="store_true", help="without the 200 evaluations")
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.what](a, results.Table("morphology", again=a.again))
