"""Networks that impute genes from whichever others are visible: the nonlinear member beside the ridge of an imputer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from spatiaflow.models.imputer import Design

WIDTH, DROPOUT = 256, 0.3


class MaskedNetwork(nn.Module):
    """A perceptron on the columns of a design. Those of genes that are not visible are 0, and it is told which these are.

    Parameters
    ----------
    n_inputs
        Genes that it reads: of the cell itself, and means over each of ``n_near`` neighbourhoods.
    n_other
        Further columns that are never hidden: the library size, and features of the image.
    n_outputs
        Genes that it predicts.
    """

    def __init__(self, n_inputs: int, n_near: int, n_other: int, n_outputs: int):
        super().__init__()
        self.n_inputs, self.n_groups = n_inputs, 1 + n_near
        self.layers = nn.Sequential(
            nn.Linear(n_other + n_inputs * (self.n_groups + 1), WIDTH), nn.GELU(), nn.Dropout(DROPOUT),
            nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, n_outputs),
        )  # fmt: skip

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Predict (cells x outputs) from columns (cells x columns) and what is visible (cells x inputs, 0 or 1)."""
        end = 1 + self.n_inputs * self.n_groups
        genes = x[:, 1:end].unflatten(1, (self.n_groups, self.n_inputs)) * visible[:, None]
        return self.layers(torch.cat([x[:, :1], genes.flatten(1), x[:, end:], visible], 1))


class Networks(nn.Module):
    """Networks that each were trained without some blocks of the reference. Their mean predicts other cells.

    Attributes
    ----------
    genes
        Genes that are predicted: the inputs, then the others.
    unit
        By which columns are divided.
    centre, spread
        Of the predicted genes, log1p.
    """

    unit: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, design: Design, genes: Sequence[str], n: int):
        super().__init__()
        self.genes = list(genes)
        self.place = {gene: i for i, gene in enumerate(self.genes)}
        self.n_inputs, self.n_columns = len(design.inputs), int((design.branch != 2).sum())
        n_near = int((design.branch == 1).sum()) // self.n_inputs
        n_other = self.n_columns - self.n_inputs * (1 + n_near)
        self.members = nn.ModuleList(MaskedNetwork(self.n_inputs, n_near, n_other, len(genes)) for _ in range(n))
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("centre", torch.zeros(len(genes)))
        self.register_buffer("spread", torch.ones(len(genes)))
        self.eval()

    @torch.inference_mode()
    def predict(
        self, x: np.ndarray, visible: np.ndarray, genes: Sequence[str], member: int | None = None
    ) -> np.ndarray:
        """Predict some genes (cells x genes, log1p), by all networks or by one.

        Parameters
        ----------
        x
            Columns of the design, cells x columns; those of the kernel are not read.
        visible
            Which inputs are visible, bool; the same for all cells.
        """
        columns = torch.from_numpy(np.ascontiguousarray(x[:, : self.n_columns], np.float32)) / self.unit
        mask = torch.from_numpy(visible.astype(np.float32)).expand(len(x), -1)
        taken = list(self.members) if member is None else [self.members[member]]
        at = torch.tensor([self.place[gene] for gene in genes], dtype=torch.long)
        out = sum(network(columns, mask)[:, at] for network in taken) / len(taken)
        return (out * self.spread[at] + self.centre[at]).numpy()

    def hidden(self, x: np.ndarray, seen: np.ndarray, folds: list[np.ndarray], member: int | None = None) -> np.ndarray:
        """Predict inputs (cells x inputs, log1p) that are hidden with their fold from those left; NaN: in no fold."""
        out = np.full((len(x), self.n_inputs), np.nan, np.float32)
        for fold in folds:
            left = seen.copy()
            left[fold] = False
            out[:, fold] = self.predict(x, left, [self.genes[i] for i in fold], member)
        return out
