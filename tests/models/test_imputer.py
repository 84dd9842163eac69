"""Imputation as a trained model does it: against slow references, and against planted truths."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

import spatiaflow as sf
from spatiaflow.models import imputer
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.regression import gene_pearson
from spatiaflow.models.slide import Slide
from spatiaflow.train import imputer as train

N, G = 300, 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, "N_KERNEL", 100)


def planted(seed=0, n=N, image=True, targets=3):
    """Cells whose genes follow two latent directions; targets follow both, one of them the neighbours' as well."""
    rng, rule = np.random.default_rng(seed), np.random.default_rng(5)
    xy = rng.uniform(0, 100, (n, 2))
    field = np.stack([np.sin(xy[:, 0] / 15), np.cos(xy[:, 1] / 15)], 1)
    latent = field + 0.5 * rng.normal(size=(n, 2))
    rate = np.exp(latent @ rule.normal(0, 0.5, (2, G + targets)) + rule.normal(1, 0.5, G + targets))
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    features = (latent @ rule.normal(size=(2, 4)) + 0.1 * rng.normal(size=(n, 4))).astype(np.float32) if image else None
    library = np.asarray(counts[:, :G].sum(1), float).ravel()
    genes = names(G, "g") + names(targets, "t")
    return Slide("s", np.arange(n).astype(str), xy, counts, library, genes, features=features), rate


def tissue(*args, **options):
    """Cells of :func:`planted`."""
    return planted(*args, **options)[0]


def targets(slide):
    """What is to be found: log1p counts per 50 of the genes that are no inputs."""
    return log_normalize(slide.align(names(3, "t")).counts, slide.library, 50).toarray()


def own_genes(slide):
    return slide.align(names(G, "g")).counts


def bands(cells, n=5):
    return np.argsort(np.argsort(cells.xy[:, 0])) * n // len(cells)


def names(n, letter):
    return [f"{letter}{i}" for i in range(n)]


def fitted(*cells, **options):
    blocks = [bands(c) for c in cells]
    return train.train_imputer(list(cells), names(G, "g"), names(3, "t"), target_sum=50, blocks=blocks, **options)


def test_neighbors_are_the_nearest_others_even_among_duplicates():
    xy = np.random.default_rng(0).uniform(size=(40, 2))
    xy[7] = xy[3]
    for k, found in zip((2, 5), imputer.neighbor_means(xy, (2, 5))):
        distance = np.linalg.norm(xy[:, None] - xy, axis=-1)
        np.fill_diagonal(distance, np.inf)
        for i in range(40):
            assert found[i, i] == 0
            assert found[i].sum() == pytest.approx(1)
            chosen = found[i].toarray().ravel() > 0
            shell = np.sort(distance[i])[k - 1]  # ties, such as the two at one place, count as one
            np.testing.assert_array_equal(chosen, distance[i] <= shell + 1e-4 * shell)


def test_neighbors_of_a_lattice_are_whole_shells():
    """The same however the array lies."""
    i, j = np.meshgrid(np.arange(7.0), np.arange(7.0))
    xy, turn = np.stack([i.ravel(), j.ravel()], 1), np.array([[0.6, 0.8], [-0.8, 0.6]])
    for one, other in zip(imputer.neighbor_means(xy), imputer.neighbor_means(xy @ turn)):
        np.testing.assert_allclose(one.toarray(), other.toarray(), atol=1e-6)


def test_draws_have_the_mean_and_spread_that_are_stated():
    model, query = fitted(tissue(0, 1500)), tissue(1, 400)
    mean, std = (np.concatenate(v) for v in zip(*model.predict(query)))
    for g in range(3):
        d = model.draws(mean[:, g], query.library, g, 400, np.random.default_rng(g))
        assert np.abs(d.mean(0) - mean[:, g]).mean() < 0.06
        assert abs(np.mean(d.std(0) / std[:, g]) - 1) < 0.1


def test_columns_are_what_they_say():
    cells = tissue()
    design = train.fit_design([cells], names(G, "g"), 50, kernel=False)
    x = np.concatenate(list(design.columns(cells)))
    own = np.log1p(own_genes(cells).toarray() * 50 / np.maximum(cells.library, 1)[:, None])
    raw = [np.log(np.maximum(cells.library, 1))[:, None], own]
    for mean in imputer.neighbor_means(cells.xy):
        raw.append(np.stack([own[mean[i].indices].mean(0) for i in range(N)]))
    raw = np.hstack([*raw, cells.features])
    np.testing.assert_allclose(x * design.scale + design.centre, raw, atol=1e-4)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(design.scale[1 : 1 + G] ** 2, own.std(0), rtol=1e-4)  # between as is and standardised


def test_ridge_from_moments_is_ridge():
    cells = tissue()
    design = train.fit_design([cells], names(G, "g"), 50)
    found = train.collect(design, [cells], names(3, "t"), [bands(cells)])
    columns, alpha = design.taken(("genes", "image")), 0.7
    weights, intercept = found.without(2).ridge(columns, alpha)
    rows = bands(cells) != 2
    x = np.concatenate(list(design.columns(cells)))[rows][:, columns].astype(float)
    y = targets(cells)[rows]
    a = x - x.mean(0)
    penalty = alpha * (a**2).sum() / columns.sum()
    slow = np.linalg.solve(a.T @ a + penalty * np.eye(columns.sum()), a.T @ (y - y.mean(0)))
    np.testing.assert_allclose(weights[columns], slow, atol=1e-4)
    np.testing.assert_allclose(intercept, y.mean(0) - x.mean(0) @ slow, atol=1e-4)
    assert not weights[~columns].any()


def test_a_gene_from_all_others_is_the_regression_without_its_column():
    cells = tissue()
    design = train.fit_design([cells], names(G, "g"), 50, kernel=False)
    total = train.collect(design, [cells], names(3, "t"), [bands(cells)]).total
    columns, own = design.taken(("genes", "neighbors")), np.array([1, 4])
    at = np.flatnonzero(columns)
    mean = total.x[at] / total.n
    penalty = np.trace(total.xx[np.ix_(at, at)] - total.n * np.outer(mean, mean)) / len(at)
    weights, intercept = total.each_from_rest(columns, 1.0, own, design.scale, design.centre)
    x = np.concatenate(list(design.columns(cells))).astype(float)
    for j, g in enumerate(own):
        rest = columns.copy()
        rest[g] = False
        a, y = x[:, rest] - x[:, rest].mean(0), x[:, g] * design.scale[g] + design.centre[g]
        slow = np.linalg.solve(a.T @ a + penalty * np.eye(rest.sum()), a.T @ (y - y.mean()))
        np.testing.assert_allclose(weights[rest, j], slow, atol=1e-4)
        assert intercept[j] == pytest.approx(y.mean() - x[:, rest].mean(0) @ slow, abs=1e-3)
        assert weights[g, j] == 0


def test_held_out_blocks_are_predicted_by_the_others():
    cells = tissue()
    blocks = [bands(cells)]
    model, e = train.fit_imputer([cells], names(G, "g"), names(3, "t"), target_sum=50, blocks=blocks)
    genes = np.arange(3)
    whole = e.predict(model, model.branches, 1.0, genes)
    for b in range(5):  # garbage in a block's targets must not reach its own prediction
        spoiled = tissue()
        counts, rows = spoiled.counts.toarray(), bands(spoiled) == b
        counts[rows, G:] = np.random.default_rng(b).poisson(30, (int(rows.sum()), 3))
        spoiled = replace(spoiled, counts=sparse.csr_matrix(counts))
        again = train.collect(model.design, [spoiled], names(3, "t"), blocks)
        moved = again.predict(model, model.branches, 1.0, genes) - whole
        assert np.abs(moved[e.block == b]).max() < 1e-4
        assert np.abs(moved[e.block != b]).max() > 1e-2


def test_genes_of_a_panel_are_judged_hidden_with_their_fold():
    cells, genes, alpha = panel(0), names(G + 3, "p"), 3.0
    model, e = train.fit_imputer(
        [cells], genes, genes, target_sum=50, blocks=[bands(cells)], branches=("genes", "neighbors"), panel=True
    )
    x, gene = e.x.astype(float), model.design.gene
    y = log_normalize(cells.counts, cells.library, 50).toarray()
    assert sorted(np.concatenate(e.folds)) == list(range(G + 3))
    found, slow = e.predict(model, ("genes", "neighbors"), alpha, np.arange(G + 3)), np.empty((len(x), G + 3))
    for b in range(5):
        for fold in e.folds:
            here, left = e.block == b, ~np.isin(gene, fold)
            a, c = x[~here][:, left], y[~here][:, fold]
            a, c, centre, mean = a - a.mean(0), c - c.mean(0), a.mean(0), c.mean(0)
            penalty = alpha * np.trace(a.T @ a) / left.sum()
            weights = np.linalg.solve(a.T @ a + penalty * np.eye(left.sum()), a.T @ c)
            slow[np.ix_(here, fold)] = (x[here][:, left] - centre) @ weights + mean
    np.testing.assert_allclose(found, slow, atol=2e-3)
    expected = gene_pearson(y, np.maximum(e.predict(model, model.branches, model.alpha, np.arange(G + 3)), 0))
    np.testing.assert_allclose(model.reliability, expected, atol=1e-3)


def test_a_planted_relation_is_found_on_another_slide():
    model, (query, rate) = fitted(tissue(0, 2000)), planted(1, 1000)
    mean, std = (np.concatenate(v) for v in zip(*model.predict(query)))
    y, best = targets(query), np.log1p(50 * rate[:, G:] / rate[:, :G].sum(1, keepdims=True))
    r = gene_pearson(y, mean)
    assert (r > gene_pearson(y, best) - 0.06).all()
    assert np.abs(model.reliability - r).max() < 0.15
    z = ((y - mean) / std) ** 2
    assert 0.7 < z.mean() < 1.4


def test_an_image_of_noise_is_dropped_and_an_informative_one_is_kept():
    cells = tissue(0, 2000)
    assert "image" in fitted(cells).branches
    noise = np.random.default_rng(0).normal(size=(2000, 40)).astype(np.float32)
    assert "image" not in fitted(replace(cells, features=noise)).branches


def test_a_branch_that_misleads_in_the_query_is_dropped():
    model, query = fitted(tissue(0, 2000)), tissue(1, 1000)
    assert "image" in model.branches
    model.adapt([replace(query, features=-query.features)])  # of another microscope
    assert model.checked["image"] < 0
    assert "image" not in model.branches


def test_check_does_not_look_at_hidden_genes():
    query = tissue(1, 500)
    model, again = fitted(tissue(0, 1000)), fitted(tissue(0, 1000))
    model.adapt([query])
    again.adapt([query.align(names(G, "g"))])
    assert model.checked == again.checked


def test_what_is_expected_after_seeing_counts_lies_between():
    """Posterior mean of a gamma prior, by brute force over rates."""
    model = fitted(tissue())
    counts, library, rate, theta = (
        np.array([[0.0], [9.0]]),
        np.array([40.0, 60.0]),
        np.array([[0.05], [0.05]]),
        np.array([2.0]),
    )
    mean, std = model._seen(counts, library, rate, theta)
    grid = np.geomspace(1e-6, 5, 400_000)
    for i in range(2):
        log_p = (theta - 1) * np.log(grid) - theta / rate[i] * grid + counts[i] * np.log(grid) - library[i] * grid
        p = np.exp(log_p - log_p.max()) * np.gradient(grid)
        p /= p.sum()
        expected = (p * grid).sum()
        spread = np.sqrt((p * grid**2).sum() - expected**2)
        assert mean[i, 0] == pytest.approx(np.log1p(50 * expected), rel=1e-3)
        assert std[i, 0] == pytest.approx(50 * spread / (1 + 50 * expected), rel=1e-3)


def test_prediction_does_not_depend_on_chunks_or_order(monkeypatch):
    model, query = fitted(tissue(0, 600)), tissue(1, 200)
    whole = np.concatenate([m for m, _ in model.predict(query)])
    monkeypatch.setattr(imputer, "CHUNK", 17)
    np.testing.assert_allclose(np.concatenate([m for m, _ in model.predict(query)]), whole, atol=1e-5)
    order = np.random.default_rng(0).permutation(200)
    turned = replace(query.take(order), xy=query.xy[order] @ [[0.6, 0.8], [0.8, -0.6]])
    np.testing.assert_allclose(np.concatenate([m for m, _ in model.predict(turned)]), whole[order], atol=1e-4)


def panel(seed, **options):
    """Cells of a panel whose genes are inputs and targets alike."""
    cells = tissue(seed, image=False, **options)
    return replace(cells, genes=names(G + 3, "p"), library=np.asarray(cells.counts.sum(1), float).ravel())


@pytest.mark.parametrize("missing", [[0, 5], [12, 13, 14]])
def test_a_saved_model_imputes_whatever_is_missing(missing, tmp_path):
    cells, genes, options = panel(0, n=1500), names(G + 3, "p"), {"target_sum": 50, "branches": ("genes", "neighbors")}
    model = train.train_imputer([cells], genes, genes, blocks=[bands(cells)], panel=True, **options)
    again = sf.models.load(model.save(tmp_path / "panel"))
    assert again.sha256 == model.sha256
    assert again.validation_scores == model.validation_scores
    np.testing.assert_array_equal(again.promised, model.promised)
    query, wanted = panel(1, n=600), [genes[i] for i in missing]
    shown = [gene for gene in genes if gene not in wanted]
    y = log_normalize(query.align(wanted).counts, query.library, 50).toarray()
    library = np.asarray(query.align(shown).counts.sum(1), float).ravel()
    part = replace(query.align(shown), library=library / model.share[np.isin(genes, shown)].sum())
    one, other = (np.concatenate([m for m, _ in v.restricted(shown, wanted).predict(part)]) for v in (model, again))
    np.testing.assert_allclose(one, other, atol=1e-3)
    slow = train.train_imputer([cells], shown, wanted, blocks=[bands(cells)], **options)  # these were never its inputs
    slow.branches, slow.alpha = model.branches, model.alpha
    np.testing.assert_allclose(one, np.concatenate([m for m, _ in slow.predict(part)]), atol=0.03)
    assert (gene_pearson(y, one) > gene_pearson(y, np.random.default_rng(0).permutation(one))).all()


def test_files_of_the_first_version_load():
    """Their header calls the validation scores "judged"."""
    model = sf.models.load(sf.datasets.weights("imputation-pancreas-small"))
    description, tensors = model.state()
    old = {("judged" if name == "validation_scores" else name): value for name, value in description.items()}
    assert imputer.Imputer.from_state(old, tensors).validation_scores == model.validation_scores
    assert model.validation_scores[model.branches] == max(model.validation_scores.values())


def test_a_model_with_a_kernel_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="train_imputation"):
        fitted(tissue()).save(tmp_path / "a")
