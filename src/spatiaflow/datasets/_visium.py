"""Sections of Visium as Space Ranger writes them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from anndata import AnnData
from PIL import Image

from spatiaflow._process import verb
from spatiaflow.datasets._fetch import fetch, registry

FILES = (
    "filtered_feature_bc_matrix.h5",
    "spatial/scalefactors_json.json",
    "spatial/tissue_hires_image.png",
    "spatial/tissue_positions_list.csv",
)
COLUMNS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@verb
def visium_ffpe(section: str = "mousebrain/V10F24-078_A1") -> AnnData:
    """Load a section of formalin-fixed tissue, measured by Visium over H&E.

    Downloads 5 to 9 MB at the first call. The object holds what :func:`scanpy.read_visium` makes of the folder, which lacks the
    low-resolution image. Two things differ: names of spots begin with the section's, and a prefix of the genome is taken from
    the names of human genes.

    Parameters
    ----------
    section
        ``"kidneyorganoid/V19D02-085_B1"``, ``"kidneyorganoid/V19D02-085_C1"``, ``"lung_SARS-CoV-2/V10F24-110_C1"``,
        ``"lungorganoid/V19D02-088_A1"``, ``"lungorganoid/V19D02-088_B1"``, ``"lungorganoid/V19D02-088_C1"``,
        ``"mousebrain/V10F24-078_A1"`` or ``"mousebrain/V10F24-078_B1"``.

    Returns
    -------
    AnnData of 413 to 2,554 spots under tissue and 31,053 to 33,550 genes:

    ``.X`` : CSR float32, molecule counts (integers)
    ``.obs_names`` : ``"<slide>_<barcode>"``, such as ``"V10F24-078_A1_AAACAAGTATCTCCCA-1"``, unique over the sections
    ``.obs["in_tissue"]``, ``["array_row"]``, ``["array_col"]`` : int, the spot's place on the array
    ``.obs["library_id"]`` : category, the slide
    ``.var_names`` : symbols, made unique; genes of the virus keep the prefix ``wuhCor1_``
    ``.var["gene_ids"]``, ``["feature_types"]``, ``["genome"]`` : str
    ``.obsm["spatial"]`` : float64 (n_obs, 2), x and y in pixels of the full resolution, which was not published
    ``.uns["spatial"][slide]`` : ``images["hires"]`` (uint8 RGB, at most 2,000 px, 4.2 µm/px), ``scalefactors`` and
        ``metadata``. The scale is not stated: it follows from the array, whose spots are 100 µm apart
    ``.uns["dataset"]`` : dict of ``name``, ``citation``, ``license``

    Raises
    ------
    ValueError
        There is no such section.
    OSError
        A file could not be fetched; the message says what to do.

    Notes
    -----
    Gracia Villacampa et al., "Genome-wide spatial expression profiling in formalin-fixed tissues", Cell Genomics 1, 100065
    (2021), https://doi.org/10.1016/j.xgen.2021.100065. The files are those of the repository ``ludvigla/FFPE_analysis``, which
    states no licence.

    Examples
    --------
    >>> adata = sf.datasets.visium_ffpe("lungorganoid/V19D02-088_A1")
    >>> adata.shape
    (416, 33538)
    """
    from scanpy import read_10x_h5

    known = list(
        dict.fromkeys(file.rsplit("/", 2 if "/spatial/" in file else 1)[0] for file in registry()["visium_ffpe"])
    )
    if section not in known:
        raise ValueError(f"visium_ffpe has no section {section!r}; it has {', '.join(map(repr, known))}.")
    matrix, factors, image, spots = fetch("visium_ffpe", *(f"{section}/{file}" for file in FILES))
    slide = section.split("/")[1]
    adata = read_10x_h5(matrix)
    adata.var_names = adata.var_names.str.removeprefix("GRCh38__")
    adata.var["gene_ids"] = adata.var["gene_ids"].str.removeprefix("GRCh38__")
    adata.var_names_make_unique()
    places = pd.read_csv(spots, header=None, index_col=0, names=COLUMNS).loc[adata.obs_names]
    adata.obs = places[COLUMNS[:3]].assign(library_id=pd.Categorical([slide] * len(places)))
    adata.obs_names = f"{slide}_" + adata.obs_names
    adata.obsm["spatial"] = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    with Image.open(image) as picture:
        hires = np.asarray(picture.convert("RGB"))
    adata.uns["spatial"] = {
        slide: {
            "images": {"hires": hires},
            "scalefactors": json.loads(factors.read_text(encoding="utf-8")),
            "metadata": {"chemistry_description": "Spatial 3' v1"},
        }
    }
    adata.uns["dataset"] = {
        "name": "visium_ffpe",
        "citation": "Gracia Villacampa et al. 2021, Cell Genomics 1, 100065, https://doi.org/10.1016/j.xgen.2021.100065",
        "license": "not stated: the repository ludvigla/FFPE_analysis has no licence file",
    }
    return adata
