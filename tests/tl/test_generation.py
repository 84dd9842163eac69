import warnings

import numpy as np
import pandas as pd
import pytest
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import spatiaflow as sf
from _morphology import IMAGE, generate, paired_slide, tissue, train, trained


@pytest.fixture(scope="module")
def slide():
    return paired_slide()


@pytest.fixture(scope="module")
def model():
    return trained()


def test_an_image_of_more_bits_than_the_training_slides_is_a_warning(model):
    """Read by the scale of 8 bits, crops of 16 bits are white all over: nothing else would tell."""
    sdata = tissue(1)
    image = sdata["fluorescence"]
    pixels = Image2DModel.parse(
        image.to_numpy().astype(np.uint16) * 100, dims=("c", "y", "x"), c_coords=list(image.c.values),
        transformations=get_transformation(image, get_all=True),
    )  # fmt: skip
    cells = list(sdata["table"].obs_names[sdata["table"].obs["state"] == "A"][:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(sdata, model, cells=cells, n_steps=1)
    sdata["fluorescence"] = pixels
    with pytest.warns(UserWarning, match="bright end of channel .* come out white or black"):
        generate(sdata, model, cells=cells, n_steps=1)


def test_generated_cells(slide, model, tmp_path):
    table = slide["table"]
    made = generate(slide, model, n_samples=2, n_steps=2)
    sources = table.obs_names[table.obs["state"] == "A"]
    assert list(made.obs["source_cell"][::2]) == list(sources) and made.obs_names.is_unique
    images = made.obsm["image"]
    assert images.dtype == np.uint8 and images.shape == (2 * len(sources), 4, 16, 16)
    assert not np.array_equal(images[0], images[1])  # samples differ
    np.testing.assert_allclose(made.X, sf.pp.image_profile(made).to_numpy(np.float32))
    np.testing.assert_allclose(made.obsm["spatial"][::2], table.obsm["spatial"][table.obs["state"] == "A"], atol=1.0)
    assert (made.obs["niche"][::2].to_numpy() == table.obs.loc[sources, "niche"].astype(str).to_numpy()).all()
    # untrained to this degree, an image still resembles the cell that it starts from
    crops = (
        sf.pp.crops(slide, crop_um=16.0, crop_pixels=16, **IMAGE)
        .read(np.flatnonzero(table.obs["state"] == "A"))
        .numpy()
    )
    same = np.mean([np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1] for a, b in zip(images[::2], crops)])
    other = np.mean([np.corrcoef(a[0].ravel(), b[0].ravel())[0, 1] for a, b in zip(images[::2], crops[1:])])
    assert same > other + 0.2
    np.testing.assert_allclose(made.obsm["source"][::2].astype(float), crops.astype(float), atol=1)
    whole = generate(slide, model, n_steps=2, dose=[0, 0.5, 1], n_samples=2)
    assert whole.n_obs == 6 * len(sources) and list(whole.obs["dose"][:6]) == [0, 0, 0.5, 0.5, 1, 1]
    np.testing.assert_array_equal(whole.obsm["image"][whole.obs["dose"] == 1], images)
    whole.write_h5ad(tmp_path / "made.h5ad")


def test_channels_go_by_the_names_of_the_image(slide, model):
    """So that what is generated compares with what ``pp.image_profile`` measures of real crops."""
    named = tissue(1)
    named["fluorescence"] = named["fluorescence"].assign_coords(c=["DAPI", "bound", "RNA", "prot"])
    made = generate(named, model, n_steps=1)
    crops = sf.pp.crops(named, crop_um=16.0, crop_pixels=16, **IMAGE)
    assert list(made.var_names) == list(sf.pp.image_profile(crops.take([0, 1])).columns)
    assert made.uns["morphology"]["channels"] == ["DAPI", "bound", "RNA", "prot"]
    assert set(made.uns["morphology"]["intensity"]) == {"DAPI", "bound", "RNA", "prot"}
    np.testing.assert_array_equal(made.X, generate(slide, model, n_steps=1).X)


def test_generated_cells_stay_in_place_in_a_spatialdata(slide, model, tmp_path):
    import spatialdata as sd

    copy = sd.SpatialData(
        images={**slide.images}, shapes={**slide.shapes}, tables={"table": slide["table"]}, attrs=slide.attrs
    )
    made = generate(copy, model, n_steps=1, key_added="as_b", n_samples=2)
    box = {"min_coordinate": [0, 0], "max_coordinate": [80, 120]}
    found = copy.query.bounding_box(axes=("x", "y"), **box, target_coordinate_system="global")["as_b"]
    xy = made.obsm["spatial"]
    assert set(found.obs_names) == set(made.obs_names[(xy[:, 0] < 80) & (xy[:, 1] < 120)]) and found.n_obs > 4
    copy.write(tmp_path / "a.zarr")
    np.testing.assert_array_equal(sd.read_zarr(tmp_path / "a.zarr")["as_b"].obsm["image"], made.obsm["image"])


def test_noise_belongs_to_the_cell(slide, model, monkeypatch):
    whole = generate(slide, model, n_steps=2)
    monkeypatch.setattr("spatiaflow.tl._generation.BATCH", 7)
    again = generate(slide, model, n_steps=2)
    difference = np.abs(whole.obsm["image"].astype(int) - again.obsm["image"].astype(int))
    assert difference.max() <= 1  # rounding
    some = whole.obs["source_cell"].iloc[[5, 2]].tolist()
    few = generate(slide, model, n_steps=2, cells=some)
    assert few.obs["source_cell"].tolist() == some
    difference = np.abs(few.obsm["image"].astype(int) - whole.obsm["image"][[5, 2]].astype(int))
    assert difference.max() <= 1
    assert not np.array_equal(generate(slide, model, n_steps=2, random_state=1).obsm["image"], whole.obsm["image"])


def test_bad_input(slide, model):
    with pytest.raises(ValueError, match="does not know 'B -> A'; it knows"):
        generate(slide, model, source="B", target="A")
    with pytest.raises(ValueError, match="dose=0.3 is no step of a model of pairs; with n_steps=2 it takes 0, 0.5"):
        generate(slide, model, dose=0.3, n_steps=2)
    with pytest.raises(ValueError, match="shift= needs a model of genes"):
        generate(slide, model, target=None, shift={"STATE1": 1.0})
    with pytest.raises(KeyError, match="obs_names has no 'nobody'"):
        generate(slide, model, cells=["nobody"])
    stranger = slide["table"].obs_names[slide["table"].obs["state"] == "B"][0]
    with pytest.raises(ValueError, match="is no cell of state 'A'"):
        generate(slide, model, cells=[stranger])
    with pytest.raises(ValueError, match="the image has channels r, g, b; the model generates"):
        generate(slide, model, image_key="he")
    with pytest.raises(TypeError, match="model must be a MorphologyFlow; this is a Spatia"):
        generate(slide, sf.datasets.weights("spatia-pancreas-small"))
    with pytest.raises(ValueError, match="cells names .cell_1. twice"):
        generate(slide, model, cells=["cell_1", "cell_1"])
    with pytest.raises(ValueError, match="another element called 'table'"):
        generate(slide, model, key_added="table", n_steps=1)
    with pytest.raises(ValueError, match="another element called 'nuclei'"):
        generate(slide, model, key_added="nuclei", n_steps=1)
    other = tissue(1)
    for level in ("cell", "niche", "tissue"):
        other["table"].obsm[f"E_{level}"] = other["table"].obsm[f"E_{level}"][:, :5]
    with pytest.raises(ValueError, match="made by another model"):
        generate(other, model)


def test_states_by_the_rule_of_the_model(slide, model, tmp_path):
    """Where no column names states, the model's own rule does: largest of a linear function of log counts."""
    table = slide["table"]
    most = np.argsort(-np.asarray(table.X.sum(0)).ravel())
    genes = list(table.var_names[most[[5, 2, 9]]])
    few = int(np.quantile(np.asarray(table[:, genes].X.sum(1)), 0.1)) + 1
    rule = sf.models.States(
        ["A", "B"], genes, [[1.0, -1.0, 0.2], [-1.0, 1.0, 0.1]], [0.1, -0.1], unit=10.0, min_counts=few
    )
    expected = []
    for counts in table[:, genes].X.toarray():
        log = np.log1p(counts * 10 / max(counts.sum(), 1))
        score = [sum(w * v for w, v in zip(row, log)) + b for row, b in zip(rule.weight, rule.offset)]
        expected.append(rule.names[int(np.argmax(score))] if counts.sum() >= few else None)
    assert rule(table[:, genes].X.tocsr()) == expected and {*expected} == {"A", "B", None}
    model.states = rule
    path = model.save(tmp_path / "with_rule")
    loaded = sf.models.load(path)
    model.states = None
    assert loaded.states == rule
    nameless = sf.datasets.simulated_tissue(400, seed=1)
    nameless["table"].obsm.update({k: v for k, v in table.obsm.items() if k.startswith("E_")})
    del nameless["table"].obs["state"]
    made = generate(nameless, loaded, n_steps=1)
    assert list(made.obs["source_cell"]) == [n for n, e in zip(table.obs_names, expected) if e == "A"]
    with pytest.raises(KeyError, match="state"):
        generate(nameless, model, n_steps=1)
    nameless["table"] = nameless["table"][:, nameless["table"].var_names != genes[0]].copy()
    with pytest.raises(
        KeyError, match=rf"needs 1 genes that var_names lack, such as {genes[0]}. Write .* obs\['state'\]"
    ):
        generate(nameless, loaded, n_steps=1)


def test_a_niche_that_training_did_not_see_is_named(slide, model):
    other = tissue(1)
    obs = other["table"].obs
    obs["niche"] = obs["niche"].astype(str).replace("immune", "marsh")
    with pytest.warns(UserWarning, match="in obs.'niche'. 'marsh': the mean shift"):
        generate(other, model, n_steps=1)


def test_sources_without_a_niche_and_cells_without_a_state(slide, model):
    other = tissue(1)
    obs = other["table"].obs
    chosen = list(obs.index[obs["state"] == "A"][:3])
    obs["niche"] = obs["niche"].astype(object).mask(obs.index == chosen[1], None)
    obs.loc[obs.index == chosen[2], "niche"] = "marsh"
    with (
        pytest.warns(UserWarning, match="1 source cells have no niche"),
        pytest.warns(UserWarning, match="niche'. 'marsh'"),
    ):
        made = generate(other, model, n_steps=1, cells=chosen)
    assert list(made.obs["niche"]) == [obs["niche"].iloc[obs.index.get_loc(chosen[0])], "", "marsh"]
    obs["state"] = obs["state"].astype(object).where(obs["state"] == "B", None)
    with pytest.raises(ValueError, match="no cell of .* is 'A'; there are 'B'"):
        generate(other, model)


@pytest.mark.slow
def test_tiles(slide, tmp_path):
    """Tiles go the same way: from pictures of 40 um with some of A to such with some of B."""
    sdata = tissue(4, 1500)
    sf.pp.morphology_profile(sdata, **IMAGE)
    pool = ["E_cell", "E_niche", "E_tissue", "morphology"]
    tiles = sf.pp.tiles(sdata, tile_um=40, groupby="state", pool=pool, key_added="tiles")
    options = {"table_key": "tiles"}
    sf.tl.pair_transitions(sdata, transitions=[("A", "B")], groupby="state", **options)
    model = train(sdata, config={"crop_um": 40.0, "losses": {"contrast": 0}}, **options)
    assert model.card["level"] == "niche"
    made = generate(sdata, model, n_steps=1, key_added="made", **options)
    share = tiles.to_df().assign(**dict(zip(tiles.uns["tiles"]["state"], tiles.obsm["state"].T)))
    height, width = np.array(sdata["fluorescence"].shape[1:]) * 0.5  # um: a tile's middle must lie in the image
    inside = (tiles.obsm["spatial"] < [width, height]).all(1)
    sources = share.index[(share["A"] >= 0.05) & (share["B"] < 0.05) & inside]
    assert list(made.obs["source_cell"]) == list(sources) and 0 < len(sources) < tiles.n_obs
    assert list(made.var_names[:3]) == ["nuclei_per_mm2", "nuclear_share", "mean_area_um2"]
    assert sdata["made"].n_obs == len(sources)
    with pytest.raises(ValueError, match="the table 'table' holds cells; the model was trained on tiles"):
        generate(sdata, model)


def test_bundled_weights_enlarge_and_stretch_nuclei_as_planted():
    sdata, image = sf.datasets.simulated_tissue(700, seed=77), {"image_key": "fluorescence"}
    sf.tl.embed_spatia(sdata, modalities="image", **image)
    file = sf.datasets.weights("morphology-simulated-small")
    assert file.with_suffix(".md").read_text(encoding="utf-8").startswith("# morphology-simulated-small")
    made = sf.tl.generate_morphology(sdata, source="A", target="B", model=file, random_state=0, **image)
    crops, state = sf.pp.crops(sdata, crop_um=16, crop_pixels=32, **image), sdata["table"].obs["state"]
    images = {s: crops.read(np.flatnonzero(state == s)).numpy() for s in "AB"}

    def measured(profile):
        return pd.Series({
            "area": profile["area_um2"].mean(), "elongation": (profile["major_axis_um"] / profile["minor_axis_um"]).mean(),
        })  # fmt: skip

    a, b = (measured(sf.pp.image_profile(images[s], channels=crops.channels, mpp=0.5)) for s in "AB")
    share = (measured(made.to_df()) - a) / (b - a)
    assert share.between(0.6, 1.4).all(), share


def test_bundled_weights_generate_cells_of_the_public_region(mirror):
    """With the weights of pairs, by the model's own rule for states: who is to stay as it is, stays."""
    with sf.settings.override(mirror=str(mirror)):
        sdata = sf.datasets.xenium_pancreas()
    table, state = sdata["table"], "COL5A2/THBS2"
    model = sf.models.load(sf.datasets.weights("morphology-pancreas-small"))
    assert all(box["box_um"][2] < 16500 * 0.2125 for box in model.card["data"].values())  # the rest is for tests
    states = model.states(table.X[:, table.var_names.get_indexer(model.states.genes)])
    sdata["table"] = table[(np.array(states) == state) | (np.arange(table.n_obs) % 25 == 0)].copy()
    sf.tl.embed_spatia(sdata)
    made = sf.tl.generate_morphology(sdata, source=state, target=state, model=model, random_state=0)
    assert made.n_obs > 50 and made.obsm["image"].dtype == np.uint8
    about = made.uns["morphology"]
    before = sf.pp.image_profile(np.asarray(made.obsm["source"]), channels=about["channels"], mpp=about["mpp"])
    shift = (made.to_df() - before.set_index(made.obs_names)).mean() / before.std()
    # this region is dimmer in one stain than the training part, towards which cells are drawn
    assert shift[["area_um2", "dapi_mean", "bound_mean", "rna_mean", "prot_mean"]].abs().max() < 0.9, shift
    assert shift.abs().median() < 0.4, shift
    with pytest.raises(ValueError, match="the model does not know"):
        sf.tl.generate_morphology(sdata, source=state, target="MKI67/UBE2C", model=model)


def test_embeddings_made_in_another_way_are_refused():
    made, slides = {"model_sha256": "a", "levels": ["cell", "niche", "tissue"], "scaling": "training"}, []
    for seed, modalities in ((1, ["image"]), (2, ["genes", "image"])):
        slides.append(tissue(seed))
        sf.pp.morphology_profile(slides[-1], **IMAGE)
        sf.tl.pair_transitions(slides[-1], transitions=[("A", "B")], groupby="state", niche_key="niche")
        slides[-1]["table"].uns["E"] = {"params": made | {"modalities": modalities}}
    one, other = slides
    with pytest.raises(ValueError, match="was made by different models, or of other levels, modalities or scaling"):
        train([one, other])
    model = train(one, max_epochs=1)
    assert model.card["embedding_modalities"] == ["image"]
    with pytest.raises(ValueError, match="in another way"):
        generate(other, model)
    assert generate(one, model, n_steps=1).n_obs
