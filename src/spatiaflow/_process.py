"""The user's process: what the package changes while it works, and puts back."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

from spatiaflow._settings import settings

_pools: tuple[int, ThreadpoolController] | None = None  # and how many modules there were when they were found

P = ParamSpec("P")
R = TypeVar("R")

# What must stay. scikit-learn sets KMP_*: without them two OpenMP libraries cannot be in one process. Lightning sets the others
# for a training on several devices: its processes outlive the call, and find each other again at the next training.
KEPT = {
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
}


@contextmanager
def unchanged() -> Iterator[None]:
    """Put back what libraries change when they are imported or run: random states, filters of warnings, environment.

    After an error, figures that the block opened are closed.
    """
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    figures = _figures()
    with ExitStack() as after:
        after.callback(_restore_filters, list(warnings.filters))
        after.callback(_restore_environment, dict(os.environ))
        after.callback(random.setstate, random.getstate())
        if numpy is not None:
            after.callback(numpy.random.set_state, numpy.random.get_state())
        if torch is not None:
            after.callback(torch.set_rng_state, torch.get_rng_state())
        try:
            yield
        except BaseException:
            for number in _figures() - figures:
                sys.modules["matplotlib.pyplot"].close(number)
            raise


@contextmanager
def threads(large: bool = False) -> Iterator[None]:
    """Give torch, BLAS and OpenMP the number of threads of :attr:`Settings.n_threads`, as far as they are loaded.

    Each operation of a ``large`` network takes much longer than its threads wait for each other, so it may have more of them.
    """
    n = _n_threads(large)
    with ExitStack() as after:
        if torch := sys.modules.get("torch"):
            after.callback(torch.set_num_threads, torch.get_num_threads())
        after.enter_context(pools().limit(limits=n))
        if torch:
            torch.set_num_threads(n)
        yield


def pools() -> ThreadpoolController:
    """The libraries with threads of their own. To find them takes longer than a small verb, and only an import loads more."""
    global _pools
    if _pools is None or _pools[0] != len(sys.modules):
        _pools = len(sys.modules), ThreadpoolController()
    return _pools[1]


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Let a public function run on the chosen number of threads, and leave the process as it was."""

    @wraps(function)
    def run(*args: Any, **arguments: Any) -> R:
        with unchanged(), threads():
            return function(*args, **arguments)

    return run


def _n_threads(large: bool) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number a nesting level
    if settings.n_threads or (given.isdecimal() and int(given)):
        return settings.n_threads or int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1) if large else 1


def _figures() -> set[int]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return set(pyplot.get_fignums()) if pyplot else set()


def _restore_filters(before: list) -> None:
    # not catch_warnings: with it Python forgets which warnings were shown, and shows them again after each call
    if warnings.filters != before:
        warnings.filters[:] = before  # type: ignore[index]


def _restore_environment(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before) - KEPT:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value and name not in KEPT:
            os.environ[name] = value
