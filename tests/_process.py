"""What a process has that belongs to its user, and that it is as it was after a block."""

import gc
import hashlib
import logging
import os
import pickle
import random
import signal
import sys
import warnings
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt

from spatiaflow._process import KEPT, pools

LOGGERS = (
    "lightning lightning.pytorch lightning.fabric pytorch_lightning anndata scanpy spatialdata spatialdata._logging"
)
LOGGERS = [None, "spatiaflow", "matplotlib", "torch", "transformers", "py.warnings", *LOGGERS.split()]


def digest(*state) -> str:
    return hashlib.sha256(pickle.dumps(state)).hexdigest()[:8]


def process_state(figures: bool = True) -> dict:
    """All that a call could change; values compare with ``==``."""
    cudnn = torch.backends.cudnn
    state = {
        "random": digest(random.getstate()),
        "numpy random": digest(*np.random.get_state()),  # noqa: NPY002
        "numpy errors": np.geterr(),
        "torch random": digest(torch.get_rng_state().numpy()),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision(),
        ),
        "torch default dtype": torch.get_default_dtype(),
        "torch gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "warnings": [*warnings.filters, warnings.showwarning],
        "matplotlib": dict(mpl.rcParams.copy(), backend=mpl.get_backend()),
        "environment": {name: value for name, value in os.environ.items() if name not in KEPT | {"PYTEST_CURRENT_TEST"}},
        "working directory": os.getcwd(),
        "garbage": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "hooks": (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr),
        "signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)],
    }  # fmt: skip
    state |= {f"threads of {one['filepath']}": one["num_threads"] for one in pools().info()}
    for name in LOGGERS:  # those that exist; a library that is first imported makes its own
        one = logging.root if name is None else logging.root.manager.loggerDict.get(name)
        if isinstance(one, logging.Logger):
            handlers = [(h, h.level) for h in one.handlers if not type(h).__module__.startswith("_pytest")]
            state[f"logger {name or 'root'}"] = one.level, handlers, one.propagate, one.disabled, list(one.filters)
    if figures:
        state["figures"] = plt.get_fignums()
    return state


@contextmanager
def process_is_left(figures: bool = True):
    """Fail when the block changes the process."""
    before = process_state(figures)
    try:
        yield
    finally:
        after = process_state(figures)
        changed = {name: (value, after[name]) for name, value in before.items() if after[name] != value}
        assert not changed, changed
