"""The generator by genes, from the verbs."""

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest

import spatiaflow as sf
from spatiaflow.train import morphology

IMAGE = {"image_key": "fluorescence"}
SMALL = {
    "crop_um": 16.0,
    "crop_pixels": 16,
    "n_latent": 16,
    "width": 64,
    "n_layers": 2,
    "n_neighbors": 4,
    "n_components": 30,
}


def tissue(seed, n=1200):
    sdata = sf.datasets.simulated_tissue(n, seed=seed)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B"), ("A", "A")], groupby="state", niche_key="niche")
    return sdata


@pytest.fixture(scope="module")
def slide():
    return tissue(1)


def train(data, *, config=(), steps=(400, 80), **options):
    """``steps``: of the autoencoder at most, and of an epoch of the flow at least."""
    config = sf.models.MorphologyConfig(**(SMALL | dict(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morphology, "MAX_STEPS", steps[0])
        patch.setattr(morphology, "MIN_BATCHES", steps[1])
        return sf.tl.train_morphology(
            data, **IMAGE, **({"config": config, "validation": 0.3, "max_epochs": 2} | options)
        )


@pytest.fixture(scope="module")
def model(slide):
    return train(slide)


def generate(slide, model, **options):
    if not {"target", "shift"} & set(options):
        options = {"source": "A", "target": "B"} | options
    return sf.tl.generate_morphology(slide, **({"model": model, "n_steps": 2} | IMAGE | options))


def means(made, feature="area_um2"):
    """Mean of a feature by dose."""
    return made.to_df()[feature].groupby(made.obs["dose"].to_numpy()).mean()


def test_no_embeddings_are_needed_and_the_card_says_what_was_compared(slide, model):
    assert isinstance(model, sf.models.MorphologyEditor) and not any("X_spatia" in key for key in slide["table"].obsm)
    scores = model.card["validation_scores"]
    assert scores["energy, copy"] == 1 and {"energy, flow 3", "energy, linear 1", "val_flow"} <= set(scores)
    best = min((name for name in scores if name.startswith(("energy, flow", "energy, linear"))), key=scores.get)
    assert best.split()[1] == model.edits[""].kind == model.edits["A -> B"].kind  # the only transition
    assert model.config.edit is None and model.card["pairs"]["A -> B"] > 60
    assert 0 < model.shifts["A -> B"][""]["confidence"] <= 1


@pytest.mark.parametrize("edit", ["linear", "flow"])
def test_genes_that_follow_the_nuclear_area_change_it(slide, model, edit):
    """Planted: log rates of MORPH1 and 3 rise by twice the log area, those of MORPH2 and 4 fall, others follow nothing."""
    model.config, kept = replace(model.config, edit=edit), model.config
    cells = list(slide["table"].obs_names[slide["table"].obs["cell_type"] == "epithelial"][:60])
    larger = {}
    for name, shift in {
        "up": {"MORPH1": 1.0, "MORPH3": 1.0, "MORPH2": -1.0, "MORPH4": -1.0}, "down": {"MORPH2": 1.0, "MORPH4": 1.0},
        "nothing": {"NOISE01": 1.0, "NOISE02": 1.0},
    }.items():  # fmt: skip
        area = means(generate(slide, model, shift=shift, cells=cells, dose=[0, 1]))
        larger[name] = area[1] / area[0] - 1
    model.config = kept
    assert larger["up"] > 0.05 and larger["down"] < -0.01 and abs(larger["nothing"]) < 0.02, larger


def test_a_dose_outside_of_the_edit_is_a_warning(slide, model):
    cells = list(slide["table"].obs_names[slide["table"].obs["state"] == "A"][:3])
    with pytest.warns(UserWarning, match="dose=-1 lies outside of 0 to 1"):
        generate(slide, model, cells=cells, dose=[0, -1])


def test_sources_with_another_stain_than_in_training_are_a_warning(slide, model):
    """As between acini, whose stain lies in the crops of other cells. The whole image is not brighter, which is another check."""
    assert set(model.card["source_stains"]) == {"A -> B", "A -> A"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(slide, model, dose=0)
    other = tissue(1)
    image = other["fluorescence"]
    image.loc[{"c": "rna"}] = 2 * image.sel(c="rna").clip(max=120)
    with pytest.warns(UserWarning, match="brighter in 'rna' than 95% of those in training"):
        generate(other, model, dose=0)


def test_doses_lead_from_the_cell_itself_to_the_state(slide, model):
    made = generate(slide, model, dose=[1, 0, 0.5])
    none = made.obs["dose"] == 0
    np.testing.assert_array_equal(made.obsm["image"][none], made.obsm["source"][none])
    area = means(made)
    assert area[0] < area[0.5] < area[1] and area[1] > 1.1 * area[0]  # nuclei of B are half again as large
    assert set(made.obs["transition"]) == {"A -> B"} and made.obs["confidence"].between(0, 1).all()


def test_pixels_brighter_than_a_model_sees_are_kept(slide, model):
    other = tissue(1)
    image = other["fluorescence"]
    image.loc[{"x": image["x"][np.arange(image.sizes["x"]) % 20 < 6]}] = 250  # stripes
    made = generate(
        other, model, dose=[0, 1], cells=list(slide["table"].obs_names[slide["table"].obs["state"] == "A"][:20])
    )
    crops = sf.pp.crops(other, crop_um=model.config.crop_um, crop_pixels=model.config.crop_pixels, **IMAGE)
    rows = other["table"].obs_names.get_indexer(made.obs["source_cell"][::2])
    order = [list(crops.channels).index(name) for name in made.uns["morphology"]["channels"]]
    pixels = crops.read(rows).numpy()[:, order]
    low, high = np.array([*made.uns["morphology"]["intensity"].values()]).T
    assert (pixels.max((0, 2, 3)) > low + 2 * (high - low)).any()  # else this tests nothing
    np.testing.assert_array_equal(made.obsm["image"][::2], pixels)


def test_samples_begin_without_noise(slide, model):
    cells = list(slide["table"].obs_names[slide["table"].obs["state"] == "A"][:5])
    one, three = (generate(slide, model, cells=cells, n_samples=n) for n in (1, 3))
    images = three.obsm["image"].reshape(5, 3, *one.obsm["image"].shape[1:])
    np.testing.assert_array_equal(images[:, 0], one.obsm["image"])
    assert all(not np.array_equal(images[:, 0], images[:, i]) for i in (1, 2))
    assert list(three.obs["sample"][:4]) == [0, 1, 2, 0] and three.obs_names.is_unique


def test_cells_are_edited_alike_in_any_order_and_batch(slide, model, monkeypatch):
    whole = generate(slide, model, n_samples=2)
    table = slide["table"]
    turned = sf.datasets.simulated_tissue(1200, seed=1)
    turned["table"] = table[np.random.default_rng(0).permutation(table.n_obs)].copy()
    monkeypatch.setattr("spatiaflow.tl._generation.BATCH", 7)
    other = generate(turned, model, n_samples=2)
    difference = whole.obsm["image"].astype(int) - other[whole.obs_names].obsm["image"]
    assert np.abs(difference).max() <= 1  # rounding


def test_the_same_seed_gives_the_same_model(slide, tmp_path):
    model, again = (train(slide, steps=(30, 15), max_epochs=1) for _ in range(2))
    assert again.sha256 == model.sha256 and again.config == model.config
    loaded = sf.models.load(model.save(tmp_path / "m"))
    one, other = (generate(slide, m).obsm["image"] for m in (model, loaded))
    np.testing.assert_array_equal(one, other)


def test_a_killed_training_resumes_to_the_same_model(slide, tmp_path):
    short = {"steps": (30, 15), "max_epochs": 1, "checkpoint_dir": tmp_path}
    whole = train(slide, **short)
    again = train(slide, **short, resume=True)
    assert again.sha256 == whole.sha256
    with pytest.raises(ValueError, match="holds another run: it differs in seed"):
        train(slide, **short, resume=True, random_state=5)


def test_genes_that_a_slide_lacks_count_as_average(slide, model):
    other = sf.datasets.simulated_tissue(1200, seed=1)
    table = other["table"]
    few = table[:, list(table.var_names[5:])].copy()
    other["table"] = few
    cells = list(table.obs_names[:3])
    with pytest.warns(UserWarning, match="lacks 5 of the model's 60 genes"):
        generate(other, model, shift={table.var_names[20]: 1.0}, cells=cells)
    other["table"] = table[:, list(table.var_names[40:])].copy()
    with pytest.raises(ValueError, match="has 20 of the model's 60 genes; it needs half"):
        generate(other, model, shift={table.var_names[50]: 1.0}, cells=cells)


def test_what_an_edit_is_must_be_said(slide, model):
    for bad, match in (
        ({"source": "A", "target": None}, "give source= and target="),
        ({"source": "A", "target": "B", "shift": {"STATE1": 1}}, "give source= and target="),
        ({"target": "B"}, "give source= and target="),
        ({"source": "B", "target": "A"}, "does not know 'B -> A'; it knows"),
        ({"shift": {}}, "shift must be a dict"), ({"shift": {"STATE1": np.nan}}, "shift must be a dict"),
        ({"shift": {"STATE1": 1}, "dose": []}, "dose must be a number"), ({"shift": {"STATE1": 1}, "dose": "1"}, "dose must"),
        ({"shift": {"STATE1": 1}, "dose": [1, 1]}, "different ones"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            generate(slide, model, **bad)
    with pytest.raises(KeyError, match="the model knows no gene 'STATE9'; it knows STATE"):
        generate(slide, model, shift={"STATE9": 1.0})
    with pytest.raises(ValueError, match="model of pairs is trained on"):
        tiles = sf.datasets.simulated_tissue(1200, seed=1)
        sf.pp.tiles(tiles, tile_um=40, groupby="state", key_added="tiles")
        sf.tl.pair_transitions(tiles, transitions=[("A", "B")], groupby="state", table_key="tiles")
        train(tiles, table_key="tiles")


def test_edits_are_kept_in_a_spatialdata(slide, model, tmp_path):
    cells = list(slide["table"].obs_names[slide["table"].obs["state"] == "A"][:4])
    made = generate(slide, model, cells=cells, dose=[0.5, 1], key_added="edited")
    assert slide["edited"].n_obs == 8 and list(slide["edited"].obs["dose"][:2]) == [0.5, 1]
    made.write_h5ad(tmp_path / "made.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "made.h5ad").obsm["image"], made.obsm["image"])


def test_bundled_weights_edit_cells_of_the_public_region(mirror):
    """By default with ``shift``: cells with more of a gene of ducts take on their stains, by dose, and stay at a dose of 0."""
    with sf.settings.override(mirror=str(mirror)):
        sdata = sf.datasets.xenium_pancreas()
    table = sdata["table"]
    known = sf.models.load(sf.datasets.weights("morphology-pancreas-genes"))
    assert all(box["box_um"][2] < 19_000 * 0.2125 for box in known.card["data"].values())  # the rest is for tests
    states = np.array(known.states(table.X[:, table.var_names.get_indexer(known.states.genes)]), dtype=str)
    cells = list(table.obs_names[states == "SFRP4/LTBP2"][:30])
    made = sf.tl.generate_morphology(sdata, source="SFRP4/LTBP2", shift={"CFTR": 1.0}, dose=[0, 0.5, 1], cells=cells)
    assert made.n_obs == 90 and made.uns["morphology"]["params"]["edit"] == "linear"
    none = made.obs["dose"] == 0
    np.testing.assert_array_equal(made.obsm["image"][none], made.obsm["source"][none])
    bound = means(made, "bound_mean")
    assert bound[0] < bound[0.5] < bound[1]


def test_counts_of_a_layer_are_read(slide, model):
    other = sf.datasets.simulated_tissue(1200, seed=1)
    table = other["table"]
    expected = generate(slide, model, cells=list(table.obs_names[:40][table.obs["state"][:40] == "A"]))
    cells = list(expected.obs["source_cell"])
    table.layers["raw"], table.X = table.X.copy(), table.X.log1p()
    with pytest.raises(ValueError, match="give layer='counts'"):
        generate(other, model, cells=cells)
    found = generate(other, model, cells=cells, layer="raw")
    np.testing.assert_array_equal(found.obsm["image"], expected.obsm["image"])


def test_niches_of_another_run_are_refused(slide, model):
    one, other = tissue(1), tissue(2)
    for sdata in (one, other):
        sf.tl.cluster_niches(sdata, n_clusters=3)
        sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    with pytest.raises(ValueError, match=r"obs\['niche'\] of objects '0' and '1' comes from separate runs"):
        train([one, other])
    card = model.card
    model.card = card | {"clustering_sha256": {"niche": one["table"].uns["niche"]["params"]["clustering_sha256"]}}
    try:
        with pytest.raises(ValueError, match=r"obs\['niche'\] comes from another run"):
            generate(other, model, n_steps=1)
        sf.tl.cluster_niches(other, model=one)
        assert len(generate(other, model, n_steps=1)) > 0
    finally:
        model.card = card


def test_the_card_says_which_run_found_the_niches(slide):
    sdata = tissue(1)
    assert train(sdata, steps=(4, 2), max_epochs=1).card["clustering_sha256"] == {}
    sf.tl.cluster_niches(sdata, n_clusters=3)
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", niche_key="niche")
    found = train(sdata, steps=(4, 2), max_epochs=1).card["clustering_sha256"]
    assert found == {"niche": sdata["table"].uns["niche"]["params"]["clustering_sha256"]}


def test_genes_that_differ_by_case_and_masks_have_a_hint(slide, model):
    gene = model.genes[0]
    with pytest.raises(KeyError, match=f"it knows .*{gene}"):
        generate(slide, model, shift={gene.lower(): 1.0})
    with pytest.raises(
        ValueError, match=r"cells must be names, not a mask of bool. Give cells=table.obs_names\[mask\]"
    ):
        generate(slide, model, cells=np.ones(slide["table"].n_obs, bool))
