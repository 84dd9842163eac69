"""Checks of arguments that verbs share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np


def at_least_one(*others: Any, **values: Any) -> None:
    """Refuse what is not a whole number of at least 1, nor one of ``others`` (None, where an argument may be left out)."""
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (whole and value >= 1) and not any(value is one for one in others):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")


def positive(*others: Any, **values: Any) -> None:
    """Refuse what is not a positive, finite number, nor one of ``others`` (None, where an argument may be left out)."""
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and np.isfinite(value) and value > 0) and not any(value is one for one in others):
            raise ValueError(f"{name} must be a positive number, not {value!r}.")


def share(**values: Any) -> None:
    """Refuse what is not a number between 0 and 1."""
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number between 0 and 1, not {value!r}.")


def one_of(known: Iterable, **values: Any) -> None:
    """Refuse what is not among the known."""
    for name, value in values.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}.")


def known_names(known: Iterable, **values: Any) -> None:
    """Refuse a dict with a key that is not among the known; None passes."""
    for name, given in values.items():
        if unknown := [key for key in given or {} if key not in known]:
            raise ValueError(f"{name} has no {unknown[0]!r}; it takes {', '.join(map(repr, known))}.")


def text(**values: Any) -> None:
    """Refuse what is not a name; None passes."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"{name} must be a name (text), not {value!r}.")


def renames(**values: Any) -> None:
    """Refuse what is not a dict of names to names; None passes."""
    for name, value in values.items():
        fits = isinstance(value, Mapping) and all(isinstance(one, str) for one in [*value, *value.values()])
        if value is not None and not fits:
            raise ValueError(f"{name} must be a dict of names, such as {{'DAPI': 'dapi'}}, not {value!r}.")


def slot_name(value: Any, argument: str = "key_added") -> None:
    """Refuse a name that no slot of a file can have; None passes."""
    if value is not None and not (isinstance(value, str) and value and "/" not in value):
        raise ValueError(
            f"{argument} must be the name of a slot (text without '/', which files take for a folder), not {value!r}."
        )


def element_name(value: Any, argument: str = "key_added") -> None:
    """Refuse a name that no element of a SpatialData can have; None passes."""
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", value)):
        raise ValueError(
            f"{argument} must be the name of an element (letters, digits, '_', '.' and '-'), not {value!r}."
        )


def names(value: Any, argument: str) -> list[str] | None:
    """Return names as a list: of one text, a list, an Index or an array. None stays."""
    if value is None:
        return None
    if not isinstance(value, Iterable) or isinstance(value, set | frozenset):  # a set has no order
        raise ValueError(f"{argument} must be a name or a list of names, not {value!r}.")
    found = [value] if isinstance(value, str) else list(value)
    if found and isinstance(found[0], bool | np.bool_):
        raise ValueError(f"{argument} must be names, not a mask of bool. Give {argument}=table.obs_names[mask].")
    found = [str(name) for name in found]
    if not found:
        raise ValueError(f"{argument} is empty; name at least one, or leave it out.")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ValueError(f"{argument} names {twice!r} twice.")
    return found


def held_out(validation: Any, names: Iterable[str], largest: float = 0.99) -> list[str] | float | None:
    """Return slides to hold out as a list of names, or a fraction as float; None stays. Refuse what cannot be meant."""
    if validation is None:
        return None
    if isinstance(validation, int | float | np.number) and not isinstance(validation, bool):
        if not 0 < validation <= largest:
            raise ValueError(
                f"validation as a fraction must lie above 0 and not above {largest:g}; it is {validation}."
            )
        return float(validation)
    if not isinstance(validation, str | list | tuple | set):
        raise ValueError(f"validation must be None, a fraction, or names of slides, not {validation!r}.")
    chosen = [validation] if isinstance(validation, str) else [str(name) for name in validation]
    if unknown := sorted(set(chosen) - set(names)):
        raise ValueError(f"validation names slides that are not in data: {unknown}; it has {sorted(names)}.")
    if not chosen:
        raise ValueError("validation is empty; None chooses by itself.")
    if not set(names) - set(chosen):
        raise ValueError("validation names every slide; at least one must be left to train on.")
    return chosen


def listing(names: Iterable) -> str:
    """Quote names for an error, at most twelve."""
    names = [repr(str(name)) for name in names]
    return (", ".join(names[:12]) + (f", ... ({len(names)})" if len(names) > 12 else "")) or "nothing"
