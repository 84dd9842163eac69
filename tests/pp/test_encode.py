"""The verb: from objects to slots, and what it refuses."""

import warnings

import anndata as ad
import numpy as np
import pytest
import spatialdata as sd
import tifffile
from PIL import Image
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale, Sequence, Translation

import spatiaflow as sf

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (90, 130, 3), dtype=np.uint8)  # y, x, c: not square, so that x and y cannot be swapped
SPOTS = np.array([[20, 30], [100, 11], [64, 45]])  # x, y


def centre(patches):
    """Encoder that returns the pixel in the middle."""
    h, w = patches.shape[-2:]
    return patches[:, :, h // 2, w // 2].float()


def values_at(spots, pixels=PIXELS):
    return pixels[spots[:, 1], spots[:, 0]]


def library(path, pixels=PIXELS, mpp=0.5):
    tifffile.imwrite(path, pixels, photometric="rgb") if path.suffix == ".tif" else Image.fromarray(pixels).save(path)
    return {"metadata": {"microns_per_pixel": mpp, "source_image_path": str(path)}}


def spots(tmp_path, name="a.png", pixels=PIXELS, mpp=0.5):
    adata = ad.AnnData(np.ones((3, 2), np.float32), obsm={"spatial": SPOTS.astype(float)})
    adata.uns["spatial"] = {"s": library(tmp_path / name, pixels, mpp)}
    return adata


def test_anndata_centre_and_provenance(tmp_path):
    adata = spots(tmp_path)
    assert sf.pp.encode_patches(adata, encoder=centre, patch_um=8) is None
    np.testing.assert_array_equal(adata.obsm["X_centre"], values_at(SPOTS))
    assert adata.obsm["X_centre"].dtype == np.float32
    stored = adata.uns["X_centre"]
    assert (stored["id"], stored["mpp"], stored["patch_um"], stored["n_features"]) == ("centre", 0.5, 8.0, 3)
    assert (stored["sha256"], stored["standardize"]) == ("", False)
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert ad.read_h5ad(tmp_path / "x.h5ad").uns["X_centre"]["id"] == "centre"


def test_texture_writes_its_names(tmp_path):
    adata = spots(tmp_path)
    sf.pp.encode_patches(adata, patch_um=24)
    assert adata.obsm["X_texture"].shape == (3, 118)
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert ad.read_h5ad(tmp_path / "x.h5ad").uns["X_texture"]["params"]["feature_names"][0] == "red_mean"


def test_the_same_tissue_at_two_resolutions_has_the_same_features(tmp_path):
    y, x = np.mgrid[:800, :800] / 4  # µm, at 0.25 µm per pixel
    nuclei = np.exp(-(((x % 14) - 7) ** 2 + ((y % 11) - 5) ** 2) / 14)
    fine = np.stack([200 - 90 * nuclei + 9 * np.sin(x / 9), 150 - 80 * nuclei, 210 - 50 * nuclei], -1).astype(np.uint8)
    coarse = fine.reshape(400, 2, 400, 2, 3).mean((1, 3)).round().astype(np.uint8)
    features = []
    for name, pixels, mpp in (("fine.png", fine, 0.25), ("coarse.tif", coarse, 0.5)):
        adata = spots(tmp_path, name, pixels, mpp)
        adata.obsm["spatial"] = np.array([[80.0, 90.0], [110.0, 120.0], [130.0, 70.0]]) / mpp
        sf.pp.encode_patches(adata, patch_um=64)
        features.append(adata.obsm["X_texture"])
    assert (abs(features[0] - features[1]) < 0.03 + 0.05 * abs(features[0])).mean() > 0.97


def test_every_slide_has_its_own_image_and_scale(tmp_path):
    other = RNG.integers(0, 255, (200, 150, 3), dtype=np.uint8)
    adata = ad.AnnData(np.ones((6, 1), np.float32), obs={"slide": ["s", "t"] * 3})
    there = np.array([[140, 20], [15, 180], [77, 99]])
    adata.obsm["spatial"] = np.empty((6, 2))
    adata.obsm["spatial"][::2], adata.obsm["spatial"][1::2] = SPOTS, there
    adata.uns["spatial"] = {"s": library(tmp_path / "a.png"), "t": library(tmp_path / "b.tif", other, 0.25)}
    sf.pp.encode_patches(adata, encoder=centre, patch_um=4, library_key="slide")
    np.testing.assert_array_equal(adata.obsm["X_centre"][::2], values_at(SPOTS))
    assert (
        abs(adata.obsm["X_centre"][1::2] - values_at(there, other)).mean() > 1
    )  # resampled from 0.25 to 0.5 µm per pixel
    expected = adata.obsm.pop("X_centre")
    sf.pp.encode_patches(adata, encoder=centre, patch_um=4)  # one column holds the names of the slides
    np.testing.assert_array_equal(adata.obsm["X_centre"], expected)
    adata.obs["again"] = adata.obs["slide"]
    with pytest.raises(ValueError, match="library_key=.*'slide', 'again'"):
        sf.pp.encode_patches(adata, encoder=centre)


@pytest.mark.parametrize("multiscale", [False, True])
def test_spatialdata_transformations(multiscale):
    to_global = Sequence([Scale([0.5, 0.5], axes=("x", "y")), Translation([7.0, -3.0], axes=("x", "y"))])
    image = Image2DModel.parse(
        PIXELS.transpose(2, 0, 1), dims=("c", "y", "x"), transformations={"global": to_global},
        scale_factors=[2] if multiscale else None,
    )  # fmt: skip
    shapes = ShapesModel.parse((SPOTS + 0.5) * 0.5 + [7.0, -3.0], geometry=0, radius=1.0, index=["a", "b", "c"])
    table = ad.AnnData(np.ones((3, 2), np.float32))
    table.obs["region"], table.obs["id"] = "cells", ["a", "b", "c"]
    table.obs["region"] = table.obs["region"].astype("category")
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="id")
    sdata = sd.SpatialData(images={"he": image}, shapes={"cells": shapes}, tables={"table": table})
    with pytest.raises(ValueError, match="mpp="):
        sf.pp.encode_patches(sdata, encoder=centre, patch_um=8)
    sdata.attrs["microns_per_unit"] = {"global": 1.0}
    copied = sf.pp.encode_patches(sdata, encoder=centre, patch_um=8, copy=True)
    assert not sdata["table"].obsm
    np.testing.assert_array_equal(copied["table"].obsm["X_centre"], values_at(SPOTS))
    sf.pp.encode_patches(sdata, encoder=centre, patch_um=8, key_added="mine")
    np.testing.assert_array_equal(sdata["table"].obsm["mine"], values_at(SPOTS))


def test_standardize_is_per_slide_and_recorded(tmp_path):
    adata = ad.concat([spots(tmp_path), spots(tmp_path)], keys=["s", "t"], label="slide", index_unique="-")
    dark = (PIXELS * 0.3).astype(np.uint8)
    adata.uns["spatial"] = {"s": library(tmp_path / "a.png"), "t": library(tmp_path / "b.png", dark)}
    sf.pp.encode_patches(adata, encoder=centre, patch_um=8, standardize=True, library_key="slide")
    found = adata.obsm["X_centre"]
    np.testing.assert_allclose(found[:3].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(found[:3], found[3:], atol=0.05)
    assert adata.uns["X_centre"]["standardize"] is True


def test_alpha_is_dropped_and_gray_refused(tmp_path):
    rgba = np.concatenate([PIXELS, np.full((90, 130, 1), 255, np.uint8)], -1)
    a, b = spots(tmp_path), spots(tmp_path, "rgba.png", rgba)
    for adata in (a, b):
        sf.pp.encode_patches(adata, patch_um=24)
    np.testing.assert_array_equal(a.obsm["X_texture"], b.obsm["X_texture"])
    with pytest.raises(ValueError, match=r"needs 3 channels; image .*gray.png' has 1"):
        sf.pp.encode_patches(spots(tmp_path, "gray.png", PIXELS[..., 0]))


@pytest.mark.parametrize(
    ("kind", "white"), [(np.uint16, 255), (np.uint16, 65535), (np.float32, 255), (np.float32, 1), (np.int64, 255)]
)
def test_a_picture_of_any_depth_gives_the_same_features(tmp_path, kind, white):
    adata, other = (
        spots(tmp_path),
        spots(tmp_path, "deep.tif", (PIXELS.astype(np.float64) * (white / 255)).astype(kind)),
    )
    for one in (adata, other):
        sf.pp.encode_patches(one)
    np.testing.assert_allclose(other.obsm["X_texture"], adata.obsm["X_texture"], atol=1e-6)


@pytest.mark.parametrize("scale", [2.0, -1.0, np.nan])
def test_a_picture_of_no_usual_range_is_refused(tmp_path, scale):
    with pytest.raises(ValueError, match="Convert it to uint8"):
        sf.pp.encode_patches(spots(tmp_path, "deep.tif", (PIXELS * scale).astype(np.float32)))


def test_positions_outside_say_why(tmp_path):
    adata = spots(tmp_path)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1]
    with pytest.warns(UserWarning, match=r"1 of 3 positions of slide 's' .33.3%. lie .*130 x 90 px.*swapped all would"):
        sf.pp.encode_patches(adata)
    assert np.isnan(adata.obsm["X_texture"]).all(1).sum() == 1
    adata.obsm["spatial"] = adata.obsm["spatial"] * 2.0
    with pytest.raises(ValueError, match="wrong?"):
        sf.pp.encode_patches(adata)


def test_bad_arguments_are_clear_errors(tmp_path):
    adata = spots(tmp_path)
    with pytest.raises(ValueError, match="patch_um"):
        sf.pp.encode_patches(adata, patch_um=0)
    for wide in ("112", 1e5):
        with pytest.raises(ValueError, match="patch_um"):
            sf.pp.encode_patches(adata, patch_um=wide)
    with pytest.raises(ValueError, match="did you mean 'texture'"):
        sf.pp.encode_patches(adata, encoder="textur")
    with pytest.raises(TypeError, match="must return a tensor or an array, not NoneType"):
        sf.pp.encode_patches(adata, encoder=lambda patches: None)
    with pytest.raises(ValueError, match="NaN or infinite features for 3 patches of 's'"):
        sf.pp.encode_patches(adata, encoder=lambda p: centre(p) * np.nan)
    assert not adata.obsm.keys() - {"spatial"}


def test_enlarged_and_misfit_patches_warn(tmp_path, caplog):
    sf._settings.logger.propagate = True
    try:
        sf.pp.encode_patches(spots(tmp_path, mpp=4.0), patch_um=100)
        assert "4 µm per pixel, and encoder 'texture' reads 1: patches are enlarged" in caplog.text
        centre.pixels = 8
        caplog.clear()
        sf.pp.encode_patches(spots(tmp_path), encoder=centre, patch_um=16)
        assert "patch of 16 µm gives it 2; patch_um=4 would fit" in caplog.text
    finally:
        del centre.pixels
        sf._settings.logger.propagate = False


def test_backed_and_view(tmp_path):
    adata = spots(tmp_path)
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    sf.pp.encode_patches(backed, encoder=centre, patch_um=8)
    np.testing.assert_array_equal(backed.obsm["X_centre"], values_at(SPOTS))
    view = adata[[2, 0]]
    with pytest.warns(ad.ImplicitModificationWarning):
        sf.pp.encode_patches(view, encoder=centre, patch_um=8)
    np.testing.assert_array_equal(view.obsm["X_centre"], values_at(SPOTS[[2, 0]]))
    assert "X_centre" not in adata.obsm


def stained(tmp_path):
    """Spots on tissue, on glass, and half on each."""
    pixels = np.full((90, 130, 3), 235, np.uint8)
    pixels[:, :50] = (150, 115, 165)
    adata = spots(tmp_path, "glass.png", pixels)
    adata.obsm["spatial"] = np.array([[20.0, 40], [100, 40], [49.5, 40]])
    return adata


def test_the_share_of_tissue_is_written(tmp_path):
    adata = stained(tmp_path)
    sf.pp.encode_patches(adata, encoder=centre, patch_um=12, key_added="mine")
    np.testing.assert_allclose(adata.obs["tissue"], [1, 0, 0.5])
    sf.pp.encode_patches(adata, encoder=centre, patch_um=12)  # its own column is written anew
    assert adata.obs["tissue"].dtype == np.float32


def test_a_column_with_the_organ_is_kept(tmp_path, caplog):
    adata = stained(tmp_path)
    adata.obs["tissue"] = ["breast"] * 3  # as in CELLxGENE
    sf._settings.logger.propagate = True
    try:
        sf.pp.encode_patches(adata, encoder=centre, patch_um=12)
    finally:
        sf._settings.logger.propagate = False
    assert adata.obs["tissue"].tolist() == ["breast"] * 3
    assert "obs['tissue'] holds" in caplog.text
    assert sf._io.tissue_share(adata) is None


def test_channels_are_not_judged_as_stain(tmp_path):
    adata = spots(tmp_path, "gray.png", PIXELS[..., 0])
    sf.pp.encode_patches(adata, encoder=lambda p: p.float().flatten(1)[:, :2], patch_um=8)
    assert "tissue" not in adata.obs


@pytest.mark.parametrize("section", ["B4", "C2"])
def test_true_spots_are_tissue_and_the_glass_around_is_not(section, mirror):
    with sf.settings.override(mirror=str(mirror)):
        adata = sf.datasets.her2st(section)
    adata = adata[::4].copy()
    image = adata.uns["spatial"][section]["images"]["hires"]
    corners = (
        np.array([[0.05, 0.05], [0.95, 0.05], [0.95, 0.95], [0.05, 0.95]])[:, None] + np.linspace(0, 0.02, 5)[:, None]
    )
    scale = adata.uns["spatial"][section]["scalefactors"]["tissue_hires_scalef"]
    there = (corners.reshape(-1, 2) * image.shape[1::-1] / scale)[: adata.n_obs]
    adata.obsm["spatial"] = np.vstack([adata.obsm["spatial"][: -len(there)], there])
    sf.pp.encode_patches(adata, encoder=centre, patch_um=155)
    share = adata.obs["tissue"].to_numpy()
    assert (share[: -len(there)] >= 0.05).all()
    assert share[-len(there) :].max() < 0.01


def test_standardize_leaves_glass_out(tmp_path):
    pixels = np.full((90, 130, 3), 235, np.uint8)
    pixels[:, :64] = RNG.integers(60, 160, (90, 64, 3))
    adata = spots(tmp_path, "half.png", pixels)
    adata.obsm["spatial"] = np.array([[20.0, 40], [40, 20], [120, 40]])
    sf.pp.encode_patches(adata, encoder=centre, patch_um=12, standardize=True)
    np.testing.assert_allclose(adata.obsm["X_centre"][:2].mean(0), 0, atol=1e-6)
    assert list(adata.uns["X_centre"]["params"]["standardized_on"]) == [2]


def test_a_dark_picture_is_a_warning():
    sdata = sf.datasets.simulated_tissue(50, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sf.pp.encode_patches(sdata, image_key="he", patch_um=64, encoder=centre)
    pixels = np.asarray(sdata["fluorescence"].data)[:3]
    pixels = np.clip(pixels / pixels.max() * 255, 0, 255).astype(np.uint8)
    sdata["composite"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations=sdata["he"].attrs["transform"]
    )
    with pytest.warns(UserWarning, match="image 'composite' is dark around most spots: is it fluorescence"):
        sf.pp.encode_patches(sdata, image_key="composite", patch_um=64, encoder=centre)


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [80.0, 0.0, 5.0], [-1.0, 0.0, 1.0]])
def test_numbers_that_are_no_shares_of_tissue_are_left_alone(tmp_path, values):
    adata = spots(tmp_path)
    adata.obs["tissue"] = values
    assert sf._io.tissue_share(adata) is None
    sf.pp.encode_patches(adata, encoder=centre, patch_um=8)
    assert adata.obs["tissue"].tolist() == values
