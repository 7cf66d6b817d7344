"""NLCG in the Hugging Face Trainer, with the line search.

    python examples/with_transformers.py

The Trainer takes an optimizer and a schedule, and calls step() without a loss. The line search gets it from set_loss(),
here from training_step(), which returns the loss of one micro-batch divided by their number: the Trainer's gradient
accumulation is then one step with the sum.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from fastnlcg import NLCG, OnlineLineSearch, warmup_cosine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithLineSearch(Trainer):
    """Tells the optimizer the loss that belongs to the accumulated gradients."""

    seen = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen = self.seen + loss.detach()
        if self.accelerator.sync_gradients:  # the step comes next
            optimizer.set_loss(self.seen)
            self.seen = 0.0
        return loss


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = [{"pixels": x, "labels": y} for x, y in zip(images.astype(np.float32) / 16, labels, strict=True)]
model = Digits()
optimizer = NLCG(model.parameters(), lr=0.01, line_search=OnlineLineSearch(), average_loss=True)
epochs, batch, micro = 10, 256, 64
schedule = warmup_cosine(optimizer, epochs * -(-len(data) // batch))
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    WithLineSearch(model, options, train_dataset=data, optimizers=(optimizer, schedule)).train()

did = optimizer.diagnostics()
with torch.no_grad():
    pixels = torch.from_numpy(images.astype(np.float32) / 16)
    loss = model(pixels, torch.from_numpy(labels))["loss"]
print(f"loss {loss.item():.4f} after {did.step} steps, line-search scale {did.ls_scale:.3f}")
