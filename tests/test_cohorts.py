"""Several samples at once: each has its own image, coordinate system and scale, as if it were alone."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData, concatenate
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale, set_transformation

import spatiaflow as sf
from spatiaflow import _io

pytestmark = pytest.mark.filterwarnings("ignore")
SECTIONS = {"a": "lungorganoid/V19D02-088_A1", "b": "kidneyorganoid/V19D02-085_B1"}
CONFIG = {"width": 16, "n_heads": 2, "gene_layers": 1, "niche_layers": 1, "tissue_layers": 1, "image_layers": 1}


def mean_colour(patches):
    return patches.float().mean((2, 3))


mean_colour.mpp = 4.0


@pytest.fixture(scope="module")
def sections(mirror, tmp_path_factory):
    """Two sections of other images and arrays in other places, the 80 spots around the middle and their 200 first genes."""
    out, genes = {}, None
    with sf.settings.override(mirror=str(mirror), cache_dir=tmp_path_factory.mktemp("cache"), progress=False):
        for name, section in SECTIONS.items():
            adata = sf.datasets.visium_ffpe(section)
            genes = adata.var_names[np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:200]] if genes is None else genes
            off = np.linalg.norm(adata.obsm["spatial"] - np.median(adata.obsm["spatial"], 0), axis=1)
            out[name] = adata[np.sort(np.argsort(off)[:80]), genes].copy()
    return out


def as_spatialdata(adata, name):
    """What spatialdata_io.visium makes of the section's folder."""
    (library,) = adata.uns["spatial"].values()
    factor = library["scalefactors"]["tissue_hires_scalef"]
    hires = Scale([factor, factor], axes=("x", "y"))
    spots = ShapesModel.parse(
        adata.obsm["spatial"], geometry=0, radius=library["scalefactors"]["spot_diameter_fullres"] / 2,
        transformations={name: Identity(), f"{name}_downscaled_hires": hires},
    )  # fmt: skip
    picture = Image2DModel.parse(library["images"]["hires"].transpose(2, 0, 1), dims=("c", "y", "x"))
    set_transformation(picture, {f"{name}_downscaled_hires": Identity(), name: hires.inverse()}, set_all=True)
    obs = adata.obs[["in_tissue", "array_row", "array_col"]].assign(spot_id=range(adata.n_obs))
    table = ad.AnnData(adata.X, obs.assign(region=pd.Categorical([name] * len(obs))), adata.var[[]])
    table.obsm["spatial"] = adata.obsm["spatial"]
    table = TableModel.parse(table, region=name, region_key="region", instance_key="spot_id")
    return SpatialData(images={f"{name}_hires_image": picture}, shapes={name: spots}, tables={"table": table})


def joined(sections):
    return ad.concat(sections, uns_merge="unique")


FORMS = {
    "concatenated list": lambda s: concatenate([as_spatialdata(s[n], n) for n in s], concatenate_tables=True),
    "concatenated dict": lambda s: concatenate(
        {n: as_spatialdata(s[n], "V") for n in s}, concatenate_tables=True
    ),
    "one coordinate system": lambda s: concatenate(
        {n: as_spatialdata(s[n], "V") for n in s}, concatenate_tables=True, merge_coordinate_systems_on_name=True
    ),
    "one AnnData, library_key": lambda s: joined(s),
    "one AnnData": lambda s: joined(s),
    "list of AnnData": lambda s: [one.copy() for one in s.values()],
    "dict of AnnData": lambda s: {n: one.copy() for n, one in s.items()},
    "list of SpatialData": lambda s: [as_spatialdata(s[n], n) for n in s],
    "dict of SpatialData": lambda s: {n: as_spatialdata(s[n], n) for n in s},
}  # fmt: skip


def table_of(data):
    return data["table"] if isinstance(data, SpatialData) else data


def parts_of(data, sections):
    """The samples of a cohort, each as an object of its own with the same names, and their rows in the cohort."""
    if isinstance(data, list | dict):
        for one in data.values() if isinstance(data, dict) else data:
            yield one, slice(None), copy_of(one)
    elif isinstance(data, SpatialData):
        for name in sections:
            (region,) = [r for r in data.shapes if r in (name, f"V-{name}")]
            (image,) = [i for i in data.images if i in (f"{name}_hires_image", f"V_hires_image-{name}")]
            rows = np.flatnonzero(data["table"].obs["region"].astype(str) == region)
            table = data["table"][rows].copy()
            del table.uns["spatialdata_attrs"]
            table.obs["region"] = pd.Categorical([region] * len(rows))
            table = TableModel.parse(table, region=region, region_key="region", instance_key="spot_id")
            alone = {"images": {image: data[image]}, "shapes": {region: data[region]}, "tables": {"table": table}}
            yield data, rows, SpatialData(**alone)
    else:
        for library in data.uns["spatial"]:
            rows = np.flatnonzero(data.obs["library_id"] == library)
            alone = data[rows].copy()
            alone.uns["spatial"] = {library: data.uns["spatial"][library]}
            yield data, rows, alone


def copy_of(one):
    return one.copy() if isinstance(one, ad.AnnData) else SpatialData.init_from_elements(
        {name: element.copy() if name == "table" else element for _, name, element in one.gen_elements()}
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(sections):
    """Models of both sections, trained on a list."""
    slides = [one.copy() for one in sections.values()]
    sf.pp.encode_patches(slides, encoder=mean_colour, key_added="X_mean")
    small = sf.models.STFlowConfig(width=16, n_heads=2, n_layers=1, regions=2)
    spatia = sf.models.SpatiaConfig(**CONFIG, crop_um=100.0, crop_pixels=16, patch_pixels=8)
    genes = list(slides[0].var_names[:20])
    return {
        "stflow": sf.tl.train_stflow(slides, use_rep="X_mean", genes=genes[:5], max_epochs=1, config=small),
        "spatia": sf.tl.train_spatia(slides, genes=genes, config=spatia, max_epochs=1),
        "imputer": sf.tl.train_imputation([one[:, :40].copy() for one in slides]),
    }


def encode_patches(data, models, options):
    sf.pp.encode_patches(data, encoder=mean_colour, key_added="X_mean", **options)


def predict_expression(data, models, options):
    encode_patches(data, models, options)
    sf.tl.predict_expression(data, model=models["stflow"], n_samples=2, **options)


def embed_spatia(data, models, options):
    sf.tl.embed_spatia(data, model=models["spatia"], **options)


def morphology_profile(data, models, options):
    sf.pp.morphology_profile(data, **options)


def impute_genes(data, models, options):
    sf.tl.impute_genes(data, model=models["imputer"], genes=models["stflow"].genes, check=False, **options)


VERBS = {
    encode_patches: ["X_mean"],
    predict_expression: ["stflow", "stflow_rate", "stflow_std"],
    embed_spatia: ["X_spatia_cell", "X_spatia_niche", "X_spatia_tissue"],
    morphology_profile: ["morphology"],
    impute_genes: ["imputed", "imputed_std"],
}


# an AnnData has no outlines
CASES = [(verb, form) for verb in VERBS for form in FORMS if verb is not morphology_profile or "AnnData" not in form]


@pytest.mark.parametrize(("verb", "form"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_each_sample_is_as_if_it_were_alone(sections, models, form, verb):
    data = FORMS[form](sections)
    options = {"library_key": "library_id"} if form.endswith("library_key") else {}
    parts = list(parts_of(data, sections))
    verb(data, models, options)
    for (cohort, rows, alone), original in zip(parts, sections.values(), strict=True):
        verb(alone, models, options)
        for slot in VERBS[verb]:
            found = np.asarray(table_of(cohort).obsm[slot])[rows]
            expected = np.asarray(table_of(alone).obsm[slot])
            assert np.isfinite(expected).any()
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
        if verb is encode_patches:  # and alone it has the image of its own
            verb(once := original.copy(), models, {})
            np.testing.assert_allclose(found, once.obsm["X_mean"], atol=0.6)


@pytest.mark.parametrize("form", ["concatenated list", "concatenated dict", "one coordinate system", "one AnnData"])
def test_new_objects_and_figures_take_the_sample_that_is_named(sections, models, form):
    data = FORMS[form](sections)
    slides = _io.places(data)
    tiles = sf.pp.tiles(data, tile_um=200)
    for slide, (_, rows, alone) in zip(slides, parts_of(data, sections), strict=True):
        assert slide.pitch == pytest.approx(100, rel=0.01)
        np.testing.assert_array_equal(slide.rows, rows)
        options = {"crop_um": 100, "crop_pixels": 16}
        found = sf.pp.crops(data, library_id=slide.name, **options).read(np.arange(5))
        np.testing.assert_array_equal(found, sf.pp.crops(alone, **options).read(np.arange(5)))
        own = tiles[tiles.obs["library_id"] == slide.name]
        assert own.X.sum() == table_of(alone).X.sum()
        background = _io.background(data, table_of(data), slide)
        expected = _io.background(alone, table_of(alone), _io.places(alone)[0])
        np.testing.assert_array_equal(background[0], expected[0])
    predict_expression(data, models, {})
    sf.pl.expression(data, models["stflow"].genes[0], library_id=slides[1].name, show=False)
    plt.close("all")
    sf.tl.train_stflow(
        data, use_rep="X_mean", genes=3, max_epochs=1,
        config=sf.models.STFlowConfig(width=16, n_heads=2, n_layers=1, regions=2),
    )  # fmt: skip
