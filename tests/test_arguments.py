"""Arguments as people give them, to every verb: names, scales, lists of genes, references, regions."""

import inspect

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from spatialdata.models import TableModel
from spatialdata.transformations import Identity
from verbs import GENES, VERBS, changed, copied, expected, fingerprint, given, outcome, same, table_of, trained

import spatiaflow as sf

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("AnnData", "SpatialData")
REFUSED = (ValueError, KeyError, TypeError, OSError)


def each(names, kinds=("SpatialData", "AnnData")):
    """(verb, argument) pairs for the arguments that a verb has; the kind is the first that the verb takes."""
    return [
        pytest.param(verb, next(kind for kind in kinds if kind in VERBS[verb].kinds), name, id=f"{verb}-{name}")
        for verb in VERBS
        for name in inspect.signature(VERBS[verb].function).parameters
        if name in names
    ]


# scales and numbers
POSITIVE = {"mpp", "crop_um", "patch_um", "tile_um", "texture_um", "radius_um", "target_sum"}
WHOLE = {
    "batch_size",
    "n_samples",
    "n_steps",
    "max_epochs",
    "crop_pixels",
    "n_components",
    "n_clusters",
    "max_clusters",
    "n",
}
OPTIONAL = {"mpp", "target_sum", "batch_size", "n_clusters", "n_steps", "max_epochs", "crop_um"}


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, "0.5", True, [0.5, 0.5], {}, np.array([0.5])], ids=repr)
@pytest.mark.parametrize(("verb", "kind", "name"), each(POSITIVE))
def test_a_scale_is_one_positive_number(verb, kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        outcome(verb, given(verb, kind), **{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, np.nan, "2", True, [2], np.array([2, 3])], ids=repr)
@pytest.mark.parametrize(("verb", "kind", "name"), each(WHOLE))
def test_a_count_is_a_whole_number(verb, kind, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        outcome(verb, given(verb, kind), **{name: value})


@pytest.mark.parametrize(("verb", "kind", "name"), each((POSITIVE | WHOLE) - OPTIONAL))
def test_none_is_no_number(verb, kind, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        outcome(verb, given(verb, kind), **{name: None})


@pytest.mark.parametrize("value", [-1, 1.5, "a", [1], True, np.nan], ids=repr)
@pytest.mark.parametrize(("verb", "kind", "name"), each({"random_state"}))
def test_a_seed_is_a_whole_number(verb, kind, name, value):
    with pytest.raises(ValueError, match="random_state|seed"):
        outcome(verb, given(verb, kind), random_state=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, "a", True, [0.1]], ids=repr)
@pytest.mark.parametrize(("verb", "kind", "name"), each({"threshold", "validation"}))
def test_a_share_lies_between_0_and_1(verb, kind, name, value):
    with pytest.raises(ValueError, match=name):
        outcome(verb, given(verb, kind), **{name: value})


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5)], ids=repr)
@pytest.mark.parametrize(("verb", "kind", "name"), each({"mpp"}, kinds=("AnnData", "SpatialData")))
def test_a_scale_may_be_of_numpy(verb, kind, name, value):
    if VERBS[verb].slow or kind == "SpatialData":
        return
    data = given(verb, kind)
    before = fingerprint(data)
    found = outcome(verb, data, mpp=value)
    right = expected(verb, kind)
    same({k: v for k, v in found.items() if "mpp" not in k}, {k: v for k, v in right.items() if "mpp" not in k})
    assert not [
        path
        for path in changed(before, fingerprint(data))
        if path.startswith("uns['spatial']") and "microns" not in path
    ]


# names of what is not there
NAMES = {
    "table_key", "image_key", "shapes_key", "labels_key", "library_key", "spatial_key", "layer", "use_rep", "groupby", "labels",
    "niche_key", "key", "library_id", "pool", "pairs_key", "profile_key", "genes", "cells", "cell", "color", "groups", "channels",
    "features", "source", "target", "transition", "transitions", "model", "encoder", "levels", "modalities", "method", "scaling",
    "config", "init", "device", "reference_layer", "cost", "validation",
}  # fmt: skip
LOOSE = {  # unused where something else is given, or by this kind of object
    ("AnnData", name) for name in ("table_key", "image_key", "shapes_key", "labels_key")
} | {("SpatialData", "spatial_key")}  # fmt: skip
UNUSED = {
    ("tl.impute_genes", "reference_layer"),
    ("tl.generate_morphology", "groupby"),
    ("tl.impute_genes", "spatial_key"),
}
UNUSED |= {("tl.train_imputation", "spatial_key")}


@pytest.mark.parametrize("value", ["nope", 3, True, ["nope"], {"nope": 1}, ("a", 3), "", np.nan], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("verb", "_", "name"), each(NAMES))
def test_a_name_that_is_not_there(verb, kind, _, name, value):
    if kind not in VERBS[verb].kinds or (verb, name) in UNUSED:
        return
    options = {name: value}
    if name == "groups":
        options["groupby"] = "cell_type"
    try:
        outcome(verb, given(verb, kind), **options)
    except REFUSED as error:
        if value == "nope" and name not in ("labels_key", "shapes_key"):
            assert "nope" in str(error) or name in str(error), error
        return
    assert (kind, name) in LOOSE or name in ("genes", "validation") or value in ("",), f"{name}={value!r} was taken"


# names that people have
SPOKEN = ["a.b", "a b", "CD4⁺ T-Zelle", "ß", "名前", "a\tb", "%s", "{x}", "a'b", 'a"b', "$x^2$", "_x"]


@pytest.mark.parametrize("name", ["a/b", "/", "", "a/"])
@pytest.mark.parametrize(("verb", "kind", "_"), each({"key_added"}))
def test_a_slot_cannot_have_a_slash(verb, kind, _, name):
    with pytest.raises(ValueError, match="key_added must be the name of"):
        outcome(verb, given(verb, kind), key_added=name)


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize(("verb", "kind", "_"), each({"key_added"}, kinds=("AnnData", "SpatialData")))
def test_results_under_any_name_are_read_back(verb, kind, _, name, tmp_path):
    data = given(verb, kind)
    try:
        outcome(verb, data, key_added=name)
    except REFUSED as error:
        assert verb in ("pp.tiles", "tl.generate_morphology"), error
        return
    table_of(data).write_h5ad(tmp_path / "a.h5ad")
    same(_read(tmp_path / "a.h5ad"), fingerprint_free(table_of(data)))


def _read(path):
    return fingerprint_free(ad.read_h5ad(path))


def fingerprint_free(table):
    """Arrays of obsm and columns of obs, which any file keeps."""
    obs = {f"obs {name}": table.obs[name].astype(str).to_numpy().astype(str) for name in table.obs}
    return {f"obsm {key}": np.asarray(table.obsm[key]) for key in table.obsm} | obs


@pytest.mark.parametrize("name", [*SPOKEN, "a/b", "1", "nan"])
@pytest.mark.parametrize("what", ["groups", "library", "genes", "cells", "columns"])
@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if not verb.slow and "AnnData" in verb.kinds])
def test_names_in_the_data(verb, what, name, tmp_path):
    """The result is the same up to the name, and is written and read."""
    data, options = given(verb, "AnnData"), {}
    if what == "groups":
        if "groups" not in VERBS[verb].reads or verb == "tl.generate_morphology":
            return
        for column in ("cell_type", "label"):
            data.obs[column] = data.obs[column].cat.rename_categories({"lymphocyte": name})
    elif what == "library":
        if "library_key" not in VERBS[verb].arguments:
            return
        data.obs["sample"], options = name, {"library_key": "sample"}
        data.uns["spatial"][name] = data.uns["spatial"].pop("s")
    elif what == "genes":
        data.var_names = [name, *data.var_names[1:]]
    elif what == "cells":
        if verb == "pl.attention":
            return
        data.obs_names = [*data.obs_names[:-1], name]
        for key in data.obsm:
            if isinstance(data.obsm[key], pd.DataFrame):
                data.obsm[key].index = data.obs_names
    else:
        data.obs[name], data.uns[f"x{name}".replace("/", "")] = np.arange(data.n_obs) % 7, 1
    try:
        found = outcome(verb, data, **options)
    except ValueError as error:
        assert ("/" in name or name == "nan") and name in str(error), error
        return
    if what in ("columns", "cells") and verb != "pl.profile" and verb != "get.expression":
        values = {k: v for k, v in found.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
        right = {
            k: v for k, v in expected(verb, "AnnData").items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"
        }
        if what == "columns" or verb not in ("tl.predict_expression", "tl.pair_transitions", "tl.generate_morphology"):
            same(values, right)
    if "/" not in name:
        data.write_h5ad(tmp_path / "a.h5ad")
        ad.read_h5ad(tmp_path / "a.h5ad")
    returned = VERBS[verb](given(verb, "AnnData"), trained()) if verb in ("pp.tiles", "get.expression") else None
    if isinstance(returned, ad.AnnData):
        returned.write_h5ad(tmp_path / "b.h5ad")


@pytest.mark.parametrize("name", [*SPOKEN, "a/b"])
@pytest.mark.parametrize("verb", [name for name in VERBS if name.startswith(("tl.", "pp.")) and not VERBS[name].slow])
def test_names_of_objects_in_a_dict(verb, name):
    kind = VERBS[verb].kinds[0]
    one = given(verb, kind)
    found = outcome(verb, {name: one, "other": given(verb, kind)})
    assert found or table_of(one).uns


@pytest.mark.parametrize("name", [*SPOKEN, "a/b"])
@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if "image" in verb.reads and not verb.slow])
def test_names_of_channels(verb, name, tmp_path):
    data = given(verb, "SpatialData")
    data["he"] = data["he"].assign_coords(c=["r", "g", name])
    options = {"channels": {name: "b"}} if verb == "tl.embed_spatia" else {}
    try:
        outcome(verb, data, **options)
    except ValueError as error:
        assert verb == "tl.generate_morphology" and "set_channel_names" in str(error)
        return
    table_of(data).write_h5ad(tmp_path / "a.h5ad")


# lists of names in any form
FORMS = {
    "list": list, "tuple": tuple, "Index": pd.Index, "array": np.array, "objects": lambda x: np.array(x, object),
    "Series": lambda x: pd.Series(x, index=range(5, 5 + len(x))), "generator": iter, "keys": lambda x: dict.fromkeys(x).keys(),
    "categorical": pd.Categorical, "numpy text": lambda x: [np.str_(one) for one in x],
}  # fmt: skip
LISTS = {
    ("tl.train_stflow", "genes"): GENES, ("tl.train_spatia", "genes"): GENES, ("tl.train_imputation", "genes"): None,
    ("tl.impute_genes", "genes"): GENES, ("pl.expression", "genes"): GENES[:2], ("pl.imputation", "genes"): GENES[:2],
    ("pp.tiles", "pool"): ["F", "E_cell"], ("pl.profile", "features"): ["solidity", "r_mean"], ("pl.crops", "channels"): ["r", "g"],
    ("pl.crops", "groups"): ["fibroblast", "epithelial"], ("tl.embed_spatia", "levels"): ["cell", "niche"],
    ("tl.embed_spatia", "modalities"): ["image", "genes"], ("pl.levels", "levels"): ["cell", "niche"],
    ("tl.train_spatia", "modalities"): ["image", "genes"], ("tl.generate_morphology", "cells"): None,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_names_in_any_form(verb, name, form):
    data, values = given(verb, "AnnData"), LISTS[verb, name]
    if verb == "tl.train_imputation":
        values = list(data.var_names[:8])
    if name == "cells":
        values = list(data.obs_names[data.obs["cell_type"] == "fibroblast"][:2])
    right = outcome(verb, given(verb, "AnnData"), **{name: values})
    same(outcome(verb, data, **{name: FORMS[form](values)}), right)


@pytest.mark.parametrize("value", [[], (), np.array([]), [3], [None], [""], ["a", "a"], {"a"}], ids=repr)
@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_lists_of_nothing(verb, name, value):
    with pytest.raises(REFUSED):
        outcome(verb, given(verb, "AnnData"), **{name: value})


@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_one_name_is_a_list_of_one(verb, name):
    if verb in ("tl.train_imputation", "pl.crops"):  # one gene is too few; one channel is grey
        return
    data = given(verb, "AnnData")
    value = "cell_3" if name == "cells" else {"modalities": "genes"}.get(name, (LISTS[verb, name] or [""])[0])
    if name == "cells":
        value = data.obs_names[data.obs["cell_type"] == "fibroblast"][0]
    same(outcome(verb, data, **{name: value}), outcome(verb, given(verb, "AnnData"), **{name: [value]}))


# references
def test_a_reference_without_the_column_of_slides():
    query, reference = given("tl.impute_genes", "AnnData"), given("tl.impute_genes", "AnnData")
    query.obs["sample"] = np.arange(80) % 2
    found = outcome(
        "tl.impute_genes", query[:, 2:].copy(), model=None, genes=None, reference=reference, library_key="sample"
    )
    assert np.isfinite(found["obsm['imputed']"]).all()
    named = outcome("tl.annotate", query.copy(), reference=reference, library_key="sample")
    assert named


@pytest.mark.parametrize("what", ["table", "list", "path", "none of the genes", "empty", "float"])
def test_a_reference_that_cannot_be_meant(what):
    query, reference = given("tl.impute_genes", "AnnData"), given("tl.impute_genes", "AnnData")
    value = {
        "table": reference.to_df(), "list": [reference], "path": "a.h5ad", "none of the genes": reference.copy(),
        "empty": reference[:0].copy(), "float": reference.copy(),
    }[what]  # fmt: skip
    if what == "none of the genes":
        value.var_names = [f"{name}_human" for name in value.var_names]
    if what == "float":
        value.X = value.X.toarray() + 0.5
    with pytest.raises(REFUSED, match="reference"):
        outcome("tl.impute_genes", query, model=None, genes=None, reference=value)


# regions
def two_regions(own_systems=False):
    """Two copies of one tissue in an object: regions A and B, numbered alike."""
    parts = []
    for name in "AB":
        one = given("pp.tiles", "SpatialData")
        table, system = one["table"], name if own_systems else "global"
        table.obs_names = [f"{name}{cell}" for cell in table.obs_names]
        shapes = gpd.GeoDataFrame(one["nuclei"])
        sd.transformations.set_transformation(shapes, {system: Identity()}, set_all=True)
        image = one["he"]
        kept = sd.transformations.get_transformation(image)
        sd.transformations.set_transformation(image, {system: kept}, set_all=True)
        parts.append((name, shapes, image, table))
    table = ad.concat([part[3] for part in parts])
    table.obs["region"] = pd.Categorical(np.repeat(["A", "B"], 80))
    instance = parts[0][3].uns["spatialdata_attrs"]["instance_key"]
    table = TableModel.parse(table, region=["A", "B"], region_key="region", instance_key=instance)
    return sd.SpatialData(
        shapes={name: shapes for name, shapes, _, _ in parts},
        images={f"he{name}": image for name, _, image, _ in parts},
        tables={"table": table}, attrs={"microns_per_unit": {"global": 1.0, "A": 1.0, "B": 1.0}},
    )  # fmt: skip


@pytest.mark.parametrize(
    "verb", [name for name, verb in VERBS.items() if "shapes_key" in verb.arguments and not verb.slow]
)
def test_an_element_of_one_region_of_two(verb):
    if "results" in VERBS[verb].reads:
        return
    data = two_regions()
    options = {"image_key": "heA"} if "image_key" in VERBS[verb].arguments else {}
    if verb in ("pp.tiles", "pp.crops"):
        options["library_id"] = "A"
        options = {name: value for name, value in options.items() if name in VERBS[verb].arguments}
        found = outcome(verb, data, shapes_key="A", **options)
        right = expected(verb, "SpatialData")
        path = "returned X" if verb == "pp.tiles" else "returned crops"
        np.testing.assert_allclose(found[path], right[path], atol=1e-4)
    elif verb not in ("tl.pair_transitions",):
        with pytest.raises(ValueError, match="'A' belongs to 'A', not to 'B'"):
            outcome(verb, data, shapes_key="A", **options)


@pytest.mark.parametrize(
    "verb", [n for n, v in VERBS.items() if n.startswith(("pp.", "tl.")) and "results" not in v.reads]
)
def test_regions_in_systems_of_their_own(verb):
    data = two_regions(own_systems=True)
    options = {"library_id": "B"} if verb == "pp.crops" else {}
    found = outcome(verb, data, **options)
    right = expected(verb, "SpatialData")
    for path, value in right.items():
        alone = isinstance(value, np.ndarray) and value.dtype.kind == "f" and "obsm" in path and verb.startswith("pp.")
        if alone and path in found and len(value) * 2 == len(found[path]):
            np.testing.assert_allclose(found[path][len(value) :], value, atol=1e-4, err_msg=path)
    assert copied(data).tables.keys() == {"table"}


def test_options_of_a_call_are_not_written_into():
    cost, transitions, channels = {"genes": 1.0, "F": 0.5}, [("fibroblast", "epithelial")], {"b": "b"}
    data = given("tl.pair_transitions", "AnnData")
    outcome("tl.pair_transitions", data, cost=cost, transitions=transitions)
    outcome("tl.embed_spatia", data, channels=channels)
    assert (cost, transitions, channels) == ({"genes": 1.0, "F": 0.5}, [("fibroblast", "epithelial")], {"b": "b"})
    config = sf.models.PairingConfig()
    outcome("tl.pair_transitions", data, config=config)
    assert config == sf.models.PairingConfig()
