"""One cache for all files of tests, so that each dataset is assembled once."""

import pytest

import spatiaflow as sf


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache(mirror, cache_dir):
    with sf.settings.override(mirror=str(mirror), cache_dir=cache_dir, progress=False, verbosity="warning"):
        yield cache_dir


@pytest.fixture(scope="module")
def cortex(cache):
    return sf.datasets.starmap_mpfc()


@pytest.fixture(scope="module")
def xenium(cache):
    return sf.datasets.xenium_pancreas()


@pytest.fixture(scope="module")
def merfish(cache):
    return sf.datasets.merfish_mouse_brain()
