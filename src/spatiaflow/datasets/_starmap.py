"""Mouse prefrontal cortex measured by STARmap, with cell types and manually drawn layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, concat, read_h5ad
from scipy import sparse

from spatiaflow._process import verb
from spatiaflow.datasets._assemble import assembled
from spatiaflow.datasets._fetch import fetch

LAYERS = {
    "1": "L1",
    "2": "L2/3",
    "3": "L5",
    "4": "L6",
}  # numbers in the file; each layer has the cell types of its name
DATASET = {
    "name": "starmap_mpfc",
    "citation": "Wang et al. 2018, Science 361, eaat5691, https://doi.org/10.1126/science.aat5691; labels: Li and Zhou 2022, "
    "Genome Biology 23, 168, https://doi.org/10.1186/s13059-022-02734-7",
    "license": "not stated: the repository has no licence file",
}


@verb
def starmap_mpfc() -> AnnData:
    """Load the medial prefrontal cortex of three mice, measured by STARmap, with gold cell types and layers.

    The first call needs the package ``rdata`` to read the R file. Install it with ``pip install "spatiaflow[datasets]"``. The
    result is kept in ``settings.cache_dir`` for later calls. There is no image.

    Returns
    -------
    AnnData of 3,190 cells (1,049, 1,053 and 1,088) and 166 genes:

    ``.X`` : CSR float32, counts (integers)
    ``.obs["mouse"]`` : category, ``"BZ5"``, ``"BZ9"``, ``"BZ14"``. Pass ``library_key="mouse"`` to verbs
    ``.obs["cell_type"]`` : category, 15 types
    ``.obs["layer"]`` : ordered category ``"L1"`` < ``"L2/3"`` < ``"L5"`` < ``"L6"``
    ``.obsm["spatial"]`` : float64 (n_obs, 2), x (from the pia inwards) and y in **pixels of the authors' image**. The size of
        a pixel is not published, so a verb that needs a scale asks for ``mpp=``. Neighbouring cells are about 165 pixels apart.
        Each mouse has its own coordinates
    ``.uns["dataset"]`` : dict of ``name``, ``citation``, ``license``

    Raises
    ------
    ImportError
        The package ``rdata`` is missing. The message tells how to install it.
    OSError
        The file could not be downloaded. The message tells what to do.

    Notes
    -----
    Wang et al., "Three-dimensional intact-tissue sequencing of single-cell transcriptional states", Science 361, eaat5691
    (2018), https://doi.org/10.1126/science.aat5691. Cell types and layers are the reference labels of Li and Zhou, "BASS:
    multi-scale and multi-sample analysis enables accurate cell type clustering and spatial domain detection in spatial
    transcriptomic studies", Genome Biology 23, 168 (2022), https://doi.org/10.1186/s13059-022-02734-7. The repository has no
    licence file.

    Examples
    --------
    >>> adata = sf.datasets.starmap_mpfc()
    >>> adata.obs["mouse"].cat.categories.tolist()
    ['BZ5', 'BZ9', 'BZ14']
    """
    return read_h5ad(assembled("starmap_mpfc", _write, ".h5ad"))


def _write(store: Path) -> None:
    try:
        import rdata
    except ImportError as error:
        raise ImportError(
            "datasets.starmap_mpfc reads an R file with the package rdata, which is not installed. Run "
            'pip install "spatiaflow[datasets]".'
        ) from error
    (path,) = fetch("starmap_mpfc")
    content = rdata.read_rda(path)
    mice = [_mouse(name, content["starmap_cnts"][name], info) for name, info in content["starmap_info"].items()]
    adata = concat(mice)
    adata.obs["mouse"] = pd.Categorical(adata.obs["mouse"], [mouse.obs["mouse"].iloc[0] for mouse in mice])
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    adata.obs["layer"] = pd.Categorical(adata.obs["layer"], list(LAYERS.values()), ordered=True)
    adata.uns["dataset"] = DATASET
    adata.write_h5ad(store)


def _mouse(name: str, counts, info: pd.DataFrame) -> AnnData:
    """Return one mouse from its counts (genes x cells) and its cells' x, y, c (type), z (layer).

    ``name`` is like "20180417_BZ5_control".
    """
    mouse = name.split("_")[1]
    return AnnData(
        sparse.csr_matrix(counts.sel(dim_1=info.index.to_numpy()).to_numpy().T.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "mouse": mouse,
                "cell_type": info["c"].astype(str).to_numpy(object),
                "layer": info["z"].astype(str).map(LAYERS).to_numpy(object),
            },
            index=[f"{mouse}_{cell}" for cell in info.index],
        ),
        var=pd.DataFrame(index=counts["dim_0"].to_numpy().astype(object)),
        obsm={"spatial": info[["x", "y"]].to_numpy(np.float64)},
    )
