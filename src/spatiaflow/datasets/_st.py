"""Sections measured by Spatial Transcriptomics, the predecessor of Visium: counts of spots on an H&E image."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from PIL import Image
from scipy import sparse

from spatiaflow._process import verb
from spatiaflow._settings import logger
from spatiaflow.datasets._fetch import fetch

HER2ST_SECTIONS = ("A1", "B4", "C2", "C3", "C4", "C5")
OLFACTORY_BULB_SECTIONS = ("MOB1", "MOB2", "MOB3")
SPOT_DIAMETER_UM = 100.0
HIRES_PIXELS = 2000
A1_WIDTH = 6954  # pixels of the picture that the spots of A1 were placed in; the repository holds a smaller one


@verb
def her2st(section: str = "C2") -> AnnData:
    """Load a section of HER2-positive breast cancer, measured by Spatial Transcriptomics on an H&E image.

    The first call downloads about 5 MB. C2 to C5 are serial sections of one donor. A1 and B4 are from two other donors. Spots are
    100 µm wide and 200 µm apart. Spots under tissue (``selected`` in the authors' spot file) that have counts are kept. The
    others are dropped, and their number is logged. Counts are not filtered: a few spots have only a handful of molecules. The
    picture of A1 is small, 2,000 x 2,138 px, and black outside of the tissue.

    Parameters
    ----------
    section
        ``"A1"``, ``"B4"``, ``"C2"``, ``"C3"``, ``"C4"`` or ``"C5"``.

    Returns
    -------
    AnnData of 180 to 346 spots and 15,000 to 15,700 genes (symbols; the gene lists of the sections differ slightly):

    ``.X`` : CSR float32, molecule counts (integers)
    ``.obs_names`` : ``"<section>_<column>x<row>"``, unique across sections
    ``.obs["array_col"]``, ``.obs["array_row"]`` : int, column and row of the spot on the array
    ``.obs["library_id"]``, ``.obs["donor"]`` : categories: the section; ``"A"``, ``"B"`` or ``"C"``
    ``.obs["annotation"]`` : categories, of A1 alone: the pathologist's region
    ``.obsm["spatial"]`` : float64 (n_obs, 2), x and y in pixels of the full-resolution image
    ``.uns["spatial"][section]`` : ``images["hires"]`` (uint8 RGB, at most 2,000 px), ``scalefactors``,
    and ``metadata`` with ``microns_per_pixel`` (200 µm divided by the measured spot distance, about 0.69; of A1 3.19) and
    ``source_image_path``, the full-resolution JPEG (of A1 the PNG) in the cache
    ``.uns["dataset"]`` : dict of ``name``, ``citation``, ``license``

    Raises
    ------
    ValueError
        There is no such section.
    OSError
        A file could not be downloaded. The message tells what to do.

    Notes
    -----
    Andersson et al., "Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated cell type
    interactions", Nature Communications 12, 6012 (2021), https://doi.org/10.1038/s41467-021-26271-2. The repository
    ``almaan/her2st`` has no licence file; the data are also on Zenodo, record 3957257.

    Examples
    --------
    Several sections in one object. Pass ``library_key="library_id"`` to verbs:

    >>> import anndata as ad
    >>> sections = [sf.datasets.her2st(section) for section in ("C2", "C3")]
    >>> adata = ad.concat(sections, uns_merge="unique")
    >>> adata.obs["library_id"].unique().tolist()
    ['C2', 'C3']
    """
    _check_section("her2st", section, HER2ST_SECTIONS)
    image = f"{section}.png" if section == "A1" else f"{section}.jpg"
    files = fetch("her2st", f"{section}.tsv.gz", f"{section}_selection.tsv", image)
    adata = _read_section(section, *files, unit_um=200.0, placed_in=A1_WIDTH if section == "A1" else None)
    if section == "A1":
        adata.obs["annotation"] = _annotation(*fetch("her2st", "A1_labeled_coordinates.tsv")).loc[adata.obs_names]
    adata.obs["donor"] = pd.Categorical([section[0]] * adata.n_obs)
    adata.uns["dataset"] = {
        "name": "her2st",
        "citation": "Andersson et al. 2021, Nature Communications 12, 6012, https://doi.org/10.1038/s41467-021-26271-2",
        "license": "not stated: the repository almaan/her2st has no licence file; also on Zenodo, record 3957257",
    }
    return adata


@verb
def mouse_olfactory_bulb(section: str = "MOB1") -> AnnData:
    """Load a section of mouse olfactory bulb, measured by Spatial Transcriptomics (2k array) on an H&E image.

    The first call downloads about 4 MB: a small image, 1,905 px wide, and the 1,000 genes that the authors kept. Of the 1,934
    spots of the array, those under tissue (``selected`` in the spot file) are kept. The number of the others is logged.

    Parameters
    ----------
    section
        ``"MOB1"``, ``"MOB2"`` or ``"MOB3"``.

    Returns
    -------
    AnnData of 379 to 438 spots and 1,000 genes (Ensembl ids with version). The slots are those of :func:`her2st`, without
    ``.obs["donor"]``. ``microns_per_pixel`` is about 4.39.

    Raises
    ------
    ValueError
        There is no such section.
    OSError
        A file could not be downloaded. The message tells what to do.

    Notes
    -----
    The files do not contain the scale; it is derived here. The array has 66 columns and 63 rows, with a spot where column + row
    is even. This is the 200 µm grid of the older array plus a second grid shifted by half a step. So one step of the array's
    coordinates is 100 µm, and nearest neighbours are 141 µm apart, as in the authors' package for its 2k arrays.
    ``microns_per_pixel`` is 100 µm divided by the measured step, the geometric mean of the two axes (21.6 and 24.1 px; steps
    along x are 11 % shorter). With this scale the array measures 6.2 x 6.6 mm and a bulb 2.5 mm, as expected. The spot width,
    100 µm, is that of the older array. It is not in the files either.

    The files are part of STUtility: Bergenstråhle, Larsson and Lundeberg, "Seamless integration of image and molecular
    analysis for spatial transcriptomics workflows", BMC Genomics 21, 482 (2020),
    https://doi.org/10.1186/s12864-020-06832-3; repository ``jbergenstrahle/STUtility``, MIT.

    Examples
    --------
    >>> adata = sf.datasets.mouse_olfactory_bulb("MOB1")
    >>> adata.shape
    (379, 1000)
    """
    _check_section("mouse_olfactory_bulb", section, OLFACTORY_BULB_SECTIONS)
    files = f"{section}.tsv", f"alignment_table_{section}.tsv", f"{section}.jpg"
    adata = _read_section(section, *fetch("mouse_olfactory_bulb", *files), unit_um=100.0)
    adata.uns["dataset"] = {
        "name": "mouse_olfactory_bulb",
        "citation": "Bergenstråhle et al. 2020, BMC Genomics 21, 482, https://doi.org/10.1186/s12864-020-06832-3",
        "license": "MIT (repository jbergenstrahle/STUtility)",
    }
    return adata


def _annotation(path: Path) -> pd.Series:
    """Return the pathologist's region of every spot of A1; the file gives x and y of the spots as measured, not rounded."""
    found = pd.read_csv(path, sep="\t")
    place = found[["x", "y"]].round().astype(int).astype(str)
    return pd.Series(pd.Categorical(found["label"]), index="A1_" + place["x"] + "x" + place["y"])


def _check_section(dataset: str, section: str, sections: tuple[str, ...]) -> None:
    if section not in sections:
        raise ValueError(f"{dataset} has no section {section!r}; it has {', '.join(map(repr, sections))}.")


def _read_section(
    section: str, counts_path: Path, spots_path: Path, image_path: Path, *, unit_um: float, placed_in: int | None = None
) -> AnnData:
    """Join counts (spots x genes, rows named ``XxY``) and spot positions. ``unit_um`` is one step of X or Y in µm.

    ``placed_in``: width in pixels of the image that positions belong to, where it is another than that of the file.
    """
    counts = pd.read_csv(counts_path, sep="\t", index_col=0)
    spots = pd.read_csv(spots_path, sep="\t")
    if placed_in is not None:
        with Image.open(image_path) as image:
            spots[["pixel_x", "pixel_y"]] *= image.width / placed_in
    spots.index = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    microns_per_pixel = unit_um / _pixels_per_step(spots)

    under_tissue = spots.index[spots["selected"] == 1]
    kept = under_tissue.intersection(counts.index, sort=False)
    logger.info(
        "section %s: %d spots; dropped %d under tissue without counts, and %d with counts but not under tissue",
        section,
        len(kept),
        len(under_tissue) - len(kept),
        len(counts) - len(kept),
    )
    spots = spots.loc[kept]
    hires, hires_scale = _read_hires(image_path)
    return AnnData(
        sparse.csr_matrix(counts.loc[kept].to_numpy(np.float32)),
        obs=pd.DataFrame(
            {
                "array_col": spots["x"].to_numpy(),
                "array_row": spots["y"].to_numpy(),
                "library_id": pd.Categorical([section] * len(spots)),
            },
            index=[f"{section}_{name}" for name in kept],
        ),
        var=pd.DataFrame(index=counts.columns.astype(str)),
        obsm={"spatial": spots[["pixel_x", "pixel_y"]].to_numpy(np.float64)},
        uns={
            "spatial": {
                section: {
                    "images": {"hires": hires},
                    "scalefactors": {
                        "tissue_hires_scalef": hires_scale,
                        "spot_diameter_fullres": SPOT_DIAMETER_UM / microns_per_pixel,
                    },
                    "metadata": {"microns_per_pixel": microns_per_pixel, "source_image_path": str(image_path)},
                }
            }
        },
    )


def _pixels_per_step(spots: pd.DataFrame) -> float:
    """Return the pixels of one step of the array: the geometric mean of both axes of an affine fit to all spots.

    The distance to the nearest neighbour would be 6 % too short. Printed spots are displaced at random, and the nearest of four
    neighbours is the one displaced towards the spot.
    """
    array = np.column_stack([spots["x"], spots["y"], np.ones(len(spots))])
    affine = np.linalg.lstsq(array, spots[["pixel_x", "pixel_y"]].to_numpy(), rcond=None)[0]
    return float(np.sqrt(abs(np.linalg.det(affine[:2]))))


def _read_hires(path: Path) -> tuple[np.ndarray, float]:
    """Return the image as uint8 RGB with at most ``HIRES_PIXELS`` per side, and its scale relative to the file."""
    with warnings.catch_warnings():
        # Pillow warns of large images because they may be attacks; the sha256 of this one was checked
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(path)
    with image:
        width = image.width
        image.draft("RGB", (HIRES_PIXELS, HIRES_PIXELS))  # libjpeg decodes at 1/4 size, which saves time and memory
        image.thumbnail((HIRES_PIXELS, HIRES_PIXELS), reducing_gap=None)
        pixels = np.asarray(image.convert("RGB"))
    return pixels, pixels.shape[1] / width
