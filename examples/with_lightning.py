"""NLCG in Lightning, with the line search.

    python examples/with_lightning.py

Lightning hands the optimizer a closure that returns the training step's loss, which is all the line search needs. Under
data parallelism (devices=N) average_loss=True makes all ranks decide alike.
"""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from fastnlcg import NLCG, OnlineLineSearch, warmup_cosine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = NLCG(self.parameters(), lr=0.01, line_search=OnlineLineSearch(), average_loss=True)
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0, verbose=False)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.from_numpy(images.astype(np.float32) / 16), torch.from_numpy(labels))
model = Digits()
trainer = lightning.Trainer(
    max_epochs=10,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(data, batch_size=256, shuffle=True))

did = trainer.optimizers[0].diagnostics()
with torch.no_grad():
    loss = nn.functional.cross_entropy(model.net(data.tensors[0]), data.tensors[1])
print(f"loss {loss.item():.4f} after {did.step} steps, line-search scale {did.ls_scale:.3f}")
