"""Train the generators that the package carries: on the part x < 16500 px of a Xenium slide of human pancreas, and a small
one on simulated tissue, for the demonstration.

    python benchmarks/morphology_weights.py pancreas.zarr --cache features
    python benchmarks/morphology_weights.py simulated
    python benchmarks/morphology_weights.py pancreas.zarr --cache features --folder runs --seeds 0 1 2 \
        --variants ours noise unweighted unaligned nospace
    python benchmarks/morphology_weights.py pancreas.zarr --cache features --variants genes --seeds 0 1 2 --folder runs \
        --like src/spatiaflow/datasets/weights/morphology-pancreas-small.safetensors

``genes`` is the flow from noise to all cells, under their genes; all others learn from pairs. Seed 0 of it is
``morphology-pancreas-genes``. With ``--without-band --folder runs-band`` it does not see the band where edits of exocrine cells
are scored.

States, niches and transitions are those of ``benchmarks/transitions.py``; the last transition is the negative control, cells of
a state to others of it. The slide is that of ``benchmarks/weights.py``. With ``--folder`` every variant is trained with every
seed, all with the autoencoder and the surrogate of one file (``--like``, or the first that is trained), and kept there as
``variant-seed.safetensors`` for ``benchmarks/morphology.py pancreas --folder``. ``spoiled``: cells of other lineages, 30 % as
many as a source state has, get its label before pairing: sources without a counterpart.
"""

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import spatiaflow as sf
from spatiaflow import _io
from spatiaflow.train import morphology as train
from transitions import EXOCRINE, MIN_COUNTS, candidates, embedded, fit_states, with_band
from weights import MPP, TRAINING_EDGE, WHERE

WIDTH = 256  # half of the default: files of 7 MB, held-out loss 1.32 against 1.31 on simulated tissue
VARIANTS = {  # settings that differ from ours; spoiled: share of added sources
    "genes": {"objective": "genes", "width": 512, "batch_size": 256},
    "ours": {},
    "noise": {"start": "noise"},
    **{f"n{100 * noise:.0f}": {"noise": noise} for noise in (0.1, 0.25, 1.0)},  # ours: .5
    "unexchanged": {"exchange": False},
    "unweighted": {"weighted": False},
    "unaligned": {"losses": {"alignment": 0.0}},
    "flow": {"losses": {"alignment": 0.0, "contrast": 0.0}},  # flow matching alone
    "nospace": {"spatial": False},
    "spoiled": {"spoiled": 0.3},
    "spoiled-unweighted": {"spoiled": 0.3, "weighted": False},
}


def spoil(table, transitions: list[tuple[str, str]], share: float, seed: int) -> None:
    """Label cells of states that no transition names as its sources, and write ``obs["spoiled"]``."""
    rng, state = np.random.default_rng(seed), table.obs["state"].astype(object).to_numpy()
    others = rng.permutation(np.flatnonzero(table.obs["state"].notna() & ~np.isin(state, np.unique(transitions))))
    alien = np.zeros(len(state), bool)
    for source, _ in transitions:
        n = int(share * (state == source).sum())
        state[others[:n]], alien[others[:n]], others = source, True, others[n:]
    table.obs["state"], table.obs["spoiled"] = pd.Categorical(state, table.obs["state"].cat.categories), alien


def paired(
    store: str, cache: Path | None, spoiled: float = 0.0, seed: int = 0, strip: bool = False, band: bool = False
):
    """The training part with states, niches and pairs, and the rule for states.

    ``strip``: for the model of genes, also exocrine cells, the way back of every transition, and the cells of the validation
    strip, which are the far band of the part. ``band``: without the band that scores exocrine cells.

    Pairs are balanced and by expression alone: they show .30 of the true shift of morphology on 17000-19000, where unbalanced
    ones that also compare morphology show .20.
    """
    parts = embedded(store, cache, ("train", "validation") if strip else ("train",))
    states = fit_states(parts)
    found = candidates(parts, states).query("taken")
    transitions = [*zip(found["source"], found["target"])]
    control = found["target"].iloc[-1]
    if band:
        parts = with_band(parts)
    if strip:
        transitions = [*transitions, EXOCRINE]
        transitions += [one[::-1] for one in transitions]
        table = ad.concat([parts["train"]["table"], parts["validation"]["table"]], uns_merge="first")
        table.uns["spatialdata_attrs"] = parts["train"]["table"].uns["spatialdata_attrs"]
        del parts["train"].tables["table"]
        parts["train"]["table"] = table
    if spoiled:
        spoil(parts["train"]["table"], transitions, spoiled, seed)
    sf.tl.pair_transitions(
        parts["train"], transitions=[*transitions, (control, control)], groupby="state", niche_key="niche", mpp=1,
        config=sf.models.PairingConfig(unbalanced=None),
    )  # fmt: skip
    return parts["train"], states


def pancreas(part, states, seed: int, a, **settings):
    """A generator of cells of the pancreas slide."""
    config = sf.models.MorphologyConfig(
        crop_um=a.crop_um, crop_pixels=a.pixels, **{"objective": "pairs", "width": WIDTH} | settings
    )
    (slide,) = _io.places(part, _io.Where(mpp=1))
    beyond = float((slide.xy[:, 0] > TRAINING_EDGE * MPP).mean())  # the validation strip, if it is there
    model = sf.tl.train_morphology(
        part, config=config, max_epochs=a.epochs, validation=beyond or 0.05, mpp=1, random_state=seed
    )
    rule = {key: np.round(states[key], 4).tolist() for key in ("weight", "offset")}
    names = {key: [*map(str, states[key])] for key in ("names", "genes")}
    model.states = sf.models.States(**names, **rule, min_counts=MIN_COUNTS)
    return model


def simulated(epochs: int, seed: int):
    """A small generator of simulated cells in state B."""
    sdata, image = sf.datasets.simulated_tissue(30_000, seed=1000), {"image_key": "fluorescence"}
    sf.tl.embed_spatia(sdata, modalities="image", **image)
    sf.pp.morphology_profile(sdata, **image)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    config = sf.models.MorphologyConfig(objective="pairs", crop_um=16.0, crop_pixels=32, width=WIDTH)
    return sf.tl.train_morphology(sdata, config=config, max_epochs=epochs, random_state=seed, **image)


def share(model) -> None:
    """Let further trainings take the autoencoder and the surrogate of a model instead of fitting their own."""
    rebuilt, read = (np.array([*model.card.get(f"{name}_r2", {}).values()]) for name in ("autoencoder", "surrogate"))
    train.fit_autoencoder = lambda *_, **__: (model.autoencoder, rebuilt)
    train.fit_surrogate = lambda *_, **__: (model.surrogate, read)
    train.MORE_IMAGES = 0  # only an autoencoder needs them


def report(model, path: Path) -> None:
    print(model.save(path))
    for name, values in model.history.items():
        print(name, np.round(values, 4))
    print(*(model.card.get(name) for name in ("autoencoder_r2", "surrogate_r2", "validation_scores")), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="SpatialData of the slide, or 'simulated'")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--epochs", type=int, help="of 200 steps or more, 10")
    parser.add_argument("--crop-um", type=float, default=13.6)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--like", help="file of a generator whose autoencoder and surrogate are taken")
    parser.add_argument("--variants", nargs="+", default=["ours"], choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--without-band", action="store_true", help="leave out the band that scores exocrine cells")
    parser.add_argument("--folder", type=Path, help="of variants; else the weights of the package are written")
    a = parser.parse_args()
    if a.like:
        share(sf.models.load(a.like))
    if a.store == "simulated":
        report(simulated(a.epochs or 10, a.seeds[0]), WHERE / "morphology-simulated-small.safetensors")
        raise SystemExit
    a.epochs, pairs = a.epochs or 10, {}
    for seed in a.seeds:
        for name in a.variants:
            path = (
                a.folder / f"{name}-{seed}.safetensors" if a.folder else WHERE / "morphology-pancreas-small.safetensors"
            )
            if a.folder and path.exists():
                continue
            settings = dict(VARIANTS[name])
            spoiled = settings.pop("spoiled", 0.0)
            strip = settings.get("objective") == "genes"
            if (key := (spoiled, seed if spoiled else 0, strip)) not in pairs:
                pairs = {key: paired(a.store, a.cache, spoiled, seed, strip, a.without_band)}
                print(pairs[key][0]["table"].uns["transition_plan"]["problems"].round(3).to_string(index=False))
            model = pancreas(*pairs[key], seed, a, **settings)
            report(model, path)
            share(model)
