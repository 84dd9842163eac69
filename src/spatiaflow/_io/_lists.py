"""Verbs that take one object take lists and dicts of objects too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def objects_of(data: Any) -> dict[str, Any]:
    """Objects by name: of a dict as they are, of a list by their place, of one object under ""."""
    if isinstance(data, Mapping):
        out = {str(name): one for name, one in data.items()}
    elif isinstance(data, list | tuple):
        out = {str(i): one for i, one in enumerate(data)}
    else:
        return {"": data}
    if not out:
        raise ValueError("data is empty; give at least one AnnData or SpatialData.")
    if isinstance(data, Mapping) and len(out) < len(data):
        raise ValueError("two keys of the dict are the same as text, such as 1 and '1': rename one.")
    return out


@contextmanager
def named(name: str, argument: str = "data") -> Iterator[None]:
    """Let an error inside say which object of a list or dict it is of: the one that :func:`objects_of` calls ``name``."""
    try:
        yield
    except Exception as error:
        if name:
            error.add_note(f"This is object {name!r} of {argument}.")
        raise


def each_object(verb: Callable[P, R]) -> Callable[P, R]:
    """Let a verb take a list or dict of objects: it runs on each, and returns what it returns in the same form.

    Each object has a folder of its own in ``checkpoint_dir``, where the verb has one. After an error the objects before it keep
    what was written.
    """

    @wraps(verb)
    def run(*args: Any, **arguments: Any) -> Any:
        data = args[0] if args else arguments.get("data")
        if not isinstance(data, list | tuple | Mapping):
            return verb(*args, **arguments)
        rest = args[1:]
        arguments.pop("data", None)
        found, folder = {}, arguments.get("checkpoint_dir")
        for i, (name, one) in enumerate(objects_of(data).items()):
            own = {} if folder is None else {"checkpoint_dir": Path(folder) / f"object_{i}"}
            with named(name):
                found[name] = verb(one, *rest, **arguments | own)
        return None if all(one is None for one in found.values()) else in_form_of(data, found)

    return run


def in_form_of(data: Any, found: dict[str, Any]) -> Any:
    """Results by the name of their object, in the form of ``data``: a dict, a list, or what one object gave."""
    if isinstance(data, Mapping):
        return found
    return list(found.values()) if isinstance(data, list | tuple) else found[""]
