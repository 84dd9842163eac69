"""Known shapes, known intensities, obvious references; what the grid, the order and the chunks must not change."""

import warnings

import anndata as ad
import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from skimage.feature import graycomatrix, graycoprops
from skimage.measure import regionprops
from sklearn.metrics import roc_auc_score
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Scale

import spatiaflow as sf
from spatiaflow._slides import patches as _patches
from spatiaflow.pp import _morphology

RNG = np.random.default_rng(0)


def ellipse(x, y, a, b, turn=0.0, n=96):
    """Polygon of an ellipse with half axes a and b, µm."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return shapely.Polygon(np.stack([a * np.cos(t), b * np.sin(t)], -1) @ rotation.T + [x, y])


def tissue(
    shapes, image, mpp=0.25, *, names=("bright", "dark"), order=None, labels=None, chunks=64, scale_factors=None
):
    """SpatialData in µm: an image, polygons (a Series or list) or labels, and a table annotating them in any order."""
    scale = {"global": Scale([mpp, mpp], axes=("x", "y"))}
    image = image if isinstance(image, da.Array) else da.from_array(image, chunks=(1, chunks, chunks))
    images = {
        "image": Image2DModel.parse(
            image, dims=("c", "y", "x"), c_coords=names, transformations=scale, scale_factors=scale_factors
        )
    }
    element = "labels" if labels is not None else "cells"
    ids = np.asarray(labels[0]) if labels is not None else np.array([f"c{i}" for i in range(len(shapes))], object)
    elements = {"images": images}
    if labels is not None:
        pixels, to_global = labels[1], labels[2] if len(labels) > 2 else scale
        elements["labels"] = {
            "labels": Labels2DModel.parse(
                da.from_array(pixels, chunks=chunks), dims=("y", "x"), transformations=to_global
            )
        }
    else:
        frame = gpd.GeoDataFrame(geometry=list(shapes), index=ids)
        elements["shapes"] = {"cells": ShapesModel.parse(frame)}
    order = np.arange(len(ids)) if order is None else order
    table = ad.AnnData(np.ones((len(order), 1), np.float32), obs=pd.DataFrame(index=[f"row{i}" for i in order]))
    table.obs["region"], table.obs["id"] = pd.Categorical([element] * len(order)), ids[order]
    table = TableModel.parse(table, region=element, region_key="region", instance_key="id")
    return sd.SpatialData(**elements, tables={"table": table}, attrs={"microns_per_unit": {"global": 1.0}})


def profile(sdata, **options):
    sf.pp.morphology_profile(sdata, **options)
    return sdata["table"].obsm["morphology"]


def noise(height=240, width=320, channels=2):
    return RNG.integers(0, 200, (channels, height, width), dtype=np.uint8)


SHAPES = [ellipse(20, 20, 6, 6), ellipse(40, 25, 8, 4, 0.5), ellipse(60, 40, 9, 3, 2.0), ellipse(25, 45, 5, 5)]


def test_circles_and_ellipses_have_their_size():
    found = profile(tissue(SHAPES, noise()))
    a, b = np.array([6, 8, 9, 5]), np.array([6, 4, 3, 5])
    np.testing.assert_allclose(found["area_um2"], np.pi * a * b, rtol=0.01)
    np.testing.assert_allclose(found["major_axis_um"], 2 * a, rtol=0.02)
    np.testing.assert_allclose(found["minor_axis_um"], 2 * b, rtol=0.02)
    np.testing.assert_allclose(found["eccentricity"][1:3], np.sqrt(1 - (b / a) ** 2)[1:3], atol=0.01)
    assert (found["eccentricity"].iloc[[0, 3]] < 0.1).all()
    np.testing.assert_allclose(found["perimeter_um"], [shape.length for shape in SHAPES], rtol=0.05)
    assert (found["solidity"] > 0.95).all()
    assert (found.dtypes == np.float32).all()


def test_values_equal_a_loop_over_the_whole_image():
    image = noise()
    found = profile(tissue(SHAPES, image), texture_um=0.75)
    y, x = np.mgrid[:240, :320] * 0.25 + 0.125
    for shape, (_, row) in zip(SHAPES, found.iterrows()):
        mask = shapely.contains_xy(shape, x, y)
        (region,) = regionprops(mask.astype(np.uint8))
        expected = [
            region.area / 16,
            *np.array([region.perimeter, region.axis_major_length, region.axis_minor_length]) / 4,
        ]
        expected += [region.eccentricity, region.solidity]
        for channel in image:
            # level 0 of the matrix is what lies outside of the cell
            levels = np.where(mask, channel.astype(int) + 1, 0).astype(np.uint8)
            pairs = graycomatrix(levels, [3], [0, np.pi / 2], levels=256, symmetric=True)[1:, 1:].sum(-1, keepdims=True)
            own = channel[mask]
            expected += [
                own.mean(),
                own.std(),
                *(graycoprops(pairs, name)[0, 0] for name in ("contrast", "correlation")),
            ]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def test_a_quarter_turn_changes_nothing():
    image = noise(240, 240)
    shapes = [ellipse(20.03, 21, 7, 4, 0.4), ellipse(40, 30.02, 9, 3, 1.1)]
    turned = [shapely.transform(shape, lambda xy: np.column_stack([60 - xy[:, 1], xy[:, 0]])) for shape in shapes]
    before = profile(tissue(shapes, image))
    after = profile(tissue(turned, np.rot90(image, -1, (1, 2)).copy()))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


def test_the_same_tissue_at_two_scales_has_the_same_values():
    y, x = np.mgrid[:480, :640] * 0.125
    smooth = [100 + 60 * np.sin(x / 2) * np.cos(y / 3), 90 + 50 * np.cos(x / 2.5 + y / 4)]
    fine = np.stack(smooth).astype(np.float32)
    coarse = fine.reshape(2, 240, 2, 320, 2).mean((2, 4))
    a, b = profile(tissue(SHAPES, fine, 0.125)), profile(tissue(SHAPES, coarse, 0.25))
    assert (abs(a - b) <= 0.03 + 0.05 * abs(a)).all(axis=None)


def label_image(shapes, ids, mpp=0.25, size=(240, 320)):
    out = np.zeros(size, np.int32)
    for shape, i in zip(shapes, ids):
        x0, y0, x1, y1 = (np.array(shape.bounds) / mpp).astype(int) + [0, 0, 1, 1]
        y, x = (np.mgrid[y0:y1, x0:x1] + 0.5) * mpp
        out[y0:y1, x0:x1][shapely.contains_xy(shape, x, y)] = i
    return out


def test_labels_and_polygons_of_the_same_cells_agree():
    image, ids = noise(), [7, 2_000_000, 3, 11]
    polygons = profile(tissue(SHAPES, image))
    labels = profile(tissue(None, image, labels=(ids, label_image(SHAPES, ids))))
    np.testing.assert_array_equal(labels, polygons)


def test_labels_may_have_another_grid():
    image, ids = noise(), [1, 2, 3, 4]
    expected = profile(tissue(SHAPES, image))
    fine = label_image(SHAPES, ids, 0.125, (480, 640)).T.copy()  # x and y swapped, and half the pixel
    swap = {"global": Affine([[0, 0.125, 0], [0.125, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))}
    found = profile(tissue(None, image, labels=(ids, fine, swap)))
    close = abs(found - expected) <= 0.06 + 0.05 * abs(expected)
    assert close.drop(columns="eccentricity").all(axis=None)  # of circles: a root of almost 0
    part = {"global": Scale([0.25, 0.25], axes=("x", "y"))}  # labels end where the image goes on
    cropped = label_image(SHAPES, ids)[:, :200]
    found = profile(tissue(None, image, labels=([1, 2, 4], cropped, part)))
    np.testing.assert_allclose(found.iloc[0], expected.iloc[0], rtol=1e-6)


def test_rows_keep_the_order_of_the_table():
    image, order = noise(), np.array([2, 0, 3, 1])
    expected, ids = profile(tissue(SHAPES, image)), [5, 9, 4, 2]
    for sdata in (
        tissue(SHAPES, image, order=order),
        tissue(None, image, labels=(ids, label_image(SHAPES, ids)), order=order),
    ):
        found = profile(sdata)
        assert list(found.index) == list(sdata["table"].obs_names) == [f"row{i}" for i in order]
        np.testing.assert_array_equal(found, expected.iloc[order])


def test_a_bright_and_a_dark_channel():
    image = np.full((2, 240, 320), 10, np.uint8)
    image[0] = 200
    found = profile(tissue(SHAPES, image))
    assert (found["bright_mean"] == 200).all()
    assert (found["dark_mean"] == 10).all()
    assert (found[["bright_std", "dark_std", "bright_contrast"]] == 0).all(axis=None)
    assert (found["dark_correlation"] == 1).all()  # of what is constant, as scikit-image has it


def test_texture_tells_smooth_from_grain():
    y, x = np.mgrid[:240, :320]
    smooth, grain = 100 + 40 * np.sin(x / 25), RNG.normal(100, 28, x.shape)
    found = profile(tissue(SHAPES, np.stack([smooth, grain]).clip(0, 255).astype(np.uint8), names=["smooth", "grain"]))
    assert (found["smooth_correlation"] > 0.8).all()
    assert (abs(found["grain_correlation"]) < 0.3).all()
    assert (found["grain_contrast"] > 5 * found["smooth_contrast"]).all()


def test_h_and_e_measures_tissue_and_not_glass():
    rgb = np.full((3, 240, 320), 245.0)
    cells = label_image(SHAPES, [1, 2, 3, 4]) > 0
    rgb[:] = 245 * np.exp(-0.35 * np.array([0.09, 0.95, 0.28]))[:, None, None]  # eosin
    rgb[:, cells] = 245 * np.exp(-np.array([0.65, 0.70, 0.29]))[:, None]  # hematoxylin
    rgb[:, :, 270:] = 255
    shapes = [*SHAPES, ellipse(10, 52, 4, 4), ellipse(74, 20, 4, 4)]  # and stroma, and glass
    found = profile(tissue(shapes, rgb.astype(np.uint8), names=["r", "g", "b"]))
    assert list(found.columns[6::4]) == ["hematoxylin_mean", "eosin_mean"]
    np.testing.assert_allclose(found["hematoxylin_mean"][:4], 1 / np.log(10), rtol=0.1)  # decadic optical density
    assert found["hematoxylin_mean"].iloc[4] < 0.05 < found["eosin_mean"].iloc[4]
    np.testing.assert_allclose(found.iloc[5, 6:9], 0, atol=1e-6)


def fluorescent(factor, names):
    """Cells in fluorescence, bright or dim, as three channels."""
    cells = label_image(SHAPES, [1, 2, 3, 4]) > 0
    rgb = RNG.normal(12, 2, (3, 240, 320))
    rgb[0, cells], rgb[1, cells] = 60 * factor, 40
    return tissue(SHAPES, rgb.clip(0, 255).astype(np.uint8), names=names)


@pytest.mark.parametrize("names", [["r", "g", "b"], None])
@pytest.mark.parametrize("factor", [1, 4])
def test_fluorescence_without_names_of_channels_is_a_warning(names, factor):
    with pytest.warns(
        UserWarning, match="image 'image' is dark around most cells: is it fluorescence.*set_channel_names"
    ):
        profile(fluorescent(factor, names))


@pytest.mark.parametrize("density", [0.2, 1.0, 5.0])
def test_named_channels_and_stained_tissue_are_no_reason_to_warn(density):
    cells = label_image(SHAPES, [1, 2, 3, 4]) > 0
    he = np.full((3, 240, 320), 235.0)
    he[:, cells] = 245 * np.exp(-density * np.array([0.65, 0.70, 0.29]))[:, None]
    he[:, :, 300:] = 0  # padding
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        profile(tissue(SHAPES, he.astype(np.uint8), names=["r", "g", "b"]))
        profile(fluorescent(1, ["dapi", "rna", "protein"]))


def test_simulated_states_are_recovered():
    sdata = sf.datasets.simulated_tissue(400, seed=0)
    for key in ("he", "fluorescence"):
        found, obs = profile(sdata, image_key=key), sdata["table"].obs
        has_state = (obs["state"] != "none").to_numpy()
        assert roc_auc_score(obs["state"][has_state] == "B", found["area_um2"][has_state]) > 0.95
        assert np.corrcoef(found["area_um2"], obs["area_um2"])[0, 1] > 0.995
        assert np.corrcoef(found["minor_axis_um"] / found["major_axis_um"], obs["axis_ratio"])[0, 1] > 0.98
        dye = found["hematoxylin_mean" if key == "he" else "dapi_mean"].groupby(obs["cell_type"], observed=True).mean()
        assert dye.idxmax() == "lymphocyte"  # condensed chromatin


def grid_of_cells(n_x=20, n_y=15, step=60.0, mpp=0.25):
    centres = np.stack(np.meshgrid(np.arange(n_x), np.arange(n_y)), -1).reshape(-1, 2) * step * mpp + 9
    return [ellipse(*xy, *RNG.uniform(3, 6, 2), n=16) for xy in centres]


@pytest.mark.parametrize("kind", ["shapes", "labels"])
def test_chunks_and_tiles_change_nothing_and_each_chunk_is_read_once(monkeypatch, kind):
    shapes, image = grid_of_cells(), noise(1000, 1200)
    ids = np.arange(1, len(shapes) + 1)
    labels = (ids, label_image(shapes, ids, size=(1000, 1200))) if kind == "labels" else None
    expected = profile(tissue(shapes, image, labels=labels, chunks=1200))
    reads = []

    def block(block_info=None):
        location = block_info[None]["array-location"]
        reads.append(tuple(map(tuple, location)))
        return image[tuple(slice(*span) for span in location)]

    lazy = da.map_blocks(
        block, chunks=((2,), (250,) * 4, (300,) * 4), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    sdata = tissue(shapes, lazy, labels=labels, chunks=300)
    monkeypatch.setattr(_patches, "TILE", 280)
    reads.clear()
    found = profile(sdata)
    assert len(reads) == len(set(reads)) <= 16
    np.testing.assert_array_equal(found, expected)


def test_no_read_is_larger_than_a_tile_and_its_cells(monkeypatch):
    sizes = []

    class Watched:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, key):
            sizes.append([s.stop - s.start for s in key[1:]])
            return self.array[key]

    image = noise(1000, 1200)
    monkeypatch.setattr(_patches, "TILE", 256)
    monkeypatch.setattr(_morphology._io, "open_image", lambda source, first: (Watched(image), True, 1.0))
    profile(tissue(grid_of_cells(), image))
    assert len(sizes) == 20  # one a tile
    assert np.max(sizes) <= 256 + 2 * 24 + 2


def test_the_finest_level_of_a_multiscale_image_is_read():
    image = noise()
    expected = profile(tissue(SHAPES, image))
    sdata = tissue(SHAPES, image, scale_factors=[2])
    np.testing.assert_array_equal(profile(sdata), expected)
    assert list(sdata["table"].uns["morphology"]["params"]["mpp"]) == [0.25]


def test_cells_outside_and_without_area_are_nan_and_counted():
    line = shapely.Polygon([(10, 10), (12, 10), (14, 10)])
    dust = ellipse(30.25, 30.25, 0.05, 0.05)  # between the centres of pixels
    shapes = [SHAPES[0], ellipse(500, 20, 5, 5), shapely.Polygon(), line, dust, SHAPES[1]]
    with pytest.warns(UserWarning, match="4 of 6 cells .* 1 lie outside of it, 3 have no area"):
        found = profile(tissue(shapes, noise()))
    assert found.isna().all(axis=1).tolist() == [False, True, True, True, True, False]
    assert found.notna().any(axis=1).sum() == 2
    with pytest.raises(ValueError, match="transformations"):
        profile(tissue([ellipse(500, 20, 5, 5), ellipse(600, 20, 5, 5)], noise()))


def test_a_cell_that_the_border_cuts_is_measured_inside():
    found = profile(tissue([ellipse(0, 30, 6, 6), ellipse(80, 60, 6, 6)], noise()))  # on the side, on the corner
    np.testing.assert_allclose(found["area_um2"], [np.pi * 18, np.pi * 9], rtol=0.02)


def test_invalid_polygons_circles_holes_and_parts():
    bow = shapely.Polygon([(10, 10.1), (20, 20.1), (20, 10.1), (10, 20.1)])
    ring = ellipse(40, 30, 8, 8).difference(ellipse(40, 30, 4, 4))
    pair = shapely.MultiPolygon([ellipse(60, 20, 3, 3), ellipse(68, 20, 3, 3)])
    found = profile(tissue([bow, ring, pair], noise()))
    np.testing.assert_allclose(found["area_um2"], [50, 48 * np.pi, 18 * np.pi], rtol=0.03)
    sdata = tissue(SHAPES, noise())
    sdata["cells"] = ShapesModel.parse(
        np.array([[20.0, 20], [40, 25], [60, 40], [25, 45]]), geometry=0, radius=5.0, index=["c0", "c1", "c2", "c3"]
    )
    np.testing.assert_allclose(profile(sdata)["area_um2"], 25 * np.pi, rtol=0.02)


def test_another_element_than_the_annotated_one():
    sdata = tissue(SHAPES, noise())
    nuclei = gpd.GeoDataFrame(geometry=[shape.buffer(-1) for shape in SHAPES], index=["c0", "c1", "c2", "c3"])
    sdata["nuclei"] = ShapesModel.parse(nuclei[::-1])
    found = profile(sdata, shapes_key="nuclei")
    np.testing.assert_allclose(found["area_um2"], nuclei.area, rtol=0.03)
    sdata["nuclei"] = ShapesModel.parse(nuclei[:3])
    with pytest.raises(ValueError, match=r"1 rows .*'nuclei' .*'c3'"):
        profile(sdata, shapes_key="nuclei")
    sdata["nuclei"] = ShapesModel.parse(pd.concat([nuclei, nuclei]))
    with pytest.raises(ValueError, match="not unique"):
        profile(sdata, shapes_key="nuclei")


def test_what_cannot_be_measured_is_refused():
    sdata = tissue(SHAPES, noise())
    with pytest.raises(TypeError, match="no masks"):
        sf.pp.morphology_profile(sdata["table"])
    with pytest.raises(ValueError, match="not both"):
        profile(sdata, shapes_key="cells", labels_key="labels")
    with pytest.raises(KeyError, match="labels"):
        profile(sdata, labels_key="labels")
    with pytest.raises(ValueError, match="texture_um"):
        profile(sdata, texture_um=0)
    del sdata.attrs["microns_per_unit"]
    with pytest.raises(ValueError, match="mpp="):
        profile(sdata)
    assert profile(sdata, mpp=1.0)["area_um2"].iloc[0] == pytest.approx(np.pi * 36, rel=0.02)
    with pytest.raises(ValueError, match="same names"):
        profile(tissue(SHAPES, noise(), names=["a/b", "a_b"]))


def test_copy_provenance_and_round_trip(tmp_path):
    sdata = tissue(SHAPES, noise(), names=["ATP1A1/CD45", "18S"])
    copied = sf.pp.morphology_profile(sdata, key_added="cells_shape", copy=True)
    assert not sdata["table"].obsm
    found = copied["table"].obsm["cells_shape"]
    assert {"ATP1A1_CD45_mean", "18S_std"} <= set(found.columns)
    params = copied["table"].uns["cells_shape"]["params"]
    assert list(params["images"]) == ["image"]
    assert params["texture_um"] == 1.0
    copied.write(tmp_path / "t.zarr")
    again = sd.read_zarr(tmp_path / "t.zarr")["table"]
    pd.testing.assert_frame_equal(again.obsm["cells_shape"], found, check_names=False)
    copied["table"].write_h5ad(tmp_path / "t.h5ad")
    pd.testing.assert_frame_equal(ad.read_h5ad(tmp_path / "t.h5ad").obsm["cells_shape"], found, check_names=False)
    assert list(profile(tissue(SHAPES, noise(), names=[0, 1])).columns[6::4]) == ["channel_0_mean", "channel_1_mean"]


def test_images_alone_tell_the_planted_nuclei():
    sdata = sf.datasets.simulated_tissue(400, seed=3)
    crops = sf.pp.crops(sdata, image_key="fluorescence", crop_um=16.0, crop_pixels=32)
    found = sf.pp.image_profile(crops.read(np.arange(300)).numpy(), channels=list(crops.channels), mpp=0.5)
    pd.testing.assert_frame_equal(sf.pp.image_profile(crops.take(np.arange(300))), found, check_index_type=False)
    truth = sdata["table"].obs.iloc[:300]
    ratio = found["area_um2"] / truth["area_um2"].to_numpy()
    assert abs(ratio.median() - 1) < 0.05 and ratio.between(0.75, 1.33).mean() > 0.85
    planted = np.sqrt(1 - truth["axis_ratio"].to_numpy() ** 2)
    assert np.corrcoef(found["eccentricity"], planted)[0, 1] > 0.6
    measured = (
        sf.pp.morphology_profile(sdata, image_key="fluorescence", copy=True)["table"].obsm["morphology"].iloc[:300]
    )
    assert list(found.columns) == list(measured.columns)
    assert np.corrcoef(found["dapi_mean"], measured["dapi_mean"])[0, 1] > 0.7


def test_image_profile_takes_a_list_and_a_dict():
    images = np.random.default_rng(0).integers(0, 255, (3, 1, 16, 16), np.uint8)
    settings = {"channels": ["dapi"], "mpp": 0.5}
    first, second = (sf.pp.image_profile(images[rows], **settings) for rows in ([0, 1], [2]))
    found = sf.pp.image_profile({"a": images[:2], "b": images[2:]}, **settings)
    assert list(found) == ["a", "b"]
    for one, other in (
        (found["a"], first),
        (found["b"], second),
        (sf.pp.image_profile([images[:2]], **settings)[0], first),
    ):
        pd.testing.assert_frame_equal(one, other)


def test_images_alone_need_their_names_and_scale():
    images = np.zeros((3, 2, 8, 8), np.uint8)
    assert sf.pp.image_profile(images, channels=["dapi", "rna"], mpp=1.0).isna().all(axis=None)
    with pytest.raises(ValueError, match="give channels= and mpp="):
        sf.pp.image_profile(images)
    with pytest.raises(ValueError, match="n x 3 channels"):
        sf.pp.image_profile(images, channels=["a", "b", "c"], mpp=1.0)
    with pytest.raises(ValueError, match="nuclei='x' is no channel"):
        sf.pp.image_profile(images, channels=["a", "b"], mpp=1.0, nuclei="x")


def test_image_profile_of_a_whole_picture():
    """Discs of known number and size on a dark ground."""
    image, (y, x) = np.zeros((1, 2, 60, 60), np.uint8), np.mgrid[:60, :60]
    for cy, cx in ((12, 12), (12, 45), (42, 20), (45, 48)):
        image[0, 0][(y - cy) ** 2 + (x - cx) ** 2 <= 36] = 200
    image[0, 1] = 50
    found = sf.pp.image_profile(image, channels=["dapi", "prot"], mpp=0.5, whole=True).iloc[0]
    disc = (image[0, 0] > 0).sum() / 4
    assert found["nuclei_per_mm2"] == pytest.approx(4 / (30 * 30) * 1e6)
    assert found["mean_area_um2"] == pytest.approx(disc * 0.25)
    assert found["nuclear_share"] == pytest.approx(4 * disc / 3600)
    assert found["prot_mean"] == 50 and found["dapi_mean"] == pytest.approx(200 * 4 * disc / 3600)


def test_an_image_without_a_marker_of_a_nucleus_is_nan():
    """In a small ring the distance to the border, smoothed, is largest in the hole, where there is no nucleus."""
    y, x = np.ogrid[:16, :16]
    radius = np.hypot(y - 7, x - 7)
    ring = 200.0 * ((radius > 1.5) & (radius < 2.6))
    disk = 200.0 * (radius < 4)
    found = sf.pp.image_profile(np.stack([ring, disk])[:, None], channels=["dapi"], mpp=0.5)
    assert found.iloc[0].isna().all() and found.iloc[1].notna().all()
