import pytest

import spatiaflow as sf
from spatiaflow._io import each_object, objects_of


@each_object
def double(data, *, copy=True):
    return 2 * data if copy else None


def test_objects_by_name():
    assert objects_of(3) == {"": 3}
    assert objects_of([3, 4]) == {"0": 3, "1": 4}
    assert objects_of({"a": 3}) == {"a": 3}
    for empty in ([], {}):
        with pytest.raises(ValueError, match="data is empty"):
            objects_of(empty)


def test_keys_that_are_the_same_as_text_are_refused():
    with pytest.raises(ValueError, match="two keys of the dict are the same as text"):
        objects_of({1: 3, "1": 4})


def test_a_verb_returns_the_form_it_was_given():
    assert double(2) == 4
    assert double([1, 2]) == [2, 4]
    assert double({"a": 1}) == {"a": 2}
    assert double(data=[1]) == [2]
    assert double([1, 2], copy=False) is None


def test_an_error_says_which_object_it_is_of():
    @each_object
    def half(data):
        if data % 2:
            raise ValueError("odd")
        return data // 2

    with pytest.raises(ValueError, match="odd") as caught:
        half({"a": 2, "b": 4, "c": 5, "d": 6})
    assert caught.value.__notes__ == ["This is object 'c' of data."]
    with pytest.raises(ValueError, match="odd") as caught:
        half(5)
    assert not hasattr(caught.value, "__notes__")


def normalised(table):
    out = table.copy()
    out.X = out.X.astype("float32") * 0.37
    return out


JOINT = {
    "cluster_niches": lambda data: sf.tl.cluster_niches(data, n_clusters=3, mpp=1),
    "cluster_cells": lambda data: sf.tl.cluster_cells(data, resolution=0.5),
    "annotate": lambda data: sf.tl.annotate(data, labels="cell_type", use_rep="X"),
    "train_imputation": lambda data: sf.tl.train_imputation(data),
}


@pytest.mark.parametrize("verb", JOINT)
def test_verbs_that_take_all_objects_together_name_the_one_that_is_wrong(verb):
    good = sf.datasets.simulated_tissue(60, seed=0)["table"]
    with pytest.raises(ValueError, match="raw counts are needed") as caught:
        JOINT[verb]({"first": good.copy(), "second": normalised(good)})
    assert caught.value.__notes__ == ["This is object 'second' of data."]


def test_the_reference_is_named_as_such():
    good = sf.datasets.simulated_tissue(60, seed=0)["table"]
    with pytest.raises(ValueError, match="reference_layer='counts'") as caught:
        sf.tl.annotate(good.copy(), labels="cell_type", use_rep="X", reference=[good, normalised(good)])
    assert caught.value.__notes__ == ["This is object '1' of reference."]


def test_the_object_with_other_genes_is_named():
    tables = [sf.datasets.simulated_tissue(60, seed=i)["table"] for i in range(3)]
    tables[1].var_names = [f"ENSG{i}" for i in range(tables[1].n_vars)]
    with pytest.raises(ValueError, match="share 0 genes.*Those of object 1, such as 'ENSG0'.*of one kind"):
        sf.tl.cluster_niches(tables, n_clusters=3, mpp=1)


def test_a_reference_with_other_genes_is_named_as_such():
    good = sf.datasets.simulated_tissue(60, seed=0)["table"]
    other = good.copy()
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="Those of object '2' of reference, such as 'ENSG0'"):
        sf.tl.annotate(good.copy(), labels="cell_type", use_rep="X", reference=[good, good, other])


def test_a_verb_without_data_says_so():
    with pytest.raises(TypeError, match="data"):
        sf.tl.cluster_niches()
    with pytest.raises(TypeError, match="data"):
        sf.tl.embed_spatia()
