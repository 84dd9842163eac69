import numpy as np
import pytest
import torch

from spatiaflow.models.spatial import GEOMETRY, Graph, LocalAttention, frames, invariants, join, spatial_graph

RNG = np.random.default_rng(0)


def lattice(kind, n=8):
    i, j = np.meshgrid(np.arange(n), np.arange(n))
    xy = np.stack([i + 0.5 * (j % 2), j * np.sqrt(3) / 2] if kind == "hex" else [i, j], -1)
    return xy.reshape(-1, 2).astype(float) * 100


LAYOUTS = {"random": RNG.uniform(0, 1000, (80, 2)), "square": lattice("square"), "hex": lattice("hex")}
TURNS = {
    "rotated": lambda xy: xy @ np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]),
    "reflected": lambda xy: xy * [-1, 1],
    "translated": lambda xy: xy + [1e6, -3e5],
    "scaled": lambda xy: xy * 0.37,
}


def attention(geometry="invariants", n_signal=5, width=16):
    torch.manual_seed(0)
    return LocalAttention(width, 4, GEOMETRY[geometry][1], n_signal).eval()


def attend(module, graph, h, y, geometry="invariants"):
    key, value = module.keys(h, y)
    return module.attend(h, y, key, value, graph.index, graph.mask, module.geometry(GEOMETRY[geometry][0](graph)))


def test_graph_is_brute_force_neighbours():
    xy = LAYOUTS["random"]
    graph = spatial_graph(xy, 6, ties="cut")
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    expected = np.sort(np.argsort(distance, 1)[:, :6], 1)
    np.testing.assert_array_equal(np.sort(graph.index.numpy(), 1), expected)


def test_whole_shells_are_taken():
    sizes = spatial_graph(lattice("hex", 12), 8).mask.sum(1)
    inner = sizes.reshape(12, 12)[4:-4, 4:-4]
    assert (inner == 12).all()  # 6 at one pitch, 6 at sqrt(3): eight would cut the second shell


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turn", TURNS)
def test_attention_does_not_see_orientation(layout, turn):
    module, xy = attention(), LAYOUTS[layout]
    h, y = torch.randn(len(xy), 16), torch.randn(len(xy), 5)
    before, after = (attend(module, spatial_graph(p, 8), h, y) for p in (xy, TURNS[turn](xy)))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_invariants_do_see_shape():
    xy = LAYOUTS["random"]
    bent = xy * [1.0, 0.5]
    assert (
        invariants(spatial_graph(xy, 8, ties="cut")) - invariants(spatial_graph(bent, 8, ties="cut"))
    ).abs().max() > 0.1


def test_frames_average_is_invariant_on_random_layouts():
    module, xy = attention("frames"), LAYOUTS["random"]
    h, y = torch.randn(len(xy), 16), torch.randn(len(xy), 5)
    graphs = [spatial_graph(p, 8, ties="cut") for p in (xy, TURNS["rotated"](xy), TURNS["reflected"](xy))]
    out = [attend(module, g, h, y, "frames") for g in graphs]
    torch.testing.assert_close(out[0], out[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[0], out[2], atol=1e-5, rtol=0)


def naive_attention(module, graph, h, y, edges):
    """The formula, edge by edge: logit = MLP([q_i, k_j, e_ij, y_j - y_i])."""
    n, heads, d = len(h), module.n_heads, module.head
    q, k, v = module.qkv(module.norm(h)).view(n, 3, heads, d).unbind(1)
    out = torch.zeros(n, 2 * heads * d)
    for i in range(n):
        neighbours = [j for j, m in zip(graph.index[i].tolist(), graph.mask[i].tolist()) if m]
        e = [module.edge(edges[i, s]).mean(0).view(heads, d) for s in range(len(neighbours))]
        for head in range(heads):
            logits = torch.stack(
                [
                    module.score(torch.cat([q[i, head], k[j, head], e[s][head], y[j] - y[i]]))[0]
                    for s, j in enumerate(neighbours)
                ]
            )
            a = logits.softmax(0)
            out[i, head * d : (head + 1) * d] = sum(a[s] * v[j, head] for s, j in enumerate(neighbours))
            out[i, (heads + head) * d : (heads + head + 1) * d] = sum(a[s] * e[s][head] for s in range(len(neighbours)))
    return out


@pytest.mark.parametrize("geometry", ["invariants", "frames"])
def test_projected_attention_equals_the_formula(geometry):
    module, xy = attention(geometry), LAYOUTS["hex"][:40]
    graph = spatial_graph(xy, 5)
    h, y = torch.randn(40, 16), torch.randn(40, 5)
    with torch.no_grad():
        expected = naive_attention(module, graph, h, y, GEOMETRY[geometry][0](graph))
        torch.testing.assert_close(attend(module, graph, h, y, geometry), expected, atol=1e-5, rtol=0)


def test_only_differences_of_signals_count():
    module, graph = attention(), spatial_graph(LAYOUTS["random"], 8)
    h, y = torch.randn(80, 16), torch.randn(80, 5)
    before = attend(module, graph, h, y)
    torch.testing.assert_close(attend(module, graph, h, y + 3), before, atol=1e-5, rtol=0)
    i, j = 0, int(graph.index[0, 0])
    y[j] += 1
    assert (attend(module, graph, h, y)[i] - before[i]).abs().max() > 1e-5


def test_joined_slides_do_not_see_each_other():
    module, parts = attention(), [LAYOUTS["random"][:50], LAYOUTS["random"][50:52], LAYOUTS["random"][52:53]]
    graphs = [spatial_graph(p, 8) for p in parts]
    h, y = torch.randn(53, 16), torch.randn(53, 5)
    joined = attend(module, join(graphs), h, y)
    alone = [attend(module, g, h[s:e], y[s:e]) for g, (s, e) in zip(graphs, [(0, 50), (50, 52), (52, 53)])]
    torch.testing.assert_close(joined, torch.cat(alone), atol=1e-6, rtol=0)
    assert (joined[-1] == 0).all()  # one spot has no neighbour to attend to


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_spots_than_neighbours(n):
    graph = spatial_graph(RNG.uniform(size=(n, 2)), 8)
    assert graph.index.shape == (n, n - 1)
    assert graph.mask.all()


def test_duplicated_positions_are_finite_neighbours():
    xy = np.repeat(RNG.uniform(size=(5, 2)), 40, 0)
    graph = spatial_graph(xy, 8)
    assert graph.index.shape[1] <= 32
    assert not (graph.index == torch.arange(200)[:, None])[graph.mask].any()
    for geometry in (invariants, frames):
        assert geometry(graph).isfinite().all()


def test_padding_is_ignored():
    graph = spatial_graph(LAYOUTS["random"], 6)
    h, y = torch.randn(80, 16), torch.randn(80, 5)
    wide = Graph(
        torch.nn.functional.pad(graph.index, (0, 3)),
        torch.nn.functional.pad(graph.mask, (0, 3)),
        torch.nn.functional.pad(graph.offset, (0, 0, 0, 3), value=2.0),
    )
    module = attention()
    torch.testing.assert_close(attend(module, wide, h, y), attend(module, graph, h, y), atol=1e-6, rtol=0)
