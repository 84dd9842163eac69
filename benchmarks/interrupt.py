"""Is a training that is killed and resumed the training that nobody disturbed?

    python benchmarks/interrupt.py                          # 20 kills of each training, on small simulated tissue
    python benchmarks/interrupt.py --trainings stflow --kills 5
    python benchmarks/interrupt.py --trainings encoding     # features of patches instead of weights

Every training runs in a process of its own with ``checkpoint_dir=`` and ``resume=True``. When its data are ready it is
killed (SIGKILL) after a random time, between nothing and the duration of an undisturbed run, and started again until it ends
by itself. The imputer has no checkpoints: its fit is one pass over the cells.

method   the training
metric   ``kills``; ``runs``: trainings that were killed at least once and came to their end; ``same``: those of them whose
         weights, or features, tissue and stain, have the SHA-256 of an undisturbed run; ``seconds``: what an undisturbed run
         takes
"""

import hashlib
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

import results
import spatiaflow as sf
import spatiaflow.pp._parts
import spatiaflow.train.morphology
import spatiaflow.train.spatia
import spatiaflow.train.stflow
from spatiaflow import train

Training = Callable[..., str]  # keyword arguments of a training, to the SHA-256 of its weights


def stflow() -> Training:
    """Three networks, which stop early."""
    slides = [sf.datasets.simulated_tissue(150, seed=seed) for seed in range(3)]
    sf.pp.encode_patches(slides, image_key="he", patch_um=32)
    config = sf.models.STFlowConfig(width=16, n_heads=2, regions=2, patience=2)
    return lambda **more: sf.tl.train_stflow(slides, config=config, genes=6, max_epochs=8, device="cpu", **more).sha256


def spatia() -> Training:
    """Cells, then niche and tissue."""
    slides = [sf.datasets.simulated_tissue(150, seed=seed) for seed in range(2)]
    sizes = {"crop_pixels": 16, "patch_pixels": 8, "width": 32, "image_layers": 1, "gene_layers": 1}
    config = sf.models.SpatiaConfig(**sizes, anchor_um=40.0, crop_um=12.0, batches_per_epoch=4)
    arguments = {"image_key": "fluorescence", "config": config, "max_epochs": 4, "device": "cpu"}
    return lambda **more: sf.tl.train_spatia(slides, **arguments, **more).sha256


def morphology() -> Training:
    """An autoencoder, then the flow by genes."""
    sdata = sf.datasets.simulated_tissue(1200, seed=1)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    config = sf.models.MorphologyConfig(**SMALL, n_components=20)
    return _morphology(sdata, config=config, validation=0.3, max_epochs=4)


def pairs() -> Training:
    """An autoencoder, then the flow between pairs."""
    sdata = sf.datasets.simulated_tissue(300, seed=1)
    table = sdata["table"]
    x = np.sqrt(table.X.toarray() / table.X.sum(1))[:, :20].astype(np.float32)
    table.obsm["E_cell"] = table.obsm["E_niche"] = table.obsm["E_tissue"] = x
    sf.pp.morphology_profile(sdata, image_key="fluorescence")
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    config = sf.models.MorphologyConfig(objective="pairs", **SMALL, batch_size=16)
    return _morphology(sdata, use_rep="E", config=config, validation=0.2, max_epochs=4)


def _morphology(sdata, **arguments) -> Training:
    train.morphology.MAX_STEPS, train.morphology.MIN_BATCHES = 40, 10  # seconds, not minutes
    return lambda **more: (
        sf.tl.train_morphology(sdata, image_key="fluorescence", **arguments, device="cpu", **more).sha256
    )


def encoding() -> Training:
    """Features of the patches of two slides, written after each batch."""
    slides = [sf.datasets.simulated_tissue(600, seed=seed) for seed in range(2)]
    sf.pp._parts.EVERY = 0

    def run(**more) -> str:
        found = sf.pp.encode_patches(
            slides, image_key="he", patch_um=64, batch_size=16, device="cpu", copy=True, **more
        )
        digest = hashlib.sha256()
        for table in (one["table"] for one in found):
            for values in (table.obsm["X_texture"], table.obs["tissue"], *table.uns["X_texture"]["stain"].values()):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    return run


SMALL = {"crop_um": 16.0, "crop_pixels": 16, "n_latent": 8, "width": 16, "n_layers": 1, "n_neighbors": 4}
TRAININGS: dict[str, Callable[[], Training]] = {
    "stflow": stflow, "spatia": spatia, "morphology": morphology, "pairs": pairs, "encoding": encoding,
}  # fmt: skip


def attempt(prepare: Callable[[], Training], folder: Path, seconds: float = np.inf) -> tuple[str | None, float]:
    """Train in a process of its own, which is killed some seconds after its data are ready.

    Returns the weights' SHA-256, None where it was killed, and the seconds that it had.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:  # this process has done nothing but imports: no thread is missing in its child
        try:
            training = prepare()
            os.write(write, b"ready\n")
            os.write(write, training(checkpoint_dir=folder, resume=True).encode())
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with open(read) as answer:
        answer.readline()
        begin, end = time.monotonic(), time.monotonic() + seconds
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                end = np.inf
            time.sleep(0.001)
        assert ended[1] in (0, signal.SIGKILL), "a training failed that was not killed"
        return answer.read() or None, time.monotonic() - begin


def measure(prepare: Callable[[], Training], kills: int, seed: int) -> dict[str, float]:
    """Kill a training again and again; compare what it comes to with an undisturbed run."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        expected, seconds = attempt(prepare, Path(scratch, "undisturbed"))
        n_kills = n_runs = n_same = 0
        while n_kills < kills:
            folder, found, n_before = Path(scratch, f"run_{n_runs}_{n_kills}"), None, n_kills
            while found is None:
                found, took = attempt(prepare, folder, rng.uniform(0, seconds) if n_kills < kills else np.inf)
                n_kills += found is None
            if n_kills > n_before:
                n_runs, n_same = n_runs + 1, n_same + (found == expected)
            else:  # faster than the first run: the machine is less busy now
                seconds = took
                shutil.rmtree(folder)
    return {"kills": n_kills, "runs": n_runs, "same": n_same, "seconds": seconds}


def parser():
    out = results.parser(__doc__)
    out.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    out.add_argument("--kills", type=int, default=20)
    out.add_argument("--seed", type=int, default=0)
    return out


if __name__ == "__main__":
    arguments = parser().parse_args()
    table = results.Table("interrupt", again=arguments.again)
    sf.settings.progress = False
    for name in arguments.trainings:
        if table.lacks("simulated", "", arguments.seed, name):
            table.add("simulated", "", arguments.seed, name, measure(TRAININGS[name], arguments.kills, arguments.seed))
