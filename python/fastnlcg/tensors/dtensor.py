"""DTensors: the shard of this rank, and its place in the whole parameter. Imports no other module of the package."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor. Does not import their module: if it has not been imported, there are no DTensors."""
    module = None if type(t) in _PLAIN else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def memory(t: Tensor) -> Tensor:
    """The tensor of this rank's elements: ``t`` itself, or the shard of a DTensor. The same object at every call."""
    if not is_sharded(t):
        return t
    shard: Tensor = t._local_tensor  # type: ignore[attr-defined]  # to_local() makes a new view, 2 us, at every call
    return shard if type(shard) is Tensor else shard.wait() if hasattr(shard, "wait") else shard


def as_like(shard: Tensor, p: Tensor) -> Tensor:
    """``shard`` as a DTensor with the placements of ``p``; ``shard`` itself for a plain ``p``."""
    if not is_sharded(p):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def shard_like(value: Tensor, p: Tensor) -> Tensor:
    """This rank's part of ``value``, a DTensor or plain tensor of the shape of the whole ``p``."""
    if not is_sharded(p):
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(memory(p).device), mesh, placements)
    elif value.device_mesh != mesh or value.placements != placements:  # type: ignore[attr-defined]
        value = value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return memory(value)


def place_of(p: Tensor, process_group: Any) -> tuple[int, int, int]:
    """The place of this rank's elements in the whole parameter, as (begin, run, skip): element l of the shard has the
    number ``begin + l + l // run * skip`` (run 0: ``begin + l``). Random bits depend on that number, so that replicas
    draw the same bits and shards different ones. The place of plain shards is unknown, so every rank gets numbers of
    its own."""
    if not is_sharded(p):
        return (0 if process_group is None else dist.get_rank(process_group) << 40), 0, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    inner = [math.prod(p.shape[k + 1 :]) for k in range(p.dim())]
    begin = sum(o * i for o, i in zip(offset, inner, strict=True))
    cut = [k for k in range(1, p.dim()) if local[k] != p.shape[k]]
    if len(cut) != 1:  # with more cuts one run is not enough; the numbers of shards then overlap, which is harmless
        return begin, 0, 0
    run = local[cut[0]] * inner[cut[0]]
    return begin, run, p.shape[cut[0]] * inner[cut[0]] - run
