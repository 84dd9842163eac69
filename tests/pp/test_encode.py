import anndata as ad
import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import torch
import zarr
from PIL import Image
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale, Sequence, Translation

import spatiaflow as sf
from spatiaflow.models.encoders import load_encoder
from spatiaflow.pp._patches import cut, open_image

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (90, 130, 3), dtype=np.uint8)  # y, x, c: not square, so that x and y cannot be swapped


def corner(patches):
    """Encoder that returns the centre pixel."""
    h, w = patches.shape[-2:]
    return patches[:, :, h // 2, w // 2].float()


def sources(tmp_path):
    store = zarr.create_array(str(tmp_path / "a.zarr"), shape=PIXELS.shape, dtype="u1", chunks=(16, 16, 3))
    store[:] = PIXELS
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", PIXELS, tile=(16, 16), photometric="rgb")
    return {
        "array": PIXELS, "dask": da.from_array(PIXELS, chunks=(16, 16, 3)), "zarr": store,
        "png": tmp_path / "a.png", "tif": tmp_path / "a.tif",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["array", "dask", "zarr", "png", "tif"])
def test_patches_are_the_pixels(tmp_path, kind):
    image, first = open_image(sources(tmp_path)[kind], False)
    xy = np.array([[20.0, 30.0], [100.0, 11.0], [64.0, 45.0], [5.0, 80.0]])
    found = np.zeros((4, 3, 10, 10), np.uint8)
    for rows, patches in cut(image, xy, 10, 10, channels_first=first, batch_size=2):
        found[rows] = patches.numpy()
    padded = np.pad(PIXELS, ((10, 10), (10, 10), (0, 0)), mode="edge")
    for patch, (x, y) in zip(found, xy.astype(int)):
        expected = padded[y + 5 : y + 15, x + 5 : x + 15].transpose(2, 0, 1)
        np.testing.assert_array_equal(patch, expected)


def test_each_part_of_the_image_is_read_once(monkeypatch):
    from spatiaflow.pp import _patches

    monkeypatch.setattr(_patches, "TILE", 32)
    reads = []

    class Counting:
        shape, ndim = PIXELS.shape, 3

        def __getitem__(self, key):
            reads.append(key)
            return PIXELS[key]

    xy = RNG.uniform([5, 5], [125, 85], (500, 2))
    rows = np.concatenate([r for r, _ in cut(Counting(), xy, 6, 6, channels_first=False, batch_size=16)])
    assert sorted(rows) == list(range(500))
    assert len(reads) <= 5 * 3
    assert max((k[0].stop - k[0].start) * (k[1].stop - k[1].start) for k in reads) <= 40 * 40


def spots(tmp_path, mpp=0.5):
    adata = ad.AnnData(np.ones((3, 2), np.float32))
    adata.obsm["spatial"] = np.array([[20.0, 30.0], [100.0, 11.0], [64.0, 45.0]])
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    adata.uns["spatial"] = {"s": {"metadata": {"microns_per_pixel": mpp, "source_image_path": str(path)}}}
    return adata


def test_anndata_centre_and_provenance(tmp_path):
    adata = spots(tmp_path)
    assert sf.pp.encode_patches(adata, encoder=corner, patch_um=8) is None
    np.testing.assert_array_equal(adata.obsm["X_corner"], PIXELS[[30, 11, 45], [20, 100, 64]])
    assert adata.obsm["X_corner"].dtype == np.float32
    stored = adata.uns["X_corner"]
    assert (stored["id"], stored["mpp"], stored["patch_um"], stored["n_features"]) == ("corner", 0.5, 8.0, 3)
    adata.write_h5ad(tmp_path / "x.h5ad")
    assert ad.read_h5ad(tmp_path / "x.h5ad").uns["X_corner"]["id"] == "corner"


@pytest.mark.parametrize("multiscale", [False, True])
def test_spatialdata_transformations(multiscale):
    xy = np.array([[20.0, 30.0], [100.0, 11.0], [64.0, 45.0]]) + 0.5
    to_global = Sequence([Scale([0.5, 0.5], axes=("x", "y")), Translation([7.0, -3.0], axes=("x", "y"))])
    image = Image2DModel.parse(
        PIXELS.transpose(2, 0, 1), dims=("c", "y", "x"), transformations={"global": to_global},
        scale_factors=[2] if multiscale else None,
    )  # fmt: skip
    shapes = ShapesModel.parse(xy * 0.5 + [7.0, -3.0], geometry=0, radius=1.0, index=["a", "b", "c"])
    table = ad.AnnData(np.ones((3, 2), np.float32))
    table.obs["region"], table.obs["id"] = "cells", ["a", "b", "c"]
    table.obs["region"] = table.obs["region"].astype("category")
    table = TableModel.parse(table, region="cells", region_key="region", instance_key="id")
    sdata = sd.SpatialData(images={"he": image}, shapes={"cells": shapes}, tables={"table": table})
    with pytest.raises(ValueError, match="mpp="):
        sf.pp.encode_patches(sdata, encoder=corner, patch_um=8)
    sdata.attrs["microns_per_unit"] = {"global": 1.0}
    sf.pp.encode_patches(sdata, encoder=corner, patch_um=8)
    np.testing.assert_array_equal(sdata["table"].obsm["X_corner"], PIXELS[[30, 11, 45], [20, 100, 64]])
    sdata["other"] = Image2DModel.parse(PIXELS.transpose(2, 0, 1), dims=("c", "y", "x"))
    with pytest.raises(KeyError, match="'he', 'other'.*image_key="):
        sf.pp.encode_patches(sdata, encoder=corner)


def tissue_patch(pixels):
    """The same physical tissue at any resolution."""
    t = torch.linspace(0, 12, pixels)
    wave = (torch.sin(t)[:, None] + torch.cos(1.3 * t)[None]) * 50
    return torch.stack([180 + wave, 120 + wave, 170 + 0.5 * wave])[None].clamp(0, 255).to(torch.uint8)


def test_texture_sees_tissue_not_pixels():
    texture = load_encoder("texture")
    fine = cut(tissue_patch(448)[0].numpy(), np.array([[224.0, 224.0]]), 448, 112, channels_first=True, batch_size=1)
    coarse = cut(tissue_patch(224)[0].numpy(), np.array([[112.0, 112.0]]), 224, 112, channels_first=True, batch_size=1)
    a, b = (texture(next(p)[1]) for p in (fine, coarse))
    assert ((a - b).abs() <= 0.05 + 0.08 * a.abs()).float().mean() > 0.95


def test_texture_has_no_direction_and_no_batch():
    texture, patches = load_encoder("texture"), torch.from_numpy(RNG.integers(0, 255, (5, 3, 64, 64), dtype=np.uint8))
    expected = texture(patches)
    assert expected.isfinite().all()
    for turned in (patches.rot90(1, (-2, -1)), patches.flip(-1)):
        torch.testing.assert_close(texture(turned), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(torch.cat([texture(p[None]) for p in patches]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ViTMAE"])
def test_transformers_models_from_a_folder(tmp_path, kind):
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=8)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "tiny")
    encoder = load_encoder(str(tmp_path / "tiny"))
    patches = torch.from_numpy(RNG.integers(0, 255, (4, 3, 48, 48), dtype=np.uint8))
    out = encoder(patches)
    assert out.shape == (4, 16)
    torch.testing.assert_close(encoder(patches), out)  # nothing is masked at random
    torch.testing.assert_close(encoder(patches[2:3]), out[2:3], atol=1e-5, rtol=1e-5)
    assert len(encoder.sha256) == 64
    assert encoder.name == "tiny"


def test_missing_encoders_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install \"spatiaflow\[encoders\]\""):
        load_encoder("uni2-h")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="folder"):
        load_encoder("nobody/nothing-here")


def test_bad_input_is_a_clear_error(tmp_path):
    adata = spots(tmp_path)
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1] * 1.2
    with pytest.raises(ValueError, match="outside of image"):
        sf.pp.encode_patches(adata)
    adata = spots(tmp_path)
    with pytest.raises(ValueError, match="patch_um"):
        sf.pp.encode_patches(adata, patch_um=0)
    adata.uns["spatial"]["s"]["metadata"]["source_image_path"] = str(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="source_image_path"):
        sf.pp.encode_patches(adata)
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "gray.tif")
    import tifffile

    tifffile.imwrite(tmp_path / "deep.tif", PIXELS.astype(np.uint16))
    adata.uns["spatial"]["s"]["metadata"]["source_image_path"] = str(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="uint16"):
        sf.pp.encode_patches(adata, encoder=corner)


def test_standardize_is_per_slide_and_recorded(tmp_path):
    adata = spots(tmp_path)
    sf.pp.encode_patches(adata, encoder=corner, patch_um=8, standardize=True)
    np.testing.assert_allclose(adata.obsm["X_corner"].mean(0), 0, atol=1e-6)
    assert adata.uns["X_corner"]["standardize"] is True
