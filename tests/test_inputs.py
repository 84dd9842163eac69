"""Inputs as people have them, over every verb: a right result, or an error that says what is wrong and where."""

from itertools import product

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale, get_transformation, set_transformation

import spatiaflow as sf
from _verbs import VERBS, changed, copied, expected, few, fingerprint, given, outcome, same, table_of, trained

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = [name for name, verb in VERBS.items() if verb.slow]


def over(*reads, kinds=("AnnData", "SpatialData"), argument=None, training=True):
    """Parametrise with the verbs that read something, or have an argument, and the kinds of objects that they take."""
    chosen = [
        pytest.param(name, kind, id=f"{name}-{kind}")
        for name, verb in VERBS.items()
        for kind in kinds
        if kind in verb.kinds and set(reads) <= verb.reads and (argument is None or argument in verb.arguments)
        and (training or not verb.slow)
    ]  # fmt: skip
    return pytest.mark.parametrize(("verb", "kind"), chosen)


def refused(verb, data, match="", **options):
    """The verb refuses, naming what is wrong, and leaves the data alone."""
    with pytest.raises((ValueError, KeyError, TypeError, OSError), match=match):
        outcome(verb, data, **options)


def right_or_refused(verb, kind, data, **options):
    """The verb gives what it gives of clean data, or refuses; True if it gives."""
    try:
        found = outcome(verb, data, **options)
    except (ValueError, KeyError, TypeError, OSError):
        return False
    same(found, expected(verb, kind))
    return True


# what is returned shares no memory with what was given
def scribble(value):
    """Write into all that can be written into."""
    if isinstance(value, SpatialData):
        for kind, name, element in value.gen_elements():
            if kind != "tables":
                set_transformation(element, Scale([9.0, 9.0], ("x", "y")), "global")
            if kind == "images":
                element[0, :5, :5] = 77
            if kind == "shapes":
                element.geometry.iloc[:] = shapely.Point(0, 0)
            if kind == "tables":
                scribble(element)
            assert name
        scribble(value.attrs)
    elif isinstance(value, AnnData):
        parts = [value.X, value.obs, value.var]
        for slot in (value.obsm, value.layers, value.obsp, value.varm):
            parts += [slot[key] for key in slot]
        for part in parts:
            scribble(part)
        scribble(value.uns)
    elif isinstance(value, pd.DataFrame):
        for name in value.columns:
            if value[name].dtype.kind in "biuf":
                scribble(value[name].to_numpy())
                value.iloc[:, value.columns.get_loc(name)] = value[name].dtype.type(0)
            elif value[name].dtype == "category":
                scribble(value[name].cat.codes.to_numpy())
    elif sparse.issparse(value):
        scribble(value.data)
    elif isinstance(value, np.ndarray):
        value.flags.writeable = True
        value[...] = 0
    elif isinstance(value, dict) or hasattr(value, "keys"):
        for one in value.values():
            scribble(one)
        value["scribbled"] = True
        for name in [name for name in value if name != "scribbled"]:
            del value[name]


@over(training=False)
def test_what_is_returned_owns_its_memory(verb, kind):
    data = given(verb, kind)
    options = {"copy": True} if "copy" in VERBS[verb].arguments else {}
    returned = VERBS[verb](data, trained(), **options)
    before = fingerprint(data)
    if isinstance(returned, AnnData | SpatialData):
        scribble(returned)
        assert changed(before, fingerprint(data)) == []


@over(argument="copy", training=False)
def test_copies_hold_what_would_have_been_written(verb, kind):
    data = given(verb, kind)
    before = fingerprint(data)
    made = VERBS[verb](data, trained(), copy=True)
    assert changed(before, fingerprint(data)) == []
    assert changed(before, fingerprint(made)) != []


def test_many_imputed_genes_share_no_memory():
    rng = np.random.default_rng(0)
    reference = AnnData(rng.poisson(1, (60, 2100)).astype(np.float32))
    reference.var_names = [f"g{i}" for i in range(2100)]
    query = reference[:, :20].copy()
    query.obsm["spatial"] = rng.uniform(0, 90, (60, 2))
    made = sf.tl.impute_genes(query, reference=reference)
    before = fingerprint(query)
    scribble(made)
    assert changed(before, fingerprint(query)) == []


# pictures of other types
def picture_of(data, change):
    """Replace the H&E picture by ``change(pixels)``."""
    if isinstance(data, SpatialData):
        where = get_transformation(data["he"], get_all=True)
        pixels = change(data["he"].data.compute())
        data["he"] = Image2DModel.parse(pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=where)
    else:
        images = data.uns["spatial"]["s"]["images"]
        images["hires"] = change(images["hires"])
    return data


DEPTHS = {
    "float 0-1": lambda he: (he / 255).astype(np.float32), "float64 0-1": lambda he: he / 255,
    "uint16 0-65535": lambda he: he.astype(np.uint16) * 257, "big-endian": lambda he: (he.astype(np.uint16) * 257).astype(">u2"),
    "float 0-255": lambda he: he.astype(np.float32), "uint16 0-255": lambda he: he.astype(np.uint16),
    "int64 0-255": lambda he: he.astype(np.int64),
    "read-only": lambda he: np.frombuffer(he.tobytes(), he.dtype).reshape(he.shape),
}  # fmt: skip
# these return or compare pixels in the units of the image
IN_UNITS = {"pp.crops": True, "tl.generate_morphology": True}


@over("image", training=False)
def test_a_picture_of_another_type(verb, kind):
    for depth in DEPTHS if verb in ("pp.encode_patches", "pp.morphology_profile") else few(DEPTHS, verb + kind):
        data = picture_of(given(verb, kind), DEPTHS[depth])
        if verb in IN_UNITS:
            assert outcome(verb, data).keys() == expected(verb, kind).keys(), depth
        elif verb == "tl.embed_spatia":  # crops are scaled by their own range, and uint8 is resampled as uint8
            same(outcome(verb, data), expected(verb, kind), atol=0.1)
        else:
            assert right_or_refused(verb, kind, data), depth


@pytest.mark.parametrize("depth", ["float 0-1", "float 0-255", "uint16 0-65535", "uint16 0-255"])
@pytest.mark.parametrize("verb", ["pl.levels", "pl.expression"])
@pytest.mark.parametrize("kind", ["AnnData", "SpatialData"])
def test_the_background_of_a_figure_is_the_picture_in_any_type(verb, kind, depth):
    found = outcome(verb, picture_of(given(verb, kind), DEPTHS[depth]))
    same(found, expected(verb, kind), atol=2.0)


@over("image")
def test_a_missing_pixel_of_a_cell_is_refused(verb, kind):
    data, value = given(verb, kind), few([np.nan, np.inf], verb + kind)[0]
    (slide,) = sf._io.places(data)
    x, y = sf._io.slide_image(data, slide).xy[0].astype(int)

    def spoiled(he):
        he = he.astype(np.float32)
        he[(0, y, x) if kind == "SpatialData" else (y, x, 0)] = value
        return he

    data = picture_of(data, spoiled)
    if verb == "pp.crops":
        crops = VERBS[verb](data, trained())
        with pytest.raises(ValueError, match="NaN"):
            crops.read(np.arange(len(crops)))
    elif verb == "pl.crops":  # draws some cells
        right_or_refused(verb, kind, data)
    else:
        refused(verb, data, match="he'|hires|NaN")


# counts
def _clipped(X, top=100):
    return np.minimum(X.toarray() if sparse.issparse(X) else X, top)


COUNTS = {
    "uint8": lambda X: sparse.csr_matrix(X.astype(np.uint8)), "int8": lambda X: sparse.csr_matrix(X.astype(np.int8)),
    "uint16": lambda X: X.astype(np.uint16), "float16": lambda X: X.astype(np.float16), "int64": lambda X: X.astype(np.int64),
    "big-endian": lambda X: X.astype(">f4"), "big-endian int": lambda X: X.astype(">i4"), "float64": lambda X: X.astype(float),
    "CSC": lambda X: sparse.csc_matrix(X), "CSR array": lambda X: sparse.csr_array(X), "COO": lambda X: sparse.coo_matrix(X),
    "dask": lambda X: da.from_array(X, chunks=(20, 30)),
    "dask CSR": lambda X: da.from_array(X, chunks=(20, 30)).map_blocks(sparse.csr_matrix),
    "Fortran": np.asfortranarray, "read-only": lambda X: np.frombuffer(X.tobytes(), X.dtype).reshape(X.shape),
    "DataFrame": lambda X: pd.DataFrame(X), "explicit zeros": lambda X: _explicit_zeros(X), "unsorted": lambda X: _unsorted(X),
    "objects": lambda X: X.astype(object), "masked": lambda X: np.ma.masked_array(X),
}  # fmt: skip


def _explicit_zeros(X):
    out = sparse.csr_matrix(X + 1)
    out.data -= 1
    return out


def _unsorted(X):
    """Duplicate entries, which add up, and columns out of order."""
    X = sparse.csr_matrix(X)
    data = np.repeat(X.data / 2, 2).astype(np.float32)
    out = sparse.csr_matrix((data, np.repeat(X.indices, 2), 2 * X.indptr), X.shape)
    for i in range(out.shape[0]):
        part = slice(out.indptr[i], out.indptr[i + 1])
        out.indices[part], out.data[part] = out.indices[part][::-1].copy(), out.data[part][::-1].copy()
    out.has_sorted_indices = False
    return out


def with_counts(data, values, layer=None):
    table = table_of(data)
    if layer is None:
        table.X = values
    else:
        table.layers[layer] = values
    return data


@over("counts", kinds=("AnnData",), training=False)
def test_counts_as_they_are_stored(verb, kind):
    clean = _clipped(given(verb, kind).X).astype(np.float32)
    reference = outcome(verb, with_counts(given(verb, kind), clean))
    layers = (None, "counts") if "layer" in VERBS[verb].arguments else (None,)
    for stored, layer in product(few(COUNTS, verb, 4), layers):
        try:
            data = with_counts(given(verb, kind), COUNTS[stored](clean), layer)
        except (ValueError, TypeError, NotImplementedError):  # anndata keeps no such thing
            continue
        options = {} if layer is None else {"layer": layer}
        try:
            found = outcome(verb, data, **options)
        except ValueError:
            assert stored == "objects"
            continue
        found, right = ({k: v for k, v in one.items() if "'layer'" not in k} for one in (found, reference))
        same(found, right)


@pytest.mark.parametrize("verb", TRAINING)
def test_training_on_counts_as_they_are_stored(verb):
    table, stored = given(verb, "AnnData"), few(["uint8", "dask", "CSC"], verb)[0]
    clean = _clipped(table.X).astype(np.float32)
    right = outcome(verb, with_counts(given(verb, "AnnData"), clean))
    assert outcome(verb, with_counts(table, COUNTS[stored](clean))) == right


@over("counts", training=False)
def test_true_and_false_are_one_and_none(verb, kind):
    table = table_of(given(verb, kind))
    seen = (table.X > 0).astype(np.float32)
    right = outcome(verb, with_counts(given(verb, kind), seen))
    same(outcome(verb, with_counts(given(verb, kind), seen.astype(bool))), right)


@over("counts")
def test_what_is_no_count_is_refused(verb, kind):
    data = given(verb, kind)
    clean = table_of(data).X.toarray()
    for value in few([np.nan, np.inf, -1.0, 0.5], verb + kind):
        counts = clean.copy()
        counts[3, :] = value
        refused(verb, with_counts(data, counts), match="raw counts")


# positions
def framed(data, columns, order=(0, 1), **more):
    xy = np.asarray(data.obsm["spatial"])
    frame = pd.DataFrame({columns[i]: xy[:, i] for i in (0, 1)}, data.obs_names).assign(**more)
    data.obsm["spatial"] = frame[[*[columns[i] for i in order], *more]]
    return data


@over("positions", kinds=("AnnData",), training=False)
def test_positions_as_a_frame(verb, kind):
    row_first = ("pxl_col_in_fullres", "pxl_row_in_fullres"), (1, 0)
    for columns, order in few([(("x", "y"), (0, 1)), (("x", "y"), (1, 0)), row_first], verb):
        same(outcome(verb, framed(given(verb, kind), columns, order)), expected(verb, kind))


@over("positions", kinds=("AnnData",))
def test_positions_in_columns_that_cannot_be_told(verb, kind):
    data = framed(given(verb, kind), ("a", "b"), in_tissue=1)
    if not (verb == "tl.impute_genes" or right_or_refused(verb, kind, data)):
        refused(verb, data, match="which are x and y")


POSITIONS = {
    "float32": lambda xy: np.round(xy).astype(np.float32), "int": lambda xy: np.round(xy).astype(int),
    "uint16": lambda xy: np.round(xy).astype(np.uint16), "Fortran": lambda xy: np.asfortranarray(np.round(xy)),
    "big-endian": lambda xy: np.round(xy).astype(">f8"), "sparse": lambda xy: sparse.csr_matrix(np.round(xy)),
    "three": lambda xy: np.column_stack([np.round(xy), np.zeros(len(xy))]), "dask": lambda xy: da.from_array(np.round(xy)),
    "objects": lambda xy: np.round(xy).astype(object), "text": lambda xy: np.round(xy).astype(str),
}  # fmt: skip


@over("positions", kinds=("AnnData",), training=False)
def test_positions_as_they_are_stored(verb, kind):
    clean = given(verb, kind)
    clean.obsm["spatial"] = np.round(clean.obsm["spatial"])
    right = outcome(verb, copied(clean))
    for stored in few(POSITIONS, verb, 3):
        data = given(verb, kind)
        data.obsm["spatial"] = POSITIONS[stored](data.obsm["spatial"])
        try:
            same(outcome(verb, data), right)
        except ValueError:
            assert stored in ("objects", "text")


@over("positions", kinds=("AnnData",))
def test_positions_that_are_missing(verb, kind):
    data, value = given(verb, kind), few([np.nan, np.inf, -np.inf], verb)[0]
    data.obsm["spatial"][5, 1] = value
    if verb == "pl.crops":
        outcome(verb, data)  # that cell is not drawn
    else:
        refused(verb, data, match="position")


@over("positions", kinds=("AnnData",))
def test_a_forgotten_library_key_is_a_warning(verb, kind):
    if "library_key" not in VERBS[verb].arguments or verb == "tl.train_morphology":
        return
    data = given(verb, kind)
    data.obs["fov"] = np.arange(data.n_obs) % 2
    with pytest.warns(UserWarning, match="library_key='fov'"):
        outcome(verb, data)


@over(argument="spatial_key", kinds=("AnnData",), training=False)
def test_positions_of_another_name(verb, kind):
    data = given(verb, kind)
    data.obsm["X_spatial"] = data.obsm.pop("spatial")
    found = outcome(verb, data, spatial_key="X_spatial")
    right = expected(verb, kind)
    if verb != "tl.predict_expression":
        found = {path: value for path, value in found.items() if "spatial_key" not in path}
        right = {path: value for path, value in right.items() if "spatial_key" not in path}
        same(found, right)


# uns["spatial"] of any shape
_OK = {"metadata": {"microns_per_pixel": 0.5}}
UNS = {
    "none": None, "text": "x", "number": 3, "array": np.zeros((3, 2)), "list": [_OK], "CELLxGENE": {"is_single": True},
    "empty": {}, "slide is None": {"s": None}, "slide is empty": {"s": {}}, "with is_single": {"s": _OK, "is_single": np.True_},
    "no level of slides": _OK | {"images": {}}, "metadata None": {"s": {"metadata": None}},
    "images None": {"s": {"images": None}},
    "scalefactors a list": {"s": {"scalefactors": [1]}}, "image None": {"s": {"images": {"hires": None}, **_OK}},
    "image a path": {"s": {"images": {"hires": "a.png"}, **_OK, "scalefactors": {"tissue_hires_scalef": 1.0}}},
    "image grey": {"s": {"images": {"hires": np.zeros((400, 400))}, **_OK, "scalefactors": {"tissue_hires_scalef": 1.0}}},
    "image scale 0": {"s": {"images": {"hires": np.ones((9, 9, 3))}, **_OK, "scalefactors": {"tissue_hires_scalef": 0}}},
    "path None": {"s": {"metadata": {"microns_per_pixel": 0.5, "source_image_path": None}}},
    "path a number": {"s": {"metadata": {"microns_per_pixel": 0.5, "source_image_path": 3}}},
    "path missing": {"s": {"metadata": {"microns_per_pixel": 0.5, "source_image_path": "/nowhere/a.tif"}}},
    "two slides": {"s": _OK, "t": _OK}, "number as name": {1: _OK}, "tuple as name": {("a", "b"): _OK},
    **{
        f"scale {value!r}": {"s": {"metadata": {"microns_per_pixel": value}}}
        for value in (0.0, -1.0, np.nan, np.inf, "0.5", True, [0.5], np.array([0.5, 0.5]), {}, None)
    },
}  # fmt: skip


@over("positions", kinds=("AnnData",), training=False)
def test_uns_of_any_shape(verb, kind):
    data = given(verb, kind)
    for number, shape in enumerate(few(UNS, verb, len(UNS) if verb == "pp.encode_patches" else 9)):
        data.uns["spatial"] = UNS[shape]
        options = {"mpp": 0.5} if "mpp" in VERBS[verb].arguments and number % 2 else {}
        try:
            outcome(verb, copied(data), **options)
        except (ValueError, KeyError, TypeError, OSError):
            continue
        except AssertionError as error:
            raise AssertionError(f"{shape}: {error}") from error


# geometry
@over("positions", kinds=("SpatialData",))
def test_an_empty_polygon(verb, kind):
    data = given(verb, kind)
    data["nuclei"].loc[data["nuclei"].index[3], "geometry"] = shapely.Polygon()
    if verb in ("pp.morphology_profile", "pl.crops"):
        outcome(verb, data)
    else:
        refused(verb, data, match="position")


# backed, views, lazy
@over(kinds=("AnnData",), training=False)
def test_a_view_gives_the_same_and_its_parent_stays(verb, kind):
    parent = given(verb, kind)
    before = fingerprint(parent)
    found = outcome(verb, parent[:, :])
    assert changed(before, fingerprint(parent)) == []
    same(found, expected(verb, kind))


@over(kinds=("AnnData",), training=False)
def test_backed(verb, kind, tmp_path):
    data = given(verb, kind)
    data.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    same(outcome(verb, backed), expected(verb, kind))
    refused(verb, backed[:70], match="to_memory")
    if "copy" in VERBS[verb].arguments:
        refused(verb, backed, match="to_memory", copy=True)


@pytest.fixture(scope="module")
def lazy(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "a.zarr"
    table = sf.datasets.simulated_tissue(30, seed=0)["table"]
    table.uns.clear()
    table.write_zarr(path)
    return ad.experimental.read_lazy(path)


@over(kinds=("AnnData",))
def test_lazy_is_refused(verb, kind, lazy):
    with pytest.raises(ValueError, match="to_memory"):
        VERBS[verb](lazy, trained())


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_data_is_refused(verb):
    for data in (None, 3, "nowhere.csv", pd.DataFrame(), np.zeros((3, 2)), [], {}, [None], {"a": 3}):
        refused(verb, data)


@over()
def test_a_table_without_rows_or_with_a_name_twice(verb, kind):
    if kind == "AnnData":
        refused(verb, given(verb, kind)[:0].copy(), match="no rows")
    data = given(verb, kind)
    table_of(data).obs_names = ["a", *table_of(data).obs_names[1:-1], "a"]
    refused(verb, data, match="obs_names .*are not unique")
