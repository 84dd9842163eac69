"""Simulated tissue: images, polygons and counts with a known truth, so that every method can be tested without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatiaflow._process import verb

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from xarray import DataArray

MPP = 0.5  # µm per pixel of both images
SPACING = 10.0  # µm between neighbouring cells
NICHES = ("stroma", "gland", "immune")
TYPES = ("fibroblast", "epithelial", "lymphocyte", "endothelial")
# share of each type in each niche; every niche has every type, so the niche does not determine the type
SHARES = np.array([[0.60, 0.12, 0.13, 0.15], [0.12, 0.70, 0.10, 0.08], [0.18, 0.12, 0.60, 0.10]])
# mean area of nuclei (µm²) by type, multiplied by a factor for the niche and a factor for state B of epithelial cells
AREA = {"fibroblast": 38.0, "epithelial": 46.0, "lymphocyte": 26.0, "endothelial": 32.0}
AREA_NICHE = {"stroma": 1.0, "gland": 1.15, "immune": 0.9}
AREA_STATE_B = 1.5
AREA_STATE_B_NICHE = {"stroma": 1.25, "gland": 1.5, "immune": 1.9}  # used instead with state_by_niche=True
AXIS_RATIO = {"fibroblast": 0.45, "epithelial": 0.75, "lymphocyte": 0.92, "endothelial": 0.4}  # minor / major axis
AXIS_RATIO_STATE_B = 0.8  # factor
AXIS_RATIO_STATE_B_NICHE = {"stroma": 0.6, "gland": 0.72, "immune": 0.85}
CHROMATIN = {"fibroblast": 0.8, "epithelial": 0.75, "lymphocyte": 1.25, "endothelial": 0.95}  # optical density
AREA_SPREAD, THETA, LIBRARY, LIBRARY_SPREAD = 0.12, 10.0, 800.0, 0.35
HEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.09, 0.95, 0.28])  # optical density of R, G, B


@verb
def simulated_tissue(
    n_cells: int = 2000, *, seed: int = 0, n_genes: int = 60, state_by_niche: bool = False
) -> SpatialData:
    """Simulate a slide of tissue with H&E and fluorescence images, nuclei and counts, from known causes.

    The rules (genes, morphology, colours) are the same for every seed. The seed sets the layout, the noise and a slight change
    of stain. So different seeds give different slides of the same kind of tissue.

    Parameters
    ----------
    n_cells
        Number of cells. Each takes about 100 µm² of tissue.
    seed
        Seed of the slide. The same seed gives the same slide.
    n_genes
        Number of genes, at least 30. 12 follow the cell type, 6 the niche, 4 the nuclear area and 2 the state. The others follow
        nothing.
    state_by_niche
        If True, state B changes the area and axis ratio of nuclei by a different factor in each niche. If False, the factors are
        the same in all niches.

    Returns
    -------
    SpatialData with

    ``images["he"]`` : uint8 (3, y, x), H&E-like, 0.5 µm per pixel
    ``images["fluorescence"]`` : uint8 (4, y, x), channels dapi, bound, rna, prot
    ``shapes["nuclei"]`` : polygons; the coordinate system "global" is in µm (``attrs["microns_per_unit"]``)
    ``tables["table"]`` : counts (CSR) of the nuclei, with the truth in
        ``obs`` ``cell_type``, ``niche``, ``state`` ("A" or "B" for epithelial cells, else "none"), ``area_um2``,
        ``axis_ratio``, ``library``; ``var`` ``driver`` ("type", "niche", "morphology", "state", "none");
        ``layers["rate"]``, the expected share of the library; ``uns["planted"]``, the parameters;
        ``obsm["spatial"]`` in µm

    Raises
    ------
    ValueError
        Too few cells or genes.

    Examples
    --------
    >>> sdata = sf.datasets.simulated_tissue(500)
    >>> sdata["table"].shape
    (500, 60)
    >>> sorted(sdata.images)
    ['fluorescence', 'he']
    """
    n_cells, n_genes = int(n_cells), int(n_genes)
    if n_cells < 20:
        raise ValueError(f"n_cells must be at least 20, not {n_cells}.")
    if n_genes < 30:
        raise ValueError(f"n_genes must be at least 30, not {n_genes}.")
    rng = np.random.default_rng(seed)
    xy, niche, field, lumen, side = _layout(n_cells, rng)
    obs = _cells(niche, state_by_niche, rng)
    polygons = _nuclei(xy, obs, rng)
    rate, drivers = _rates(obs, n_genes)
    obs["library"] = np.round(LIBRARY * rng.lognormal(-(LIBRARY_SPREAD**2) / 2, LIBRARY_SPREAD, n_cells))
    mean = obs["library"].to_numpy()[:, None] * rate
    counts = rng.poisson(rng.gamma(THETA, mean / THETA))
    he, fluorescence = _render(polygons, obs, field, lumen, side, rng)
    return _spatialdata(xy, obs, polygons, counts, rate, drivers, he, fluorescence, state_by_niche)


def _layout(n_cells: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Place cells on a jittered hexagonal grid. Niches are smooth regions. Lumina are holes in the glands."""
    from scipy.ndimage import gaussian_filter

    side = SPACING * np.sqrt(n_cells * 1.12)  # µm
    pixels = int(np.ceil(side / MPP))
    coarse = max(8, pixels // 16)  # fields on a grid of 8 µm

    def smooth_field(scale_um: float) -> np.ndarray:
        values = gaussian_filter(rng.normal(size=(coarse, coarse)), scale_um / (side / coarse), mode="reflect")
        return (np.argsort(np.argsort(values.ravel())) / values.size).reshape(values.shape)  # quantiles

    gland, immune = smooth_field(45.0), smooth_field(50.0)
    niche_map = np.where(gland > 0.62, 1, np.where(immune > 0.75, 2, 0))
    lumen = gland > 0.95
    row = SPACING * np.sqrt(3) / 2
    i, j = np.meshgrid(np.arange(int(side / SPACING) + 1), np.arange(int(side / row) + 1))
    xy = np.stack([(i + 0.5 * (j % 2)) * SPACING, j * row], -1).reshape(-1, 2) + rng.normal(0, 1.2, (i.size, 2))
    xy = xy[((xy > 4) & (xy < side - 4)).all(1)]

    def at(grid: np.ndarray, points: np.ndarray) -> np.ndarray:
        index = np.clip((points / side * coarse).astype(int), 0, coarse - 1)
        return grid[index[:, 1], index[:, 0]]

    xy = xy[~at(lumen, xy)]
    if len(xy) < n_cells:  # holes took too much space: place the missing cells between rows
        extra = xy[rng.permutation(len(xy))[: n_cells - len(xy)]] + [SPACING / 2, row / 2]
        xy = np.concatenate([xy, extra])
    xy = xy[np.sort(rng.permutation(len(xy))[:n_cells])]
    return xy, at(niche_map, xy), niche_map, lumen, side


def _effects(state_by_niche: bool) -> tuple[dict, dict]:
    """Return the factors of state B for area and axis ratio in each niche."""
    if state_by_niche:
        return AREA_STATE_B_NICHE, AXIS_RATIO_STATE_B_NICHE
    return dict.fromkeys(NICHES, AREA_STATE_B), dict.fromkeys(NICHES, AXIS_RATIO_STATE_B)


def _cells(niche: np.ndarray, state_by_niche: bool, rng: np.random.Generator) -> pd.DataFrame:
    types = (rng.random((len(niche), 1)) > SHARES.cumsum(1)[niche]).sum(1).clip(0, 3)
    cell_type, niche_name = np.array(TYPES)[types], np.array(NICHES)[niche]
    state = np.where(cell_type == "epithelial", np.where(rng.random(len(niche)) < 0.5, "B", "A"), "none")
    mean_area = np.array([AREA[t] * AREA_NICHE[n] for t, n in zip(cell_type, niche_name)])
    larger, longer = (np.array([factor[n] for n in niche_name]) for factor in _effects(state_by_niche))
    mean_area = mean_area * np.where(state == "B", larger, 1.0)
    ratio = np.array([AXIS_RATIO[t] for t in cell_type]) * np.where(state == "B", longer, 1.0)
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(cell_type, TYPES),
            "niche": pd.Categorical(niche_name, NICHES),
            "state": pd.Categorical(state, ("A", "B", "none")),
            "area_um2": mean_area * rng.lognormal(-(AREA_SPREAD**2) / 2, AREA_SPREAD, len(niche)),
            "axis_ratio": np.clip(ratio + rng.normal(0, 0.04, len(niche)), 0.25, 1.0),
        },
        index=[f"cell_{i}" for i in range(len(niche))],
    )


def _nuclei(xy: np.ndarray, obs: pd.DataFrame, rng: np.random.Generator, n_vertices: int = 24) -> np.ndarray:
    """Return slightly irregular ellipses of the planted area and axis ratio: n x vertices x 2, in µm."""
    angle = np.linspace(0, 2 * np.pi, n_vertices, endpoint=False)
    major = np.sqrt(obs["area_um2"] / (np.pi * obs["axis_ratio"])).to_numpy()
    minor = major * obs["axis_ratio"].to_numpy()
    phase, turn = rng.uniform(0, 2 * np.pi, (len(xy), 1)), rng.uniform(0, np.pi, len(xy))
    wobble = 1 + 0.05 * np.cos(3 * angle + phase)
    shape = np.stack([major[:, None] * np.cos(angle) * wobble, minor[:, None] * np.sin(angle) * wobble], -1)
    rotation = np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], -1).reshape(-1, 2, 2)
    return xy[:, None] + np.einsum("nvk,njk->nvj", shape, rotation)


def _rates(obs: pd.DataFrame, n_genes: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the expected share of each gene in each cell: a baseline times the effect of the gene's cause."""
    rng = np.random.default_rng(2024)  # genes have the same causes on every slide
    names, drivers, log = [], [], []

    def add(name: str, driver: str, effect: np.ndarray | pd.Series) -> None:
        names.append(name)
        drivers.append(driver)
        log.append(rng.normal(-1.0, 0.5) + np.asarray(effect, float))

    for name in TYPES:
        for i in range(3):
            add(f"TYPE_{name}{i + 1}", "type", 2.2 * (obs["cell_type"] == name))
    for name in NICHES:
        for i in range(2):
            add(f"NICHE_{name}{i + 1}", "niche", 1.6 * (obs["niche"] == name))
    for i in range(4):
        add(f"MORPH{i + 1}", "morphology", (-1) ** i * 2.0 * np.log(obs["area_um2"] / 40.0))
    for i, name in enumerate("AB"):
        add(f"STATE{i + 1}", "state", 2.0 * (obs["state"] == name))
    for i in range(n_genes - len(names)):
        add(f"NOISE{i + 1:02d}", "none", np.zeros(len(obs)))
    weight = np.exp(np.stack(log, 1))
    rate = weight / weight.sum(1, keepdims=True)
    return rate, pd.DataFrame({"driver": pd.Categorical(drivers)}, index=names)


def _render(
    polygons: np.ndarray,
    obs: pd.DataFrame,
    niche_map: np.ndarray,
    lumen: np.ndarray,
    side: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the H&E and the fluorescence image, uint8 (channels, y, x)."""
    from scipy.ndimage import gaussian_filter, zoom
    from skimage.draw import polygon as fill

    n = int(np.ceil(side / MPP))
    factor = n / len(niche_map)

    def upsample(grid: np.ndarray, sigma_um: float) -> np.ndarray:
        return gaussian_filter(zoom(grid.astype(np.float32), factor, order=0)[:n, :n], sigma_um / MPP)

    def texture(sy: float, sx: float) -> np.ndarray:
        values = gaussian_filter(rng.standard_normal((n, n), dtype=np.float32), (sy / MPP, sx / MPP))
        return values / values.std()

    gland, immune, hole = (upsample(grid, s) for grid, s in ((niche_map == 1, 4), (niche_map == 2, 6), (lumen, 3)))
    fibres = np.where(texture(40, 40) > 0, texture(0.8, 5.0), texture(5.0, 0.8))  # bundles in two directions
    grain = texture(0.7, 0.7)
    nuclei, chromatin = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32)
    cytoplasm = np.zeros((n, n), np.float32)
    strength = np.array([CHROMATIN[t] for t in obs["cell_type"]]) * rng.lognormal(0, 0.08, len(obs))
    centre = polygons.mean(1, keepdims=True)
    for points, wide, value in zip(polygons / MPP, (centre + 1.7 * (polygons - centre)) / MPP, strength):
        rows, columns = fill(wide[:, 1], wide[:, 0], (n, n))
        cytoplasm[rows, columns] = 1
        rows, columns = fill(points[:, 1], points[:, 0], (n, n))
        nuclei[rows, columns] = 1
        chromatin[rows, columns] = value
    edge = gaussian_filter(nuclei, 0.6)
    hematoxylin = (
        gaussian_filter(chromatin, 0.6) * (1 + 0.22 * grain) + 0.06 + 0.14 * gland * gaussian_filter(cytoplasm, 1)
    )
    stroma = np.clip(1 - gland - 0.6 * immune, 0, 1)
    eosin = 0.20 + stroma * (0.22 + 0.09 * fibres) + 0.10 * gland + 0.05 * grain
    keep = np.clip(1 - 1.6 * hole, 0, 1) * (1 - 0.35 * np.clip(texture(3, 3) - 1.4, 0, 1) * stroma)  # lumina, clefts
    stain = rng.lognormal(0, 0.06, 2)  # stain of this slide
    density = np.clip(hematoxylin * stain[0], 0, 3)[..., None] * HEMATOXYLIN
    density += np.clip(eosin * (1 - 0.5 * edge) * stain[1], 0, 3)[..., None] * EOSIN
    drift = 1 + 0.05 * np.linspace(-1, 1, n, dtype=np.float32)[:, None, None]  # thickness changes along the slide
    transmitted = np.exp(-density * np.maximum(keep, edge)[..., None] * drift)
    he = np.clip(245 * transmitted + rng.normal(0, 2.0, (n, n, 1)), 0, 255).astype(np.uint8).transpose(2, 0, 1)

    ring = np.clip(gaussian_filter(cytoplasm, 1.2) - gaussian_filter(cytoplasm, 3.0), 0, None)
    body = gaussian_filter(cytoplasm, 1.5) * (1 - 0.7 * edge)
    channels = [
        150 * gaussian_filter(chromatin, 1.0) * (1 + 0.12 * grain),
        350 * ring + 8,
        80 * body * (0.6 + 0.6 * gland) + 6,
        60 * stroma * (1 + 0.3 * fibres) + 40 * immune * body + 5,
    ]
    noise = rng.standard_normal((n, n), dtype=np.float32)
    return he, np.stack([np.clip(c + 3 * np.roll(noise, 17 * i, 0), 0, 255) for i, c in enumerate(channels)]).astype(
        np.uint8
    )


def _spatialdata(
    xy: np.ndarray, obs: pd.DataFrame, polygons: np.ndarray, counts: np.ndarray, rate: np.ndarray, drivers: pd.DataFrame,
    he: np.ndarray, fluorescence: np.ndarray, state_by_niche: bool,
) -> SpatialData:  # fmt: skip
    """Return everything as one SpatialData."""
    import anndata as ad
    import dask.array as da
    import geopandas as gpd
    import shapely
    import spatialdata as sd
    from scipy import sparse
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    def image(values: np.ndarray, names: str | tuple[str, ...]) -> DataArray:
        return Image2DModel.parse(
            da.from_array(values, chunks=(len(values), 512, 512)), dims=("c", "y", "x"), c_coords=list(names),
            transformations={"global": Scale([MPP, MPP], axes=("x", "y"))},
        )  # fmt: skip

    shapes = gpd.GeoDataFrame(geometry=shapely.polygons(polygons), index=obs.index)
    table = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=drivers)
    table.layers["rate"] = rate.astype(np.float32)
    table.obs["region"] = pd.Categorical(["nuclei"] * len(obs))
    table.obs["cell_id"] = obs.index.to_numpy()
    table.obsm["spatial"] = xy
    larger, longer = _effects(state_by_niche)
    table.uns["planted"] = {
        "theta": THETA, "library": LIBRARY, "library_spread": LIBRARY_SPREAD, "area_um2": AREA, "area_niche": AREA_NICHE,
        "area_state_B": larger, "axis_ratio": AXIS_RATIO, "axis_ratio_state_B": longer,
        "chromatin": CHROMATIN, "area_spread": AREA_SPREAD,
    }  # fmt: skip
    table = TableModel.parse(table, region="nuclei", region_key="region", instance_key="cell_id")
    return sd.SpatialData(
        images={"he": image(he, "rgb"), "fluorescence": image(fluorescence, ("dapi", "bound", "rna", "prot"))},
        shapes={"nuclei": ShapesModel.parse(shapes, transformations={"global": Identity()})},
        tables={"table": table}, attrs={"microns_per_unit": {"global": 1.0}},
    )  # fmt: skip
