"""What the common readers return works as it comes: every reader, every function, without mpp=.

The same table is in docs/inputs.md.
"""

import inspect
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import dask.array as da
import geopandas as gpd
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
import spatialdata_io
import tifffile
from PIL import Image
from scipy.spatial import cKDTree
from shapely import MultiPolygon
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

import spatiaflow as sf
from spatiaflow import _io

pytestmark = pytest.mark.filterwarnings("ignore")  # of the readers

SECTION = "visium_ffpe/lungorganoid/V19D02-088_A1"
PAGE = Path(__file__).parents[1] / "docs" / "inputs.md"


def around(data, table_key="table", n=70):
    """Keep the rows with counts that are nearest to the middle of the tissue."""
    table = data[table_key] if isinstance(data, sd.SpatialData) else data
    full = np.flatnonzero(np.asarray(table.X.sum(1)).ravel() > 0)
    xy = table.obsm["spatial"][full]
    rows = np.sort(full[cKDTree(xy).query(np.median(xy, 0), k=min(n, len(full)))[1]])
    if not isinstance(data, sd.SpatialData):
        return data[rows].copy()
    del data.tables[table_key]
    data[table_key] = table[rows].copy()
    return data


def unique(adata):
    adata.var_names_make_unique()
    return adata


# Folders that readers take: of the public files, of the instruments' toys, and made here


def visium_folder(folders):
    """The section as Space Ranger writes it; its repository lacks the low resolution, on which scanpy and squidpy insist."""
    folder, source = folders["tmp"] / "visium", folders["mirror"] / SECTION
    if not folder.exists():
        (folder / "spatial").mkdir(parents=True)
        for file in source.rglob("*.*"):
            shutil.copyfile(file, folder / file.relative_to(source))
        with Image.open(folder / "spatial/tissue_hires_image.png") as image:
            image.resize((594, 600)).save(folder / "spatial/tissue_lowres_image.png")
    return folder


def merscope_folder(folders):
    """The toy has outlines in the plane 3 alone, as plain polygons; the reader looks for several parts in the plane 0."""
    folder = folders["tmp"] / "slide" / "region_0"
    if not folder.exists():
        shutil.copytree(folders["vendor"] / "merscope_toy_sfe", folder, copy_function=shutil.copyfile)
        cells = gpd.read_parquet(folder / "cell_boundaries.parquet")
        cells = cells.assign(ZIndex=0, Geometry=[MultiPolygon([one]) for one in cells.geometry])
        cells.to_parquet(folder / "cell_boundaries.parquet")
    return folder


COSMX_SIDE, COSMX_MPP = 240, 0.12028


def cosmx_folder(folders):
    """Two fields of view of 64 cells, each a square with its own shade of red; y of the table counts from below."""
    folder = folders["tmp"] / "cosmx"
    if folder.exists():
        return folder
    rng, rows, counts = np.random.default_rng(0), [], []
    for fov in (1, 2):
        picture = np.zeros((COSMX_SIDE, COSMX_SIDE, 3), np.uint8)
        labels = np.zeros((COSMX_SIDE, COSMX_SIDE), np.uint16)
        for cell in range(1, 65):
            x, y = 10 + 30 * ((cell - 1) % 8), 12 + 29 * ((cell - 1) // 8)
            picture[y - 8 : y + 8, x - 8 : x + 8, 0] = 60 + 3 * cell
            labels[y - 8 : y + 8, x - 8 : x + 8] = cell
            below = COSMX_SIDE - y
            here = {"CenterX_local_px": x, "CenterY_local_px": below}
            there = {"CenterX_global_px": x + 5000 * fov, "CenterY_global_px": below + 9000}
            rows.append({"fov": fov, "cell_ID": cell, "Area": 256, "Area.um2": 256 * COSMX_MPP**2} | here | there)
            counts.append({"fov": fov, "cell_ID": cell} | {f"G{i}": n for i, n in enumerate(rng.poisson(3, 20))})
        for name in ("CellComposite", "CellLabels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / "CellComposite" / f"CellComposite_F00{fov}.png")
        tifffile.imwrite(folder / "CellLabels" / f"CellLabels_F00{fov}.tif", labels)
    pd.DataFrame(rows).to_csv(folder / "run_metadata_file.csv", index=False)
    pd.DataFrame(counts).to_csv(folder / "run_exprMat_file.csv", index=False)
    pd.DataFrame({"fov": [1, 2], "x_global_px": [5000, 10000], "y_global_px": [9000, 9000]}).to_csv(
        folder / "run_fov_positions_file.csv", index=False
    )
    return folder


# Readers


def read_visium(folders):
    return around(unique(sc.read_visium(visium_folder(folders))))


def squidpy_visium(folders):
    import squidpy

    return around(unique(squidpy.read.visium(visium_folder(folders))))


def squidpy_vizgen(folders):
    import squidpy

    files = {"counts_file": "cell_by_gene.csv", "meta_file": "cell_metadata.csv"}
    transformation = "micron_to_mosaic_pixel_transform.csv"
    folder = folders["vendor"] / "merscope_toy_sfe"
    return around(squidpy.read.vizgen(folder, **files, transformation_file=transformation, library_id="region_0"))


def squidpy_nanostring(folders):
    import squidpy

    files = {"counts_file": "run_exprMat_file.csv", "meta_file": "run_metadata_file.csv"}
    return squidpy.read.nanostring(cosmx_folder(folders), **files, fov_file="run_fov_positions_file.csv")


def io_visium(folders):
    return around(spatialdata_io.visium(folders["mirror"] / SECTION, dataset_id="A1"))


def io_visium_cytassist(folders):
    return around(spatialdata_io.visium(folders["vendor"] / "spaceranger3_cytassist" / "outs", dataset_id="cyt"))


def io_visium_hd(folders):
    sdata = spatialdata_io.visium_hd(folders["vendor"] / "visium_hd_tiny" / "assembled", dataset_id="")
    return around(sdata, "square_008um")


def io_xenium(folders):
    """The toy's stain is far smaller than the field of its cells, so another takes its place, 8 pixels wide each."""
    sdata = spatialdata_io.xenium(folders["vendor"] / "xenium_toy_bundle")
    height, width = sdata["cell_labels"]["scale0"]["image"].shape
    pixels = np.random.default_rng(0).integers(0, 255, (1, height // 8 + 1, width // 8 + 1), dtype=np.uint8)
    del sdata.images["morphology_focus"], sdata.images["morphology_mip"]
    options = {"c_coords": ["DAPI"], "transformations": {"global": Scale([8.0, 8.0], axes=("x", "y"))}}
    sdata["morphology_focus"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), **options)
    return around(sdata)


@contextmanager
def reader_of_older_anndata():
    """merscope and cosmx of spatialdata-io 0.7.1 give AnnData a ``dtype=``, which anndata 0.13 has no more."""
    made = ad.AnnData.__init__
    with pytest.MonkeyPatch.context() as patch:
        if "dtype" not in inspect.signature(made).parameters:
            patch.setattr(ad.AnnData, "__init__", lambda self, *args, dtype=None, **more: made(self, *args, **more))
        yield


@reader_of_older_anndata()
def io_merscope(folders):
    return around(spatialdata_io.merscope(merscope_folder(folders), z_layers=3))


@reader_of_older_anndata()
def io_merscope_without_outlines(folders):
    return around(spatialdata_io.merscope(merscope_folder(folders), z_layers=3, cells_boundaries=False))


@reader_of_older_anndata()
def io_cosmx(folders):
    return spatialdata_io.cosmx(cosmx_folder(folders), transcripts=False)


def cellxgene(folders):
    """Visium as CELLxGENE publishes it: normalised X, counts in raw, Ensembl ids, pictures of two resolutions."""
    if (written := folders["tmp"] / "cellxgene.h5ad").exists():
        return ad.read_h5ad(written)
    adata = read_visium(folders)
    hires = adata.uns["spatial"]["V19D02-088_A1"]["images"]["hires"]
    scale = adata.uns["spatial"]["V19D02-088_A1"]["scalefactors"]
    adata.obsm["spatial"] = (
        adata.obsm["spatial"] * scale["tissue_hires_scalef"] * 2
    )  # the full resolution is that of fullres
    adata.var_names = adata.var["gene_ids"].to_numpy()
    adata.uns["spatial"] = {
        "V19D02-088_A1": {
            "images": {"hires": hires, "fullres": np.repeat(np.repeat(hires, 2, 0), 2, 1)},
            "scalefactors": {"spot_diameter_fullres": 33.0, "tissue_hires_scalef": 0.5},
        },
        "is_single": True,
    }
    adata.raw = adata.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return through_h5ad(adata, folders, "cellxgene")


def cellxgene_raw(folders):
    return cellxgene(folders).raw.to_adata()


def hest(folders):
    """Visium as HEST publishes it: one picture, scaled down, and positions in obs too."""
    adata = read_visium(folders)
    (library,) = adata.uns["spatial"].values()
    factors = {"spot_diameter_fullres": 400.0}
    factors["tissue_downscaled_fullres_scalef"] = library["scalefactors"]["tissue_hires_scalef"]
    adata.uns["spatial"] = {
        "ST": {"images": {"downscaled_fullres": library["images"]["hires"]}, "scalefactors": factors}
    }
    adata.obs[["pxl_col_in_fullres", "pxl_row_in_fullres"]] = adata.obsm["spatial"]
    return through_h5ad(adata, folders, "hest")


def through_h5ad(adata, folders, name, **options):
    adata.write_h5ad(folders["tmp"] / f"{name}.h5ad")
    return ad.read_h5ad(folders["tmp"] / f"{name}.h5ad", **options)


def backed(folders):
    return through_h5ad(read_visium(folders), folders, "backed", backed="r")


def view(folders):
    adata = unique(sc.read_visium(visium_folder(folders)))
    return adata[adata.obs.sort_values(["array_row", "array_col"]).index[:70]]


def lazy_counts(folders):
    adata = read_visium(folders)
    adata.X = da.from_array(adata.X.toarray(), chunks=(40, 5000))
    return adata


# Truth: the pitch of spots or bins, µm; "centres", in µm, by obsm["spatial"]; or the µm per unit

NO_MASKS = {"morphology_profile": "an AnnData has no masks.* needs a SpatialData"}
NO_IMAGE = {"encode_patches": "no full-resolution image.*source_image_path", "crops": "source_image_path"}
COARSE = {"crops": "image_key='hires' takes it"}
FINE = {"crops": "image_key='fullres' takes it"}
RAW = r"X is not integer.*data\.raw\.to_adata\(\)"
NOT_RAW = ("train_stflow", "pl.expression", "train_spatia", "embed_spatia", "tiles")
READERS = {  # reader: how it is called, arguments, truth, what is refused and how
    "scanpy.read_visium": (read_visium, {}, 100, NO_MASKS | COARSE),
    "squidpy.read.visium": (squidpy_visium, {}, 100, NO_MASKS | COARSE),
    "squidpy.read.vizgen": (squidpy_vizgen, {}, "centres", NO_MASKS | NO_IMAGE),
    "squidpy.read.nanostring": (squidpy_nanostring, {}, COSMX_MPP, NO_MASKS),
    "spatialdata_io.visium": (io_visium, {}, 100, {}),
    "spatialdata_io.visium, CytAssist": (io_visium_cytassist, {}, 100, {}),
    "spatialdata_io.visium_hd": (io_visium_hd, {"table_key": "square_008um"}, 8, {}),
    "spatialdata_io.xenium": (io_xenium, {}, "centres", {}),
    "spatialdata_io.merscope": (io_merscope, {}, "centres", {}),
    "spatialdata_io.cosmx": (io_cosmx, {}, COSMX_MPP, {}),
    "CELLxGENE": (cellxgene, {}, 100, NO_MASKS | dict.fromkeys(NOT_RAW, RAW) | FINE),
    "CELLxGENE, raw": (cellxgene_raw, {}, 100, NO_MASKS | FINE),
    "HEST": (hest, {}, 100, NO_MASKS | {"crops": "image_key='downscaled_fullres' takes it"}),
    "backed": (backed, {}, 100, NO_MASKS | COARSE),
    "view": (view, {}, 100, NO_MASKS | COARSE),
    "dask": (lazy_counts, {}, 100, NO_MASKS | COARSE),
}
SPOTS = ("encode_patches", "train_stflow", "predict_expression", "pl.expression")
CELLS = ("morphology_profile", "crops", "train_spatia", "embed_spatia", "impute_genes", "tiles")


def mean_colour(patches):
    return patches.float().mean((2, 3))


mean_colour.mpp = 4.0  # what the pictures of Visium have


class Input:
    """What a reader returns, and what each function does to it; a function runs once, after those that it needs."""

    def __init__(self, data, options):
        self.data, self.options, self.done, self.models = data, options, {}, {}
        counts = np.asarray(self.table.to_memory().X.sum(0)).ravel()
        self.genes = [str(name) for name in self.table.var_names[np.argsort(-counts)[:6]]]

    @property
    def table(self):
        return self.data[self.options.get("table_key", "table")] if isinstance(self.data, sd.SpatialData) else self.data

    def run(self, verb):
        """Return the error of a function, or None."""
        if verb not in self.done:
            try:
                self.done[verb] = getattr(self, verb.replace("pl.", "draw_"))()
            except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
                self.done[verb] = error
        return self.done[verb]

    def raw(self):
        """What the error about counts says to pass."""
        return self.data.raw.to_adata() if getattr(self.data, "raw", None) is not None else self.data

    def encode_patches(self):
        sf.pp.encode_patches(self.data, encoder=mean_colour, key_added="X_mean", **self.options)
        assert np.isfinite(self.table.obsm["X_mean"]).all()

    def train_stflow(self):
        if self.run("encode_patches"):
            self.table.obsm["X_mean"] = np.random.default_rng(0).normal(size=(self.table.n_obs, 3)).astype(np.float32)
        options = {"genes": self.genes, "use_rep": "X_mean", "max_epochs": 2, "validation": 0.3}
        config = sf.models.STFlowConfig(width=16, n_heads=2, n_layers=1, regions=2)
        self.models["stflow"] = sf.tl.train_stflow(self.raw(), config=config, **options, **self.options)
        sf.tl.train_stflow(self.data, config=config, **options, **self.options) if self.raw() is not self.data else None

    def predict_expression(self):
        self.run("train_stflow")
        sf.tl.predict_expression(self.data, model=self.models["stflow"], **self.options)
        assert np.isfinite(self.table.obsm["stflow"]).all()

    def draw_expression(self):
        self.run("predict_expression")
        sf.pl.expression(self.data, self.genes[:1], show=False, **self.options)
        plt.close("all")

    def morphology_profile(self):
        sf.pp.morphology_profile(self.data, **self.options)
        assert np.isfinite(self.table.obsm["morphology"]["area_um2"]).mean() > 0.9

    def crops(self):
        for slide in _io.places(self.data, _io.Where(**self.options)):
            found = sf.pp.crops(self.data, library_id=slide.name, crop_pixels=16, **self.options)
            assert found.read([0]).shape[2:] == (16, 16)

    def train_spatia(self):
        config = sf.models.SpatiaConfig(
            width=16, n_heads=2, gene_layers=1, niche_layers=1, tissue_layers=1, batches_per_epoch=2
        )
        options = {"modalities": "genes", "genes": self.genes, "config": config, "max_epochs": 1}
        self.models["spatia"] = sf.tl.train_spatia(self.raw(), **options, **self.options)
        sf.tl.train_spatia(self.data, **options, **self.options) if self.raw() is not self.data else None

    def embed_spatia(self):
        self.run("train_spatia")
        sf.tl.embed_spatia(self.data, model=self.models["spatia"], modalities="genes", **self.options)
        assert np.isfinite(self.table.obsm["X_spatia"]).all()

    def impute_genes(self):
        sf.tl.impute_genes(self.data, genes=self.genes[:2], **self.options)
        assert np.isfinite(self.table.obsm["imputed"]).all()

    def tiles(self):
        assert sf.pp.tiles(self.data, tile_um=50, **self.options).n_obs > 1


@pytest.fixture(scope="module")
def folders(mirror, vendor, tmp_path_factory):
    return {"mirror": mirror, "vendor": vendor, "tmp": tmp_path_factory.mktemp("readers")}


@pytest.fixture(scope="module")
def inputs(folders):
    """What the readers return, read when it is first asked for."""
    read = {}

    def of(name):
        if name not in read:
            build, options, _, _ = READERS[name]
            read[name] = Input(build(folders), options)
        return read[name]

    return of


@pytest.mark.parametrize("reader", READERS)
def test_positions_are_in_microns(inputs, reader):
    truth, found = READERS[reader][2], inputs(reader)
    slides = _io.places(found.data, _io.Where(**found.options))
    assert sum(map(len, slides)) == found.table.n_obs
    for slide in slides:
        if truth == "centres":
            written = found.table.obsm["spatial"][slide.rows]
            off = (slide.xy - np.median(slide.xy, 0)) - (written - np.median(written, 0))
            assert np.median(np.linalg.norm(off, axis=1)) < 0.5
        elif truth == COSMX_MPP:
            assert slide.mpp == pytest.approx(truth, rel=1e-3)
        else:
            assert slide.pitch == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("verb", SPOTS + CELLS)
@pytest.mark.parametrize("reader", READERS)
def test_every_function_takes_what_a_reader_returns(inputs, reader, verb):
    refused, found = READERS[reader][3].get(verb), inputs(reader)
    if verb == "impute_genes" and found.table.n_vars > 1000:
        pytest.skip("genes of a whole transcriptome are not imputed from a hundred spots")
    error = found.run(verb)
    if refused is None:
        assert error is None, f"{type(error).__name__}: {error}"
    else:
        assert error is not None
        assert re.search(refused, str(error))


def test_the_toy_of_merscope_without_outlines_is_told_what_to_read(folders):
    data = io_merscope_without_outlines(folders)
    with pytest.raises(KeyError, match=r"annotates 'slide_region_0_polygons'.*pass the table alone: data\['table'\]"):
        _io.places(data)
    (slide,) = _io.places(data["table"])
    assert slide.mpp == 1


@pytest.mark.parametrize("reader", ["squidpy.read.nanostring", "spatialdata_io.cosmx"])
def test_cosmx_counts_y_from_below_and_its_pictures_from_above(inputs, reader):
    found = inputs(reader)
    encoder = lambda patches: patches[:, :, 3:5, 3:5].float().mean((2, 3))  # noqa: E731
    encoder.mpp = COSMX_MPP
    sf.pp.encode_patches(found.data, encoder=encoder, patch_um=8 * COSMX_MPP, key_added="X_shade")
    np.testing.assert_allclose(found.table.obsm["X_shade"][:, 0], 60 + 3 * found.table.obs["cell_ID"], atol=1)


def test_without_labels_a_cosmx_warns(inputs):
    data = inputs("squidpy.read.nanostring").data.copy()
    for library in data.uns["spatial"].values():
        del library["images"]["segmentation"]
    with pytest.warns(UserWarning, match="may count y from the lower side"):
        sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean")


def test_the_page_of_inputs_names_every_reader():
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in READERS if name.split(",")[0] not in page]
