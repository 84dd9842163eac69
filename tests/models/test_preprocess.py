import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow._slides.crops import Crops
from spatiaflow.models.preprocess import (
    beyond,
    full,
    gene_standard,
    in_vocabulary,
    intensity_of,
    scaled,
    stain_levels,
    unscaled,
)
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatia import SpatiaConfig


def test_scaling_and_order_of_channels():
    crops = torch.arange(2 * 2 * 4).view(2, 2, 2, 2)
    x = scaled(crops, np.array([[0, 2.0], [4, 8.0]]), np.array([1, -1, 0]))
    assert x.shape == (2, 3, 2, 2)
    torch.testing.assert_close(x[0, 2], torch.tensor([[0, 0.5], [1.0, 1.5]]))
    torch.testing.assert_close(x[0, 0], torch.tensor([[0, 0.25], [0.5, 0.75]]))
    assert (x[:, 1] == 0).all()


def test_channels_of_wider_crops_are_scaled_as_those_of_the_first():
    crops, places = torch.rand(3, 4, 5, 5), np.array([1, -1, 0])
    intensity = np.array([[0, 2.0], [0.1, 0.8]])
    expected = torch.cat([scaled(crops[:, :2], intensity, places), scaled(crops[:, 2:], intensity, places)], 1)
    assert torch.equal(scaled(crops, intensity, places), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_unscaling_undoes_scaling_and_clips_to_whole_numbers(dtype):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(3, 200, (5, 2, 4, 4)).astype(np.float32))
    known, names = {"a": [3.0, 90.0], "b": [10.0, 250.0]}, ["b", "a"]
    x = scaled(pixels, np.array([known[name] for name in names]), np.array([0, 1])).clamp_max(1)
    found = unscaled(x, known, names, np.dtype(dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found[:, 0], pixels[:, 0], atol=1e-3)
    np.testing.assert_allclose(found[:, 1], pixels[:, 1].clamp_max(90), atol=1e-3)
    assert unscaled(x * 9 - 4, known, names, np.dtype(np.uint8)).max() == 255


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pixels_that_a_model_does_not_see_are_given_back(dtype):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (5, 2, 4, 4)).astype(np.float32))
    known, places = np.array([[3.0, 20.0], [60.0, 100.0]]), np.array([1, 0])  # dark ones lie below the background
    x, cut = scaled(pixels, known, places), beyond(pixels, known, places)
    assert (cut > 0).any() and (cut < 0).any() and (cut == 0).any()
    ends = {"b": [60.0, 100.0], "a": [3.0, 20.0]}
    np.testing.assert_allclose(unscaled(x, ends, ["b", "a"], np.dtype(dtype), cut), pixels[:, [1, 0]], atol=1e-4)


def test_a_slide_is_put_into_the_vocabulary_of_a_model():
    rng, genes = np.random.default_rng(0), ["g0", "g1", "g2", "g3"]
    xy, image = rng.uniform(20, 80, (9, 2)), rng.integers(0, 255, (3, 100, 100)).astype(np.uint8)
    crops = Crops(image, xy, 16, 16, True, ("a", "b", "c"), range=np.array([[0, 200.0]] * 3))
    counts = sparse.csr_matrix(rng.poisson(2, (9, 4)).astype(np.float32))
    slide = Slide("s", np.arange(9), xy, counts, genes=genes, crops=crops)
    config = SpatiaConfig(genes=["g3", "other", "g0"], channels=["c", "x", "a"])
    found = in_vocabulary(slide, config)
    np.testing.assert_array_equal(found.counts[:, [0, 2]].toarray(), slide.counts[:, [3, 0]].toarray())
    assert found.measured.tolist() == [True, False, True] and not found.counts[:, 1].nnz
    assert found.crops.places.tolist() == [2, -1, 0]
    assert in_vocabulary(slide, SpatiaConfig(channels=["a"])).measured.shape == (0,)
    bright = dataclasses.replace(found, crops=dataclasses.replace(found.crops, range=found.crops.range + 10))
    assert intensity_of([found, bright], config.channels) == {"c": [5.0, 205.0], "a": [5.0, 205.0]}


def test_genes_are_standardised_by_slide():
    rng = np.random.default_rng(0)
    counts = rng.poisson([5.0, 1.0, 0.0, 3.0], (5000, 4)).astype(float)
    measured = np.array([True, True, True, False])
    counts = sparse.csr_matrix(counts)
    centre, spread, share = gene_standard(counts, measured, 9.0)
    counts = counts.toarray()
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 9)
    np.testing.assert_allclose(centre[:2], values[:, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(spread[:2], values[:, :2].std(0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(share[0]), counts[:, 0].sum() / counts.sum(), rtol=1e-3)
    assert (centre[3], spread[3], share[3]) == (0, 1, 0) and spread[2] == 1
    usual = np.array([[1.0] * 4, [2.0] * 4, [-2.0] * 4])
    few = gene_standard(counts[:5], measured, 9.0, usual)
    np.testing.assert_allclose(few[0, :3], 1.0, atol=0.15)  # few cells lean on the training data
    many = gene_standard(counts, measured, 9.0, usual)
    np.testing.assert_allclose(many[0, :2], centre[:2], atol=0.05)


def test_batches_are_of_one_size_and_lose_nothing():
    rng, parts, done = np.random.default_rng(0), [], 0
    for n in rng.integers(1, 9, 30):
        rows = np.arange(done, done + n)
        parts.append((rows, torch.from_numpy(rows)[:, None] * 2))
        done += n
    out = list(full(iter(parts), 8))
    assert {len(rows) for rows, _ in out[:-1]} == {8} and 0 < len(out[-1][0]) <= 8
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in out]), np.arange(done))
    np.testing.assert_array_equal(torch.cat([x for _, x in out])[:, 0], 2 * np.arange(done))


def test_stain_levels_are_means_of_the_crops_inside_in_units_of_the_bright_end():
    rng = np.random.default_rng(0)
    slides, rows, expected = [], [], []
    for name in "ab":
        xy, image = rng.uniform(-20, 99, (30, 2)), rng.integers(0, 100, (2, 100, 100)).astype(np.uint8)
        crops = Crops(image, xy, 16, 16, True, ("x", "y"), range=np.array([[0, 100.0], [10, 60.0]]))
        crops = crops.matched(["y", "x"], None, name)
        inside = np.flatnonzero(crops.inside)[::2]
        values = crops.read(inside).numpy().mean((2, 3))
        expected.append(np.c_[(values[:, 1] - 10) / 50, values[:, 0] / 100])
        rows += [*inside + 30 * len(slides), *np.flatnonzero(~crops.inside) + 30 * len(slides)]
        slides.append(Slide(name, np.arange(30), xy, crops=crops))
    assert len(rows) > len(np.concatenate(expected))
    np.testing.assert_allclose(stain_levels(slides, np.array(rows[::-1])), np.concatenate(expected), atol=0.01)
    assert stain_levels(slides, np.zeros(0, int)).shape == (0, 2)
