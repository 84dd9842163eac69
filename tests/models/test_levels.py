from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from spatiaflow.models import levels
from spatiaflow.models.preprocess import standard_of
from spatiaflow.models.slide import Slide


@pytest.fixture
def slides():
    rng, out = np.random.default_rng(0), []
    for name, n in (("a", 300), ("b", 200)):
        counts = sparse.csr_matrix(rng.poisson(rng.gamma(1, 2, (n, 90))).astype(np.float32))
        genes = tuple(f"g{i}" for i in range(90))
        slide = Slide(name, np.arange(n).astype(str), rng.uniform(0, 10 * n**0.5, (n, 2)), counts, genes=genes)
        out.append(slide)
    return out


def dense(slide, highest=np.inf):
    """Standardised genes by the definition."""
    counts = slide.counts.toarray().astype(float)
    values = np.log1p(counts * 50 / counts.sum(1, keepdims=True))
    centre, deviation, _ = standard_of(slide, 50.0)
    return np.minimum((values - centre) / deviation, highest)


def test_a_gaussian_of_the_usual_width_has_45_effective_neighbours():
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 2) * 10.0
    sigma = levels.usual_um([Slide("s", np.arange(1600), grid)])
    weight = np.exp(-0.5 * (np.linalg.norm(grid - grid[820], axis=1) / sigma) ** 2)
    assert weight.sum() ** 2 / (weight**2).sum() == pytest.approx(45, rel=0.15)  # distances on a grid come in steps


@pytest.mark.parametrize("sigma", [2.0, 15.0, 60.0])
def test_means_are_those_over_all_pairs_of_cells(slides, sigma):
    xy, values = slides[0].xy, np.random.default_rng(1).normal(size=(300, 2)) + slides[0].xy / 50
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    weight = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= 3 * sigma)
    expected = weight @ values / weight.sum(1, keepdims=True)
    rows, found = next(levels.gaussian_means(xy, values, [sigma]))
    assert rows.tolist() == list(range(300))
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.02 * values.std()
    turned = xy @ np.array([[0.6, -0.8], [0.8, 0.6]])
    again = next(levels.gaussian_means(turned, values, [sigma]))[1]
    assert np.sqrt(np.mean((again - found) ** 2)) < 0.02 * values.std()


def test_means_of_some_rows_and_of_parts_are_those_of_all(slides, monkeypatch):
    values = np.random.default_rng(1).normal(size=(300, 2))
    whole = next(levels.gaussian_means(slides[0].xy, values, [10.0, 20.0]))[1]
    monkeypatch.setattr(levels, "CHUNK", 64)
    parts = list(levels.gaussian_means(slides[0].xy, values, [10.0, 20.0], np.arange(0, 300, 3)))
    assert len(parts) == 2
    np.testing.assert_allclose(np.concatenate([v for _, v in parts]), whole[::3], atol=1e-10)


@pytest.mark.parametrize("highest", [None, 2.0])
def test_standardised_genes_are_multiplied_without_a_dense_array(slides, highest):
    z, expected = levels.standardised(slides[0], 50.0, highest=highest), dense(slides[0], highest or np.inf)
    v, u = np.random.default_rng(2).normal(size=(90, 3)), np.random.default_rng(3).normal(size=(300, 2))
    np.testing.assert_allclose(z @ v, expected @ v, atol=1e-3)
    np.testing.assert_allclose(z.transposed(u), expected.T @ u, atol=1e-3)
    np.testing.assert_allclose(z.take(np.arange(5, 20)) @ v[5:20], expected[:, 5:20] @ v[5:20], atol=1e-3)


@pytest.mark.parametrize("n", [4, 60])
def test_joint_axes_are_the_principal_axes_of_all_slides(slides, n):
    """By iteration where few are asked for, by one decomposition where many are."""
    z = np.concatenate([dense(slide) for slide in slides])
    axes = levels.joint_axes([levels.standardised(slide, 50.0) for slide in slides], n)
    expected = np.linalg.svd(z, full_matrices=False)[2][:n].T
    np.testing.assert_allclose(np.abs((axes * expected).sum(0)), 1, atol=1e-3)
    assert (axes[np.abs(axes).argmax(0), np.arange(n)] > 0).all()


def test_genes_that_a_slide_does_not_measure_are_their_mean(slides):
    fewer = slides[0].align([*slides[0].genes[:80], *(f"new{i}" for i in range(10))])
    z = levels.standardised(fewer, 50.0)
    np.testing.assert_array_equal((z @ np.eye(90))[:, 80:], 0)


def test_cells_without_counts_stand_at_the_mean_and_move_no_axis(slides):
    counts = slides[0].counts.tolil()
    counts[:60] = 0
    z = levels.standardised(replace(slides[0], counts=counts.tocsr()), 50.0)
    rest = levels.standardised(slides[0].take(np.arange(60, 300)), 50.0)
    np.testing.assert_array_equal((z @ np.eye(90))[:60], 0)
    np.testing.assert_allclose((z @ np.eye(90))[60:], rest @ np.eye(90), atol=1e-9)
    np.testing.assert_allclose(z.transposed(np.ones((300, 1))), rest.transposed(np.ones((240, 1))), atol=1e-9)
    np.testing.assert_allclose(levels.joint_axes([z], 3), levels.joint_axes([rest], 3), atol=1e-6)
