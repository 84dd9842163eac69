import warnings

import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf


@pytest.fixture
def embedded():
    """Cells whose levels are planted: the niche's first component holds 90 % of its variance and runs along the slide."""
    sdata, rng = sf.datasets.simulated_tissue(60, seed=0), np.random.default_rng(0)
    table = sdata["table"]
    along = np.argsort(np.argsort(table.obsm["spatial"][:, 0])) - 29.5
    across = np.resize([1.0, -1.0], 60)
    across -= along * (across @ along) / (along @ along)
    directions = np.linalg.qr(rng.normal(size=(5, 2)))[0].T
    parts = [values / np.linalg.norm(values) for values in (along, across)]
    niche = 3 * parts[0][:, None] * directions[0] + parts[1][:, None] * directions[1]
    for level in ("cell", "niche", "tissue"):
        table.obsm[f"X_spatia_{level}"] = (7 + (niche if level == "niche" else rng.normal(size=(60, 5)))).astype(
            np.float32
        )
    weight = sparse.random(60, 60, 0.2, rng=rng, format="csr")
    table.obsp["X_spatia_attention"] = weight.multiply(1 / weight.sum(1)[:, None]).tocsr()
    return sdata


def test_each_level_is_drawn_by_its_principal_components(embedded):
    figure = sf.pl.levels(embedded, return_fig=True)
    assert [ax.get_title().split(",")[0] for ax in figure.axes[:3]] == ["cell", "niche", "tissue"]
    figure = sf.pl.levels(embedded, levels="niche", return_fig=True)
    first, second = figure.axes
    assert first.get_title() == "niche, component 1 (90%)" and second.get_title() == "niche, component 2 (10%)"
    drawn = np.asarray(first.collections[0].get_array())
    assert abs(np.corrcoef(drawn, embedded["table"].obsm["spatial"][:, 0])[0, 1]) > 0.95
    del embedded["table"].obsm["X_spatia_tissue"]
    with pytest.raises(KeyError, match="embed_spatia"):
        sf.pl.levels(embedded)


def test_components_that_do_not_exist_are_left_out(embedded):
    embedded["table"].obsm["X_spatia_niche"] = embedded["table"].obsm["X_spatia_niche"][:, :1]
    first, second = sf.pl.levels(embedded, levels="niche", return_fig=True).axes
    assert first.get_title() == "niche, component 1 (100%)" and not second.get_title()


def test_a_level_that_does_not_vary_is_drawn_without_a_warning(embedded):
    embedded["table"].obsm["X_spatia_niche"][:] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figure = sf.pl.levels(embedded, levels="niche", return_fig=True)
    assert figure.axes[0].get_title() == "niche, component 1 (0%)"


@pytest.mark.parametrize("color", [None, "cell_type"])
def test_attention_is_drawn_around_a_cell(embedded, color):
    assert len(sf.pl.attention(embedded, "cell_5", color=color, return_fig=True).axes) >= 2
    with pytest.raises(KeyError, match="obs_names has no"):
        sf.pl.attention(embedded, "nobody")
    del embedded["table"].obsp["X_spatia_attention"]
    with pytest.raises(KeyError, match="attention=True"):
        sf.pl.attention(embedded, "cell_5")
