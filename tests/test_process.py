"""What a verb may do to the process while it runs, and that nothing of it stays."""

import os
import random
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

import spatiaflow as sf
from _process import process_is_left
from spatiaflow._process import pools, threads, unchanged, verb


@verb
def rude(error: bool = False):
    random.random()
    np.random.random()  # noqa: NPY002
    torch.rand(1)
    warnings.simplefilter("ignore")
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("HOME", None)
    torch.set_num_threads(3)
    if error:
        plt.figure()
        raise RuntimeError


def test_a_verb_leaves_the_process_as_it_was():
    with process_is_left():
        rude()


def test_so_does_a_verb_that_raises():
    with process_is_left(), pytest.raises(RuntimeError):
        rude(error=True)


def test_what_a_training_on_several_devices_needs_stays(monkeypatch):
    """Without it the second training of a script would start its processes again, beside those of the first."""
    monkeypatch.setenv("LOCAL_RANK", "")  # so that it is as before after the test
    verb(lambda: os.environ.update(LOCAL_RANK="0"))()
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_leak_is_seen():
    """The check of every test of a verb would fail."""
    with unchanged(), pytest.raises(AssertionError, match="torch random"), process_is_left():
        torch.rand(1)


def test_warnings_that_were_shown_are_not_shown_again():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            verb(int)()
            warnings.warn("once", stacklevel=1)
    assert len(shown) == 1


def output(code: str, **environment: str) -> str:
    """What some code prints in an interpreter of its own; a variable is left out where it is empty."""
    environment = {k: v for k, v in (os.environ | environment).items() if v}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


NAMESPACES = ("datasets", "get", "metrics", "pl", "pp", "tl")


@pytest.mark.parametrize("how", ["import spatiaflow.{0}", "import spatiaflow as sf; sf.models.STFlow, sf.models.load"])
def test_imports_leave_the_process_as_it_was(how):
    code = "import os, random, warnings; before = list(warnings.filters), dict(os.environ), random.getstate();"
    code += ";".join(how.format(name) for name in NAMESPACES) + "\n"
    code += "import spatiaflow._process as p; environment = {k: v for k, v in os.environ.items() if k not in p.KEPT}\n"
    code += "print(before == (list(warnings.filters), environment, random.getstate()))"
    assert output(code, KMP_DUPLICATE_LIB_OK="", KMP_INIT_AT_FORK="").split() == ["True"]


SHOW = "import torch; from spatiaflow._process import threads\nwith threads(): print(torch.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"OMP_NUM_THREADS": ""}, "1"),
        ({"OMP_NUM_THREADS": "2"}, "2"),
        ({"OMP_NUM_THREADS": "2,1"}, "2"),
        ({"OMP_NUM_THREADS": "2", "SPATIAFLOW_N_THREADS": "3"}, "3"),
    ],
)
def test_number_of_threads(environment, found):
    assert output(SHOW, **environment).split() == [found]


def test_a_large_network_leaves_one_core_to_others():
    show = (
        f"import os; os.sched_getaffinity = lambda _: range(16)\n{SHOW.replace('threads():', 'threads(large=True):')}"
    )
    assert output(show, OMP_NUM_THREADS="").split() == ["15"]
    assert output(show, OMP_NUM_THREADS="2").split() == ["2"]


def test_the_number_of_threads_is_set_for_the_block_only():
    with process_is_left(), sf.settings.override(n_threads=2), pytest.raises(RuntimeError), threads():
        assert torch.get_num_threads() == 2
        assert {one["num_threads"] for one in threadpool_info()} == {2}
        raise RuntimeError


def test_libraries_are_looked_for_again_after_an_import_only():
    assert pools() is pools()
    code = (
        "import numpy; from spatiaflow._process import threads\n"
        "with threads(): pass\n"
        "import sklearn.cluster; from threadpoolctl import threadpool_info\n"  # brings an OpenMP
        "with threads(): print({one['user_api']: one['num_threads'] for one in threadpool_info()}['openmp'])\n"
    )
    assert output(code, OMP_NUM_THREADS="", SPATIAFLOW_N_THREADS="3").split() == ["3"]


def test_numba_does_not_lift_the_limit_of_threads():
    code = (
        "import numba, numpy, torch\n"
        "numba.config.THREADING_LAYER = 'omp'\n"
        "double = numba.njit(parallel=True)(lambda a: a + a)\n"
        "torch.ones(2), double(numpy.ones(10**5))\n"
        "print(torch.get_num_threads())\n"
    )
    assert output(code + SHOW, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="2").split() == ["2", "1"]
