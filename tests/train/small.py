"""A small STFlow."""

from dataclasses import replace

from spatiaflow.models import STFlowConfig

FAST = replace(STFlowConfig.of("default"), width=16, n_heads=2, max_epochs=3, regions=2)
