import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow import models
from spatiaflow._slides.crops import Crops
from spatiaflow.models.fusion import Surroundings
from spatiaflow.models.preprocess import in_vocabulary, standard_of
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import (
    Spatia,
    SpatiaConfig,
    SpatiaNetwork,
)
from spatiaflow.models.spatial import anchor_graph, anchors

GENES = [f"g{i}" for i in range(20)]
SIZES = {
    "crop_pixels": 16, "patch_pixels": 8, "width": 32, "image_layers": 2, "gene_layers": 1, "niche_neighbors": 6, "wide": 3.0
}  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = SpatiaNetwork(SpatiaConfig(genes=GENES, channels=["a", "b", "c"], anchor_um=40.0, **SIZES)).eval()
    for p in network.parameters():  # away from the start, where small weights would hide differences
        p.data += 0.05 * torch.randn(p.shape)
    return network


@pytest.fixture(scope="module")
def tokens(network):
    g = torch.Generator().manual_seed(1)
    crops, values = torch.rand(12, 6, 16, 16, generator=g), torch.rand(12, 20, generator=g) * 3
    measured = torch.ones(1, 20, dtype=torch.bool)
    with torch.inference_mode():
        return network.image(crops), network.gene(values, measured, values.sum(1))


@pytest.fixture
def slide():
    rng = np.random.default_rng(0)
    counts, xy = sparse.csr_matrix(rng.poisson(2, (90, 20)).astype(np.float32)), rng.uniform(0, 150, (90, 2))
    image = rng.integers(0, 255, (3, 200, 200)).astype(np.uint8)
    crops = Crops(image, xy + 20, 16, 16, True, ("a", "b", "c"), range=np.array([[0, 200.0]] * 3), wide=3.0)
    slide = Slide("s", np.arange(90), xy, counts, genes=GENES, crops=crops)
    return in_vocabulary(slide, SpatiaConfig(genes=GENES, channels=["a", "b", "c"]))


def off_image(slide, rows):
    """The slide with some cells beyond the border of the image."""
    xy = slide.crops.xy.copy()
    xy[rows, 0] -= 500
    return dataclasses.replace(slide, crops=dataclasses.replace(slide.crops, xy=xy))


def model_of(network):
    return Spatia(network=network, target_sum=40.0, history={}, card={})


def test_at_weight_zero_each_modality_passes_unchanged(network, tokens):
    image, genes = tokens
    before = network.to_gene.weight, network.to_image.weight
    try:
        network.to_gene.weight = network.to_image.weight = 0.0
        assert network.to_gene(genes, image) is genes
        assert network.to_image(image, genes) is image
    finally:
        network.to_gene.weight, network.to_image.weight = before
    with torch.inference_mode():
        one = network.fuse(image, genes, 12)
        assert not torch.allclose(network.fuse(image.flip(0), genes, 12), one, atol=1e-3)
        for missing in (network.fuse(None, genes, 12), network.fuse(image, None, 12)):
            assert torch.isfinite(missing).all()
            assert not torch.allclose(missing, one, atol=1e-3)


def test_context_sees_where_neighbours_are_but_not_the_orientation(network):
    rng = np.random.default_rng(5)
    xy, cells = rng.uniform(0, 200, (150, 2)), torch.from_numpy(rng.normal(size=(150, 32)).astype(np.float32))

    def context(xy, cells):
        with torch.inference_mode():
            return network.context(cells, Surroundings.of(xy, network.config))

    niche, tissue = context(xy, cells)
    c, s = np.cos(0.7), np.sin(0.7)
    turned = xy @ np.array([[c, s], [s, -c]]) + 1000  # rotated, mirrored, moved
    order = rng.permutation(150)
    for found, one in zip(context(turned, cells), (niche, tissue)):
        torch.testing.assert_close(found, one, atol=1e-5, rtol=0)
    for found, one in zip(context(xy[order], cells[order]), (niche, tissue)):
        torch.testing.assert_close(found, one[order], atol=1e-5, rtol=0)
    nearest = int(np.argsort(np.linalg.norm(xy - xy[0], axis=1))[1])
    moved = xy.copy()
    moved[nearest] = (xy[nearest] + 2 * xy[0]) / 3  # still the nearest
    assert not torch.allclose(context(moved, cells)[0][0], niche[0], atol=1e-4)
    for which in (nearest, 0):  # a neighbour, and the cell itself
        other = cells.clone()
        other[which] = -other[which]
        assert not torch.allclose(context(xy, other)[0][0], niche[0], atol=1e-4)


def test_anchors_cover_the_slide_and_keep_their_distance():
    rng = np.random.default_rng(6)
    xy = rng.uniform(0, 500, (800, 2))
    chosen = anchors(xy, 60.0)
    distance = np.linalg.norm(xy[chosen][:, None] - xy[chosen], axis=-1)
    assert distance[~np.eye(len(chosen), dtype=bool)].min() > 60
    assert np.linalg.norm(xy[:, None] - xy[chosen], axis=-1).min(1).max() <= 60
    order = rng.permutation(800)
    np.testing.assert_array_equal(np.sort(order[anchors(xy[order], 60.0)]), chosen)
    graph = anchor_graph(xy, xy[chosen], 4, 60.0)
    slow = np.argsort(np.linalg.norm(xy[:, None] - xy[chosen], axis=-1), axis=1)[:, :4]
    np.testing.assert_array_equal(graph.index.numpy(), slow)
    np.testing.assert_allclose(graph.offset.numpy(), (xy[chosen][slow] - xy[:, None]) / 60.0)


def test_one_cell_alone(network):
    with torch.inference_mode():
        niche, tissue = network.context(torch.randn(1, 32), Surroundings.of(np.zeros((1, 2)), network.config))
    assert torch.isfinite(niche).all()
    assert torch.isfinite(tissue).all()


def test_batch_size_and_repetition_change_nothing(network, slide):
    model, slide = model_of(network), off_image(slide, [3, 50])
    one = model.embed(slide, batch_size=512)
    again = model.embed(slide, batch_size=512)
    for level, values in model.embed(slide, batch_size=7).items():
        assert np.array_equal(one[level], again[level], equal_nan=True)
        np.testing.assert_allclose(values, one[level], atol=1e-5)


def test_cells_outside_the_image_are_embedded_without_it(network, slide):
    model, outside = model_of(network), off_image(slide, [5])
    one = model.embed(outside, levels=("cell",))["cell"]
    without = model.embed(dataclasses.replace(slide, crops=None), levels=("cell",))["cell"]
    np.testing.assert_allclose(one[5], without[5], atol=1e-5)
    assert not np.allclose(one[6], without[6], atol=1e-3)


def test_saved_and_loaded_is_the_same(network, slide, tmp_path):
    model = model_of(network)
    again = models.load(model.save(tmp_path / "m"))
    assert again.sha256 == model.sha256
    assert again.config == model.config
    for level, values in again.embed(slide).items():
        np.testing.assert_array_equal(values, model.embed(slide)[level])


def test_a_configuration_is_checked_and_old_ones_still_load():
    assert SpatiaConfig.of(None) is SpatiaConfig.of("default")
    mine = SpatiaConfig(width=64, losses={"contrast": 0})
    assert SpatiaConfig.of(mine) is mine and mine.loss_weights["contrast"] == 0
    larger = SpatiaConfig(genes=["a"], width=256, num_workers=3)
    assert mine.with_sizes_of(larger) == SpatiaConfig(genes=["a"], width=256, losses={"contrast": 0})
    for bad, match in (({"gene": 1.0}, "losses has no 'gene'"), ({"genes": -1}, "negative")):
        with pytest.raises(ValueError, match=match):
            SpatiaConfig(losses=bad)
    with pytest.raises(ValueError, match="crop_um must be a positive number"):
        SpatiaConfig(crop_um=0)


def test_cells_on_glass_and_empty_cells_do_not_standardise_genes(slide):
    clean = dataclasses.replace(slide, crops=None)
    counts = sparse.vstack([clean.counts, sparse.csr_matrix((30, 20)), clean.counts[:20] * 9]).tocsr()
    dirty = Slide(
        "s", np.arange(140), np.zeros((140, 2)), counts, genes=GENES, tissue_share=np.repeat([1.0, np.nan, 0], [90, 30, 20])
    )  # fmt: skip
    usual = np.stack([np.full(20, 0.5), np.ones(20), np.full(20, -3.0)])
    for known in (None, usual):
        np.testing.assert_array_equal(standard_of(dirty, 30.0, known), standard_of(clean, 30.0, known))
    empty = dirty.take(np.arange(90, 120))
    np.testing.assert_allclose(standard_of(empty, 30.0, usual), usual, atol=1e-6)  # nothing of its own
