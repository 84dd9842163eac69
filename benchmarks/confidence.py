"""Does the confidence of sf.tl.annotate mean what it says, on tissue that its labels do not come from?

    python benchmarks/confidence.py pancreas --store pancreas.zarr --cache features
    python benchmarks/confidence.py starmap

Labels are learned from one part (x < 16500 px; two mice) and carried to another (x > 19500; the third mouse), from genes beside
SPATIA's embedding as by default (pancreas), or from genes. Scored is the confidence of the label that was given: Brier score
and log score, proper and lower where confidence is right, beside (a) one confidence for all, the share that was right on
held-out labelled cells, and (b) the probability of the classifier as it comes, without temperature, its penalty chosen by
likelihood. Calibration error: mean distance of confidence to the share that is right, over ten bins of equal size. Labels of
the pancreas are clusters of the same counts, no gold.
"""

import argparse
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np

import results
import spatiaflow as sf
from spatiaflow.tl import _labels


def scores(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Of confidences (n) in labels that are right or not (n, bool)."""
    p = np.clip(confidence, 1e-6, 1 - 1e-6)
    bins = np.array_split(np.argsort(p, kind="stable"), 10)
    return {
        "Brier": np.mean((p - right) ** 2),
        "log score": -np.mean(np.where(right, np.log(p), np.log(1 - p))),
        "calibration error": sum(len(b) * abs(p[b].mean() - right[b].mean()) for b in bins) / len(p),
    }


def by_likelihood(x: np.ndarray, y: np.ndarray, groups: np.ndarray, method: str, seed: int) -> tuple:
    """In place of the probe of highest macro-F1 and its temperature: that of highest likelihood, as it comes."""
    truth, folds, found = np.searchsorted(np.unique(y), y), _labels._folds(y, groups, seed), {}
    for make in _labels._candidates(method, len(y)):
        held_out = _labels._held_out(make, x, y, folds)
        found[np.log(held_out[np.arange(len(y)), truth] + 1e-9).mean()] = make, 1.0, held_out
    return found[max(found)]


METHODS = ("annotate", "one confidence for all", "without temperature")


def judge(
    reference: ad.AnnData, query: ad.AnnData, use_rep: tuple[str, ...], seed: int, library_key=None
) -> dict[str, dict]:
    """Confidence of labels carried from reference to query, and of both simple alternatives."""
    options = {"labels": "label", "reference": reference, "use_rep": use_rep, "library_key": library_key}

    def annotated():
        found = sf.tl.annotate(query, threshold=0.0, random_state=seed, copy=True, **options)
        right = (found.obs["annotation"].astype(str) == query.obs["label"].astype(str)).to_numpy()
        return found.obs["annotation_confidence"].to_numpy(float), right, found.uns["annotation"]["held_out_accuracy"]

    ours, right, accuracy = annotated()
    with mock.patch.object(_labels, "_probe", by_likelihood):
        plain, plain_right, _ = annotated()
    judged = (ours, right), (np.full(len(ours), accuracy), right), (plain, plain_right)
    return {
        name: {"cells": len(query), "right": ok.mean(), "mean confidence": p.mean(), **scores(p, ok)}
        for name, (p, ok) in zip(METHODS, judged)
    }


def pancreas(a, table: results.Table) -> None:
    from transitions import embedded

    parts = {name: part["table"] for name, part in embedded(a.store, a.cache, ("train", "test")).items()}
    for name, cells in parts.items():
        label = cells.obs["cluster"].astype(str)
        # only cells without counts have no cluster
        parts[name] = cells[np.asarray(cells.X.sum(1)).ravel() >= 15].copy()
        parts[name].obs["label"] = label
    for seed in range(a.seeds):
        if table.lacks("pancreas", "test", seed, METHODS):
            some = np.random.default_rng(seed).permutation(parts["train"].n_obs)[:10_000]
            found = judge(parts["train"][np.sort(some)], parts["test"], ("X", "X_spatia"), seed)
            table.add_all("pancreas", "test", seed, found)


def starmap(a, table: results.Table) -> None:
    cells = sf.datasets.starmap_mpfc()
    cells.obs["label"], mouse = cells.obs["cell_type"].astype(str), cells.obs["mouse"].astype(str)
    for held in mouse.unique():
        train = (mouse != held).to_numpy()
        for seed in range(a.seeds):
            if table.lacks("starmap", held, seed, METHODS):
                table.add_all(
                    "starmap", held, seed, judge(cells[train].copy(), cells[~train].copy(), ("X",), seed, "mouse")
                )


COMMANDS = {"pancreas": pancreas, "starmap": starmap}


def parser() -> argparse.ArgumentParser:
    out = results.parser(__doc__)
    out.add_argument("data", choices=list(COMMANDS))
    out.add_argument("--store")
    out.add_argument("--cache", type=Path, help="folder that keeps embeddings of the parts")
    out.add_argument("--seeds", type=int, default=3)
    return out


if __name__ == "__main__":
    a = parser().parse_args()
    COMMANDS[a.data](a, results.Table("confidence", again=a.again))
