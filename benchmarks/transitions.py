"""States of the pancreas, and the transitions between them that generation is trained and tested on.

    python benchmarks/transitions.py pancreas.zarr --cache features

States are Leiden clusters of expression in the training part (x < 16500 px), carried to the other parts by a frozen logistic
regression; niches are k-means groups of SPATIA's niche embedding, carried by the nearest centre. A transition is taken when
its states are of one lineage (their mean expression correlates with .75 or more) and a linear probe tells their real images
apart with an area under the curve of .6 to .9: above, copying the source loses trivially. The probe reads SPATIA's image
embedding of the cell and is fitted to three bands of the training part, tested on the fourth. The test part is not read.
``EXOCRINE`` is a third lineage that the model of genes knows too. It is scored on a band of the training part.
"""

import argparse
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import results
import spatiaflow as sf
from embedding import MPP, pancreas_parts
from probes import folds
from spatiaflow import _io

MIN_COUNTS, N_NICHES, LIKENESS, RANGE = 20, 4, 0.75, (0.6, 0.9)
EXOCRINE = (
    "ACE2/ANPEP",
    "CXCL6/CFTR",
)  # acinar cells to duct cells: likeness .72, and nine acinar cells in the test part
BAND, MARGIN = (9200, 11500), 250  # px: what scores edits of exocrine cells, and what lies unused on both sides of it


def log_counts(table) -> tuple[sparse.csr_matrix, np.ndarray]:
    """log1p of counts per 100, and which cells have enough of them."""
    counts = sparse.csr_matrix(table.X)
    total = np.asarray(counts.sum(1)).ravel()
    return sparse.csr_matrix(sparse.diags(100 / total.clip(1)) @ counts).log1p(), total >= MIN_COUNTS


def embedded(store: str, cache: Path | None = None, names=("train", "validation", "test")) -> dict:
    """Parts with SPATIA's embeddings (of image and genes, and of the image alone) and morphology."""
    parts = {name: part for name, part in pancreas_parts(store).items() if name in names}
    for name, part in parts.items():
        file = cache and cache / f"transitions-{name}.h5ad"
        if file and file.exists():
            del part.tables["table"]
            part["table"] = ad.read_h5ad(file)
            continue
        model = sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
        sf.tl.embed_spatia(part, model=model, scaling="training", mpp=1)
        sf.tl.embed_spatia(part, model=model, scaling="training", mpp=1, modalities="image", key_added="image")
        sf.pp.morphology_profile(part, mpp=1)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            part["table"].write_h5ad(file)
    return parts


def fit_states(parts: dict, *, n_fit: int = 8000, resolution: float = 1.5, seed: int = 0) -> dict:
    """Write ``obs["state"]`` and ``obs["niche"]`` of every part, fitted to the training part; returns the frozen classifier.

    States are named by the two genes that mark them most; cells with few counts have none.
    """
    import scanpy as sc
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    table, rng = parts["train"]["table"], np.random.default_rng(seed)
    x, enough = log_counts(table)
    pca = PCA(40, svd_solver="covariance_eigh", random_state=seed).fit(x[np.flatnonzero(enough)])
    some = np.sort(rng.choice(np.flatnonzero(enough), n_fit, replace=False))
    cells = ad.AnnData(pca.transform(x[some]).astype(np.float32))
    sc.pp.neighbors(cells, use_rep="X", random_state=seed)
    sc.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, random_state=seed)
    fitted = LogisticRegression(C=0.1, max_iter=500).fit(cells.X, cells.obs["leiden"].to_numpy())
    found = fitted.predict(pca.transform(x))
    mean = np.stack([np.asarray(x[(found == c) & enough].mean(0)).ravel() for c in fitted.classes_])
    marks = np.argsort(-(mean - mean.mean(0)) / (mean.std(0) + 0.05), 1)[:, :2]
    names = np.array(["/".join(table.var_names[genes]) for genes in marks])
    niches = KMeans(N_NICHES, n_init=5, random_state=seed).fit(table.obsm["X_spatia_niche"])
    for part in parts.values():
        table = part["table"]
        x, enough = log_counts(table)
        state = names[np.searchsorted(fitted.classes_, fitted.predict(pca.transform(x)))].astype(object)
        state[~enough] = None
        table.obs["state"] = pd.Categorical(state, names)
        niche = niches.predict(np.asarray(table.obsm["X_spatia_niche"], niches.cluster_centers_.dtype))
        table.obs["niche"] = pd.Categorical([f"niche {i}" for i in niche])
    weight = fitted.coef_ @ pca.components_  # one linear rule from log counts
    return {
        "names": names, "genes": table.var_names.to_numpy(), "weight": weight,
        "offset": fitted.intercept_ - weight @ pca.mean_, "mean": mean,
    }  # fmt: skip


def with_band(parts: dict) -> dict:
    """Parts with ``BAND`` as one more, and a training part without it and its margins."""
    from spatialdata import SpatialData

    whole, (low, high) = parts["train"], BAND
    x = _io.places(whole, _io.Where(mpp=1))[0].xy[:, 0] / MPP
    rows = {"train": (x < low - MARGIN) | (x >= high + MARGIN), "band": (x >= low) & (x < high)}
    elements = {key: element for _, key, element in whole.gen_elements() if key != "table"}
    return parts | {
        name: SpatialData.init_from_elements({**elements, "table": whole["table"][here].copy()})
        for name, here in rows.items()
    }


def candidates(parts: dict, states: dict) -> pd.DataFrame:
    """Pairs of states of one lineage, and how well their real images are told apart inside the training part."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    table, likeness, rows = parts["train"]["table"], np.corrcoef(states["mean"]), []
    state, image = table.obs["state"].astype(object).to_numpy(), np.asarray(table.obsm["image_cell"])
    band = folds(_io.places(parts["train"], _io.Where(mpp=1))[0].xy)
    for i, j in combinations(range(len(likeness)), 2):
        one, other = states["names"][[i, j]]
        both = np.flatnonzero((state == one) | (state == other))
        y, areas = state[both] == one, []
        if likeness[i, j] < LIKENESS or min(np.bincount(y, minlength=2)) < 500:
            continue
        for f in np.unique(band):
            test = band[both] == f
            if len(np.unique(y[test])) == 2 and len(np.unique(y[~test])) == 2:
                probe = LogisticRegression(C=0.01, max_iter=300, class_weight="balanced").fit(
                    image[both[~test]], y[~test]
                )
                areas.append(roc_auc_score(y[test], probe.decision_function(image[both[test]])))
        rows.append({
            "source": one, "target": other, "likeness": likeness[i, j], "AUC of images": np.mean(areas), "n_source": y.sum(),
            "n_target": (~y).sum(),
        })  # fmt: skip
    out = pd.DataFrame(rows).sort_values("AUC of images", ignore_index=True)
    return out.assign(taken=out["AUC of images"].between(*RANGE))


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("store")
    out.add_argument("--cache", type=Path)
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    parts = embedded(a.store, a.cache, ("train",))
    found = candidates(parts, fit_states(parts))
    print(parts["train"]["table"].obs["state"].value_counts().to_string())
    table = results.Table("transitions", again=a.again)
    for row in found.to_dict("records"):
        name = f"pancreas:{row.pop('source')} -> {row.pop('target')}"
        if table.lacks(name, "train", 0, "linear probe"):
            table.add(name, "train", 0, "linear probe", row)
