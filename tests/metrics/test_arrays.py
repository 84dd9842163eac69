"""What all metrics check of their arrays."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from spatiaflow.metrics._arrays import ensemble, labels, rows_in_chunks, table, tables


def test_every_form_of_a_table_is_the_same_array():
    values = np.random.default_rng(0).poisson(1, (4, 3)).astype(float)
    for form in (values, values.tolist(), pd.DataFrame(values), sparse.csr_matrix(values), sparse.csc_array(values)):
        np.testing.assert_array_equal(table(form, "truth"), values)
        assert table(form, "truth").dtype == np.float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), r"truth must be an \(n, genes\) array; its shape is \(3,\)"),
        (np.zeros((0, 3)), "truth has no rows"),
        ([[1.0, np.nan], [np.inf, 0]], "truth has 2 NaN or infinite values"),
    ],
)
def test_what_is_no_table_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        table(values, "truth")


def test_frames_in_another_order_are_refused_and_not_subtracted():
    frame = pd.DataFrame(np.eye(3), index=list("abc"), columns=list("xyz"))
    one, other = tables(truth=frame, predicted=frame + 1)
    np.testing.assert_array_equal(other - one, 1)
    for turned in (frame.iloc[::-1], frame[list("zyx")]):
        with pytest.raises(ValueError, match=r"align first: predicted\.loc\[truth\.index, truth\.columns\]"):
            tables(truth=frame, predicted=turned)
    with pytest.raises(ValueError, match=r"truth is \(3, 3\) but predicted is \(2, 3\)"):
        tables(truth=np.eye(3), predicted=np.eye(3)[:2])


def test_draws_keep_their_type_and_must_fit_the_truth():
    assert ensemble(np.zeros((2, 3)), np.zeros((5, 2, 3), np.float32))[1].dtype == np.float32
    with pytest.raises(ValueError, match=r"draws must be \(n_draws, 2, 3\) as truth is; they are \(5, 3, 2\)"):
        ensemble(np.zeros((2, 3)), np.zeros((5, 3, 2)))


def test_labels_are_coded_in_order_of_appearance():
    names, codes = labels(["b", "a", "b", "c"], 4, "library")
    assert names.tolist() == ["b", "a", "c"]
    assert codes.tolist() == [0, 1, 0, 2]


def test_chunks_hold_every_row_once_within_the_budget():
    chunks = list(rows_in_chunks(10, width=7, budget=21))
    assert np.concatenate([np.arange(10)[chunk] for chunk in chunks]).tolist() == list(range(10))
    assert max(chunk.stop - chunk.start for chunk in chunks) == 3
    assert len(list(rows_in_chunks(2, width=100, budget=21))) == 2, "a row at least"
