"""Joint laws of expression: do intervals of regions, sums of genes and differences hold, within a donor and on a new one?

    python benchmarks/joint.py --tasks her2st lung brain kidney donors bulb simulated --seeds 3
    python benchmarks/joint.py --table

The split is a section that no choice has seen, or all sections of a donor (olfactory bulb: of a mouse). Of simulated tissue,
whose cells stand for spots, it is the last of five slides, and sums are of eight genes instead of ten. Draws are the model's
own, at the measured library size of the spots, around the model's rates. Baselines have the same rates and the same law of a
single value: "independent" draws every count alone, "gene copula" draws the genes of a spot together and every spot alone.
"no flow" is the model without the flows that its means and draws pass through; "share of the flow's way" is 0 where it chose
none. A region is a spot and its nearest 8 or 24. The simple models of the stack stand beside it ("pearson", and "partial":
given the depth).

On new donors the deviance of the predicted rates is compared with that of the base, the mean of the rates over training spots:
"deviance skill" as they are, "level deviance skill" of each gene's mean rate alone, and "pattern deviance skill" after both sides
were given each gene's level on the test slide.
"""

import copy
import functools
import time
from dataclasses import replace

import numpy as np
from scipy.spatial import cKDTree
from scipy.special import xlogy

import results
import spatiaflow as sf
from spatiaflow._slides import gather
from spatiaflow.models.counts import draw_counts, log_normalize
from spatiaflow.models.members import NAMES
from spatiaflow.models.regression import gene_pearson, given_depth
from spatiaflow.models.slide import Slide
from spatiaflow.models.stflow import STFlow, STFlowConfig
from spatiaflow.train.stflow import train_stflow
from spatiaflow.train.trust import partial

FFPE = {"lung": "lungorganoid/V19D02-088", "brain": "mousebrain/V10F24-078", "kidney": "kidneyorganoid/V19D02-085"}
SECTIONS = {
    "her2st": ("C2", "C3", "C4", "C5"),
    "lung": ("A1", "B1", "C1"),
    "brain": ("A1", "B1"),
    "kidney": ("B1", "C1"),
    "bulb": ("MOB1", "MOB2", "MOB3"),
}
SIMULATED = ("s0", "s1", "s2", "s3", "s4")  # the last is held out
NEW = ("donors", "bulb")  # tasks whose test slides are of another donor
DONORS = {"A1": "A", "B4": "B", "C2": "C", "C3": "C", "C4": "C", "C5": "C"}
N_GENES, N_DRAWS, LEVEL = 50, 200, 0.9


def encoded(task: str, name: str, seed: int):
    """One slide of a task, with its features."""
    if task == "simulated":
        found = sf.datasets.simulated_tissue(1500, seed=10 * seed + SIMULATED.index(name))
        sf.pp.encode_patches(found, image_key="he", patch_um=64)
        return found
    if task == "bulb":
        found = sf.datasets.mouse_olfactory_bulb(name)
    else:
        found = sf.datasets.visium_ffpe(f"{FFPE[task]}_{name}") if task in FFPE else sf.datasets.her2st(name)
    sf.pp.encode_patches(found)
    return found


@functools.lru_cache(maxsize=1)
def load(task: str, seed: int) -> list[Slide]:
    """Slides of a task with features and counts of the genes that all of them measure; only simulated ones depend on the seed."""
    donors = DONORS if task == "donors" else {name: name for name in SECTIONS["bulb"]} if task == "bulb" else {}
    slides = []
    for name in DONORS if task == "donors" else SIMULATED if task == "simulated" else SECTIONS[task]:
        (slide,) = gather(encoded(task, name, seed), need=("counts", "features"), use_rep="X_texture")
        slide = slide.take(slide.on_tissue & (slide.library > 0))
        slides.append(replace(slide, name=name, donor=donors.get(name, "")))
    shared = set.intersection(*(set(slide.genes) for slide in slides))
    return [slide.align([gene for gene in slides[0].genes if gene in shared]) for slide in slides]


def most_variable(slides: list[Slide]) -> list[str]:
    """Genes that vary most within training slides."""
    variance = np.mean([s.log_normalized().toarray().var(0) for s in slides], 0)
    return [slides[0].genes[i] for i in np.argsort(-variance, kind="stable")[:N_GENES]]


def gene_sets(slides: list[Slide], size: int = 10) -> list[np.ndarray]:
    """Ten sets of genes that go together in training slides."""
    correlation = np.corrcoef(np.concatenate([s.log_normalized().toarray() for s in slides]).T)
    strength = np.sort(correlation, 1)[:, -size:].mean(1)
    return [np.argsort(-correlation[g])[:size] for g in np.argsort(-strength)[:: max(1, len(strength) // 10)][:10]]


def inside(truth: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """Coverage and width of intervals."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0, method="weibull")
    return float(((truth >= low) & (truth <= high)).mean()), float((high - low).mean())


def energy(truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Energy score over genes of every region (fair), from truth (regions x genes) and draws (draws x regions x genes)."""
    n = len(draws)
    apart = sum(np.linalg.norm(draws - one, axis=2).sum(0) for one in draws)
    return np.linalg.norm(draws - truth, axis=2).mean(0) - apart / (2 * n * (n - 1))


def variogram(truth: np.ndarray, draws: np.ndarray, neighbors: np.ndarray) -> float:
    """Variogram score (power .5) of neighbouring spots, mean over pairs and genes."""
    first, second = np.repeat(np.arange(len(truth)), neighbors.shape[1]), neighbors.ravel()
    known = np.abs(truth[first] - truth[second]) ** 0.5
    drawn = np.mean([np.abs(one[first] - one[second]) ** 0.5 for one in draws], 0)
    return float(((known - drawn) ** 2).mean())


def scores(slide: Slide, draws: np.ndarray, sets: list[np.ndarray]) -> tuple[dict[str, float], np.ndarray]:
    """What people read of draws (draws x n x genes), and the energy of every region of nine spots."""
    y, tree, rng = slide.log_normalized().toarray(), cKDTree(slide.xy), np.random.default_rng(0)
    out, regions = {}, {}
    out["coverage single"], out["width single"] = inside(y, draws)
    for k in (9, 25):
        index = tree.query(slide.xy, k=k)[1]
        regions[k] = y[index].mean(1), np.stack([one[index].mean(1) for one in draws])
        out[f"coverage {k} spots"], out[f"width {k} spots"] = inside(*regions[k])
    truth, drawn = regions[9]
    pairs = rng.integers(0, len(y), (300, 2))
    pairs = pairs[np.linalg.norm(slide.xy[pairs[:, 0]] - slide.xy[pairs[:, 1]], axis=1) > 4 * slide.pitch]
    out["coverage differences"], _ = inside(
        truth[pairs[:, 0]] - truth[pairs[:, 1]], drawn[:, pairs[:, 0]] - drawn[:, pairs[:, 1]]
    )
    out["coverage sums"], _ = inside(
        np.stack([y[:, s].sum(1) for s in sets], 1), np.stack([draws[:, :, s].sum(2) for s in sets], 2)
    )
    out["crps"] = float(sf.metrics.crps_ensemble(y, draws).mean())
    out["variogram"] = variogram(y, draws[:100], tree.query(slide.xy, k=5)[1][:, 1:])
    each = energy(truth, drawn[:100])
    out["energy single"] = float(energy(y, draws[:100]).mean())
    return out | {"energy 9 spots": float(each.mean())}, each


def independent(model: STFlow, slide: Slide, rate: np.ndarray, seed: int) -> np.ndarray:
    """Draws of the same rates in which every count is alone; dispersion fitted to the same held-out counts."""
    rng, theta, size = np.random.default_rng(seed), model.law.marginal_theta(None), slide.library
    return np.stack([log_normalize(draw_counts(size[:, None] * rate, theta, 0, rng), size) for _ in range(N_DRAWS)])


def gene_copula(model: STFlow, slide: Slide, rate: np.ndarray, seed: int) -> np.ndarray:
    """Draws of the same rates in which genes of a spot go together as in the model, and nothing else does."""
    law, n_genes = model.law, len(model.genes)
    alone = replace(
        law, lengths=np.zeros(0), field_sd=np.zeros((0, n_genes)), nugget_sd=np.sqrt(law.variance),
        slide_sd=np.zeros(n_genes), donor_sd=np.zeros(n_genes),
    )  # fmt: skip
    draws = alone.draws(slide.name, slide.xy, np.log(rate), slide.library, N_DRAWS, new_donor=False, seed=seed)
    return np.stack([log_normalize(counts, slide.library) for counts in draws])


def deviance(counts: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Negative binomial deviance of every gene from counts and their means (n x genes)."""
    apart = xlogy(counts, counts) - xlogy(counts, mean) - (counts + theta) * np.log((counts + theta) / (mean + theta))
    return 2 * apart.sum(0)


def deviance_skills(slide: Slide, rate: np.ndarray, base: np.ndarray, theta: np.ndarray) -> dict[str, float]:
    """Skill of predicted rates (n x genes) over those of the base (genes), mean over genes, split into level and pattern."""
    counts, size = slide.counts.toarray().astype(np.float64), slide.library[:, None]
    predicted, flat = size * rate, size * (size * rate).sum(0) / size.sum()
    known = size * base

    def level_of(mean: np.ndarray) -> np.ndarray:
        """With each gene's total on the slide; half a count keeps it finite."""
        return mean * (counts.sum(0) + 0.5) / (mean.sum(0) + 0.5)

    def skill(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean(1 - deviance(counts, one, theta) / deviance(counts, other, theta)))

    return {
        "deviance skill": skill(predicted, known), "level deviance skill": skill(flat, known),
        "pattern deviance skill": skill(level_of(predicted), level_of(known)),
    }  # fmt: skip


def base_rates(slides: list[Slide]) -> np.ndarray:
    """Mean of the rates over training spots, genes; half a count in all keeps them above 0."""
    rates = np.concatenate([s.counts.toarray() / np.maximum(s.library, 1)[:, None] for s in slides])
    return rates.mean(0) + 0.5 / sum(s.library.sum() for s in slides)


def interval(difference: np.ndarray, xy: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over regions, by bootstrap over blocks of the slide."""
    drawn = redrawn(np.stack([difference, np.ones(len(xy))], 1), xy, 2000, seed)
    return tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))


def redrawn(values: np.ndarray, xy: np.ndarray, n_draws: int, seed: int = 0) -> np.ndarray:
    """Sums of rows (n x anything) over as many of the 4 x 4 blocks of a slide, drawn with replacement; draws x anything."""
    place = (xy - xy.min(0)) / np.maximum(np.ptp(xy, axis=0), 1e-9)
    _, block = np.unique(np.minimum((place * 4).astype(int), 3) @ [4, 1], return_inverse=True)
    sums = np.zeros((block.max() + 1, *values.shape[1:]))
    np.add.at(sums, block, values)
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), n_draws)
    return np.tensordot(times, sums, 1)


def partials(y: np.ndarray, predicted: np.ndarray, slide: Slide) -> np.ndarray:
    """Correlation given the depth, mean over genes: of the slide, and of 500 times its blocks drawn anew."""
    a, b = (given_depth(np.asarray(values, np.float64), slide.library) for values in (y, predicted))
    values = np.stack([a * b, a**2, b**2], 1)
    both, of_y, of_predicted = np.moveaxis(np.concatenate([values.sum(0)[None], redrawn(values, slide.xy, 500)]), 1, 0)
    return (both / np.sqrt(np.maximum(of_y * of_predicted, 1e-12))).mean(1)


def evaluate(
    table: results.Table, task: str, model: STFlow, test: Slide, train: list[Slide], seed: int, started: float
) -> None:
    """Write the rows of one test slide."""
    new, y, sets = task in NEW, test.log_normalized().toarray(), gene_sets(train, 8 if task == "simulated" else 10)
    found = model.predict([test], new_donor=new, seed=seed)
    part, trusted = partial(y, np.log1p(1e4 * found.rate), test.library), model.trusted(new)
    drawn = np.stack(list(model.draws(test, N_DRAWS, depth=test.library, new_donor=new, seed=seed)))
    own, energies = scores(test, drawn, sets)
    alone = copy.copy(model)
    alone.field_flows = None
    mean = alone.predict([test], new_donor=new, seed=seed)
    without = {
        "pearson": float(np.nanmean(gene_pearson(y, mean.mean))),
        "partial": float(partial(y, np.log1p(1e4 * mean.rate), test.library).mean()),
    }
    others = {name: draw(model, test, found.rate, seed) for name, draw in BASELINES.items()}
    others[NO_FLOW] = np.stack(list(alone.draws(test, N_DRAWS, depth=test.library, new_donor=new, seed=seed)))
    for method, draws in others.items():
        other, other_energies = scores(test, draws, sets)
        table.add(task, test.name, seed, method, other | (without if method == NO_FLOW else {}))
        low, high = interval(energies - other_energies, test.xy)
        name = f"energy minus {method}"
        own |= {name: float((energies - other_energies).mean()), f"{name}, low": low, f"{name}, high": high}
    if new:
        theta = model.law.marginal_theta(None)
        own |= deviance_skills(test, found.rate, base_rates(train), theta)
    simple = model.members.predictions(test, lambda log_rate: model.counting.mean_at(log_rate, model.arrays["theta"]))
    ours = partials(y, np.log1p(1e4 * found.rate), test)
    for name, predicted in zip(NAMES, simple):
        theirs = partials(y, predicted, test)
        low, high = np.quantile((ours - theirs)[1:], [0.025, 0.975])
        table.add(
            task,
            test.name,
            seed,
            name,
            {"pearson": float(np.nanmean(gene_pearson(y, predicted))), "partial": theirs[0]},
        )
        name = f"partial minus {name}"
        own |= {name: ours[0] - theirs[0], f"{name}, low": low, f"{name}, high": high}
    own |= {
        "pearson": float(np.nanmean(gene_pearson(y, found.mean))), "partial": float(part.mean()),
        "share of the flow's way": 0.0 if model.field_flows is None else model.field_flows.share,
        "trusted": int(trusted.sum()), "trusted but wrong": int((trusted & (part <= 0)).sum()),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    table.add(task, test.name, seed, "STFlow default", own)


BASELINES = {"independent": independent, "gene copula": gene_copula}
NO_FLOW = "no flow"


def run(args) -> None:
    table = results.Table("joint", again=args.again)
    for task in args.tasks:
        for seed in range(args.seeds):
            slides = load(task, seed if task == "simulated" else 0)
            groups = sorted({s.donor for s in slides}) if task in NEW else [s.name for s in slides]
            for group in groups[-1:] if task == "simulated" else groups:
                tests = [s for s in slides if group == (s.donor if task in NEW else s.name)]
                if not any(table.lacks(task, s.name, seed, NO_FLOW, "partial") for s in tests):  # the newest rows
                    continue
                train, started = [s for s in slides if all(s is not t for t in tests)], time.perf_counter()
                genes = most_variable(train)
                train = [s.align(genes) for s in train]
                model = train_stflow(
                    train, STFlowConfig.of("default"), encoder={"id": "texture"}, seed=seed, max_epochs=args.epochs
                )
                for test in tests:
                    evaluate(table, task, model, test.align(genes), train, seed, started)


def show() -> None:
    """Print the means over seeds."""
    rows = results.read("joint")
    for task in rows["data"].unique():
        part = results.select(rows, data=task)
        mean = results.pivot(part, ["method", "split"])
        print(f"\n### {task}\n\n{mean.round(3).reset_index().to_markdown(index=False)}")
        print(results.pivot(part).round(3).reset_index().to_markdown(index=False))


def parser():
    out = results.parser(__doc__)
    out.add_argument("--tasks", nargs="+", default=["her2st", "lung", "brain", "kidney", "donors", "bulb", "simulated"])
    out.add_argument("--seeds", type=int, default=3)
    out.add_argument("--epochs", type=int, help="of each network; the default's when omitted")
    out.add_argument("--table", action="store_true", help="print the table")
    return out


if __name__ == "__main__":
    arguments = parser().parse_args()
    show() if arguments.table else run(arguments)
