import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf
from spatiaflow import _io


@pytest.fixture(scope="module")
def sections(mirror, tmp_path_factory):
    names = ("lungorganoid/V19D02-088_A1", "lung_SARS-CoV-2/V10F24-110_C1")
    with sf.settings.override(mirror=str(mirror), cache_dir=tmp_path_factory.mktemp("cache"), progress=False):
        return [sf.datasets.visium_ffpe(name) for name in names]


def test_slots_are_those_of_scanpy_and_the_scale_follows_from_the_array(sections):
    for adata, slide, shape in zip(sections, ("V19D02-088_A1", "V10F24-110_C1"), ((416, 33538), (756, 33550))):
        assert adata.shape == shape
        assert (adata.obs["in_tissue"] == 1).all()
        library = adata.uns["spatial"][slide]
        (found,) = _io.places(adata)
        assert found.name == slide
        assert found.pitch == pytest.approx(100, rel=0.01)
        assert found.mpp / library["scalefactors"]["tissue_hires_scalef"] == pytest.approx(4.15, rel=0.02)
        image = library["images"]["hires"]
        x, y = (adata.obsm["spatial"] * library["scalefactors"]["tissue_hires_scalef"]).astype(int).T
        assert np.median(image[y, x].mean(1)) < np.median(image.mean(2)) - 5


def test_names_of_genes_and_spots_join(sections):
    assert all(adata.var_names.is_unique and {"ACTB", "SFTPB"} <= set(adata.var_names) for adata in sections)
    assert sections[1].var["gene_ids"].str.startswith("ENSG").mean() > 0.99
    both = ad.concat(sections, uns_merge="unique")
    assert both.obs_names.is_unique
    assert [slide.name for slide in _io.places(both)] == ["V19D02-088_A1", "V10F24-110_C1"]


def test_unknown_section_is_listed():
    with pytest.raises(ValueError, match="no section 'heart'.*'mousebrain/V10F24-078_B1'"):
        sf.datasets.visium_ffpe("heart")
