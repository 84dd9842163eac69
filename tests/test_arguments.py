"""Arguments as people give them, to every verb: names, scales, lists of genes, references, regions."""

import inspect

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse
from spatialdata.models import TableModel
from spatialdata.transformations import Identity

import spatiaflow as sf
from _verbs import GENES, VERBS, all_refused, copied, expected, few, given, outcome, same, table_of, trained

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
NO_NUMBER = ["0.5", True, [0.5, 0.5], {}, np.array([0.5]), np.nan, -1]
WRONG = {
    **dict.fromkeys(POSITIVE, [*NO_NUMBER, 0, np.inf]), **dict.fromkeys(WHOLE, [*NO_NUMBER, 0, 1.5]),
    "random_state": [*NO_NUMBER, 1.5], "threshold": [*NO_NUMBER, 1.1], "validation": [*NO_NUMBER, 1.1],
    "level": [*NO_NUMBER, 0, 1, 1.1], "depth": [*NO_NUMBER, 0, np.inf],
}  # fmt: skip


def wrong_numbers(verb):
    for name, parameter in inspect.signature(VERBS[verb].function).parameters.items():
        for value in WRONG.get(name, ()):
            yield {name: value}
        none = parameter.default is None or (verb, name) in {("pp.crops", "crop_um"), ("tl.train_stflow", "target_sum")}
        if name in WRONG and not none:
            yield {name: None}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_no_such_number_is_refused(verb):
    all_refused(verb, given(verb, VERBS[verb].kinds[-1]), list(wrong_numbers(verb)))


@pytest.mark.parametrize(("verb", "kind", "_"), each({"mpp"}, kinds=("AnnData", "SpatialData")))
def test_a_scale_may_be_of_numpy(verb, kind, _):
    value = few([np.float32(0.5), np.float64(0.5)], verb + kind, 1)[0]
    if VERBS[verb].slow or kind == "SpatialData":
        return
    found, right = outcome(verb, given(verb, kind), mpp=value), expected(verb, kind)
    same({k: v for k, v in found.items() if "mpp" not in k}, {k: v for k, v in right.items() if "mpp" not in k})


# names of what is not there
NAMES = {
    "table_key", "image_key", "shapes_key", "labels_key", "library_key", "spatial_key", "layer", "use_rep", "groupby", "labels",
    "niche_key", "key", "library_id", "pool", "pairs_key", "profile_key", "genes", "cells", "cell", "color", "channels",
    "features", "source", "target", "transition", "transitions", "model", "levels", "modalities", "method", "scaling",
    "config", "init", "device", "cost", "validation", "gene_sets", "contrast", "donor_key", "fold_key",
}  # fmt: skip
# arguments that only one kind of object has a use for, or that another argument replaces
UNUSED = {"AnnData": {"table_key", "image_key", "shapes_key", "labels_key"}, "SpatialData": {"spatial_key"}}
UNUSED_BY = {"tl.impute_genes": {"spatial_key"}, "tl.train_imputation": {"spatial_key"}, "tl.pair_transitions": set()}


def wrong_names(verb, kind):
    unused = UNUSED[kind] | UNUSED_BY.get(verb, set())
    if "image" in VERBS[verb].reads:
        unused = unused - {"image_key"}
    if verb == "tl.pair_transitions":  # positions are read for one term of the cost
        unused = unused | {"shapes_key", "labels_key", "library_key", "spatial_key"}
    for name in inspect.signature(VERBS[verb].function).parameters:
        if name in NAMES - unused:
            values = ("nope", 3, True, ["nope"], {"nope": 1}, np.nan)
            number = (verb, name) == ("tl.train_stflow", "genes")
            yield from ({name: value} for value in values if not (number and value == 3))
        elif name in NAMES:  # of the wrong type all the same
            yield from ({name: value} for value in (3, ["nope"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_name_that_is_not_there_is_refused(verb, kind):
    if kind in VERBS[verb].kinds:
        all_refused(verb, given(verb, kind), list(wrong_names(verb, kind)))


# names that people have
SPOKEN = ["a.b", "CD4⁺ T-Zelle", "名前", "%s {x} $x^2$", "a'b\"c"]


@pytest.mark.parametrize(("verb", "kind", "_"), each({"key_added"}))
def test_a_slot_cannot_have_a_slash(verb, kind, _):
    all_refused(verb, given(verb, kind), [{"key_added": name} for name in ("a/b", "/", "", "a/", 3, ["a"])])


@pytest.mark.parametrize(("verb", "kind", "_"), each({"key_added"}, kinds=("AnnData", "SpatialData")))
def test_results_under_any_name_are_read_back(verb, kind, _, tmp_path):
    data = given(verb, kind)
    for name in few(SPOKEN, verb):
        try:
            outcome(verb, data, key_added=name)
        except REFUSED as error:
            assert verb in ("pp.tiles", "tl.generate_morphology"), error
    table_of(data).write_h5ad(tmp_path / "a.h5ad")
    same(_read(tmp_path / "a.h5ad"), fingerprint_free(table_of(data)))


def _read(path):
    return fingerprint_free(ad.read_h5ad(path))


def fingerprint_free(table):
    """Arrays of obsm and columns of obs, which any file keeps."""
    obs = {f"obs {name}": table.obs[name].astype(str).to_numpy().astype(str) for name in table.obs}
    return {f"obsm {key}": np.asarray(table.obsm[key]) for key in table.obsm} | obs


BY_NAME = {  # whose noise belongs to the names of cells
    "tl.predict_expression", "tl.sample_expression", "tl.summarize_expression", "tl.pair_transitions", "tl.generate_morphology",
}  # fmt: skip


@pytest.mark.parametrize("what", ["groups", "library", "genes", "cells", "columns"])
@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if not verb.slow and "AnnData" in verb.kinds])
def test_names_in_the_data(verb, what, tmp_path):
    """The result is the same up to the name, and is written and read."""
    if (verb, what) == ("pl.imputation", "genes"):  # the library is the sum over the genes of the result
        return
    name = few(["CD4⁺ T-Zelle", "%s {x} $x^2$", "a/b", "nan"], verb + what, 1)[0]
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
        data.var_names = [*data.var_names[:-1], name]
    elif what == "cells":
        if verb in ("pl.attention", "pl.pairs"):  # of pairs by name: that of the cell is dropped
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
        if what == "columns" or verb not in BY_NAME:
            same(values, right)
    if "/" not in name:
        data.write_h5ad(tmp_path / "a.h5ad")
        ad.read_h5ad(tmp_path / "a.h5ad")
    returned = VERBS[verb](given(verb, "AnnData"), trained()) if verb in ("pp.tiles", "get.expression") else None
    if isinstance(returned, ad.AnnData):
        returned.write_h5ad(tmp_path / "b.h5ad")


@pytest.mark.parametrize("verb", [name for name in VERBS if name.startswith(("tl.", "pp.")) and not VERBS[name].slow])
def test_names_of_objects_in_a_dict(verb):
    name = few([*SPOKEN, "a/b"], verb + "dict", 1)[0]
    kind = VERBS[verb].kinds[0]
    one = given(verb, kind)
    found = outcome(verb, {name: one, "other": given(verb, kind)})
    assert found or table_of(one).uns


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if "image" in verb.reads and not verb.slow])
def test_names_of_channels(verb, tmp_path):
    name = few([*SPOKEN, "a/b"], verb + "channels", 1)[0]
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
    ("tl.sample_expression", "genes"): GENES[:2], ("pp.tiles", "pool"): ["F", "E_cell"],
    ("pl.profile", "features"): ["solidity", "r_mean"],
    ("pl.crops", "channels"): ["0", "1"],
    ("pl.crops", "groups"): ["fibroblast", "epithelial"], ("tl.embed_spatia", "levels"): ["cell", "niche"],
    ("tl.embed_spatia", "modalities"): ["image", "genes"], ("pl.levels", "levels"): ["cell", "niche"],
    ("tl.train_spatia", "modalities"): ["image", "genes"], ("tl.generate_morphology", "cells"): None,
}  # fmt: skip


@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_names_in_any_form(verb, name):
    data, values = given(verb, "AnnData"), LISTS[verb, name]
    if verb == "tl.train_imputation":
        values = list(data.var_names[:8])
    if name == "cells":
        values = list(data.obs_names[data.obs["cell_type"] == "fibroblast"][:2])
    right = outcome(verb, given(verb, "AnnData"), **{name: values})
    for form in few(FORMS, verb + name, 1 if VERBS[verb].slow else len(FORMS)):
        same(outcome(verb, copied(data), **{name: FORMS[form](values)}), right)


@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_lists_of_nothing_are_refused(verb, name):
    wrong = [[], (), np.array([]), [3], [None], [""], ["a", "a"], {"a"}, True]
    all_refused(verb, given(verb, "AnnData"), [{name: value} for value in wrong])


@pytest.mark.parametrize(("verb", "name"), LISTS)
def test_one_name_is_a_list_of_one(verb, name):
    if verb in ("tl.train_imputation", "pl.crops"):  # one gene is too few; one channel is grey
        return
    data = given(verb, "AnnData")
    value = "cell_3" if name == "cells" else {"modalities": "genes"}.get(name, (LISTS[verb, name] or [""])[0])
    if name == "cells":
        value = data.obs_names[data.obs["cell_type"] == "fibroblast"][0]
    same(outcome(verb, data, **{name: value}), outcome(verb, given(verb, "AnnData"), **{name: [value]}))


def test_costs_that_cannot_be_meant():
    data = given("tl.pair_transitions", "AnnData")
    data.obsm["words"] = np.full((80, 2), "a")
    wrong = [{"genes": "1"}, {"genes": np.nan}, {"genes": -1}, {"F": 0}, {"genes": [1]}, {"words": 1}, [1]]
    all_refused("tl.pair_transitions", data, [{"cost": cost} for cost in wrong])


def test_slots_of_other_types_are_pooled_and_compared():
    clean, data = given("pp.tiles", "AnnData"), given("pp.tiles", "AnnData")
    data.obsm["F"] = sparse.csr_matrix(data.obsm["F"])
    for verb, options in (("pp.tiles", {"pool": "F"}), ("tl.pair_transitions", {"cost": {"F": 1.0}})):
        same(outcome(verb, data, **options), outcome(verb, clean, **options))
    data.obsm["words"] = np.full((80, 2), "a")
    all_refused("pp.tiles", data, [{"pool": "words"}])


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
