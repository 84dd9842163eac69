import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch

import spatiaflow as sf
from _spatia import edited, embedded, image_like, tiny, train

LEVELS = ("X_spatia_cell", "X_spatia_niche", "X_spatia_tissue")


@pytest.fixture(scope="module")
def slides():
    with sf.settings.override(progress=False, verbosity="warning"):
        return [sf.datasets.simulated_tissue(200, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def model(slides):
    with sf.settings.override(progress=False, verbosity="warning"):
        return train(slides)


def test_slots_and_provenance(slides, model):
    table = embedded(slides[0], model)
    for key in LEVELS:
        assert table.obsm[key].shape == (200, 32)
        assert table.obsm[key].dtype == np.float32
        assert np.isfinite(table.obsm[key]).all()
    parts = np.split(table.obsm["X_spatia"], 3, axis=1)
    for part, key in zip(parts, LEVELS):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(
            part * np.linalg.norm(table.obsm[key], axis=1, keepdims=True), table.obsm[key], atol=1e-5
        )
    uns = table.uns["X_spatia"]
    assert uns["gene_coverage"] == 1
    assert list(uns["channels"]) == ["dapi", "bound", "rna", "prot"]
    assert uns["params"]["model_sha256"] == model.sha256


def test_round_trips(slides, model, tmp_path):
    copy = sf.tl.embed_spatia(slides[0], model=model, image_key="fluorescence", copy=True)
    copy.write(tmp_path / "t.zarr")
    again = sd.read_zarr(tmp_path / "t.zarr")["table"]
    copy["table"].write_h5ad(tmp_path / "t.h5ad")
    for other in (again, ad.read_h5ad(tmp_path / "t.h5ad")):
        for key in (*LEVELS, "X_spatia"):
            np.testing.assert_array_equal(other.obsm[key], copy["table"].obsm[key])
        assert list(other.uns["X_spatia"]["levels"]) == ["cell", "niche", "tissue"]


def test_some_levels_only(slides, model):
    table = embedded(slides[0], model, levels=("niche",))
    assert "X_spatia_cell" not in table.obsm
    assert table.obsm["X_spatia"].shape == (200, 32)


def test_the_order_of_the_table_changes_nothing(slides, model):
    one = embedded(slides[0], model)
    order = np.random.default_rng(0).permutation(200)
    other = embedded(edited(slides[0], table=slides[0]["table"][order].copy()), model)
    for key in LEVELS:
        np.testing.assert_allclose(other.obsm[key], one.obsm[key][order], atol=1e-5)


def test_a_table_of_some_of_the_shapes(slides, model):
    table = embedded(edited(slides[0], table=slides[0]["table"][::2].copy()), model)
    one = embedded(slides[0], model)
    change = {k: np.abs(table.obsm[k] - one.obsm[k][::2]).mean() / one.obsm[k].std() for k in LEVELS}
    assert change["X_spatia_cell"] < 0.1  # not zero: the slide's intensities are scaled by the cells that are there
    assert change["X_spatia_niche"] > 3 * change["X_spatia_cell"]


def test_each_modality_alone(slides, model):
    both = embedded(slides[0], model)
    blank = slides[0]["table"].copy()
    blank.X = blank.X * 0
    image = embedded(slides[0], model, modalities=("image",))
    no_counts = embedded(edited(slides[0], table=blank), model, modalities=("image",))
    np.testing.assert_array_equal(no_counts.obsm["X_spatia"], image.obsm["X_spatia"])
    genes = slides[0]["table"].copy()  # an AnnData, without any image
    genes = embedded(genes, model, modalities="genes", mpp=1, image_key=None)
    assert not np.allclose(genes.obsm["X_spatia_cell"], both.obsm["X_spatia_cell"], atol=1e-3)
    assert not np.allclose(image.obsm["X_spatia_cell"], both.obsm["X_spatia_cell"], atol=1e-3)


def test_a_slide_with_one_channel_and_names_of_its_own(slides, model):
    values = np.asarray(slides[0]["fluorescence"].data)
    dapi = edited(slides[0], fluorescence=image_like(slides[0], values[:1], ["DAPI"]))  # case does not matter
    table = embedded(dapi, model)
    assert list(table.uns["X_spatia"]["channels"]) == ["dapi"]
    named = edited(slides[0], fluorescence=image_like(slides[0], values[[2, 0]], ["c0", "c1"]))
    with pytest.raises(KeyError, match="channels="):
        embedded(named, model)
    other = embedded(named, model, channels={"c1": "dapi"})
    np.testing.assert_allclose(other.obsm["X_spatia"], table.obsm["X_spatia"], atol=1e-5)
    with pytest.raises(KeyError, match="maps to 'nucleus'"):
        embedded(named, model, channels={"c1": "nucleus"})
    with pytest.raises(KeyError, match="names 'c7'"):
        embedded(named, model, channels={"c7": "dapi"})
    with pytest.raises(ValueError, match="channels c0, c1 of slide .* would all be the model's 'dapi'"):
        embedded(named, model, channels={"c0": "dapi", "c1": "dapi"})


def test_a_channel_by_another_name_is_not_left_out_silently(slides, model, caplog, monkeypatch):
    monkeypatch.setattr(sf._settings.logger, "propagate", True)
    values = np.asarray(slides[0]["fluorescence"].data)
    embedded(edited(slides[0], fluorescence=image_like(slides[0], values[:1], ["dapi"])), model)
    assert "masked" not in caplog.text  # settings show warnings alone: nothing was left out
    embedded(edited(slides[0], fluorescence=image_like(slides[0], values[:2], ["dapi", "18S"])), model)
    assert "no channel bound, rna, prot: masked, and its 18S left out" in caplog.text
    assert "channels={'18S': 'bound'}" in caplog.text


def test_other_panels(slides, model):
    half = slides[0]["table"][:, ::2].copy()
    table = embedded(edited(slides[0], table=half), model)
    assert table.uns["X_spatia"]["gene_coverage"] == 0.5
    more = ad.concat(
        [half, ad.AnnData(np.ones((200, 3)), obs=half.obs, var=pd.DataFrame(index=["x", "y", "z"]))], axis=1
    )
    more.obs, more.uns = half.obs, half.uns
    other = embedded(edited(slides[0], table=more), model)  # genes that the model does not know
    np.testing.assert_array_equal(other.obsm["X_spatia"], table.obsm["X_spatia"])
    foreign = half.copy()
    foreign.var_names = [f"ENSG{i}" for i in range(foreign.n_vars)]
    with pytest.raises(ValueError, match="0 of the model's 60 genes"):
        embedded(edited(slides[0], table=foreign), model)


def test_cells_outside_the_image_and_without_counts(slides, model):
    image = slides[0]["fluorescence"]
    cut = edited(slides[0], fluorescence=image[:, : image.sizes["y"] // 2])
    with pytest.warns(UserWarning, match="outside of image"):
        table = embedded(cut, model)
    assert np.isfinite(table.obsm["X_spatia"]).all()
    empty = slides[0]["table"].copy()
    empty.X = empty.X.multiply((np.arange(200) > 2)[:, None]).tocsr()
    assert np.isfinite(embedded(edited(slides[0], table=empty), model).obsm["X_spatia"]).all()


def test_an_image_that_is_too_small_or_elsewhere(slides, model):
    tiny = edited(slides[0], fluorescence=slides[0]["fluorescence"][:, :10, :10])
    with pytest.raises(ValueError, match="smaller than a crop"):
        embedded(tiny, model)
    from spatialdata.transformations import Translation, set_transformation

    away = edited(slides[0], fluorescence=image_like(slides[0], np.zeros((1, 200, 200), np.uint8), ["dapi"]))
    set_transformation(away["fluorescence"], Translation([1e6, 1e6], axes=("x", "y")), "global")
    with pytest.raises(ValueError, match="200 of 200 positions of slide 'nuclei'"):
        embedded(away, model)


def test_two_images_and_no_scale(slides, model):
    with pytest.raises(KeyError, match="Give image_key"):
        sf.tl.embed_spatia(slides[0], model=model)
    unscaled = edited(slides[0])
    unscaled.attrs.pop("microns_per_unit")
    with pytest.raises(ValueError, match="mpp="):
        embedded(unscaled, model)


def test_a_wrong_image_is_named_before_genes_that_the_model_lacks(slides, model):
    foreign = slides[0]["table"].copy()
    foreign.var_names = [f"OTHER{i}" for i in range(foreign.n_vars)]
    with pytest.raises(KeyError, match="'fluorescent'"):
        embedded(edited(slides[0], table=foreign), model, image_key="fluorescent")


def test_a_broken_chunk_is_an_error(slides, model, tmp_path):
    slides[0].write(tmp_path / "t.zarr")
    stored = sd.read_zarr(tmp_path / "t.zarr")
    chunk = max(
        (p for p in (tmp_path / "t.zarr/images/fluorescence").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with pytest.raises(Exception, match=r".+"):  # whatever the codec says; never a silent black image
        embedded(stored, model)


@pytest.mark.parametrize("values", [-1.0, 0.5, np.nan])
def test_bad_counts(slides, model, values):
    bad = slides[0]["table"].copy()
    bad.X.data[0] = values
    with pytest.raises(ValueError, match="raw counts are needed"):
        embedded(edited(slides[0], table=bad), model)


def test_bad_arguments(slides, model, tmp_path):
    with pytest.raises(ValueError, match="levels"):
        embedded(slides[0], model, levels=("organ",))
    with pytest.raises(ValueError, match="modalities"):
        embedded(slides[0], model, modalities=("smell",))
    with pytest.raises(ValueError, match="resume"):
        train(slides, resume=True)
    with pytest.raises(ValueError, match="validation"):
        train(slides, validation=1.5)
    with pytest.raises(ValueError, match="not in data"):
        train(slides, validation=["elsewhere"])
    with pytest.raises(ValueError, match="no slide measures, such as 'Foo'"):
        train(slides, genes=["Foo"])
    with pytest.raises(ValueError, match="config must be one of 'default', not 'huge'"):
        train(slides, config="huge")
    with pytest.raises(TypeError, match="config must be a name or a models.SpatiaConfig, not dict"):
        train(slides, config={"width": 32})


def test_levels_of_an_earlier_call_do_not_stay(slides, model):
    table = embedded(slides[0], model, attention=True)
    again = embedded(edited(slides[0], table=table), model, levels=("cell",))
    assert "X_spatia_niche" not in again.obsm and "X_spatia_attention" not in again.obsp
    assert again.obsm["X_spatia"].shape == again.obsm["X_spatia_cell"].shape


def test_attention_is_a_share_of_the_neighbours(slides, model):
    table = embedded(slides[0], model, attention=True)
    weight = table.obsp["X_spatia_attention"]
    np.testing.assert_allclose(np.asarray(weight.sum(1)).ravel(), 1, atol=1e-5)
    assert 0 < weight.diagonal().min() and weight.diagonal().max() < 1  # a cell is part of its niche
    assert np.diff(weight.indptr).min() >= model.config.niche_neighbors + 1


def test_weights_go_by_name_or_path(slides, model, tmp_path):
    path = model.save(tmp_path / "mine.safetensors")
    np.testing.assert_array_equal(
        embedded(slides[0], path).obsm["X_spatia"], embedded(slides[0], model).obsm["X_spatia"]
    )
    with pytest.raises(ValueError, match="no weights 'unheard-of'"):
        embedded(slides[0], "unheard-of")
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.safetensors"):
        embedded(slides[0], tmp_path / "elsewhere.safetensors")


def test_crops_may_fit_their_cells(slides):
    """The scale is given to the model: with other polygons around the same pixels a cell's embedding differs."""
    model = train(slides, config=tiny(adaptive=True))
    table = embedded(slides[0], model)
    polygons = slides[0]["nuclei"].copy()
    polygons.geometry = polygons.geometry.scale(1.6, 1.6, origin="centroid")
    wide = embedded(edited(slides[0], nuclei=polygons), model)
    assert np.isfinite(table.obsm["X_spatia"]).all()
    assert np.abs(wide.obsm["X_spatia_cell"] - table.obsm["X_spatia_cell"]).max() > 1e-3


@pytest.mark.usefixtures("own_draws")
def test_a_published_vit_mae_is_loaded_with_its_weights(slides, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    small = ViTMAEConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    published = ViTMAEForPreTraining(small)
    published.save_pretrained(tmp_path / "mae")
    model = train(slides, config=tiny(backbone=str(tmp_path / "mae")), max_epochs=1)
    assert model.network.image.mae.config.hidden_size == 24
    # one epoch moves the weights a little: they are the published ones, not others drawn at random
    known, now = published.state_dict(), model.network.image.mae.state_dict()
    name = next(k for k, v in known.items() if v.ndim == 2 and "decoder" not in k and "embeddings" not in k)
    assert torch.nn.functional.cosine_similarity(known[name].ravel(), now[name].ravel(), dim=0) > 0.5
    again = sf.models.load(model.save(tmp_path / "model"))  # needs no published folder any more
    np.testing.assert_array_equal(
        embedded(slides[0], again).obsm["X_spatia"], embedded(slides[0], model).obsm["X_spatia"]
    )
    with pytest.raises(OSError, match="could not be loaded"):
        train(slides, config=tiny(backbone=str(tmp_path / "nothing")))


def test_intensities_scaled_as_in_training(slides, model):
    """By the training slides' percentiles a darker image stays darker; by its own it is scaled back."""
    image = slides[0]["fluorescence"]
    dark = edited(slides[0], fluorescence=image_like(slides[0], (image.values // 2).astype(np.uint8), image.c.values))
    own, fixed = (
        [embedded(s, model, scaling=how).obsm["X_spatia_cell"] for s in (slides[0], dark)]
        for how in ("slide", "training")
    )
    assert np.abs(own[0] - own[1]).mean() < 0.5 * np.abs(fixed[0] - fixed[1]).mean()
    assert not embedded(slides[0], model, scaling="training").uns["X_spatia"]["params"]["transductive"]
    with pytest.raises(ValueError, match="scaling must be"):
        embedded(slides[0], model, scaling="none")


def test_bundled_weights_need_no_argument_and_no_network(slides):
    """On tissue that they never saw, whose genes they do not know."""
    known = sf.datasets.weights()
    assert known.loc["spatia-pancreas-small", "bytes"] < 20e6
    model = sf.models.load(sf.datasets.weights("spatia-pancreas-small"))
    assert all(box["box_um"][2] < 16500 * 0.2125 for box in model.card["data"].values())  # the rest is for tests
    table = embedded(slides[0], None, modalities="image")
    assert table.uns["X_spatia"]["params"]["model_sha256"] == model.sha256
    assert np.isfinite(table.obsm["X_spatia"]).all()
    assert (
        (sf.datasets.weights("spatia-pancreas-small").with_suffix(".md"))
        .read_text()
        .startswith("# spatia-pancreas-small")
    )


def test_bundled_weights_tell_cell_types_of_other_cells_of_their_slide(mirror):
    """On the public region, by genes: neighbours in the embedding have the publishers' cluster more often than by chance."""
    from sklearn.neighbors import KNeighborsClassifier

    with sf.settings.override(mirror=str(mirror)):
        sdata = sf.datasets.xenium_pancreas()
    table = sdata["table"]
    sdata["table"] = table = table[table.obs["cluster"].notna().to_numpy()][::6].copy()
    sf.tl.embed_spatia(sdata, modalities="genes", levels="cell")
    x, y = np.asarray(table.obsm["X_spatia_cell"]), table.obs["cluster"].astype(str).to_numpy()
    half = np.arange(len(x)) % 2 == 0
    agreement = KNeighborsClassifier(15).fit(x[half], y[half]).score(x[~half], y[~half])
    assert agreement > 2 * pd.Series(y).value_counts(normalize=True).iloc[0]


def test_a_batch_effect_of_genes_is_evened_out(slides):
    """Capture that differs gene by gene moves embeddings less when a slide is standardised by its own cells."""
    model = train(slides, modalities="genes", max_epochs=2)
    table = slides[0]["table"].copy()
    factor = np.random.default_rng(0).choice([1, 4], table.n_vars)
    table.X = table.X.multiply(factor).tocsr().astype(np.float32)
    other = edited(slides[0], table=table)
    moved = {}
    for scaling in ("slide", "training"):
        a, b = (
            embedded(s, model, modalities="genes", scaling=scaling).obsm["X_spatia_cell"] for s in (slides[0], other)
        )
        moved[scaling] = np.linalg.norm(a - b, axis=1).mean()
    assert moved["slide"] < 0.7 * moved["training"]


@pytest.fixture(scope="module")
def means(slides):
    """A model whose niche and tissue levels are means of components."""
    with sf.settings.override(progress=False, verbosity="warning"):
        return train(slides, config=tiny(context="means"))


def test_means_of_components_are_what_the_definition_says(slides, means):
    """Beside a slow, obvious reference: every pair of cells within three standard deviations."""
    table = embedded(slides[0], means)
    cell, niche, tissue = (np.asarray(table.obsm[slot]) for slot in LEVELS)
    components = cell[:, : cell.shape[1] - means.config.width]
    assert niche.shape[1] == tissue.shape[1] == 3 * components.shape[1]
    xy = np.asarray(table.obsm["spatial"])
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    sigma = means.config.niche_um / 2  # the smallest: cells are not joined before they are averaged
    weight = np.exp(-0.5 * (distance / sigma) ** 2) * (distance <= 3 * sigma)
    expected = weight @ components / weight.sum(1, keepdims=True)
    found = niche[:, : components.shape[1]]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.995
    assert found.std() > niche[:, -components.shape[1] :].std() > tissue[:, -components.shape[1] :].std()


def test_means_tell_planted_niches_and_survive_saving(slides, means, tmp_path):
    from sklearn.metrics import adjusted_rand_score

    means.save(tmp_path / "m.safetensors")
    again = sf.models.load(tmp_path / "m.safetensors")
    assert again.config.context == "means" and again.sha256 == means.sha256
    table = embedded(slides[0], again)
    np.testing.assert_array_equal(table.obsm["X_spatia_niche"], embedded(slides[0], means).obsm["X_spatia_niche"])
    sf.tl.cluster_niches(table, use_rep="X_spatia_niche", n_clusters=3, key_added="found", random_state=0)
    assert adjusted_rand_score(table.obs["niche"], table.obs["found"]) > 0.7
    assert "niche" not in means.history  # nothing was learned for them


def test_means_of_genes_that_the_image_predicts(slides, means):
    table = embedded(slides[0], means, modalities="image")
    assert all(np.isfinite(table.obsm[slot]).all() for slot in LEVELS)
    with pytest.raises(ValueError, match="means, without attention"):
        embedded(slides[0], means, attention=True)
    with pytest.raises(ValueError, match="no slide has counts"):
        train(slides, modalities="image", config=tiny(context="means"))
    with pytest.raises(ValueError, match="context must be 'attention' or 'means'"):
        tiny(context="mean")
