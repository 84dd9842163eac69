"""Features, counts and results: out of tables, and back into their slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from spatiaflow._io._arguments import listing, slot_name, text
from spatiaflow._io._keys import Key
from spatiaflow._settings import logger, warn
from spatiaflow.models.slide import MIN_TISSUE, Slide

# provenance of features, in uns[use_rep]
ENCODER = ("id", "sha256", "mpp", "patch_um", "resolution_um", "standardize", "n_features")
STAINS = ("hematoxylin", "eosin")
FEATURES_HELP = "Make histology features with sf.pp.encode_patches(data), or pass use_rep=..."


def features(table: AnnData, key: str, hint: str = FEATURES_HELP) -> np.ndarray:
    """Return ``obsm[key]`` as a float32 array (n_obs x n_features), checked to be finite."""
    text(use_rep=key)
    if key not in table.obsm:
        raise KeyError(f"obsm has no {key!r}; it has {listing(table.obsm)}. {hint}")
    values = matrix(table, key)
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise ValueError(
            f"obsm[{key!r}] has NaN or infinite values in {int(bad.sum())} rows "
            f"(first: {table.obs_names[np.argmax(bad)]!r}); drop those rows or encode them again."
        )
    return np.ascontiguousarray(values, np.float32)  # frames are in another order, and sums are rounded by it


def matrix(table: AnnData, key: str) -> np.ndarray:
    """Return ``obsm[key]`` as an array (n_obs x n_features) of numbers, which may be NaN."""
    values = table.obsm[key]
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
        raise ValueError(
            f"obsm[{key!r}] must be a numeric (n_obs, n_features) array; it is {values.dtype} {values.shape}."
        )
    return values


def same_encoder(tables: list[AnnData], key: str) -> dict:
    """Return the provenance of the features at ``key``, which must be the same in all tables."""
    found = []
    for table in tables:
        width = features(table, key).shape[1]
        stored = entry(table, key)
        known = {name: stored[name] for name in ENCODER if name in stored}
        found.append(
            {"key": key, "id": key, "sha256": ""} | {k: _plain(v) for k, v in known.items()} | {"n_features": width}
        )
    for one in found[1:]:
        if one != found[0]:
            raise ValueError(f"obsm[{key!r}] of the slides was made by different encoders: {found[0]} and {one}.")
    return found[0]


def stain_entry(quartiles: list[np.ndarray]) -> dict:
    """Entry ``"stain"`` of features, from the quartiles of the stains of each slide (2 x 3); empty where one has none."""
    if not quartiles or not np.isfinite(quartiles).all():
        return {}
    return {"stain": {name: np.stack([one[i] for one in quartiles]) for i, name in enumerate(STAINS)}}


def stain(tables: list[AnnData], key: str) -> dict[str, np.ndarray] | None:
    """Quartiles of the stains of all slides (slides x 3) behind the features at ``key``; None where a table states none."""
    found = [entry(table, key).get("stain") for table in tables]
    if not all(isinstance(one, Mapping) and set(STAINS) <= set(one) for one in found):
        return None
    return {name: np.concatenate([np.reshape(one[name], (-1, 3)) for one in found]) for name in STAINS}  # type: ignore[index]


def check_encoder(table: AnnData, key: str, expected: dict) -> None:
    """Refuse features that another encoder made than the one a model was trained with."""
    text(use_rep=key)
    known = "id" in expected and expected["id"] != expected["key"]
    if known and "patch_um" in expected:
        how = (
            f"sf.pp.encode_patches(data, encoder={expected['id']!r}, patch_um={expected['patch_um']:g}"
            + (f", resolution_um={expected['resolution_um']:g}" if expected.get("resolution_um") else "")
            + (", standardize=True" if expected.get("standardize") else "")
            + (f", key_added={key!r})" if key in table.obsm else ")")
        )
    else:
        how = f"the function that made the {expected['n_features']} features of the training slides"
    if key not in table.obsm:
        raise KeyError(
            f"obsm has no {key!r}; it has {listing(table.obsm)}. The model was trained on {expected['n_features']} "
            f"features. Run {how} first, or pass use_rep=..."
        )
    found = same_encoder([table], key)
    if known and key not in table.uns:
        warn(f"uns has no {key!r}, so where obsm[{key!r}] comes from is unknown; the model needs what {how} gives.")
    if not known and key in table.uns:
        logger.warning(
            "the model does not know what made the features it was trained on; obsm[%r] is taken for it", key
        )
        return
    for name in ("n_features", "id", "sha256", "patch_um", "mpp", "resolution_um", "standardize"):
        known = name in found and name in expected and (name != "id" or key in table.uns)
        if known and found[name] != expected[name]:
            raise ValueError(
                f"obsm[{key!r}] was made with {name} {found[name]!r}, but the model was trained with {name} "
                f"{expected[name]!r}. Run {how}."
            )


def shared_genes(tables: Sequence[AnnData], fewest: int = 1, advice: str = "", names: Sequence[str] = ()) -> list[str]:
    """Genes that every table measures, in the order of the first. Fewer than ``fewest`` are an error that ends in ``advice``.

    ``names``: what errors call the tables.
    """
    own = [list(map(str, table.var_names)) for table in tables]
    check_spelling(own)
    others = [set(one) for one in own[1:]]
    shared = [name for name in own[0] if all(name in other for other in others)]
    if len(shared) < fewest:
        sets = [set(one) for one in own]
        near = [len(one & set().union(*sets[:i], *sets[i + 1 :])) / max(len(one), 1) for i, one in enumerate(sets)]
        odd = int(np.argmin(near))
        whose, such = names[odd] if names else f"object {odd}", ", ".join(map(repr, own[odd][:3]))
        needed = "1 is" if fewest == 1 else f"{fewest} are"
        raise ValueError(
            f"var_names of all objects share {len(shared)} genes; at least {needed} needed. Those of {whose}, such as "
            f"{such}, are found least in the others. Are the identifiers of one kind? {advice}".rstrip()
        )
    return shared


def check_spelling(own: Sequence[Sequence[str]]) -> None:
    """Warn of genes that objects spell differently, in upper and lower case: they count as different genes."""
    for names in own[1:]:
        known = {name.lower(): name for name in own[0]}
        if other := [name for name in names if known.get(name.lower(), name) != name]:
            warn(
                f"{len(other)} genes are spelled differently in different objects, such as {known[other[0].lower()]!r} and "
                f"{other[0]!r}: they count as different genes. Are the objects of one species? Rename var_names."
            )
            return


def library_sizes(table: AnnData, layer: str | None = None) -> np.ndarray:
    """Total counts of every row over all genes of the table, float64."""
    values, _ = counts(table, None, layer)
    total = np.asarray(values.sum(1), dtype=np.float64).ravel()
    if (total == 0).any():
        warn(f"{int((total == 0).sum())} rows have no counts at all.")
    return total


def dense(values: Any) -> np.ndarray:
    """Return counts as a float64 array."""
    return np.ascontiguousarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)


def morphology(table: AnnData, key: str, argument: str = "key") -> pd.DataFrame:
    """Return the DataFrame of morphology at ``obsm[key]``, which the caller's ``argument`` names."""
    text(**{argument: key})
    if not isinstance(table.obsm.get(key), pd.DataFrame):
        raise KeyError(
            f"obsm has no DataFrame {key!r}; it has {listing(table.obsm)}. Run sf.pp.morphology_profile(data) first."
        )
    return table.obsm[key]


def groups(table: AnnData, groupby: str) -> pd.Series:
    """Return ``obs[groupby]`` as a categorical of at most 50 groups, without empty groups."""
    text(groupby=groupby)
    if groupby not in table.obs:
        raise KeyError(f"obs has no {groupby!r}; it has {listing(table.obs.columns)}.")
    column = table.obs[groupby]
    if column.nunique() > 50:
        raise ValueError(
            f"obs[{groupby!r}] has {column.nunique()} distinct values; groupby= needs a column of at most 50 groups."
        )
    return column.astype("category").cat.remove_unused_categories()


def as_text(column: pd.Series) -> np.ndarray:
    """Values of a column of obs as text, "" where they are missing: pandas 2 makes "nan" of these, pandas 3 leaves them."""
    return column.astype(object).where(column.notna(), "").map(label).to_numpy(object)


def label(value: Any) -> str:
    """Return a label as text, without spaces around it; 1.0 is 1, as missing values make floats of a column of integers."""
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value).strip()


def owned(values: Any) -> Any:
    """Return a copy of a slot: an array of its own for a view, and what has names or is sparse as it is."""
    return np.array(values) if isinstance(values, np.ndarray) else values.copy()


def check_counts(table: AnnData, layer: str | None) -> None:
    """Refuse a table without the layer, or with a gene twice."""
    if not table.var_names.is_unique:
        duplicated = table.var_names[table.var_names.duplicated()][0]
        raise ValueError(f"var_names are not unique (e.g. {duplicated!r}); call .var_names_make_unique() first.")
    text(layer=layer)
    if layer is not None and layer not in table.layers:
        names = [name for name in table.layers if name is not None]  # None is X
        raise KeyError(
            f"layers has no {layer!r}; it has {listing(names)} (table of {table.n_obs} rows, first {table.obs_names[0]!r})."
        )


def counts(
    table: AnnData, genes: list[str] | None = None, layer: str | None = None, rows: np.ndarray | None = None, *,
    argument: str = "layer",
) -> tuple[Any, list[str]]:  # fmt: skip
    """Return raw counts (n_obs x n_genes; CSR or array) of ``genes``, checked to be non-negative integers, with names.

    ``argument``: what the caller of the verb gives the layer by.
    """
    check_counts(table, layer)
    where = "X" if layer is None else f"layers[{layer!r}]"
    if genes is not None:
        missing = [gene for gene in genes if gene not in table.var_names]
        if missing:
            raise KeyError(
                f"{len(missing)} of {len(genes)} genes are not in var_names (first: {listing(missing[:3])})."
            )
    chosen = table if genes is None else table[:, list(genes)]
    chosen = chosen if rows is None or len(rows) == table.n_obs else chosen[rows]
    values = chosen.X if layer is None else chosen.layers[layer]
    if values is None:
        raise ValueError(f"{where} is empty; raw counts are needed.")
    if table.isbacked or not (sparse.issparse(values) or isinstance(values, np.ndarray)):
        values = chosen.to_memory()
        values = values.X if layer is None else values.layers[layer]
    values = _summable(values, where)
    flat: Any = values.data if sparse.issparse(values) else values
    if not np.isfinite(flat).all():
        raise ValueError(
            f"{where} has NaN or infinite values; raw counts are needed. An outer join writes NaN for genes that were not "
            'measured: join with join="inner", or give the samples as a list.'
        )
    if flat.size and flat.min() < 0:
        raise ValueError(
            f"{where} has negative values (minimum {flat.min():g}); raw counts are needed, e.g. {argument}='counts'."
        )
    if flat.size and (flat != np.round(flat)).any():
        raise ValueError(
            f"{where} is not integer; raw counts are needed. If they are in a layer, give {argument}='counts'"
            f"{'; if data.raw holds them, pass data.raw.to_adata()' if table.raw is not None else ''}."
        )
    if genes is None and table.n_obs and table.n_vars and not flat.any():
        raise ValueError(f"{where} holds no counts, all values are 0; raw counts are needed.")
    return values, list(chosen.var_names)


def _summable(values: Any, where: str) -> Any:
    """Return CSR or an array in a type whose sums do not overflow: narrow integers and floats become float32."""
    values = sparse.csr_matrix(values) if sparse.issparse(values) else np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{where} must hold numbers, raw counts; it holds {values.dtype}.")
    if sparse.issparse(values) and not values.has_canonical_format:  # an entry may stand there in parts
        values = values.copy()
        values.sum_duplicates()
    wide = np.float64 if values.dtype.itemsize > 4 or values.dtype in (np.int32, np.uint32) else np.float32
    return values if values.dtype in (np.float32, np.float64) and values.dtype.isnative else values.astype(wide)


def write(
    table: AnnData,
    key: str,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    obs: dict[str, np.ndarray] | None = None,
    uns: dict | None = None,
) -> None:
    """Write ``obsm[key + suffix]``, ``obs[key + suffix]`` and ``uns[key]`` together."""
    slot_name(key)
    if key not in table.uns and (
        foreign := [f"{key}{suffix}" for suffix in obs or {} if f"{key}{suffix}" in table.obs]
    ):
        logger.warning(
            "obs[%r] was there before, and is overwritten. Give key_added= to keep such a column.", foreign[0]
        )
    for suffix, values in (arrays or {}).items():
        table.obsm[f"{key}{suffix}"] = values
    for suffix, values in (obs or {}).items():
        table.obs[f"{key}{suffix}"] = pd.Series(values, index=table.obs_names)
    if uns is not None:
        table.uns[key] = storable(uns)
    logger.info("wrote %s", ", ".join(_written(key, arrays, obs, uns)))


def tissue_share(table: AnnData) -> np.ndarray | None:
    """Share of each row's patch that is tissue, n_obs, as ``pp.encode_patches`` wrote it; None where it did not.

    CELLxGENE keeps the organ under the same name, as text: that is no share.
    """
    if Key.obs.tissue not in table.obs or not pd.api.types.is_float_dtype(table.obs[Key.obs.tissue]):
        return None
    share = table.obs[Key.obs.tissue].to_numpy(np.float32)
    return None if ((share < 0) | (share > 1)).any() else share  # numbers of clusters, or percent


def write_tissue(table: AnnData, share: np.ndarray) -> None:
    """Write the share of tissue, unless the column holds something else or no image told it."""
    if not np.isfinite(share).any():
        return
    if Key.obs.tissue in table.obs and tissue_share(table) is None:
        logger.warning(
            "obs[%r] holds %s, not the share of tissue of each patch, and is kept. Glass is therefore not told from tissue; "
            "rename the column and encode again.", Key.obs.tissue, table.obs[Key.obs.tissue].dtype,
        )  # fmt: skip
        return
    if n := int((share < MIN_TISSUE).sum()):
        logger.info(
            "%d of %d patches are glass (obs['tissue'] below %g): predictions there mean nothing",
            n,
            len(share),
            MIN_TISSUE,
        )
    table.obs[Key.obs.tissue] = pd.Series(share, index=table.obs_names)


def _written(key: str, arrays: dict | None, obs: dict | None, uns: dict | None) -> Iterator[str]:
    yield from (f"obsm[{key + suffix!r}]" for suffix in arrays or {})
    yield from (f"obs[{key + suffix!r}]" for suffix in obs or {})
    if uns is not None:
        yield f"uns[{key!r}]"


def storable(value: Any) -> Any:
    """Return a copy of ``value`` as what h5ad and Zarr keep: dict, str, int, float, bool, list of str, array. None: ""."""
    if isinstance(value, dict):
        for name in value:
            slot_name(str(name), "a key of uns")
        return {str(name): storable(item) for name, item in value.items()}
    if value is None:
        return ""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.copy()  # of a model, which writing into uns would change
    if isinstance(value, list | tuple):
        if all(isinstance(item, str) for item in value):
            return np.asarray(value, dtype=object) if len(value) else np.asarray([], dtype=str)
        return np.asarray(value)
    return str(value)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def entry(table: AnnData, key: str) -> Mapping:
    """Return ``uns[key]``; what is no dict is another's, and holds nothing of ours."""
    found = table.uns.get(key)
    return found if isinstance(found, Mapping) else {}


def keep(data: Any, key: str, table: AnnData, slides: Sequence[Slide], which: np.ndarray, xy: np.ndarray) -> None:
    """Write new observations into a SpatialData, as a table on points of their own, so that spatial queries find them.

    Parameters
    ----------
    key
        Name of the table. The points are called ``f"{key}_points"``, with several slides ``f"{key}_{slide}"``.
    slides
        Slides of the new observations.
    which, xy
        Place of each observation's slide in ``slides``, and its position, µm.
    """
    from spatialdata import SpatialData
    from spatialdata.models import PointsModel, TableModel
    from spatialdata.transformations import Identity

    if not isinstance(data, SpatialData):
        raise ValueError(
            "key_added= writes the result into a SpatialData; an AnnData has no place for it. Leave it out."
        )
    names = [f"{key}_points"] if len(slides) == 1 else [f"{key}_{slide.name}" for slide in slides]
    ours = key in data.tables and set(data[key].obs.get("region", [""])) <= set(names)
    taken = [name for name in [*names, key] if name in data and not (ours and (name == key or name in data.points))]
    if taken:
        raise ValueError(f"the SpatialData has another element called {taken[0]!r}: choose another key_added=.")
    region = np.array(names, object)[which]
    for i, (slide, name) in enumerate(zip(slides, names)):
        here = np.flatnonzero(which == i)
        if len(here):
            x, y = (xy[here] / slide.mpp).T
            frame = pd.DataFrame({"x": x, "y": y}, index=here)
            data[name] = PointsModel.parse(
                frame, coordinates={"x": "x", "y": "y"}, transformations={slide.coordinate_system: Identity()}
            )
    table = table.copy()
    table.obs["region"], table.obs["instance"] = pd.Categorical(region), np.arange(table.n_obs)
    names = list(table.obs["region"].cat.categories)
    data[key] = TableModel.parse(table, region=names, region_key="region", instance_key="instance")
