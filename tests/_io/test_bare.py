"""A picture alone: its scale by what its file states, by ``mpp``, or by its coordinate system; and every refusal."""

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import tifffile
from PIL import Image
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

from _sections import MPP, Wsi, saved, section
from spatiaflow._io import bare_image
from spatiaflow._io._bare import plain_stem


@pytest.mark.parametrize("kind", ["ome.tif", "svs", "imagej.tif", "tif"])
def test_the_scale_that_a_file_states(tmp_path, kind):
    found = bare_image(saved(tmp_path, kind))
    assert found.mpp == pytest.approx(MPP, rel=1e-3)
    assert found.source == tmp_path / f"my section.{kind}" and not found.channels_first


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_file_without_a_scale(tmp_path, kind):
    with pytest.raises(ValueError, match=r"does not state its scale.*give mpp="):
        bare_image(saved(tmp_path, kind))
    assert bare_image(saved(tmp_path, kind), mpp=MPP).mpp == MPP


def test_a_resolution_for_printers_is_no_scale(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(section()).save(path, dpi=(300, 300))
    with pytest.raises(ValueError, match=r"84\.67 µm per pixel, is a printer's"):
        bare_image(path)
    Image.fromarray(section()).save(path, dpi=(12700, 12700))
    assert bare_image(path).mpp == pytest.approx(2)


@pytest.mark.parametrize("mpp", [0.001, 300])
def test_a_scale_that_no_microscope_has(tmp_path, mpp):
    with pytest.raises(ValueError, match="microscopes have 0.05 to 20"):
        bare_image(saved(tmp_path, "png"), mpp=mpp)


def test_a_scale_that_the_file_contradicts(tmp_path):
    with pytest.warns(UserWarning, match="says 2 µm per pixel"):
        assert bare_image(saved(tmp_path, "ome.tif"), mpp=1).mpp == 1


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, section(), photometric="rgb", resolution=(5000, 4000), resolutionunit="CENTIMETER")
    with pytest.raises(ValueError, match="not square"):
        bare_image(path)


@pytest.mark.parametrize(("orientation", "sides"), [(1, "2 by 4"), (6, "4 by 2")])
def test_sides_are_those_of_the_picture_as_it_is_shown(tmp_path, orientation, sides):
    exif = Image.Exif()
    exif[274] = orientation  # 6: to be turned by 90° before it is shown
    Image.fromarray(section()).save(tmp_path / "a.jpg", exif=exif, dpi=(12700, 6350))
    with pytest.raises(ValueError, match=f"not square .{sides} µm"):
        bare_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("shape", "first"), [((30, 40, 3), False), ((3, 30, 40), True), ((4, 30, 3), False), ((30, 40), False)]
)
def test_of_an_array_the_axis_of_three_or_four_holds_the_colours(shape, first):
    found = bare_image(np.zeros(shape, np.uint8), mpp=MPP)
    assert (found.channels_first, found.mpp, found.source.shape) == (first, MPP, shape)


def element(shape=(3, 64, 96), scale_factors=None, **systems):
    pixels = da.zeros(shape, chunks=(3, 32, 32), dtype=np.uint8)
    systems = {name: Scale([scale, scale], axes=("x", "y")) for name, scale in systems.items()}
    return Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations=systems or None, scale_factors=scale_factors
    )


@pytest.mark.parametrize(("finest", "step"), [(0.11, 4), (0.13, 4), (0.25, 2), (0.3, 1), (2.0, 1)])
def test_of_a_multiscale_image_the_coarsest_scale_that_is_fine_enough_is_kept(finest, step):
    """Half a µm a pixel is enough; a coarser image is taken as it is."""
    data = sd.SpatialData({"he": element(scale_factors=[2, 2], pixels=finest / 3.0)})
    data.attrs["microns_per_unit"] = {"pixels": 3.0}
    found = bare_image(data)
    assert found.source.shape == (3, 64 // step, 96 // step)
    assert found.mpp == pytest.approx(finest * step)


def test_the_image_of_several_is_named():
    data = sd.SpatialData({"he": element(um=MPP), "other": element(um=0.5)})
    with pytest.raises(KeyError, match="has 2 images; choose one with image_key=: 'he', 'other'"):
        bare_image(data)
    with pytest.raises(KeyError, match="no image 'mine'; it has 'he', 'other'"):
        bare_image(data, image_key="mine")
    assert bare_image(data, image_key="he").mpp == pytest.approx(MPP)
    with pytest.raises(ValueError, match="the scale of image 'he' is unknown: give mpp="):
        bare_image(sd.SpatialData({"he": element(elsewhere=MPP)}))


def test_a_wsidata_whose_scale_was_set_or_is_missing(tmp_path):
    path = saved(tmp_path, "png")
    for found in (bare_image(Wsi(path, mpp=MPP)), bare_image(Wsi(path), mpp=MPP)):
        assert (found.source, found.mpp) == (path, MPP)
    with pytest.raises(ValueError, match=r"does not state its scale.*give mpp="):
        bare_image(Wsi(path))


def test_a_wsidata_of_another_scene_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="shows 50 x 30 px of .*, and its largest image has 500 x 300. Only the largest"
    ):
        bare_image(Wsi(saved(tmp_path, "svs"), shape=(30, 50)))


def test_a_wsidata_of_an_image_of_a_spatialdata():
    pixels = section().transpose(2, 0, 1)
    he = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    found = bare_image(Wsi("he", mpp=MPP, images={"he": he, "other": element()}))
    assert found.mpp == MPP and found.channels_first
    np.testing.assert_array_equal(found.source, pixels)


@pytest.mark.parametrize(
    ("name", "plain"), [("my section", "my_section"), ("a/b (1)", "a_b_1"), ("HE-1.ome", "HE-1.ome"), ("切片", "slide")]
)
def test_a_name_of_a_picture_fits_into_slots(name, plain):
    assert plain_stem(name) == plain
