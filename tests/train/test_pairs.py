from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import sparse

from spatiaflow.models.conditions import Context
from spatiaflow.models.transport import Coordinates, PairingConfig
from spatiaflow.train.pairs import (
    ALIKE,
    PairBatches,
    Pairs,
    exchanged,
    mean_shift,
    pair_states,
    shares,
    stacked,
    with_shifts,
)

RNG = np.random.default_rng(0)


def test_shares_of_a_plan_side_by_side():
    dense = RNG.random((7, 9)) * (RNG.random((7, 9)) < 0.5)
    dense[3] = 0
    allowed = RNG.random((7, 9)) < 0.7
    allowed[5] = False
    index, share = shares(sparse.csr_matrix(dense), allowed)
    for i in range(7):
        row, kept = np.zeros(9), dense[i] * allowed[i]
        np.add.at(row, index[i], share[i])
        np.testing.assert_allclose(row, kept / kept.sum() if kept.sum() else kept)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_mean_shift_is_that_of_the_pairs_written_out(kind):
    values, share = RNG.normal(size=(9, 4)), RNG.dirichlet(np.ones(3), 5)
    target = np.stack([RNG.permutation(9)[:3] for _ in range(5)])
    pairs = Pairs(
        np.array([0, 4, 2, 2, 8]),
        target,
        share,
        RNG.random(5),
        np.zeros(5, int),
        np.zeros((5, 0)),
        np.zeros((5, 0)),
        np.zeros(5, int),
    )
    expected = sum(
        c * (sum(s * values[t] for s, t in zip(row, to)) - values[i])
        for i, to, row, c in zip(pairs.source, target, share, pairs.confidence)
    ) / pairs.confidence.sum()  # fmt: skip
    np.testing.assert_allclose(np.asarray(mean_shift(pairs, kind(values))).ravel(), expected)


def test_targets_are_exchanged_as_trying_every_way_finds():
    n, group = 7, np.array([0, 1, 0, 1, 0, 1, 0])
    source, target = (torch.from_numpy(RNG.normal(size=(n, 5))).float() for _ in range(2))
    context = RNG.normal(size=(n, 3))
    place = exchanged(source, target, context, group)
    for g in (0, 1):
        rows = np.flatnonzero(group == g)
        assert sorted(place[rows]) == list(rows), "the targets of a group remain its own"
        image, state = np.zeros((2, len(rows), len(rows)))
        for a, i in enumerate(rows):
            for b, j in enumerate(rows):
                image[a, b] = ((target[j] - source[i]) ** 2).sum()
                state[a, b] = ((context[i] - context[j]) ** 2).sum()
        cost = image / image.mean() + ALIKE * state / state.mean()
        best = min(permutations(range(len(rows))), key=lambda way: cost[np.arange(len(rows)), way].sum())
        np.testing.assert_array_equal(place[rows], rows[list(best)])


def test_targets_stay_with_sources_that_are_alike():
    context = np.repeat([[0.0], [100.0]], 20, 0)
    source, target = (torch.from_numpy(RNG.normal(size=(40, 16))).float() for _ in range(2))
    place = exchanged(source, target, context, np.zeros(40, int))
    assert ((place < 20) == (np.arange(40) < 20)).mean() > 0.9


@pytest.mark.parametrize("exchange", [True, False])
def test_batches_do_not_depend_on_the_order_they_are_asked_in(exchange):
    n, size = 50, 4
    latents = torch.from_numpy(RNG.normal(size=(2 * n, 6))).float()
    place = RNG.permutation(2 * n)
    around = Context(*RNG.normal(size=(3, 2 * n, 3)), np.zeros((2 * n, 2), int), np.zeros((2 * n, 2, 2)))
    pairs = Pairs(
        np.arange(n), n + np.arange(n)[:, None], np.ones((n, 1)), np.ones(n), np.zeros(n, int), np.zeros((n, 0)),
        np.zeros((n, 0)), np.arange(n) % 3,
    )  # fmt: skip
    one, other = (PairBatches(pairs, latents, place, around, 30, size, 5, exchange=exchange) for _ in range(2))
    found = {b: one[b] for b in range(30)}
    for b in RNG.permutation(30):
        for key in ("source", "target"):
            torch.testing.assert_close(other[b][key], found[b][key], rtol=0, atol=0)
    first = torch.cat([found[b]["source"] for b in range(one.per_pool)])
    assert len(torch.unique(first, dim=0)) == one.per_pool * size, "a pool has each pair once"
    rows = {tuple(latents[place[i]].tolist()): i for i in range(2 * n)}
    source, target = (np.array([rows[tuple(v.tolist())] for v in found[0][key]]) for key in ("source", "target"))
    assert (source < n).all() and (pairs.group[source] == pairs.group[target - n]).all()
    assert exchange or (target == source + n).all()


def some_pairs(n, k):
    zeros = np.zeros((n, 0))
    share = RNG.dirichlet(np.ones(k), n)
    return Pairs(
        np.arange(n),
        n + RNG.integers(0, n, (n, k)),
        share,
        np.ones(n),
        np.zeros(n, int),
        zeros,
        zeros,
        np.zeros(n, int),
    )


def test_pairs_of_several_tables_keep_their_targets():
    few, many = some_pairs(3, 2), some_pairs(4, 5)
    both = stacked([few, many])
    assert len(both) == 7 and both.target.shape == (7, 5)
    np.testing.assert_array_equal(both.target[:3, :2], few.target)
    np.testing.assert_allclose(both.share.sum(1), 1)


def test_shifts_are_those_of_each_niche_and_of_all_together():
    pairs, niche = some_pairs(6, 1), np.array(["x", "x", "y", "y", "y", ""])
    values = RNG.normal(size=(12, 3))
    found, shifts = with_shifts(pairs, niche, ["A -> B"], values, values[:, :1])
    change = values[pairs.target[:, 0]] - values[pairs.source]
    assert list(shifts["A -> B"]) == ["", "x", "y"]
    for name in ("", "x", "y"):
        which = niche == name if name else np.ones(6, bool)
        np.testing.assert_allclose(shifts["A -> B"][name]["genes"], change[which].mean(0), atol=1e-5)
    np.testing.assert_allclose(found.genes[2], change[2:5].mean(0))  # the niche's own where it has one
    np.testing.assert_allclose(found.genes[5], change.mean(0))


def test_cells_are_paired_within_their_niche():
    x = RNG.normal(size=(80, 3))
    niches = np.repeat(["p", "q", "p", "q"], 20)
    sides = {"A -> B": (np.arange(40), np.arange(40, 80))}
    config = PairingConfig(min_cells=5)
    pairs, (row, column, _), problems = pair_states(
        sides, niches, Coordinates([x]), config, batch=1000, seed=0, device="cpu"
    )
    assert (niches[row] == niches[column]).all() and len(pairs) == 40 and list(problems["niche"]) == ["p", "q"]
    with pytest.warns(UserWarning, match="no niche holds 30 cells"):
        whole = pair_states(
            sides, niches, Coordinates([x]), PairingConfig(min_cells=30), batch=1000, seed=0, device="cpu"
        )[0]
    assert set(whole["niche"]) == {""}
