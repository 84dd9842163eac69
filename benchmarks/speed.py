"""How fast and how large: the paper preset at 1,024 features and 50 genes.

python benchmarks/speed.py                       # one training epoch; prediction at three sizes; attention against a gather
python benchmarks/speed.py --spots 1000000       # one size
"""

import argparse
import subprocess
import sys
import time

import numpy as np
import torch

import results
from spatiaflow.models.counts import ScalarZINB
from spatiaflow.models.denoiser import Denoiser, SlideTokens
from spatiaflow.models.flow import schedule
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import LocalAttention, frames, spatial_graph
from spatiaflow.models.stflow import STFlowConfig
from spatiaflow.train.batches import Regions
from spatiaflow.train.stflow import FlowMatching

PAPER = STFlowConfig.of("paper")


def lattice(n: int, seed: int = 0) -> np.ndarray:
    side = int(np.ceil(np.sqrt(n)))
    xy = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)[:n] * 100.0
    return xy + np.random.default_rng(seed).normal(0, 3, xy.shape)


def epoch(repeats: int = 4) -> list[float]:
    """Seconds of training epochs: 900 spots in 5 sections, 10 regions a section, 2 a batch; without Lightning's share."""
    rng = np.random.default_rng(0)
    slides = [
        Slide(str(s), np.arange(180), lattice(180, s), features=rng.normal(size=(180, 1024)).astype(np.float32))
        for s in range(5)
    ]
    expression = [rng.random((180, 50)).astype(np.float32) for _ in slides]
    module = FlowMatching(Denoiser(PAPER.denoiser(1024, 50)), PAPER, np.ones(50)).train()
    module.log = lambda *args, **kwargs: None
    data = Regions(slides, expression, None, PAPER, ScalarZINB(), 0)
    optimizer, seconds = module.configure_optimizers(), []
    for number in range(repeats):
        data.epoch, started = number, time.perf_counter()
        for b in range(len(data)):
            optimizer.zero_grad()
            module.training_step(data[b], b).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def predict(n: int, n_steps: int = 5) -> tuple[float, float]:
    """Seconds and peak memory (GB, the whole process with its input) of one prediction of a slide."""
    torch.manual_seed(0)
    network = Denoiser(PAPER.denoiser(1024, 50)).eval()
    rng, xy = np.random.default_rng(0), lattice(n)
    x = rng.standard_normal((n, 1024), dtype=np.float32)
    started = time.perf_counter()
    tokens = SlideTokens(x, xy, np.zeros((n, 50), np.float32), [network], ScalarZINB(), False, "cpu", 512)
    tokens.run(rng, schedule(n_steps))
    return time.perf_counter() - started, results.peak_gb()


def attention_ratio(n: int = 4000, repeats: int = 5) -> tuple[float, float]:
    """Largest difference to, and speed over, attention that gathers and concatenates [q_i, k_j, e_ij, y_j - y_i]."""
    torch.manual_seed(0)
    module = LocalAttention(128, 4, 3, 50).eval()
    graph = spatial_graph(lattice(n), 8, ties="cut")
    h, y, edges = torch.randn(n, 128), torch.rand(n, 50), frames(graph)

    def naive():
        q, k, v = module.qkv(module.norm(h)).view(n, 3, 4, 32).unbind(1)
        e = module.edge(edges).mean(2).view(n, 8, 4, 32)
        difference = (y[graph.index] - y[:, None])[:, :, None].expand(-1, -1, 4, -1)
        logit = module.score(torch.cat([q[:, None].expand(-1, 8, -1, -1), k[graph.index], e, difference], -1))
        weight = logit.softmax(1)
        return torch.cat([(weight * v[graph.index]).sum(1).flatten(1), (weight * e).sum(1).flatten(1)], 1)

    def ours():
        out = torch.empty(n, 256)
        key, value = module.keys(h, y)
        for s in range(0, n, 256):
            p = slice(s, s + 256)
            out[p] = module.attend(h[p], y[p], key, value, graph.index[p], graph.mask[p], geometry[p])
        return out

    with torch.inference_mode():
        geometry = module.geometry(edges)  # once a slide, not once a step
        difference = float((naive() - ours()).abs().max())
        seconds = {f: [] for f in (naive, ours)}
        for _ in range(repeats):
            for f, record in seconds.items():
                started = time.perf_counter()
                f()
                record.append(time.perf_counter() - started)
    return difference, float(np.median(seconds[naive]) / np.median(seconds[ours]))


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("--spots", type=int)
    out.add_argument("--threads", type=int, default=2)
    return out


def run(args) -> None:
    table, data = results.Table("speed", again=args.again), "random features"
    if args.spots:
        if table.lacks(data, f"{args.spots} spots", 0, "prediction, 5 steps"):
            seconds, memory = predict(args.spots)
            scores = {"seconds": seconds, "peak_gb": memory, "threads": args.threads}
            table.add(data, f"{args.spots} spots", 0, "prediction, 5 steps", scores)
        return
    if table.lacks(data, "900 spots", 0, "training epoch"):
        first, *seconds = epoch()
        scores = {"seconds": np.median(seconds), "seconds of the first": first, "threads": args.threads}
        table.add(data, "900 spots", 0, "training epoch", scores)
    if table.lacks(data, "4000 spots", 0, "local attention"):
        error, ratio = attention_ratio()
        scores = {"times as fast as a gather": ratio, "largest difference": error, "threads": args.threads}
        table.add(data, "4000 spots", 0, "local attention", scores)
    for n in (25_000, 50_000, 100_000):  # a process each, for its own peak
        words = ["--spots", str(n), "--threads", str(args.threads), *(["--again"] if args.again else [])]
        subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    run(args)
