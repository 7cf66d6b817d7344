"""The model, its runs on one process and on many ranks, and how they are compared: for tests that use ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, OnlineLineSearch
from fastnlcg.tensors.ranks import _GATHER
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

STEPS = 12


KINDS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.01},
    "adam_pr": {"lr": 0.01, "update": "polak_ribiere"},
    "adam_decay": {"lr": 0.01, "weight_decay": 0.1},
    "bfgs": {"lr": 0.02, "preconditioner": "bfgs"},
    "bfgs_pr": {"lr": 0.02, "preconditioner": "bfgs", "update": "polak_ribiere", "weight_decay": 0.01},
    "adam_clip": {"lr": 0.01, "max_grad_norm": 0.3},
    "bfgs_clip": {"lr": 0.02, "preconditioner": "bfgs", "max_grad_norm": 0.3, "weight_decay": 0.01},
    "none": {"lr": 0.02, "preconditioner": None},
    "none_pr": {"lr": 0.02, "preconditioner": None, "update": "polak_ribiere"},
    "search": {"lr": 0.05, "preconditioner": "bfgs", "line_search": (0.0, -0.0, 0.2, 0.1)},
}


def optimizer_of(params: Any, kind: str, **more: Any) -> NLCG:
    options = {**KINDS[kind], **more}
    if "line_search" in options:
        options["line_search"] = OnlineLineSearch(*options["line_search"])
    return NLCG(params, **options)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Dimensions that 2 and 3 ranks do not divide; the last bias has one element, and is empty on all ranks but one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(12, 7, generator=generator).to(dtype)
    return x, x[:, :1] * x[:, 1:2] + 0.3


def share(x: Tensor, world: int, rank: int) -> Tensor:
    return x.chunk(world)[rank]


def loss_of(net: nn.Module, t: int, world: int = 1, rank: int = 0) -> Tensor:
    x, y = batch(t, next(net.parameters()).dtype)
    return (net(share(x, world, rank)) - share(y, world, rank)).square().mean()


def alone(kind: str, steps: int = STEPS, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[list[Tensor], NLCG]:
    """One process on the joined batch."""
    net = model(dtype)
    optimizer = optimizer_of(net.parameters(), kind, **more)
    for t in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, t)
        loss.backward()
        optimizer.step(loss=loss.detach())
    return [p.detach().clone() for p in net.parameters()], optimizer


def train(net: nn.Module, optimizer: NLCG, begin: int, end: int) -> None:
    for t in range(begin, end):
        optimizer.zero_grad()
        loss = loss_of(net, t, dist.get_world_size(), dist.get_rank())
        loss.backward()
        optimizer.step(loss=loss.detach())


def whole(params: Any) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def compare(found: list[Tensor], expected: list[Tensor], start: list[Tensor], tolerance: float) -> None:
    """Relative to the parameters, and a move that is there to compare."""
    for a, b, before in zip(found, expected, start, strict=True):
        assert torch.linalg.vector_norm(b - before) > 1e-3 * torch.linalg.vector_norm(before)
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)


def compare_diagnostics(a: Any, b: Any, tolerance: float) -> None:
    for name in ("beta", "rz", "ys", "shs", "grad_norm", "direction_norm", "cosine", "ls_scale"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance, abs=1e-12), name
    assert (a.step, a.updated, a.skipped_steps) == (b.step, b.updated, b.skipped_steps)
    assert a.total_norm == (b.total_norm and pytest.approx(b.total_norm, rel=tolerance))
    assert a.clip == pytest.approx(b.clip, rel=tolerance)


class Gathers:
    """Counts the exchanges of the steps inside."""

    def __enter__(self) -> Gathers:
        self.count, self.original = 0, getattr(dist, _GATHER)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.original(*args, **kwargs)

        setattr(dist, _GATHER, counted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(dist, _GATHER, self.original)


def sharded(mesh_shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = model(dtype)
    names = None if mesh_shape is None or len(mesh_shape) == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),), mesh_dim_names=names)
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def shapes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in ((5, 6), (9,), (3, 7), (11,), (3, 2), (4,))]


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [(k + 1) * p + 0.2 * torch.randn(p.shape, generator=generator) for k, p in enumerate(params)]
