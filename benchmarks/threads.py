"""How much slower is work on the CPU while another process keeps one core busy, by the number of threads of torch?

    python benchmarks/threads.py                  # all of it: 4 minutes on two cores that nobody else uses
    python benchmarks/threads.py --only STFlow    # what has this in its name

Each kind of work is measured at each number of threads, alone and beside a process that counts in a loop. The four or more
conditions take turns in every round, so that what else the machine does meets all of them. Values are medians over rounds.
``cores used by others`` is the processor time that other processes took meanwhile. A measurement during which that is more
than ``--quiet`` cores is repeated for up to ``--patience`` seconds, and the quietest counts.

Trainings are steps of the real modules on the batches of the real data sets, without Lightning's share. The ratio of steps is
the ratio of epochs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import anndata as ad
import numpy as np
import torch

import results
import spatiaflow as sf
from spatiaflow._process import threads
from spatiaflow.train import morphology as morphology_training
from spatiaflow.train import spatia as spatia_training
from spatiaflow.train import stflow as stflow_training
from speed import lattice

IMAGE = {"image_key": "fluorescence"}
ALONE, BESIDE = "alone", "beside a busy core"


# ---- work: a function, called over and over ----------------------------------------------------------------------


class Captured(Exception):
    """What a training was about to fit."""


def steps(training, verb: Callable) -> Callable:
    """Training steps of the network that a verb would fit."""

    def capture(module, batches, *_, **__):
        raise Captured(module, batches)

    try:
        with mock.patch.object(training, "fit", capture):
            verb()
    except Captured as captured:
        module, batches = captured.args
    module.log = module.log_dict = lambda *_, **__: None
    optimizer, number = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True), iter(range(10**9))

    def step():
        i = next(number) % len(batches)
        optimizer.zero_grad()
        module.training_step(batches[i], i).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    module.train()
    return step


def spots(n: int, seed: int) -> ad.AnnData:
    """Spots with 1,024 random features and counts of 50 genes."""
    rng = np.random.default_rng(seed)
    table = ad.AnnData(rng.poisson(2.0, (n, 50)).astype(np.float32))
    table.obs_names = [f"{seed}_{i}" for i in range(n)]
    table.obsm["spatial"], table.obsm["X_f"] = lattice(n, seed), rng.normal(size=(n, 1024)).astype(np.float32)
    return table


def cells(n: int = 400):
    """A simulated slide with embeddings, morphology and pairs of cells."""
    sdata = sf.datasets.simulated_tissue(n, seed=1)
    rng = np.random.default_rng(0)
    for level in ("cell", "niche", "tissue"):
        sdata["table"].obsm[f"E_{level}"] = rng.normal(size=(n, 16)).astype(np.float32)
    sf.pp.morphology_profile(sdata, **IMAGE)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    return sdata


def work() -> dict[str, Callable[[], Callable]]:
    """Name of the work and what makes it."""
    where = {"use_rep": "X_f", "mpp": 1.0}
    slides, sdata, config = [spots(180, i) for i in range(3)], cells(), sf.models.STFlowConfig.of("paper")

    def train_stflow(config):
        return lambda: sf.tl.train_stflow(slides, genes=50, config=config, **where)

    def train_morphology(**options):
        config = sf.models.MorphologyConfig(objective="pairs", crop_um=16.0, crop_pixels=16, n_latent=16, **options)
        return sf.tl.train_morphology(sdata, use_rep="E", config=config, validation=0.2, max_epochs=1, **IMAGE)

    def predict():
        with mock.patch.object(stflow_training, "fit", lambda module, *_, **__: None):
            model, query = sf.tl.train_stflow(slides, genes=50, config=config, **where), spots(900, 9)
        return lambda: sf.tl.predict_expression(query, model=model, random_state=0, **where)

    def generate():
        with mock.patch.object(morphology_training, "fit", lambda module, *_, **__: None):
            model = train_morphology()
        return lambda: sf.tl.generate_morphology(sdata, source="A", target="B", model=model, **IMAGE)

    def large_encoder():
        from transformers import ViTConfig, ViTModel

        network, patches = ViTModel(ViTConfig()).eval(), torch.randn(4, 3, 224, 224)

        @torch.inference_mode()
        def encode():
            with threads():
                network(patches)

        return encode

    return {
        "STFlow default, training": lambda: steps(stflow_training, train_stflow("default")),
        "STFlow paper, training": lambda: steps(stflow_training, train_stflow("paper")),
        "SPATIA, training": lambda: steps(spatia_training, lambda: sf.tl.train_spatia(sdata, **IMAGE)),
        "morphology, training": lambda: steps(morphology_training, train_morphology),
        "predict_expression, 900 spots": lambda: predict(),
        "embed_spatia, 400 cells": lambda: lambda: sf.tl.embed_spatia(sdata, modalities="image", **IMAGE),
        "generate_morphology": lambda: generate(),
        "encode_patches, texture": lambda: lambda: sf.pp.encode_patches(sdata, image_key="he", patch_um=32.0),
        "ViT-B/16, 4 patches": large_encoder,
    }


# ---- measurement -------------------------------------------------------------------------------------------------


@contextmanager
def counting():
    """A process that counts in a loop; it stands still until it is told to go on."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def processor_seconds(pid: int | None = None) -> float:
    """Processor time of all processes, time that the host kept from this machine included, or of one process."""
    if pid is None:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *more = (int(v) for v in file.readline().split()[1:9])
        ticks = user + nice + system + sum(more)
    else:
        with open(f"/proc/{pid}/stat") as file:
            ticks = sum(int(v) for v in file.read().rsplit(")", 1)[1].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def sample(call: Callable, seconds: float, busy: int) -> tuple[float, float]:
    """Seconds of a call, over so many calls as fit, and cores that other processes used."""

    def others():
        return processor_seconds() - processor_seconds(os.getpid()) - processor_seconds(busy)

    used, started, n = others(), time.perf_counter(), 0
    while n == 0 or time.perf_counter() - started < seconds:
        call()
        n += 1
    passed = time.perf_counter() - started
    return passed / n, max(0.0, (others() - used) / passed)


def measure(name: str, call: Callable, a, table: results.Table) -> None:
    call()  # what is made at the first call
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    with counting() as process:
        for _ in range(a.rounds):
            for n in a.threads:
                for how in (ALONE, BESIDE):
                    process.send_signal(signal.SIGCONT if how == BESIDE else signal.SIGSTOP)
                    tries, started = [], time.perf_counter()
                    with sf.settings.override(n_threads=n), threads():
                        torch.ones(10**6).sum()  # threads start
                        while not tries or (tries[-1][1] > a.quiet and time.perf_counter() - started < a.patience):
                            tries.append(sample(call, a.seconds, process.pid))
                    found.setdefault((n, how), []).append(min(tries, key=lambda one: one[1]))
    for (n, how), values in found.items():
        seconds, others = np.median(values, 0)
        scores = {"seconds": seconds, "cores used by others": round(others, 3)}
        if how == BESIDE:
            scores["times as long as alone"] = seconds / np.median(found[n, ALONE], 0)[0]
        table.add(name, f"{n} thread{'s' * (n > 1)}", "", how, scores)


def parser():
    out = results.parser(__doc__)
    out.add_argument("--only", default="")
    out.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    out.add_argument("--rounds", type=int, default=5)
    out.add_argument("--seconds", type=float, default=0.5, help="of a measurement")
    out.add_argument("--quiet", type=float, default=0.15, help="cores that others may use")
    out.add_argument("--patience", type=float, default=20.0)
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    sf.settings.progress, sf.settings.verbosity = False, "error"
    table = results.Table("threads", again=a.again)
    for name, make in work().items():
        splits = [f"{n} thread{'s' * (n > 1)}" for n in a.threads]
        if a.only in name and any(table.lacks(name, split, "", [ALONE, BESIDE]) for split in splits):
            measure(name, make(), a, table)
