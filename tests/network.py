"""A small network to fit, for full-batch optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def problem(dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> tuple[nn.Module, Callable]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).to(device, dtype)
    x = torch.rand(100, 2, dtype=dtype, device=device)
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    return model, lambda: ((model(x) - y) ** 2).mean()


def closure_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])
