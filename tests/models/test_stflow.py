"""STFlow as a model: its configurations, what a file must hold, and what it says of genes."""

import numpy as np
import pytest

import spatiaflow as sf
from spatiaflow.models import STFlowConfig
from spatiaflow.models.stflow import STACKS, STFlow


@pytest.mark.usefixtures("own_draws")
def test_paper_config_is_the_paper():
    from spatiaflow.models.stflow import Denoiser

    for size, count in (((1024, 50), 1_147_724), ((1536, 313), 1_483_624)):
        assert sum(p.numel() for p in Denoiser(STFlowConfig.of("paper").denoiser(*size)).parameters()) == count


def test_a_config_is_a_name_or_an_instance():
    default = STFlowConfig.of("default")
    assert STFlowConfig.of(default) is default
    assert STFlowConfig.of("paper") != default
    with pytest.raises(ValueError, match="config must be one of"):
        STFlowConfig.of("best")


def test_a_file_without_one_of_its_stacks_is_refused(model):
    description, tensors = model.state()
    for stack in STACKS:
        assert tensors[f"array.{stack}"].shape[-1] == len(model.genes)
    del tensors["array.rate_weights"]
    with pytest.raises(ValueError, match="none for rates; train it again"):
        STFlow.from_state(description, tensors)


def test_fewer_genes_are_trusted_on_a_new_donor(model):
    known, new = model.trusted(False), model.trusted(True)
    assert known.dtype == new.dtype == bool
    assert known.shape == model.skill.shape == (len(model.genes),)
    assert known.sum() > 0
    assert not (new & ~known).any()


def test_draws_rest_on_rates_at_one_depth(model, slide):
    """The mean of draws at a depth is that of the rates, not of what the depth of the image would give."""
    from spatiaflow._slides import gather

    (one,) = gather(slide("t", seed=7), need=("features",), use_rep="X_texture")
    rate = model.predict([one], new_donor=False, seed=0).rate
    size = np.full(len(one), 1e6)
    drawn = np.mean(list(model.draws(one, 300, depth=size, new_donor=False, seed=0)), 0)
    np.testing.assert_allclose(np.expm1(drawn).mean(), np.expm1(np.log1p(rate * 1e4)).mean(), rtol=0.25)
    assert sf.metrics.pearson(drawn, np.log1p(rate * 1e4)).mean() > 0.8
