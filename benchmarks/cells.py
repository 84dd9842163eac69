"""Speed of cells: crops against squidpy's generator, embedding against the bare encoder, and what a corpus holds in memory.

    python benchmarks/cells.py crops --store pancreas.zarr
    python benchmarks/cells.py embed --store pancreas.zarr --weights spatia-pancreas-small
    python benchmarks/cells.py corpus --stores pancreas.zarr,,1 merfish.zarr simulated.zarr,fluorescence

Ratios are taken in one process, on the threads that torch has; nothing else should run.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import results
import spatiaflow as sf

PIXELS, MPP = 48, 0.2125


def resident_gb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def crops(a, table: results.Table) -> None:
    """48 px, 4 channels, table order, Zarr on disk."""
    data = Path(a.store).stem
    if not table.lacks(data, "", "", ["pp.crops", "squidpy"]):
        return
    import spatialdata as sd
    import squidpy as sq

    sdata = sd.read_zarr(a.store)
    found = sf.pp.crops(sdata, mpp=1, crop_um=PIXELS * MPP, crop_pixels=PIXELS)
    n = len(found)
    start = time.perf_counter()
    first = found.read(np.arange(n))
    cold = time.perf_counter() - start
    start = time.perf_counter()
    whole = found.image.array[:]  # decoding alone
    reading = time.perf_counter() - start
    found.image = whole
    start = time.perf_counter()
    again = found.read(np.arange(n))
    gather = time.perf_counter() - start
    assert torch.equal(first, again)
    cells = sdata["table"][: a.n].copy()
    cells.obsm["spatial"] = found.xy[: a.n]
    cells.uns["spatial"] = {"s": {"scalefactors": {"spot_diameter_fullres": PIXELS}}}
    container = sq.im.ImageContainer(np.moveaxis(whole, 0, -1), dims=("y", "x", "channels"))
    start = time.perf_counter()
    for _ in container.generate_spot_crops(cells, library_id="s", spot_scale=1.0, as_array=True):
        pass
    squidpy = (time.perf_counter() - start) / a.n
    table.add(data, "", "", "pp.crops", {
        "cells": n, "seconds": cold, "seconds of reading": reading, "crops a second": n / cold,
        "crops a second, image decoded": n / gather, "times as fast as squidpy": squidpy * n / cold,
    })  # fmt: skip
    table.add(data, "", "", "squidpy", {"crops a second, image decoded": 1 / squidpy})


def embed(a, table: results.Table) -> None:
    if not table.lacks(Path(a.store).stem, "", "", "tl.embed_spatia"):
        return
    import spatialdata as sd

    model = sf.models.load(a.weights if Path(a.weights).exists() else sf.datasets.weights(a.weights))
    c, network = model.config, model.network.eval()
    images, present = torch.rand(512, len(c.channels) * (2 if c.wide else 1), c.crop_pixels, c.crop_pixels), None
    values, measured = torch.rand(512, len(c.genes)), torch.ones(1, len(c.genes), dtype=torch.bool)

    @torch.inference_mode()
    def encode(n: int) -> float:
        """Seconds of the encoders alone, on tensors that are there."""
        start = time.perf_counter()
        for _ in range(n):
            network.fuse(network.image(images, present), network.gene(values, measured, values.sum(1)), 512)
        return time.perf_counter() - start

    sdata = sd.read_zarr(a.store)
    encode(2)
    bare = encode(20)  # before and after: the machine's pace changes from minute to minute
    start = time.perf_counter()
    sf.tl.embed_spatia(sdata, model=model, mpp=1)
    whole, peak = time.perf_counter() - start, results.peak_gb()
    bare += encode(20)
    n = sdata["table"].n_obs
    bare *= n / (40 * 512)
    table.add(Path(a.store).stem, "", "", "tl.embed_spatia", {
        "cells": n, "seconds": whole, "seconds of the encoders alone": bare, "ratio": whole / bare, "peak_gb": peak,
    })  # fmt: skip


def corpus(a, table: results.Table) -> None:
    from spatiaflow._slides import gather
    from spatiaflow._slides.crops import share_memory
    from spatiaflow.models.preprocess import in_vocabulary, standard_of
    from spatiaflow.models.spatia import SpatiaConfig
    from spatiaflow.train.cells import ScatteredCells
    from spatiaflow.train.spatia import with_vocabulary

    data = ", ".join(Path(given.split(",")[0]).stem for given in a.stores)
    if not table.lacks(data, "", "", ["corpus", "0 workers", "2 workers"]):
        return
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "corpus.csv"
        rows = []
        for given in a.stores:
            store, image_key, mpp = (given.split(",") + ["", ""])[:3]
            rows.append(f"{Path(store).resolve()},{Path(store).stem},{image_key},{mpp}")
        manifest.write_text("\n".join(["store,tissue,image_key,mpp", *rows]))
        slides = gather(manifest, need=("counts", "crops"), crop_um=20.4, crop_pixels=48)
    share_memory(slides)
    config = with_vocabulary(SpatiaConfig(), slides)
    slides = [in_vocabulary(slide, config) for slide in slides]
    standards = {slide.name: standard_of(slide, 100.0) for slide in slides}
    slides = [slide.take(slide.crops.inside) for slide in slides]
    batches = ScatteredCells(slides, standards, config, 64)
    n = sum(map(len, slides))
    held = sum(
        s.xy.nbytes + s.obs_names.nbytes + s.crops.xy.nbytes + s.counts.pointers.nbytes + s.counts.rows.nbytes + tree.data.nbytes
        + tree.indices.nbytes + tree.size * 80
        for s, tree in zip(slides, batches.trees)
    )  # fmt: skip
    size = {
        "slides": len(slides), "cells": n, "genes": len(config.genes), "channels": len(config.channels), "bytes a cell": held / n,
    }  # fmt: skip
    table.add(data, "", "", "corpus", size)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
        start, cells = time.perf_counter(), 0
        for batch in loader:
            cells += len(batch["xy"])
        seconds = time.perf_counter() - start
        speed = {"cells a second": cells / seconds, "batches": len(batches), "resident_gb": resident_gb()}
        table.add(data, "", "", f"{workers} workers", speed)


COMMANDS = {"crops": crops, "embed": embed, "corpus": corpus}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("what", choices=list(COMMANDS))
    out.add_argument("--store")
    out.add_argument("--stores", nargs="*", help="STORE[,IMAGE_KEY[,MPP]] ...")
    out.add_argument("--weights", default="spatia-pancreas-small")
    out.add_argument("--n", type=int, default=2000, help="cells that squidpy cuts")
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.what](a, results.Table("cells", again=a.again))
