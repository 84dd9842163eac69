import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import spatiaflow as sf


def with_prediction(value):
    table = AnnData(obs=pd.DataFrame(index=["spot_1", "spot_2"]))
    table.obsm["stflow"] = np.full((2, 3), value, np.float32)
    table.uns["stflow"] = {"genes": ["a", "b", "c"]}
    return table


def test_the_result_has_the_form_of_the_data():
    first, second = with_prediction(1), with_prediction(2)
    assert sf.get.expression(first).X.mean() == 1
    assert [found.X.mean() for found in sf.get.expression([first, second])] == [1, 2]
    found = sf.get.expression({"A": first, "B": second}, key="stflow")
    assert {name: one.X.mean() for name, one in found.items()} == {"A": 1, "B": 2}


def test_no_objects_and_no_result_are_refused():
    with pytest.raises(ValueError, match="data is empty"):
        sf.get.expression([])
    with pytest.raises(KeyError, match="no result 'imputed'.*give key='stflow'|no result 'imputed'.*impute_genes"):
        sf.get.expression([with_prediction(1)], key="imputed")


def test_a_result_that_uns_does_not_describe_is_refused():
    first, second = with_prediction(1), with_prediction(2)
    for table in (first, second):
        table.uns["stflow"]["params"] = {"n_obs": 2}
    second.uns["stflow"]["genes"] = ["c", "b", "a"]
    second.obs_names = ["spot_3", "spot_4"]
    with pytest.raises(ValueError, match="genes of 2 rows, and the slot has 3 of 4.*Predict once more"):
        sf.get.expression(ad.concat([first, second], uns_merge="first"))
    with pytest.raises(KeyError, match="it needs obsm.'stflow'. and uns.'stflow'...genes.*Predict once more|lose uns"):
        sf.get.expression(ad.concat([first, second], uns_merge="same"))
    assert sf.get.expression(first[:1]).n_obs == 1
    first.uns["stflow"]["genes"] = ["a", "b"]
    with pytest.raises(ValueError, match="describes 2 genes of 2 rows, and the slot has 3 of 2"):
        sf.get.expression(first)
