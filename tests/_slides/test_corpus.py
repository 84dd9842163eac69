"""Slides of a manifest equal those of objects in memory, and stay on disk."""

import numpy as np
import pytest
import spatialdata as sd

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow._slides import gather

NEED = {"need": ("counts", "crops"), "crop_um": 12.0, "crop_pixels": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two stores of one name in two folders."""
    folder = tmp_path_factory.mktemp("corpus")
    with sf.settings.override(progress=False, verbosity="warning"):
        for i, name in enumerate("ab"):
            sf.datasets.simulated_tissue(60, seed=i).write(folder / name / "slide.zarr")
    (folder / "corpus.csv").write_text(
        "store,tissue,image_key,mpp\na/slide.zarr,gland,fluorescence,\nb/slide.zarr,,fluorescence,1\n"
    )
    return folder


def test_slides_of_a_manifest_are_those_of_its_stores(corpus):
    stored = gather(corpus / "corpus.csv", **NEED)
    objects = [sd.read_zarr(corpus / name / "slide.zarr") for name in "ab"]
    whole = gather(objects, _io.Where(image_key="fluorescence"), **NEED)
    assert [slide.name for slide in stored] == ["slide:nuclei", "slide:nuclei'"]
    assert [slide.tissue for slide in stored] == ["gland", ""]
    rows = np.array([40, 3, 17])
    for one, other in zip(stored, whole):
        assert isinstance(one.counts, _io.StoredCounts) and one.genes == other.genes and one.rows is None
        np.testing.assert_array_equal(one.xy, other.xy)
        np.testing.assert_array_equal(one.counts[rows].toarray(), other.counts[rows].toarray())
        np.testing.assert_array_equal(one.crops.read(rows), other.crops.read(rows))
        wanted = ["unknown", *other.genes[5:2:-1]]
        one, other = one.take(rows).align(wanted), other.take(rows).align(wanted)
        np.testing.assert_array_equal(one.measured, other.measured)
        np.testing.assert_array_equal(one.counts[np.arange(3)].toarray(), other.counts.toarray())


def test_a_store_given_twice_is_a_warning(corpus):
    (corpus / "twice.csv").write_text("store,mpp\na/slide.zarr,1\na/slide.zarr,1\n")
    with pytest.warns(UserWarning, match="'slide:nuclei' and \"slide:nuclei'\" have the same positions"):
        gather(corpus / "twice.csv")


def test_without_counts_none_are_opened(corpus):
    (slide, _) = gather(str(corpus / "corpus.csv"))
    assert slide.counts is None and slide.crops is None and len(slide) == 60


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na.zarr\n", "a column 'store'"),
        ("store,colour\na.zarr,red\n", "has a column 'colour'"),
        ("store\n", "needs one row"),
    ],
)
def test_a_bad_manifest_is_a_clear_error(tmp_path, text, message):
    (tmp_path / "corpus.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        gather(tmp_path / "corpus.csv")
