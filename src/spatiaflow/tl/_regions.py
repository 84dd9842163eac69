"""What joint draws say of regions, sums of genes and differences."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData

from spatiaflow import _io, datasets
from spatiaflow._io import Where
from spatiaflow._process import verb
from spatiaflow._settings import logger, warn
from spatiaflow.tl._samples import Sampler, sampler_of
from spatiaflow.tl._trust import BEYOND

if TYPE_CHECKING:
    from spatiaflow.models import STFlow

Data: TypeAlias = AnnData | SpatialData


@verb
def summarize_expression(
    data: Data | Sequence[Data] | Mapping[str, Data],
    *,
    model: STFlow | str | Path,
    groupby: str,
    gene_sets: Mapping[str, Sequence[str]] | str | Path | None = None,
    contrast: tuple[str, str] | None = None,
    level: float = 0.9,
    use_rep: str | None = None,
    n_samples: int = 200,
    depth: float | str | None = None,
    new_donor: bool = True,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    random_state: int | None = None,
) -> pd.DataFrame:
    """Mean predicted expression of regions, of genes or sets of genes, with intervals; or differences between two regions.

    Each joint draw of :func:`sample_expression` gives one mean per region, and the spread between draws is the uncertainty of
    that mean. It is not the standard deviation of a spot over the root of their number, because spots of a slide err together.
    Draws are not kept: memory grows with regions x genes x draws.

    A region is pooled over the slides of an object, each spot with the same weight. Spots on glass are left out.

    Parameters
    ----------
    data
        One object, or a list or dict of objects, each summarised alone. Needs ``.obsm[use_rep]``, positions and
        ``.obs[groupby]``; counts are not read.
    model
        A trained model, the path of a saved one, or the name of weights.
    groupby
        Column of ``.obs`` with the region of each spot. Spots without one are left out.
    gene_sets
        Genes of each set by its name, or the path of a GMT file. The score of a set is the mean of the log1p expression of its
        genes. None: a row for each gene.
    contrast
        Two regions: rows are differences, the first minus the second, within the same draw. The effect of the donor, which both
        have, then cancels as far as both lie on the same slides.
    level
        Probability of the interval between ``lower`` and ``upper``.
    use_rep
        Features from the encoder that the model was trained with. None takes the slot it was trained on.
    n_samples
        Draws; at least ``2 / (1 - level)``.
    depth
        Counts of all genes that each drawn spot has: a number, or a column of ``.obs``. None: the median of the training data.
    new_donor
        Whether the donor of these slides is not in the training data.
    table_key, shapes_key, labels_key
        Elements of a SpatialData.
    library_key
        Column of ``.obs`` that tells slides apart.
    spatial_key, mpp
        Where positions are in an AnnData, and their scale in µm per pixel when ``.uns["spatial"]`` does not say.
    batch_size
        Spots worked on at a time (512).
    device
        Overrides ``settings.device``.
    random_state
        Seed; ``settings.seed`` when None.

    Returns
    -------
    DataFrame with a row for each region and gene (or set), and the columns

    ``sample`` : name or place of the object, where ``data`` is a dict or list
    ``region`` : value of ``.obs[groupby]``; of a difference ``"first - second"``
    ``gene`` or ``gene_set`` : its name
    ``mean``, ``std``, ``lower``, ``upper`` : of the draws, in log1p counts per 10,000 (as the model was trained)
    ``trusted`` : the gene is trusted, or more than half of the set, and in the region (of a difference, in both) at most half of
        the spots have an out-of-domain score above 0.95
    ``n_genes`` : genes of the model that the row is the mean of; 1 for a gene
    ``n_spots`` : spots of the region, of a difference of both together
    ``depth`` : median counts of a drawn spot
    ``donor_effect`` : what the uncertainty of a slide's level rests on: ``"same donor"``, ``"learned"`` or
        ``"prior, not learned"``

    ``.attrs`` holds ``level``, ``contrast`` and ``params``.

    Raises
    ------
    KeyError
        No features at ``use_rep``, no column ``groupby`` or ``depth``, or a region of ``contrast`` that no object has.
    TypeError
        ``model`` is a model of another kind.
    ValueError
        ``groupby`` has over 50 values or none on tissue, the model predicts no gene of a set, ``n_samples`` is too small for
        ``level``, features come from another encoder or are not finite, or the scale is unknown.
    OSError
        The GMT file cannot be read.

    Warns
    -----
    UserWarning
        Genes of sets that the model does not predict are left out; regions without a spot on tissue, or objects without a region
        of ``contrast``, are left out; or data differ from the training data, as in :func:`predict_expression`.

    See Also
    --------
    spatiaflow.pl.regions : draws the table.

    Examples
    --------
    >>> x = adata.obsm["spatial"][:, 0]
    >>> adata.obs["side"] = np.where(x > np.median(x), "right", "left")
    >>> table = sf.tl.summarize_expression(adata, model=model, groupby="side", n_samples=20)
    >>> table[["region", "gene"]].head(2).values.tolist()
    [['left', 'TYPE_epithelial1'], ['left', 'NICHE_gland1']]

    The difference of a set of genes between two regions:

    >>> sets = {"planted": ["TYPE_epithelial1", "NICHE_gland1"]}
    >>> table = sf.tl.summarize_expression(
    ...     adata, model=model, groupby="side", gene_sets=sets, contrast=("left", "right"), n_samples=20
    ... )
    >>> table["region"].tolist()
    ['left - right']
    """
    started, pair = time.perf_counter(), _pair(contrast)
    _check_level(level, n_samples)
    sets = None if gene_sets is None else _gene_sets(gene_sets)
    objects, model = _io.objects_of(data), cast("STFlow", datasets.resolve(model, "STFlow"))
    where = Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp)
    scores, frames = _scores(model, sets, new_donor), []
    for name in _with_regions(objects, table_key, groupby, pair):
        sampler = sampler_of(
            objects[name], where, model, use_rep, n_samples, depth, new_donor, batch_size, device, random_state
        )
        regions = _regions(sampler, groupby, pair)
        means = _region_means(sampler, regions, scores.weights)  # draws x regions x scores
        if pair is not None:
            means, regions = means[:, :1] - means[:, 1:], regions.difference()
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
        frame = pd.DataFrame({
            "region": np.repeat(regions.names, len(scores.names)), scores.kind: np.tile(scores.names, len(regions.names)),
            "mean": means.mean(0).ravel(), "std": means.std(0, ddof=1).ravel(), "lower": low.ravel(), "upper": high.ravel(),
            "trusted": (regions.in_domain[:, None] & scores.trusted).ravel(),
            "n_genes": np.tile(scores.n_genes, len(regions.names)), "n_spots": np.repeat(regions.n_spots, len(scores.names)),
            "depth": np.repeat(regions.depth, len(scores.names)),
            "donor_effect": model.donor_effect(new_donor),
        })  # fmt: skip
        if isinstance(data, list | tuple | Mapping):
            frame.insert(0, "sample", name)
        frames.append(frame)
    out = pd.concat(frames, ignore_index=True)
    params = _io.provenance(started, model=model, groupby=groupby, **sampler.arguments)
    out.attrs = {"level": float(level), "contrast": None if pair is None else list(pair), "params": params}
    return out


@dataclass(frozen=True)
class _Scores:
    """What is summarised: genes, or means of sets of them."""

    kind: str
    names: np.ndarray
    weights: np.ndarray  # genes x scores
    trusted: np.ndarray  # scores, bool
    n_genes: np.ndarray  # scores, how many genes of the model each is the mean of


def _scores(model: STFlow, sets: dict[str, list[str]] | None, new_donor: bool) -> _Scores:
    """Genes of the model, or sets without the genes that it does not predict."""
    trusted, n = model.trusted(new_donor), len(model.genes)
    if sets is None:
        return _Scores("gene", np.array(model.genes, object), np.eye(n), trusted, np.ones(n, int))
    place = {gene: i for i, gene in enumerate(model.genes)}
    inside = np.zeros((n, len(sets)))
    for column, (name, genes) in enumerate(sets.items()):
        known = [place[gene] for gene in genes if gene in place]
        if not known:
            raise ValueError(
                f"gene_sets[{name!r}]: the model predicts none of its {len(genes)} genes; it predicts "
                f"{_io.listing(model.genes)}. Leave the set out, or train on its genes."
            )
        inside[known, column] = 1
    sizes, asked = inside.sum(0), sum(map(len, sets.values()))
    if (left := asked - int(sizes.sum())) > 0:
        least = min(range(len(sets)), key=lambda i: sizes[i] / len(list(sets.values())[i]))
        name = list(sets)[least]
        warn(
            f"gene_sets: {left} of {asked} genes are not predicted by the model and are left out; most of {name!r}, of which "
            f"{int(sizes[least])} of {len(sets[name])} remain."
        )
    return _Scores(
        "gene_set", np.array(list(sets), object), inside / sizes, trusted @ inside > sizes / 2, sizes.astype(int)
    )


def _gene_sets(given: Mapping[str, Sequence[str]] | str | Path) -> dict[str, list[str]]:
    """Genes of each set by its name, from a dict or a GMT file."""
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"gene_sets: there is no file {str(given)!r}. Give a dict of genes, or a GMT file.")
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if short := [i for i, line in enumerate(lines, 1) if len(line) < 3]:
            raise ValueError(
                f"gene_sets: {str(given)!r} is no GMT file: line {short[0]} has fewer than 3 columns separated by tabs (name, "
                "description, genes)."
            )
        given = {line[0]: list(dict.fromkeys(gene.strip() for gene in line[2:] if gene.strip())) for line in lines}
    if not isinstance(given, Mapping):
        raise ValueError(f"gene_sets must be a dict of names to genes, or the path of a GMT file, not {given!r}.")
    if not given:
        raise ValueError("gene_sets is empty; name at least one set, or leave it out.")
    _io.text(**{"a name in gene_sets": next((name for name in given if not isinstance(name, str) or not name), None)})
    return {name: _io.names(genes, f"gene_sets[{name!r}]") or [] for name, genes in given.items()}


@dataclass(frozen=True)
class _Regions:
    """Regions of one object; one with spots on tissue alone."""

    names: list[str]
    codes: np.ndarray  # of each row of the table, -1 for none
    n_spots: np.ndarray
    depth: np.ndarray  # median counts of a spot
    in_domain: np.ndarray  # bool: at most half of the spots are out of domain

    def difference(self) -> _Regions:
        """The first minus the second."""
        n, middle = self.n_spots.sum(keepdims=True), self.depth.mean(keepdims=True)
        return _Regions([" - ".join(self.names)], self.codes, n, middle, np.array([self.in_domain.all()]))


def _regions(sampler: Sampler, groupby: str, pair: tuple[str, str] | None) -> _Regions:
    """Return the regions with spots on tissue, or the two of a contrast."""
    groups = _io.groups(sampler.table, groupby)
    codes, known = groups.cat.codes.to_numpy().astype(int), [str(name) for name in groups.cat.categories]
    rows = np.concatenate([slide.rows[slide.on_tissue] for slide in sampler.slides])
    score, size = (
        np.concatenate([values[slide.on_tissue] for slide, values in zip(sampler.slides, parts)])
        for parts in (sampler.ood, sampler.sizes)
    )
    code = codes[rows]
    n_spots = np.bincount(code[code >= 0], minlength=len(known))
    if (code < 0).any():
        logger.info("%d of %d spots have no obs[%r] and are left out", (code < 0).sum(), len(code), groupby)
    wanted = [name for name, n in zip(known, n_spots) if n] if pair is None else list(pair)
    named = set(code[code >= 0]) | set(codes[codes >= 0])
    if pair is None and wanted and (glass := [known[i] for i in sorted(named) if not n_spots[i]]):
        warn(f"obs[{groupby!r}]: {_io.listing(glass)} have no spot on tissue (obs['tissue']) and are left out.")
    chosen = np.array([known.index(name) for name in wanted], int)
    if not len(chosen) or not n_spots[chosen].all():
        empty = repr(wanted[int(np.argmin(n_spots[chosen]))]) if wanted else "any region"
        raise ValueError(f"obs[{groupby!r}] has no spot on tissue in {empty}.")
    new = np.full(len(known) + 1, -1)  # the last for -1
    new[chosen] = np.arange(len(chosen))
    depth = np.array([np.median(size[code == i]) for i in chosen])
    inside = np.array([(score[code == i] > BEYOND).mean() <= 0.5 for i in chosen])
    return _Regions(wanted, new[codes], n_spots[chosen], depth, inside)


def _region_means(sampler: Sampler, regions: _Regions, weights: np.ndarray) -> np.ndarray:
    """Mean of each score over the spots of each region in each draw, draws x regions x scores."""
    total = np.zeros((sampler.n_samples, len(regions.names), weights.shape[1]))
    for slide, i, values in sampler:
        if i == 0:
            kept = np.flatnonzero((regions.codes[slide.rows] >= 0) & slide.on_tissue)
            places = (regions.codes[slide.rows[kept]], kept)
            member = sparse.csr_matrix((np.ones(len(kept)), places), (len(regions.names), len(slide)))
        total[i] += (member @ values) @ weights
    return total / regions.n_spots[:, None]


def _with_regions(objects: dict[str, Any], table_key: str, groupby: str, pair: tuple[str, str] | None) -> list[str]:
    """Names of the objects that have the regions of a contrast; all of them without one. ``groupby`` is checked in each."""
    known = {
        name: [str(one) for one in _io.groups(_io.unpack(data, table_key)[1], groupby).cat.categories]
        for name, data in objects.items()
    }
    everywhere = list(dict.fromkeys(one for names in known.values() for one in names))
    if unknown := [one for one in pair or () if one not in everywhere]:
        raise KeyError(f"contrast: obs[{groupby!r}] has no {unknown[0]!r}; it has {_io.listing(everywhere)}.")
    lacking = {name: one for name, names in known.items() for one in pair or () if one not in names}
    if len(lacking) == len(known):
        raise KeyError(f"contrast: no sample has both {' and '.join(map(repr, pair or ()))} in obs[{groupby!r}].")
    if lacking:
        name = next(iter(lacking))
        warn(
            f"{len(lacking)} samples lack a region of the contrast and are left out (sample {name!r} {lacking[name]!r})."
        )
    return [name for name in known if name not in lacking]


def _pair(contrast: Any) -> tuple[str, str] | None:
    """Two regions to compare."""
    if contrast is None:
        return None
    found = [contrast] if isinstance(contrast, str) else _io.names(contrast, "contrast") or []
    if len(found) != 2:
        raise ValueError(f"contrast must name two regions, such as ('tumour', 'stroma'), not {contrast!r}.")
    return found[0], found[1]


def _check_level(level: float, n_samples: int) -> None:
    """Refuse an interval that so few draws cannot show."""
    _io.share(level=level)
    _io.at_least_one(n_samples=n_samples)
    if level in (0, 1):
        raise ValueError(f"level must lie between 0 and 1, such as 0.9, not {level!r}.")
    if n_samples < (needed := max(2, int(np.ceil(2 / (1 - level) - 1e-6)))):
        raise ValueError(f"n_samples={n_samples} draws are too few for level={level:g}; {needed} or more are needed.")
