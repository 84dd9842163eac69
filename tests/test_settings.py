import os
import subprocess
import sys

import pytest

import spatiaflow as sf


def test_override_restores_even_after_an_error():
    before = sf.settings.seed
    with pytest.raises(RuntimeError), sf.settings.override(seed=7, progress=False):
        assert sf.settings.seed == 7
        raise RuntimeError
    assert sf.settings.seed == before


def test_unknown_or_bad_values_are_refused():
    with pytest.raises(AttributeError, match="sede.*seed"):
        sf.settings.sede = 1
    with pytest.raises(AttributeError, match="sede"):
        with sf.settings.override(sede=1):
            pass
    with pytest.raises(ValueError, match="verbosity"):
        sf.settings.verbosity = "loud"


def test_environment_is_read():
    code = "import spatiaflow as sf; s = sf.settings; print(s.seed, s.progress, s.mirror, s.cache_dir, s.verbosity)"
    environment = {
        "SPATIAFLOW_SEED": "5",
        "SPATIAFLOW_PROGRESS": "0",
        "SPATIAFLOW_MIRROR": "/m",
        "SPATIAFLOW_CACHE_DIR": "/c",
    }

    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["5", "False", "/m", "/c", "info"]
    assert "seed = " in repr(sf.settings)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", "0"])
def test_a_number_of_threads_that_cannot_be_is_refused(value):
    with (
        pytest.raises(ValueError, match="n_threads must be None or a whole number"),
        sf.settings.override(n_threads=value),
    ):
        pass
