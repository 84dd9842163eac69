"""A tiny STFlow for tests that need no good one."""

import dataclasses

import pytest

import spatiaflow as sf
from spatiaflow.models import STFlowConfig

FAST = dataclasses.replace(STFlowConfig.of("default"), width=16, n_heads=2, max_epochs=2, regions=2)


@pytest.fixture(scope="session")
def quick(slide):
    """Trained once on two small slides; do not write into it."""
    with sf.settings.override(progress=False, verbosity="error"):
        slides = [slide(f"s{i}", n=10, seed=i) for i in range(2)]
        return sf.tl.train_stflow(slides, genes=12, config=FAST, random_state=0)
