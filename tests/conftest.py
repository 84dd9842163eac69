"""Small tissue that every test can afford, and settings that leave no trace."""

import inspect
import os
from contextlib import nullcontext
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import sparse
from threadpoolctl import threadpool_limits

from _process import process_is_left

TESTS = Path(__file__).parent
matplotlib.use("Agg")
MIRROR = Path(os.environ.get("SPATIAFLOW_MIRROR", Path(__file__).parents[2] / "shared" / "data" / "mirror"))
VENDOR = MIRROR.parent / "vendor"


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, then those that train, so that no process is left with one while the other is idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name not in ("tl", "train")))


def pytest_terminal_summary(terminalreporter):
    """Say how many of the tests that ran are slow ones."""
    ran = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "keywords")]
    called = [report for report in ran if getattr(report, "when", "") == "call"]
    slow = sum("slow" in report.keywords for report in called)
    terminalreporter.write_line(f"{len(called)} tests ran, {slow} of them slow")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Libraries of other tests raise the number of threads, and threads that wait for each other are many times slower."""
    with threadpool_limits(1):
        torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True, scope="module")
def figures_are_closed():
    """Figures that tests of ``pl`` leave open are not those of the next module."""
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def process(request):
    """No verb changes the process of its user, also not one that raises."""
    with watched(request.path):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Neither do verbs in what tests share, which is made before ``process``."""
    function = inspect.unwrap(fixturedef.func)
    path = Path(function.__code__.co_filename) if inspect.isfunction(function) else Path()
    shared = fixturedef.scope != "function" and not inspect.isgeneratorfunction(function)
    with watched(path) if shared and TESTS in path.parents else nullcontext():
        return (yield)


def watched(path):
    """What tests and fixtures with verbs run in. A figure stays open for its user, so tests of figures may leave some."""
    folder = path.relative_to(TESTS).parts[0]
    if folder not in ("conftest.py", "datasets", "get", "metrics", "pl", "pp", "tl", "train"):
        return nullcontext()
    return process_is_left(figures=folder != "pl")


@pytest.fixture
def own_draws():
    """For tests that themselves make networks or noise, outside of any verb."""
    with torch.random.fork_rng():
        yield


@pytest.fixture(autouse=True)
def quiet():
    from spatiaflow import settings

    with settings.override(progress=False, verbosity="warning"):
        yield


@pytest.fixture(scope="session")
def mirror():
    """Folder with the public raw files; tests on real tissue are skipped where it is absent."""
    if not MIRROR.is_dir():
        pytest.skip(f"no mirror of the public files at {MIRROR}; set SPATIAFLOW_MIRROR to run this test")
    return MIRROR


@pytest.fixture(scope="session")
def vendor():
    """Folder with small folders as instruments write them; tests of readers are skipped where it is absent."""
    if not VENDOR.is_dir():
        pytest.skip(f"no folders of instruments at {VENDOR}; it is looked for beside SPATIAFLOW_MIRROR")
    return VENDOR


def make_slide(name="s0", n=12, seed=0, n_genes=12, pitch=200.0, mpp=0.5):
    """Spots on a square array of n x n; genes 0-5 follow the features, 6-8 the neighbours' features, 9-11 nothing."""
    rng = np.random.default_rng(seed)
    i, j = np.meshgrid(np.arange(n), np.arange(n))
    xy = np.stack([i, j], -1).reshape(-1, 2) * pitch + rng.normal(0, 0.02 * pitch, (n * n, 2))
    x = rng.normal(size=(n * n, 8)).astype(np.float32)
    relation = np.random.default_rng(99).normal(size=(8, n_genes))
    field = np.sin(xy[:, :1] / 500) + np.cos(xy[:, 1:] / 400)
    x[:, :2] += field
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    around = (distance < 1.6 * pitch) @ x / (distance < 1.6 * pitch).sum(1, keepdims=True)
    signal = np.concatenate(
        [(x @ relation)[:, :6], 2 * (around @ relation)[:, 6:9], 0 * field * np.ones((1, n_genes - 9))], 1
    )
    rate = np.exp(0.4 * signal + np.linspace(-1, 1, n_genes))
    library = rng.lognormal(0, 0.3, (n * n, 1))
    counts = rng.poisson(rng.gamma(5, rate * library * 5 / 5))
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(index=[f"{name}_{k}" for k in range(n * n)]),
        var=pd.DataFrame(index=[f"G{g}" for g in range(n_genes)]),
    )
    adata.obsm["spatial"] = xy / mpp
    adata.obsm["X_texture"] = x
    adata.uns["X_texture"] = {
        "id": "texture", "sha256": "", "mpp": 0.5, "patch_um": 112.0, "standardize": False, "n_features": 8,
    }  # fmt: skip
    scale = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 100 / mpp}
    image = np.full((int(xy[:, 1].max() / mpp * 0.1) + 40, int(xy[:, 0].max() / mpp * 0.1) + 40, 3), 230, np.uint8)
    adata.uns["spatial"] = {
        name: {"images": {"hires": image}, "scalefactors": scale, "metadata": {"microns_per_pixel": mpp}}
    }
    return adata


@pytest.fixture(scope="session")
def slide():
    """Factory of simulated spot arrays."""
    return make_slide


@pytest.fixture(scope="session")
def slides():
    """Three training slides; do not write into them."""
    return [make_slide(f"s{i}", seed=i) for i in range(3)]


@pytest.fixture(scope="session")
def model(slides):
    """A small STFlow, trained once."""
    import spatiaflow as sf

    with sf.settings.override(progress=False, verbosity="warning"):
        return sf.tl.train_stflow(slides, genes=12, max_epochs=12)


@pytest.fixture
def some_conditions():
    """Factory of conditions that the network takes."""
    import torch

    from spatiaflow.models.conditions import Conditions

    def make(n, seed=0):
        g = torch.Generator().manual_seed(seed)
        vectors = (torch.randn(n, 6, generator=g) for _ in range(3))
        return Conditions(
            *vectors, torch.randn(n, 3, 8, generator=g), torch.arange(n) % 2, torch.randn(n, 5, generator=g),
            torch.randn(n, 1, generator=g), torch.zeros(n, dtype=torch.long),
        )  # fmt: skip

    return make


@pytest.fixture
def network():
    """A small generator of morphology, not trained, whose every part matters."""
    import torch

    from spatiaflow.models.morphology import MorphologyConfig, MorphologyNetwork

    config = MorphologyConfig(
        ["dapi", "rna"], ["A -> B", "A -> C"], ["area"], crop_pixels=16, n_embedding=6, n_genes=5, n_neighbors=3, n_latent=4,
        width=32, n_layers=2, objective="pairs",
    )  # fmt: skip
    torch.manual_seed(0)
    network = MorphologyNetwork(config).eval()
    for p in network.parameters():  # what starts at zero would hide its part
        torch.nn.init.normal_(p, std=0.1)
    return network
