"""A flow-matching head for hidden genes, and its deterministic twin: what ``tl.impute_genes`` is compared with.

The network is a perceptron that reads a cell's other genes, those of its neighbours and its image, and, along the straight path
from standard normal noise to expression, where the path stands; it predicts the velocity. The twin is the same network that is
shown no path and predicts expression at once. Training stops where left-out blocks of tissue are predicted best.
"""

import numpy as np
import torch
from torch import nn

from spatiaflow.models.flow import integrate, interpolate, time_features

WIDTH, BATCH, STEPS, EVERY, PATIENCE, DROP, CHUNK = 512, 256, 2000, 100, 4, 0.2, 2048
STARTS, EVALUATIONS = 4, 10  # of a mean; of a draw


class Head(nn.Module):
    """Velocity (n x genes, standardised) from inputs (n x d) and the state of the path; of the twin, expression."""

    def __init__(self, d: int, n_genes: int, flow: bool):
        super().__init__()
        self.flow, self.n_genes = flow, n_genes
        self.given = nn.Linear(d, WIDTH)
        self.path = nn.Linear(n_genes + 32, WIDTH)
        self.body = nn.Sequential(
            nn.GELU(), nn.Dropout(DROP), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(DROP), nn.Linear(WIDTH, n_genes)
        )  # fmt: skip
        self.centre, self.spread = 0.0, 1.0

    def forward(
        self, given: torch.Tensor, y_t: torch.Tensor | None = None, t: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``given``: what :attr:`given` made of the inputs, once for all times."""
        if self.flow:
            given = given + self.path(torch.cat([y_t, time_features(t, 32)], 1))
        return self.body(given)

    def loss(self, x: torch.Tensor, y: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        given = self.given(x)
        if not self.flow:
            return ((self(given) - y) ** 2).mean()
        t, noise = torch.rand(len(y), generator=g), torch.randn(y.shape, generator=g)
        return ((self(given, interpolate(noise, y, t[:, None]), t) - (y - noise)) ** 2).mean()

    @torch.inference_mode()
    def draws(self, x: np.ndarray, n: int) -> np.ndarray:
        """Draws of expression by the flow, n x cells x genes."""
        self.eval()
        g, out = torch.Generator().manual_seed(0), np.empty((n, len(x), self.n_genes), np.float32)
        for s in range(0, len(x), CHUNK):
            given = self.given(torch.from_numpy(x[s : s + CHUNK]))

            def velocity(y, t, given=given):
                return self(given, y, torch.full((len(y),), t))

            for i in range(n):
                noise = torch.randn(len(given), self.n_genes, generator=g)
                out[i, s : s + CHUNK] = integrate(velocity, noise, EVALUATIONS, method="heun").numpy()
        return np.maximum(out * self.spread + self.centre, 0)

    @torch.inference_mode()
    def mean(self, x: np.ndarray) -> np.ndarray:
        """Expected expression. Of a flow it is where the path seems to end at its start, which no noise of draws blurs."""
        self.eval()
        g, out = torch.Generator().manual_seed(0), np.empty((len(x), self.n_genes), np.float32)
        for s in range(0, len(x), CHUNK):
            given = self.given(torch.from_numpy(x[s : s + CHUNK]))
            if self.flow:  # noise says nothing of expression: y_0 + v(y_0, 0) = E[y_1 | inputs] whatever y_0
                starts = [torch.randn(len(given), self.n_genes, generator=g) for _ in range(STARTS)]
                ends = [y + self(given, y, torch.zeros(len(y))) for y in starts]
                out[s : s + CHUNK] = torch.stack(ends).mean(0).numpy()
            else:
                out[s : s + CHUNK] = self(given).numpy()
        return np.maximum(out * self.spread + self.centre, 0)


def fit_head(x: np.ndarray, y: np.ndarray, block: np.ndarray, flow: bool, seed: int) -> Head:
    """Fit a head to inputs (n x d) and expression (n x genes); a fifth of the blocks say when to stop."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    names = rng.permutation(np.unique(block))
    held_out = np.isin(block, names[: max(1, len(names) // 5)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(x.shape[1], y.shape[1], flow)
    head.centre, head.spread = y.mean(0), np.maximum(y.std(0), 1e-3)
    x, y = (torch.from_numpy(np.asarray(v, np.float32)) for v in (x, (y - head.centre) / head.spread))
    train, test = (np.flatnonzero(v) for v in (~held_out, held_out))
    test = rng.permutation(test)[:4000]
    optimizer = torch.optim.AdamW(head.parameters(), 5e-4, weight_decay=0.05)
    best, kept, waited = np.inf, None, 0
    for step in range(1, STEPS + 1):
        head.train()
        rows = rng.choice(train, BATCH)
        optimizer.zero_grad()
        head.loss(x[rows], y[rows], g).backward()
        optimizer.step()
        if step % EVERY == 0:
            head.eval()
            with torch.no_grad():
                loss = float(head.loss(x[test], y[test], torch.Generator().manual_seed(1)))
            waited += 1
            if loss < best:
                best, waited, kept = loss, 0, {k: v.clone() for k, v in head.state_dict().items()}
            if waited == PATIENCE:
                break
    head.load_state_dict(kept)
    return head.eval()
