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
    assert caught.value.__notes__ == ["This is object 'c' of data. 2 of 4 were done before it."]
    with pytest.raises(ValueError, match="odd") as caught:
        half(5)
    assert not hasattr(caught.value, "__notes__")


def test_a_verb_without_data_says_so():
    with pytest.raises(TypeError, match="data"):
        sf.tl.cluster_niches()
    with pytest.raises(TypeError, match="data"):
        sf.tl.embed_spatia()
