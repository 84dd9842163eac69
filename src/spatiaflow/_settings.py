"""Settings, logging and progress bars. The only place that reads the environment variables ``SPATIAFLOW_*``."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

logger = logging.getLogger("spatiaflow")

_PACKAGE = str(Path(__file__).parent) + os.sep
_LEVELS = ("debug", "info", "warning", "error")


def _default_cache() -> Path:
    import pooch

    return Path(pooch.os_cache("spatiaflow"))


@dataclass
class Settings:
    """Settings shared by all verbs. Assign to an attribute to change it, or use :meth:`override` in a ``with`` block.

    On import each attribute is read from the environment variable ``SPATIAFLOW_<NAME>``, if it is set.

    Attributes
    ----------
    device
        Device that models run on: ``"auto"`` (CUDA, then MPS, then CPU), or a name that :class:`torch.device` takes.
    seed
        Seed of every verb whose ``random_state`` is None.
    cache_dir
        Folder of downloaded files.
    mirror
        Folder or base URL with files at ``<dataset>/<file>``. It is tried before the public address. Hashes are checked
        in both cases.
    progress
        Show progress: a bar in a terminal or notebook, elsewhere (in a log) a line at each tenth.
    n_threads
        Threads of torch, BLAS and OpenMP on the CPU while a function of the package runs; before and after it they have their
        own numbers. None: the number in the environment variable ``OMP_NUM_THREADS`` where it is set. Where it is not, 1, and
        for a published encoder of patches all cores but one. Threads wait for each other in a loop, so small operations on as
        many threads as cores take many times as long while any other process is busy. A number that was set by
        ``torch.set_num_threads`` does not count: assign to ``n_threads`` instead.
    verbosity
        ``"debug"``, ``"info"``, ``"warning"`` or ``"error"``.

    Examples
    --------
    >>> with sf.settings.override(seed=1):
    ...     sf.settings.seed
    1
    >>> sf.settings.seed
    0
    """

    device: str = "auto"
    seed: int = 0
    cache_dir: Path = field(default_factory=_default_cache)
    mirror: str | None = None
    progress: bool = True
    n_threads: int | None = None
    verbosity: str = "info"

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            raise AttributeError(f"settings has no {name!r}; it has {', '.join(_FIELDS)}")
        object.__setattr__(self, name, _parse(name, value))
        if name == "verbosity" and logging.getLevelName(logger.level) != (level := self.verbosity.upper()):
            logger.setLevel(level)  # forgets what every logger of the process has found out about its level

    @contextmanager
    def override(self, **values: Any) -> Iterator[Settings]:
        """Change attributes inside a ``with`` block and restore them after it.

        Parameters
        ----------
        **values
            Attributes and their values for the block.
        """
        before = {name: getattr(self, name) for name in fields_of(values)}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            yield self
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def torch_device(self, device: str | None = None) -> torch.device:
        """Return the :class:`torch.device` that a verb runs on.

        Parameters
        ----------
        device
            The verb's own ``device`` argument; None takes :attr:`device`.

        Raises
        ------
        ValueError
            This machine has no such device.
        """
        import torch

        name = str(device or self.device)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            found = torch.device(name)
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device {name!r} cannot be used here ({str(error).splitlines()[0]}). Use device='cpu', or 'auto' for the "
                "best device of this machine."
            ) from error
        return found

    def __repr__(self) -> str:
        return "\n".join(["spatiaflow settings", *(f"  {name} = {value!r}" for name, value in asdict(self).items())])


_FIELDS = tuple(f.name for f in fields(Settings))


def fields_of(values: dict[str, Any]) -> list[str]:
    """Check that every key names a setting."""
    for name in values:
        if name not in _FIELDS:
            raise AttributeError(f"settings has no {name!r}; it has {', '.join(_FIELDS)}")
    return list(values)


def _parse(name: str, value: Any) -> Any:
    if name == "seed":
        return int(value)
    if name == "cache_dir":
        return Path(value).expanduser()
    if name == "mirror":
        return str(value) if value else None
    if name == "progress":
        if isinstance(value, str):
            if value.lower() not in ("0", "1", "true", "false", "yes", "no", "on", "off"):
                raise ValueError(f"settings.progress must be true or false, not {value!r}.")
            return value.lower() in ("1", "true", "yes", "on")
        return bool(value)
    if name == "n_threads":
        return None if value is None or str(value).lower() in ("", "none") else _at_least_one(value)
    if name == "verbosity":
        if str(value).lower() not in _LEVELS:
            raise ValueError(f"settings.verbosity must be one of {', '.join(_LEVELS)}, not {value!r}.")
        return str(value).lower()
    return str(value)


def _at_least_one(value: Any) -> int:
    text = str(value).strip()
    if not (isinstance(value, str | Integral) and text.isdecimal() and int(text) >= 1):  # True has no digits
        raise ValueError(f"settings.n_threads must be None or a whole number of at least 1, not {value!r}.")
    return int(text)


def _from_environment() -> Settings:
    found: dict[str, Any] = {
        name: os.environ[f"SPATIAFLOW_{name.upper()}"] for name in _FIELDS if f"SPATIAFLOW_{name.upper()}" in os.environ
    }
    return Settings(**found)


if not logger.handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.addHandler(_handler)
    logger.propagate = False

settings = _from_environment()


def resolve_seed(random_state: int | None) -> int:
    """Return the seed a verb uses: its ``random_state``, or :attr:`Settings.seed` when that is None."""
    seed = settings.seed if random_state is None else random_state
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"random_state must be a whole number that is not negative, not {seed!r}.")
    return int(seed)


def warn(message: str) -> None:
    """Warn at the line of the user that called the package, however deep in the package this is said."""
    frame = found = sys._getframe(1)
    while frame.f_back is not None:
        frame, inside = frame.f_back, frame.f_code.co_filename.startswith(_PACKAGE)
        found = frame if inside else found
    registry = found.f_globals.setdefault("__warningregistry__", {})
    module = found.f_globals.get("__name__", "__main__")
    warnings.warn_explicit(message, UserWarning, found.f_code.co_filename, found.f_lineno, module, registry)


def progress(
    iterable: Iterable | None, description: str, total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm | Lines:
    """Show how far work has come, if :attr:`Settings.progress` says so: a bar where it can move, lines elsewhere.

    ``initial`` were done before; the rate and the time left are of the others.
    """
    if settings.progress and not _can_move():
        return Lines(iterable, description, total, unit, initial)
    with warnings.catch_warnings():  # a notebook without ipywidgets gets the text bar, without a warning
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm(
        iterable, desc=description, total=total, unit=unit, initial=initial, disable=not settings.progress, leave=False
    )


def _can_move() -> bool:
    """Whether stderr is a terminal or a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return (shell is not None and "IPKernelApp" in shell.config) or (sys.stderr is not None and sys.stderr.isatty())


class Lines:
    """Progress in a log: a line on stderr at each tenth. What the package uses of ``tqdm``."""

    def __init__(self, iterable: Iterable | None, description: str, total: int | None, unit: str, initial: int = 0):
        self.iterable, self.description, self.unit = iterable, description, unit
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n, self.initial, self.values, self.started = initial, initial, "", time.monotonic()
        self.tenth = 10 * initial // self.total if self.total else 0

    def __iter__(self) -> Iterator:
        with self:
            for one in self.iterable or ():
                yield one
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def set_postfix(self, values: dict[str, str]) -> None:
        """Values to show in the next line."""
        self.values = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.n += n
        if self.total and 10 * self.n // self.total > self.tenth:
            self.tenth = 10 * self.n // self.total
            rate = (self.n - self.initial) / max(time.monotonic() - self.started, 1e-6)
            left = f", {rate:,.{1 if rate < 10 else 0}f} {self.unit}/s, {(self.total - self.n) / rate:,.0f} s left"
            self._write(f"{100 * self.n // self.total} %", left if self.n < self.total else "")

    def close(self) -> None:
        """Say where it ended, if not at the end."""
        if self.total and self.initial < self.n < self.total:
            self._write("ended")
            self.n = self.initial

    def _write(self, text: str, left: str = "") -> None:
        seconds = f"{time.monotonic() - self.started:.0f} s"
        line = f"{self.description}: {text}, {self.unit} {self.n:,} of {self.total:,}, {seconds}{left}{self.values}"
        print(line, file=sys.stderr, flush=True)
