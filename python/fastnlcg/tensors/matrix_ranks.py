"""Matrices spread over ranks: each has one owner, which gets the shards, forms the polar factor, and sends every rank
its part of it, by two all-to-all exchanges for each batch, or by one if every rank has all of it. So no rank does
another's products.

The owner gets each shard once: from the ranks that agree with it along the mesh's replicated dimensions. Replicas get
their parts from the same owner, so they stay equal to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnlcg.tensors.dtensor import is_sharded
from fastnlcg.tensors.ranks import group_of, world_size


class Buffers:
    """Workspace by name: made when it is first needed or too small, and kept."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def take(self, name: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of this shape, with any values."""
        n, kept = math.prod(shape), self._kept.get(name)
        if kept is None or kept.dtype != dtype or kept.device != device or kept.numel() < n:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written outside it
                kept = self._kept[name] = torch.zeros(n, dtype=dtype, device=device)
        return kept[:n].view(*shape)

    def bytes(self) -> int:
        """The size of all of them."""
        return sum(t.numel() * t.element_size() for t in self._kept.values())


@dataclass(frozen=True)
class Sharing:
    """How the parameters of one batch are spread over the ranks of a group. Lists are by rank of the group."""

    group: Any
    rank: int
    slices: list[tuple[slice, ...]]
    """each rank's shard, as a part of the whole"""
    shapes: list[tuple[int, ...]]
    replica: list[tuple[int, ...]]
    """each rank's place along the replicated dimensions"""

    def owner(self, number: int) -> int:
        """Of matrix ``number``, counted over all batches."""
        return number % len(self.slices)

    def gather(self, shards: Sequence[Tensor], first: int, whole: Sequence[int], buffers: Buffers) -> Tensor:
        """Sends each shard to its owner; returns what this rank owns, shape (count, *whole). ``first``: the number of
        the first of them."""
        dtype, device = shards[0].dtype, shards[0].device
        mine, size = math.prod(self.shapes[self.rank]), len(self.slices)
        by_owner = [[x for k, x in enumerate(shards, first) if self.owner(k) == owner] for owner in range(size)]
        counts = [len(x) for x in by_owner]
        own_replica = self.replica[self.rank]
        to = [counts[rank] * mine if self.replica[rank] == own_replica else 0 for rank in range(size)]
        come = [
            counts[self.rank] * math.prod(shape) if replica == own_replica else 0
            for shape, replica in zip(self.shapes, self.replica, strict=True)
        ]
        sent = buffers.take("sent", (sum(to),), dtype, device)
        begin = 0
        for owner, shards_of_owner in enumerate(by_owner):
            if to[owner]:
                for shard in shards_of_owner:
                    sent[begin : begin + mine].view(shard.shape).copy_(shard)
                    begin += mine
        received = sent  # if no other rank agrees with this one, none has a shard for it: so on all ranks
        if self.replica.count(own_replica) > 1:
            received = buffers.take("received", (sum(come),), dtype, device)
            dist.all_to_all_single(received, sent, come, to, group=self.group)
        full = buffers.take("whole", (counts[self.rank], *whole), dtype, device)
        begin = 0
        for rank, n in enumerate(come):
            if n:
                full[(slice(None), *self.slices[rank])].copy_(
                    received[begin : begin + n].view(counts[self.rank], *self.shapes[rank])
                )
                begin += n
        return full

    def scatter(self, full: Tensor, shards: Sequence[Tensor], first: int, buffers: Buffers) -> None:
        """The inverse of :meth:`gather`: every rank gets its shard of each matrix, into ``shards``."""
        dtype, device = shards[0].dtype, shards[0].device
        mine, size = math.prod(self.shapes[self.rank]), len(self.slices)
        by_owner = [[x for k, x in enumerate(shards, first) if self.owner(k) == owner] for owner in range(size)]
        to = [len(full) * math.prod(shape) for shape in self.shapes]
        come = [len(x) * mine for x in by_owner]
        sent = buffers.take("sent", (sum(to),), dtype, device)
        begin = 0
        for rank, n in enumerate(to):
            if n:
                part = full[(slice(None), *self.slices[rank])]
                sent[begin : begin + n].view(part.shape).copy_(part)
                begin += n
        received = buffers.take("received", (sum(come),), dtype, device)
        dist.all_to_all_single(received, sent, come, to, group=self.group)
        begin = 0
        for shard in itertools.chain(*by_owner):
            if mine:
                shard.copy_(received[begin : begin + mine].view(shard.shape))
                begin += mine


def sharing_of(p: Tensor, matrix_group: Any) -> Sharing | None:
    """How ``p`` is spread; None if this rank has all of it and does its products alone."""
    if not is_sharded(p):
        if matrix_group is None or dist.get_world_size(matrix_group) == 1:
            return None
        size = dist.get_world_size(matrix_group)
        whole = tuple(slice(0, n) for n in p.shape)
        return Sharing(
            matrix_group,
            dist.get_rank(matrix_group),
            [whole] * size,
            [tuple(p.shape)] * size,
            [(k,) for k in range(size)],
        )
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    placements: Any = p.placements  # type: ignore[attr-defined]
    if mesh.size() == 1:
        return None
    coordinates = {
        int(mesh.mesh[place]): place for place in itertools.product(*(range(mesh.size(k)) for k in range(mesh.ndim)))
    }
    if mesh.ndim == 1:
        group = mesh.get_group(0)
    elif len(coordinates) == world_size():
        group = dist.group.WORLD
    else:
        group = group_of(tuple(sorted(coordinates)))
    ranks = dist.get_process_group_ranks(group)
    slices, shapes, replica = [], [], []
    for rank in ranks:
        place = coordinates[rank]
        shape, begin = _compute_local_shape_and_global_offset(p.shape, mesh.shape, list(place), placements)
        shapes.append(tuple(shape))
        slices.append(tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True)))
        replica.append(tuple(place[k] for k in range(mesh.ndim) if placements[k].is_replicate()))
    return Sharing(group, dist.get_rank(group), slices, shapes, replica)
