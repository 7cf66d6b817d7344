"""Parameters spread over ranks: which ranks hold the rest of them, and the sums over all.

The engine is torch.distributed. Between two passes every rank gathers one small row of doubles from every other
(``all_gather_single``, 80 bytes per rank), and the native side adds the rows up in the order of ranks. So every rank
has the same sums to the bit, whatever algorithm carried them: an all-reduce may add in another order in another group,
and the replicas of HSDP would drift apart.

=====================  ===========================================  ===================================================
parameters             ranks whose sums are added                    found by
=====================  ===========================================  ===================================================
DTensor (FSDP2, HSDP,  those along the mesh dimensions on which      the placements. A parameter replicated along such a
tensor parallel)       some parameter is a ``Shard``, never those    dimension is counted on its first rank
                       along a ``Replicate``
plain shards (FSDP1,   all of the group                              ``process_group=``
ZeRO)
plain (DDP)            none: every rank has the whole sum            ``average_loss=True`` averages the loss
=====================  ===========================================  ===================================================
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnlcg import _native

_PLAIN = (Tensor, torch.nn.Parameter)
# torch 2.13 has renamed it, and warns of the old name
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor. Does not import them: where nobody has, there are none."""
    module = None if type(t) in _PLAIN else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def memory(t: Tensor) -> Tensor:
    """This rank's elements: ``t`` itself, or the shard of a DTensor. The same object at every call."""
    if not is_sharded(t):
        return t
    shard: Tensor = t._local_tensor  # type: ignore[attr-defined]  # to_local() makes a new view, 2 us, at every call
    return shard if type(shard) is Tensor else shard.wait() if hasattr(shard, "wait") else shard


def as_like(shard: Tensor, p: Tensor) -> Tensor:
    """``shard`` as a DTensor placed as ``p``; as it is for a plain ``p``."""
    if not is_sharded(p):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        _from_offset_0(shard),
        p.device_mesh,  # type: ignore[attr-defined]
        p.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def _from_offset_0(t: Tensor) -> Tensor:
    """The same memory, from the begin of a storage: torch 2.13 cannot deepcopy a DTensor whose shard has an offset."""
    begin = t.storage_offset() * t.element_size()
    storage = t.untyped_storage()[begin : begin + t.numel() * t.element_size()]
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, t.shape, t.stride())


def shard_like(value: Tensor, p: Tensor) -> Tensor:
    """This rank's part of ``value``, a tensor of ``p``'s shape: a DTensor or whole."""
    if not is_sharded(p):
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    if not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(memory(p).device), mesh, placements)
    elif value.device_mesh != mesh or value.placements != placements:  # type: ignore[attr-defined]
        value = value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return memory(value)


@dataclass
class Ranks:
    """Those that take a step together."""

    group: Any
    """a process group; rows come in its order"""
    counted: list[bool]
    """by rank: whether its sums are added to this rank's"""
    every_decision: bool
    """False: only the loss is exchanged, once a step"""
    uncounted: frozenset[int]
    """parameters, by index, that another rank counts: copies"""

    def connect(self, native: _native.Step, elements: int, device: torch.device) -> None:
        """Lets the native side exchange rows with the other ranks. ``elements``: of its state, that are counted."""
        k = _native.row_doubles
        mine = torch.zeros(k, dtype=torch.float64, device=device)
        all_rows = torch.zeros(len(self.counted) * k, dtype=torch.float64, device=device)
        counted = torch.tensor(self.counted, dtype=torch.float64, device=device)
        group = self.group

        def gather() -> None:
            getattr(dist, _GATHER)(all_rows, mine, group=group)

        rows = _native.Buffer(mine), _native.Buffer(all_rows), _native.Buffer(counted)
        native.set_exchange(*rows, elements, self.every_decision, gather)

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Sums over the counted ranks. Every rank has to call it."""
        mine = torch.tensor(values, dtype=torch.float64, device=device)
        rows = torch.empty(len(self.counted) * len(values), dtype=torch.float64, device=device)
        getattr(dist, _GATHER)(rows, mine, group=self.group)
        by_rank = [row for row, counts in zip(rows.view(-1, len(values)).tolist(), self.counted, strict=True) if counts]
        return [sum(column) for column in zip(*by_rank, strict=True)]


def find_ranks(
    params: Sequence[Tensor], process_group: Any, average_loss: bool | None, line_search: bool
) -> Ranks | None:
    """The ranks that step together with this one; None where it steps alone.

    Raises:
        ValueError: for DTensor parameters beside ``process_group``, or whose meshes have no common dimensions.
        TypeError: for a placement that is neither a shard nor a replica.
    """
    dtensors = {i: p for i, p in enumerate(params) if is_sharded(p)}
    if process_group is not None:
        if dtensors:
            i = min(dtensors)
            raise ValueError(
                f"process_group is for plain shards, and parameter {i} is a DTensor, which names its ranks itself; "
                "expected process_group=None"
            )
        return Ranks(process_group, [True] * dist.get_world_size(process_group), True, frozenset())
    if not dtensors:
        if not (average_loss and line_search and world_size() > 1):
            return None
        own = [rank == dist.get_rank() for rank in range(dist.get_world_size())]
        return Ranks(dist.group.WORLD, own, False, frozenset())
    return _find_in_mesh(params, dtensors, line_search)


def device_of(ranks: Ranks | None) -> torch.device:
    """Where a rank without any parameter exchanges its rows."""
    on_gpu = ranks is not None and dist.get_backend(ranks.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def world_size() -> int:
    """Of the default process group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _find_in_mesh(params: Sequence[Tensor], dtensors: dict[int, Tensor], line_search: bool) -> Ranks | None:
    mesh: Any = max((p.device_mesh for p in dtensors.values()), key=lambda mesh: mesh.ndim)  # type: ignore[attr-defined]
    dimension_of = {_along(mesh, k): k for k in range(mesh.ndim)}
    sharded_along = {i: _sharded_dimensions(i, p, dimension_of) for i, p in dtensors.items()}
    summed = set().union(*sharded_along.values())
    gathered = sorted(k for k in range(mesh.ndim) if mesh.size(k) > 1 and (line_search or k in summed))
    if not gathered:
        return None
    here = mesh.get_coordinate()
    place = {
        int(mesh.mesh[coordinates]): coordinates
        for coordinates in itertools.product(
            *(range(mesh.size(k)) if k in gathered else [here[k]] for k in range(mesh.ndim))
        )
    }
    if len(gathered) == 1:
        group = mesh.get_group(gathered[0])
    elif len(place) == world_size():
        group = dist.group.WORLD
    else:
        group = dist.new_group(sorted(place), use_local_synchronization=True)
    others = [k for k in gathered if k not in summed]
    counted = [all(place[rank][k] == here[k] for k in others) for rank in dist.get_process_group_ranks(group)]
    uncounted = frozenset(
        i for i in range(len(params)) if any(here[k] != 0 for k in summed - sharded_along.get(i, set()))
    )
    return Ranks(group, counted, bool(summed), uncounted)


def _along(mesh: Any, dimension: int) -> tuple[int, ...]:
    """The ranks along this dimension of the mesh, through this one."""
    return tuple(dist.get_process_group_ranks(mesh.get_group(dimension)))


def _sharded_dimensions(i: int, p: Any, dimension_of: dict[tuple[int, ...], int]) -> set[int]:
    """The dimensions of the common mesh along which ``p`` is sharded."""
    found = set()
    for k, placement in enumerate(p.placements):
        if placement.is_partial():
            raise TypeError(f"parameter {i} has placements {p.placements}; expected Shard or Replicate")
        ranks = _along(p.device_mesh, k)
        if placement.is_replicate() or len(ranks) == 1:
            continue
        if ranks not in dimension_of:
            raise ValueError(
                f"parameter {i} is sharded over ranks {list(ranks)}, which are no dimension of the other parameters' "
                f"mesh, {[list(r) for r in dimension_of]}: one optimizer needs one mesh, or slices of one"
            )
        found.add(dimension_of[ranks])
    return found
