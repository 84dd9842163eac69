"""Cell, niche and tissue embeddings: image to expression, retrieval, annotation and domains, beside simple baselines.

    python benchmarks/embedding.py pancreas --store pancreas.zarr --weights spatia-pancreas-small
    python benchmarks/embedding.py starmap --seeds 3 --epochs 20
    python benchmarks/embedding.py simulated --seeds 3

Pancreas: everything is fitted on x < 16500 px, tested on x > 19500; between them 17000-19000 shows the shift along the
slide. All parts are of one slide, so intensities are scaled by the training part's; scaled part by part is a row of its
own. Labels of the pancreas are clusters that its publishers made from the same counts, not gold. STARmap: fitted on two
mice, tested on the third; penalties are chosen by leaving one of the two out. Neighbours are looked up inside a part or
a mouse. What a run of the same seed has measured is not measured again.
"""

import argparse
import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

import results
import spatiaflow as sf
from probes import MIN_COUNTS, Classifier, Probe, around, banksy, expression, folds, scvi_latent, supervised_cnn
from spatiaflow import _io
from spatiaflow.models.preprocess import scaled
from spatiaflow.models.regression import gene_pearson
from spatiaflow.models.spatia import Spatia, SpatiaConfig, SpatiaNetwork

MPP = 0.2125
PARTS = {"train": (0, 16500), "validation": (17000, 19000), "test": (19500, 99999)}  # px
N_GENES, BLOCK_UM = 50, 500.0
BASELINE = "CNN, supervised + neighbours"  # what embeddings are compared with, pair by pair
SELF_SUPERVISED, VARIANT = "SPATIA image, self-supervised (no genes), cell", "CNN, no augmentation + neighbours"


# ---- pancreas ----------------------------------------------------------------------------------------------------


def pancreas_parts(store: str) -> dict:
    """A SpatialData for each part, with all its cells: they are neighbours; scores are over those with 15 counts."""
    import spatialdata as sd

    whole = sd.read_zarr(store)
    table = whole["table"]
    (slide,) = _io.places(whole, _io.Where(mpp=1))
    genes = ~table.var["control"].to_numpy(bool) if "control" in table.var else np.ones(table.n_vars, bool)
    enough = np.asarray(table[:, genes].X.sum(1)).ravel() >= 5
    out = {}
    for name, (low, high) in PARTS.items():
        x = slide.xy[:, 0] / MPP
        part = table[(x >= low) & (x < high) & enough, genes].copy()
        elements = {key: element for _, key, element in whole.gen_elements() if key != "table"}
        out[name] = sd.SpatialData.init_from_elements({**elements, "table": part})
    return out


def spatia_levels(parts: dict, model, modalities, scaling="training") -> dict:
    """Level -> part -> embedding."""
    out = {level: {} for level in ("cell", "niche", "tissue")}
    for name, part in parts.items():
        sf.tl.embed_spatia(part, model=model, modalities=modalities, scaling=scaling, mpp=1, key_added="b")
        for level in out:
            out[level][name] = np.asarray(part["table"].obsm[f"b_{level}"])
    return out


def join(*features: dict) -> dict:
    """Features side by side, part by part."""
    return {name: np.concatenate([f[name] for f in features], 1) for name in PARTS}


def retrieval(parts: dict, model: Spatia, seed: int, n: int = 1000) -> dict:
    """How often the image of a cell is the first (or among ten) that its genes find among 1,000 test cells."""
    part, c = parts["test"], model.config
    table, crops = part["table"], sf.pp.crops(part, mpp=1, crop_um=c.crop_um, crop_pixels=c.crop_pixels)
    crops = replace(crops, wide=c.wide)
    counts, rng = sparse.csr_matrix(table[:, c.genes].X), np.random.default_rng(seed)
    chosen = np.sort(rng.choice(np.flatnonzero(np.asarray(counts.sum(1)).ravel() >= MIN_COUNTS), n, replace=False))
    order = np.array([[ch.lower() for ch in crops.channels].index(name) for name in c.channels])
    known = np.array([model.card["intensity"][name] for name in c.channels])
    x = scaled(crops.read(chosen), known[np.argsort(order)], order)
    value = torch.from_numpy(counts[chosen].toarray().astype(np.float32))
    measured = torch.ones(1, len(c.genes), dtype=torch.bool)
    network = model.network.eval()
    with torch.inference_mode():
        genes = network.gene_tokens(value, measured, measured, model.target_sum)
        score = network.match(genes, "genes") @ network.match(network.image(x), "image").T
    rank = (score >= score.diagonal()[:, None]).sum(1).numpy()
    return {"top 1": np.mean(rank <= 1), "top 10": np.mean(rank <= 10), "median rank": float(np.median(rank))}


def annotation(a, table: results.Table, parts: dict, tables: dict, features: dict, model: Spatia) -> None:
    """Measure agreement with clusters of the publishers, by a linear probe and by clusters of our own."""
    import scanpy as sc
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score, silhouette_score

    label, use = {}, {}
    for name, cells in tables.items():
        label[name], (_, scored) = cells.obs["cluster"].astype(str).to_numpy(), expression(cells)
        use[name] = np.flatnonzero(scored)  # only cells without counts have no cluster
    y = {name: expression(cells)[0] for name, cells in tables.items()}
    axes = PCA(50, random_state=0).fit(y["train"][use["train"]])
    sets = {"PCA of genes": {name: axes.transform(v) for name, v in y.items()}}
    image = features["hand features"]
    mean, std = image["train"].mean(0), image["train"].std(0) + 1e-6
    axes = PCA(15, random_state=0).fit((image["train"] - mean) / std)
    sets["PCA of image features"] = {name: axes.transform((image[name] - mean) / std) for name in parts}
    sets["PCA of genes and of image features, side by side"] = join(*sets.values())
    sets["all genes"] = y
    if "CNN, supervised" in features:
        sets["CNN, supervised"] = {name: features["CNN, supervised"][name] for name in parts}
    genes, both = (spatia_levels(parts, model, m) for m in ("genes", ("image", "genes")))
    sets |= {
        "SPATIA image, cell": features["SPATIA image, cell"],
        "SPATIA image, all levels": features["SPATIA image, all levels"],
        "SPATIA genes, cell": genes["cell"], "SPATIA genes, all levels": join(*genes.values()),
        "SPATIA fused, cell": both["cell"], "SPATIA fused, niche": both["niche"], "SPATIA fused, tissue": both["tissue"],
        "SPATIA fused, cell + niche": join(both["cell"], both["niche"]), "SPATIA fused, all levels": join(*both.values()),
    }  # fmt: skip
    rng = np.random.default_rng(a.seed)
    some = np.sort(rng.choice(use["train"], min(10_000, len(use["train"])), replace=False))
    seen = np.sort(rng.choice(use["test"], min(6_000, len(use["test"])), replace=False))
    band = folds(_io.places(parts["train"], _io.Where(mpp=1))[0].xy)[some]
    for name, x in sets.items():
        if not table.lacks("pancreas", "test", a.seed, name, "macro F1"):
            continue
        mean, std = x["train"].mean(0), x["train"].std(0) + 1e-6
        z, target, inner = (x["train"][some] - mean) / std, label["train"][some], {}
        for c in (0.003, 0.03, 0.3):
            fit = LogisticRegression(C=c, max_iter=200).fit(z[band != 3], target[band != 3])
            inner[c] = f1_score(target[band == 3], fit.predict(z[band == 3]), average="macro")
        best = max(inner, key=inner.get)
        fit = LogisticRegression(C=best, max_iter=200).fit(z, target)
        tested = (x["test"][use["test"]] - mean) / std
        f1 = f1_score(label["test"][use["test"]], fit.predict(tested), average="macro")
        cells = sc.AnnData((x["test"][seen] - mean) / std)
        sc.pp.neighbors(cells, use_rep="X", random_state=0)
        truth, known = label["test"][seen], {}
        for resolution in (0.1, 0.25, 0.5, 1.0, 1.5, 2.0):
            sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, random_state=0)
            found = cells.obs["leiden"].to_numpy()
            if len(np.unique(found)) > 1:
                known[resolution] = (
                    silhouette_score(cells.X, found, sample_size=2000, random_state=0),
                    adjusted_rand_score(truth, found), normalized_mutual_info_score(truth, found),
                )  # fmt: skip
        chosen = max(known.values())  # by silhouette: without labels
        table.add("pancreas", "inner", a.seed, name, {"macro F1": max(inner.values())})
        table.add("pancreas", "test", a.seed, name, {
            "macro F1": f1, "ARI": chosen[1], "NMI": chosen[2], "ARI, oracle resolution": max(v[1] for v in known.values()),
            "dimensions": x["train"].shape[1],
        })  # fmt: skip


def pancreas(a, table: results.Table) -> None:
    asked_for = {SELF_SUPERVISED: a.self_supervised, VARIANT: a.variants, BASELINE: not a.quick, "untrained": True}
    if not table.lacks("pancreas", "test", a.seed, [name for name, asked in asked_for.items() if asked]):
        return  # "untrained" is measured last
    parts = pancreas_parts(a.store)
    tables = {name: part["table"] for name, part in parts.items()}
    y_all, scored = expression(tables["train"])
    top = np.argsort(-y_all[scored].var(0), kind="stable")[:N_GENES]  # on training cells alone
    y, use = {}, {}
    for name, cells in tables.items():
        y[name], use[name] = expression(cells, top)
    xy = {name: _io.places(part, _io.Where(mpp=1))[0].xy for name, part in parts.items()}
    blocks = sf.metrics.spatial_blocks(xy["test"][use["test"]], BLOCK_UM)
    fold = folds(xy["train"][use["train"]])
    features, seconds, epochs = {}, {}, {}

    def timed(name, make):
        """Make features, or take those that an earlier run left in ``--cache``."""
        file = a.cache and a.cache / f"{name.replace(' ', '_')}-{a.seed}.npz"
        if file and file.exists():
            with np.load(file) as known:
                features[name] = {part: known[part] for part in known if part not in ("seconds", "epochs")}
                seconds[name], epochs[name] = float(known["seconds"]), float(known["epochs"])
            return
        start, found = time.perf_counter(), make()
        features[name], epochs[name] = found if isinstance(found, tuple) else (found, np.nan)
        seconds[name] = time.perf_counter() - start
        if file:
            a.cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, **features[name], seconds=seconds[name], epochs=epochs[name])

    def with_neighbours(name):
        return join(features[name], {k: around(xy[k], features[name][k]) for k in parts})

    def hand():
        out = {}
        for name, part in parts.items():
            sf.pp.morphology_profile(part, mpp=1)
            out[name] = np.nan_to_num(part["table"].obsm["morphology"].to_numpy())
        return out

    timed("hand features", hand)
    z = {name: (v - v.mean(0)) / (v.std(0) + 1e-6) for name, v in features["hand features"].items()}
    features["hand features, standardised in each part"] = z
    timed("hand features + neighbours", lambda: with_neighbours("hand features"))
    if not a.quick:
        timed("CNN, supervised", lambda: supervised_cnn(parts, top, a.seed))
        timed("CNN, supervised + neighbours", lambda: with_neighbours("CNN, supervised"))
        own = {name: features["CNN, supervised"][f"{name}, own"] for name in parts}
        features["CNN, supervised, intensities of each part"] = own
        if a.variants:
            timed("CNN, supervised, raw intensities", lambda: supervised_cnn(parts, top, a.seed, raw=True))
            timed("CNN, supervised, no augmentation", lambda: supervised_cnn(parts, top, a.seed, augment=False))
            timed(VARIANT, lambda: with_neighbours("CNN, supervised, no augmentation"))
    model = sf.models.load(a.weights if Path(a.weights).exists() else sf.datasets.weights(a.weights))
    for box in model.card["data"].values():
        if box["box_um"][2] >= PARTS["validation"][0] * MPP:
            raise SystemExit(
                f"the weights were trained on x up to {box['box_um'][2]:.0f} um: that is not before the test part"
            )
    torch.manual_seed(a.seed)
    untrained = Spatia(network=SpatiaNetwork(model.config), target_sum=model.target_sum, history={}, card=model.card)
    features["untrained SPATIA, image, cell"] = spatia_levels(parts, untrained, "image")["cell"]
    image = spatia_levels(parts, model, "image")
    features["SPATIA image, cell"] = image["cell"]
    features["SPATIA image, cell + neighbours' mean"] = join(
        image["cell"], {k: around(xy[k], v) for k, v in image["cell"].items()}
    )
    features["SPATIA image, niche"] = image["niche"]
    features["SPATIA image, cell + niche"] = join(image["cell"], image["niche"])
    features["SPATIA image, all levels"] = join(*image.values())
    own = spatia_levels(parts, model, "image", "slide")
    features["SPATIA image, all levels, intensities of each part"] = join(*own.values())
    if a.self_supervised:
        own = spatia_levels(parts, sf.models.load(a.self_supervised), "image")
        features[SELF_SUPERVISED] = own["cell"]
    rng = np.random.default_rng(a.seed)
    features["SPATIA image, all levels, shuffled"] = {
        k: v[rng.permutation(len(v))] for k, v in features["SPATIA image, all levels"].items()
    }
    truth, predictions = y["test"][use["test"]], {}
    if BASELINE in features:  # first, as the others are compared with it
        features = {BASELINE: features[BASELINE], **features}
    for name, x in features.items():
        if name != BASELINE and not table.lacks("pancreas", "test", a.seed, name, "pearson50"):
            continue
        probe = Probe(x["train"][use["train"]], y["train"][use["train"]], fold)
        predictions[name] = probe(x["test"][use["test"]])
        shift = np.nanmean(gene_pearson(y["validation"][use["validation"]], probe(x["validation"][use["validation"]])))
        by_block = [
            np.nanmean(gene_pearson(truth[blocks == b], predictions[name][blocks == b]))
            for b in np.unique(blocks) if (blocks == b).sum() >= 100
        ]  # fmt: skip
        scores = {
            "pearson50": np.nanmean(gene_pearson(truth, predictions[name])),
            "pearson50, mean of 500 um blocks": np.mean(by_block), "dimensions": x["train"].shape[1],
            "seconds": seconds.get(name, np.nan), "epochs": epochs.get(name, np.nan),
        }  # fmt: skip
        if BASELINE in predictions:
            versus = f"pearson50 minus {BASELINE}"
            found = sf.metrics.paired_pearson_difference(truth, predictions[name], predictions[BASELINE], blocks)
            scores |= dict(zip((versus, f"{versus}, low", f"{versus}, high"), found))
        table.add("pancreas", "inner", a.seed, name, {"pearson50": probe.inner})
        table.add("pancreas", "17000-19000", a.seed, name, {"pearson50": shift})
        table.add("pancreas", "test", a.seed, name, scores)
    annotation(a, table, parts, tables, features, model)
    for name, found in (("SPATIA", model), ("untrained", untrained)):
        if table.lacks("pancreas", "test", a.seed, name):
            table.add("pancreas", "test", a.seed, name, retrieval(parts, found, a.seed) | {"cells": use["test"].sum()})
    table.add_run("pancreas", "test", a.seed)


# ---- STARmap -----------------------------------------------------------------------------------------------------


def starmap(a, table: results.Table) -> None:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    data = sf.datasets.starmap_mpfc()
    counts, xy = np.asarray(data.X.todense(), float), np.asarray(data.obsm["spatial"], float)
    total = counts.sum(1, keepdims=True)
    y = np.log1p(counts / total * np.median(total))
    mouse, kind, layer = (data.obs[name].astype(str).to_numpy() for name in ("mouse", "cell_type", "layer"))
    mice, has_scvi = list(dict.fromkeys(mouse)), importlib.util.find_spec("scvi") is not None
    last = ["SPATIA all levels, 30 components", *(["neighbours' scVI"] if has_scvi else [])]

    def by_mouse(values, change):
        out = np.empty(values.shape)
        for m in mice:
            out[mouse == m] = change(values[mouse == m], m)
        return out

    def mean_around(values, xy=xy):
        return by_mouse(values, lambda v, m: around(xy[mouse == m], v, 30))

    def scaled_by(train, values, own):
        """z-scores by the training mice, or by each mouse itself, which sees the test mouse whole."""
        if own:
            return by_mouse(values, lambda v, m: (v - v.mean(0)) / (v.std(0) + 1e-6))
        return (values - values[train].mean(0)) / (values[train].std(0) + 1e-6)

    def simple(train) -> dict:
        """Baselines; "own" is scaled by each mouse itself. Components, means and gradients are of scaled genes."""
        shuffled = by_mouse(xy, lambda v, m: np.random.default_rng(0).permutation(v))
        out = {}
        for note in ("", ", own"):
            values = scaled_by(train, y, note)
            pca = PCA(30, random_state=0).fit(values[train]).transform(values)
            out |= {
                f"genes{note}": values, f"PCA{note}": pca, f"genes + neighbours{note}": np.hstack([values, mean_around(values)]),
                f"PCA + neighbours{note}": np.hstack([pca, mean_around(pca)]), f"neighbours{note}": mean_around(pca),
            }  # fmt: skip
            mean, gradient = (np.empty(values.shape) for _ in range(2))
            for m in mice:
                mean[mouse == m], gradient[mouse == m] = banksy(xy[mouse == m], values[mouse == m])
            blocks = [values, scaled_by(train, mean, note), scaled_by(train, gradient, note)]
            for share in (0.2, 0.8):  # of the neighbourhood, for types and for layers
                joint = np.hstack([w**0.5 * v for w, v in zip((1 - share, share * 2 / 3, share / 3), blocks)])
                out[f"BANKSY-style {share}{note}"] = PCA(30, random_state=0).fit(joint[train]).transform(joint)
        return out | {"PCA + neighbours, own, coordinates shuffled": np.hstack([pca, mean_around(pca, shuffled)])}

    def learned(train, seed, held) -> tuple[dict, float]:
        file = a.cache and a.cache / f"starmap-{held}-{seed}.npz"
        if not (file and file.exists()):
            start = time.perf_counter()
            model = sf.tl.train_spatia(
                data[train].copy(), modalities="genes", mpp=1, library_key="mouse", max_epochs=a.epochs, random_state=seed
            )  # fmt: skip
            seconds, found = time.perf_counter() - start, data.copy()
            sf.tl.embed_spatia(found, model=model, modalities="genes", mpp=1, library_key="mouse")
            levels = {
                level: np.asarray(found.obsm[f"X_spatia_{level}"], float) for level in ("cell", "niche", "tissue")
            }
            if not file:
                return levels, seconds
            a.cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, **levels, seconds=seconds)
        with np.load(file) as known:
            return {level: known[level] for level in ("cell", "niche", "tissue")}, float(known["seconds"])

    for seed in range(a.seeds):
        for held in mice:
            train, test = mouse != held, mouse == held
            if not table.lacks("starmap", held, seed, last):
                continue
            features = simple(train) if seed == 0 else {}
            if has_scvi:
                latent = scvi_latent(data, train, seed)
                features["scVI"] = latent
                features["scVI + neighbours (as CellCharter)"] = np.hstack([latent, mean_around(latent)])
                features["neighbours' scVI"] = mean_around(latent)
            levels, seconds = learned(train, seed, held)
            cell, niche, tissue = levels.values()
            features |= {
                "SPATIA cell": cell, "SPATIA cell, neighbours' mean": mean_around(cell), "SPATIA niche": niche,
                "SPATIA tissue": tissue, "SPATIA cell + niche": np.hstack([cell, niche]),
                "SPATIA all levels": np.hstack([cell, niche, tissue]),
            }  # fmt: skip
            for name in ("SPATIA cell", "SPATIA niche", "SPATIA all levels"):  # as many dimensions as the components
                x = features[name]
                features[f"{name}, 30 components"] = PCA(30, random_state=0).fit(x[train]).transform(x)
            for name, x in features.items():
                if not table.lacks("starmap", held, seed, name):
                    continue
                row = {"dimensions": x.shape[1], "seconds": seconds if "SPATIA" in name else np.nan}
                for task, label in (("type", kind), ("layer", layer)):
                    probe = Classifier(x[train], label[train], mouse[train])
                    row |= {f"{task} F1": probe.macro_f1(x[test], label[test]), f"{task} F1, inner": probe.inner}
                for note, fitted in (
                    ("", train),
                    (", own", test),
                ):  # clusters of the other mice, or of the mouse itself
                    groups = KMeans(4, n_init=10, random_state=0).fit(x[fitted]).predict(x[test])
                    row |= {
                        f"layer ARI{note}": adjusted_rand_score(layer[test], groups),
                        f"layer NMI{note}": normalized_mutual_info_score(layer[test], groups),
                    }
                table.add("starmap", held, seed, name, row)
    table.add_run("starmap", "")
    summary()


def summary() -> None:
    """Mean over mice (of the means over seeds), and SPATIA's difference to the best baseline, paired by mouse, with its error."""
    scores = ["type F1", "layer F1", "layer ARI", "layer ARI, own"]
    rows = results.select(results.read("embedding"), data="starmap", metric=scores)
    by_mouse = results.pivot(rows, ["method", "split"])[scores]
    mean = by_mouse.groupby("method", sort=False).mean()
    print(mean.round(3).to_string())
    learned = mean.index.str.startswith("SPATIA")
    for score in scores:
        best = mean.loc[~learned, score].idxmax()
        for method in mean.index[learned]:
            difference = by_mouse.loc[method, score] - by_mouse.loc[best, score]
            error = difference.std(ddof=1) / len(difference) ** 0.5
            seeds = results.select(rows, method=method, metric=score).groupby("split")["value"].std().mean()
            print(
                f"{score}: {method} - {best}: {difference.mean():+.3f} +- {error:.3f} (deviation over seeds {seeds:.3f})"
            )


# ---- simulated tissue --------------------------------------------------------------------------------------------


def simulated(a, table: results.Table) -> None:
    """Planted niches from each level by k-means; planted rates of genes from images alone by a linear probe."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    options, levels = {"image_key": "fluorescence"}, ("cell", "niche", "tissue")
    for seed in range(a.seeds):
        if not table.lacks("simulated", "test", seed, [f"SPATIA {level}" for level in levels]):
            continue
        slides = [sf.datasets.simulated_tissue(1500, seed=10 * seed + i) for i in range(4)]
        config = SpatiaConfig(crop_um=12.0, crop_pixels=24, patch_pixels=8)
        model = sf.tl.train_spatia(slides[:3], config=config, max_epochs=a.epochs, random_state=seed, **options)
        for slide in slides:
            sf.tl.embed_spatia(slide, model=model, **options)
            sf.tl.embed_spatia(slide, model=model, modalities="image", key_added="image", **options)
        tables = [slide["table"] for slide in slides]
        test, driver = tables[3], tables[3].var["driver"].astype(str).to_numpy()

        def probed(key, tables=tables):
            x, y = ([f(t) for t in tables] for f in (lambda t: t.obsm[key], lambda t: np.log(t.layers["rate"] + 1e-6)))
            slide = np.repeat(range(3), [len(v) for v in x[:3]])
            probe = Probe(np.concatenate(x[:3]), np.concatenate(y[:3]), slide)
            return gene_pearson(y[3], probe(x[3]))

        for level in levels:
            groups = KMeans(3, n_init=10, random_state=0).fit_predict(test.obsm[f"X_spatia_{level}"])
            score, planted = probed(f"image_{level}"), sorted(set(driver) - {"none"})
            found = {"niche ARI": adjusted_rand_score(test.obs["niche"], groups)}
            found |= {f"image to {name} genes": np.mean(score[driver == name]) for name in planted}
            table.add("simulated", "test", seed, f"SPATIA {level}", found)


COMMANDS = {"pancreas": pancreas, "starmap": starmap, "simulated": simulated}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("data", choices=list(COMMANDS))
    out.add_argument("--store")
    out.add_argument("--weights", default="spatia-pancreas-small")
    out.add_argument("--self-supervised", help="weights trained without genes")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--epochs", type=int, default=30)
    out.add_argument("--cache", type=Path, help="folder that keeps the features of baselines")
    out.add_argument("--variants", action="store_true", help="the CNN on raw intensities and without augmentation too")
    out.add_argument("--quick", action="store_true", help="without the supervised networks")
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.data](a, results.Table("embedding", again=a.again))
