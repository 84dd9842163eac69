"""The benchmark of interrupted trainings, and its claim for a training of seconds."""

import dataclasses

import pytest

import interrupt
import spatiaflow as sf
from spatiaflow.models import STFlowConfig


@pytest.mark.slow
def test_a_killed_training_comes_to_the_same_model(slides):
    config = dataclasses.replace(STFlowConfig.of("default"), width=16, n_heads=2, regions=2, patience=1)

    def prepare():
        return lambda **more: (
            sf.tl.train_stflow(slides, config=config, genes=4, max_epochs=4, device="cpu", **more).sha256
        )

    found = interrupt.measure(prepare, kills=2, seed=0)
    assert found["kills"] == 2
    assert found["same"] == found["runs"] >= 1
