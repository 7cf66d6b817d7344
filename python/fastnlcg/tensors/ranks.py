"""Parameters spread over ranks: which ranks have the other shards, and the sums over all ranks.

Ranks communicate through torch.distributed. Between two passes every rank gathers one small row of doubles from every
other rank (``all_gather_single``, 104 bytes per rank), and the native table adds the rows up in the order of ranks. So
every rank has the same sums, bit for bit, whatever algorithm transported them: an all-reduce may add in another order
in another group, and the replicas of HSDP would drift apart. A row also contains the step that its rank is about to
take, and a digest of its options: if ranks differ, all of them raise, and nothing has changed.

=====================  ===========================================  ===================================================
parameters             ranks whose sums are added                    determined by
=====================  ===========================================  ===================================================
DTensor (FSDP2, HSDP,  those along the mesh dimensions on which      the placements. A parameter replicated along such a
tensor parallel)       some parameter is a ``Shard``, never those    dimension is owned on its first rank
                       along a ``Replicate``
plain shards (FSDP1,   all of the group                              ``process_group=``
ZeRO)
plain (DDP)            none: every rank has the whole sum            ``average_loss=True`` averages the loss
=====================  ===========================================  ===================================================
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fastnlcg import _native
from fastnlcg.tensors.dtensor import is_sharded, memory

# torch 2.13 has renamed this function, and warns about the old name.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass
class Ranks:
    """The ranks that take a step together with this one."""

    group: Any
    """their process group; rows are in its order"""
    owned: list[bool]
    """for each rank, whether its sums are added to this rank's"""
    every_decision: bool
    """whether all sums are exchanged; if False, only the loss is exchanged, once per step"""
    unowned: frozenset[int]
    """the indices of parameters that are copies: another rank adds them to the sums"""
    replicas: bool = False
    """whether every rank must have the same parameters and gradients, and so the same sums, to the bit"""

    mine: Tensor = field(default_factory=lambda: torch.empty(0))
    """this rank's row"""
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    """the rows of all ranks"""

    def prepare(self, device: torch.device) -> None:
        """Allocates the rows on ``device``, which the backend must support."""
        k = _native.row_doubles
        self.mine = torch.zeros(k, dtype=torch.float64, device=device)
        self.rows = torch.zeros(len(self.owned) * k, dtype=torch.float64, device=device)

    def connect(self, native: _native.TensorTable, elements: int, device: torch.device) -> None:
        """Lets the native table exchange rows with the other ranks. ``elements``: how many elements of its index this
        rank adds to the sums."""
        self.prepare(device)
        owned = torch.tensor(self.owned, dtype=torch.float64, device=device)
        rows = _native.Buffer(self.mine), _native.Buffer(self.rows), _native.Buffer(owned)
        native.set_exchange(*rows, elements, self.every_decision, self.replicas, self.gather)

    def gather(self) -> None:
        """Gathers every rank's ``mine`` into every rank's ``rows``."""
        getattr(dist, _GATHER)(self.rows, self.mine, group=self.group)

    def exchange(self, values: Sequence[float], step: float, exchange: str, digest: float) -> list[list[float]]:
        """Returns every rank's values, by rank. Every rank has to call it. RanksDisagree if ranks differ in the step,
        the exchange (``ExchangeId`` in csrc/rank_agreement.h) or the digest."""
        k = _native.row_signature
        self.mine.copy_(torch.tensor(_native.rank_row(values, step, exchange, digest), dtype=torch.float64))
        self.gather()
        rows: list[list[float]] = self.rows.view(len(self.owned), -1).tolist()
        if any(row[k:] != rows[0][k:] for row in rows):
            raise _native.RanksDisagree
        return [row[: len(values)] for row in rows]

    def total(self, rows: Sequence[Sequence[float]]) -> list[float]:
        """The sums of ``rows`` over the owned ranks."""
        owned_rows = [row for row, owned in zip(rows, self.owned, strict=True) if owned]
        return [sum(column) for column in zip(*owned_rows, strict=True)]

    def explain(
        self,
        moment: str,
        step: float,
        options: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> NoReturn:
        """Raises a RuntimeError on all ranks, with the same message, which names what differs. Every rank has to call
        it."""
        per_group = [
            {key: math.nan if isinstance(group[key], Tensor) and group[key].is_cuda else float(group[key])
             for key in ("lr", "weight_decay", "maximize")}
            for group in groups
        ]  # fmt: skip
        mine = {"is in": moment, "step number": int(step), "number of groups": len(groups)}
        mine |= {f"option {key}": repr(value) for key, value in options.items()}
        mine |= dict(more)
        mine |= {f"{key} of group {k}": value for k, group in enumerate(per_group) for key, value in group.items()}
        by_rank: list[dict[str, Any]] = [{} for _ in self.owned]
        dist.all_gather_object(by_rank, mine, group=self.group)
        ranks = dist.get_process_group_ranks(self.group)
        for key in by_rank[0]:
            for rank, theirs in zip(ranks, by_rank, strict=True):
                if theirs.get(key) != by_rank[0][key]:
                    raise RuntimeError(
                        "the ranks are not about to take the same step, and nothing has changed: "
                        f"{key} {theirs.get(key)} on rank {rank}, {by_rank[0][key]} on rank {ranks[0]}"
                    )
        raise RuntimeError("the ranks are not about to take the same step, and nothing has changed")

    def who_disagreed(self) -> str:
        """Describes a disagreement from the last gathered rows; for ranks on GPUs, which detect it only after the
        step."""
        k = _native.row_signature
        rows = self.rows.view(len(self.owned), -1).tolist()
        ranks = dist.get_process_group_ranks(self.group)
        steps = ", ".join(f"rank {rank} at step {int(row[k])}" for rank, row in zip(ranks, rows, strict=True))
        odd = [rank for rank, row in zip(ranks, rows, strict=True) if row[k:] != rows[0][k:]]
        if not odd:
            return f"{ranks} differ in the gradients of replicas, or in the order of their parameters ({steps})"
        return (
            f"ranks {odd} differ from rank {ranks[0]} in the step number, the options, or a group's lr, weight_decay "
            f"or maximize ({steps})"
        )


def shapes_of(group: Mapping[str, Any]) -> dict[int, Any]:
    """The shapes of a group's parameters by their ids; None for a parameter that is not materialized yet."""
    return {id(p): None if isinstance(p, UninitializedTensorMixin) else p.shape for p in group["params"]}


def check_whole(groups: Sequence[Mapping[str, Any]], shapes: Sequence[dict[int, Any]], *, over_ranks: bool) -> None:
    """RuntimeError if a wrapper has replaced each group's parameters by one flat tensor and steps one group at a time,
    or this rank's share only, as DeepSpeed's ZeRO does: the sums would miss the rest. ``shapes``: those of the groups
    as they were added; ``over_ranks``: whether the sums run over the other ranks' shares."""
    single = [group["params"][0] for group in groups if len(group["params"]) == 1]
    if len(single) != len(groups) or any(p.dim() != 1 for p in single):
        return
    if any(id(p) in group for p in single for group in shapes):
        return  # added by the user; DeepSpeed keeps those that it replaces, so their ids are not used again
    if any(len(group) == 1 and all(shape is None or len(shape) == 1 for shape in group.values()) for group in shapes):
        return  # they may have been flat when they were added
    if len(groups) < len(shapes) or (world_size() > 1 and not over_ranks):
        raise RuntimeError(
            f"got {len(groups)} of {len(shapes)} parameter groups, and one flat tensor in place of each group's "
            "parameters: DeepSpeed's ZeRO does this, and steps one group, or one rank's share, at a time. This "
            "optimizer's sums run over all groups and ranks: pass process_group= (with one group), or use FSDP2"
        )


def check_group(name: str, group: Any) -> None:
    """TypeError or ValueError unless the argument ``name`` is a process group that this rank is in."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed process group that this rank is in, got {group!r}")
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{name} has ranks {dist.get_process_group_ranks(group)}; expected this rank, {dist.get_rank()}, to be one "
            "of them"
        )


def find_ranks(
    params: Sequence[Tensor],
    process_group: Any,
    average_loss: bool | None,
    line_search: bool,
    matrix_group: Any = None,
) -> Ranks | None:
    """The ranks that step together with this one; None if it steps alone. ``matrix_group``: those that share the
    products of plain matrices, and must take the same steps.

    Raises:
        ValueError: for DTensor parameters together with ``process_group``, or without a common mesh.
        TypeError: for a placement that is neither ``Shard`` nor ``Replicate``.
        RuntimeError: for a DTensor parameter whose mesh does not contain this rank.
    """
    dtensors = {i: p for i, p in enumerate(params) if is_sharded(p)}
    if process_group is not None:
        if dtensors:
            i = min(dtensors)
            raise ValueError(
                f"process_group is for plain shards, but parameter {i} is a DTensor, whose mesh defines its ranks; "
                "expected process_group=None"
            )
        return Ranks(process_group, [True] * dist.get_world_size(process_group), True, frozenset())
    if not dtensors:
        group = matrix_group or (dist.group.WORLD if average_loss and line_search and world_size() > 1 else None)
        if group is None or dist.get_world_size(group) == 1:
            return None
        own = [rank == dist.get_rank(group) for rank in range(dist.get_world_size(group))]
        return Ranks(group, own, False, frozenset(), replicas=matrix_group is not None)
    return _find_in_mesh(params, dtensors, line_search)


def device_of(ranks: Ranks | None, params: Sequence[Tensor], default: torch.device) -> torch.device:
    """The device of the first parameter; without one, the device on which the backend can exchange rows."""
    if params and not isinstance(params[0], UninitializedTensorMixin):
        return memory(params[0]).device
    on_gpu = ranks is not None and dist.get_backend(ranks.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else default


def world_size() -> int:
    """The number of ranks of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_GROUPS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def group_of(ranks: tuple[int, ...]) -> Any:
    """A process group of these ranks, made once for each default group."""
    groups = _GROUPS.setdefault(dist.group.WORLD, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]


def _find_in_mesh(params: Sequence[Tensor], dtensors: dict[int, Tensor], line_search: bool) -> Ranks | None:
    for i, p in dtensors.items():
        if p.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"parameter {i} lives on ranks {p.device_mesh.mesh.flatten().tolist()}; "  # type: ignore[attr-defined]
                f"rank {dist.get_rank()} cannot step it"
            )
    mesh: Any = max((p.device_mesh for p in dtensors.values()), key=lambda mesh: mesh.ndim)  # type: ignore[attr-defined]
    dimension_of = {_along(mesh, k): k for k in range(mesh.ndim)}
    sharded_along = {i: _sharded_dimensions(i, p, dimension_of) for i, p in dtensors.items()}
    summed = set().union(*sharded_along.values())
    gathered = sorted(k for k in range(mesh.ndim) if mesh.size(k) > 1 and (line_search or k in summed))
    if not gathered:
        return None
    own = mesh.get_coordinate()
    coordinates_of = {
        int(mesh.mesh[coordinates]): coordinates
        for coordinates in itertools.product(
            *(range(mesh.size(k)) if k in gathered else [own[k]] for k in range(mesh.ndim))
        )
    }
    if len(gathered) == 1:
        group = mesh.get_group(gathered[0])
    elif len(coordinates_of) == world_size():
        group = dist.group.WORLD
    else:
        group = group_of(tuple(sorted(coordinates_of)))
    replicated = [k for k in gathered if k not in summed]
    owned = [all(coordinates_of[rank][k] == own[k] for k in replicated) for rank in dist.get_process_group_ranks(group)]
    unowned = frozenset(i for i in range(len(params)) if any(own[k] != 0 for k in summed - sharded_along.get(i, set())))
    return Ranks(group, owned, bool(summed), unowned)


def _along(mesh: Any, dimension: int) -> tuple[int, ...]:
    """The ranks along this dimension of the mesh, this rank among them."""
    return tuple(dist.get_process_group_ranks(mesh.get_group(dimension)))


def _sharded_dimensions(i: int, p: Any, dimension_of: dict[tuple[int, ...], int]) -> set[int]:
    """The dimensions of the common mesh along which ``p`` is sharded."""
    dimensions = set()
    for k, placement in enumerate(p.placements):
        if placement.is_partial():
            raise TypeError(f"parameter {i} has placements {p.placements}; expected Shard or Replicate")
        ranks = _along(p.device_mesh, k)
        if placement.is_replicate() or len(ranks) == 1:
            continue
        if ranks not in dimension_of:
            raise ValueError(
                f"parameter {i} is sharded over ranks {list(ranks)}; expected one of the dimensions of the other "
                f"parameters' mesh, {[list(r) for r in dimension_of]}: one optimizer needs one mesh, or slices of one"
            )
        dimensions.add(dimension_of[ranks])
    return dimensions
