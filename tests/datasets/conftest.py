"""A cache of its own for each file of tests."""

import pytest

import spatiaflow as sf


@pytest.fixture(scope="module")
def cache(mirror, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with sf.settings.override(mirror=str(mirror), cache_dir=folder, progress=False, verbosity="warning"):
        yield folder


@pytest.fixture(scope="module")
def cortex(cache):
    return sf.datasets.starmap_mpfc()
