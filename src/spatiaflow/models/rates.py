"""Count regressions: rates of genes from features, with the library size as offset and one level for each slide.

Because every training slide has its own level for each gene, only the pattern inside slides is learned. Differences between
slides, which are mostly between donors, are left to the joint law.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spatiaflow.models.counts import MAX_THETA, log_likelihood

PENALTIES = (10.0, 30.0, 100.0, 300.0, 1000.0)  # of squared coefficients, in log-likelihood summed over spots
HIDDEN = 64
MAX_STEPS = 60  # of the linear regression


@dataclass(frozen=True)
class Rates:
    """log rate = level + coefficients, or a perceptron with one hidden layer, of standardised features.

    Attributes
    ----------
    level
        Mean over training slides of the log rate at the mean features, genes.
    weights, biases
        Of each layer: outputs x inputs, and outputs. The last layer has no bias.
    """

    level: np.ndarray
    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Log rates, n x genes, float32."""
        h = np.asarray(features, np.float32)
        for weight, bias in zip(self.weights[:-1], self.biases):
            h = h @ weight.T + bias
            h = h / (1 + np.exp(-h))  # SiLU
        return h @ self.weights[-1].T + self.level.astype(np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, by name."""
        named = {f"weight{i}": w for i, w in enumerate(self.weights)} | {
            f"bias{i}": b for i, b in enumerate(self.biases)
        }
        return {"level": self.level} | named

    @classmethod
    def of(cls, tensors: dict[str, np.ndarray]) -> Rates:
        """From what :meth:`tensors` gave."""
        weights = tuple(tensors[f"weight{i}"] for i in range(sum(name.startswith("weight") for name in tensors)))
        return cls(tensors["level"], weights, tuple(tensors[f"bias{i}"] for i in range(len(weights) - 1)))


class _Levels(nn.Module):
    """Levels of slides, dispersions of genes, and the negative binomial loss that both regressions share."""

    def __init__(self, counts: Tensor, library: Tensor, slide: Tensor, pattern: nn.Module):
        super().__init__()
        n_slides, n_genes = int(slide.max()) + 1, counts.shape[1]
        start = torch.stack([
            torch.log((counts[slide == s].sum(0) + 0.5) / (library[slide == s].sum() + 1)) for s in range(n_slides)
        ])  # fmt: skip
        self.level, self.log_theta = nn.Parameter(start), nn.Parameter(torch.zeros(n_genes))
        self.pattern = pattern

    def loss(self, x: Tensor, counts: Tensor, library: Tensor, slide: Tensor) -> Tensor:
        """Negative log-likelihood summed over genes, rows."""
        log_rate = torch.clamp(self.level[slide] + self.pattern(x), -25, 0)
        theta = torch.exp(self.log_theta).clamp(1e-2, MAX_THETA)
        return -log_likelihood(counts, library[:, None] * torch.exp(log_rate), theta).sum(1)

    def fitted(self, share: Tensor | None) -> Rates:
        layers = [m for m in self.pattern.modules() if isinstance(m, nn.Linear)]
        weights = tuple(m.weight.detach().numpy().copy() for m in layers)
        level = self.level.detach()
        level = level.mean(0) if share is None else share @ level
        return Rates(level.numpy(), weights, tuple(m.bias.detach().numpy().copy() for m in layers[:-1]))


Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # features n x F, counts n x genes, library n


def _float(share: np.ndarray | None) -> Tensor | None:
    return None if share is None else torch.from_numpy(np.asarray(share, np.float32))


def _stacked(parts: list[Part]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, counts = (torch.from_numpy(np.concatenate([p[i] for p in parts]).astype(np.float32)) for i in (0, 1))
    library = torch.from_numpy(np.concatenate([np.maximum(p[2], 1) for p in parts]).astype(np.float32))
    return (
        x,
        counts,
        library,
        torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(p[0]) for p in parts])),
    )


def fit_linear(parts: list[Part], penalty: float, share: np.ndarray | None = None) -> Rates:
    """Negative binomial regression with a penalty on squared coefficients.

    Parameters
    ----------
    parts
        One for each slide.
    share
        Weight of each slide's level in the level of the prediction; equal when None.
    """
    x, counts, library, slide = _stacked(parts)
    centre = torch.stack([x[slide == s].mean(0) for s in range(len(parts))])  # else levels and coefficients compete
    x = x - centre[slide]
    pattern = nn.Linear(x.shape[1], counts.shape[1], bias=False)
    nn.init.zeros_(pattern.weight)
    model = _Levels(counts, library, slide, pattern)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=MAX_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model.loss(x, counts, library, slide).sum() + 0.5 * penalty * (pattern.weight**2).sum()) / len(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.level.sub_(centre @ pattern.weight.T)
    return model.fitted(_float(share))


def fit_perceptron(
    parts: list[Part], held_out: list[Part], share: np.ndarray | None = None, *, seed: int = 0, max_epochs: int = 60,
    patience: int = 8,
) -> Rates:  # fmt: skip
    """Negative binomial perceptron, stopped where the pattern of held-out slides is predicted best."""
    torch.manual_seed(seed)
    x, counts, library, slide = _stacked(parts)
    v_x, v_counts, v_library, v_slide = _stacked(held_out)
    last = nn.Linear(HIDDEN, counts.shape[1], bias=False)
    nn.init.normal_(last.weight, std=1e-2)
    pattern = nn.Sequential(nn.Dropout(0.1), nn.Linear(x.shape[1], HIDDEN), nn.SiLU(), nn.Dropout(0.3), last)
    model = _Levels(counts, library, slide, pattern)
    optimizer = torch.optim.AdamW([
        {"params": pattern.parameters(), "weight_decay": 0.1}, {"params": [model.level, model.log_theta], "weight_decay": 0.0},
    ], lr=3e-3, fused=True)  # fmt: skip
    best, kept, since = np.inf, model.fitted(_float(share)), 0
    for _ in range(max_epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            model.loss(x[rows], counts[rows], library[rows], slide[rows]).mean().backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            score = pattern_loss(pattern(v_x), v_counts, v_library, v_slide, torch.exp(model.log_theta))
        best, kept, since = (score, model.fitted(_float(share)), 0) if score < best else (best, kept, since + 1)
        if since >= patience:
            break
    return kept


def pattern_loss(pattern: Tensor, counts: Tensor, library: Tensor, slide: Tensor, theta: Tensor) -> float:
    """Negative log-likelihood per spot when each slide's level of each gene is given to the prediction."""
    total = 0.0
    for s in range(int(slide.max()) + 1):
        rows = slide == s
        mean = library[rows, None] * torch.exp(torch.clamp(pattern[rows], -15, 15))
        mean = mean * ((counts[rows].sum(0) + 0.5) / (mean.sum(0) + 0.5))
        total -= float(log_likelihood(counts[rows], mean, theta.clamp(1e-2, MAX_THETA)).sum())
    return total / len(counts)


def choose_penalty(groups: list[list[Part]]) -> float:
    """Penalty of the linear regression by leaving out one group of slides at a time."""
    scores = np.zeros(len(PENALTIES))
    for i, held_out in enumerate(groups):
        rest = [part for j, group in enumerate(groups) if j != i for part in group]
        x, counts, library, slide = _stacked(held_out)
        for p, penalty in enumerate(PENALTIES):
            rates = fit_linear(rest, penalty)
            theta = torch.ones(counts.shape[1])
            scores[p] += pattern_loss(torch.from_numpy(rates(x.numpy()) - rates.level), counts, library, slide, theta)
    return PENALTIES[int(scores.argmin())]
