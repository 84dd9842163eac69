"""What the figures are drawn from, and no figure left open."""

import matplotlib.pyplot as plt
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def predicted(slide):
    """A slide with a planted prediction: the truth plus noise of the stated size."""
    adata = slide("t", seed=5)
    genes = [f"G{g}" for g in range(12)]
    counts = adata.X.toarray()
    truth = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    rng = np.random.default_rng(0)
    std = rng.uniform(0.2, 1.0, truth.shape)
    adata.obsm["stflow"] = (truth + std * rng.standard_normal(truth.shape)).astype(np.float32)
    adata.obsm["stflow_std"] = std.astype(np.float32)
    adata.uns["stflow"] = {"genes": genes, "trusted": np.arange(12) < 9, "normalization": {"target_sum": 1e4}}
    return adata


@pytest.fixture(scope="session")
def tissue():
    """Cells with their morphology; do not write into it."""
    import spatiaflow as sf

    with sf.settings.override(progress=False, verbosity="warning"):
        sdata = sf.datasets.simulated_tissue(200, seed=0)
        sf.pp.morphology_profile(sdata, image_key="fluorescence")
    return sdata
