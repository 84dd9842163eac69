import anndata as ad
import numpy as np
import pytest

from spatiaflow.tl import _embedding

HOW = {"model_sha256": "abc", "modalities": ["image", "genes"], "scaling": "slide", "levels": ["cell", "niche"]}
KNOWN = {
    "embedding_sha256": "abc", "embedding_modalities": ["genes", "image"], "embedding_scaling": "slide",
}  # fmt: skip


def table(width=3, slot="E", **changed):
    """Four rows with an embedding, and how it was made."""
    out = ad.AnnData(obsm={slot: np.arange(4 * width).reshape(4, width) / 7, f"{slot}_niche": np.ones((4, 2))})
    out.uns[slot] = {"params": HOW | changed}
    return out


@pytest.mark.parametrize("slot", ["E", "E_niche"])
def test_how_an_embedding_was_made_is_known_of_every_level(slot):
    assert _embedding.made_by(table(), slot) == KNOWN


def test_how_an_embedding_was_made_is_unknown_without_a_record():
    one = table()
    for slot in ("F", "Ex", "E_niche"):
        if slot == "E_niche":
            del one.uns["E"]
        assert not any(_embedding.made_by(one, slot).values())


def test_the_longest_name_is_that_of_the_embedding():
    one = table()
    one.obsm["E_mine"], one.uns["E_mine"] = one.obsm["E"], {"params": {"model_sha256": "other"}}
    assert _embedding.made_by(one, "E_mine")["embedding_sha256"] == "other"
    assert _embedding.made_by(one, "E_mine_cell")["embedding_sha256"] == "other"
    assert _embedding.made_by(one, "E_niche")["embedding_sha256"] == "abc"


def test_embeddings_are_pooled_in_the_order_of_the_tables():
    first, second = table(), table()
    second.obsm["E"] = second.obsm["E"] + 1
    np.testing.assert_allclose(
        _embedding.pooled([second, first], "E"), np.r_[second.obsm["E"], first.obsm["E"]], rtol=1e-6
    )
    del second.uns["E"]  # nothing is known of it
    assert _embedding.pooled([first, second], "E").shape == (8, 3)


@pytest.mark.parametrize(
    "changed", [{"model_sha256": "x"}, {"modalities": ["genes"]}, {"scaling": "training"}, {"levels": ["cell"]}]
)
def test_embeddings_that_were_made_in_different_ways_are_refused(changed):
    with pytest.raises(ValueError, match="the objects of data was made by different models, or of other levels"):
        _embedding.pooled([table(), table(**changed)], "E")
    if "levels" in changed:  # one level is the same, whatever stood beside it
        assert _embedding.pooled([table(), table(**changed)], "E_niche").shape == (8, 2)


def test_embeddings_of_different_width_are_refused():
    with pytest.raises(ValueError, match="has 3 and 2 columns; embed all alike"):
        _embedding.pooled([table(3), table(2)], "E")


def test_a_missing_embedding_names_the_verb_that_writes_it():
    with pytest.raises(KeyError, match="embed_spatia"):
        _embedding.embedding(table(), "F")
