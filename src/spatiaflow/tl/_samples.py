"""Joint draws of the expression of whole slides."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata import SpatialData

from spatiaflow import _io, datasets
from spatiaflow._files import new_folder
from spatiaflow._io import Key, Where
from spatiaflow._process import verb
from spatiaflow._settings import progress, resolve_seed, settings
from spatiaflow._slides import gather
from spatiaflow.models.slide import Slide
from spatiaflow.tl._trust import check_pitch, warn_of_difference

if TYPE_CHECKING:
    from spatiaflow.models import STFlow

Data: TypeAlias = AnnData | SpatialData


@verb
def sample_expression(
    data: Data | Sequence[Data] | Mapping[str, Data],
    *,
    model: STFlow | str | Path,
    use_rep: str | None = None,
    genes: Sequence[str] | None = None,
    n_samples: int = 100,
    depth: float | str | None = None,
    new_donor: bool = True,
    store: str | Path | None = None,
    table_key: str = "table",
    shapes_key: str | None = None,
    labels_key: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    mpp: float | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    random_state: int | None = None,
) -> AnnData | list[AnnData] | dict[str, AnnData]:
    """Draw the expression of all spots and genes jointly: each draw is a slide as it could have been measured.

    In a draw, neighbouring spots err alike, genes err together, and all spots of a slide share the effect of their donor. So
    compute what you want to know once in each draw: the spread of the results is its uncertainty. For means of regions and
    their differences :func:`summarize_expression` does this without keeping the draws.

    Noise belongs to the seed, the name of the slide and the name of the spot, so the order of rows and ``batch_size`` do not
    change the draws. Slides that have one name share it. ``n_samples`` is part of the seed.

    Parameters
    ----------
    data
        One object, or a list or dict of objects. Needs ``.obsm[use_rep]`` and positions; counts are not read.
    model
        A trained model, the path of a saved one, or the name of weights.
    use_rep
        Features from the encoder that the model was trained with. None takes the slot it was trained on.
    genes
        Genes to keep; all that the model predicts when None. The values of a gene are the same either way.
    n_samples
        Draws.
    depth
        Counts of all genes that each drawn spot has: a number, or the column of ``.obs`` with a number for each spot, such as
        the measured one or ``"stflow_depth"``. None: the median of the training data. Fewer counts mean more noise.
    new_donor
        Whether the donor of these slides is not in the training data. True gives wider draws: genes then have other levels.
    store
        Path of a new Zarr store, to which draws are written one by one instead of being held in memory. One object only.
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
    AnnData (n_obs x genes), or a list or dict of them; ``data`` is not changed:

    ``.layers["draw_000"]``, ``["draw_001"]``, ... : float32, one draw each, log1p counts per 10,000 (as the model was trained).
        With ``store`` dask arrays that read the store; :func:`anndata.io.read_zarr` reads all of it
    ``.X`` : float32, mean of the draws
    ``.var`` : ``skill`` and ``trusted`` of each gene
    ``.obsm["spatial"]`` : positions, in the unit in which they are stored
    ``.obs``, ``.uns["spatial"]``, ``.uns["spatialdata_attrs"]`` : those of ``data``
    ``.uns["draws"]`` : dict with ``depth`` (the number, or the name of the column), ``donor_effect`` (``"same donor"``,
        ``"learned"`` or ``"prior, not learned"``), ``normalization`` and ``params``

    Spots on glass (``.obs["tissue"]`` below 0.05) and rows that belong to no slide are NaN.

    Raises
    ------
    KeyError
        No features at ``use_rep``, a gene that the model does not predict, or no column ``depth``.
    TypeError
        ``model`` is a model of another kind.
    ValueError
        Features come from another encoder or are not finite, the scale is unknown, ``depth`` is no depth, or ``store`` is given
        with several objects.
    OSError
        ``store`` exists, its folder does not, or the disk is full. Nothing half-written stays.

    Warns
    -----
    UserWarning
        Data differ from the training data, as in :func:`predict_expression`.

    See Also
    --------
    summarize_expression : means of regions with intervals.
    spatiaflow.get.draws : the draws as one array.

    Examples
    --------
    >>> draws = sf.tl.sample_expression(adata, model=model, n_samples=20)
    >>> sf.get.draws(draws).shape
    (20, 79, 3)

    How strongly two genes go together, with its uncertainty:

    >>> r = [np.corrcoef(y[:, 0], y[:, 1])[0, 1] for y in sf.get.draws(draws)]
    >>> low, high = np.quantile(r, [0.05, 0.95])
    """
    started, genes = time.perf_counter(), _io.names(genes, "genes")
    _io.at_least_one(n_samples=n_samples)
    objects = _io.objects_of(data)
    if store is not None and (isinstance(data, list | tuple | Mapping) or not isinstance(store, str | Path)):
        raise ValueError(
            "store must be the path of the draws of one object. Call once for each object, with its own path."
        )
    model = cast("STFlow", datasets.resolve(model, "STFlow"))
    columns, where = (
        _columns(model, genes),
        Where(table_key, None, shapes_key, labels_key, library_key, spatial_key, mpp),
    )
    found = {}
    for name, one in objects.items():
        sampler = sampler_of(one, where, model, use_rep, n_samples, depth, new_donor, batch_size, device, random_state)
        var = pd.DataFrame(
            {"skill": model.skill[columns], "trusted": model.trusted(new_donor)[columns]},
            index=[model.genes[i] for i in columns],
        )
        out = _io.beside(sampler.table, np.full((sampler.table.n_obs, len(columns)), np.nan, np.float32), var)
        out.obsm[Key.obsm.spatial] = sampler.positions(spatial_key)
        out.uns["draws"] = _io.storable({
            "depth": sampler.depth, "donor_effect": model.donor_effect(new_donor),
            "normalization": {"target_sum": "raw" if model.target_sum is None else model.target_sum, "log1p": True},
            "params": _io.provenance(started, model=model, **sampler.arguments),
        })  # fmt: skip
        found[name] = _filled(out, sampler, columns) if store is None else _stored(out, sampler, columns, store)
    return _io.in_form_of(data, found)


@dataclass(frozen=True)
class Sampler:
    """Draws of the slides of one object, slide by slide and draw by draw."""

    table: AnnData
    slides: list[Slide]
    model: STFlow
    n_samples: int
    depth: float | str  # as it is stated
    sizes: list[np.ndarray]  # of each slide: counts of each row
    ood: list[np.ndarray]  # of each slide: out-of-domain score of each row
    arguments: dict[str, Any]  # that repeat the draws

    def __iter__(self) -> Iterator[tuple[Slide, int, np.ndarray]]:
        """Slide, number of the draw, and the draw: rows of the slide x genes of the model, NaN on glass."""
        a = self.arguments
        with progress(None, "drawing", total=len(self.slides) * self.n_samples, unit="draw") as bar:
            for slide, size in zip(self.slides, self.sizes):
                draws = self.model.draws(
                    slide, self.n_samples, depth=size, new_donor=a["new_donor"], seed=a["random_state"],
                    batch_size=a["batch_size"], device=settings.torch_device(a["device"]),
                )  # fmt: skip
                for i, values in enumerate(draws):
                    yield slide, i, values
                    bar.update()

    def positions(self, spatial_key: str) -> np.ndarray:
        """Positions of the rows of the table, n_obs x 2, in the unit in which they are stored; NaN where there are none."""
        if spatial_key in self.table.obsm:
            return _io.positions(self.table, spatial_key).copy()
        xy = np.full((self.table.n_obs, 2), np.nan)
        for slide in self.slides:
            xy[slide.rows] = slide.xy / slide.mpp
        return xy


def sampler_of(
    data: Data, where: Where, model: STFlow, use_rep: str | None, n_samples: int, depth: float | str | None, new_donor: bool,
    batch_size: int | None, device: str | None, random_state: int | None,
) -> Sampler:  # fmt: skip
    """Check the arguments and one object, and warn where it differs from the training data."""
    _io.at_least_one(None, batch_size=batch_size)
    _io.one_of((True, False), new_donor=new_donor)
    seed = resolve_seed(random_state)
    settings.torch_device(device)
    table = _io.unpack(data, where.table_key)[1]
    use_rep = use_rep or model.encoder["key"]
    _io.check_encoder(table, use_rep, model.encoder)
    slides = gather(data, where, need=("features",), use_rep=use_rep)
    stated, sizes = _depths(table, depth, slides, model)
    check_pitch(slides, model)
    ood = [model.ood_score(slide) for slide in slides]
    warn_of_difference(ood=np.concatenate([score[slide.on_tissue] for slide, score in zip(slides, ood)]))
    arguments = {
        "random_state": seed, "use_rep": use_rep, "encoder": model.encoder["id"], "n_samples": n_samples, "depth": stated,
        "new_donor": bool(new_donor), "batch_size": batch_size or 512, "device": device,
    }  # fmt: skip
    return Sampler(table, slides, model, n_samples, stated, sizes, ood, arguments)


def _depths(
    table: AnnData, depth: float | str | None, slides: list[Slide], model: STFlow
) -> tuple[float | str, list[np.ndarray]]:
    """Return the depth as it is stated, and the counts of each row of each slide."""
    if isinstance(depth, str):
        if depth not in table.obs:
            raise KeyError(f"obs has no {depth!r} (depth); it has {_io.listing(table.obs.columns)}.")
        if not pd.api.types.is_numeric_dtype(table.obs[depth]) or pd.api.types.is_bool_dtype(table.obs[depth]):
            raise ValueError(f"obs[{depth!r}] (depth) must hold numbers, the counts of each spot.")
        values = table.obs[depth].to_numpy(np.float64, na_value=np.nan)
        sizes = [np.where(slide.on_tissue, values[slide.rows], 1.0) for slide in slides]  # nothing is drawn on glass
        if bad := sum(int((~(np.isfinite(size) & (size >= 0))).sum()) for size in sizes):
            raise ValueError(f"obs[{depth!r}] (depth) is negative, NaN or infinite in {bad} rows; counts are needed.")
        return depth, sizes
    if depth is not None and not isinstance(depth, Real):
        raise ValueError(f"depth must be a number of counts, or the name of a column of obs, not {depth!r}.")
    _io.positive(None, depth=depth)
    number = model.usual_depth if depth is None else float(depth)
    return number, [np.full(len(slide), number) for slide in slides]


def _columns(model: STFlow, genes: list[str] | None) -> np.ndarray:
    """Places of genes among those of the model."""
    if genes is None:
        return np.arange(len(model.genes))
    place = {gene: i for i, gene in enumerate(model.genes)}
    if missing := [gene for gene in genes if gene not in place]:
        raise KeyError(
            f"genes: the model predicts no {_io.listing(missing[:3])}; it predicts {_io.listing(model.genes)}."
        )
    return np.array([place[gene] for gene in genes])


def _mean_of_draws(
    sampler: Sampler, columns: np.ndarray, put: Callable[[int, np.ndarray, np.ndarray], None]
) -> np.ndarray:
    """Put away the rows of each draw, and return the mean of all draws, n_obs x genes."""
    total = np.full((sampler.table.n_obs, len(columns)), np.nan)
    for slide, i, values in sampler:
        values = values[:, columns]
        put(i, slide.rows, values)
        total[slide.rows] = values if i == 0 else total[slide.rows] + values
    return (total / sampler.n_samples).astype(np.float32)


def _filled(out: AnnData, sampler: Sampler, columns: np.ndarray) -> AnnData:
    """Draw into layers."""
    layers = [np.full(out.shape, np.nan, np.float32) for _ in range(sampler.n_samples)]

    def put(i: int, rows: np.ndarray, values: np.ndarray) -> None:
        layers[i][rows] = values

    out.X = _mean_of_draws(sampler, columns, put)
    for i, layer in enumerate(layers):
        out.layers[f"draw_{i:03d}"] = layer
    return out


def _stored(out: AnnData, sampler: Sampler, columns: np.ndarray, store: str | Path) -> AnnData:
    """Draw into a new Zarr store; the layers read it."""
    import dask.array as da
    import zarr
    from anndata.io import write_elem

    names = [f"draw_{i:03d}" for i in range(sampler.n_samples)]
    with new_folder(store) as folder:
        with _quiet():
            out.write_zarr(folder)
        root: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)

        def put(i: int, rows: np.ndarray, values: np.ndarray) -> None:
            if names[i] in root["layers"]:
                root["layers"][names[i]].oindex[rows] = values
                return
            whole = np.full(out.shape, np.nan, np.float32)
            whole[rows] = values
            with _quiet():
                write_elem(root["layers"], names[i], whole)

        out.X = _mean_of_draws(sampler, columns, put)
        with _quiet():
            write_elem(root, "X", out.X)
            zarr.consolidate_metadata(folder)  # anndata did so before there were draws
    layers: Any = zarr.open_group(store, mode="r", use_consolidated=False)["layers"]
    for name in names:
        out.layers[name] = da.from_array(layers[name], chunks=layers[name].chunks)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what anndata and zarr say of formats to come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
