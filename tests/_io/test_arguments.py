"""Checks of arguments: what passes, and what an error says of the rest."""

import numpy as np
import pandas as pd
import pytest

from spatiaflow._io import _arguments


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (_arguments.at_least_one, [1, np.int64(3)], [0, -1, 1.0, True, "1", None, np.nan]),
        (_arguments.positive, [1, 0.5, np.float32(2)], [0, -1, True, "1", None, np.nan, np.inf]),
        (_arguments.share, [0, 1, 0.5], [-0.1, 1.1, True, "1", None, np.nan]),
        (_arguments.text, ["a", None], ["", 3, ["a"], True]),
        (_arguments.renames, [{"a": "b"}, {}, None], [["a"], {"a": 1}, "a"]),
    ],
)
def test_what_passes_and_what_is_refused(check, right, wrong):
    for value in right:
        check(some=value)
    for value in wrong:
        with pytest.raises(ValueError, match="^some must be"):
            check(some=value)


def test_what_may_be_left_out_passes():
    _arguments.at_least_one(None, "all", some=None, other="all")
    _arguments.positive(None, some=None)
    with pytest.raises(ValueError, match="other must be a whole number"):
        _arguments.at_least_one(None, some=None, other="all")


def test_names_of_slots_and_elements_fit_into_files():
    _arguments.slot_name("X_mine")
    _arguments.element_name("mine-2.a")
    for check, name in ((_arguments.slot_name, "a/b"), (_arguments.element_name, "a b"), (_arguments.slot_name, "")):
        with pytest.raises(ValueError, match="key_added must be the name of"):
            check(name)


@pytest.mark.parametrize("given", ["G1", ["G1"], pd.Index(["G1"]), np.array(["G1"])])
def test_names_are_a_list(given):
    assert _arguments.names(given, "genes") == ["G1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [(3, "a name or a list"), ({"G1"}, "a name or a list"), ([], "empty"), (["a", "a"], "'a' twice")],
)
def test_what_is_no_list_of_names_is_refused(given, message):
    with pytest.raises(ValueError, match=f"genes.*{message}"):
        _arguments.names(given, "genes")


def test_known_names_are_listed():
    with pytest.raises(ValueError, match="losses has no 'c'; it takes 'a', 'b'"):
        _arguments.known_names("ab", losses={"a": 1, "c": 2})
    with pytest.raises(ValueError, match="method must be one of 'a', 'b', not 'c'"):
        _arguments.one_of("ab", method="c")


def test_long_lists_are_cut():
    assert _arguments.listing([]) == "nothing"
    assert _arguments.listing(range(20)).endswith("'11', ... (20)")
