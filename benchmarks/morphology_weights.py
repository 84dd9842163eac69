"""Train the generators that the package carries: on the part x < 16500 px of a Xenium slide of human pancreas, and a small
one on simulated tissue, for the demonstration.

    python benchmarks/morphology_weights.py pancreas.zarr --cache features --checkpoints run
    python benchmarks/morphology_weights.py simulated

States, niches and transitions are those of ``benchmarks/transitions.py``; the last transition is the negative control, half of
the cells of a state to the other half. The slide is that of ``benchmarks/weights.py``. With ``--spoiled .3`` cells of other
lineages, 30 % as many as a source state has, get its label before pairing: sources without a counterpart.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import spatiaflow as sf
from spatiaflow.train import morphology as train
from transitions import MIN_COUNTS, candidates, embedded, fit_states
from weights import WHERE


def spoil(table, transitions: list[tuple[str, str]], share: float, seed: int) -> None:
    """Label cells of states that no transition names as its sources."""
    rng, state = np.random.default_rng(seed), table.obs["state"].astype(object).to_numpy()
    others = rng.permutation(np.flatnonzero(table.obs["state"].notna() & ~np.isin(state, np.unique(transitions))))
    for source, _ in transitions:
        n = int(share * (state == source).sum())
        state[others[:n]], others = source, others[n:]
    table.obs["state"] = pd.Categorical(state, table.obs["state"].cat.categories)


def paired(store: str, cache: Path | None, morphology: float = 0.5, spoiled: float = 0.0, seed: int = 0):
    """The training part with states, niches and pairs, and the rule for states."""
    parts = embedded(store, cache, ("train",))
    states = fit_states(parts)
    found = candidates(parts, states).query("taken")
    transitions = [*zip(found["source"], found["target"])]
    control = found["target"].iloc[-1]
    if spoiled:
        spoil(parts["train"]["table"], transitions, spoiled, seed)
    sf.tl.pair_transitions(
        parts["train"], transitions=[*transitions, (control, control)], groupby="state", niche_key="niche",
        cost={"genes": 1.0, "morphology": morphology}, mpp=1,
    )  # fmt: skip
    return parts["train"], states


def simulated(epochs: int, seed: int, checkpoints: Path | None = None):
    """A small generator of simulated cells in state B."""
    sdata, image = sf.datasets.simulated_tissue(30_000, seed=1000), {"image_key": "fluorescence"}
    sf.tl.embed_spatia(sdata, modalities="image", **image)
    sf.pp.morphology_profile(sdata, **image)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    return sf.tl.train_morphology(
        sdata,
        crop_um=16.0,
        crop_pixels=32,
        max_epochs=epochs,
        random_state=seed,
        checkpoint_dir=checkpoints,
        **image,
    )


def report(model, path: Path) -> None:
    print(model.save(path))
    for name, values in model.history.items():
        print(name, np.round(values, 4))
    print(model.card["surrogate_r2"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="SpatialData of the slide, or 'simulated'")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--crop-um", type=float, default=13.6)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--start", default="control")
    parser.add_argument("--unweighted", action="store_true")
    parser.add_argument("--unaligned", action="store_true")
    parser.add_argument("--no-spatial", action="store_true")
    parser.add_argument("--as-drawn", action="store_true", help="sources do not exchange targets")
    parser.add_argument("--spoiled", type=float, default=0.0)
    parser.add_argument("--like", help="file of a generator whose autoencoder is taken instead of fitting one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.like:
        one = sf.models.load(a.like)
        train.fit_autoencoder = lambda *_, **__: (one.autoencoder, np.array([*one.card["autoencoder_r2"].values()]))
    kind = "simulated" if a.store == "simulated" else "pancreas"
    out = a.out or WHERE / f"morphology-{kind}-small.safetensors"
    if kind == "simulated":
        report(simulated(a.epochs, a.seed, a.checkpoints), out)
        raise SystemExit
    part, states = paired(a.store, a.cache, spoiled=a.spoiled, seed=a.seed)
    print(part["table"].uns["transition_plan"]["problems"].round(3).to_string(index=False))
    model = sf.tl.train_morphology(
        part, crop_um=a.crop_um, crop_pixels=a.pixels, max_epochs=a.epochs, checkpoint_dir=a.checkpoints, resume=a.resume,
        start=a.start, weighted=not a.unweighted, spatial=not a.no_spatial, exchange=not a.as_drawn,
        losses={"alignment": 0.0} if a.unaligned else None, validation=0.05, mpp=1, random_state=a.seed,
    )  # fmt: skip
    rule = {key: np.round(states[key], 4).tolist() for key in ("weight", "offset")}
    names = {key: [*map(str, states[key])] for key in ("names", "genes")}
    model.states = sf.models.States(**names, **rule, min_counts=MIN_COUNTS)
    report(model, out)
