"""Baselines of the joint law, and the split of the deviance into level and pattern."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse, stats

import joint
import results
from spatiaflow._slides import gather
from spatiaflow.models.counts import CountLaw
from spatiaflow.models.law import JointLaw
from spatiaflow.models.slide import Slide
from spatiaflow.train.trust import partial

RNG = np.random.default_rng(0)
N, THETA = 600, np.array([2.0, 8.0])
PATTERN = np.exp(0.6 * RNG.normal(size=(N, 2)))
RATE = np.array([2e-3, 5e-3]) * PATTERN
LIBRARY = RNG.lognormal(8.5, 0.4, N)


def slide():
    counts = RNG.poisson(LIBRARY[:, None] * RATE * RNG.gamma(THETA, 1 / THETA, RATE.shape)).astype(np.float32)
    return Slide("s", np.arange(N), RNG.uniform(0, 2000, (N, 2)), sparse.csr_matrix(counts), LIBRARY, ("a", "b"))


def skills(rate, base):
    return joint.deviance_skills(slide(), rate, base, THETA)


def test_deviance_is_twice_the_distance_to_the_saturated_likelihood():
    counts, mean, theta = np.array([[0.0], [3.0], [40.0]]), np.array([[0.5], [2.0], [60.0]]), np.array([1.5])

    def likelihood(m):
        return stats.nbinom.logpmf(counts, theta, theta / (theta + np.maximum(m, 1e-300))).sum()

    np.testing.assert_allclose(
        joint.deviance(counts, mean, theta), 2 * (likelihood(counts) - likelihood(mean)), rtol=1e-6
    )


def test_a_wrong_level_costs_no_pattern_and_a_right_one_gives_none():
    base = RATE.mean(0)
    right, wrong = skills(RATE, base), skills(4 * RATE, base)
    assert right["pattern deviance skill"] > 0.1
    assert wrong["pattern deviance skill"] == pytest.approx(right["pattern deviance skill"], abs=0.05)
    assert abs(right["level deviance skill"]) < 0.02
    assert wrong["level deviance skill"] < -0.3
    flat = skills(np.tile(base, (N, 1)), base / 4)
    assert flat["level deviance skill"] > 0.2
    assert flat["pattern deviance skill"] == pytest.approx(0, abs=1e-4)
    assert flat["deviance skill"] == pytest.approx(flat["level deviance skill"])


def test_genes_of_the_copula_go_together_and_spots_do_not():
    one = np.ones(2)
    law = JointLaw(20 * one, np.array([500.0]), 0.5 * one[None], 0.3 * one, one, one, 0.9 * one[:, None])
    counting = CountLaw(np.full(64, 5e3), 1e4, np.zeros(()))
    model = SimpleNamespace(law=law, genes=["a", "b"], counting=counting, arrays={"theta": 20 * one})
    xy = np.repeat(RNG.uniform(0, 1e5, (100, 2)), 2, 0) + RNG.normal(size=(200, 2))  # pairs that lie together
    test = Slide("s", np.arange(200), xy, library=np.full(200, 5e3))
    rate = np.full((200, 2), np.expm1(4.0) / 1e4)
    copula, alone = (draw(model, test, rate, 0) for draw in (joint.gene_copula, joint.independent))

    def correlation(first, second):
        return np.corrcoef(first.ravel(), second.ravel())[0, 1]

    assert correlation(copula[..., 0], copula[..., 1]) > 0.4
    assert abs(correlation(alone[..., 0], alone[..., 1])) < 0.05
    assert abs(correlation(copula[:, ::2], copula[:, 1::2])) < 0.05
    np.testing.assert_allclose(copula.mean((0, 1)), alone.mean((0, 1)), rtol=0.03)
    np.testing.assert_allclose(copula.std((0, 1)), alone.std((0, 1)), rtol=0.1)


def test_blocks_are_drawn_anew_and_all_of_them_give_the_correlation_given_the_depth():
    xy, depth = RNG.uniform(0, 1000, (400, 2)), RNG.integers(10, 1000, 400).astype(float)
    one = Slide("s", np.arange(400), xy, library=depth)
    signal = RNG.normal(size=(400, 3))
    y, good = signal + np.log(depth)[:, None] + RNG.normal(size=(2, 400, 3))
    found = joint.partials(y, good, one)
    assert found[0] == pytest.approx(partial(y, good, depth).mean())
    assert found[0] == pytest.approx(0.5, abs=0.08)
    assert found[1:].std() == pytest.approx((1 - 0.25) / np.sqrt(400 * 3), rel=0.6)
    sums = joint.redrawn(np.ones((400, 1)), xy, 50)
    assert sums.mean() == pytest.approx(400, rel=0.03)


@pytest.mark.slow
def test_a_run_writes_every_metric_once(slide, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATIAFLOW_RESULTS", str(tmp_path))
    monkeypatch.setattr(joint, "N_DRAWS", 8)
    found = [gather(slide(f"s{i}", n=8, seed=i), need=("counts", "features"), use_rep="X_texture")[0] for i in range(3)]
    slides = [replace(one, name=f"s{i}", donor=donor) for i, (one, donor) in enumerate(zip(found, "abb"))]
    monkeypatch.setattr(joint, "load", lambda task, seed: slides)
    arguments = joint.parser().parse_args(["--tasks", "donors", "--seeds", "1", "--epochs", "1"])
    joint.run(arguments)
    rows = results.read("joint")
    own = set(rows[rows.method == "STFlow default"].metric)
    assert {
        "deviance skill",
        "level deviance skill",
        "pattern deviance skill",
        "energy minus gene copula",
        "partial minus ridge, slide",
    } <= own
    assert set(rows.method) == {"STFlow default", joint.NO_FLOW, *joint.BASELINES, *joint.NAMES}
    assert set(rows.split) == {"s0", "s1", "s2"}
    monkeypatch.setattr(joint, "train_stflow", None)
    joint.run(arguments)  # nothing is left to measure
