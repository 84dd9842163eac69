"""Invariants of Slide, against slow and obvious references on random inputs."""

import numpy as np
import pytest
from scipy import sparse

from spatiaflow.models.slide import Slide, pitch


def random_slide(seed, n=None):
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(2, 40))
    counts = rng.poisson(0.7, (n, 6)).astype(np.float32)
    return Slide(
        "s", [f"c{i}" for i in range(n)], rng.normal(0, [300, 80], (n, 2)), sparse.csr_matrix(counts),
        counts.sum(1) + rng.integers(0, 4, n), tuple("abcdef"), features=rng.normal(size=(n, 3)),
        labels=rng.integers(0, 3, n), rows=rng.permutation(1000)[:n],
    )  # fmt: skip


def rows_of(slide):
    """Everything that belongs to each row, by its name."""
    arrays = (slide.xy, slide.counts.toarray(), slide.library, slide.features, slide.labels, slide.rows)
    return {name: tuple(np.asarray(a[i]).tolist() for a in arrays) for i, name in enumerate(slide.obs_names)}


@pytest.mark.parametrize("seed", range(5))
def test_take_keeps_rows_together(seed):
    slide, rng = random_slide(seed), np.random.default_rng(seed)
    rows, whole = rng.permutation(len(slide))[: len(slide) // 2 + 1], rows_of(slide)
    part = slide.take(rows, "part")
    assert (part.name, part.genes, len(part)) == ("part", slide.genes, len(rows))
    assert list(part.obs_names) == [f"c{i}" for i in rows]
    assert rows_of(part) == {f"c{i}": whole[f"c{i}"] for i in rows}
    chosen = np.isin(np.arange(len(slide)), rows)
    assert rows_of(slide.take(chosen)) == rows_of(part)


@pytest.mark.parametrize("seed", range(5))
def test_align_puts_genes_by_name_and_masks_those_that_lack(seed):
    slide, rng = random_slide(seed), np.random.default_rng(seed)
    genes = list(rng.permutation(list("abcdefxyz"))[:6])
    out, dense = slide.align(genes), slide.counts.toarray()
    assert out.genes == tuple(genes)
    for j, gene in enumerate(genes):
        known = gene in slide.genes
        assert out.measured[j] == known
        expected = dense[:, slide.genes.index(gene)] if known else np.zeros(len(slide))
        np.testing.assert_array_equal(out.counts.toarray()[:, j], expected)
    np.testing.assert_array_equal(out.library, slide.library)  # of all genes measured, not of those that are left
    again = out.align(["a", "x"])
    assert list(again.measured) == ["a" in genes, False]  # unmeasured stays unmeasured


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_bands_are_contiguous_equal_and_complete(n):
    slide = random_slide(n, 30)
    bands = slide.bands(n)
    axis = int(np.argmax(np.ptp(slide.xy, axis=0)))
    assert [b.name for b in bands] == [f"s:{i}" for i in range(n)]
    assert sorted(name for b in bands for name in b.obs_names) == sorted(slide.obs_names)
    assert max(map(len, bands)) - min(map(len, bands)) <= 1
    assert all(a.xy[:, axis].max() <= b.xy[:, axis].min() for a, b in zip(bands, bands[1:]))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_held_out_rows_are_the_far_end_behind_a_gap(share):
    slide = random_slide(3, 200)
    train, held_out = slide.hold_out(share, gap=20.0)
    axis = int(np.argmax(np.ptp(slide.xy, axis=0)))
    assert held_out.xy[:, axis].min() - train.xy[:, axis].max() >= 20
    assert len(held_out) == pytest.approx(share * 200, abs=1)
    assert not set(train.obs_names) & set(held_out.obs_names)


@pytest.mark.parametrize("target_sum", [1e4, 100.0, None])
def test_log_normalized_is_the_formula(target_sum):
    slide = random_slide(1)
    expected = np.zeros(slide.counts.shape)
    for i, row in enumerate(slide.counts.toarray()):
        expected[i] = np.log1p(row if target_sum is None else row * target_sum / max(slide.library[i], 1))
    np.testing.assert_allclose(slide.log_normalized(target_sum).toarray(), expected, rtol=1e-5)


def test_pitch_is_the_distance_to_the_nearest_other_position():
    xy = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2) * 50.0
    assert pitch(np.concatenate([xy, xy])) == 50
    assert pitch(xy[:1]) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"xy": np.zeros((3, 2))}, "xy must be 4 x 2"), ({"features": np.zeros((3, 2))}, "features must have 4 rows"),
        ({"library": -np.ones(4)}, "library sizes"), ({"genes": ("a", "a")}, "twice"),
        ({"counts": sparse.csr_matrix((4, 2)), "genes": ("a",)}, "counts must be 4 rows x 1 genes"),
        ({"genes": ("a", "b"), "measured": np.ones(1, bool)}, "measured must have one value"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Slide("s", list("abcd"), **wrong)


def test_the_last_column_of_an_array_is_held_out_whole():
    """A tenth of the spots is less than one of its eight columns."""
    i, j = np.divmod(np.arange(64), 8)
    slide = Slide("array", np.arange(64).astype(str), np.stack([i * 100.0, j * 90.0], 1), rows=np.arange(64))
    train, held_out = slide.hold_out(0.1, gap=20.0)
    assert len(held_out) == 8
    assert not set(train.rows) & set(held_out.rows)
