"""The main line on simulated tissue: image to features to expression, in SpatialData, written, read and drawn."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd

import spatiaflow as sf
from spatiaflow._slides import gather

pytestmark = pytest.mark.slow  # the model that the tests share


@pytest.fixture(scope="module")
def result():
    with sf.settings.override(progress=False, verbosity="warning"):
        slides = [sf.datasets.simulated_tissue(350, seed=seed) for seed in range(4)]
        for slide in slides:
            sf.pp.encode_patches(slide, image_key="he", patch_um=48)
        model = sf.tl.train_stflow(slides[:3], genes=40, max_epochs=3)
        sf.tl.predict_expression(slides[3], model=model, n_samples=4)
    return slides[3], model


def test_planted_genes_are_recovered(result):
    sdata, model = result
    table, predicted = sdata["table"], sf.get.expression(sdata)
    counts = table[:, model.genes].X.toarray()
    truth = np.log1p(counts / np.asarray(table.X.sum(1)).reshape(-1, 1) * 1e4)
    r = sf.metrics.pearson(truth, predicted.X)
    drivers = table.var.loc[model.genes, "driver"].to_numpy()
    assert np.mean(r[drivers == "niche"]) > 0.35
    assert np.mean(r[drivers == "morphology"]) > 0.2
    assert abs(np.mean(r[drivers == "none"])) < 0.12
    assert model.skill[drivers == "niche"].mean() > model.skill[drivers == "none"].mean() + 0.03


def test_intervals_hold_on_a_new_slide(result):
    sdata, model = result
    table = sdata["table"]
    counts = table[:, model.genes].X.toarray()
    truth = np.log1p(counts / np.asarray(table.X.sum(1)).reshape(-1, 1) * 1e4)
    (slide,) = gather(sdata, need=("counts", "features"), use_rep="X_texture")
    draws = np.stack(list(model.draws(slide, 100, depth=slide.library, new_donor=False)))
    low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
    assert 0.84 < sf.metrics.interval_coverage(truth, low, high).mean() < 0.97


def test_spatialdata_round_trip(result, tmp_path):
    sdata, _ = result
    sdata.write(tmp_path / "t.zarr")
    again = sd.read_zarr(tmp_path / "t.zarr")
    for key in ("X_texture", "stflow", "stflow_rate", "stflow_std"):
        np.testing.assert_array_equal(again["table"].obsm[key], sdata["table"].obsm[key])
    assert list(again["table"].uns["stflow"]["genes"]) == list(sdata["table"].uns["stflow"]["genes"])
    assert again["table"].uns["stflow"]["params"]["n_samples"] == 4
    np.testing.assert_array_equal(sf.get.expression(again).X, sf.get.expression(sdata).X)


def test_copy_leaves_the_original_alone(result):
    sdata, model = result
    copy = sf.tl.predict_expression(sdata, model=model, key_added="again", copy=True)
    assert "again" in copy["table"].obsm
    assert "again" not in sdata["table"].obsm
    assert set(copy.images) == set(sdata.images)


def test_drawn_by_scanpy_squidpy_and_spatialdata_plot(result, model, slide):
    import scanpy as sc
    import spatialdata_plot  # noqa: F401
    import squidpy as sq

    sdata, _ = result
    predicted = sf.get.expression(sdata)
    gene = predicted.var_names[0]
    spots = slide("t", seed=7)
    sf.tl.predict_expression(spots, model=model)
    arrays = sf.get.expression(spots)
    sc.pl.spatial(arrays, color=arrays.var_names[0], show=False)
    assert len(plt.gcf().axes) == 2
    sq.pl.spatial_scatter(arrays, color=arrays.var_names[0])
    assert plt.gcf().axes[0].get_title() == arrays.var_names[0]
    drawn = sd.SpatialData(shapes={"nuclei": sdata["nuclei"]}, tables={"stflow": predicted})
    figure, ax = plt.subplots()
    drawn.pl.render_shapes("nuclei", color=gene, table_name="stflow").pl.show(ax=ax)
    assert ax.collections or ax.images
    plt.close("all")


def test_a_result_under_another_key_is_named():
    adata = ad.AnnData(
        np.zeros((3, 2), np.float32),
        obsm={"imputed": np.ones((3, 2))},
        uns={"imputed": {"genes": ["a", "b"], "normalization": {}}},
    )
    adata.obsm["controls"], adata.uns["controls"] = np.ones((3, 1)), {"genes": ["Blank-1"]}  # no result
    with pytest.raises(KeyError, match="no result 'stflow': there is 'imputed'; give key='imputed'"):
        sf.get.expression(adata)
    assert list(sf.get.expression(adata, key="imputed").var_names) == ["a", "b"]
