"""Encoders of one cell, against attention and masking written out; and a published ViT-MAE."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from spatiaflow.models.encoders._cell import GeneEncoder, ImageEncoder, published_mae, stem
from spatiaflow.models.spatia import SpatiaConfig

SIZES = {"crop_pixels": 16, "patch_pixels": 8, "width": 32, "image_layers": 2, "gene_layers": 1}
CONFIG = SpatiaConfig(genes=[f"g{i}" for i in range(20)], channels=["a", "b", "c"], **SIZES)


def away_from_the_start(encoder):
    """Small weights would hide differences."""
    for p in encoder.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return encoder.eval()


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    return away_from_the_start(ImageEncoder(CONFIG))


@pytest.fixture(scope="module")
def gene():
    torch.manual_seed(0)
    return away_from_the_start(GeneEncoder(CONFIG))


@pytest.fixture
def crops():
    return torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_genes_equal_attention_over_written_out_tokens(gene):
    """The factored cross-attention against torch's own attention over one token a gene and cell."""
    g = torch.Generator().manual_seed(2)
    values, measured = torch.rand(5, 20, generator=g), torch.rand(5, 20, generator=g) < 0.7
    size = torch.rand(5, generator=g)
    tokens = gene.identity + values[..., None] * gene.direction  # cells x genes x d
    h = gene.n_heads
    q = gene.queries.view(1, -1, h, 8).transpose(1, 2).expand(5, -1, -1, -1)
    k, v = (f(tokens).view(5, 20, h, 8).transpose(1, 2) for f in (gene.key, gene.value))
    mask = measured[:, None, None].expand(-1, h, q.shape[2], -1)
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    gathered = gene.gathered_norm(seen.transpose(1, 2).reshape(5, -1, 32))
    out = gene.queries + gene.out(gathered) + gene.size(size[:, None])[:, None]
    slow = gene.layers(gene.norm(out))
    torch.testing.assert_close(gene(values, measured, size), slow, atol=1e-5, rtol=0)


def test_genes_that_are_not_measured_leave_no_trace(gene):
    values, measured = torch.rand(4, 20), torch.rand(4, 20) < 0.5
    garbage = torch.where(measured, values, torch.full_like(values, 99.0))
    torch.testing.assert_close(gene(garbage, measured, values[:, 0]), gene(values, measured, values[:, 0]))


def test_no_measured_gene_is_finite(gene):
    assert torch.isfinite(gene(torch.zeros(2, 20), torch.zeros(1, 20, dtype=torch.bool), torch.zeros(2))).all()


def test_image_tokens_are_not_masked_and_not_random(image, crops):
    with torch.inference_mode():
        tokens = image(crops)
        image.reconstruction(crops)  # masks, in training
        assert torch.equal(image(crops), tokens)
        changed = crops.clone()
        changed[:, :, :8, :8] = 0  # every patch is seen: each one moves the result
        assert not torch.allclose(image(changed), tokens)
    assert tokens.shape == (12, 5, 32)


def test_a_missing_channel_leaves_no_trace(image, crops):
    present = torch.tensor([True, False, True]).expand(12, -1)
    garbage = crops.clone()
    garbage[:, 1] = 7.0
    with torch.inference_mode():
        torch.testing.assert_close(image(garbage, present), image(crops, present))
        torch.manual_seed(3)
        one = image.reconstruction(crops, present)
        torch.manual_seed(3)
        torch.testing.assert_close(image.reconstruction(garbage, present), one)


def test_reconstruction_is_the_error_of_the_patches_that_were_hidden(crops):
    """Against a loop over cells, patches and channels, with the linear patch embedding of the published ViT-MAE."""
    torch.manual_seed(0)
    crops, encoder = crops[:3], ImageEncoder(SpatiaConfig([], ["a", "b", "c"], stem_width=0, **SIZES)).eval()
    with torch.inference_mode():
        torch.manual_seed(4)
        found = float(encoder.reconstruction(crops))
        torch.manual_seed(4)
        x = encoder.fill(crops, None)
        seen = encoder.mae.vit(x)
        predicted = encoder.mae.decoder(seen.last_hidden_state, seen.ids_restore).logits.view(3, 4, 8, 8, 3)
        errors = []
        for n in range(3):
            for p in range(4):
                if seen.mask[n, p]:
                    for c in range(3):
                        patch = x[n, c, 8 * (p // 2) : 8 * (p // 2) + 8, 8 * (p % 2) : 8 * (p % 2) + 8]
                        target = (patch - patch.mean()) / torch.sqrt(patch.var() + 1e-2)
                        errors.append(float(((predicted[n, p, :, :, c] - target) ** 2).mean()))
    assert len(errors) == 18  # two of four patches
    assert found == pytest.approx(np.mean(errors), rel=1e-5)


def test_what_is_hidden_leaves_no_trace_in_its_reconstruction(image, crops):
    """Convolutions see beyond a patch; the gradient at hidden pixels must come through the target alone."""
    crops = crops.requires_grad_()
    seen = {}
    handle = image.mae.decoder.register_forward_hook(lambda _, __, out: seen.update(logits=out.logits))
    torch.manual_seed(5)
    image.reconstruction(crops)
    handle.remove()
    torch.manual_seed(5)
    kept = torch.rand(12, 4).argsort(1).argsort(1) < 2
    (gradient,) = torch.autograd.grad(seen["logits"].square().sum(), crops)
    of_patch = gradient.abs().amax(1).view(12, 2, 8, 2, 8).amax((2, 4)).view(12, 4)
    assert (of_patch[~kept] == 0).all() and (of_patch[kept] > 0).all()
    statistics = [m.running_mean.clone() for m in image.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    image.train()
    image.reconstruction(crops)
    image.eval()
    after = [m.running_mean for m in image.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert statistics and all(torch.equal(a, b) for a, b in zip(statistics, after))


@pytest.mark.parametrize("stem_width", [0, 8])
def test_patches_of_wider_crops_are_tokens_beside_those_of_the_cell(crops, stem_width):
    torch.manual_seed(0)
    config = replace(CONFIG, wide=3.0, stem_width=stem_width)
    image = away_from_the_start(ImageEncoder(config))
    both = torch.cat([crops, crops.flip(0)], 1)
    vit = image.mae.vit
    with torch.no_grad():
        tokens = image(both)
        assert tokens.shape == (12, 1 + 4 + 4, 32)
        image.mae.config.mask_ratio = 0.0  # by hand: all tokens through the layers of the transformer
        x = vit.embeddings(2 * both[:, :3] - 1, noise=image.order.expand(12, -1))[0]
        wider = image.around(2 * both[:, 3:] - 1).flatten(2).transpose(1, 2) + image.around_place
        x = torch.cat([x, wider], 1)
        for layer in vit.layers if hasattr(vit, "layers") else vit.encoder.layer:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(tokens, vit.layernorm(x))
        assert not torch.allclose(tokens, image(torch.cat([crops, crops], 1)), atol=1e-3)
        present = torch.tensor([[True, False, True]]).expand(
            12, -1
        )  # a missing channel leaves no trace at either scale
        other = both.clone()
        other[:, [1, 4]] = torch.rand(12, 2, 16, 16)
        assert torch.equal(image(both, present), image(other, present))


def test_a_stem_gives_one_vector_a_patch():
    """Its place is that of the patch: what changes far from a patch does not reach its vector."""
    torch.manual_seed(0)
    layers = stem(3, 4, 32, 8).eval()
    crops = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = layers(crops)
        assert found.shape == (2, 32, 6, 6)
        crops[:, :, :8, :8] += 1
        changed = (layers(crops) - found).abs().amax((0, 1))
    assert changed[0, 0] > 0 and (changed[4:] == 0).all() and (changed[:, 4:] == 0).all()


@pytest.fixture
def published(tmp_path):
    """A small ViT-MAE in a folder."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).eval()
    model.save_pretrained(tmp_path / "mae")
    return model, tmp_path / "mae"


def test_a_published_vit_mae_sees_crops_as_its_own_pictures(published):
    """With channels passed on as they are, tokens are those of the published model of the crop in its size."""
    model, folder = published
    config, weights = published_mae(str(folder))
    encoder = ImageEncoder(SpatiaConfig([], ["a", "b", "c"], backbone=config, width=16, crop_pixels=16)).eval()
    encoder.mae.load_state_dict(weights)
    torch.nn.init.eye_(encoder.narrow.weight)
    torch.nn.init.zeros_(encoder.narrow.bias)
    encoder.mix.weight.data[:] = torch.eye(3)[..., None, None]
    torch.nn.init.zeros_(encoder.mix.bias)
    crops = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pictures = torch.nn.functional.interpolate(
        2 * crops - 1, (32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    model.config.mask_ratio = 0.0
    noise = torch.arange(16.0).expand(4, -1)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(crops), model.vit(pictures, noise=noise).last_hidden_state)


def test_a_vit_mae_without_its_decoder_and_one_that_is_not_there_are_refused(published, tmp_path):
    model, _ = published
    model.vit.save_pretrained(tmp_path / "half")
    with pytest.raises(OSError, match="lacks tensors of a ViT-MAE, first 'decoder"):
        published_mae(str(tmp_path / "half"))
    with pytest.raises(OSError, match="the ViT-MAE .* could not be loaded"):
        published_mae(str(tmp_path / "nothing"))


def test_code_of_a_vit_mae_is_not_run(published, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether it may
    _, folder = published
    marker = folder / "the code ran"
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import ViTMAEConfig as Config, ViTMAEForPreTraining as Model\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="asks to run code of its own"):
        published_mae(str(folder))
    assert not marker.exists()
