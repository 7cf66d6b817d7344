"""The matrices of an NLCG step with ``preconditioner="muon"``: which parameters are which matrices, batches of one
shape, and what happens to a batch after the two passes over all parameters (csrc/pass_muon.h)::

    input        u = beta d - g, from the native state into a workspace
    normalize    u / |u|, each matrix by itself
    polar        torch's products (polar.py)
    move         p, from the workspace

Only ``move`` writes parameters. It is one native call for each batch, and the native table counts what has moved: after
an interrupt the rest still moves, and then the interrupt is raised.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.options import Options
from fastnlcg.tensors.checks import dense_strides
from fastnlcg.tensors.dtensor import is_sharded, memory
from fastnlcg.tensors.matrix_ranks import Buffers, Sharing, sharing_of
from fastnlcg.tensors.polar import NewtonSchulz, product_dtype

BATCH = {"cpu": 1 << 20, "cuda": 1 << 25}
"""The most elements of a batch of several parameters: enough to fill the device, few enough to stay small."""


@dataclass(frozen=True)
class Shape:
    """A parameter as matrices of ``columns`` columns, cut into parts of so many ``rows`` each."""

    stacked: bool
    """whether they are the last two dimensions; else the first dimension and all others"""
    rows: tuple[int, ...]
    columns: int
    sizes: tuple[float, ...]
    """the factor of the polar factor of each part: 0.2 sqrt(max(rows, columns)), or sqrt(max(1, rows / columns))"""


def shape_of(index: int, p: Tensor, options: Options) -> Shape:
    """The matrices of parameter ``index``. ValueError if it has none."""
    shape = tuple(p.shape)
    what = f"parameter {index} of shape {shape}"
    if p.dim() < 2:
        raise ValueError(
            f"{what} has no matrices, which preconditioner='muon' needs; expected at least two dimensions: put it into "
            "a group with preconditioner='adam', as muon_groups() does"
        )
    if p.numel() == 0:
        raise ValueError(f"{what} is empty; preconditioner='muon' needs matrices with elements")
    if options.stacked:
        rows, columns = shape[-2:]
    else:
        rows, columns = shape[0], math.prod(shape[1:])
    split = options.split
    parts = (rows,) if split is None else split
    if isinstance(parts, int):
        if rows % parts:
            raise ValueError(f"{what} cannot be split into {parts} parts of equal size: it has {rows} rows")
        parts = (rows // parts,) * parts
    if sum(parts) != rows:
        raise ValueError(f"{what} cannot be split into parts of {parts} rows: it has {rows}")
    return Shape(options.stacked, parts, columns, tuple(_size(options.adjust_lr_fn, part, columns) for part in parts))


def _size(adjust_lr_fn: str, rows: int, columns: int) -> float:
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass(frozen=True)
class Layout:
    """How the parameters of a batch lie in memory, as matrices."""

    extent: tuple[int, ...]
    """their shape"""
    strides: tuple[int, ...]
    shape: Shape
    whole: tuple[int, int] | None
    """the rows and columns that their memory has, row after row; None: matrices are copied first"""


@dataclass
class Batch:
    """Parameters that go through the products together: alike in shape, memory order and placement."""

    layout: Layout
    local: Layout
    """of this rank's shards; the same if they are not sharded"""
    sharing: Sharing | None
    first_tile: int
    last_tile: int
    elements: int
    """of its part of the workspace"""
    members: list[int]
    """by index of the parameter"""
    first: int = 0
    """the number of its first parameter, counted over all batches that are spread over ranks"""


def key_of(p: Tensor, shape: Shape) -> Any:
    """What parameters of one batch have in common."""
    placed = (p.placements, id(p.device_mesh)) if is_sharded(p) else None  # type: ignore[attr-defined]
    return tuple(p.shape), shape, memory(p).stride(), placed


def in_memory(extent: Sequence[int], strides: Sequence[int], shape: Shape) -> tuple[int, int] | None:
    """The rows and columns that a parameter's memory has, row after row, if it is matrices of one size there: their
    columns may be permuted, or rows and columns exchanged, and the polar factor is permuted or exchanged alike."""
    equal = len(set(shape.rows)) == 1
    if equal and _descending(extent, strides, not shape.stacked):
        return shape.rows[0], shape.columns
    if len(extent) == 2 and len(shape.rows) == 1 and strides[0] == 1:
        return shape.columns, shape.rows[0]
    return None


def _descending(shape: Sequence[int], strides: Sequence[int], first_only: bool) -> bool:
    """Whether the first dimension (or all, in their order) is outside the others."""
    if first_only:
        return all(strides[0] >= stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1)
    kept = [stride for size, stride in zip(shape, strides, strict=True) if size != 1]
    return kept == sorted(kept, reverse=True)


def _layout(extent: Sequence[int], strides: Sequence[int], shape: Shape) -> Layout:
    return Layout(tuple(extent), tuple(strides), shape, in_memory(extent, strides, shape))


class Matrices:
    """The batches of one table, and their workspace. ``matrix_group``: ranks with equal parameters that share the
    products."""

    def __init__(self, matrix_group: Any = None) -> None:
        self.batches: list[Batch] = []
        self._matrix_group = matrix_group
        self.buffers = Buffers()
        """everything that is kept between steps besides the state"""
        self._polar = NewtonSchulz(self.buffers)
        self._largest = 0
        self._dtype, self._device = torch.float32, torch.device("cpu")

    def lay_out(
        self,
        params: Sequence[Tensor],
        active: Sequence[int],
        shapes: dict[int, Shape],
        tiles: dict[int, tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[tuple[int, int]]:
        """Makes the batches of the ``active`` parameters that are matrices, in the order of their tiles.

        Returns:
            for each of them its place in ``active``, and the first element of its part of the workspace.
        """
        self._dtype, self._device = dtype, device
        most = BATCH.get(device.type, BATCH["cpu"])
        self.batches, parts = [], []
        places = [(k, i) for k, i in enumerate(active) if i in shapes]
        for _, alike in itertools.groupby(places, lambda place: key_of(params[place[1]], shapes[place[1]])):
            members = list(alike)
            first = params[members[0][1]]
            sharing = sharing_of(first, self._matrix_group)
            local = _layout(memory(first).shape, dense_strides(memory(first)), shapes[members[0][1]])
            layout = local
            if sharing is not None:
                layout = _layout(first.shape, torch.empty(first.shape, device="meta").stride(), local.shape)
            # All ranks must make the same batches, whatever the size of their own shards.
            largest = math.prod(local.extent) if sharing is None else max(map(math.prod, sharing.shapes))
            in_one = max(most // max(largest, 1), 1)
            n = max(math.prod(local.extent), 1)
            for begin in range(0, len(members), in_one):
                chosen = members[begin : begin + in_one]
                indices = [i for _, i in chosen]
                self.batches.append(
                    Batch(layout, local, sharing, tiles[indices[0]][0], tiles[indices[-1]][1], len(chosen) * n, indices)
                )
                parts += [(k, slot * n) for slot, (k, _) in enumerate(chosen)]
        # Copies that another rank counts are last in the flat index, but all ranks exchange in one order.
        self.batches.sort(key=lambda batch: min(batch.members))
        number = 0
        for batch in self.batches:
            batch.first = number
            number += len(batch.members) if batch.sharing is not None else 0
        self._largest = max((batch.elements for batch in self.batches), default=0)
        return parts

    @property
    def workspace(self) -> Tensor:
        """The origins of the matrices of one batch."""
        return self.buffers.take("workspace", (self._largest,), self._dtype, self._device)

    def shared(self) -> tuple[int, ...]:
        """The parameters whose batches need other ranks, which must have the same."""
        return tuple(i for batch in self.batches if batch.sharing is not None for i in batch.members)

    def finish(self, native: Any, threads: int) -> None:
        """Moves the matrices, after the pass over all parameters. After an interrupt another call continues with the
        batch that was interrupted. It does not if a product failed, or if ranks share the products: the other ranks do
        not repeat their exchanges."""
        try:
            for batch in self.batches[native.matrix_moves :]:
                native.matrix_pass("input", batch.first_tile, batch.last_tile, threads)
                self._to_polar(batch, threads)
                native.matrix_pass("move", batch.first_tile, batch.last_tile, threads)
        except BaseException as error:
            shared = any(batch.sharing is not None for batch in self.batches)
            if shared or isinstance(error, RuntimeError | MemoryError):
                native.end_matrices()
            raise
        native.end_matrices()

    def _to_polar(self, batch: Batch, threads: int) -> None:
        """Replaces u in the workspace by the polar factors."""
        n, sharing = len(batch.members), batch.sharing
        flat = self.workspace[: batch.elements]
        if sharing is None:
            self._replace_all(flat, n, batch.layout, threads)
            return
        local = batch.local
        apart = batch.elements // n
        shards = [flat[k * apart : (k + 1) * apart] for k in range(n)]
        views = [shard.as_strided(local.extent, local.strides) for shard in shards]
        dtype = product_dtype(flat.device.type, flat.dtype)
        sent = views if dtype == flat.dtype else [view.to(dtype) for view in views]
        full = sharing.gather(sent, batch.first, batch.layout.extent, self.buffers)
        owned = (
            full if dtype == flat.dtype else self.buffers.take("owned", full.shape, flat.dtype, flat.device).copy_(full)
        )
        self._replace_all(owned.view(-1), len(owned), batch.layout, threads)
        sharing.scatter(owned if dtype == flat.dtype else full.copy_(owned), sent, batch.first, self.buffers)
        if sent is not views:
            for view, value in zip(views, sent, strict=True):
                view.copy_(value)

    def _replace_all(self, flat: Tensor, count: int, layout: Layout, threads: int) -> None:
        """Replaces the matrices of ``count`` parameters in ``flat`` by their polar factors."""
        if count == 0:
            return
        shape = layout.shape
        if layout.whole is not None:
            self._replace(flat.view(-1, *layout.whole), shape.sizes[0], threads)
            return
        for (rows, size), views in _pieces(flat, count, layout).items():
            x = self.buffers.take("matrices", (len(views), rows, shape.columns), flat.dtype, flat.device)
            for matrix, view in zip(x, views, strict=True):
                matrix.view(view.shape).copy_(view)
            self._replace(x, size, threads)
            for matrix, view in zip(x, views, strict=True):
                view.copy_(matrix.view(view.shape))

    def _replace(self, x: Tensor, size: float, threads: int) -> None:
        """Replaces matrices, shape (count, rows, columns), by their polar factors times ``size``."""
        count, n = len(x), x.shape[1] * x.shape[2]
        sums, stream = None, 0
        if _native.on_gpu(x.device):
            doubles = (_native.normalize_doubles(count, n),)
            sums = _native.Buffer(self.buffers.take("sums", doubles, torch.float64, x.device))
            stream = _native.current_stream(str(x.device))
        _native.normalize(_native.Buffer(x.view(-1)), count, n, threads, stream, sums)
        self._polar.polar_(x, size, product_dtype(x.device.type, x.dtype))


def _pieces(flat: Tensor, count: int, layout: Layout) -> dict[tuple[int, float], list[Tensor]]:
    """The matrices of ``count`` parameters in ``flat``, as views, by their rows and their size."""
    shape, n = layout.shape, flat.numel() // count
    stack = [range(extent) for extent in layout.extent[:-2]] if shape.stacked else []
    pieces: dict[tuple[int, float], list[Tensor]] = {}
    for k in range(count):
        parameter = flat[k * n : (k + 1) * n].as_strided(layout.extent, layout.strides)
        for place in itertools.product(*stack):
            for part, size in zip(torch.split(parameter[place], list(shape.rows)), shape.sizes, strict=True):
                pieces.setdefault((len(part), size), []).append(part)
    return pieces
