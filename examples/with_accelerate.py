"""NLCG in a Hugging Face accelerate loop, with the line search.

    python examples/with_accelerate.py          or: accelerate launch examples/with_accelerate.py

accelerate wraps the optimizer, and the wrapped step() takes no loss=. Two ways lead to the line search: a closure that
returns the loss, as below, or optimizer.optimizer.set_loss(loss) before the step, which also works if a GradScaler
(mixed_precision="fp16") takes the step. Under data parallelism average_loss=True makes all ranks decide alike.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from fastnlcg import NLCG, OnlineLineSearch, warmup_cosine
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.from_numpy(images.astype(np.float32) / 16), torch.from_numpy(labels))
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = NLCG(net.parameters(), lr=0.01, line_search=OnlineLineSearch(), average_loss=True)
epochs = 10
loader = DataLoader(data, batch_size=256, shuffle=True, generator=torch.Generator().manual_seed(0))
schedule = warmup_cosine(optimizer, epochs * -(-len(loader) // 2))
net, wrapped, loader = accelerator.prepare(net, optimizer, loader)

for _ in range(epochs):
    for inputs, targets in loader:
        with accelerator.accumulate(net):
            wrapped.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), targets)
            accelerator.backward(loss)
            # Without effect until the gradients are accumulated; the loss is then that of the last micro-batch.
            wrapped.step(lambda loss=loss: loss.detach())
            if accelerator.sync_gradients:
                schedule.step()

did = optimizer.diagnostics()
accelerator.print(f"loss {loss.item():.4f} after {did.step} steps, line-search scale {did.ls_scale:.3f}")
