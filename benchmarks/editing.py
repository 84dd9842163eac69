"""Cells of the pancreas edited by their genes, against real cells of the target state.

    python benchmarks/editing.py --store pancreas.zarr --cache features --folder runs [--part validation]
    python benchmarks/editing.py --store pancreas.zarr --cache features --folder runs-band --part band

``runs`` holds ``genes-0.safetensors``, ... by ``benchmarks/morphology_weights.py --variants genes``: one model a seed. Distances,
niches, blocks and intervals are those of ``benchmarks/morphology.py pancreas``.

data    ``pancreas:A -> B``: sources of A edited to B. ``pancreas:B, genes of another cell``: cells of B that get the genes of
        another cell of B in their niche, compared with other cells of B
split   ``test`` is the mean over niches with enough cells of both states, ``test, niche 2`` is one of them. ``test, y < 4096`` is
        what lies in ``datasets.xenium_pancreas()``, ``test, y >= 4096`` the rest, both over all niches; ``..., alike`` are
        pairs of a source and a target whose 12 neighbours are alike in stains and in the shares of exocrine cells and fibroblasts
        ``band`` has the exocrine cells of a band of the training part, edited by models that were trained without it
method  ``flow`` and ``linear map`` are the two edits of a model, each at the strength that its training chose for the
        transition; ``default`` is the one that training took. ``flow, guidance W`` and ``linear map, x S`` are other strengths
        (S relative to the chosen one)
metric  ``KID minus linear map``: below 0 where the method is nearer to real targets than the linear map. ``half dose, lowest``
        and ``highest``: share of the effect of the full dose that half of it has, over features whose full effect is
        ``MIN_EFFECT`` standard deviations or more. ``dose 0, pixel correlation``: with the pixels of the image. ``rna, target
        minus source``: difference of the mean stain of crops, in grey values
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

import results
import spatiaflow as sf
from embedding import MPP
from morphology import MIN_CELLS, OURS, Images, Pancreas, block_draws, distances, effect, over_niches
from spatiaflow.models.orientation import canonical, inverse, turned
from spatiaflow.models.transport import transport
from spatiaflow.tl._generation import _as_in_training, _slides_for
from transitions import EXOCRINE

MIN_EFFECT, DOSES = 0.2, [0.0, 0.5, 1.0]
FIBROBLASTS = ("SFRP4/LTBP2", "COL5A2/THBS2")
PLACE_BLOCK_UM, NEAR = 100.0, 1.0  # the public region is too small for blocks of 500; distance of like surroundings
PAIRS = OURS.replace("generated", "pairs")


def with_edit(model, edit: str | None = None, guidance: float | None = None):
    """Let a model edit in one way; of None as its training chose."""
    model.config = replace(model.config, edit=edit, guidance=guidance)
    return model


def generated(data: Pancreas, where: str, model, rows: np.ndarray, name: str, **options) -> list[np.ndarray]:
    """Images of some cells after an edit, one array a dose."""
    source, target = name.split(" -> ")
    made = sf.tl.generate_morphology(
        data.parts[where], source=source, target=target, model=model, mpp=1, cells=list(data.table[where].obs_names[rows]),
        **options,
    )  # fmt: skip
    return [made.obsm["image"][made.obs["dose"] == dose] for dose in dict.fromkeys(made.obs["dose"])]


def genes_of(data: Pancreas, where: str, model) -> tuple[list, np.ndarray]:
    """Slides of a part as a model of genes reads them, and the components of all cells."""
    slides = _as_in_training(_slides_for(data.parts[where], sf._io.Where(mpp=1), data.table[where], model), model)
    given = model.components.surroundings(
        [s.align(model.genes) for s in slides], model.config.n_neighbors, model.config.crop_um
    )
    return slides, given.own.numpy()


@torch.inference_mode()
def shifted(model, images: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Images whose latents are moved by the mean difference of those of two samples of training images."""
    low, high = np.array([model.intensity[name] for name in model.config.channels]).T[:, None, :, None, None]

    def read(x):
        x = torch.from_numpy((2 * (x - low[0]) / (high - low)[0] - 1).astype(np.float32))
        return turned(x, canonical(x)), canonical(x)

    (x, turns), means = read(images), [model.autoencoder.encode(read(v)[0]).mean(0) for v in (before, after)]
    z = model.autoencoder.encode(x)
    made = turned(model.autoencoder.decode(z + means[1] - means[0], model.autoencoder.grain(x, z)), inverse(turns))
    pixels = (made.numpy() + 1) / 2 * (high - low)[0] + low[0]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def doses(before: Images, half: Images, whole: Images, zero: np.ndarray, source: np.ndarray) -> dict[str, float]:
    """What half a dose and none do."""
    full, part = (one.profile.mean(0) - before.profile.mean(0) for one in (whole, half))
    tested = np.abs(full) >= MIN_EFFECT
    share = part[tested] / full[tested]
    r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(zero.astype(float), source.astype(float))]
    return {
        "half dose, lowest": share.min() if len(share) else np.nan, "half dose, highest": share.max() if len(share) else np.nan,
        "features tested": tested.sum(), "features within .4 to .6": ((share >= 0.4) & (share <= 0.6)).sum(),
        "dose 0, pixel correlation": np.mean(r), "dose 0, lowest pixel correlation": min(r),
    }  # fmt: skip


def summary(found: dict[str, list], base: list[dict], against: str = "linear map") -> dict[str, dict[str, float]]:
    """Means over seeds, with intervals over blocks, and differences to a method seed by seed."""
    out = {}
    for key, some in found.items():
        row = {"seeds": len(some)}
        for metric in some[0]:
            each = np.stack([one[metric] for one in some])  # seeds x draws
            minus = np.stack([one[metric] - base[min(i, len(base) - 1)][metric] for i, one in enumerate(some)])
            for score, v in ((metric, each.mean(0)), (f"{metric} minus {against}", minus.mean(0))):
                low, high = np.nanquantile(v[1:], (0.025, 0.975))
                row |= {score: v[0], f"{score}, low": low, f"{score}, high": high}
            row[f"{metric}, sd of seeds"] = pd.Series(each[:, 0]).std()
        out[key] = row
    return out


def drawn(data: Pancreas, where: str, state: str, most: int, rng) -> np.ndarray:
    """Rows of a state, at most ``most`` in each niche. Drawn over all niches, a niche may keep too few and not be scored."""
    rows = rng.permutation(data.rows(where, state))
    niche = data.table[where].obs["niche"].astype(str).to_numpy()[rows]
    return np.sort(np.concatenate([rows[niche == one][:most] for one in np.unique(niche)]))


def in_each_niche(table: results.Table, label: str, where: str, samples: dict, wanted: Images, draws: list) -> None:
    """Distances to real targets niche by niche, of all cells: both are unbiased at any n, and a draw of 30 cells is noisy."""
    for niche in np.unique(wanted.niche):
        real, n = wanted.rows(wanted.niche == niche), (samples["copy of the source"][0].niche == niche).sum()
        if min(n, len(real.niche)) < MIN_CELLS:
            continue
        found = {
            key: [distances(one.rows(one.niche == niche), real, draws) for one in some]
            for key, some in samples.items()
            if min((one.niche == niche).sum() for one in some) >= MIN_CELLS
        }
        for key, row in summary(found, found["linear map"]).items():
            table.add(label, f"{where}, {niche}", "mean", key, row)
        table.add(label, f"{where}, {niche}", "", "run", {"cells": n, "target cells": len(real.niche)})


def transition(a, table: results.Table, data: Pancreas, models: list, name: str) -> None:
    """One transition: all methods, all seeds."""
    label, where, (source, target), rng = f"pancreas:{name}", a.part, name.split(" -> "), np.random.default_rng(0)
    rows = {(p, s): drawn(data, p, s, a.cells, rng) for p in ("train", where) for s in (source, target)}
    real = {key: data.images(key[0], r) for key, r in rows.items()}
    data.mean = None
    known = data.sample(real["train", target], "train", rows["train", target])
    wanted = data.sample(real[where, target], where, rows[where, target])
    here, control = rows[where, source], real[where, source]
    draws = block_draws(np.concatenate([data.block[where][rows[where, s]] for s in (source, target)]), a.draws)
    known.block[:] = len(draws[0]) - 1
    x = {p: np.asarray(data.table[p].obsm["X_spatia_cell"]) for p in ("train", where)}
    nearest = cKDTree(x["train"][rows["train", target]]).query(x[where][here])[1]
    own = {p: genes_of(data, p, models[0])[1] for p in ("train", where)}
    plan = transport(own[where][here], own["train"][rows["train", target]], rho=None)
    images: dict[str, list[np.ndarray]] = {
        "copy of the source": [control], "nearest training target": [real["train", target][nearest]],
        "OT-matched training target": [real["train", target][plan.draw(rng)]],
        "mean shift of latents": [shifted(models[0], control, real["train", source], real["train", target])],
    }  # fmt: skip
    pairs = sf.models.load(sf.datasets.weights("morphology-pancreas-small"))
    if name in pairs.config.transitions:
        images[PAIRS] = generated(data, where, pairs, here, name, random_state=0)
    dosed: dict[str, list] = {}
    for model in models:
        chosen, line = with_edit(model).edit_of(name).kind, model.linear
        for method, edit in (("flow", "flow"), ("linear map", "linear")):
            dosed.setdefault(method, []).append(generated(data, where, with_edit(model, edit), here, name, dose=DOSES))
            images.setdefault(method, []).append(dosed[method][-1][-1])
        images.setdefault("default", []).append(images[{"linear": "linear map"}.get(chosen, chosen)][-1])
        for w in a.guidance:
            one = with_edit(model, "flow", w)
            images.setdefault(f"flow, guidance {w:g}", []).extend(generated(data, where, one, here, name))
        for s in a.strengths:
            model.linear = s * line
            images.setdefault(f"linear map, x {s:g}", []).extend(
                generated(data, where, with_edit(model, "linear"), here, name)
            )
        model.linear = line
    samples = {key: [data.sample(one, where, here) for one in some] for key, some in images.items()}
    before = samples["copy of the source"][0]
    found = {key: [over_niches(one, wanted, draws) for one in some] for key, some in samples.items()}
    found["training targets"] = [over_niches(known, wanted, draws)]
    in_each_niche(table, label, where, samples | {"training targets": [known]}, wanted, draws)
    for key, row in summary(found, found["linear map"]).items():
        each = []
        for seed, one in enumerate(samples.get(key, [])):
            score = effect(before, one, wanted)
            if key in dosed:
                half = data.sample(dosed[key][seed][1], where, here)
                score |= doses(before, half, one, dosed[key][seed][0], control)
            each.append(score)
            table.add(label, where, seed, key, {m: v[0] for m, v in found[key][seed].items()} | score)
        table.add(label, where, "mean", key, row | pd.DataFrame(each).mean().to_dict())
    table.add(label, where, "", "run", {"cells": len(here), "target cells": len(wanted.niche)})


def around(data: Pancreas, where: str) -> np.ndarray:
    """What surrounds each cell, standardised: mean stains of its 12 neighbours, and their shares of two kinds of cells."""
    (slide,) = sf._io.places(data.parts[where], sf._io.Where(mpp=1))
    near = cKDTree(slide.xy).query(slide.xy, k=13)[1][:, 1:]
    state = data.table[where].obs["state"].astype(str).to_numpy()
    stain = np.concatenate([
        data.images(where, rows).mean((2, 3)) for rows in np.array_split(np.arange(len(state)), len(state) // 1000 + 1)
    ])  # fmt: skip
    kinds = np.stack([np.isin(state, kind) for kind in (EXOCRINE, FIBROBLASTS)], 1)
    found = np.concatenate([stain, kinds], 1)[near].mean(1)
    return (found - found.mean(0)) / found.std(0)


def places(a, table: results.Table, data: Pancreas, models: list, name: str) -> None:
    """One transition in the public region and outside of it, as it is and where the surroundings are alike."""
    label, where, (source, target) = f"pancreas:{name}", a.part, name.split(" -> ")
    (slide,) = sf._io.places(data.parts[where], sf._io.Where(mpp=1))
    block, surroundings = sf.metrics.spatial_blocks(slide.xy, PLACE_BLOCK_UM), around(data, where)
    rows = {state: data.rows(where, state) for state in (source, target)}
    data.mean = None
    real = {state: data.images(where, r) for state, r in rows.items()}
    wanted = data.sample(real[target], where, rows[target])
    images = {"copy of the source": [real[source]]}
    for model in models:
        for method, edit in (("flow", "flow"), ("linear map", "linear")):
            images.setdefault(method, []).extend(generated(data, where, with_edit(model, edit), rows[source], name))
    samples = {key: [data.sample(one, where, rows[source]) for one in some] for key, some in images.items()}
    for one, state in [(wanted, target), *((one, source) for some in samples.values() for one in some)]:
        one.block = block[rows[state]]
    north = slide.xy[:, 1] < 4096 * MPP
    for split, inside in ((f"{where}, y < 4096", north), (f"{where}, y >= 4096", ~north)):
        one, other = (np.flatnonzero(inside[rows[state]]) for state in (source, target))
        cost = cdist(surroundings[rows[source][one]], surroundings[rows[target][other]])
        i, j = linear_sum_assignment(cost**2)
        near = cost[i, j] < NEAR
        for part, (x, y) in {split: (one, other), f"{split}, alike": (one[i[near]], other[j[near]])}.items():
            draws = block_draws(np.concatenate([block[rows[source][x]], block[rows[target][y]]]), a.draws)
            found = {key: [distances(s.rows(x), wanted.rows(y), draws) for s in some] for key, some in samples.items()}
            for key, row in summary(found, found["copy of the source"], "copies").items():
                table.add(label, part, "mean", key, row)
            rna = [real[state][r, 2].mean((1, 2)) for state, r in ((source, x), (target, y))]
            table.add(label, part, "", "run", {
                "cells": len(x), "target cells": len(y), "rna, target minus source": rna[1].mean() - rna[0].mean(),
                "rna, standard error": np.sqrt(sum(v.var() / len(v) for v in rna)),
            })  # fmt: skip


def another(a, table: results.Table, data: Pancreas, models: list, state: str) -> None:
    """Cells of a state that get the genes of another cell of it, against other cells of it."""
    label, where, rng = f"pancreas:{state}, genes of another cell", a.part, np.random.default_rng(0)
    rows = rng.permutation(data.rows(where, state))[: 2 * a.cells]
    here, others = np.sort(rows[::2]), np.sort(rows[1::2])
    data.mean = None
    wanted = data.sample(data.images(where, others), where, others)
    control = data.images(where, here)
    niche = data.table[where].obs["niche"].astype(str).to_numpy()[here]
    donor = np.arange(len(here))
    for one in np.unique(niche):
        donor[niche == one] = rng.permutation(donor[niche == one])
    draws = block_draws(data.block[where][np.concatenate([here, others])], a.draws)
    make: dict[str, Callable] = {}
    for edit, w in (("flow", None), ("linear", None), ("flow", 0.0), ("flow", 1.0)):
        key = {"flow": "flow", "linear": "linear map"}[edit] + ("" if w is None else f", guidance {w:g}")
        make[key] = lambda model, edit=edit, w=w: with_edit(model, edit, w)
    samples = {"copy of the source": [data.sample(control, where, here)]}
    for model in models:
        slides, own = genes_of(data, where, model)
        for key, made_by in make.items():
            change = own[here][donor] - own[here]
            images = made_by(model).generate_cells(slides, here, change, niche)["image"]
            samples.setdefault(key, []).append(data.sample(images, where, here))
    found = {key: [over_niches(one, wanted, draws) for one in some] for key, some in samples.items()}
    for key, row in summary(found, found["linear map"]).items():
        for seed, one in enumerate(found[key]):
            table.add(label, where, seed, key, {m: v[0] for m, v in one.items()})
        table.add(label, where, "mean", key, row)


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("--store", required=True)
    out.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    out.add_argument("--folder", type=Path, required=True, help="of models by benchmarks/morphology_weights.py")
    out.add_argument("--part", default="test", choices=["validation", "test", "band"])
    out.add_argument("--cells", type=int, default=600, help="most cells of a state in a niche that are scored")
    out.add_argument("--draws", type=int, default=300, help="resamples of blocks")
    out.add_argument("--guidance", type=float, nargs="*", default=[])
    out.add_argument("--strengths", type=float, nargs="*", default=[])
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    table = results.Table("editing", again=a.again)
    models = [sf.models.load(path) for path in sorted(a.folder.glob("genes-[0-9]*.safetensors"))]
    data = Pancreas(a.store, a.cache, models[0].config.crop_um, models[0].config.crop_pixels, band=a.part == "band")
    names = [name for name in models[0].config.transitions if len(set(name.split(" -> "))) == 2]
    names = [name for name in names if ({*name.split(" -> ")} == {*EXOCRINE}) == (a.part == "band")]
    for name in names:
        if table.lacks(f"pancreas:{name}", a.part, "mean", "default"):
            transition(a, table, data, models, name)
    for name in names:
        if {*name.split(" -> ")} == {*FIBROBLASTS} and table.lacks(
            f"pancreas:{name}", f"{a.part}, y < 4096", "mean", "flow"
        ):
            places(a, table, data, models, name)
    for state in dict.fromkeys(name.split(" -> ")[1] for name in names):
        if table.lacks(f"pancreas:{state}, genes of another cell", a.part, "mean", "flow"):
            another(a, table, data, models, state)
    for seed, model in enumerate(models if a.part != "band" else []):
        table.add("pancreas", "held-out band", seed, "run", {
            **model.card["validation_scores"], "guidance chosen": model.edits[""].guidance,
        })  # fmt: skip
    table.add_run("pancreas", a.part)
