"""Every verb on one small tissue: what it returned or wrote, as arrays, and whether an object was left alone."""

from __future__ import annotations

import hashlib
import inspect
import re
import traceback
import warnings
import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from geopandas import GeoDataFrame
from matplotlib.figure import Figure
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

import spatiaflow as sf

N, CROP = 80, {"crop_um": 16.0, "crop_pixels": 16}
VOLATILE = re.compile(r"seconds$|model_sha256$|feature_names")
DOCUMENTED = (ValueError, KeyError, TypeError, OSError)
SOURCE = str(Path(sf.__file__).parent)
# what an error must name: a slot, an element, or an argument of the verb
NAMED = (
    r"X|obs|obs_names|var_names|obsm|obsp|uns|layers|attrs|image|table|element|slide|positions?|SpatialData|AnnData|data|"
    r"manifest|weights|state"
)


@cache
def _tissue() -> SpatialData:
    sdata = sf.datasets.simulated_tissue(N, seed=0, n_genes=30)
    table, rng = sdata["table"], np.random.default_rng(0)
    del sdata.images["fluorescence"], table.uns["planted"], table.layers["rate"]
    types = table.obs["cell_type"].astype(str).to_numpy()
    table.obs["cell_type"] = pd.Categorical(types)  # in the order that text has
    table.obs["label"] = pd.Categorical(np.where(np.arange(N) % 3, types, None), np.unique(types))
    table.obsm["F"] = (rng.normal(size=(N, 6)) + 2 * (types[:, None] == "fibroblast")).astype(np.float32)
    for level in ("cell", "niche", "tissue"):
        table.obsm[f"E_{level}"] = (rng.normal(size=(N, 8)) + (types[:, None] == "fibroblast")).astype(np.float32)
    return sdata


def copied(data: Any) -> Any:
    """A copy that shares nothing that can be written into."""
    if isinstance(data, AnnData):
        return data.copy()
    elements = {name: element.copy() for _, name, element in data.gen_elements()}
    return SpatialData.init_from_elements(elements, attrs=deepcopy(data.attrs))


@cache
def _cells() -> AnnData:
    sdata = copied(_tissue())
    table = sdata["table"].copy()
    del table.uns["spatialdata_attrs"]
    table.obs = table.obs.drop(columns=["region"])
    table.obsm["spatial"] = table.obsm["spatial"] / 0.5 - 0.5
    picture = np.ascontiguousarray(sdata["he"].data.compute().transpose(1, 2, 0))
    table.uns["spatial"] = {
        "s": {
            "images": {"hires": picture},
            "scalefactors": {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": 10.0},
            "metadata": {"microns_per_pixel": 0.5},
        }
    }
    return table


KINDS: dict[str, Callable[[], Any]] = {"AnnData": _cells, "SpatialData": _tissue}


def few(variants: Any, verb: str, n: int = 2) -> list:
    """Some of the variants of an input: all of them for ``pp.tiles``, which is quick, others in turn for every other verb."""
    names = list(variants)
    first = zlib.crc32(verb.encode()) % len(names)
    return names if verb == "pp.tiles" else [names[(first + 5 * i) % len(names)] for i in range(min(n, len(names)))]


def table_of(data: Any) -> AnnData:
    return data["table"] if isinstance(data, SpatialData) else data


@dataclass
class Verb:
    """A function of the package, with the options of a small call."""

    name: str
    options: Callable[[SimpleNamespace], dict[str, Any]] = lambda models: {}
    reads: set[str] = field(default_factory=set)  # counts, positions, image, features, groups, results
    kinds: tuple[str, ...] = ("AnnData", "SpatialData")
    slow: bool = False

    @property
    def function(self) -> Callable:
        module, name = self.name.split(".")
        return getattr(getattr(sf, module), name)

    @property
    def arguments(self) -> set[str]:
        return set(inspect.signature(self.function).parameters)

    def __call__(self, data: Any, models: SimpleNamespace, **options: Any) -> Any:
        given = self.options(models) | options
        if self.name.startswith("pl."):
            given |= {"return_fig": True}
        with patch.multiple("spatiaflow.train.morphology", MIN_BATCHES=1, MAX_STEPS=2):  # steps of a tiny training
            return self.function(data, **given)


def _tiny_spatia(**options: Any) -> Any:
    sizes = {"width": 16, "n_heads": 2, "image_layers": 1, "gene_layers": 1, "niche_layers": 1, "tissue_layers": 1}
    sizes |= {"gene_latents": 2, "stem_width": 0, "patch_pixels": 8, "batches_per_epoch": 1, **CROP}
    return sf.models.SpatiaConfig(**(sizes | options))


def _tiny_morphology() -> Any:
    return sf.models.MorphologyConfig(n_latent=8, width=16, n_layers=1, n_neighbors=4, **CROP)


def _tiny_stflow() -> Any:
    return sf.models.STFlowConfig(width=16, n_heads=2, n_layers=1, stack=False, max_epochs=1)


TRANSITION = {"transitions": [("fibroblast", "epithelial")], "groupby": "cell_type"}
GENES = ["TYPE_epithelial1", "TYPE_fibroblast1", "NICHE_gland1", "STATE1"]

VERBS = {
    verb.name: verb
    for verb in (
        Verb("pp.encode_patches", lambda m: {"patch_um": 16.0}, {"positions", "image"}),
        Verb("pp.crops", lambda m: dict(CROP), {"positions", "image"}),
        Verb("pp.tiles", lambda m: {"tile_um": 30.0}, {"positions", "counts"}),
        Verb("pp.morphology_profile", lambda m: {}, {"positions", "image"}, ("SpatialData",)),
        Verb(
            "tl.train_stflow",
            lambda m: {"use_rep": "F", "genes": GENES, "config": _tiny_stflow(), "random_state": 0},
            {"positions", "counts", "features"},
            slow=True,
        ),
        Verb(
            "tl.predict_expression",
            lambda m: {"model": m.stflow, "random_state": 0},
            {"positions", "features"},
        ),
        Verb(
            "tl.sample_expression",
            lambda m: {"model": m.stflow, "n_samples": 3, "random_state": 0},
            {"positions", "features"},
        ),
        Verb(
            "tl.summarize_expression",
            lambda m: {"model": m.stflow, "groupby": "cell_type", "n_samples": 20, "random_state": 0},
            {"positions", "features", "groups"},
        ),
        Verb(
            "tl.train_spatia",
            lambda m: {"config": _tiny_spatia(), "max_epochs": 1, "random_state": 0},
            {"positions", "counts", "image"},
            slow=True,
        ),
        Verb("tl.embed_spatia", lambda m: {"model": m.spatia}, {"positions", "counts", "image"}),
        Verb("tl.cluster_niches", lambda m: {"n_clusters": 2, "random_state": 0}, {"positions", "counts"}),
        Verb("tl.cluster_cells", lambda m: {"resolution": 0.5, "random_state": 0}, {"counts"}),
        Verb(
            "tl.annotate",
            lambda m: {"labels": "label", "use_rep": ["X", "F"], "random_state": 0},
            {"counts", "features", "groups"},
        ),
        Verb("tl.pair_transitions", lambda m: TRANSITION | {"random_state": 0}, {"counts", "groups"}),
        Verb(
            "tl.train_morphology",
            lambda m: {
                "config": _tiny_morphology(), "validation": 0.3, "max_epochs": 1, "random_state": 0,
            },
            {"positions", "counts", "image", "results"},
            slow=True,
        ),
        Verb(
            "tl.generate_morphology",
            lambda m: {
                "source": "fibroblast", "target": "epithelial", "model": m.morphology, "n_steps": 1, "random_state": 0,
            },
            {"positions", "counts", "image", "groups"},
        ),
        Verb("tl.train_imputation", lambda m: {"random_state": 0}, {"counts"}, slow=True),
        Verb("tl.impute_genes", lambda m: {"model": m.imputer, "genes": GENES, "random_state": 0}, {"positions", "counts"}),
        Verb("get.expression", lambda m: {}, {"results"}),
        Verb("pl.expression", lambda m: {"genes": GENES[:1]}, {"positions", "counts", "results"}),
        Verb("pl.imputation", lambda m: {"genes": GENES[:1]}, {"positions", "counts", "results"}),
        Verb("pl.levels", lambda m: {"key": "E"}, {"positions", "features"}),
        Verb("pl.attention", lambda m: {"cell": "cell_0"}, {"positions", "results"}),
        Verb("pl.calibration", lambda m: {}, {"counts", "results"}),
        Verb("pl.crops", lambda m: {"groupby": "cell_type", "n": 2, "random_state": 0}, {"positions", "image", "groups"}),
        Verb("pl.pairs", lambda m: {}, {"positions", "results"}),
        Verb("pl.profile", lambda m: {"groupby": "cell_type", "key": "profile"}, {"groups", "results"}),
    )
}  # fmt: skip


@cache
def trained() -> SimpleNamespace:
    """One tiny model of each kind."""
    m = SimpleNamespace()
    with sf.settings.override(progress=False, verbosity="error"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = copied(_cells())
        m.stflow = VERBS["tl.train_stflow"](data, m)
        m.spatia = VERBS["tl.train_spatia"](data, m)
        VERBS["tl.pair_transitions"](data, m)
        m.morphology = VERBS["tl.train_morphology"](data, m)
        m.imputer = VERBS["tl.train_imputation"](data, m)
    return m


@cache
def _finished(kind: str) -> Any:
    data, models = copied(KINDS[kind]()), trained()
    with sf.settings.override(progress=False, verbosity="error"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("tl.predict_expression", "tl.impute_genes", "tl.pair_transitions"):
            VERBS[name](data, models)
        VERBS["tl.embed_spatia"](data, models, attention=True)
    table = table_of(data)
    values = table.obsm["F"][:, :3].astype(float)
    table.obsm["profile"] = pd.DataFrame(values, table.obs_names, ["area_um2", "solidity", "r_mean"])
    return data


def given(verb: str, kind: str) -> Any:
    """80 cells with nuclei, an H&E picture, counts, features, embeddings, and the results that the verb reads.

    As an AnnData they have positions in pixels, and the picture in ``uns``.
    """
    return copied(_finished(kind) if "results" in VERBS[verb].reads else KINDS[kind]())


@cache
def expected(verb: str, kind: str, **options: Any) -> dict[str, Any]:
    """The outcome of a verb on clean data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(verb, given(verb, kind), **options)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """All of an object as arrays and texts, by their place."""
    if isinstance(value, SpatialData):
        out = flat(dict(value.attrs), f"{path}attrs")
        for kind, name, element in value.gen_elements():
            out |= flat(element, f"{path}{kind}/{name}/")
            if kind != "tables":
                out |= {f"{path}{kind}/{name}/to": repr(get_transformation(element, get_all=True))}
        return out
    if isinstance(value, AnnData):
        out = {f"{path}X": value.X} | flat(value.obs, f"{path}obs") | flat(value.var, f"{path}var")
        for part in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            out |= flat(dict(getattr(value, part)), f"{path}{part}")
        return {key: one for where, one in out.items() for key, one in _dense(one, where).items()}
    if isinstance(value, GeoDataFrame):
        out = {f"{path}index": np.asarray(value.index), f"{path}geometry": np.array(value.geometry.to_wkb())}
        return out | flat(pd.DataFrame(value.drop(columns="geometry")), path)
    if isinstance(value, pd.DataFrame):
        out = {f"{path}.index": _text(value.index)}
        for i, name in enumerate(value.columns):
            column = value.iloc[:, i]
            out[f"{path}[{name!r}]"] = _text(column) if column.dtype.kind not in "biuf" else column.to_numpy()
            out[f"{path}[{name!r}].dtype"] = str(column.dtype)
        return out
    if isinstance(value, Mapping):
        return {k: v for name, one in value.items() for k, v in flat(one, f"{path}[{name!r}]").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, one in enumerate(value) for k, v in flat(one, f"{path}[{i}]").items()}
    if isinstance(value, Figure):
        return _drawn(value)
    if isinstance(value, sf.pp.Crops):
        return {f"{path}crops": value.read(np.arange(len(value))).numpy()}
    if hasattr(value, "sha256") and hasattr(value, "save"):
        return {f"{path}sha256": value.sha256}
    if hasattr(value, "divisions"):  # points
        return flat(value.compute(), path)
    if hasattr(value, "children"):  # an image of several scales
        return flat({name: dict(one.to_dataset()) for name, one in value.children.items()}, path)
    return _dense(value, path)


def _dense(value: Any, path: str) -> dict[str, Any]:
    if sparse.issparse(value):
        return {path: value.toarray(), f"{path}.format": f"{value.format} {value.dtype}"}
    if isinstance(value, torch.Tensor):
        return {path: value.numpy()}
    return {path: np.asarray(value) if hasattr(value, "__array__") else value}


def _text(column: Any) -> np.ndarray:
    return np.array([repr(one) for one in column])


def _drawn(figure: Figure) -> dict[str, Any]:
    """Values and places of what a figure shows."""
    out: dict[str, Any] = {}
    for i, ax in enumerate(figure.axes):
        for j, shown in enumerate([*ax.collections, *ax.images]):
            if (values := shown.get_array()) is not None:
                out[f"axes {i}, values {j}"] = np.ma.filled(np.ma.asarray(values, float), np.nan)
        for j, line in enumerate(ax.lines):
            out[f"axes {i}, line {j}"] = np.asarray(line.get_xydata(), float)
    plt.close(figure)
    return out


def fingerprint(data: Any) -> dict[str, str]:
    """A hash of each part of an object."""
    return hashed(flat(data))


def hashed(parts: dict[str, Any]) -> dict[str, str]:
    """A hash of each part, by its place."""
    out = {}
    for path, value in parts.items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            content = np.ascontiguousarray(value).tobytes() + f"{value.dtype} {value.shape}".encode()
        else:
            content = repr(value if not isinstance(value, np.ndarray) else value.tolist()).encode()
        out[path] = hashlib.sha1(content, usedforsecurity=False).hexdigest()
    return out


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Parts that are not as they were."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def outcome(verb: str, data: Any, **options: Any) -> dict[str, Any]:
    """Run a verb on data and return what it returned and wrote, as arrays and texts by their place.

    An error must be one of ours that names a slot or an argument, and must leave the data as they were.
    """
    before = fingerprint(data)
    try:
        with sf.settings.override(progress=False, verbosity="error"):
            returned = VERBS[verb](data, trained(), **options)
        out = {} if returned is None else flat(returned, "returned ")
    except Exception as error:
        plt.close("all")
        if moved := changed(before, fingerprint(data)):
            raise AssertionError(f"{verb} failed ({error!r}) and changed {moved}") from error
        check_error(verb, error)
        raise
    after = flat(data)
    new = changed(before, hashed(after))
    out |= {path: after.get(path, "removed") for path in new}
    return {path: value for path, value in out.items() if not VOLATILE.search(path.strip("']"))}


def all_refused(verb: str, data: Any, calls: list[dict[str, Any]]) -> None:
    """All calls are refused as they should be: with a documented error, and the data left alone."""
    before, out = fingerprint(data), []
    for options in calls:
        try:
            with sf.settings.override(progress=False, verbosity="error"):
                VERBS[verb](data, trained(), **options)
            out.append(f"{options} was taken")
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, it is checked
            try:
                check_error(verb, error)
            except AssertionError as raw:
                out.append(f"{options}: {raw}")
        plt.close("all")
    out += [f"changed: {path}" for path in changed(before, fingerprint(data))]
    assert not out, "\n".join(["", *out])


def check_error(verb: str, error: Exception) -> None:
    """An error is documented when it is of a documented type, raised by the package, and says what is wrong where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error.args[0]) if error.args else ""
    ours = frame.filename.startswith(SOURCE) and isinstance(error, DOCUMENTED)
    named = re.search(rf"\b({NAMED}|{'|'.join(VERBS[verb].arguments)})\b|\w=", text)
    if not (ours and len(text.split()) >= 4 and named):
        raise AssertionError(
            f"{verb}: raw {type(error).__name__}: {text[:300]} ({frame.filename}:{frame.lineno})"
        ) from error


def same(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Two outcomes agree: the same places, and the same values."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    for path, value in expected.items():
        one = found[path]
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            np.testing.assert_allclose(np.asarray(one, float), value.astype(float), rtol, atol, err_msg=path)
        elif isinstance(value, np.ndarray):
            assert np.array_equal(one, value), path
        elif not path.endswith((".dtype", ".format")):
            assert one == value or (one != one and value != value), (path, one, value)
