"""Names of all slots that the package writes, and the provenance that it writes beside them."""

from __future__ import annotations

import time
from typing import Any

import spatiaflow


class Key:
    """Builds every slot name, as ``Key.obsm.std("stflow")``."""

    class obsm:
        """Slots of ``.obsm``."""

        spatial = "spatial"

        @staticmethod
        def std(key: str) -> str:
            """Standard deviation of the values in a slot."""
            return f"{key}_std"

        @staticmethod
        def rate(key: str) -> str:
            """Share of each gene in the counts of a spot, whatever its depth."""
            return f"{key}_rate"

        @staticmethod
        def level(key: str, level: str) -> str:
            """Embedding of one level of tissue: cell, niche or tissue."""
            return f"{key}_{level}"

        @staticmethod
        def encoder(name: str) -> str:
            """Features of an encoder."""
            return f"X_{name}"

    class obs:
        """Columns of ``.obs``."""

        tissue = "tissue"  # of the patch around a spot the share that is tissue; whatever key_added is

        @staticmethod
        def ood(key: str) -> str:
            """Out-of-domain score."""
            return f"{key}_ood"

        @staticmethod
        def depth(key: str) -> str:
            """Predicted library size."""
            return f"{key}_depth"

        @staticmethod
        def confidence(key: str) -> str:
            """Confidence of a label."""
            return f"{key}_confidence"

    class obsp:
        """Slots of ``.obsp``."""

        @staticmethod
        def attention(key: str) -> str:
            """Weights of the neighbours of each cell."""
            return f"{key}_attention"

        @staticmethod
        def plan(key: str) -> str:
            """Transport plan between cells of two states."""
            return f"{key}_plan"

    class uns:
        """Slots of ``.uns``."""

        spatial = "spatial"

        @staticmethod
        def pairs(key: str) -> str:
            """Table of paired cells."""
            return f"{key}s"

        @staticmethod
        def plan(key: str) -> str:
            """How a transport plan was made."""
            return f"{key}_plan"


def provenance(
    started: float, *, model: Any = None, random_state: int | None = None, **arguments: Any
) -> dict[str, Any]:
    """What ``.uns[key]["params"]`` holds after every verb.

    Parameters
    ----------
    started
        ``time.perf_counter()`` at the beginning of the call.
    model
        The model that was applied; its kind and sha256 are kept.
    random_state
        Seed that was used; None where nothing is random.
    **arguments
        Arguments of the call that are needed to repeat it, and what was found in the data.
    """
    out: dict[str, Any] = {"spatiaflow": spatiaflow.__version__, "seconds": time.perf_counter() - started}
    if model is not None:
        out |= {"model": model.kind, "model_sha256": model.sha256}
    if random_state is not None:
        out["random_state"] = random_state
    return out | arguments
