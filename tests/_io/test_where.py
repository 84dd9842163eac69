import numpy as np
import pytest
from spatialdata.transformations import Scale, set_transformation

import spatiaflow as sf
from spatiaflow import _io


def test_positions_are_given_in_the_coordinate_system_asked_for():
    sdata = sf.datasets.simulated_tissue(60, seed=0)
    element = sdata["table"].uns["spatialdata_attrs"]["region"]
    element = element if isinstance(element, str) else element[0]
    set_transformation(sdata[element], Scale([3, 3], axes=("x", "y")), "enlarged")
    (plain,) = _io.places(sdata, _io.Where(mpp=1))
    (enlarged,) = _io.places(sdata, _io.Where(mpp=1, coordinate_system="enlarged"))
    np.testing.assert_allclose(enlarged.xy, 3 * plain.xy)
    assert enlarged.coordinate_system == "enlarged"
    with pytest.raises(KeyError, match="no coordinate system 'elsewhere'.*enlarged"):
        _io.places(sdata, _io.Where(coordinate_system="elsewhere"))


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), "1"])
def test_a_scale_that_cannot_be_is_refused(mpp):
    with pytest.raises(ValueError, match="mpp must be a positive number"):
        _io.Where(mpp=mpp)
