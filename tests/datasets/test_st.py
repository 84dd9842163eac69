import anndata as ad
import numpy as np
import pytest
from PIL import Image

import spatiaflow as sf
from spatiaflow import _io


@pytest.fixture(scope="module")
def sections(mirror, tmp_path_factory):
    with sf.settings.override(mirror=str(mirror), cache_dir=tmp_path_factory.mktemp("cache"), progress=False):
        return sf.datasets.her2st("C2"), sf.datasets.mouse_olfactory_bulb("MOB1"), sf.datasets.her2st("A1")


@pytest.mark.parametrize("i", [0, 1])
def test_positions_lie_on_tissue_in_the_image(sections, i):
    """Spots are darker than the glass around the section: x and y are not swapped."""
    adata = sections[i]
    ((library, slot),) = adata.uns["spatial"].items()
    image = slot["images"]["hires"]
    assert max(image.shape) <= 2000
    x, y = (adata.obsm["spatial"] * slot["scalefactors"]["tissue_hires_scalef"]).astype(int).T
    assert np.median(image[y, x].mean(1)) < np.median(image[:20].mean(2)) - 8
    assert adata.obs["library_id"].unique().tolist() == [library]


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.filterwarnings("error::UserWarning")
def test_scale_agrees_with_the_pitch(sections, i):
    (slide,) = _io.places(sections[i])
    assert slide.pitch == pytest.approx((200, 141, 200)[i], rel=0.1)


def test_counts_are_counts_and_survive_h5ad(sections, tmp_path):
    for adata in sections:
        _io.counts(adata)
        adata.write_h5ad(tmp_path / "x.h5ad")
        again = ad.read_h5ad(tmp_path / "x.h5ad")
        assert (again.X != adata.X).nnz == 0
        assert list(again.uns["spatial"]) == list(adata.uns["spatial"])


def test_known_genes_and_sizes(sections):
    her2, mob, a1 = sections
    assert her2.n_obs == 187
    assert a1.shape == (346, 15045)
    assert {"ERBB2", "GATA3"} <= set(her2.var_names)
    assert mob.n_vars == 1000


def test_positions_of_a1_are_of_its_small_picture(sections):
    a1 = sections[2]
    library = a1.uns["spatial"]["A1"]
    assert library["metadata"]["microns_per_pixel"] == pytest.approx(3.19, rel=0.01)
    with Image.open(library["metadata"]["source_image_path"]) as picture:
        pixels = np.asarray(picture)
    x, y = np.round(a1.obsm["spatial"]).astype(int).T
    assert (pixels[y, x].max(1) > 20).all()  # outside of the tissue it is black
    assert (pixels.max(2) > 20).mean() < 0.5


def test_the_regions_of_a1_are_those_of_its_spots(sections):
    """Fat holds few molecules: an annotation laid over the section upside down would not show it."""
    a1 = sections[2]
    total = np.asarray(a1.X.sum(1)).ravel()
    fat = (a1.obs["annotation"] == "adipose tissue").to_numpy()
    assert 0 < fat.sum() < 20
    assert np.median(total[fat]) < 0.5 * np.median(total[~fat])


def test_unknown_section_is_listed():
    with pytest.raises(ValueError, match="'A1', 'B4'.*'C5'"):
        sf.datasets.her2st("Z1")
