"""The law is fitted to counts that it made, and has to find itself again."""

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from spatiaflow.models.law import JointLaw
from spatiaflow.train.law import HeldOut, _Moments, _Window, fit_law, fit_theta

XY = np.stack(np.meshgrid(np.arange(20) * 100.0, np.arange(20) * 100.0), -1).reshape(-1, 2)
N_GENES, N_SLIDES = 12, 6


def simulated(field=0.5, slide=0.2, *, theta=20.0, seed=0, donors=1, counts=30.0):
    """Held-out slides from a known law, six genes of one programme, six on their own."""
    factors = np.repeat([0.85, 0.0], N_GENES // 2)[:, None]
    law = JointLaw(
        np.full(N_GENES, theta), np.array([200.0, 900.0]), np.array([[field] * N_GENES, [0.0] * N_GENES]), np.zeros(N_GENES),
        np.full(N_GENES, slide), np.full(N_GENES, 1.0), factors,
    )  # fmt: skip
    mean = np.full((len(XY), N_GENES), np.log(counts / 1e4), np.float32)
    library = np.full(len(XY), 1e4)
    slides = []
    for i in range(N_SLIDES):
        (drawn,) = law.draws(f"s{i}", XY, mean, library, 1, new_donor=False, seed=seed)
        slides.append(HeldOut(f"s{i}", f"d{i % donors}", XY, drawn.astype(np.float64), library, mean))
    return slides


@pytest.mark.parametrize("field", [0.3, 0.6])
def test_planted_field_is_recovered(field):
    found = fit_law(simulated(field), 100.0)
    near = sum(
        sd**2 * np.exp(-100 / length) for sd, length in zip(found.field_sd, found.lengths)
    )  # what neighbours share
    assert near.mean() == pytest.approx(field**2 * np.exp(-0.5), rel=0.25)
    correlation = found.factors @ found.factors.T
    inside, across = correlation[:6, :6][~np.eye(6, dtype=bool)].mean(), np.abs(correlation[:6, 6:]).mean()
    assert inside == pytest.approx(0.85**2, abs=0.15)
    assert across < 0.15


def test_without_a_field_none_is_found():
    found = fit_law(simulated(1e-6, 0.05), 100.0)
    assert (found.field_sd**2).sum(0).mean() < 0.01


def test_planted_slide_effect_is_recovered():
    small, large = (fit_law(simulated(0.2, slide), 100.0).slide_sd.mean() for slide in (0.05, 0.5))
    assert small < 0.15
    assert large == pytest.approx(0.5, rel=0.35)


def test_one_far_slide_does_not_widen_everything():
    slides = simulated(0.2, 0.05)
    far = slides[0]
    slides[0] = HeldOut(far.name, far.donor, far.xy, far.counts * 8, far.library, far.log_mean)
    assert fit_law(slides, 100.0).slide_sd.mean() < 0.2


def test_donor_effects_are_learned_from_four_donors_on():
    few, many = (fit_law(simulated(0.2, 0.1, donors=n), 100.0) for n in (2, 6))
    assert (few.donors_learned, many.donors_learned) == (False, True)
    assert few.donor_sd.min() >= 1.0
    assert many.donor_sd.mean() < 0.5


def test_dispersion_is_that_of_the_counts():
    rng, mean = np.random.default_rng(0), np.full((4000, 3), 20.0)
    planted = np.array([1.0, 5.0, 50.0])
    counts = rng.poisson(rng.gamma(planted, mean / planted)).astype(float)
    np.testing.assert_allclose(fit_theta(counts, mean), planted, rtol=0.2)


def test_of_many_genes_those_with_most_counts_go_together(monkeypatch):
    """No array has genes x genes elements beyond these."""
    rng, share = np.random.default_rng(0), np.where(np.arange(N_GENES) % 2, 0.05, 1.0)
    weak = [
        HeldOut(s.name, s.donor, s.xy, rng.binomial(s.counts.astype(int), share), s.library, s.log_mean + np.log(share))
        for s in simulated(0.5)
    ]
    monkeypatch.setattr("spatiaflow.train.law.MAX_GENES", 6)
    law = fit_law(weak, 100.0)
    strong = np.arange(N_GENES) % 2 == 0
    assert (law.factors[~strong] == 0).all()
    correlation = law.factors @ law.factors.T
    assert correlation[0, 2] > 0.5
    assert (law.field_sd.sum(0) > 0).all()


@pytest.mark.parametrize("case", ["never seen", "one slide", "two spots", "one gene"])
def test_little_data_gives_a_finite_law(case):
    slides = simulated()
    if case == "never seen":
        for slide in slides:
            slide.counts[:, 0] = 0
    if case == "one slide":
        slides = slides[:1]
    if case == "two spots":
        slides = [HeldOut(s.name, s.donor, s.xy[:2], s.counts[:2], s.library[:2], s.log_mean[:2]) for s in slides]
    if case == "one gene":
        slides = [HeldOut(s.name, s.donor, s.xy, s.counts[:, :1], s.library, s.log_mean[:, :1]) for s in slides]
    law = fit_law(slides, 100.0)
    assert all(np.isfinite(value).all() for value in law.tensors().values())
    (drawn,) = law.draws(
        "t", XY, np.full((len(XY), len(law.theta)), -6.0, np.float32), np.full(len(XY), 1e4), 1, new_donor=True, seed=0
    )
    assert np.isfinite(drawn).all()


def test_dispersion_is_the_likeliest():
    rng = np.random.default_rng(0)
    mean = rng.lognormal(1, 0.7, (300, 2))
    counts = rng.poisson(mean * rng.gamma([0.8, 6.0], 1 / np.array([0.8, 6.0]), mean.shape)).astype(np.float64)
    found = fit_theta(counts, mean)
    for g, best in enumerate(found):
        likelihood = [
            stats.nbinom.logpmf(counts[:, g], t, t / (t + mean[:, g])).sum() for t in best * np.array([0.999, 1, 1.001])
        ]
        assert np.argmax(likelihood) == 1


def moments(side=12, n_genes=3, n_windows=3):
    rng = np.random.default_rng(0)
    xy = XY[(XY < side * 100).all(1)]
    windows = [
        _Window(cdist(xy, xy), rng.normal(size=(len(xy), n_genes)), rng.uniform(1, 2, (len(xy), n_genes)))
        for _ in range(n_windows)
    ]
    return [_Moments.of(window, 100.0, np.array([100.0, 200.0, 600.0])) for window in windows], windows


def test_moments_of_some_ranges_are_those_found_without_the_others():
    parts, windows = moments()
    alone = _Moments.joined([_Moments.of(window, 100.0, np.array([100.0, 600.0])) for window in windows])
    some = _Moments.joined(parts).having([0, 2])
    np.testing.assert_array_equal(some.lengths, alone.lengths)
    np.testing.assert_allclose(some.kernels, alone.kernels, rtol=1e-12)
    np.testing.assert_allclose(some.solve(), alone.solve(), rtol=1e-9)


def test_moments_are_means_over_pairs():
    """The nearest lag of one window, by hand."""
    (one, *_), (window, *_) = moments()
    pairs = (window.distance > 50) & (window.distance < 125)
    for g in range(3):
        w, z = window.w[:, g], window.z[:, g]
        both = np.outer(w, w)[pairs].sum()
        assert one.weight[1, g] == pytest.approx(both)
        centred = both / w.sum()  # what centring makes of counting noise
        assert one.products[1, g] == pytest.approx((np.outer(w * z, w * z)[pairs].sum() + centred) / both)


def test_of_short_ranges_that_say_nothing_the_first_is_taken():
    slides = simulated(1e-6, 0.05)
    rows = np.random.default_rng(0).permutation(len(XY))
    for some in (slides, [HeldOut(s.name, s.donor, s.xy[rows], s.counts[rows], s.library, s.log_mean) for s in slides]):
        assert fit_law(some, 100.0).lengths[0] == 100.0
