"""Encoders of one cell: a vision transformer over its image, a transformer over its genes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from spatiaflow.models.spatia import SpatiaConfig


class ImageEncoder(nn.Module):
    """ViT-MAE of transformers over crops with any number of channels, at one or two scales.

    Crops are n x C x p x p, where 0 is a channel's background and 1 its bright end. With ``wide`` they are n x 2C x p x p: the
    cell and, in wider crops, what is around it. Patches of both attend to one another. A channel that a slide lacks is filled
    with a learned value. With ``stem_width`` convolutions replace the linear patch embedding and learn more from few cells
    (Xiao et al. 2021, arXiv 2106.14881).
    """

    order: Tensor
    MASK_RATIO = 0.5  # of nine patches: fewer visible patches would not determine the others

    def __init__(self, c: SpatiaConfig):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config: Any
        self.mix: nn.Module
        self.narrow: nn.Module
        if c.backbone:  # a published model: channels are mixed into its own, crops resized, tokens narrowed
            config = ViTMAEConfig(**cast("dict", c.backbone))
            self.mix = nn.Conv2d(len(c.channels), config.num_channels, 1)
            self.narrow = nn.Linear(config.hidden_size, c.width)
            config.mask_ratio = self.MASK_RATIO
        else:
            config = ViTMAEConfig(
                image_size=c.crop_pixels, patch_size=c.patch_pixels, num_channels=len(c.channels), hidden_size=c.width,
                num_hidden_layers=c.image_layers, num_attention_heads=c.n_heads, intermediate_size=4 * c.width,
                hidden_dropout_prob=0.0, decoder_hidden_size=c.width // 2, decoder_num_hidden_layers=1,
                decoder_num_attention_heads=c.n_heads, decoder_intermediate_size=2 * c.width, mask_ratio=self.MASK_RATIO,
            )  # fmt: skip
            self.mix = self.narrow = nn.Identity()
        self.mae: Any = ViTMAEForPreTraining(config)
        self.published = bool(c.backbone)
        if c.stem_width and not c.backbone:
            cast("Any", self.mae).vit.embeddings.patch_embeddings.projection = stem(
                len(c.channels), c.stem_width, c.width, c.patch_pixels
            )
        self.patch, self.pixels = config.patch_size, config.image_size
        self.n_channels = len(c.channels)
        self.around: Any = None
        if c.wide:
            patch, out = c.patch_pixels, config.hidden_size
            self.around = (
                stem(self.n_channels, c.stem_width, out, patch)
                if c.stem_width
                else nn.Conv2d(self.n_channels, out, patch, patch)
            )
            self.around_place = nn.Parameter(0.02 * torch.randn((c.crop_pixels // patch) ** 2, out))
        self.missing = nn.Parameter(torch.zeros(len(c.channels)))
        self.size = nn.Linear(1, c.width) if c.adaptive else None
        self.register_buffer("order", torch.arange((self.pixels // self.patch) ** 2).float(), persistent=False)

    def fill(self, crops: Tensor, present: Tensor | None) -> Tensor:
        """Centre intensities, and put learned values where a channel is missing (``present``: n x C, bool)."""
        x = 2 * crops - 1
        return x if present is None else torch.where(present[..., None, None], x, self.missing[:, None, None])

    def pictures(self, crops: Tensor, present: Tensor | None) -> Tensor:
        """Input of the vision transformer, n x its channels x its pixels twice."""
        x = self.mix(self.fill(crops, present))
        if x.shape[-1] != self.pixels:
            x = F.interpolate(x, (self.pixels, self.pixels), mode="bilinear", antialias=True, align_corners=False)
        return x

    def forward(self, crops: Tensor, present: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Tokens n x (1 + patches) x d of whole crops: nothing is masked, and the same crop gives the same tokens.

        With wider crops twice the patches.

        ``scale`` (n) is the size of a pixel over the usual one, for a model whose crops fit their cells.
        """
        self.mae.config.mask_ratio = 0.0  # constant noise keeps the patches in their order
        noise = self.order.expand(len(crops), -1)
        vit, c, wider = self.mae.vit, self.n_channels, None
        if self.around is not None:
            wider = self.around(self.fill(crops[:, c:], present)).flatten(2).transpose(1, 2) + self.around_place
        with joined_by(vit.embeddings, wider):
            tokens = self.narrow(vit(self.pictures(crops[:, :c], present), noise=noise).last_hidden_state)
        return tokens if self.size is None else tokens + self.size(torch.log(cast("Tensor", scale))[:, None])[:, None]

    def reconstruction(self, crops: Tensor, present: Tensor | None = None) -> Tensor:
        """Mean squared error of masked patches of the channels present, each patch scaled by its own deviation.

        Wider crops are not looked at: they show what is masked.
        """
        self.mae.config.mask_ratio = self.MASK_RATIO
        x = self.pictures(crops[:, : self.n_channels], present)
        noise = torch.rand(len(x), len(self.order), device=x.device)
        n_kept = int(len(self.order) * (1 - self.MASK_RATIO))
        kept = noise.argsort(1).argsort(1) < n_kept  # as the vision transformer will choose
        side = int(len(self.order) ** 0.5)
        shown = kept.view(-1, 1, side, side).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        # convolutions see beyond a patch: what is masked must be gone before them
        blank = 0.0 if self.published else self.missing[:, None, None]
        embed = self.mae.vit.embeddings.patch_embeddings.projection
        mode = embed.training
        embed.eval()  # crops with holes must not enter the running statistics
        seen = self.mae.vit(torch.where(shown, x, blank), noise=noise)
        embed.train(mode)
        predicted = self.mae.decoder(seen.last_hidden_state, seen.ids_restore).logits
        n, channels = x.shape[:2]
        predicted = predicted.view(n, -1, self.patch**2, channels)  # n x patches x pixels x C
        if self.published:  # the mixed channels are learned: they must not become easy to predict
            x, present = x.detach(), None
        target = F.unfold(x, self.patch, stride=self.patch).view(n, channels, self.patch**2, -1).permute(0, 3, 2, 1)
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-2) ** 0.5
        weight = (~kept)[..., None].expand(-1, -1, channels)
        if present is not None:
            weight = weight * present[:, None]
        return ((predicted - target) ** 2).mean(2).mul(weight).sum() / weight.sum().clamp_min(1)


@contextmanager
def joined_by(embeddings: nn.Module, others: Tensor | None) -> Iterator[None]:
    """Let more tokens (n x t x d) follow those that a vision transformer embeds, whatever comes after in its release."""
    if others is None:
        yield
        return
    hook = embeddings.register_forward_hook(lambda _, __, out: (torch.cat([out[0], others], 1), *out[1:]))
    try:
        yield
    finally:
        hook.remove()


def published_mae(name: str) -> tuple[dict, dict]:
    """Configuration and weights of a ViT-MAE by hub id or local folder."""
    from transformers import ViTMAEForPreTraining

    from spatiaflow.models.encoders._image import safely_loaded

    try:
        model, loading = safely_loaded(ViTMAEForPreTraining, name)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the ViT-MAE {name!r} could not be loaded: {error}\nWithout network, copy its folder (config.json, "
            "model.safetensors) here and give the folder's path."
        ) from error
    if loading["missing_keys"]:
        raise OSError(f"{name!r} lacks tensors of a ViT-MAE, first {sorted(loading['missing_keys'])[0]!r}.")
    return model.config.to_diff_dict(), model.state_dict()


def stem(n_channels: int, width: int, out: int, patch: int) -> nn.Sequential:
    """Convolutions from crops to one vector a patch, as a patch embedding gives (n x out x p/patch x p/patch)."""
    layers: list[nn.Module] = []
    channels = n_channels
    while patch % 2 == 0 and len(layers) < 18:
        for i, stride in ((channels, 2), (width, 1)):
            layers += [nn.Conv2d(i, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels, width, patch = width, 2 * width, patch // 2
    return nn.Sequential(*layers, nn.Conv2d(channels, out, patch, patch))


class GeneEncoder(nn.Module):
    """Transformer over gene tokens. A token is a gene's identity plus its value times a direction of the gene's own.

    A few learned queries gather the measured genes by cross-attention, then attend to one another. Keys and values are
    linear in the token and the queries are the same for all cells, so keys and values are projected once per gene and not
    per cell: logits are ``a_g + x_g b_g``. Cost is linear in the number of genes. Genes that are not measured, or hidden,
    are left out. Values must be centred and scaled per gene, otherwise a mean over hundreds of genes would be nearly the
    same for all cells. ``standard`` holds the centre and scale of the training data.
    """

    usual_size: Tensor
    standard: Tensor

    def __init__(self, c: SpatiaConfig):
        super().__init__()
        d = c.width
        self.n_heads = c.n_heads
        self.identity = nn.Parameter(0.02 * torch.randn(len(c.genes), d))
        self.direction = nn.Parameter(torch.randn(len(c.genes), d))
        # of log-normalised counts centre and spread, and the log of each gene's share of all counts
        self.register_buffer("standard", torch.stack([torch.zeros(len(c.genes)), *2 * [torch.ones(len(c.genes))]]))
        self.register_buffer("usual_size", torch.zeros(()))
        self.queries = nn.Parameter(torch.randn(c.gene_latents, d))
        self.key, self.value = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.key.weight.data *= 0.05  # starts as a mean over genes, which keeps what a linear map keeps
        nn.init.eye_(self.value.weight)
        self.out, self.norm, self.gathered_norm = nn.Linear(d, d), nn.LayerNorm(d), nn.LayerNorm(d)
        nn.init.eye_(self.out.weight)
        self.size = nn.Linear(1, d)
        layer = nn.TransformerEncoderLayer(
            d, c.n_heads, 4 * d, c.dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, c.gene_layers, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        for layer in self.layers.layers:  # starts as the identity
            for last in (layer.self_attn.out_proj, layer.linear2):
                nn.init.zeros_(last.weight)

    def forward(self, values: Tensor, measured: Tensor, size: Tensor) -> Tensor:
        """Tokens n x latents x d.

        Parameters
        ----------
        values
            Expression, log-normalised and standardised, n x genes.
        measured
            n x genes or 1 x genes, bool: False is not measured, or hidden.
        size
            log1p of the counts over the measured genes, n.
        """
        n, m, h = len(values), len(self.queries), self.n_heads
        values = values.clamp(-5, 5)
        q = self.queries.view(m, h, -1)
        k_identity, k_direction = (self.key(t).view(len(t), h, -1) for t in (self.identity, self.direction))
        v_identity, v_direction = (self.value(t).view(len(t), h, -1) for t in (self.identity, self.direction))
        scale = q.shape[-1] ** -0.5
        a, b = (torch.einsum("mhd,ghd->hmg", q, k) * scale for k in (k_identity, k_direction))
        logits = a + values[:, None, None] * b  # n x heads x latents x genes
        weight = torch.nan_to_num(logits.masked_fill(~measured[:, None, None], -torch.inf).softmax(-1))
        gathered = torch.einsum("nhmg,ghd->nmhd", weight, v_identity)
        gathered = gathered + torch.einsum("nhmg,ghd->nmhd", weight * values[:, None, None], v_direction)
        gathered = self.gathered_norm(gathered.reshape(n, m, -1))
        tokens = self.queries + self.out(gathered) + self.size(size[:, None] - self.usual_size)[:, None]
        return self.layers(self.norm(tokens))
