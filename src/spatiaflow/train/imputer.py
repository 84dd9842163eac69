"""Fit an imputer: one pass over reference cells for the scale of columns, one for their moments, small solves, and networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from spatiaflow.models._base import model_card
from spatiaflow.models.counts import library_quantiles, log_normalize
from spatiaflow.models.imputer import BRANCHES, NETWORK, SCORED_CELLS, Design, Imputer, Sums
from spatiaflow.models.masked import Networks
from spatiaflow.models.regression import gene_pearson
from spatiaflow.models.slide import Slide
from spatiaflow.train.masked import N_NETWORKS, fit_networks

ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # penalties, in units of a column's mean sum of squares
N_BLOCKS = 5  # held out in turn
N_COMPONENTS, N_KERNEL, BANDWIDTH = 30, 1500, 0.9  # of the kernel
GENE_BLOCK, SCORED_GENES, LAW_CELLS = 500, 300, 2000
N_LIBRARIES = 6  # bins of library size, each with its own predictive law


def train_imputer(
    slides: list[Slide], inputs: list[str], genes: list[str], *, target_sum: float | None = None,
    branches: Sequence[str] = (*BRANCHES, NETWORK), seed: int = 0, blocks: list[np.ndarray] | None = None,
    use_rep: str | None = None, panel: bool = False,
) -> Imputer:  # fmt: skip
    """Fit an imputer to reference cells.

    Parameters
    ----------
    slides
        Reference cells. ``library`` holds the counts of the genes that the query measures too. ``features`` and ``xy`` are
        used where all slides have them.
    inputs, genes
        Genes that the model reads, and genes that it predicts.
    target_sum
        Values are log1p of counts per ``target_sum``; None takes the median library.
    branches
        Groups of columns to try, and ``"network"``.
    seed
        Of the kernel's random features, of the networks, and of the sample of cells that branches are scored on.
    blocks
        Block of every cell of each slide, held out together; see :func:`held_out_blocks`.
    use_rep
        Name of the features, for the card.
    panel
        The inputs are to be imputed themselves, where a query lacks them. So all choices are made, and reliability is measured,
        on inputs that are hidden a fifth at a time.
    """
    return fit_imputer(
        slides, inputs, genes, target_sum=target_sum, branches=branches, seed=seed, blocks=blocks, use_rep=use_rep,
        panel=panel,
    )[0]  # fmt: skip


def fit_imputer(
    slides: list[Slide], inputs: list[str], genes: list[str], *, target_sum: float | None = None,
    branches: Sequence[str] = (*BRANCHES, NETWORK), seed: int = 0, blocks: list[np.ndarray] | None = None,
    use_rep: str | None = None, panel: bool = False,
) -> tuple[Imputer, Evidence]:  # fmt: skip
    """As :func:`train_imputer`, with the sample of reference cells that branches were scored on."""
    inputs, genes = list(inputs), list(genes)
    if target_sum is None:
        target_sum = max(float(np.median(np.concatenate([slide.library for slide in slides]))), 1.0)
    blocks = held_out_blocks(slides) if blocks is None else blocks
    totals = [np.asarray(slide.align(inputs).counts.sum(0), dtype=np.float64).ravel() for slide in slides]
    total = np.sum(totals, 0)
    kernel = "kernel" in branches and not set(genes) <= set(
        inputs
    )  # it is made of all inputs, so it serves none of them
    design = fit_design(slides, inputs, target_sum, kernel=kernel, seed=seed)
    evidence = collect(design, slides, genes, blocks, seed=seed)
    model = Imputer(inputs, genes, target_sum, design, evidence.total, total / max(total.sum(), 1))
    evidence.folds = model.folds(evidence.x, seed, least=0) if panel else None
    choose(model, evidence, [b for i, b in enumerate(BRANCHES) if b in branches and (design.branch == i).any()])
    if NETWORK in branches and (networks := fit_networks(design, slides, genes, blocks, seed)) is not None:
        choose_network(model, networks, evidence, seed)
    score(model, evidence)
    model.promised = model.reliability if panel else promised(model, evidence, seed)
    boxes = {
        s.name: {"n_obs": len(s)} | ({} if s.xy is None else {"box": [*s.xy.min(0), *s.xy.max(0)]}) for s in slides
    }
    model.card = model_card(
        slides, config={"target_sum": target_sum, "branches": list(branches)}, seed=seed, epochs=1,
        scores={"+".join(names): r for names, r in model.validation_scores.items()}, use_rep=use_rep or "",
        data=boxes,  # positions have any unit here
    )  # fmt: skip
    return model, evidence


def held_out_blocks(slides: list[Slide]) -> list[np.ndarray]:
    """Block of every cell, to be held out together: slides where there are three, else contiguous bands of each.

    Cells without positions are split at random.
    """
    if len(slides) > 2:
        return [np.full(len(slide), i % N_BLOCKS) for i, slide in enumerate(slides)]
    out = []
    for slide in slides:
        place = np.random.default_rng(0).permutation(len(slide))
        if slide.xy is not None:
            along = slide.xy[:, np.argmax(np.ptp(slide.xy, axis=0))]
            place = np.argsort(np.argsort(along, kind="stable"))
        out.append(place * N_BLOCKS // len(slide))
    return out


def fit_design(
    slides: list[Slide], inputs: list[str], target_sum: float, *, kernel: bool = True, seed: int = 0
) -> Design:
    """Centre, scale and components of the columns over some cells."""
    spatial = all(slide.xy is not None for slide in slides)
    n_image = slides[0].features.shape[1] if all(slide.features is not None for slide in slides) else 0
    g = len(inputs)
    branch, gene = Design.layout(g, spatial, n_image)
    nothing = np.zeros(0)
    design = Design(inputs, target_sum, branch, gene, nothing, nothing, spatial=spatial, n_image=n_image)
    n, total, square, cross = 0, np.zeros(len(branch)), np.zeros(len(branch)), np.zeros((g, g))
    for slide in slides:
        for raw in design.raw(slide):
            x = raw.astype(np.float64)
            n, total, square = n + len(x), total + x.sum(0), square + (x**2).sum(0)
            cross = cross + x[:, 1 : g + 1].T @ x[:, 1 : g + 1]
    design.centre = total / n
    std = np.sqrt(np.maximum(square / n - design.centre**2, 0))
    flat = std < 1e-4
    expression = gene >= 0
    design.scale = np.where(expression, np.sqrt(np.maximum(std, 1e-4)), std)
    typical = np.median(design.scale[1 : g + 1][~flat[1 : g + 1]]) if (~flat[1 : g + 1]).any() else 1.0
    # neighbours' means and images are less noisy than a cell's own genes, and there are more of them
    design.scale *= np.where(branch == 1, 1 / 0.3, np.where(expression, 1.0, 1 / (0.5 * typical)))
    design.scale[branch == 3] *= 2.0
    design.scale[flat] = np.inf  # a constant column is not used
    if kernel:
        _add_kernel(design, cross / n, seed)
    return design


def _add_kernel(design: Design, second_moment: np.ndarray, seed: int) -> None:
    """Add random Fourier features (Rahimi and Recht, 2007) of the principal components of the inputs."""
    g = len(design.inputs)
    mean = design.centre[1 : g + 1]
    # from moments, by chunks: PCA of scikit-learn would need all cells in memory at once
    values, axes = np.linalg.eigh(second_moment - np.outer(mean, mean))
    m = min(N_COMPONENTS, g)
    size = max(float(np.sqrt(max(values[-1], 1e-12))), 1e-6)
    rng = np.random.default_rng(seed)
    design.components = (axes[:, ::-1][:, :m] / (size * np.sqrt(6))).astype(np.float32)
    design.directions = (BANDWIDTH * rng.normal(size=((1 + design.spatial) * m, N_KERNEL))).astype(np.float32)
    design.phase = rng.uniform(0, 2 * np.pi, N_KERNEL).astype(np.float32)
    design.branch = np.r_[design.branch, np.repeat(2, N_KERNEL)]
    design.gene = np.r_[design.gene, np.repeat(-1, N_KERNEL)]


@dataclass
class Evidence:
    """Moments of every block of the reference, and a sample of its cells to score on."""

    sums: list[Sums]
    x: np.ndarray  # sampled cells x columns
    y: np.ndarray  # sampled cells x genes, log1p
    counts: sparse.csr_matrix  # sampled cells x genes
    library: np.ndarray  # sampled cells
    block: np.ndarray  # sampled cells
    folds: list[np.ndarray] | None = None  # of a panel: inputs that are hidden together
    by_networks: np.ndarray | None = (
        None  # sampled cells x genes, log1p; each by the network that has not seen its block
    )

    @cached_property
    def total(self) -> Sums:
        """Moments of all blocks."""
        return sum(self.sums[1:], self.sums[0])

    def without(self, block: int) -> Sums:
        """Moments of all other blocks."""
        return self.total - self.sums[block]

    def predict(self, model: Imputer, branches: Sequence[str], alpha: float, genes: np.ndarray) -> np.ndarray:
        """Predict each sampled cell from the blocks that it is not in, cells x genes."""
        out = np.empty((len(self.x), len(genes)), np.float32)
        for b in np.unique(self.block):
            rows = self.block == b
            if self.folds is not None:
                out[rows] = self._hidden(model, branches, alpha, self.folds, b)[:, genes]
                continue
            weights, intercept = model.weights(branches, alpha, genes, self.without(b))
            out[rows] = self.x[rows] @ weights + intercept
        if NETWORK in branches and self.by_networks is not None:
            out = (out + self.by_networks[:, genes]) / 2
        return out

    def _hidden(
        self, model: Imputer, branches: Sequence[str], alpha: float, folds: list[np.ndarray], block: int
    ) -> np.ndarray:
        """Predict the inputs of a block's cells by the ridge, each hidden with its fold (cells x inputs, log1p)."""
        ridge, own = [b for b in branches if b != NETWORK], 1 + np.arange(len(model.inputs))
        scaled = model.hidden(self.x[self.block == block], ridge, folds, self.without(block), alpha)
        scale, centre = model.design.scale[own], model.design.centre[own]
        # a constant gene, which is in no fold, gets its mean
        return np.nan_to_num(scaled) * np.where(np.isfinite(scale), scale, 0.0) + centre


def collect(
    design: Design, slides: list[Slide], genes: list[str], blocks: list[np.ndarray], *, seed: int = 0
) -> Evidence:
    """Sum columns and targets of reference cells by block; ``blocks`` numbers the block of every cell of each slide."""
    p, g, n_blocks = len(design.branch), len(genes), 1 + max(int(b.max()) for b in blocks)
    sums = [Sums(0, *(np.zeros(s) for s in (p, g, (p, p), (p, g)))) for _ in range(n_blocks)]
    rng, kept = np.random.default_rng(seed), []
    share = min(1.0, SCORED_CELLS / sum(map(len, slides)))
    for slide, block in zip(slides, blocks):
        counts, start = slide.align(genes).counts, 0
        targets = log_normalize(counts, slide.library, design.target_sum)
        for x in design.columns(slide):
            rows = np.arange(start, start + len(x))
            start += len(x)
            y = targets[rows].toarray()
            for b in np.unique(block[rows]):
                some, into = block[rows] == b, sums[b]
                u, v = x[some], y[some]
                into.n += len(u)
                into.x += u.sum(0, dtype=np.float64)
                into.y += v.sum(0, dtype=np.float64)
                into.xx += u.T @ u
                into.xy += u.T @ v
            some = np.flatnonzero(rng.random(len(rows)) < share)
            kept.append((x[some], y[some], counts[rows[some]], slide.library[rows[some]], block[rows[some]]))
    xs, ys, counts, library, numbers = zip(*kept)
    sample = (np.concatenate(xs), np.concatenate(ys), sparse.vstack(counts, format="csr"))
    return Evidence(sums, *sample, np.concatenate(library), np.concatenate(numbers))


def mean_pearson(y: np.ndarray, prediction: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Mean over genes of the correlation inside each block."""
    return np.array([np.nanmean(gene_pearson(y[block == b], prediction[block == b])) for b in np.unique(block)])


def choose(model: Imputer, evidence: Evidence, available: list[str]) -> None:
    """Choose penalty and branches on held-out blocks. A branch is added if the mean correlation is higher with it."""
    abundant = _abundant(evidence)

    def best(branches: tuple[str, ...], i: int) -> int:
        """Climb from the penalty that was best with fewer branches."""
        found: dict[int, float] = {}

        def at(k: int) -> float:
            if k not in found:
                predicted = evidence.predict(model, branches, ALPHAS[k], abundant)
                found[k] = float(mean_pearson(evidence.y[:, abundant], predicted, evidence.block).mean())
            return found[k]

        for step in (1, -1):
            while 0 <= i + step < len(ALPHAS) and at(i + step) > at(i):
                i += step
        model.validation_scores[branches], model.penalties[branches] = at(i), ALPHAS[i]
        return i

    model.branches = ("genes",)
    place = best(model.branches, ALPHAS.index(1.0))
    for branch in available[1:]:
        more = (*model.branches, branch)
        next_place = best(more, place)
        if model.validation_scores[more] > model.validation_scores[model.branches]:
            model.branches, place = more, next_place
    model.alpha = ALPHAS[place]


def choose_network(model: Imputer, networks: Networks, evidence: Evidence, seed: int) -> None:
    """Take the mean with the networks if held-out blocks are predicted better.

    A gene that is an input itself is hidden with a fifth of the inputs.
    """
    inner, outer = np.flatnonzero(model.measured), np.flatnonzero(~model.measured)
    folds = model.folds(evidence.x, seed) if evidence.folds is None else evidence.folds
    found = np.empty((len(evidence.x), len(model.genes)), np.float32)
    for i in range(N_NETWORKS):
        rows = np.flatnonzero(evidence.block % N_NETWORKS == i)
        x, names = evidence.x[rows], [model.genes[k] for k in outer]
        found[np.ix_(rows, outer)] = networks.predict(x, model.seen, names, i)
        if len(inner):
            found[np.ix_(rows, inner)] = networks.hidden(x, model.seen, folds, i)[:, model.own[inner] - 1]
    evidence.by_networks = np.where(np.isfinite(found), found, model.sums.y / model.sums.n).astype(np.float32)
    more, abundant = (*model.branches, NETWORK), _abundant(evidence)
    predicted = evidence.predict(model, more, model.alpha, abundant)
    model.validation_scores[more] = float(mean_pearson(evidence.y[:, abundant], predicted, evidence.block).mean())
    model.penalties[more] = model.alpha
    if model.validation_scores[more] > model.validation_scores[model.branches]:
        model.branches, model.networks = more, networks


def _abundant(evidence: Evidence) -> np.ndarray:
    """Genes that branches are scored on, those of the most counts."""
    return np.argsort(-np.asarray(evidence.counts.sum(0)).ravel(), kind="stable")[:SCORED_GENES]


def score(model: Imputer, evidence: Evidence) -> None:
    """Set reliability and predictive law of every gene from held-out blocks."""
    edges = np.quantile(evidence.library, np.linspace(0, 1, N_LIBRARIES + 1))
    model.edges = np.unique(edges[1:-1])
    model.edges = model.edges[np.unique(model.bins(evidence.library))[1:] - 1]  # no bin is empty
    bins = model.bins(evidence.library)
    model.libraries = [library_quantiles(evidence.library[bins == i], 64) for i in range(len(model.edges) + 1)]
    model.reliability = np.empty(len(model.genes), np.float32)
    model.theta = np.empty((len(model.libraries), len(model.genes)))
    for s in range(0, len(model.genes), GENE_BLOCK):
        at = np.arange(s, min(s + GENE_BLOCK, len(model.genes)))
        mean = np.maximum(evidence.predict(model, model.branches, model.alpha, at), 0)
        model.reliability[at] = np.nan_to_num(gene_pearson(evidence.y[:, at], mean))
        for i, law in enumerate(model.laws):
            rows = np.flatnonzero(bins == i)[:LAW_CELLS]
            model.theta[i, at] = law.fit_theta(
                mean[rows], evidence.counts[rows][:, at].toarray(), evidence.library[rows]
            )


def promised(model: Imputer, evidence: Evidence, seed: int = 0) -> np.ndarray:
    """Correlation of every input in held-out blocks of the reference, hidden with a fifth of the inputs, as in a query."""
    branches, g = [b for b in model.branches if b != "kernel"], len(model.inputs)
    folds, predicted = model.folds(evidence.x, seed), np.empty((len(evidence.x), g), np.float32)
    for b in np.unique(evidence.block):
        rows = evidence.block == b
        predicted[rows] = model.hidden(
            evidence.x[rows], branches, folds, evidence.without(b), model.alpha, int(b) % N_NETWORKS
        )
    return np.nan_to_num(gene_pearson(evidence.x[:, 1 : 1 + g], predicted))
