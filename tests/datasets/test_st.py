import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf
from spatiaflow import _io


@pytest.fixture(scope="module")
def sections(mirror, tmp_path_factory):
    with sf.settings.override(mirror=str(mirror), cache_dir=tmp_path_factory.mktemp("cache"), progress=False):
        return sf.datasets.her2st("C2"), sf.datasets.mouse_olfactory_bulb("MOB1")


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


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.filterwarnings("error::UserWarning")
def test_scale_agrees_with_the_pitch(sections, i):
    (slide,) = _io.places(sections[i])
    assert slide.pitch == pytest.approx((200, 141)[i], rel=0.1)


def test_counts_are_counts_and_survive_h5ad(sections, tmp_path):
    for adata in sections:
        _io.counts(adata)
        adata.write_h5ad(tmp_path / "x.h5ad")
        again = ad.read_h5ad(tmp_path / "x.h5ad")
        assert (again.X != adata.X).nnz == 0
        assert list(again.uns["spatial"]) == list(adata.uns["spatial"])


def test_known_genes_and_sizes(sections):
    her2, mob = sections
    assert her2.n_obs == 187
    assert {"ERBB2", "GATA3"} <= set(her2.var_names)
    assert mob.n_vars == 1000


def test_unknown_section_is_listed():
    with pytest.raises(ValueError, match="'B4'.*'C5'"):
        sf.datasets.her2st("Z1")
