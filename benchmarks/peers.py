"""Published methods beside ours: niches of several samples without labels, and genes hidden in a query.

Each is imported where it is run, so what is not installed is skipped. They run on the CPU at the settings of their
documentation. A method for niches has one more setting with four values, the default first: how far it looks around a cell,
or for Novae the learning rate.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import gene_pearson

N_NICHES, OWN_NUMBER = 4, "own number"


def installed(package: str, name: str) -> bool:
    """Whether a package is there; else it is said that it is not."""
    there = importlib.util.find_spec(package) is not None
    if not there:
        print(f"{name} is not installed")
    return there


def quiet(run: Callable):
    """What a function returns, without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run()


# ---- niches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NichePeer:
    """A method that finds niches in samples together.

    ``run`` yields labels of all cells at :data:`N_NICHES` niches for each value of its setting, and first, under
    :data:`OWN_NUMBER`, those at the number of niches that it finds itself or has by default.
    """

    name: str
    package: str
    setting: str  # in words
    values: tuple
    run: Callable[[ad.AnnData, int, tuple], Iterator[tuple[object, np.ndarray]]]


def cellcharter(cells: ad.AnnData, seed: int, layers: tuple) -> Iterator:
    """scVI, mean latent variables of layers of a Delaunay graph side by side, Gaussian mixture."""
    import cellcharter as cc
    import scvi
    import squidpy as sq

    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(cells, batch_key="mouse")
    model = scvi.model.SCVI(cells)
    model.train(early_stopping=True, accelerator="cpu", enable_progress_bar=False)
    cells.obsm["X_scVI"] = model.get_latent_representation().astype(np.float32)
    sq.gr.spatial_neighbors(cells, library_key="mouse", coord_type="generic", delaunay=True)
    cc.gr.remove_long_links(cells)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False}
    for n in layers:
        cc.gr.aggregate_neighbors(cells, n_layers=n, use_rep="X_scVI", sample_key="mouse")
        if n == layers[0]:
            options = {"random_state": seed, "trainer_params": trainer}
            chosen = cc.tl.ClusterAutoK(n_clusters=(2, 10), model_params=options)
            chosen.fit(cells, use_rep="X_cellcharter")
            yield OWN_NUMBER, np.asarray(chosen.predict(cells, use_rep="X_cellcharter"))
        mixture = cc.tl.Cluster(n_clusters=N_NICHES, random_state=seed, trainer_params=trainer)
        mixture.fit(cells, use_rep="X_cellcharter")
        yield n, np.asarray(mixture.predict(cells, use_rep="X_cellcharter"))


def banksy(cells: ad.AnnData, seed: int, neighbours: tuple) -> Iterator:
    """Genes, means and gradients of neighbours (their share .8, each mouse scaled by itself), 20 components, Leiden."""
    import scanpy as sc
    from banksy.cluster_methods import run_Leiden_partition
    from banksy.embed_banksy import generate_banksy_matrix
    from banksy.initialize_banksy import initialize_banksy
    from banksy_utils.umap_pca import pca_umap

    share, keys = 0.8, ("x", "y", "spatial")
    sc.pp.normalize_total(cells)
    for k in neighbours:
        parts = []
        for mouse in cells.obs["mouse"].cat.categories:
            one = cells[cells.obs["mouse"] == mouse].copy()
            graphs = initialize_banksy(one, keys, k, plt_edge_hist=False, plt_nbr_weights=False, plt_theta=False)
            parts.append(generate_banksy_matrix(one, graphs, [share], 1, verbose=False)[1])
        joint = ad.concat(parts)
        found = {"scaled_gaussian": {share: {"adata": joint}}}
        np.random.seed(seed)  # noqa: NPY002, the package draws from it
        pca_umap(found, pca_dims=[20], plt_remaining_var=False)
        options = {"partition_seed": seed, "match_labels": False, "verbose": False}

        def labels(joint=joint, found=found, options=options, **number) -> np.ndarray:
            table, _ = run_Leiden_partition(found, num_nn=50, **options, **number)
            return pd.Series(table["labels"].iloc[0].dense, joint.obs_names)[cells.obs_names].to_numpy()

        if k == neighbours[0]:
            yield OWN_NUMBER, labels(resolutions=[0.9])
        yield k, labels(resolutions=[], max_labels=N_NICHES)


def novae(cells: ad.AnnData, seed: int, rates: tuple) -> Iterator:
    """Graph attention on neighbourhoods, trained from nothing: its published weights would have to be downloaded.

    All genes are given: with half of them, its default, it has too few for its start from principal components.
    """
    import lightning
    import novae

    novae.spatial_neighbors(cells, slide_key="mouse", radius=80)
    for rate in rates:
        lightning.seed_everything(seed)
        model = novae.Novae(cells, var_names=list(cells.var_names))
        model.fit(cells, lr=rate, enable_progress_bar=False)
        model.compute_representations(cells)
        if rate == rates[0]:
            yield OWN_NUMBER, cells.obs[model.assign_domains(cells)].astype(str).to_numpy()
        yield rate, cells.obs[model.assign_domains(cells, n_domains=N_NICHES)].astype(str).to_numpy()


NICHES = [
    NichePeer("CellCharter", "cellcharter", "layers", (3, 2, 5, 8), cellcharter),
    NichePeer("BANKSY", "banksy", "neighbours", (15, 30, 60, 120), banksy),
    NichePeer("Novae", "novae", "learning rate", (5e-4, 1e-4, 2e-5, 5e-6), novae),
]


# ---- imputation ----------------------------------------------------------------------------------------------------


def imputed(
    method: Callable, reference: list[ad.AnnData], query: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int
) -> np.ndarray:
    """Log1p of hidden genes of the query, per ``target_sum`` of all others, by one of :data:`IMPUTATION`."""
    left = query[:, np.setdiff1d(np.arange(query.n_vars), hidden)].copy()
    return quiet(lambda: method(ad.concat(reference), left, hidden, target_sum, seed))


def gimvi(seq: ad.AnnData, spatial: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int) -> np.ndarray:
    """Hidden genes of spatial cells by gimVI at its own settings."""
    import scvi

    scvi.settings.seed = seed
    for table in (seq, spatial):
        scvi.external.GIMVI.setup_anndata(table)
    model = scvi.external.GIMVI(seq, spatial)
    model.train()
    return per_shown(model.get_imputed_values(normalized=True)[1], hidden, target_sum)


def tangram(seq: ad.AnnData, spatial: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int) -> np.ndarray:
    """Hidden genes of spatial cells by Tangram, every reference cell mapped, at its own settings."""
    import tangram as tg

    order = seq.var_names.str.lower()  # as Tangram calls them from here on
    tg.pp_adatas(seq, spatial)
    found = tg.map_cells_to_space(seq, spatial, mode="cells", device="cpu", random_state=seed, verbose=False)
    projected = tg.project_genes(found, seq).to_df().reindex(columns=order).fillna(0)
    return per_shown(projected.to_numpy(), hidden, target_sum)


def per_shown(values: np.ndarray, hidden: np.ndarray, target_sum: float) -> np.ndarray:
    """Log1p of hidden genes per ``target_sum`` of all others."""
    total = np.delete(values, hidden, 1).sum(1, keepdims=True)
    return np.log1p(target_sum * values[:, hidden] / np.maximum(total, 1e-12))


def spage(
    seq: ad.AnnData, spatial: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int, n_vectors: int = 50
) -> np.ndarray:
    """Hidden genes of spatial cells by SpaGE, with as many principal vectors as its authors took for STARmap."""
    from spagim.main import SpaGE

    shown, names = spatial.var_names, seq.var_names[hidden]
    logs = [
        pd.DataFrame(
            log_normalize(sparse.csr_matrix(cells.X), np.asarray(cells[:, shown].X.sum(1), float).ravel(), target_sum).toarray(),
            columns=cells.var_names,
        )
        for cells in (spatial, seq)
    ]  # fmt: skip
    return SpaGE(*logs, n_pv=n_vectors, genes_to_predict=names).to_numpy()


def spage_tuned(seq: ad.AnnData, spatial: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int) -> np.ndarray:
    """SpaGE with the number of principal vectors that predicts the hidden genes of each reference mouse best."""
    score = dict.fromkeys((50, 10, 30, 100), 0.0)
    for mouse in seq.obs["mouse"].unique():
        test, others = (seq[which].copy() for which in (seq.obs["mouse"] == mouse, seq.obs["mouse"] != mouse))
        library = np.asarray(test[:, spatial.var_names].X.sum(1), float).ravel()
        truth = log_normalize(sparse.csr_matrix(test.X[:, hidden]), library, target_sum).toarray()
        for n in score:
            found = spage(others, test[:, spatial.var_names].copy(), hidden, target_sum, seed, n)
            score[n] += np.nanmean(gene_pearson(truth, found))
    return spage(seq, spatial, hidden, target_sum, seed, max(score, key=score.get))


def envi(seq: ad.AnnData, spatial: ad.AnnData, hidden: np.ndarray, target_sum: float, seed: int) -> np.ndarray:
    """Hidden genes of spatial cells by ENVI at its own settings."""
    import jax
    from scenvi import ENVI

    for cells in (seq, spatial):
        cells.X = np.asarray(cells.X.todense() if sparse.issparse(cells.X) else cells.X, np.float32)
    model = ENVI(spatial, seq)
    model.train(key=jax.random.key(seed))
    model.impute_genes()
    return per_shown(model.spatial_data.obsm["imputation"][seq.var_names].to_numpy(), hidden, target_sum)


IMPUTATION = {
    "gimVI": ("scvi", gimvi),
    "Tangram": ("tangram", tangram),
    "SpaGE": ("spagim", spage),
    "SpaGE, tuned": ("spagim", spage_tuned),
    "ENVI": ("scenvi", envi),
}
