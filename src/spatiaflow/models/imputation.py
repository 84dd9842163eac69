"""Genes that were not measured, from a cell's other genes, its neighbours and its image: ridge regression on moments.

All that is learned from reference cells are sums over them (moments), which add over blocks of tissue and can be cut down to
any set of inputs. So penalties and branches are judged by leaving blocks out at no further pass over the cells, and a branch
is judged once more in the query, on genes that it measures, each fifth of them predicted from the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

from spatiaflow.models import _base
from spatiaflow.models.counts import CountLaw, draw_counts, library_quantiles, log_normalize
from spatiaflow.models.design import BRANCHES, CellTable, Design
from spatiaflow.models.simple import Moments, gene_pearson

ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # penalty, in units of a column's mean sum of squares
GENE_BLOCK, JUDGED_CELLS, JUDGED_GENES, LAW_CELLS = 500, 8000, 300, 2000
FLOOR = 0.05  # of a gene's mean: below it the predictive law is that of the floor
N_LIBRARIES = 6  # bins of library size, each with its own predictive law


class Sums(Moments):
    """Moments of columns and targets over some cells, and ridge regressions on some of the columns."""

    def ridge(self, columns: np.ndarray, alpha: float, targets=None) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients (p x targets, 0 at columns not given) and intercepts; ``targets``: moments other than ``xy, y``."""
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

    def each_from_rest(self, columns: np.ndarray, alpha: float, own: np.ndarray, scale: np.ndarray, centre: np.ndarray):
        """As :meth:`ridge`, for targets that are columns themselves (``own``), each from all columns given but itself.

        One inverse serves all: regressing column g on the rest has the coefficients -A[:, g] / A[g, g], where A is the inverse
        of the penalised moments.
        """
        at, scale = np.flatnonzero(columns), np.where(np.isfinite(scale), scale, 0.0)  # what never varies: its mean
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


@dataclass
class Gathered:
    """Moments of every block of the reference, and a sample of its cells to judge by."""

    sums: list[Sums]
    x: np.ndarray  # sampled cells x p
    y: np.ndarray  # sampled cells x genes, log1p
    counts: sparse.csr_matrix  # sampled cells x genes
    library: np.ndarray  # sampled cells
    block: np.ndarray  # sampled cells

    @cached_property
    def total(self) -> Sums:
        """Moments of all blocks."""
        return sum(self.sums[1:], self.sums[0])

    def without(self, block: int) -> Sums:
        """Moments of all other blocks."""
        return self.total - self.sums[block]


def gather(design: Design, cells: list[CellTable], blocks: list[np.ndarray], *, seed: int = 0) -> Gathered:
    """Moments of reference cells by block; ``blocks`` numbers the block of every cell of each slide."""
    p, genes, n_blocks = len(design.branch), cells[0].targets.shape[1], 1 + max(int(b.max()) for b in blocks)
    sums = [Sums(0, *(np.zeros(s) for s in (p, genes, (p, p), (p, genes)))) for _ in range(n_blocks)]
    rng, kept = np.random.default_rng(seed), []
    share = min(1.0, JUDGED_CELLS / sum(map(len, cells)))
    for one, block in zip(cells, blocks):
        targets, start = log_normalize(one.targets, one.library, design.target_sum), 0
        for x in design.columns(one):
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
            kept.append((x[some], y[some], one.targets[rows[some]], one.library[rows[some]], block[rows[some]]))
    x, y, counts, library, block = zip(*kept)
    sample = (np.concatenate(x), np.concatenate(y), sparse.vstack(counts, format="csr"))
    return Gathered(sums, *sample, np.concatenate(library), np.concatenate(block))


def mean_pearson(y: np.ndarray, prediction: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Mean over genes of the correlation inside each block."""
    return np.array([np.nanmean(gene_pearson(y[block == b], prediction[block == b])) for b in np.unique(block)])


class Imputer(_base.Model):
    """Genes of reference cells as functions of what the query measures too.

    Attributes
    ----------
    inputs, genes
        Genes that it reads, and those that it gives.
    branches
        Of the cell's ``"genes"``, its ``"neighbors"``, the ``"kernel"`` and the ``"image"``, those that predict left-out
        blocks of the reference better than without them.
    reliability
        For every gene the correlation of measured and predicted expression in left-out blocks.
    judged, penalties
        Mean correlation in left-out blocks, and the penalty that gave it, for every set of branches that was tried.
    checked
        By branch what it added in the query, after :meth:`adapt`.
    share
        Mean share of each input in the counts of all inputs.
    card
        Reference data and settings, when made by :func:`spatiaflow.tl.train_imputation`.

    Examples
    --------
    >>> model = sf.models.load(sf.datasets.weights("imputation-pancreas-small"))
    >>> model
    Imputer: 377 genes from 377, genes + neighbors
    """

    verb = "sf.tl.impute_genes"

    def __init__(
        self, cells: list[CellTable], blocks: list[np.ndarray], inputs: list[str], genes: list[str], *,
        target_sum: float, branches: tuple[str, ...] = BRANCHES, seed: int = 0, card: dict | None = None,
    ):  # fmt: skip
        self.inputs, self.genes, self.target_sum, self.card = inputs, genes, target_sum, card or {}
        self.checked: dict[str, float] = {}
        self.seen = np.ones(len(inputs), bool)  # which inputs the query measures
        total = sum(np.asarray(c.counts.sum(0), dtype=np.float64).ravel() for c in cells)
        self.share = total / max(total.sum(), 1)
        place = {gene: 1 + i for i, gene in enumerate(inputs)}
        self.own = np.array([place.get(gene, -1) for gene in genes])  # column of a gene that is an input too
        kernel = "kernel" in branches and (self.own < 0).any()  # it is made of all inputs, so it serves none of them
        self.design = Design.fit(cells, inputs, target_sum, kernel=kernel, seed=seed)
        self.evidence = gather(self.design, cells, blocks, seed=seed)
        there = [b for i, b in enumerate(BRANCHES) if b in branches and (self.design.branch == i).any()]
        self._choose(there)
        self._judge()

    def __repr__(self) -> str:
        return f"Imputer: {len(self.genes)} genes from {len(self.inputs)}, {' + '.join(self.branches)}"

    @property
    def measured(self) -> np.ndarray:
        """Which of the genes are inputs that the query measures too, bool."""
        return (self.own >= 0) & self.seen[self.own - 1]

    def _taken(self, branches: tuple[str, ...]) -> np.ndarray:
        """Columns of some branches, without those of genes that the query does not measure."""
        gene = self.design.gene
        return self.design.taken(branches) & ((gene < 0) | self.seen[gene])

    def _weights(self, sums: Sums, branches, alpha: float, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients and intercepts of some genes; a gene that is an input too is predicted from all others."""
        columns, out = self._taken(branches), np.zeros((len(self.design.branch), len(genes)), np.float32)
        intercept, inner = np.zeros(len(genes), np.float32), self.measured[genes]
        if not inner.all():
            at = genes[~inner]
            out[:, ~inner], intercept[~inner] = sums.ridge(columns, alpha, (sums.xy[:, at], sums.y[at]))
        if inner.any():  # the kernel is made of all inputs, the gene's own among them
            columns = self._taken(tuple(b for b in branches if b != "kernel"))
            scale, centre = self.design.scale, self.design.centre
            out[:, inner], intercept[inner] = sums.each_from_rest(columns, alpha, self.own[genes[inner]], scale, centre)
        return out, intercept

    # ---- what the reference says ------------------------------------------------------------------------------------

    def held_out(self, branches: tuple[str, ...], alpha: float, genes: np.ndarray) -> np.ndarray:
        """Predictions of sampled reference cells by the other blocks, cells x genes."""
        e, out = self.evidence, np.empty((len(self.evidence.x), len(genes)), np.float32)
        for b in np.unique(e.block):
            rows = e.block == b
            weights, intercept = self._weights(e.without(b), branches, alpha, genes)
            out[rows] = e.x[rows] @ weights + intercept
        return out

    def _choose(self, there: list[str]) -> None:
        """Penalty and branches by left-out blocks; a branch is added where their mean correlation is higher with it."""
        e = self.evidence
        abundant = np.argsort(-np.asarray(e.counts.sum(0)).ravel(), kind="stable")[:JUDGED_GENES]

        def best(branches, i):
            """Climb from the penalty that was best with fewer branches."""
            found = {}

            def at(k):
                if k not in found:
                    held_out = self.held_out(branches, ALPHAS[k], abundant)
                    found[k] = float(mean_pearson(e.y[:, abundant], held_out, e.block).mean())
                return found[k]

            for step in (1, -1):
                while 0 <= i + step < len(ALPHAS) and at(i + step) > at(i):
                    i += step
            self.judged[branches], self.penalties[branches] = at(i), ALPHAS[i]
            return i

        self.judged: dict[tuple[str, ...], float] = {}
        self.penalties: dict[tuple[str, ...], float] = {}
        self.branches, place = ("genes",), best(("genes",), ALPHAS.index(1.0))
        for branch in there[1:]:
            more = (*self.branches, branch)
            next_place = best(more, place)
            if self.judged[more] > self.judged[self.branches]:
                self.branches, place = more, next_place
        self.alpha = ALPHAS[place]

    def _judge(self) -> None:
        """Reliability and predictive law of every gene, from left-out blocks."""
        e = self.evidence
        edges = np.quantile(e.library, np.linspace(0, 1, N_LIBRARIES + 1))
        self.edges = np.unique(edges[1:-1])
        bins = self._bin(e.library)
        self.libraries = [library_quantiles(e.library[bins == i], 64) for i in range(len(self.edges) + 1)]
        self.reliability = np.empty(len(self.genes), np.float32)
        self.theta = np.empty((len(self.libraries), len(self.genes)))
        for s in range(0, len(self.genes), GENE_BLOCK):
            at = np.arange(s, min(s + GENE_BLOCK, len(self.genes)))
            mean = np.maximum(self.held_out(self.branches, self.alpha, at), 0)
            self.reliability[at] = np.nan_to_num(gene_pearson(e.y[:, at], mean))
            for i, law in enumerate(self.laws):
                rows = np.flatnonzero(bins == i)[:LAW_CELLS]
                self.theta[i, at] = law.fit_theta(mean[rows], e.counts[rows][:, at].toarray(), e.library[rows])

    def _bin(self, library: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.edges, library, side="right")

    @cached_property
    def laws(self) -> list[CountLaw]:
        """Predictive law of each bin of library sizes."""
        return [CountLaw(library, self.target_sum, np.zeros(())) for library in self.libraries]

    # ---- kept for other queries ------------------------------------------------------------------------------------------

    def restricted(self, measured: list[str], genes: list[str]) -> Imputer:
        """For a query that measures only some of the inputs: what remains of the sums, solved anew.

        Needs a model without kernel, whose columns are not of single genes.
        """
        out = copy(self)
        out.seen = np.isin(self.inputs, measured)
        place = {gene: i for i, gene in enumerate(self.genes)}
        at = np.array([place[gene] for gene in genes])
        total = self.evidence.total
        sums = Sums(total.n, total.x, total.y[at], total.xx, total.xy[:, at])
        out.evidence, out.genes, out.checked = Gathered([sums], *[None] * 5), genes, {}
        out.own, out.reliability, out.theta = self.own[at], self.reliability[at], self.theta[:, at]
        return out

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Return description and tensors: sums and settings, no cell.

        Only a model whose genes are its inputs and that has no kernel can be saved: see
        :func:`spatiaflow.tl.train_imputation`.
        """
        if self.genes != self.inputs or "kernel" in self.branches:
            raise ValueError("only what sf.tl.train_imputation returned can be saved.")
        d = self.design
        description = {
            "genes": self.genes, "target_sum": self.target_sum, "n": self.evidence.total.n, "branches": self.branches,
            "alpha": self.alpha,
            "judged": [[list(k), v] for k, v in self.judged.items()], "spatial": d.spatial, "n_image": d.n_image,
            "card": self.card,
        }  # fmt: skip
        return description, self._tensors()

    def _tensors(self) -> dict[str, torch.Tensor]:
        total = self.evidence.total
        arrays = {
            "xx": total.xx[np.triu_indices(len(total.x))], "x": total.x, "centre": self.design.centre,
            "scale": self.design.scale, "share": self.share, "reliability": self.reliability, "theta": self.theta,
            "libraries": np.stack(self.libraries), "edges": self.edges,
        }  # fmt: skip
        return {name: torch.from_numpy(np.asarray(v, np.float32)) for name, v in arrays.items()}

    @property
    def sha256(self) -> str:
        """Identity of what was learned."""
        return _base.tensors_sha256(self._tensors())

    @classmethod
    def from_state(cls, d: dict, tensors: dict[str, torch.Tensor]) -> Imputer:
        """Rebuild a model from the description and tensors of its file."""
        a, genes = {name: v.numpy().astype(np.float64) for name, v in tensors.items()}, d["genes"]
        out, g, p = cls.__new__(cls), len(genes), len(a["x"])
        out.inputs = out.genes = genes
        out.target_sum, out.alpha, out.card, out.checked = d["target_sum"], d["alpha"], d["card"], {}
        out.branches, out.judged = tuple(d["branches"]), {tuple(k): v for k, v in d["judged"]}
        out.seen, out.share, out.own = np.ones(g, bool), a["share"], 1 + np.arange(g)
        out.design = Design(genes, out.target_sum, *Design.layout(g, d["spatial"], d["n_image"]), a["centre"], a["scale"],
                            spatial=d["spatial"], n_image=d["n_image"])  # fmt: skip
        xx = np.zeros((p, p))
        xx[np.triu_indices(p)] = a["xx"]
        xx += np.triu(xx, 1).T
        scale, centre = (v[out.own] for v in (out.design.scale, out.design.centre))  # back in the unit of targets
        scale = np.where(np.isfinite(scale), scale, 0.0)
        y, xy = a["x"][out.own] * scale + d["n"] * centre, xx[:, out.own] * scale + np.outer(a["x"], centre)
        out.evidence = Gathered([Sums(d["n"], a["x"], y, xx, xy)], *[None] * 5)
        out.reliability, out.theta = a["reliability"].astype(np.float32), a["theta"]
        out.libraries, out.edges = [*a["libraries"]], a["edges"]
        return out

    # ---- what the query says ----------------------------------------------------------------------------------------

    def adapt(self, query: list[CellTable], *, n_folds: int = 5, seed: int = 0) -> None:
        """Keep those branches that serve in the query.

        Genes that the query measures are hidden by turns and predicted from the rest by what the reference says: of the
        same cells, but never of the genes that are asked for. Neighbours and image are left out where they lower the mean
        correlation of these genes. The kernel, made of all inputs at once, cannot be judged so.
        """
        g, design, total = len(self.inputs), self.design, self.evidence.total
        step = max(1, sum(map(len, query)) // JUDGED_CELLS)
        x = np.concatenate([part[::step] for one in query for part in design.columns(one)])
        own = 1 + np.arange(g)
        seen = (x[:, own] > x[:, own].min(0)).mean(0) * np.isfinite(design.scale[own])
        seen = seen * self.seen
        usable = np.flatnonzero(seen > (0.02 if (seen > 0.02).sum() >= 10 else 0))
        folds = [f for f in np.array_split(np.random.default_rng(seed).permutation(usable), n_folds) if len(f)]

        def score(branches):
            found, columns = np.full(g, np.nan), self._taken(branches)
            for fold in folds:
                left = columns & ~np.isin(design.gene, fold)
                weights, _ = total.ridge(left, self.alpha, (total.xx[:, own[fold]], total.x[own[fold]]))
                found[fold] = gene_pearson(x[:, own[fold]], x @ weights)
            return float(np.nanmean(found))

        kept = tuple(b for b in self.branches if b not in ("neighbors", "kernel", "image"))
        best = score(kept)
        for branch in (b for b in ("neighbors", "image") if b in self.branches):
            more = score((*kept, branch))
            self.checked[branch] = more - best
            if more > best:
                kept, best = (*kept, branch), more
        self.branches = tuple(b for b in self.branches if b in kept or b == "kernel")

    @property
    def floor(self) -> np.ndarray:
        """Least mean that a gene's law is taken at: nobody is sure that a gene is off."""
        total = self.evidence.total
        return (FLOOR * total.y / total.n).astype(np.float32)

    def predict(self, query: CellTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mean and standard deviation (cells x genes, log1p per ``target_sum``), chunk by chunk of cells."""
        genes, floor = np.arange(len(self.genes)), self.floor
        weights, intercept = self._weights(self.evidence.total, self.branches, self.alpha, genes)
        inner, start = np.flatnonzero(self.measured), 0
        for x in self.design.columns(query):
            rows = slice(start, start + len(x))
            start += len(x)
            mean = np.maximum(x @ weights + intercept, 0).astype(np.float32)
            bins, std = self._bin(query.library[rows]), self.std(mean, query.library[rows])
            for i, law in enumerate(self.laws):
                some = np.flatnonzero(bins == i)
                if len(inner) and len(some):
                    at, theta = np.ix_(some, inner), self.theta[i, inner]
                    counts = query.counts[rows][some][:, self.own[inner] - 1].toarray()
                    rate = law.rate_at(np.maximum(mean[at], floor[inner]), theta)
                    mean[at], std[at] = self._seen(counts, query.library[rows][some], rate, theta)
            yield mean, std

    def std(self, mean: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Standard deviation of the predictive law around ``mean`` (cells x genes) at the cells' own libraries."""
        out, bins = np.empty_like(mean), self._bin(library)
        for i, law in enumerate(self.laws):
            some = np.flatnonzero(bins == i)
            out[some] = law.std_at(np.maximum(mean[some], self.floor), self.theta[i])
        return out

    def draws(self, mean: np.ndarray, library: np.ndarray, gene: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Draws (n x cells) of the predictive law of one gene around its mean, at the cells' own libraries."""
        out, bins = np.empty((n, len(mean)), np.float32), self._bin(library)
        for i, law in enumerate(self.laws):
            some, theta = np.flatnonzero(bins == i), self.theta[i, gene]
            rate = law.rate_at(np.maximum(mean[some], self.floor[gene])[:, None], np.array([theta]))[:, 0]
            counts = draw_counts(np.repeat((library[some] * rate)[None], n, 0), theta, 0.0, rng)
            out[:, some] = log_normalize(counts.T, library[some], self.target_sum).T
        return out

    def _seen(self, counts, library, rate, theta) -> tuple[np.ndarray, np.ndarray]:
        """What is expected of genes once their counts (n x genes) are seen: gamma prior of mean ``rate``, Poisson counts."""
        shape, scale = theta + counts, 1 / (theta / rate + library[:, None])
        expected = self.target_sum * shape * scale
        return np.log1p(expected), self.target_sum * np.sqrt(shape) * scale / (1 + expected)
