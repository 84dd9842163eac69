"""A training of a second for the tests: a network with dropout, whose weights depend on every draw."""

import lightning as L
import torch
from torch.utils.data import Dataset

from spatiaflow.train.fit import fit


class Batches(Dataset):
    epoch = 0

    def __len__(self):
        return 3

    def __getitem__(self, b):
        if b >= len(self):
            raise IndexError(b)
        return torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * self.epoch + b))


class Noisy(L.LightningModule):
    """A network with dropout, so that its weights depend on the state of the random generator at every step."""

    def __init__(self, dies_in: int | None = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.dies_in, self.history = dies_in, {}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

    def training_step(self, batch, i):
        if self.current_epoch == self.dies_in and i == 1:
            raise KeyboardInterrupt
        return ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

    def validation_step(self, batch, _):
        self.log("val_loss", ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean(), batch_size=16)


def run(module, folder, resume=False, patience=9, max_epochs=5):
    fit(
        module, Batches(), Batches(), max_epochs=max_epochs, patience=patience, monitor="val_loss", seed=3, description="",
        resume=resume, checkpoint_dir=folder,
    )  # fmt: skip
    return torch.cat([p.detach().ravel() for p in module.parameters()])
