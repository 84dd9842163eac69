"""End to end on a held-out slide: its expression from histology, its cells in their tissue and in another state, missing genes.

python tutorials/demo.py --data simulated     # offline, under three minutes on two cores
python tutorials/demo.py --data her2st        # real tissue (downloads 19 MB, or reads settings.mirror)
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd

import spatiaflow as sf


def load(name: str):
    """Return training slides and the held-out slide."""
    if name == "her2st":
        sections = [sf.datasets.her2st(section) for section in ("C3", "C4", "C5", "C2")]
        return sections[:-1], sections[-1]
    slides = [sf.datasets.simulated_tissue(900, seed=seed) for seed in range(4)]
    return slides[:-1], slides[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("simulated", "her2st"), default="simulated")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--max-epochs", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    train, test = load(args.data)
    patch_um = 155 if args.data == "her2st" else 64
    image = {} if args.data == "her2st" else {"image_key": "he"}
    print("encoding patches and training STFlow ...", flush=True)
    for slide in [*train, test]:
        sf.pp.encode_patches(slide, patch_um=patch_um, **image)
    model = sf.tl.train_stflow(train, max_epochs=args.max_epochs)
    print(model)
    sf.tl.predict_expression(test, model=model, n_samples=5, new_donor=False)  # all slides are of one donor
    model.save(args.out / "stflow")

    # one of the simple models that its network is stacked with
    table = test if args.data == "her2st" else test["table"]
    predicted = sf.get.expression(test)
    counts = table[:, model.genes].X.toarray()
    truth = np.log1p(counts / np.asarray(table.X.sum(1)).reshape(-1, 1) * 1e4)
    ridge = model.simple_prediction(table.obsm["X_texture"])
    scores = pd.DataFrame(
        {"STFlow": sf.metrics.pearson(truth, predicted.X), "ridge": sf.metrics.pearson(truth, ridge)}, index=model.genes
    )
    scores.to_csv(args.out / "scores.csv")
    print(
        f"held-out slide, mean Pearson over {len(scores)} genes: "
        + ", ".join(f"{k} {v:.3f}" for k, v in scores.mean().items())
    )

    figures = {}
    if args.data == "simulated":  # cells with a fluorescence image, in stains that the bundled weights know
        print("embedding cells ...", flush=True)
        sf.tl.embed_spatia(test, modalities="image", image_key="fluorescence")
        sf.tl.cluster_niches(test, n_clusters=3, key_added="found_niche")  # "niche" holds the planted ones
        figures["levels"] = sf.pl.levels(test, show=False, return_fig=True)
        figures["niches"] = sf.pl.crops(test, "found_niche", image_key="fluorescence", show=False, return_fig=True)

        print("generating cells of state A as they would look in state B ...", flush=True)
        fluorescence = {"image_key": "fluorescence"}
        made = sf.tl.generate_morphology(
            test, source="A", target="B", model="morphology-simulated-small", **fluorescence
        )
        crops = sf.pp.crops(test, crop_um=16, crop_pixels=32, **fluorescence)
        real = {s: crops.read(np.flatnonzero(test["table"].obs["state"] == s)).numpy() for s in "AB"}
        images = {"of A": real["A"], "of B": real["B"], "generated from A": made.obsm["image"]}
        areas = {k: sf.pp.image_profile(x, channels=crops.channels, mpp=0.5)["area_um2"] for k, x in images.items()}
        print("mean nuclear area, um2: " + ", ".join(f"{k} {area.mean():.0f}" for k, area in areas.items()))
        figures["transition"] = sf.pl.transition(made, real["B"], show=False, return_fig=True)

    print("imputing genes that the held-out slide does not show ...", flush=True)
    hidden = sorted(scores.index[:5])
    part, known = test, train[0]
    if args.data == "simulated":
        part, known = (slide["table"] for slide in (test, train[0]))
    shown = part[:, ~part.var_names.isin(hidden)].copy()
    sf.tl.impute_genes(shown, reference=known, genes=hidden)
    library, per = np.asarray(shown.X.sum(1)), shown.uns["imputed"]["normalization"]["target_sum"]
    measured = np.log1p(part[:, hidden].X.toarray() / library * per)
    said, found = shown.uns["imputed"]["reliability"].mean(), sf.metrics.pearson(measured, shown.obsm["imputed"]).mean()
    print(f"{len(hidden)} hidden genes, mean Pearson {found:.3f} (reliability said {said:.3f})")
    figures["imputation"] = sf.pl.imputation(shown, hidden[:1], truth=part, mpp=1, show=False, return_fig=True)

    best = scores["STFlow"].sort_values(ascending=False).index[:3].tolist()
    figures |= {
        "expression": sf.pl.expression(test, best, show=False, return_fig=True),
        "gene_scores": sf.pl.gene_scores(scores, show=False, return_fig=True),
        "calibration": sf.pl.calibration(test, show=False, return_fig=True),
    }
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=200, bbox_inches="tight")
    print(f"figures, scores and model in {args.out}/ after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
