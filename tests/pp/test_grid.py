"""A grid over a bare picture: every form of it, tissue, annotations, refusals, and the whole way to a map."""

import io
import json
import struct
import warnings

import anndata as ad
import numpy as np
import pytest
import spatialdata as sd
import tifffile
from PIL import Image
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

import spatiaflow as sf
from _sections import MPP, Wsi, saved, section
from spatiaflow._io import open_image


def test_squares_of_tissue_are_where_it_is(tmp_path):
    grid = sf.pp.grid(saved(tmp_path, "png"), mpp=MPP, step_um=40)
    x, y = grid.obsm["spatial"].T + 0.5
    assert ((x > 100) & (x < 300) & (y > 40) & (y < 240)).all()
    assert len(grid) == 100  # ten squares of 20 px a side
    assert (grid.obs["tissue"] > 0.95).all()
    assert list(grid.uns["spatial"]) == ["my_section"]
    assert grid.uns["spatial"]["my_section"]["metadata"]["microns_per_pixel"] == MPP
    assert grid.uns["grid"]["step_um"] == 40
    assert grid.obs_names[0] == "my_section_5_2"


@pytest.mark.parametrize("form", ["array", "sixteen bits", "turned", "SpatialData", "pyramid", "alpha"])
def test_every_form_of_a_picture_gives_the_same_squares(tmp_path, form):
    pixels = section()
    right = sf.pp.grid(saved(tmp_path, "png"), mpp=MPP, step_um=40)
    image, mpp = pixels, MPP
    if form == "sixteen bits":
        image = saved(tmp_path, "tif", section(bits=16))
    elif form == "turned":
        image, exif = tmp_path / "b.jpg", Image.Exif()
        exif[274] = 6  # to be turned clockwise by 90° before it is shown
        Image.fromarray(np.rot90(pixels)).save(image, exif=exif, quality=98)
    elif form == "SpatialData":
        element = Image2DModel.parse(pixels.transpose(2, 0, 1), dims=("c", "y", "x"), c_coords=["r", "g", "b"],
                                     transformations={"um": Scale([MPP, MPP], axes=("x", "y"))})  # fmt: skip
        image, mpp = sd.SpatialData({"he": element}), None
    elif form == "pyramid":
        image = tmp_path / "c.tif"
        with tifffile.TiffWriter(image) as out:
            out.write(pixels, photometric="rgb", tile=(64, 64), subifds=1)
            half = pixels.reshape(150, 2, 250, 2, 3).mean((1, 3)).astype(np.uint8)
            out.write(half, photometric="rgb", tile=(64, 64), subfiletype=1)
    elif form == "alpha":
        image = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    found = sf.pp.grid(image, mpp=mpp, step_um=40)
    np.testing.assert_allclose(found.obsm["spatial"], right.obsm["spatial"])
    np.testing.assert_allclose(found.obs["tissue"], right.obs["tissue"], atol=0.05)
    sf.pp.encode_patches(found, patch_um=40)
    assert np.isfinite(found.obsm["X_texture"]).all()


def write_ndpi(path, pages, mcu_starts):
    """A file in the form of NDPI: pages of (pixels, µm per pixel, magnification), each one JPEG; offsets of 8 bytes."""
    data, places = bytearray(b"II*\0" + bytes(8)), [4]
    for pixels, um, magnification in pages:
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=95, subsampling=0, restart_marker_rows=1)
        jpeg, at = file.getvalue(), len(data)
        scan = jpeg.index(b"\xff\xda")
        starts = [scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")]
        starts += [i + 2 for i in range(starts[0], len(jpeg) - 1) if jpeg[i] == 0xFF and 0xD0 <= jpeg[i + 1] <= 0xD7]
        bits = at + len(jpeg)
        data += jpeg + struct.pack("<3H2I", 8, 8, 8, round(1e7 / um), 1000) + b"Hamamatsu\0"
        data += struct.pack(f"<{len(starts)}I", *starts)
        height, width = pixels.shape[:2]
        scale = int.from_bytes(struct.pack("<f", magnification), "little")
        tags = [
            (256, 4, 1, width),
            (257, 4, 1, height),
            (258, 3, 3, bits),
            (259, 3, 1, 7),
            (262, 3, 1, 6),
            (271, 2, 10, bits + 14),
        ]
        tags += [(273, 4, 1, at), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(jpeg)), (282, 5, 1, bits + 6)]
        tags += [(283, 5, 1, bits + 6), (296, 3, 1, 3), (65420, 4, 1, 1), (65421, 11, 1, scale)]
        tags += [(code, 9, 1, 0) for code in (65422, 65423, 65424)]
        tags += [(65426, 4, len(starts), bits + 24)] if mcu_starts else []
        data[places[-1] : places[-1] + 8] = struct.pack("<Q", len(data))
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<2H2I", *tag) for tag in tags)
        places.append(len(data))
        data += bytes(8 + 4 * len(tags))  # of the next page; upper halves of the values
    path.write_bytes(data)


@pytest.mark.parametrize("mcu_starts", [True, False])
def test_a_file_in_the_form_of_ndpi(tmp_path, mcu_starts):
    """No scanner's file is small enough; openslide takes this one for Hamamatsu's."""
    import openslide

    path, pixels = tmp_path / "a.ndpi", np.kron(section(304, 512), np.ones((4, 4, 1), np.uint8))
    pages = [(np.ascontiguousarray(pixels[::k, ::k]), k * MPP / 4, 20 / k) for k in (1, 2, 4)]
    write_ndpi(path, [*pages, (section(150, 400, 90), 20.0, -1.0)], mcu_starts)  # the last is the macro image
    slide = openslide.OpenSlide(path)
    assert openslide.OpenSlide.detect_format(path) == "hamamatsu" and "macro" in slide.associated_images
    for (expected, um, _), level in zip(pages, range(3)):
        image, _, factor = open_image(path, False, um / MPP * 4)
        whole = np.asarray(image[tuple(slice(0, n) for n in image.shape)])
        assert factor == um / MPP * 4 == slide.level_downsamples[level]
        region = np.asarray(slide.read_region((0, 0), level, whole.shape[1::-1]))[..., :3]
        assert np.abs(whole.astype(int) - region).max() <= 2  # decoders of JPEG round in their own ways
        assert np.abs(whole.astype(int) - expected).mean() < 2  # JPEG
    grid = sf.pp.grid(path, step_um=40)
    assert len(grid) == 100 and grid.uns["grid"]["params"]["mpp"] == pytest.approx(MPP / 4) == float(
        slide.properties["openslide.mpp-x"]
    )
    sf.pp.encode_patches(grid, patch_um=40)
    assert np.isfinite(grid.obsm["X_texture"]).all()


def test_a_file_that_openslide_reads(tmp_path):
    import openslide

    path = tmp_path / "a.svslide"  # openslide looks at the content: a plain tiled TIFF
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, section(), photometric="rgb", tile=(64, 64), **resolution)
    assert openslide.OpenSlide.detect_format(path) == "generic-tiff"
    grid, right = sf.pp.grid(path, step_um=40, mpp=MPP), sf.pp.grid(section(), step_um=40, mpp=MPP)
    np.testing.assert_array_equal(grid.obs["tissue"], right.obs["tissue"])
    for one in (grid, right):
        sf.pp.encode_patches(one, patch_um=40)
    np.testing.assert_array_equal(grid.obsm["X_texture"], right.obsm["X_texture"])


def test_a_wsidata_of_a_file(tmp_path):
    path = saved(tmp_path, "svs")
    right, found = (sf.pp.grid(image, step_um=40) for image in (path, Wsi(path, mpp=MPP)))
    np.testing.assert_array_equal(found.obsm["spatial"], right.obsm["spatial"])
    np.testing.assert_array_equal(found.obs["tissue"], right.obs["tissue"])
    assert found.uns["spatial"]["my_section"]["metadata"]["source_image_path"] == str(path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        sf.pp.grid(tmp_path / "none.png", mpp=1)
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(OSError, match="format that is not known"):
        sf.pp.grid(tmp_path / "a.jpg", mpp=1)
    whole = saved(tmp_path, "ome.tif").read_bytes()
    (tmp_path / "b.ome.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"cut off|damaged"):
        sf.pp.grid(tmp_path / "b.ome.tif", mpp=1)
    with pytest.raises(TypeError, match="must be a path, an array"):
        sf.pp.grid(42, mpp=1)
    with pytest.raises(ValueError, match="1 channel; H&E has red, green and blue"):
        sf.pp.grid(section()[..., 0], mpp=1)
    with pytest.raises(ValueError, match="the scale of an array is unknown"):
        sf.pp.grid(section())


def test_a_file_without_any_image_is_refused(tmp_path):
    path = tmp_path / "a.ndpi"  # its offsets are wider than those of a TIFF
    tifffile.imwrite(path, section(), photometric="rgb")
    with pytest.raises(OSError, match="has no image: it is damaged, or is not what its name says"):
        sf.pp.grid(path, mpp=MPP)


def test_glass_alone_is_refused():
    with pytest.raises(ValueError, match="empty glass"):
        sf.pp.grid(section()[:, 310:], mpp=MPP, step_um=40)


def test_a_dark_picture_is_a_warning():
    with pytest.warns(UserWarning, match="fluorescence"):
        sf.pp.grid(255 - section(), mpp=MPP, step_um=40)


def test_a_fluorescence_image_is_a_warning():
    image = np.random.default_rng(0).normal(6, 2, (300, 500, 3)).clip(0, 255)
    image[40:240:7, 100:300, 2] = 230  # nuclei in blue
    with pytest.warns(UserWarning, match="is it fluorescence"):
        sf.pp.grid(image.astype(np.uint8), mpp=MPP, step_um=40)


def test_black_padding_around_a_section_is_no_fluorescence():
    image = np.zeros((600, 1200, 3), np.uint8)
    image[100:400, 100:600] = section()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(sf.pp.grid(image, mpp=MPP, step_um=40)) == 100


@pytest.mark.parametrize("colour", [(120, 120, 120), (180, 120, 40)])
def test_a_photograph_of_something_else_is_a_warning(colour):
    image = np.full((300, 500, 3), 235, np.uint8)
    image[40:240, 100:300] = [190, 110, 170]
    image[40:240, 180:450] = colour
    with pytest.warns(UserWarning, match=r"does not look like H&E: \d+%"):
        grid = sf.pp.grid(image, mpp=MPP, step_um=40)
    assert len(grid)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "svs"])
def test_a_truncated_file_is_an_error(tmp_path, kind):
    path = saved(tmp_path, kind, np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"cut off|damaged"):
        sf.pp.grid(path, mpp=1)


@pytest.mark.parametrize("glass", [170, 215, 250])
def test_glass_may_be_grey_beside_white_padding(glass):
    """A scan whose glass is darker than the padding around it."""
    image = section(glass=glass)
    image[:20] = 255
    image[:, 400:] = 255
    grid = sf.pp.grid(image, mpp=MPP, step_um=40)
    x, y = grid.obsm["spatial"].T + 0.5
    assert len(grid) == 100
    assert ((x > 100) & (x < 300) & (y > 40) & (y < 240)).all()


def test_several_pictures(tmp_path):
    path = saved(tmp_path, "ome.tif")
    found = sf.pp.grid({"a": path, "b": path}, step_um=40)
    assert list(found) == ["a", "b"]
    assert len(sf.pp.grid([path], step_um=40)[0]) == 100


@pytest.mark.parametrize("bare", [True, False])
def test_annotations_of_qupath(tmp_path, bare):
    def polygon(x0, x1, **properties):
        ring = [[x0, 0], [x1, 0], [x1, 300], [x0, 300], [x0, 0]]
        return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}

    features = [
        polygon(0, 280, objectType="annotation", classification={"name": "Stroma", "color": [1, 2, 3]}),
        polygon(100, 200, objectType="annotation", classification={"name": "Tumour"}),
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {}},
    ]
    path = tmp_path / "regions.geojson"
    path.write_text(json.dumps(features if bare else {"type": "FeatureCollection", "features": features}))
    grid = sf.pp.grid(section(), mpp=MPP, step_um=40, region=path)
    x = grid.obsm["spatial"][:, 0] + 0.5
    named = grid.obs["annotation"].astype(object).where(grid.obs["annotation"].notna(), "none")
    assert (named == np.where(x < 200, "Tumour", np.where(x < 280, "Stroma", "none"))).all()


def test_annotations_that_cannot_be_meant(tmp_path):
    path = tmp_path / "regions.geojson"
    far = [[9000, 9000], [9100, 9000], [9100, 9100], [9000, 9000]]
    path.write_text(
        json.dumps({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [far]}, "properties": {}})
    )
    with pytest.raises(ValueError, match=r"pixels of this very image"):
        sf.pp.grid(section(), mpp=MPP, step_um=40, region=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no polygons"):
        sf.pp.grid(section(), mpp=MPP, step_um=40, region=path)
    path.write_text("<xml>")
    with pytest.raises(ValueError, match="no GeoJSON"):
        sf.pp.grid(section(), mpp=MPP, step_um=40, region=path)


def test_from_a_picture_to_a_map(tmp_path, slide):
    """Grid, features as the model needs them, prediction, regions, and files for viewers."""
    train = [slide("s0"), slide("s1", seed=1)]
    for i, one in enumerate(train):
        path = tmp_path / f"train{i}.png"
        pixels = np.random.default_rng(i).normal([190, 110, 170], 30, (1300, 1300, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        one.obsm["spatial"] = one.obsm["spatial"] * 0.5 / MPP + 60
        one.uns["spatial"] = {
            one.obs_names[0][:2]: {"metadata": {"microns_per_pixel": MPP, "source_image_path": str(path)}}
        }
        sf.pp.encode_patches(one, patch_um=80, resolution_um=4.0)
    model = sf.tl.train_stflow(train, genes=["G0", "G1"], max_epochs=1)
    grid = sf.pp.grid(saved(tmp_path, "ome.tif"), step_um=40)
    sf.pp.encode_patches(grid)
    with pytest.raises(ValueError, match=r"encode_patches\(data, encoder='texture', patch_um=80, resolution_um=4"):
        sf.tl.predict_expression(grid, model=model)
    sf.pp.encode_patches(grid, model=model)
    assert grid.uns["X_texture"]["resolution_um"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 40 µm apart, and noise for pictures
        sf.tl.predict_expression(grid, model=model)
    grid.obs["annotation"] = np.where(grid.obsm["spatial"][:, 0] < 200, "left", "right")
    grid.write_h5ad(tmp_path / "grid.h5ad")
    again = ad.read_h5ad(tmp_path / "grid.h5ad")
    np.testing.assert_array_equal(again.obsm["stflow"], grid.obsm["stflow"])
    assert len(sf.tl.summarize_expression(again, model=model, groupby="annotation", n_samples=20)) == 4
