"""What do spots on glass do to the predictions of true spots, and how should the features of a slide be scaled?

    python benchmarks/glass.py
    python benchmarks/glass.py --methods "ridge, mean of tissue" --sections C2

Sections of her2st are held out one at a time, as in ``expression.py``, with its genes, features and patches. To the held-out
section 0, 9 or 89 spots are added: places of its own array beside the tissue, nearest first, whose patch of the same image
holds no tissue. Scored are the true spots alone. Ridge regression (penalty and smoothing by leaving out training sections) is
scaled by each section's own spots in four ways, or by the training data. STFlow is trained with ``standardize="slide"`` and
told of the glass, or not (no ``obs["tissue"]``). ``her2st:N spots`` holds N neighbouring spots of the section alone: from how
many on is it better scaled by itself than by the training data?
"""

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree

import results
import spatiaflow as sf
from expression import DEFAULT, SECTIONS, load, problem
from scored import Scored, chosen_ridge, fitted_ridge, scaled
from spatiaflow._slides import gather
from spatiaflow.models.regression import gene_pearson, smooth
from spatiaflow.models.slide import MIN_TISSUE
from spatiaflow.models.spatial import spatial_graph
from spatiaflow.train.stflow import train_stflow

N_GLASS, N_SPOTS, DRAWS = (0, 9, 89), (5, 10, 20, 40, 80), 20
SCALES = {  # how a section's features are centred and scaled, and whether glass is left out of it
    "mean of all": ("mean", False),
    "mean of tissue": ("mean", True),
    "median and MAD of all": ("median", False),
    "median and MAD of tissue": ("median", True),
}
RIDGES = [f"ridge, {name}" for name in [*SCALES, "training data"]]
STFLOW = ["STFlow, told of glass", "STFlow, not told"]


def glass(adata: ad.AnnData, n: int, patch_um: float) -> ad.AnnData:
    """The ``n`` places of a section's array that are nearest to its spots and show glass alone, encoded."""
    (section,) = adata.uns["spatial"]
    image = adata.uns["spatial"][section]["images"]["hires"]
    size = np.array(image.shape[1::-1]) / adata.uns["spatial"][section]["scalefactors"]["tissue_hires_scalef"]
    columns = np.column_stack([adata.obs["array_col"], adata.obs["array_row"], np.ones(adata.n_obs)])
    to_pixels = np.linalg.lstsq(columns, adata.obsm["spatial"], rcond=None)[0]
    places = np.array([(i, j, 1) for i in range(40) for j in range(40)]) @ to_pixels
    tree = cKDTree(adata.obsm["spatial"])
    step = np.median(tree.query(adata.obsm["spatial"], k=2)[0][:, 1])
    away, inside = tree.query(places)[0], ((places > step / 2) & (places < size - step / 2)).all(1)
    kept = np.flatnonzero(inside & (away > 0.7 * step))
    places = places[kept[np.argsort(away[kept], kind="stable")]]
    obs = pd.DataFrame(index=[f"{section}_glass_{i}" for i in range(len(places))])
    out = ad.AnnData(obs=obs, obsm={"spatial": places}, uns={"spatial": adata.uns["spatial"]})
    sf.pp.encode_patches(out, patch_um=patch_um)
    return out[out.obs["tissue"] == 0][:n].copy()


def joined(test: Scored, beside: Scored) -> Scored:
    """True spots first, then those on glass."""
    parts = ((a, b) for a, b in zip(vars(test.slide).values(), vars(beside.slide).values()))
    names = [f.name for f in dataclasses.fields(test.slide)]
    both = dict(zip(names, parts))
    stacked = {name: np.concatenate(both[name]) for name in ("obs_names", "xy", "features", "tissue_share")}
    return Scored(dataclasses.replace(test.slide, counts=None, library=None, **stacked), test.y)


def own_scaled(slide, how: str, told: bool) -> np.ndarray:
    """Features scaled by the slide's own spots."""
    x = slide.features.astype(np.float64)
    known = x[slide.on_tissue] if told else x
    middle, spread = known.mean(0), known.std(0)
    if how == "median":
        middle, deviation = np.median(known, 0), spread
        spread = 1.4826 * np.median(abs(known - middle), 0)
        spread = np.maximum(spread, 0.1 * deviation)  # most values of a sparse feature are alike
    return ((x - middle) / np.where(spread < 1e-6, 1, spread)).astype(np.float32)


def ridge_rows(method: str, train: list[Scored], tests: list[Scored]) -> list[np.ndarray]:
    """Predictions of every test slide, smoothed over neighbours: over tissue alone where the scaling knows of glass."""
    name = method.removeprefix("ridge, ")
    if name in SCALES:
        a, b = ([s.having(own_scaled(s.slide, *SCALES[name])) for s in some] for some in (train, tests))
    else:
        a, b = scaled(train, tests, "global")
    alpha, weight, _ = chosen_ridge(a)
    ridge, out = fitted_ridge(a, alpha), []
    for one in b:
        prediction = ridge.predict(one.features)
        known = one.slide.on_tissue if name.endswith("of tissue") else np.ones(len(one), bool)
        prediction[known] = smooth(prediction[known], spatial_graph(one.slide.xy[known], 8), weight)
        out.append(prediction)
    return out


def run(args) -> None:
    table, sections = results.Table("glass", again=args.again), load("her2st", args.patch_um)
    for held_out in args.sections or SECTIONS["her2st"]:
        train, test, _ = problem(sections, held_out, "10k")
        (told,) = gather(sections[held_out], need=["features"], use_rep="X_texture")
        test = Scored(dataclasses.replace(test.slide, tissue_share=told.tissue_share), test.y)
        (found,) = gather(
            glass(sections[held_out], max(N_GLASS), args.patch_um), need=["features"], use_rep="X_texture"
        )
        tests = [test, *(joined(test, Scored(found.take(np.arange(n)), None)) for n in N_GLASS[1:])]
        shares = {
            "true spots taken for glass": np.mean(told.tissue_share < MIN_TISSUE),
            "lowest share": told.tissue_share.min(),
        }
        table.add("her2st", held_out, "", "tissue", shares)

        def record(method, seed, predictions, more=None, *, held_out=held_out, test=test):
            for n, prediction in zip(N_GLASS, predictions):
                r = np.nanmean(gene_pearson(test.y, prediction[: len(test)]))
                table.add(f"her2st:{n} on glass", held_out, seed, method, {"pearson50": r} | (more or {}).get(n, {}))

        for method in args.methods or RIDGES:
            if method in RIDGES and table.lacks("her2st:0 on glass", held_out, "", method):
                record(method, "", ridge_rows(method, train, tests))
        if table.lacks("her2st:80 spots", held_out, "", RIDGES[1]):
            few(table, held_out, train, test)
        if any(table.lacks("her2st:0 on glass", held_out, 0, method) for method in args.methods or STFLOW):
            own = dataclasses.replace(DEFAULT, standardize="slide")
            model = train_stflow([s.slide for s in train], own, encoder={"id": "texture"}, max_epochs=args.epochs)
            for method in STFLOW:
                slides = [one.slide for one in tests]
                if method == STFLOW[1]:
                    slides = [dataclasses.replace(slide, tissue_share=None) for slide in slides]
                out = [model.predict([slide], n_samples=10) for slide in slides]
                ood = {n: {"ood of glass": p.ood[len(test) :].mean(), "lowest ood of glass": p.ood[len(test) :].min()}
                       for n, p in zip(N_GLASS, out) if n}  # fmt: skip
                ood[0] = {"ood of tissue": out[0].ood.mean()}
                record(method, 0, [p.mean for p in out], ood)


def few(table: results.Table, held_out: str, train: list[Scored], test: Scored) -> None:
    """Squared error and correlation of N neighbouring spots, scaled by themselves or by the training data."""
    rng, tree = np.random.default_rng(0), cKDTree(test.slide.xy)
    for n in N_SPOTS:
        parts = [tree.query(test.slide.xy[i], k=n)[1] for i in rng.integers(len(test), size=DRAWS)]
        some = [Scored(test.slide.take(rows), test.y[rows]) for rows in parts]
        for method in ("ridge, mean of tissue", "ridge, training data"):
            predictions = ridge_rows(method, train, some)
            error = np.mean([((p - s.y) ** 2).mean() for p, s in zip(predictions, some)])
            r = np.mean([np.nanmean(gene_pearson(s.y, p)) for p, s in zip(predictions, some)])
            table.add(f"her2st:{n} spots", held_out, "", method, {"squared error": error, "pearson50": r})


def show() -> None:
    """Print means over sections."""
    rows = results.read("glass")
    one = results.select(rows, metric="pearson50")
    print(results.pivot(one, columns="data").round(3).to_markdown())
    print(results.pivot(results.select(rows, metric="squared error"), columns="data").round(3).to_markdown())
    print(results.pivot(one, ["method", "split"], "data").iloc[:, :3].round(3).to_markdown())
    print(results.pivot(rows[rows["metric"].str.contains("ood")], "metric", "split").round(3).to_markdown())


def parser():
    out = results.parser(__doc__)
    out.add_argument("--sections", nargs="*")
    out.add_argument("--methods", nargs="*", choices=[*RIDGES, *STFLOW])
    out.add_argument("--epochs", type=int, help="of the networks, fewer than the verb's own")
    out.add_argument("--patch-um", type=float, default=155.0)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(parser().parse_args())
    show()
