"""How fast and how large: the paper preset at 1,024 features and 50 genes, and the default at 118.

python benchmarks/speed.py                       # one training epoch; attention against a gather; prediction at all sizes
python benchmarks/speed.py --preset default --spots 1000000       # prediction at one size
python benchmarks/speed.py --draw --spots 1000000                 # a joint draw of 50 genes, ranges of 2 and 8 pitches, no flow
"""

import argparse
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

import results
import spatiaflow as sf
from spatiaflow.models.counts import ScalarZINB
from spatiaflow.models.denoiser import Denoiser
from spatiaflow.models.law import JointLaw
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import LocalAttention, frames, spatial_graph
from spatiaflow.models.stflow import STFlow, STFlowConfig
from spatiaflow.train.batches import Regions
from spatiaflow.train.stflow import FlowMatching, train_stflow

PAPER = STFlowConfig.of("paper")
N_FEATURES = {"paper": 1024, "default": 118}
SIZES = {"paper": (25_000, 100_000), "default": (100_000, 1_000_000)}


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


def slide_of(n: int, n_features: int, seed: int = 0) -> Slide:
    """Random features, and counts of 50 genes that follow some of them."""
    rng = np.random.default_rng(seed)
    x, library = rng.standard_normal((n, n_features), dtype=np.float32), rng.lognormal(8, 0.5, n)
    counts = rng.poisson(library[:, None] * np.exp(0.3 * x[:, :50] - 6)).astype(np.float32)
    genes = tuple(f"G{g}" for g in range(50))
    return Slide(f"s{seed}", np.arange(n), lattice(n, seed), sparse.csr_matrix(counts), library, genes, features=x)


def trained(preset: str) -> STFlow:
    """A model of one epoch on four slides of 400 spots, in which all members of the stack have a weight."""
    encoder = {"key": "X", "id": "X", "sha256": "", "n_features": N_FEATURES[preset]}
    slides, config = [slide_of(400, N_FEATURES[preset], seed) for seed in range(4)], STFlowConfig.of(preset)
    model = train_stflow(slides, config, encoder=encoder, max_epochs=1)
    if config.stack:
        for name in ("level", "weights"):
            model.arrays[name][:] = 1 / len(model.arrays[name])
    return model


def predict(preset: str, n: int) -> dict[str, float]:
    """Seconds of ``predict_expression`` on one slide, and its peak memory above what the process had with the input."""
    model, rng = trained(preset), np.random.default_rng(0)
    adata = AnnData(obs=pd.DataFrame(index=[f"spot{i}" for i in range(n)]))
    adata.obsm["X"] = rng.standard_normal((n, N_FEATURES[preset]), dtype=np.float32)
    adata.obsm["spatial"] = lattice(n)
    before, started, used = results.memory_gb(), time.perf_counter(), time.process_time()
    sf.tl.predict_expression(adata, model=model, use_rep="X", mpp=1, random_state=0)
    seconds, used, peak = time.perf_counter() - started, time.process_time() - used, results.peak_gb()
    return {
        "seconds": seconds,
        "cpu seconds": used,
        "peak_gb above the input": peak - before,
        "features_gb": adata.obsm["X"].nbytes / 2**30,
    }


def draw(n: int, n_genes: int = 50) -> dict[str, float]:
    """Seconds of the second joint draw of counts on one slide, and peak memory above the input."""
    rng, same = np.random.default_rng(0), np.ones(n_genes)
    law = JointLaw(
        theta=5 * same, lengths=np.array([200.0, 800.0]), field_sd=0.3 * np.ones((2, n_genes)), nugget_sd=0.2 * same,
        slide_sd=0 * same, donor_sd=same, factors=rng.uniform(-0.5, 0.5, (n_genes, 6)),
    )  # fmt: skip
    log_mean = rng.standard_normal((n, n_genes), dtype=np.float32) - 9
    before = results.memory_gb()
    draws = law.draws("s", lattice(n), log_mean, np.full(n, 5000.0), 2, new_donor=False, seed=0)
    next(draws)
    started = time.perf_counter()
    next(draws)
    return {"seconds": time.perf_counter() - started, "peak_gb above the input": results.peak_gb() - before}


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
    out.add_argument("--preset", choices=N_FEATURES, default="paper")
    out.add_argument("--spots", type=int)
    out.add_argument("--draw", action="store_true", help="a joint draw instead of a prediction")
    out.add_argument("--threads", type=int, default=1)
    return out


def run(args) -> None:
    table, data = results.Table("speed", again=args.again), "random features"
    threads = {"threads": args.threads}
    if args.spots:
        method = "joint draw" if args.draw else f"prediction, {args.preset}"
        if table.lacks(data, f"{args.spots} spots", 0, method):
            found = draw(args.spots) if args.draw else predict(args.preset, args.spots)
            table.add(data, f"{args.spots} spots", 0, method, found | threads)
        return
    if table.lacks(data, "900 spots", 0, "training epoch"):
        first, *seconds = epoch()
        scores = {"seconds": np.median(seconds), "seconds of the first": first} | threads
        table.add(data, "900 spots", 0, "training epoch", scores)
    if table.lacks(data, "4000 spots", 0, "local attention"):
        error, ratio = attention_ratio()
        scores = {"times as fast as a gather": ratio, "largest difference": error} | threads
        table.add(data, "4000 spots", 0, "local attention", scores)
    for preset, sizes in SIZES.items():
        for n in sizes:  # a process each, for its own peak
            words = ["--preset", preset, "--spots", str(n), "--threads", str(args.threads)]
            subprocess.run([sys.executable, __file__, *words, *(["--again"] if args.again else [])], check=True)


if __name__ == "__main__":
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    sf.settings.n_threads = args.threads
    run(args)
