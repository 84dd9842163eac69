"""Train the weights that the package carries: SPATIA on the part x < 16500 px of a Xenium slide of human pancreas.

    python benchmarks/weights.py pancreas.zarr --checkpoints run

    python benchmarks/weights.py pancreas.zarr --domain      # adds to known weights what the out-of-domain score needs

``pancreas.zarr`` is what ``benchmarks/pancreas.py`` writes. How the weights in the package were made, in more than one step,
their card says. Cells with fewer than 5 counts are left out, and a band of the training part chooses the epoch.
"""

import argparse
from pathlib import Path

import numpy as np
import spatialdata as sd

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.models.spatia import in_vocabulary
from spatiaflow.tl._spatia import cells
from spatiaflow.train.domain import fit_domains

MPP = 0.2125
TRAINING_EDGE = 16500  # px
WHERE = Path(sf.__file__).parent / "datasets" / "weights"


def training_part(path: str):
    """Cells of the training part with at least 5 counts, and genes without controls."""
    sdata = sd.read_zarr(path)
    table = sdata["table"]
    (slide,) = _io.places(sdata, _io.Where(mpp=1))
    enough = np.asarray(table.X.sum(1)).ravel() >= 5
    genes = ~table.var["control"].to_numpy(bool) if "control" in table.var else np.ones(table.n_vars, bool)
    kept = enough & (slide.xy[:, 0] < TRAINING_EDGE * MPP)
    part = table[kept, genes].copy()
    del sdata.tables["table"]
    sdata["table"] = part
    return sdata


def add_domain(path: Path, store: str) -> Path:
    """Store in trained weights how far training cells are from one another. No other tensor changes."""
    model = sf.models.load(path, "Spatia")
    slides = cells(training_part(store), _io.Where(mpp=1), ("image", "genes"), model.config)
    ready = [in_vocabulary(slide, model.config) for slide in slides]
    ready = [slide.take(slide.crops.inside) for slide in ready]
    model.domains = fit_domains(model, ready)
    return model.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--modalities", nargs="+", default=["image", "genes"])
    parser.add_argument("--init", type=Path, help="weights to go on from")
    parser.add_argument("--context-only", action="store_true", help="leave the cell level as --init has it")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument(
        "--wide", type=float, default=0.0, help="width of a second crop over that of the first; 0: none"
    )
    parser.add_argument("--out", type=Path, default=WHERE / "spatia-pancreas-small.safetensors")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", action="store_true", help="only add statistics of the training cells to --out")
    a = parser.parse_args()
    if a.domain:
        print(add_domain(a.out, a.store))
        raise SystemExit
    losses = {"genes": 0, "image_to_genes": 0, "reconstruction": 0, "contrast": 0} if a.context_only else None
    model = sf.tl.train_spatia(
        training_part(a.store), mpp=1, config=sf.models.SpatiaConfig(losses=losses, precision=a.precision, wide=a.wide),
        modalities=tuple(a.modalities), validation=0.05, max_epochs=a.epochs, checkpoint_dir=a.checkpoints, resume=a.resume,
        init=a.init, random_state=a.seed,
    )  # fmt: skip
    print(model.save(a.out))
    for name, values in model.history.items():
        print(name, np.round(values, 4))
