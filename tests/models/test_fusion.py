"""Layers of SPATIA: what they start as, parts that equal the whole, and who sees whom."""

import numpy as np
import pytest
import torch

from spatiaflow.models import SpatiaConfig
from spatiaflow.models.fusion import ContextLayer, CrossAttention, Residual, Surroundings
from spatiaflow.models.spatial import spatial_graph

pytestmark = pytest.mark.usefixtures("own_draws")
CONFIG = SpatiaConfig(width=16, n_heads=2, niche_neighbors=5, tissue_anchors=3, anchor_um=50.0, pitch_um=10.0)


@pytest.fixture
def xy():
    return np.random.default_rng(0).uniform(0, 200, (60, 2))


def test_modalities_start_on_their_own():
    torch.manual_seed(0)
    tokens, other = torch.randn(4, 3, 16), torch.randn(4, 7, 16)
    added = Residual(16)(tokens) - tokens
    torch.testing.assert_close(added, added[:1, :1].expand_as(added), msg="the same is added to every token")
    assert CrossAttention(CONFIG, 0.0)(tokens, other) is tokens
    attention = CrossAttention(CONFIG, 1.0).eval()
    torch.testing.assert_close(
        attention(tokens, other), attention(tokens, other[:, :2]), msg="the other is not seen yet"
    )
    torch.nn.init.eye_(attention.attention.out_proj.weight)
    assert (attention(tokens, other) - attention(tokens, other[:, :2])).abs().max() > 1e-3


@torch.inference_mode()
def test_tokens_in_parts_are_those_of_the_whole(xy):
    torch.manual_seed(0)
    layer, h, graph = ContextLayer(CONFIG).eval(), torch.randn(60, 16), spatial_graph(xy, 5, scale=10.0)
    torch.testing.assert_close(layer(h, h, graph, rows=7), layer(h, h, graph), rtol=1e-5, atol=1e-5)
    weights = layer.weights(h, h, graph, rows=7)
    torch.testing.assert_close(weights.sum(1), torch.ones(60))


@torch.inference_mode()
def test_a_turned_slide_has_the_same_context(xy):
    torch.manual_seed(0)
    layer, h, turn = ContextLayer(CONFIG).eval(), torch.randn(60, 16), np.array([[0.6, -0.8], [0.8, 0.6]])
    one, other = (layer(h, h, Surroundings.of(at, CONFIG).neighbors) for at in (xy, xy @ turn + 500))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_cell_sees_itself_first_and_then_the_nearest(xy):
    around = Surroundings.of(xy, CONFIG)
    assert around.neighbors.index[:, 0].tolist() == list(range(60))
    distance = np.linalg.norm(xy[:, None] - xy, axis=2)
    for i in range(60):
        seen = around.neighbors.index[i][around.neighbors.mask[i]].numpy()
        assert set(seen[1:]) == set(np.argsort(distance[i])[1:6])
    assert 1 < around.n_anchors < 60
    assert around.nearest.max() < around.n_anchors
