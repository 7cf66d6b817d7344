"""The large-batch recipe on one device: virtual batching.

    python examples/large_batch.py

A batch that does not fit in memory is passed through the network in micro-batches, whose gradients add up to that of
the mean over the batch; then NLCG takes one step. Few steps are left, so each counts: warm up over a fifth of them,
decay to 1 % of the peak, and look for the peak learning rate on a grid of factors of 3 (a third to a tenth of AdamW's).
"""

from __future__ import annotations

import torch
from fastnlcg import NLCG, warmup_cosine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

EPOCHS, BATCH, MICRO = 60, 1536, 128


def train(lr: float, x: Tensor, y: Tensor) -> float:
    """The mean loss over the last epochs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = NLCG(model.parameters(), lr)
    schedule = warmup_cosine(optimizer, total_steps=EPOCHS)
    losses = []
    for _ in range(EPOCHS):
        batch = torch.randperm(len(x))[:BATCH]
        optimizer.zero_grad()
        total = 0.0
        for micro in batch.split(MICRO):
            loss = cross_entropy(model(x[micro]), y[micro]) * (len(micro) / BATCH)  # the mean over the batch
            loss.backward()  # adds to the gradients
            total += loss.item()
        optimizer.step()
        schedule.step()
        losses.append(total)
    return sum(losses[-5:]) / 5


images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
found = {lr: train(lr, x, y) for lr in (0.001, 0.003, 0.01, 0.03, 0.1)}
for lr, loss in found.items():
    print(f"peak lr {lr:<6g} loss {loss:.4f}")
print(f"best: {min(found, key=found.__getitem__):g}")
