"""Trust reacts to the data: differences from the training data are warned of, with both figures."""

import warnings

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

import spatiaflow as sf
from spatiaflow.tl._trust import warn_of_difference


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"genes": (40, 377)}, "they have 40 of its 377 genes"),
        ({"channels": (2, 4)}, "they have 2 of its 4 channels"),
        ({"depth": (5.0, 27.0)}, "median of 5 counts per row, in training 27"),
        ({"depth": (120.0, 27.0)}, "median of 120 counts"),
        (
            {
                "stains": (
                    np.r_[np.full((5, 2), [0.2, 0.9]), np.full((7, 2), 0.2)],
                    {"dapi": [0, 0.2, 0.5], "rna": [0.1, 0.2, 0.5]},
                )
            },
            "images of 42% of the rows are brighter in 'rna' than 95% .*median 0.2, in training 0.2",
        ),
        (
            {"stains": (np.full((10, 1), 0.05), {"rna": [0.1, 0.2, 0.5]})},
            "100% of the rows are darker in 'rna' .*median 0.05, in training 0.2",
        ),
        ({"ood": np.r_[np.full(4, 0.99), np.full(6, 0.2), np.nan]}, "40% of the rows .* in training 5%"),
    ],
)
def test_every_difference_is_told_with_both_figures(found, said):
    with pytest.warns(UserWarning, match=said):
        warn_of_difference(**found)


def test_what_is_alike_or_not_known_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_of_difference(genes=(300, 377), channels=(3, 4), depth=(20.0, 27.0), ood=np.linspace(0, 1, 50))
        warn_of_difference(depth=(0.0, 27.0), ood=np.full(3, np.nan))
        known = {"dapi": [0.0, 0.2, 0.5], "rna": [0.1, 0.2, 0.5]}
        warn_of_difference(stains=(np.r_[np.full((3, 2), 0.9), np.full((7, 2), 0.2)], known))
        warn_of_difference(stains=(np.full((9, 2), 0.9), known))  # of few, a third may differ by chance
        warn_of_difference()


@pytest.fixture(scope="module")
def trained():
    """A small SPATIA, and a slide that it was not trained on."""
    slides = [sf.datasets.simulated_tissue(300, seed=seed) for seed in (1, 2, 3)]
    small = sf.models.SpatiaConfig(width=32, crop_pixels=16, batches_per_epoch=8)
    model = sf.tl.train_spatia(slides[:2], image_key="fluorescence", config=small, max_epochs=1, random_state=0)
    return model, slides[2]


def embedded(model, sdata, change=None, **options):
    out = sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence", levels="cell", copy=True, **options)
    return out["table"] if change is None else out


def test_the_score_of_cells_is_low_on_tissue_alike_and_high_on_other(trained, tmp_path):
    model, sdata = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        alike = embedded(model, sdata).obs["X_spatia_ood"]
    assert alike.between(0, 1).all()
    assert (alike > 0.95).mean() < 0.2
    permuted = sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence", copy=True)
    table = permuted["table"]
    table.var_names = np.random.default_rng(0).permutation(table.var_names)
    with pytest.warns(UserWarning, match="out-of-domain score above 0.95, in training 5%"):
        other = embedded(model, permuted, modalities="genes").obs["X_spatia_ood"]
    assert other.mean() > alike.mean() + 0.15
    again = sf.models.load(model.save(tmp_path / "model"))
    np.testing.assert_allclose(embedded(again, sdata).obs["X_spatia_ood"], alike, atol=0.02)
    assert again.sha256 == model.sha256


def test_without_statistics_there_is_no_score_and_a_line_says_so(trained, caplog):
    model, sdata = trained
    bare = sf.models.Spatia(network=model.network, target_sum=model.target_sum, history={}, card=model.card)
    assert bare.sha256 == model.sha256
    known = sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence", copy=True)
    sf._settings.logger.propagate = True
    try:
        with sf.settings.override(verbosity="info"):
            sf.tl.embed_spatia(known, model=bare, image_key="fluorescence")
    finally:
        sf._settings.logger.propagate = False
    assert "X_spatia_ood" not in known["table"].obs  # not that of the other model either
    assert "no statistics of its training cells" in caplog.text


def test_depth_and_panel_of_cells_are_compared(trained):
    model, sdata = trained
    thin = sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence", copy=True)
    counts = thin["table"].X.copy()
    counts.data = np.random.default_rng(0).binomial(counts.data.astype(int), 0.2).astype(np.float32)
    thin["table"].X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match=r"a median of [\d.]+ counts per row, in training \d+"):
        sf.tl.embed_spatia(thin, model=model, modalities="genes")
    few = sf.tl.embed_spatia(sdata, model=model, image_key="fluorescence", copy=True)
    few["table"] = few["table"][:, :20].copy()
    with pytest.warns(UserWarning, match="they have 20 of its 60 genes") as record:
        sf.tl.embed_spatia(few, model=model, modalities="genes")
    assert "counts per row" not in str([str(one.message) for one in record])  # of the genes that both have


def test_bundled_weights_know_how_far_cells_are(mirror):
    with sf.settings.override(mirror=str(mirror)):
        sdata = sf.datasets.xenium_pancreas()
    table = sdata["table"]
    x, y = np.asarray(table.obsm["spatial"]).T
    inside = (x < np.quantile(x, 0.3)) & (y < np.quantile(y, 0.3)) & (np.asarray(table.X.sum(1)).ravel() >= 15)
    sdata["table"] = table[inside].copy()
    sf.tl.embed_spatia(sdata, levels="cell")
    assert (sdata["table"].obs["X_spatia_ood"] > 0.95).mean() < 0.25


def test_foreign_features_warn_in_predictions(slide, model):
    far = slide("t", seed=7)
    far.obsm["X_texture"] = far.obsm["X_texture"] + 6
    with pytest.warns(UserWarning, match="out-of-domain score above 0.95"):
        sf.tl.predict_expression(far, model=model)
    far.obs["tissue"] = np.float32(0)  # glass is no news
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sf.tl.predict_expression(far, model=model)


def test_depth_and_panel_of_a_query_are_compared_in_imputation(slide):
    model = sf.tl.train_imputation([slide("a", seed=1), slide("b", seed=2)])
    query = slide("q", seed=3)[:, :5].copy()
    query.X = query.X * 9
    with pytest.warns(
        UserWarning, match=r"they have 5 of its 12 genes; a median of [\d.]+ counts per row, in training \d+"
    ):
        sf.tl.impute_genes(query, model=model)


@pytest.mark.parametrize(("score", "warns"), [(1.0, True), (0.5, False), (None, False)])
def test_sources_out_of_domain_warn_in_generation(score, warns):
    sdata = sf.datasets.simulated_tissue(150, seed=77)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sf.tl.embed_spatia(sdata, modalities="image", image_key="fluorescence")
    obs = sdata["table"].obs
    del obs["X_spatia_ood"]
    if score is not None:
        obs["X_spatia_ood"] = score
    options = {"model": "morphology-simulated-small", "image_key": "fluorescence", "n_steps": 1}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sf.tl.generate_morphology(sdata, source="A", target="B", **options)
    assert any("out-of-domain score" in str(one.message) for one in found) == warns


@pytest.fixture
def stained(tmp_path, slide):
    """Slides on pictures whose optical density is multiplied, with features."""

    def make(name, times=1.0, seed=0):
        pixels = np.random.default_rng(seed).normal([190, 110, 170], 30, (1250, 1250, 3)).clip(1, 255)
        pixels[:60] = 235
        path = tmp_path / f"{name}.png"
        Image.fromarray((255 * (pixels / 255) ** times).astype(np.uint8)).save(path)
        one = slide(name, seed=seed)
        one.obsm["spatial"] = one.obsm["spatial"] * 0.25 + 70
        one.uns["spatial"] = {name: {"metadata": {"microns_per_pixel": 2.0, "source_image_path": str(path)}}}
        sf.pp.encode_patches(one, patch_um=80)
        return one

    return make


def test_another_stain_is_one_warning_with_its_figures(stained, tmp_path):
    model = sf.tl.train_stflow([stained("a"), stained("b", seed=1)], genes=["G0", "G1"], max_epochs=1)
    again = sf.models.load(model.save(tmp_path / "model"))
    low, high = again.encoder["stain"]["hematoxylin"]
    assert 0 < low < high
    for times, warns in ((1.0, False), (1.6, True)):
        test = stained("c", times, seed=2)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            sf.tl.predict_expression(test, model=again)
        ours = [str(one.message) for one in found if "stain" in str(one.message)]
        assert len(ours) == warns
        if warns:
            median = test.uns["X_texture"]["stain"]["hematoxylin"][0, 1]
            assert f"a median of {median:.2f} of hematoxylin, in training {low:.2f} to {high:.2f}" in ours[0]
            assert "squidpy.experimental.im.normalize_stains" in ours[0]


def test_a_model_that_states_no_stain_is_silent(stained):
    train = [stained("a"), stained("b", seed=1)]
    for one in train:
        del one.uns["X_texture"]["stain"]
    model = sf.tl.train_stflow(train, genes=["G0", "G1"], max_epochs=1)
    assert "stain" not in model.encoder
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sf.tl.predict_expression(stained("c", 1.6), model=model)
    assert not [one for one in found if "normalize_stains" in str(one.message)]
