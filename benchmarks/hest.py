"""STFlow and ridge baselines on the two public benchmarks of expression from histology, from their folders as published.

    python benchmarks/hest.py --root HEST_BENCH --tasks IDC PRAD --encoder texture
    python benchmarks/hest.py --layout stimage --root STIMAGE --platform Visium --genes 50

HEST benchmark: official folds, log1p of raw counts, the task's published gene list (which its authors chose on all samples,
test included). Pearson is per gene over the pooled spots of a fold's test slides, mean over genes, then folds; the mean of
per-slide values stands beside. A gene that is constant in the truth is left out; a constant prediction scores 0.

Epochs are chosen inside the training slides. The published protocol chose them on the test slides: its numbers are no comparison.
"""

import argparse
import json
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch

import results
import spatiaflow as sf
from scored import Scored, chosen_ridge, fitted_ridge, scaled
from spatiaflow import _io
from spatiaflow._settings import progress
from spatiaflow._slides import gather
from spatiaflow.models.encoders import load_encoder
from spatiaflow.models.regression import gene_pearson, smooth
from spatiaflow.models.slide import pitch as pitch_of
from spatiaflow.models.stflow import STFlowConfig
from spatiaflow.train.stflow import train_stflow


def hest_slide(task: Path, row: pd.Series, genes: list[str], encoder, cache: Path) -> Scored:
    """One sample of a HEST task: features of its patches, counts of the task's genes, matched by barcode."""
    adata = ad.read_h5ad(task / row["expr_path"])
    adata.obs_names = adata.obs_names.astype(str)
    with h5py.File(task / row["patches_path"]) as file:
        barcodes = [b.decode() if isinstance(b, bytes) else str(b) for b in file["barcode"][:].ravel()]
        coords = file["coords"][:].astype(float)
        features = _features(file["img"], encoder, cache / f"{task.name}-{row['sample_id']}-{encoder.name}.npy")
    keep = [i for i, name in enumerate(barcodes) if name in adata.obs_names]
    if not keep:
        raise ValueError(f"{task.name}/{row['sample_id']}: no barcode of the patches is in the expression file.")
    adata = adata[[barcodes[i] for i in keep]]
    counts = _io.dense(_io.counts(adata, genes)[0])
    library = _io.library_sizes(adata)
    return Scored.of(
        row["sample_id"], adata.obs_names, coords[keep], features[keep], counts, library, genes, target_sum=None
    )


def _features(images, encoder, cache: Path) -> np.ndarray:
    """Encode n x h x w x 3 patches, once for each encoder."""
    if cache.exists():
        return np.load(cache)
    out = [
        encoder(torch.from_numpy(images[s : s + 64]).permute(0, 3, 1, 2)).numpy()
        for s in progress(range(0, len(images), 64), f"encoding {cache.stem}")
    ]
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, np.concatenate(out))
    return np.concatenate(out)


def hest_folds(root: Path, task: str, encoder, cache: Path):
    """Yield (fold, training slides, test slides) of a task."""
    folder = root / task
    genes = json.loads((folder / "var_50genes.json").read_text())["genes"]
    for path in sorted((folder / "splits").glob("train_*.csv"), key=lambda p: int(p.stem.split("_")[1])):
        fold = int(path.stem.split("_")[1])
        tables = [pd.read_csv(path), pd.read_csv(path.with_name(f"test_{fold}.csv"))]
        train, test = ([hest_slide(folder, row, genes, encoder, cache) for _, row in t.iterrows()] for t in tables)
        yield fold, train, test


def stimage_folds(root: Path, platform: str, n_genes: int, encoder, seed: int):
    """Yield one random 8:1:1 split by slide of a STImage-1K4M platform; genes are chosen on the training slides.

    The files give no µm per pixel: it is derived from the spot pitch (200 µm for ST, 100 for Visium, 8 for Visium HD).
    """
    folder, pitch = root / platform, {"ST": 200.0, "Visium": 100.0, "VisiumHD": 8.0}[platform]
    names = sorted(p.stem.removesuffix("_coord") for p in (folder / "coord").glob("*_coord.csv"))
    order = np.random.default_rng(seed).permutation(len(names))
    n_test = max(1, round(0.1 * len(names)))
    tables = {}
    for name in names:
        coord = pd.read_csv(folder / "coord" / f"{name}_coord.csv", index_col=0)
        x = next(c for c in coord.columns if c.lower().startswith("x"))
        y = next(c for c in coord.columns if c.lower().startswith("y"))
        counts = pd.read_csv(folder / "gene_exp" / f"{name}_count.csv", index_col=0)
        shared = coord.index.intersection(counts.index)
        adata = ad.AnnData(counts.loc[shared].to_numpy(np.float32), obs=pd.DataFrame(index=shared.astype(str)))
        adata.var_names = counts.columns.astype(str)
        adata.var_names_make_unique()
        adata.obsm["spatial"] = coord.loc[shared, [x, y]].to_numpy(float)
        mpp = pitch / pitch_of(adata.obsm["spatial"])
        image = folder / "image" / f"{name}.png"
        adata.uns["spatial"] = {name: {"metadata": {"microns_per_pixel": mpp, "source_image_path": str(image)}}}
        sf.pp.encode_patches(adata, encoder=encoder, key_added="X")
        tables[name] = adata
    test_names = [names[i] for i in order[:n_test]]
    train_names = [names[i] for i in order[n_test:]]
    shared = _io.shared_genes([tables[name] for name in train_names])
    shared = [g for g in shared if all(g in set(tables[name].var_names) for name in test_names)]

    def make(name, genes):
        counts, library = _io.dense(_io.counts(tables[name], genes)[0]), _io.library_sizes(tables[name])
        (slide,) = gather(tables[name], need=["features"], use_rep="X")
        return Scored.of(name, slide.obs_names, slide.xy, slide.features, counts, library, genes, target_sum=None)

    variance = np.concatenate([make(name, shared).y for name in train_names]).var(0)
    genes = [shared[i] for i in np.argsort(-variance, kind="stable")[:n_genes]]
    yield 0, [make(name, genes) for name in train_names], [make(name, genes) for name in test_names]


def scores(test: list[Scored], predictions: list[np.ndarray]) -> dict[str, float]:
    """Mean per-gene Pearson over pooled spots and as the mean of per-slide values."""
    pooled = np.nanmean(gene_pearson(np.concatenate([s.y for s in test]), np.concatenate(predictions)))
    return {
        "pearson_pooled": float(pooled),
        "pearson_per_slide": float(np.mean([np.nanmean(gene_pearson(s.y, p)) for s, p in zip(test, predictions)])),
    }


def run_fold(train: list[Scored], test: list[Scored], preset: str, seed: int) -> dict[str, dict]:
    """Score ridge, smoothed ridge and STFlow on one fold."""
    a, b = scaled(train, test, "global")
    alpha, weight = chosen_ridge(a)[:2] if len(train) > 1 else (1e3, 0.25)
    ridge = fitted_ridge(a, alpha)
    raw = [ridge.predict(s.features) for s in b]
    out = {
        "ridge": scores(test, raw),
        "ridge + smoothing": scores(test, [smooth(p, s.graph, weight) for p, s in zip(raw, test)]),
    }
    options = {"encoder": {"id": "benchmark"}, "target_sum": None, "seed": seed}
    config, started = STFlowConfig.of(preset), time.perf_counter()
    model = train_stflow([s.slide for s in train], config, **options)
    predictions = [model.predict([s.slide], seed=seed).mean for s in test]
    out[f"STFlow {preset}"] = scores(test, predictions) | {"seconds": time.perf_counter() - started}
    return out


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("--root", type=Path, required=True)
    out.add_argument("--layout", choices=("hest", "stimage"), default="hest")
    out.add_argument("--tasks", nargs="*", help="HEST tasks; all folders with splits/ when omitted")
    out.add_argument("--platform", choices=("ST", "Visium", "VisiumHD"), default="Visium")
    out.add_argument("--genes", type=int, default=50)
    out.add_argument("--encoder", default="texture")
    out.add_argument("--preset", choices=list(STFlowConfig.named), default="default")
    out.add_argument("--seeds", type=int, default=1)
    out.add_argument("--cache", type=Path, default=Path("features"), help="folder that keeps features of patches")
    return out


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    encoder = load_encoder(args.encoder, device=sf.settings.torch_device())
    table = results.Table("hest", again=args.again)
    tasks = args.tasks or sorted(p.parent.name for p in args.root.glob("*/splits"))
    for task in tasks if args.layout == "hest" else [args.platform]:
        data = f"{args.layout}:{task}, {args.encoder}"
        for seed in range(args.seeds):
            if args.layout == "hest":
                folds = hest_folds(args.root, task, encoder, args.cache)
            else:
                folds = stimage_folds(args.root, task, args.genes, args.encoder, seed)
            for fold, train, test in folds:
                if table.lacks(data, f"fold {fold}", seed, f"STFlow {args.preset}"):
                    found = run_fold(train, test, args.preset, seed)
                    table.add_all(data, f"fold {fold}", seed, found)
    rows = results.select(results.read("hest"), metric=["pearson_pooled", "pearson_per_slide"])
    by_fold = rows.groupby(["method", "data", "metric", "split"])["value"].mean()
    print(by_fold.groupby(["method", "data", "metric"]).mean().unstack().round(3).to_markdown())


if __name__ == "__main__":
    main()
