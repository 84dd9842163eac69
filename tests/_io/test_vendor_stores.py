"""Small stores of exactly the shapes that spatialdata-io's readers write (0.7), through Zarr and back."""

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
import torch
from anndata import AnnData
from scipy import sparse
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, set_transformation

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.models.encoders import load_encoder

HEIGHT, WIDTH, HALF = 120, 168, 6
CENTRES = np.array([[20, 30], [100, 14], [66, 46], [150, 104], [40, 90]])  # x, y: where four pixels meet
MARKS = np.array([50, 90, 130, 170, 210], np.uint8)
NAMES = [f"aaaa{letter}-1" for letter in "cbade"]  # in no order
SHUFFLED = [3, 0, 4, 1, 2]  # rows of the table are not in the order of the elements


def marked(channels=3):
    """Noise below 40, in which the cells are squares that carry their mark in the first channel."""
    pixels = np.random.default_rng(0).integers(0, 40, (channels, HEIGHT, WIDTH), dtype=np.uint8)
    for (x, y), mark in zip(CENTRES, MARKS):
        pixels[0, y - HALF : y + HALF, x - HALF : x + HALF] = mark
    return pixels


def label_image():
    labels = np.zeros((HEIGHT, WIDTH), np.uint32)
    for i, (x, y) in enumerate(CENTRES):
        labels[y - HALF : y + HALF, x - HALF : x + HALF] = i + 1
    return labels


def squares(half=HALF):
    return shapely.box(*(CENTRES - half).T, *(CENTRES + half).T)


def moved(geometry, scale, x=0.0, y=0.0):
    return shapely.transform(geometry, lambda xy: (xy - [x, y]) / scale)


def table_of(obs, names, region, region_key, instance_key, spatial):
    obs = pd.DataFrame({key: np.asarray(values)[SHUFFLED] for key, values in obs.items()})
    obs.index = np.array(names, object)[SHUFFLED]
    obs[region_key] = pd.Categorical(obs[region_key])
    adata = AnnData(sparse.csr_matrix(np.ones((5, 3), np.float32)), obs=obs)
    adata.obsm["spatial"] = np.asarray(spatial, float)[SHUFFLED]
    return TableModel.parse(adata, region=region, region_key=region_key, instance_key=instance_key)


def transcripts(scale, columns):
    frame = pd.DataFrame({"x": CENTRES[:, 0] * scale, "y": CENTRES[:, 1] * scale, "z": 1.0, **columns})
    return PointsModel.parse(
        frame, feature_key=next(iter(columns)), transformations={"global": Scale([1 / scale, 1 / scale], ("x", "y"))}
    )


def xenium(*, circles=False, reader="xenium"):
    """Polygons and transcripts in µm, images and labels in pixels; "global" is pixels."""
    pixel, to_global = 0.2125, {"global": Scale([1 / 0.2125, 1 / 0.2125], axes=("x", "y"))}
    chunks = {"scale_factors": [2, 2], "transformations": {"global": Identity()}}
    region = "cell_circles" if circles else "cell_labels"
    microns = moved(squares(), 1 / pixel)
    obs = {
        "cell_id": NAMES,
        "transcript_counts": [3] * 5,
        "cell_area": shapely.area(microns),
        "region": [region] * 5,
        "z_level": [0.0] * 5,
        "nucleus_count": [1.0] * 5,
        "cell_labels": np.arange(1, 6),
    }
    names = pd.Index(NAMES, name="cell_id")
    shapes = {
        "nucleus_boundaries": gpd.GeoDataFrame(
            {"geometry": moved(squares(3), 1 / pixel), "cell_id": NAMES}, index=np.arange(5, 0, -1)
        ),
        "cell_boundaries": gpd.GeoDataFrame({"geometry": microns}, index=names),
    }
    shapes = {name: ShapesModel.parse(shape, transformations=to_global) for name, shape in shapes.items()}
    if circles:
        shapes["cell_circles"] = ShapesModel.parse(
            CENTRES * pixel, geometry=0, radius=np.full(5, 1.4), index=names, transformations=to_global
        )
    stains = ["DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin"]
    return sd.SpatialData(
        images={"morphology_focus": Image2DModel.parse(marked(4), dims=("c", "y", "x"), c_coords=stains, **chunks)},
        labels={
            "nucleus_labels": Labels2DModel.parse(label_image(), dims=("y", "x"), **chunks),
            "cell_labels": Labels2DModel.parse(label_image(), dims=("y", "x"), chunks=(50, 50), **chunks),
        },
        shapes=shapes,
        points={"transcripts": transcripts(pixel, {"feature_name": ["A"] * 5, "cell_id": NAMES})},
        tables={
            "table": table_of(obs, NAMES, region, "region", "cell_id" if circles else "cell_labels", CENTRES * pixel)
        },
        attrs={"spatialdata_io_reader": reader} if reader else {},
    )


def merscope():
    """Polygons and transcripts in µm of the slide, the image in pixels; "global" is pixels."""
    per_micron, x, y = 9.259, 300.0, 200.0
    matrix = np.array([[per_micron, 0, -per_micron * x], [0, per_micron, -per_micron * y], [0, 0, 1]])
    to_global = {"global": Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))}
    ids = [f"{i}100001" for i in (7, 3, 9, 1, 5)]
    multi = [
        shapely.MultiPolygon([polygon]) for polygon in moved(squares(), per_micron, -x * per_micron, -y * per_micron)
    ]
    frame = gpd.GeoDataFrame({"ID": range(5), "EntityID": ids, "ZIndex": 0, "geometry": multi}, index=pd.Index(ids))
    on_slide = CENTRES / per_micron + [x, y]
    points = pd.DataFrame({"x": on_slide[:, 0], "y": on_slide[:, 1], "z": 3.0, "gene": "A"})
    obs = {"fov": [1] * 5, "volume": [9.0] * 5, "center_x": on_slide[:, 0], "center_y": on_slide[:, 1]}
    obs |= {"region": ["region_0"] * 5, "slide": ["s"] * 5, "dataset_id": ["s_region_0"] * 5, "EntityID": ids}
    obs["cells_region"] = ["s_region_0_polygons"] * 5
    return sd.SpatialData(
        images={
            "s_region_0_z3": Image2DModel.parse(
                marked(2), dims=("c", "y", "x"), c_coords=["DAPI", "PolyT"], rgb=None, scale_factors=[2, 2]
            )
        },
        shapes={"s_region_0_polygons": ShapesModel.parse(frame, transformations=to_global)},
        points={"s_region_0_transcripts": PointsModel.parse(points, feature_key="gene", transformations=to_global)},
        tables={"table": table_of(obs, ids, "s_region_0_polygons", "cells_region", "EntityID", on_slide)},
        attrs={"spatialdata_io_reader": "merscope"},
    )


FOVS = {"1": [0, 2, 4], "2": [1, 3]}  # cells of each field of view
TO_GLOBAL = {"1": [[1, 0, 5000], [0, -1, 9000], [0, 0, 1]], "2": [[1, 0, 5000 + WIDTH], [0, -1, 9000], [0, 0, 1]]}


def cosmx(*, areas=True):
    """Images and labels of each field of view in its pixels, cells numbered from 1 in each; "global" is pixels."""
    images, labels, rows = {}, {}, []
    for fov, cells in FOVS.items():
        affine = Affine(np.array(TO_GLOBAL[fov], float), input_axes=("x", "y"), output_axes=("x", "y"))
        to_global = {fov: Identity(), "global": affine}
        own = np.zeros((HEIGHT, WIDTH), np.uint16)
        for number, i in enumerate(cells, 1):
            own[label_image() == i + 1] = number
            rows.append({"i": i, "fov": fov, "cell_ID": number, "fov_labels": f"{fov}_labels"})
        images[f"{fov}_image"] = Image2DModel.parse(
            marked(3).transpose(1, 2, 0), dims=("y", "x", "c"), rgb=None,
            transformations=to_global | {"global_only_image": affine},
        )  # fmt: skip
        labels[f"{fov}_labels"] = Labels2DModel.parse(
            own, dims=("y", "x"), transformations=to_global | {"global_only_labels": affine}
        )
    obs = pd.DataFrame(rows).sort_values("i").drop(columns="i").to_dict("list")
    if areas:
        obs |= {"Area": [144] * 5, "Area.um2": [144 * 0.12**2] * 5}
    names = [f"{cell}_{fov}" for cell, fov in zip(obs["cell_ID"], obs["fov"])]
    return sd.SpatialData(
        images=images,
        labels=labels,
        tables={"table": table_of(obs, names, ["2_labels", "1_labels"], "fov_labels", "cell_ID", CENTRES)},
        attrs={"spatialdata_io_reader": "cosmx"},
    )


def visium_hd(*, as_squares=True, full=True):
    """Bins in pixels of the full resolution, 16 of which are 8 µm; the same picture at three resolutions."""
    hires, lowres = Scale([0.25, 0.25], axes=("x", "y")), Scale([0.125, 0.125], axes=("x", "y"))
    systems = {"HD": Identity(), "HD_downscaled_hires": hires, "HD_downscaled_lowres": lowres}
    images = {}
    for name, step in (("full", 1), ("hires", 4), ("lowres", 8)):
        pixels = marked(3)[:, ::step, ::step]
        images[f"HD_{name}_image"] = Image2DModel.parse(
            pixels, dims=("c", "y", "x"), scale_factors=[2, 2] if step == 1 else None, rgb=None,
            transformations={"HD": Identity()},
        )  # fmt: skip
    for name, scale in (("hires", hires), ("lowres", lowres)):
        systems_of_image = {f"HD_downscaled_{name}": Identity(), "HD": scale.inverse()}
        set_transformation(images[f"HD_{name}_image"], systems_of_image, set_all=True)
    if not full:
        del images["HD_full_image"]
    shapes, tables = {}, {}
    for microns in (8, 16):
        name, radius = f"HD_square_{microns:03}um", float(microns)
        bins = ShapesModel.parse(
            CENTRES.astype(float), geometry=0, radius=radius, index=np.arange(5), transformations=systems
        )
        if as_squares:
            square = gpd.GeoDataFrame(geometry=bins.buffer(radius, cap_style=3))
            bins = ShapesModel.parse(square, transformations=systems)
        shapes[name] = bins
        obs = {"in_tissue": [1] * 5, "array_row": range(5), "array_col": range(5), "location_id": range(5)}
        obs["region"] = [name] * 5
        barcodes = [f"s_{microns:03}um_{i:05}_00000-1" for i in range(5)]
        tables[f"square_{microns:03}um"] = table_of(obs, barcodes, name, "region", "location_id", CENTRES)
    cells = [f"cellid_{i:09d}-1" for i in (4, 2, 9, 7, 1)]
    frame = gpd.GeoDataFrame({"cell_id": cells, "geometry": squares()}, index=cells)
    shapes["HD_cell_segmentations"] = ShapesModel.parse(frame, transformations=systems)
    obs = {"cell_id": cells, "region": ["HD_cell_segmentations"] * 5}
    tables["cell_segmentations"] = table_of(obs, cells, "HD_cell_segmentations", "region", "cell_id", CENTRES)
    return sd.SpatialData(images=images, shapes=shapes, tables=tables, attrs={"spatialdata_io_reader": "visium_hd"})


def stored(sdata, tmp_path):
    sdata.write(tmp_path / "store.zarr")
    return sd.read_zarr(tmp_path / "store.zarr")


def centre(mpp):
    """Encoder that returns the mean of the four pixels in the middle of a patch."""

    def encode(patches):
        middle = patches.shape[-1] // 2
        return patches[:, :, middle - 1 : middle + 1, middle - 1 : middle + 1].float().mean((2, 3))

    encode.mpp = mpp
    return encode


STORES = {
    "xenium": (xenium, {}, 0.2125, CENTRES * 0.2125),
    "xenium of an old reader": (lambda: xenium(circles=True, reader=None), {}, 0.2125, CENTRES * 0.2125),
    "xenium by its polygons": (xenium, {"shapes_key": "cell_boundaries"}, 0.2125, CENTRES * 0.2125),
    "xenium by its nuclei": (xenium, {"shapes_key": "nucleus_boundaries"}, 0.2125, CENTRES * 0.2125),
    "merscope": (merscope, {}, 1 / 9.259, CENTRES / 9.259),
    "visium hd, squares": (visium_hd, {"table_key": "square_008um"}, 0.5, CENTRES * 0.5),
    "visium hd, circles": (lambda: visium_hd(as_squares=False), {"table_key": "square_016um"}, 0.5, CENTRES * 0.5),
    "visium hd, cells": (visium_hd, {"table_key": "cell_segmentations"}, 0.5, CENTRES * 0.5),
}


@pytest.mark.parametrize("name", list(STORES))
def test_positions_scale_and_patch_are_right_as_it_comes(name, tmp_path, recwarn):
    build, options, mpp, expected = STORES[name]
    sdata = stored(build(), tmp_path)
    recwarn.clear()
    (slide,) = _io.places(sdata, _io.Where(**options))
    np.testing.assert_allclose(slide.xy, expected[SHUFFLED], atol=1e-4)
    assert slide.mpp == pytest.approx(mpp, rel=1e-4)
    found = _io.slide_image(sdata, slide, mpp=mpp)
    assert found.mpp == pytest.approx(mpp, rel=1e-4)
    np.testing.assert_allclose(found.xy, CENTRES[SHUFFLED], atol=1e-3)
    sf.pp.encode_patches(sdata, encoder=centre(mpp), patch_um=8 * mpp, key_added="X_centre", **options)
    features = sdata[options.get("table_key", "table")].obsm["X_centre"]
    np.testing.assert_allclose(features[:, 0], MARKS[SHUFFLED], atol=1)
    assert not [w for w in recwarn if w.filename == __file__ or "monotonic" in str(w.message)]


def test_xenium_channels_keep_their_names(tmp_path):
    sdata = stored(xenium(), tmp_path)
    (slide,) = _io.places(sdata)
    assert _io.slide_image(sdata, slide).channels == ("DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin")


@pytest.mark.parametrize(("key", "half"), [("cell_boundaries", HALF), ("nucleus_boundaries", 3)])
def test_outlines_that_the_table_does_not_annotate_are_those_of_its_cells(key, half):
    """A Xenium's table annotates labels by number; its polygons go by the cells' names, in another order."""
    sdata = xenium()
    (slide,) = _io.places(sdata, _io.Where(shapes_key=key))
    image = _io.slide_image(sdata, slide)
    masks = _io.masks(sdata, sdata["table"], slide, image)
    expected = np.hstack([CENTRES - half, CENTRES + half])[SHUFFLED]
    np.testing.assert_allclose(masks.bounds, expected, atol=1)
    sf.pp.morphology_profile(sdata, shapes_key=key)
    area = sdata["table"].obsm["morphology"]["area_um2"]
    np.testing.assert_allclose(area, (2 * half * 0.2125) ** 2, rtol=1e-5)


def test_a_cell_of_two_nuclei_is_measured_over_both():
    sdata = xenium()
    nuclei = sdata["nucleus_boundaries"]
    again = nuclei.iloc[[0]].copy()
    again.index = [99]
    again["geometry"] = again.geometry.translate(7 * 0.2125)
    sdata["nucleus_boundaries"] = ShapesModel.parse(gpd.GeoDataFrame(pd.concat([nuclei, again])))
    set_transformation(sdata["nucleus_boundaries"], Scale([1 / 0.2125, 1 / 0.2125], axes=("x", "y")))
    sf.pp.morphology_profile(sdata, shapes_key="nucleus_boundaries")
    area = sdata["table"].obsm["morphology"]["area_um2"].to_numpy() / 0.2125**2
    twice = sdata["table"].obs["cell_id"].to_numpy() == nuclei["cell_id"].iloc[0]
    np.testing.assert_allclose(area, np.where(twice, 72, 36), rtol=1e-4)


def test_a_scale_that_contradicts_the_instrument_is_a_warning():
    with pytest.warns(UserWarning, match="mpp=1 was given, but coordinate system 'global' has 0.2125 µm per unit"):
        (slide,) = _io.places(xenium(), _io.Where(mpp=1.0))
    assert slide.mpp == 1.0


@pytest.mark.filterwarnings("error:mpp=")
def test_a_scale_that_agrees_or_is_of_no_interest_is_none():
    assert _io.places(xenium(), _io.Where(mpp=0.21))[0].mpp == 0.21
    _io.places(xenium(), scaled=False)


def test_xenium_nuclei_are_not_numbered_as_its_cells():
    with pytest.raises(ValueError, match="give shapes_key='nucleus_boundaries'"):
        _io.places(xenium(), _io.Where(labels_key="nucleus_labels"))


def test_a_missing_element_is_named_with_what_there_is():
    with pytest.raises(KeyError, match="holds no 'cells'; it has .*'nucleus_boundaries'"):
        _io.places(xenium(), _io.Where(shapes_key="cells"))


def test_cosmx_fields_of_view_are_slides_with_their_own_image(tmp_path):
    sdata = stored(cosmx(), tmp_path)
    slides = {slide.name: slide for slide in _io.places(sdata)}
    assert set(slides) == {"1_labels", "2_labels"}
    for fov, cells in FOVS.items():
        slide = slides[f"{fov}_labels"]
        own = [i for i in SHUFFLED if i in cells]
        on_slide = np.column_stack([CENTRES[own], np.ones(len(own))]) @ np.array(TO_GLOBAL[fov]).T
        np.testing.assert_allclose(slide.xy, on_slide[:, :2] * 0.12, rtol=1e-6)
        found = _io.slide_image(sdata, slide)
        assert found.name == f"{fov}_image"
        assert found.mpp == pytest.approx(0.12)
        np.testing.assert_allclose(found.xy, CENTRES[own], atol=1e-6)
    sf.pp.encode_patches(sdata, encoder=centre(0.12), patch_um=8 * 0.12, key_added="X_centre")
    np.testing.assert_allclose(sdata["table"].obsm["X_centre"][:, 0], MARKS[SHUFFLED], atol=1)


def test_cosmx_without_areas_is_known_by_its_field_of_view():
    sdata = cosmx(areas=False)
    with pytest.raises(ValueError, match="the scale of coordinate system 'global' is unknown: give mpp="):
        _io.places(sdata)
    assert {slide.mpp for slide in _io.places(sdata, _io.Where(mpp=0.18))} == {0.18}
    sdata["1_labels"] = Labels2DModel.parse(np.zeros((4256, 4256), np.uint8), dims=("y", "x"))
    assert _io.microns_per_unit(sdata, "global") == 0.12028


def test_visium_hd_reads_the_resolution_that_the_encoder_needs(tmp_path):
    sdata = stored(visium_hd(), tmp_path)
    (slide,) = _io.places(sdata, _io.Where(table_key="square_008um"))
    names = {mpp: _io.slide_image(sdata, slide, mpp=mpp).name for mpp in (0.5, 4.0)}
    assert names == {0.5: "HD_full_image", 4.0: "HD_lowres_image"}
    (slide,) = _io.places(visium_hd(full=False), _io.Where(table_key="square_008um"))
    assert _io.slide_image(visium_hd(full=False), slide, mpp=0.5).mpp == pytest.approx(2.0)


def test_texture_of_a_visium_hd_bin_is_that_of_its_pixels(tmp_path):
    """The texture encoder reads 1 µm per pixel, which is the second scale of the full image."""
    sdata = stored(visium_hd(), tmp_path)
    sf.pp.encode_patches(sdata, encoder="texture", patch_um=12, table_key="square_008um")
    pixels = sdata["HD_full_image"]["scale1"]["image"].to_numpy()
    patches = [pixels[:, y - 6 : y + 6, x - 6 : x + 6] for x, y in CENTRES[SHUFFLED] // 2]
    expected = load_encoder("texture", device=torch.device("cpu"))(torch.from_numpy(np.stack(patches)))
    np.testing.assert_allclose(sdata["square_008um"].obsm["X_texture"], expected.numpy(), rtol=1e-5)


def test_an_image_that_lies_over_the_others_is_to_be_chosen(tmp_path):
    """An H&E aligned to a Xenium's stains holds the same cells: which one is meant only the user knows."""
    sdata = xenium()
    to_global = Affine(
        np.array([[2.0, 0, -10], [0, 2.0, -20], [0, 0, 1]]), input_axes=("x", "y"), output_axes=("x", "y")
    )
    sdata["he_image"] = Image2DModel.parse(
        marked(3), dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations={"global": to_global}
    )
    sdata = stored(sdata, tmp_path)
    (slide,) = _io.places(sdata)
    with pytest.raises(KeyError, match="'morphology_focus'.*Give image_key="):
        _io.slide_image(sdata, slide)
    found = _io.slide_image(sdata, slide, image_key="he_image")
    assert found.mpp == pytest.approx(0.425)
    np.testing.assert_allclose(found.xy, (CENTRES[SHUFFLED] + [10, 20]) / 2, atol=1e-6)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("name", ["xenium", "xenium by its nuclei", "merscope", "visium hd, squares"])
def test_the_scale_of_samples_that_were_concatenated(name, same):
    """Concatenation drops what the reader said of itself, and appends the sample's name to all others."""
    build, options, mpp, expected = STORES[name]
    options = {key: value for key, value in options.items() if key == "table_key"}
    tables = options.get("table_key", "table")
    parts = {key: sd.SpatialData.init_from_elements({n: e for _, n, e in build().gen_elements()}) for key in "ab"}
    data = sd.concatenate(parts, concatenate_tables=True, merge_coordinate_systems_on_name=same)
    for slide in _io.places(data, _io.Where(**options)):
        assert slide.mpp == pytest.approx(mpp, rel=1e-4)
        np.testing.assert_allclose(slide.xy, expected[SHUFFLED], atol=1e-4)
        assert _io.slide_image(data, slide, mpp=mpp).name.endswith(slide.name[-2:])
    assert data[tables].n_obs == 10


def test_the_scale_of_cosmx_that_was_concatenated():
    parts = {key: sd.SpatialData.init_from_elements({n: e for _, n, e in cosmx().gen_elements()}) for key in "ab"}
    data = sd.concatenate(parts, concatenate_tables=True)
    slides = _io.places(data)
    assert [len(slide) for slide in slides] == [2, 3, 2, 3]
    assert {round(slide.mpp, 6) for slide in slides} == {0.12}
    names = {slide.name: _io.slide_image(data, slide).name for slide in slides}
    assert names == {f"{fov}_labels-{key}": f"{fov}_image-{key}" for fov in "12" for key in "ab"}
