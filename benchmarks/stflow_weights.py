"""Train the STFlow models that the package carries: human breast cancer and mouse brain.

    python benchmarks/stflow_weights.py breast mouse-brain

Genes are chosen inside the training sections: of the candidates with the largest variance within slides those whose pattern is
trusted, or whose skill is above 0, on held-out donors (bands of the sections, where there is one donor). All pictures are
averaged to one resolution.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import spatiaflow as sf

WHERE = Path(sf.__file__).parent / "datasets" / "weights"


@dataclass(frozen=True)
class Recipe:
    """What a model is trained on."""

    sections: tuple[str, ...]
    resolution_um: float  # of the coarsest picture
    donor_key: str | None
    candidates: int = 600


RECIPES = {
    "breast": Recipe(("A1", "B4", "C2", "C3", "C4", "C5"), 3.2, "donor"),
    "mouse-brain": Recipe(("A1", "B1"), 4.25, None, candidates=300),
}


def load(name: str, section: str):
    """A section with its features."""
    found = (
        sf.datasets.her2st(section) if name == "breast" else sf.datasets.visium_ffpe(f"mousebrain/V10F24-078_{section}")
    )
    sf.pp.encode_patches(found, resolution_um=RECIPES[name].resolution_um)
    return found


def train(recipe: Recipe, slides: list, seed: int = 0):
    """Choose genes by a first model of all candidates, trained for a few epochs, and train the second on them."""
    options = {"donor_key": recipe.donor_key, "random_state": seed}
    first = sf.tl.train_stflow(slides, genes=recipe.candidates, max_epochs=5, **options)
    good = first.trusted(recipe.donor_key is not None) | (first.skill > 0)
    genes = [first.genes[i] for i in np.argsort(-first.skill, kind="stable") if good[i]]
    print(
        f"{len(genes)} of {recipe.candidates} genes kept; skill {np.quantile(first.skill[good], [0, 0.5, 1]).round(3)}"
    )
    return sf.tl.train_stflow(slides, genes=genes, **options)


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=RECIPES)
    parser.add_argument("--folder", type=Path, default=WHERE)
    args = parser.parse_args()
    for name in args.names:
        recipe = RECIPES[name]
        model = train(recipe, [load(name, section) for section in recipe.sections])
        path = model.save(args.folder / f"stflow-{name}-small.safetensors")
        print(model, path, f"{path.stat().st_size:,} bytes, {model.trusted(True).sum()} trusted on a new donor")


if __name__ == "__main__":
    main()
