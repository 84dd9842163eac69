import numpy as np
import pytest
import torch

import spatiaflow as sf


def test_a_crop_may_fit_its_cell_and_says_its_scale():
    sdata = sf.datasets.simulated_tissue(60, seed=0)
    crops = sf.pp.crops(sdata, crop_um=None, crop_pixels=24, image_key="fluorescence")
    polygons = sdata["nuclei"].loc[sdata["table"].obs["cell_id"]]
    side = 1.25 * np.maximum(polygons.bounds.maxx - polygons.bounds.minx, polygons.bounds.maxy - polygons.bounds.miny)
    assert np.ptp(crops.scale) > 0.05
    np.testing.assert_allclose(crops.scale * 24, side, atol=2)  # whole pixels of 0.5 µm, two of each
    order = np.array([7, 3, 50])
    assert torch.equal(crops.read(order), torch.stack([crops.take(np.array([i])).read([0])[0] for i in order]))
    assert crops.read(order).shape == (3, 4, 24, 24)


def test_pixels_of_other_cells_are_left_out():
    """Against the polygon itself, pixel by pixel."""
    import shapely

    sdata = sf.datasets.simulated_tissue(60, seed=0)
    whole = sf.pp.crops(sdata, crop_um=12.0, crop_pixels=24, image_key="fluorescence")
    own = (
        sf.pp.crops(sdata, crop_um=12.0, crop_pixels=24, own_pixels=True, image_key="fluorescence")
        .read(range(60))
        .numpy()
    )
    polygons = sdata["nuclei"].loc[sdata["table"].obs["cell_id"]].geometry
    size = 12 / whole.mpp
    for crop, full, polygon, (x, y) in zip(own, whole.read(range(60)).numpy(), polygons, whole.xy):
        left, top = np.ceil(x - size / 2 - 0.5 - 1e-6), np.ceil(y - size / 2 - 0.5 - 1e-6)
        grid = np.meshgrid((left + np.arange(24) + 0.5) * whole.mpp, (top + np.arange(24) + 0.5) * whole.mpp)
        inside = shapely.contains_xy(polygon, *grid)
        np.testing.assert_array_equal(crop, full * inside)
    assert (own == 0).mean() > 0.3


BAD_CROPS = {
    "several slides": ({"library_key": "section"}, ValueError, "give library_id="),
    "no such slide": ({"library_key": "section", "library_id": "z"}, KeyError, "no slide 'z'"),
    "no polygons": ({"own_pixels": True}, ValueError, "need polygons or labels"),
    "no width": ({"crop_um": 0}, ValueError, "crop_um"),
}


@pytest.mark.parametrize("case", BAD_CROPS)
def test_bad_crops_are_a_clear_error(slide, case):
    adata = slide("a")
    adata.obs["section"] = np.where(np.arange(adata.n_obs) < 70, "x", "y")
    adata.uns["spatial"]["a"]["images"] = {"hires": np.zeros((600, 600, 3), np.uint8)}
    kwargs, error, message = BAD_CROPS[case]
    with pytest.raises(error, match=message):
        sf.pp.crops(adata, mpp=0.5, **({"image_key": "hires"} | kwargs))


def test_rows_of_any_form():
    crops = sf.pp.crops(sf.datasets.simulated_tissue(20, seed=0), image_key="he")
    assert crops.read([]).shape == (0, 3, 48, 48)
    assert torch.equal(crops.read(np.arange(20) < 2), crops.read([0, 1]))
    for rows in ([20], ["cell_0"], np.ones(3, bool), [[0, 1]], [0.5]):
        with pytest.raises(ValueError, match="rows must be numbers 0 to 19"):
            crops.read(rows)
