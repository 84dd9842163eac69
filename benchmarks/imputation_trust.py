"""Whether what is said of the trust in imputed values is true: laws, conformal intervals, tests of differential expression."""

import numpy as np
from scipy import stats
from sklearn.decomposition import PCA

import spatiaflow as sf
from spatiaflow.models import Imputer
from spatiaflow.train.imputer import Evidence

DRAWS = 99


def uncertainty(y, mean, reference: np.ndarray, residual: np.ndarray, law, others: dict) -> dict[str, dict]:
    """CRPS and 90 % intervals of ours, of a constant marginal, and of the same mean with one law of residuals a gene.

    ``y``, ``mean`` and ``others`` (draws x cells x genes) are of the cells that are scored.
    """
    levels = (np.arange(DRAWS) + 0.5) / DRAWS
    out = {}
    marginal = np.quantile(reference, levels, axis=0)  # draws x genes
    errors = np.quantile(residual, levels, axis=0)
    detected = (y > 0).mean(0)
    for name, draws in (
        ("ours", law), ("constant marginal", lambda g: np.repeat(marginal[:, None, g], len(y), 1)),
        ("ridge with residuals of left-out blocks", lambda g: np.maximum(mean[None, :, g] + errors[:, None, g], 0)),
        *((name, lambda g, d=d: d[:, :, g]) for name, d in others.items()),
    ):  # fmt: skip
        crps, score, covered = [], [], []
        for g in range(y.shape[1]):
            d = draws(g).astype(np.float64)
            crps.append(sf.metrics.crps_ensemble(y[:, [g]], d[:, :, None], fair=name in others).mean())
            low, high = np.quantile(d, [0.05, 0.95], axis=0)
            score.append(sf.metrics.interval_score(y[:, [g]], low[:, None], high[:, None]).mean())
            covered.append(sf.metrics.interval_coverage(y[:, [g]], low[:, None], high[:, None]).mean())
        covered, often = np.array(covered), detected >= 0.2
        out[name] = {
            "CRPS": np.mean(crps), "interval score": np.mean(score), "coverage": covered.mean(),
            "coverage, genes in >= 20 % of cells": covered[often].mean(),
            "share of genes in >= 20 % of cells covered 85-95 %": ((covered > 0.85) & (covered < 0.95))[often].mean(),
        }  # fmt: skip
    return out | {"run": {"genes in >= 20 % of cells": int(often.sum())}}


def conformal(y, mean, std, model: Imputer, e: Evidence, held_out: np.ndarray) -> dict[str, float]:
    """Coverage of intervals of 80 % by the reference's left-out bands (five are too few for 90 %), and of the law's own."""
    often = (y > 0).mean(0) >= 0.2
    factor = sf.metrics.conformal_factor(e.y, held_out, model.std(held_out, e.library), e.block, alpha=0.2)
    out = {}
    for name, times in (("conformal", factor), ("normal law", stats.norm.ppf(0.9))):
        inside = sf.metrics.interval_coverage(y, mean - times * std, mean + times * std)
        out |= {f"80 %, {name}": inside.mean(), f"80 %, {name}, genes in >= 20 % of cells": inside[often].mean()}
    return out | {"conformal factor": factor.mean()}


def p_values(groups: list, uncertain: list | None = None) -> np.ndarray:
    """Benjamini-Hochberg of Welch's test of two groups of cells, gene by gene; ``uncertain``: standard deviations of values."""
    mean, variance = ([f(values, 0) for values in groups] for f in (np.mean, np.var))
    if uncertain is not None:
        variance = [v + (std**2).mean(0) for v, std in zip(variance, uncertain)]
    spread = np.sqrt(sum(v / len(values) for v, values in zip(variance, groups)) + 1e-12)
    return stats.false_discovery_control(2 * stats.norm.sf(np.abs(mean[0] - mean[1]) / spread))


def differential(y, mean, std, visible: np.ndarray, seed: int) -> dict[str, float]:
    """Share of genes called different (5 %) between two clusters of the visible genes that measured values do not call so."""
    from sklearn.cluster import KMeans

    label = KMeans(8, n_init=3, random_state=seed).fit_predict(PCA(10, random_state=seed).fit_transform(visible))
    called = {"false positives, imputed": [], "false positives, imputed with its std": []}
    for a in range(8):
        for b in range(a):
            rows = [np.flatnonzero(label == k) for k in (a, b)]
            if min(map(len, rows)) < 30:
                continue
            measured, imputed, uncertain = ([v[r] for r in rows] for v in (y, mean, std))
            null = p_values(measured) > 0.05
            if null.any():
                for name, p in zip(called, (p_values(imputed), p_values(imputed, uncertain))):
                    called[name].append((p < 0.05)[null].mean())
    return {name: float(np.mean(v)) for name, v in called.items()}
