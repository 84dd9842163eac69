"""Imputation of genes by ridge regression and networks: what they read, and the model that holds what was learned.

A gene is predicted from the other genes of the cell, those of its neighbours, a kernel of both, and the cell's image. The ridge
keeps only sums over the reference cells (moments). Moments can be cut down to any set of inputs, and the networks are told
which inputs are there, so one model serves every panel. :func:`spatiaflow.train.imputer.train_imputer` fits it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, from_numpy

from spatiaflow.models import _base
from spatiaflow.models.counts import CountLaw, draw_counts, log_normalize
from spatiaflow.models.masked import Networks
from spatiaflow.models.regression import Moments, gene_pearson
from spatiaflow.models.slide import Slide
from spatiaflow.models.spatial import spatial_graph

NEAR = (5, 15, 50)  # neighbours whose genes are averaged
BRANCHES = ("genes", "neighbors", "kernel", "image")  # columns of the ridge
NETWORK = "network"  # the last branch: the mean of the ridge's prediction and the networks' is taken
CHUNK = 4096  # cells whose columns are in memory at once
SCORED_CELLS = 8000  # cells that branches are scored on
MIN_HIDDEN = 5  # genes that say how far what was learned holds in the query
FLOOR = 0.05  # share of a gene's mean; below it the predictive law is that of the floor


def neighbor_means(xy: np.ndarray, sizes: tuple[int, ...] = NEAR) -> list[sparse.csr_matrix]:
    """Return sparse n x n matrices that average over the 5, 15 and 50 nearest cells, without the cell itself."""
    out = []
    for k in sizes:
        graph = spatial_graph(xy, k)
        mask, index = graph.mask.numpy(), graph.index.numpy()
        count = mask.sum(1)
        weight = np.repeat(1 / np.maximum(count, 1), count).astype(np.float32)
        out.append(sparse.csr_matrix((weight, index[mask], np.r_[0, np.cumsum(count)]), (len(xy), len(xy))))
    return out


@dataclass
class Design:
    """Columns of the regression: log library, own genes, neighbours' genes, image, kernel. How each is centred and scaled.

    Fitted to reference cells only, by :func:`spatiaflow.train.imputer.fit_design`. An expression column is divided by the square
    root of its standard deviation. Without division abundant genes would dominate. With full standardisation the noise of
    rare genes would.
    """

    inputs: list[str]
    target_sum: float
    branch: np.ndarray  # columns, index into BRANCHES
    gene: np.ndarray  # columns, index into inputs, -1 where a column is not of one gene
    centre: np.ndarray = field(repr=False)  # columns without the kernel
    scale: np.ndarray = field(repr=False)
    components: np.ndarray | None = field(default=None, repr=False)  # inputs x components, scaled
    directions: np.ndarray | None = field(default=None, repr=False)  # 2 components x kernel features
    phase: np.ndarray | None = field(default=None, repr=False)
    spatial: bool = False
    n_image: int = 0

    @staticmethod
    def layout(g: int, spatial: bool, n_image: int) -> tuple[np.ndarray, np.ndarray]:
        """Branch and gene of every column: log library, own genes, neighbours' genes, image."""
        n_near = len(NEAR) if spatial else 0
        branch = np.r_[0, np.repeat(0, g), np.repeat(1, n_near * g), np.repeat(3, n_image)]
        return branch, np.r_[-1, np.tile(np.arange(g), 1 + n_near), np.repeat(-1, n_image)]

    def raw(self, slide: Slide) -> Iterator[np.ndarray]:
        """Columns before scaling, without the kernel, chunk by chunk of cells (each cells x columns, float32)."""
        slide = slide.align(self.inputs)
        own = log_normalize(slide.counts, slide.library, self.target_sum)
        means = neighbor_means(slide.xy) if self.spatial else []
        for s in range(0, len(slide), CHUNK):
            rows = slice(s, min(s + CHUNK, len(slide)))
            parts = [np.log(np.maximum(slide.library[rows], 1))[:, None], own[rows].toarray()]
            parts += [(m[rows] @ own).toarray() for m in means]
            yield np.hstack([*parts, *([slide.features[rows]] if self.n_image else [])]).astype(np.float32)

    def columns(self, slide: Slide) -> Iterator[np.ndarray]:
        """Scaled columns with the kernel's, chunk by chunk of cells (each cells x columns, float32)."""
        g = len(self.inputs)
        for raw in self.raw(slide):
            x = (raw - self.centre.astype(np.float32)) / self.scale.astype(np.float32)
            if self.components is not None:
                z = [(raw[:, 1 : g + 1] - self.centre[1 : g + 1].astype(np.float32)) @ self.components]
                if self.spatial:
                    at = 1 + g * (1 + NEAR.index(15))
                    z.append((raw[:, at : at + g] - self.centre[at : at + g].astype(np.float32)) @ self.components)
                kernel = np.cos(np.hstack(z) @ self.directions + self.phase)
                x = np.hstack([x, (0.3 * kernel).astype(np.float32)])
            yield x

    def taken(self, branches: Sequence[str]) -> np.ndarray:
        """Columns of some branches, bool."""
        return np.isin(self.branch, [BRANCHES.index(b) for b in branches if b != NETWORK])


class Sums(Moments):
    """Moments of columns and targets over some cells, and ridge regression on some of the columns."""

    def ridge(
        self, columns: np.ndarray, alpha: float, targets: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients (columns x targets, 0 where ``columns`` is False) and intercepts.

        ``targets`` replaces the moments ``xy`` and ``y`` by those of other targets.
        """
        at = np.flatnonzero(columns)
        xy, y = (self.xy, self.y) if targets is None else targets
        mean_x, mean_y = self.x[at] / self.n, y / self.n
        centred = self.xx[np.ix_(at, at)] - self.n * np.outer(mean_x, mean_x)
        penalty = alpha * max(float(np.trace(centred)) / len(at), 1e-9)
        centred[np.diag_indices(len(at))] += penalty
        right = xy[at] - self.n * np.outer(mean_x, mean_y)
        out = np.zeros((len(columns), right.shape[1]), np.float32)
        out[at] = cho_solve(cho_factor(centred, lower=True, overwrite_a=True), right)
        return out, (mean_y - mean_x @ out[at]).astype(np.float32)

    def each_from_rest(
        self, columns: np.ndarray, alpha: float, own: np.ndarray, scale: np.ndarray, centre: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`ridge` for targets that are columns themselves (``own``), each predicted from all other columns.

        One inverse serves all of them. With A the inverse of the penalised moments, the regression of column g on the others
        has the coefficients -A[:, g] / A[g, g].
        """
        at, scale = np.flatnonzero(columns), np.where(np.isfinite(scale), scale, 0.0)  # a constant gene gets its mean
        mean = self.x[at] / self.n
        centred = self.xx[np.ix_(at, at)] - self.n * np.outer(mean, mean)
        centred[np.diag_indices(len(at))] += alpha * max(float(np.trace(centred)) / len(at), 1e-9)
        inverse = cho_solve(cho_factor(centred, lower=True, overwrite_a=True), np.eye(len(at)))
        place = np.searchsorted(at, own)
        found = -inverse[:, place] / inverse[place, place]
        found[place, np.arange(len(own))] = 0
        out = np.zeros((len(columns), len(own)), np.float32)
        out[at] = found * scale[own]
        means = self.x[own] / self.n * scale[own] + centre[own]  # back to the scale of the target
        return out, (means - mean @ out[at]).astype(np.float32)


@dataclass(eq=False, repr=False)
class Imputer(_base.Model):
    """Genes of reference cells as functions of the genes that the query measures too.

    Attributes
    ----------
    inputs, genes
        Genes that the model reads, and genes that it predicts.
    target_sum
        Values are log1p of counts per ``target_sum``.
    design
        Columns of the regression.
    sums
        Moments of columns and targets over all reference cells.
    share
        Mean share of each input in the counts of all inputs.
    branches
        Groups of columns in use: ``"genes"`` of the cell, its ``"neighbors"``, the ``"kernel"`` and the ``"image"``; and
        ``"network"``, if the mean with the networks' prediction is taken. Each one improved the prediction of held-out
        blocks of the reference.
    alpha
        Penalty, in units of a column's mean sum of squares.
    validation_scores, penalties
        Mean correlation in held-out blocks, and the penalty that gave it, for every set of branches that was tried.
    reliability
        For every gene the correlation of measured and predicted expression in held-out blocks.
    edges, libraries, theta
        Predictive law: bounds of bins of library size, quantiles of the library in each bin, and the dispersion of each
        gene in each bin.
    promised
        For every input the correlation in held-out blocks of the reference, predicted without the input itself.
    checked, achieved
        After :meth:`adapt`: what each branch added to the correlation in the query, and the correlation of every input that
        was hidden there; NaN where it was not.
    n_checked
        Cells of the query that this was measured on.
    seen
        Which inputs the query measures, bool.
    networks
        Trained on the same columns without the kernel; None where the reference has fewer than 8,000 cells.
    card
        Reference data and settings.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("imputation-pancreas-small"))
    >>> model
    Imputer: 377 genes from 377, genes + neighbors + network
    """

    inputs: list[str]
    genes: list[str]
    target_sum: float
    design: Design
    sums: Sums
    share: np.ndarray
    branches: tuple[str, ...] = ("genes",)
    alpha: float = 1.0
    validation_scores: dict[tuple[str, ...], float] = field(default_factory=dict)
    penalties: dict[tuple[str, ...], float] = field(default_factory=dict)
    reliability: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    edges: np.ndarray = field(default_factory=lambda: np.zeros(0))
    libraries: list[np.ndarray] = field(default_factory=list)
    theta: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    promised: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    checked: dict[str, float] = field(default_factory=dict)
    achieved: np.ndarray = field(default_factory=lambda: np.zeros(0))
    n_checked: int = 0
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    networks: Networks | None = None
    card: dict = field(default_factory=dict)

    verb = "sf.tl.impute_genes"

    def __post_init__(self) -> None:
        place = {gene: 1 + i for i, gene in enumerate(self.inputs)}
        self.own = np.array(
            [place.get(gene, -1) for gene in self.genes]
        )  # column of a gene that is an input too, or -1
        if not len(self.seen):
            self.seen = np.ones(len(self.inputs), bool)
        if not len(self.promised) and self.genes == self.inputs:
            self.promised = self.reliability

    def __repr__(self) -> str:
        return f"Imputer: {len(self.genes)} genes from {len(self.inputs)}, {' + '.join(self.branches)}"

    @property
    def measured(self) -> np.ndarray:
        """Which of the genes are inputs that the query measures too, bool."""
        return (self.own >= 0) & self.seen[self.own - 1]

    def _taken(self, branches: Sequence[str]) -> np.ndarray:
        """Columns of some branches, without those of genes that the query does not measure."""
        gene = self.design.gene
        return self.design.taken(branches) & ((gene < 0) | self.seen[gene])

    def weights(
        self, branches: Sequence[str], alpha: float, genes: np.ndarray, sums: Sums | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients (columns x genes) and intercepts of some genes; an input is predicted from all other inputs.

        ``sums`` replaces the moments of all reference cells by those of some.
        """
        sums = self.sums if sums is None else sums
        columns, out = self._taken(branches), np.zeros((len(self.design.branch), len(genes)), np.float32)
        intercept, inner = np.zeros(len(genes), np.float32), self.measured[genes]
        if not inner.all():
            at = genes[~inner]
            out[:, ~inner], intercept[~inner] = sums.ridge(columns, alpha, (sums.xy[:, at], sums.y[at]))
        if inner.any():  # the kernel is made of all inputs, so it has seen the gene itself
            columns = self._taken([b for b in branches if b != "kernel"])
            scale, centre = self.design.scale, self.design.centre
            out[:, inner], intercept[inner] = sums.each_from_rest(columns, alpha, self.own[genes[inner]], scale, centre)
        return out, intercept

    def bins(self, library: np.ndarray) -> np.ndarray:
        """Bin of each library size, whose predictive law is used."""
        return np.searchsorted(self.edges, library, side="right")

    @cached_property
    def laws(self) -> list[CountLaw]:
        """Predictive law of each bin of library sizes."""
        return [CountLaw(library, self.target_sum, np.zeros(())) for library in self.libraries]

    # ---- for other queries, and in a file ------------------------------------------------------------------------------

    def restricted(self, measured: list[str], genes: list[str]) -> Imputer:
        """Return the model for a query that measures only some of the inputs.

        Needs a model without kernel, whose columns are not of single genes.
        """
        out = copy(self)
        out.seen = np.isin(self.inputs, measured)
        place = {gene: i for i, gene in enumerate(self.genes)}
        at, total = np.array([place[gene] for gene in genes]), self.sums
        out.sums = Sums(total.n, total.x, total.y[at], total.xx, total.xy[:, at])
        out.genes, out.checked = genes, {}
        out.own, out.reliability, out.theta = self.own[at], self.reliability[at], self.theta[:, at]
        return out

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """Return description and tensors: sums and settings, no cell.

        Raises
        ------
        ValueError
            The model predicts other genes than its inputs, or has a kernel.
        """
        if self.genes != self.inputs or "kernel" in self.branches:
            raise ValueError(
                "this model was fitted to one reference and one query, and cannot be saved. sf.tl.train_imputation returns "
                "a model that can."
            )
        scores = [[list(names), score] for names, score in self.validation_scores.items()]
        description = {
            "genes": self.genes, "target_sum": self.target_sum, "n": self.sums.n, "branches": self.branches,
            "alpha": self.alpha, "validation_scores": scores, "spatial": self.design.spatial, "n_image": self.design.n_image,
            "networks": 0 if self.networks is None else len(self.networks.members), "card": self.card,
        }  # fmt: skip
        return description, self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        arrays = {
            "xx": self.sums.xx[np.triu_indices(len(self.sums.x))], "x": self.sums.x, "centre": self.design.centre,
            "scale": self.design.scale, "share": self.share, "reliability": self.reliability, "theta": self.theta,
            "libraries": np.stack(self.libraries), "edges": self.edges,
        }  # fmt: skip
        out = {name: from_numpy(np.asarray(v, np.float32)) for name, v in arrays.items()}
        if self.networks is not None:
            out |= {f"networks.{name}": v.half() for name, v in self.networks.state_dict().items()}
        return out

    @property
    def sha256(self) -> str:
        """SHA-256 over all tensors; also of a model that cannot be saved."""
        return _base.tensors_sha256(self._tensors())

    @classmethod
    def from_state(cls, description: dict, tensors: dict[str, Tensor]) -> Imputer:
        """Rebuild a model from the description and tensors of its file."""
        d, a = (
            description,
            {k: v.numpy().astype(np.float64) for k, v in tensors.items() if not k.startswith("networks.")},
        )
        genes, p = d["genes"], len(a["x"])
        scores = d["judged"] if "judged" in d else d["validation_scores"]  # its name until 0.1
        xx = np.zeros((p, p))
        xx[np.triu_indices(p)] = a["xx"]
        xx += np.triu(xx, 1).T
        own = 1 + np.arange(len(genes))
        scale, centre = (a[name][own] for name in ("scale", "centre"))  # back to the unit of targets
        scale = np.where(np.isfinite(scale), scale, 0.0)
        y, xy = a["x"][own] * scale + d["n"] * centre, xx[:, own] * scale + np.outer(a["x"], centre)
        layout = Design.layout(len(genes), d["spatial"], d["n_image"])
        options = {"spatial": d["spatial"], "n_image": d["n_image"]}
        design, networks = Design(genes, d["target_sum"], *layout, a["centre"], a["scale"], **options), None
        if n := d.get("networks"):
            networks = Networks(design, genes, n)
            networks.load_state_dict({k.removeprefix("networks."): v for k, v in tensors.items() if k not in a})
        return cls(
            inputs=genes, genes=genes, target_sum=d["target_sum"], share=a["share"], design=design, networks=networks,
            sums=Sums(d["n"], a["x"], y, xx, xy), branches=tuple(d["branches"]), alpha=d["alpha"],
            validation_scores={tuple(names): score for names, score in scores},
            reliability=a["reliability"].astype(np.float32), edges=a["edges"], libraries=[*a["libraries"]], theta=a["theta"],
            card=d["card"],
        )  # fmt: skip

    # ---- prediction --------------------------------------------------------------------------------------------------

    def adapt(self, query: list[Slide], *, seed: int = 0) -> None:
        """Drop the branches that do not help in the query, and measure how well hidden genes are predicted there.

        Each fifth of the genes that the query measures is hidden in turn and predicted from the other genes. Neighbours, image
        and networks are dropped if they lower the mean correlation of these genes. The genes to impute are never looked at. The
        kernel is made of all inputs at once, so it cannot be checked in this way.
        """
        step = max(1, sum(map(len, query)) // SCORED_CELLS)
        x = np.concatenate([part[::step] for one in query for part in self.design.columns(one)])
        folds = self.folds(x, seed)
        kept: tuple[str, ...] = ("genes",)
        own = x[:, 1 : 1 + len(self.inputs)]
        self.achieved = gene_pearson(own, self.hidden(x, kept, folds, self.sums, self.alpha))
        for branch in (b for b in ("neighbors", "image", NETWORK) if b in self.branches):
            more = gene_pearson(own, self.hidden(x, (*kept, branch), folds, self.sums, self.alpha))
            self.checked[branch] = float(np.nanmean(more)) - float(np.nanmean(self.achieved))
            if self.checked[branch] > 0:
                kept, self.achieved = (*kept, branch), more
        self.branches = tuple(b for b in self.branches if b in kept or b == "kernel")
        self.n_checked = len(x)

    def folds(self, x: np.ndarray, seed: int = 0, n: int = 5, least: float = 0.02) -> list[np.ndarray]:
        """Inputs that are hidden together, in ``n`` parts: those in more than a share ``least`` of cells (cells x columns)."""
        own = 1 + np.arange(len(self.inputs))
        there = (x[:, own] > x[:, own].min(0)).mean(0) * np.isfinite(self.design.scale[own]) * self.seen
        usable = np.flatnonzero(there > (least if (there > least).sum() >= 10 else 0))
        return [f for f in np.array_split(np.random.default_rng(seed).permutation(usable), n) if len(f)]

    def hidden(
        self, x: np.ndarray, branches: Sequence[str], folds: list[np.ndarray], sums: Sums, alpha: float,
        member: int | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Predict inputs (cells x inputs, scaled) that are hidden with their fold from the rest; NaN: in no fold.

        ``member`` is the only one of the networks that is asked.
        """
        own, columns = 1 + np.arange(len(self.inputs)), self._taken(branches)
        out = np.full((len(x), len(own)), np.nan, np.float32)
        for fold in folds:
            left = columns & ~np.isin(self.design.gene, fold)
            weights, intercept = sums.ridge(left, alpha, (sums.xx[:, own[fold]], sums.x[own[fold]]))
            out[:, fold] = x @ weights + intercept
        if NETWORK in branches and self.networks is not None:
            own = own[np.isfinite(self.design.scale[own])]
            other = self.networks.hidden(x, self.seen, folds, member)[:, own - 1]
            out[:, own - 1] = (out[:, own - 1] + (other - self.design.centre[own]) / self.design.scale[own]) / 2
        return out

    def transfer(self) -> tuple[float, float, float, float]:
        """How much of the promised correlation the query achieved (at most 1), its standard error, and the median of both.

        The slope of achieved on promised correlations of the genes that :meth:`adapt` hid; 1 where too few were.
        """
        known = np.isfinite(self.achieved) if len(self.achieved) == len(self.promised) else np.zeros(0, bool)
        promised, achieved = np.maximum(self.promised[known], 0), self.achieved[known]
        weight = float((promised**2).sum())
        if len(promised) < MIN_HIDDEN or weight < 1e-6:
            return 1.0, 0.0, np.nan, np.nan
        ratio = float(np.clip((promised * achieved).sum() / weight, 0, 1))
        error = 1 / np.sqrt(self.n_checked * weight)
        return ratio, float(error), float(np.median(promised)), float(np.median(achieved))

    @property
    def floor(self) -> np.ndarray:
        """Smallest mean at which the law of a gene is evaluated. No prediction is certain that a gene is off."""
        return (FLOOR * self.sums.y / self.sums.n).astype(np.float32)

    def predict(self, query: Slide) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield mean and standard deviation (cells x genes, log1p of counts per ``target_sum``), chunk by chunk of cells."""
        genes, floor, query = np.arange(len(self.genes)), self.floor, query.align(self.inputs)
        weights, intercept = self.weights(self.branches, self.alpha, genes)
        inner, start = np.flatnonzero(self.measured), 0
        networks = self.networks if NETWORK in self.branches else None
        outer = np.flatnonzero(~self.measured)
        for x in self.design.columns(query):
            rows = slice(start, start + len(x))
            start += len(x)
            mean = (x @ weights + intercept).astype(np.float32)
            if networks is not None:
                other = networks.predict(x, self.seen, [self.genes[i] for i in outer])
                mean[:, outer] = (mean[:, outer] + other) / 2
            mean = np.maximum(mean, 0)
            bins, std = self.bins(query.library[rows]), self.std(mean, query.library[rows])
            for i, law in enumerate(self.laws):
                some = np.flatnonzero(bins == i)
                if len(inner) and len(some):
                    at, theta = np.ix_(some, inner), self.theta[i, inner]
                    counts = query.counts[rows][some][:, self.own[inner] - 1].toarray()
                    rate = law.rate_at(np.maximum(mean[at], floor[inner]), theta)
                    mean[at], std[at] = self._seen(counts, query.library[rows][some], rate, theta)
            yield mean, std

    def std(self, mean: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Standard deviation of the predictive law around ``mean`` (cells x genes), for the cells' own library sizes."""
        out, bins = np.empty_like(mean), self.bins(library)
        for i, law in enumerate(self.laws):
            some = np.flatnonzero(bins == i)
            out[some] = law.std_at(np.maximum(mean[some], self.floor), self.theta[i])
        return out

    def draws(self, mean: np.ndarray, library: np.ndarray, gene: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws (n x cells) of the predictive law of one gene around its mean, for the cells' own library sizes."""
        out, bins = np.empty((n, len(mean)), np.float32), self.bins(library)
        for i, law in enumerate(self.laws):
            some, theta = np.flatnonzero(bins == i), self.theta[i, gene]
            rate = law.rate_at(np.maximum(mean[some], self.floor[gene])[:, None], np.array([theta]))[:, 0]
            counts = draw_counts(np.repeat((library[some] * rate)[None], n, 0), theta, 0.0, rng)
            out[:, some] = log_normalize(counts.T, library[some], self.target_sum).T
        return out

    def _seen(
        self, counts: np.ndarray, library: np.ndarray, rate: np.ndarray, theta: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and std of genes whose counts (n x genes) are known: gamma prior of mean ``rate``, Poisson counts."""
        shape, scale = theta + counts, 1 / (theta / rate + library[:, None])
        expected = self.target_sum * shape * scale
        return np.log1p(expected), self.target_sum * np.sqrt(shape) * scale / (1 + expected)
