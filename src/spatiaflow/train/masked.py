"""Train the networks of an imputer, each without some blocks of the reference."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import nn

from spatiaflow._settings import progress
from spatiaflow.models.counts import log_normalize
from spatiaflow.models.imputer import Design
from spatiaflow.models.masked import Networks
from spatiaflow.models.slide import Slide

N_NETWORKS = 3
MIN_CELLS, MOST_CELLS = 8000, 40_000  # of the reference: fewer are too few to help, of more a sample is taken
MOST_GENES = 2000  # to predict; for more the last layer would take minutes
STEPS, EPOCHS, BATCH, RATE = 2500, 30, 128, 2e-3  # at most so many steps and epochs
VISIBLE = 0.5  # least share of the inputs that a cell shows in training


def fit_networks(
    design: Design, slides: list[Slide], genes: list[str], blocks: list[np.ndarray], seed: int
) -> Networks | None:
    """Train three networks, each without a third of the blocks; None where cells are few or genes are many.

    In each step a random part of a cell's inputs is hidden. The loss is the mean squared error of what is hidden: of these
    inputs, and of the genes that are no inputs.
    """
    n = sum(map(len, slides))
    outputs = [*design.inputs, *(g for g in genes if g not in set(design.inputs))]
    groups = [block % N_NETWORKS for block in blocks]
    if n < MIN_CELLS or len(outputs) > MOST_GENES or len(np.unique(np.concatenate(groups))) < N_NETWORKS:
        return None
    x, y, group = _sampled(design, slides, outputs, groups, np.random.default_rng(seed))
    mean, square = (np.asarray(v.mean(0)).ravel() for v in (y, y.multiply(y)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = Networks(design, outputs, N_NETWORKS)
        networks.unit.fill_(float(x.std()))
        networks.centre.copy_(torch.from_numpy(mean))
        # as the columns of the ridge: by the root of the standard deviation, so that rare genes do not weigh most
        networks.spread.copy_(torch.from_numpy(np.maximum(square - mean**2, 1e-6) ** 0.25))
        x /= float(networks.unit)
        for i, network in enumerate(networks.members):
            _fit(network.train(), networks, x, y, np.flatnonzero(group != i), seed + i, f"network {i + 1}/{N_NETWORKS}")
    return networks.half().float().eval()  # as a file keeps it


def _sampled(
    design: Design, slides: list[Slide], outputs: list[str], groups: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Columns without the kernel, targets (log1p) and group of at most 40,000 cells."""
    share = min(1.0, MOST_CELLS / sum(map(len, slides)))
    width, xs, ys, kept = int((design.branch != 2).sum()), [], [], []
    for slide, group in zip(slides, groups):
        targets, start = log_normalize(slide.align(outputs).counts, slide.library, design.target_sum), 0
        for columns in design.columns(slide):
            rows = start + np.flatnonzero(rng.random(len(columns)) < share)
            xs.append(columns[rows - start, :width])
            ys.append(targets[rows])
            kept.append(group[rows])
            start += len(columns)
    return np.concatenate(xs), sparse.vstack(ys, format="csr"), np.concatenate(kept)


def _fit(
    network: nn.Module, networks: Networks, x: np.ndarray, y: sparse.csr_matrix, rows: np.ndarray, seed: int, name: str
) -> None:
    """Train one network on some rows."""
    rng, n_inputs, size = np.random.default_rng(seed), networks.n_inputs, min(BATCH, len(rows))
    n_steps = min(STEPS, -(-EPOCHS * len(rows) // size))
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, n_steps)
    for _ in progress(range(n_steps), name, unit="step"):
        some = rows[rng.integers(0, len(rows), size)]
        target = (torch.from_numpy(y[some].toarray()) - networks.centre) / networks.spread
        shown = rng.random((size, n_inputs)) < rng.uniform(VISIBLE, 1, (size, 1))
        visible = torch.from_numpy(shown.astype(np.float32))
        error = (network(torch.from_numpy(x[some]), visible) - target) ** 2
        loss = (error[:, :n_inputs] * (1 - visible)).sum() / (1 - visible).sum().clamp_min(1)
        if error.shape[1] > n_inputs:
            loss = loss + error[:, n_inputs:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
