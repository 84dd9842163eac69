"""Probes and simple methods that embeddings are compared with."""

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from torch import nn

import spatiaflow as sf
from spatiaflow.models.counts import log_likelihood
from spatiaflow.models.preprocess import scaled
from spatiaflow.models.regression import gene_pearson
from spatiaflow.train.cells import augmented

MIN_COUNTS, ALPHAS = 15, np.geomspace(1e1, 1e6, 11)


def expression(table, genes=None):
    """log1p of counts per 100; and which cells are scored."""
    counts = sparse.csr_matrix(table.X)
    total = np.asarray(counts.sum(1)).ravel()
    y = np.log1p(counts.multiply(100 / np.maximum(total, 1)[:, None]).toarray())
    return (y if genes is None else y[:, genes]), total >= MIN_COUNTS


def around(xy: np.ndarray, values: np.ndarray, k: int = 15) -> np.ndarray:
    """Mean of the k nearest other cells."""
    index = cKDTree(xy).query(xy, k=k + 1)[1][:, 1:]
    return np.mean([values[index[:, j]] for j in range(k)], 0)


def folds(xy: np.ndarray, n: int = 4) -> np.ndarray:
    """Contiguous bands along x."""
    return np.digitize(xy[:, 0], np.quantile(xy[:, 0], np.arange(1, n) / n))


class Probe:
    """Ridge regression from z-scored features; its penalty by leaving out bands of the training part."""

    def __init__(self, x, y, fold):
        self.mean, self.std = x.mean(0), x.std(0) + 1e-6
        z = (x - self.mean) / self.std
        score = np.zeros(len(ALPHAS))
        for f in np.unique(fold):
            for i, model in enumerate(self._fit(z[fold != f], y[fold != f], ALPHAS)):
                score[i] += np.nanmean(gene_pearson(y[fold == f], z[fold == f] @ model[0] + model[1]))
        self.inner = score.max() / len(np.unique(fold))
        ((self.w, self.b),) = self._fit(z, y, [ALPHAS[score.argmax()]])

    @staticmethod
    def _fit(z, y, alphas):
        mean_z, mean_y = z.mean(0), y.mean(0)
        a = z - mean_z
        values, axes = np.linalg.eigh(a.T @ a)
        projected = axes.T @ (a.T @ (y - mean_y))
        for alpha in alphas:
            w = axes @ (projected / (np.maximum(values, 0) + alpha)[:, None])
            yield w, mean_y - mean_z @ w

    def __call__(self, x):
        return (x - self.mean) / self.std @ self.w + self.b


def supervised_cnn(
    parts: dict, top: np.ndarray, seed: int, *, raw=False, augment=True, max_epochs: int = 30, patience: int = 4
) -> tuple[dict, int]:
    """Embeddings of a small CNN trained to predict all counts, with SPATIA's augmentation and crops, to convergence.

    The epoch is chosen on the last band of the training part. Intensities are scaled by the training part's; those of
    "PART, own" by the part's own. ``raw`` takes them as they are stored, of 8 bits. Returns embeddings and epochs.
    """
    crops = {name: sf.pp.crops(part, mpp=1) for name, part in parts.items()}
    tables = {name: part["table"] for name, part in parts.items()}
    own = {name: np.tile([0.0, 255.0], (c.shape[1], 1)) if raw else c.intensity() for name, c in crops.items()}
    counts = sparse.csr_matrix(tables["train"].X).astype(np.float32)
    y, scored = expression(tables["train"], top)
    band = folds(crops["train"].xy, 20) == 19
    rows, held = np.flatnonzero(scored & ~band), np.flatnonzero(scored & band)
    torch.manual_seed(seed)

    def block(i, j, stride):
        return nn.Sequential(nn.Conv2d(i, j, 3, stride, 1, bias=False), nn.BatchNorm2d(j), nn.ReLU())

    channels = crops["train"].shape[1]
    net = nn.Sequential(
        block(channels, 32, 2), block(32, 32, 1), block(32, 64, 2), block(64, 64, 1), block(64, 128, 2),
        block(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    head, log_theta = nn.Linear(128, counts.shape[1]), nn.Parameter(torch.zeros(counts.shape[1]))
    total = np.asarray(counts.sum(0)).ravel()
    head.bias.data = torch.from_numpy(np.log((total + 0.5) / total.sum())).float()
    weights = [*net.parameters(), *head.parameters(), log_theta]
    optimizer = torch.optim.AdamW(weights, 1e-3, weight_decay=0.02)
    rng, places = np.random.default_rng(seed), np.arange(channels)
    images = {name: c.read(np.arange(len(c))) for name, c in crops.items()}  # uint8, under 1 GB

    @torch.inference_mode()
    def embed(name, which, intensity):
        net.eval()
        chunks = np.array_split(which, max(1, len(which) // 512))
        return torch.cat([net(scaled(images[name][c], intensity, places)) for c in chunks])

    best, waited, kept = -1.0, 0, None
    for epoch in range(max_epochs):
        net.train()
        for g in optimizer.param_groups:  # halves when it stalls
            g["lr"] = 1e-3 * 0.5**waited
        for batch in np.array_split(rng.permutation(rows), len(rows) // 256):
            x = scaled(images["train"][batch], own["train"], places)
            with torch.autocast("cpu", torch.bfloat16):
                z = net(augmented(x, rng, channels) if augment else x)
            seen = torch.from_numpy(counts[batch].toarray())
            mean = seen.sum(1, keepdim=True) * torch.exp(head(z.float()).clamp(-15, 3))
            loss = -log_likelihood(seen, mean.clamp_min(1e-6), nn.functional.softplus(log_theta) + 0.01).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            predicted = np.log1p(100 * torch.exp(head(embed("train", held, own["train"])))).numpy()[:, top]
        score = np.nanmean(gene_pearson(y[held], predicted))
        print(f"CNN epoch {epoch} {score:.4f}", flush=True)
        if score > best:
            best, waited, kept = score, 0, {k: v.clone() for k, v in net.state_dict().items()}
        elif (waited := waited + 1) > patience:
            break
    net.load_state_dict(kept)
    out = {}
    for name, c in crops.items():
        out[name] = embed(name, np.arange(len(c)), own["train"]).numpy()
        out[f"{name}, own"] = embed(name, np.arange(len(c)), own[name]).numpy()
    return out, epoch + 1


class Classifier:
    """Logistic regression on z-scores; penalty and class weights by leaving one training mouse out."""

    def __init__(self, x, label, mouse):
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score

        self.mean, self.std = x.mean(0), x.std(0) + 1e-6
        z, scores = (x - self.mean) / self.std, {}
        for c in (0.003, 0.01, 0.03, 0.1, 0.3):
            for balance in (None, "balanced"):
                inner = []
                for m in np.unique(mouse):
                    fit = LogisticRegression(C=c, class_weight=balance, max_iter=300).fit(
                        z[mouse != m], label[mouse != m]
                    )
                    inner.append(f1_score(label[mouse == m], fit.predict(z[mouse == m]), average="macro"))
                scores[c, balance] = np.mean(inner)
        c, balance = max(scores, key=scores.get)
        self.inner = max(scores.values())
        self.model = LogisticRegression(C=c, class_weight=balance, max_iter=500).fit(z, label)

    def macro_f1(self, x, label):
        from sklearn.metrics import f1_score

        return f1_score(label, self.model.predict((x - self.mean) / self.std), average="macro")


def banksy(xy: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of 15 neighbours and length of the gradient over 30, weighed by distance (BANKSY, Singhal et al. 2024)."""
    distance, index = cKDTree(xy).query(xy, k=31)
    sums = []
    for k, turn in ((15, 0), (30, 1)):
        d, near = distance[:, 1 : k + 1], index[:, 1 : k + 1]
        weight = np.exp(-((d / np.median(d, 1, keepdims=True)) ** 2))
        weight = weight / weight.sum(1, keepdims=True)
        offset = (xy[near] - xy[:, None]) @ [1, 1j]
        weight = weight * np.exp(1j * turn * np.angle(offset))  # the first harmonic: which side it comes from
        sums.append(sum(weight[:, [j]] * values[near[:, j]] for j in range(k)))
    return sums[0].real, np.abs(sums[1])


def scvi_latent(data, train: np.ndarray, seed: int) -> np.ndarray:
    """Latent means (30) of scVI, fitted without labels to the training mice; the test mouse is only encoded."""
    import scvi

    scvi.settings.seed = seed
    fitted = data[train].copy()
    scvi.model.SCVI.setup_anndata(fitted)
    model = scvi.model.SCVI(fitted, n_latent=30, gene_likelihood="nb")
    model.train(max_epochs=400, early_stopping=True, accelerator="cpu", enable_progress_bar=False)
    return model.get_latent_representation(data.copy())
