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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.options import Options
from fastnlcg.tensors.dtensor import is_sharded, memory
from fastnlcg.tensors.polar import NewtonSchulz, product_dtype

BATCH = {"cpu": 1 << 20, "cuda": 1 << 25}
"""The most elements of a batch of several parameters: enough to fill the device, few enough to stay small."""


@dataclass(frozen=True)
class Shape:
    """A parameter as matrices: ``stack`` of them, of ``columns`` columns, cut into parts of so many ``rows`` each."""

    stack: int
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
        stack, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
    else:
        stack, rows, columns = 1, shape[0], math.prod(shape[1:])
    split = options.split
    parts = (rows,) if split is None else split
    if isinstance(parts, int):
        if rows % parts:
            raise ValueError(f"{what} cannot be split into {parts} parts of equal size: it has {rows} rows")
        parts = (rows // parts,) * parts
    if sum(parts) != rows:
        raise ValueError(f"{what} cannot be split into parts of {parts} rows: it has {rows}")
    return Shape(stack, parts, columns, tuple(_size(options.adjust_lr_fn, part, columns) for part in parts))


def _size(adjust_lr_fn: str, rows: int, columns: int) -> float:
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


@dataclass
class Batch:
    """Parameters that go through the products together: alike in shape and memory order."""

    members: list[int] = field(default_factory=list)
    """by index of the parameter"""
    first_tile: int = 0
    last_tile: int = 0
    elements: int = 0
    whole: tuple[int, int, float] | None = None
    """rows and columns in memory, and the size, if the workspace is a batch of matrices as it is; else it is copied"""


def key_of(p: Tensor, shape: Shape) -> Any:
    """What parameters of one batch have in common. Sharded ones are not batched with others."""
    local = memory(p)
    return tuple(p.shape), shape, local.stride(), is_sharded(p), p.placements if is_sharded(p) else None  # type: ignore[attr-defined]


def in_memory(p: Tensor, strides: Sequence[int], shape: Shape) -> tuple[int, int] | None:
    """The rows and columns that the memory of ``p`` has, row after row, if it is matrices of one size there: their
    columns may be permuted, or rows and columns exchanged, and the polar factor is permuted or exchanged alike."""
    equal = len(set(shape.rows)) == 1
    if equal and _descending(p.shape, strides, shape.stack == 1):
        return shape.rows[0], shape.columns
    if p.dim() == 2 and len(shape.rows) == 1 and strides[0] == 1:
        return shape.columns, shape.rows[0]
    return None


def _descending(shape: Sequence[int], strides: Sequence[int], first_only: bool) -> bool:
    """Whether the first dimension (or all, in their order) is outside the others."""
    if first_only:
        return all(strides[0] >= stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1)
    kept = [stride for size, stride in zip(shape, strides, strict=True) if size != 1]
    return kept == sorted(kept, reverse=True)


_ATTEMPTS = 4  # one, and three interrupts


class Matrices:
    """The batches of one table, and their workspace."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._polar = NewtonSchulz()
        self._workspace: Tensor | None = None
        self._staging: Tensor | None = None
        self._sums: Tensor | None = None
        self._params: list[Tensor] = []
        self._strides: dict[int, tuple[int, ...]] = {}
        self._shapes: dict[int, Shape] = {}
        self._dtype = torch.float32

    def lay_out(
        self,
        params: Sequence[Tensor],
        active: Sequence[int],
        shapes: dict[int, Shape],
        strides: dict[int, tuple[int, ...]],
        tiles: dict[int, tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> list[tuple[int, int]]:
        """Makes the batches of the ``active`` parameters that are matrices, in the order of their tiles.

        Returns:
            for each of them its place in ``active``, and the first element of its part of the workspace.
        """
        self._shapes, self._strides, self._dtype = shapes, strides, dtype
        self._params = list(params)
        most = BATCH.get(device.type, BATCH["cpu"])
        self.batches, parts = [], []
        key = None
        for k, i in enumerate(active):
            if i not in shapes:
                continue
            p, n = params[i], max(memory(params[i]).numel(), 1)
            own = key_of(p, shapes[i])
            if key != own or self.batches[-1].elements + n > most:
                layout = in_memory(p, strides[i], shapes[i]) if not is_sharded(p) else None
                size = shapes[i].sizes[0]
                self.batches.append(Batch(first_tile=tiles[i][0], whole=layout and (*layout, size)))
                key = own
            batch = self.batches[-1]
            parts.append((k, batch.elements))
            batch.members.append(i)
            batch.elements += n
            batch.last_tile = tiles[i][1]
        largest = max((batch.elements for batch in self.batches), default=0)
        kept = self._workspace
        if kept is None or kept.dtype != dtype or kept.device != device or kept.numel() < largest:
            self._workspace = torch.zeros(largest, dtype=dtype, device=device)
        return parts

    @property
    def workspace(self) -> Tensor:
        """The origins of the matrices of one batch."""
        assert self._workspace is not None
        return self._workspace

    def bytes(self) -> int:
        """The size of everything that is kept between steps besides the state."""
        kept = [t for t in (self._workspace, self._staging, self._sums) if t is not None]
        return sum(t.numel() * t.element_size() for t in kept) + self._polar.bytes()

    def finish(self, native: Any, threads: int) -> None:
        """Moves the matrices, after the step of all parameters has completed."""
        raised: BaseException | None = None
        for _ in range(_ATTEMPTS):
            try:
                for batch in self.batches:
                    if batch.last_tile > native.tiles_moved:
                        native.matrix_pass("input", batch.first_tile, batch.last_tile, threads)
                        self._to_polar(batch, threads)
                        native.matrix_pass("move", batch.first_tile, batch.last_tile, threads)
                break
            except BaseException as error:  # if it is an interrupt, the rest of the step can follow
                raised = raised or error
        native.end_matrices()
        if raised is not None:
            raise raised

    def _to_polar(self, batch: Batch, threads: int) -> None:
        if batch.whole is not None:
            rows, columns, size = batch.whole
            x = self.workspace[: batch.elements].view(-1, rows, columns)
            self._replace(x, size, threads)
            return
        for views, rows, columns, size in self._pieces(batch):
            x = self._staged(len(views) * rows * columns).view(-1, rows, columns)
            for matrix, view in zip(x, views, strict=True):
                matrix.view(view.shape).copy_(view)
            self._replace(x, size, threads)
            for matrix, view in zip(x, views, strict=True):
                view.copy_(matrix.view(view.shape))

    def _replace(self, x: Tensor, size: float, threads: int) -> None:
        """Replaces matrices, shape (count, rows, columns), by their polar factors times ``size``."""
        count, n = len(x), x.shape[1] * x.shape[2]
        on_gpu = _native.on_gpu(x.device)
        sums = None
        if on_gpu:
            doubles = _native.normalize_doubles(count, n)
            if self._sums is None or self._sums.numel() < doubles or self._sums.device != x.device:
                self._sums = torch.empty(doubles, dtype=torch.float64, device=x.device)
            sums = _native.Buffer(self._sums)
        stream = _native.current_stream(str(x.device)) if on_gpu else 0
        _native.normalize(_native.Buffer(x.view(-1)), count, n, threads, stream, sums)
        self._polar.polar_(x, size, product_dtype(x.device.type, x.dtype))

    def _pieces(self, batch: Batch) -> Iterator[tuple[list[Tensor], int, int, float]]:
        """The matrices of one size of all members, as views of the workspace."""
        shape = self._shapes[batch.members[0]]
        by_size: dict[tuple[int, float], list[Tensor]] = {}
        begin = 0
        for i in batch.members:
            p = self._params[i]
            whole = self.workspace[begin : begin + p.numel()].as_strided(
                p.shape, self._strides[i], self.workspace.storage_offset() + begin
            )
            begin += p.numel()
            stack = [range(extent) for extent in p.shape[:-2]] if shape.stack > 1 else []
            for place in itertools.product(*stack):
                parts = torch.split(whole[place], list(shape.rows))
                for part, rows, size in zip(parts, shape.rows, shape.sizes, strict=True):
                    by_size.setdefault((rows, size), []).append(part)
        for (rows, size), views in by_size.items():
            yield views, rows, shape.columns, size

    def _staged(self, n: int) -> Tensor:
        kept = self._staging
        if kept is None or kept.numel() < n or kept.dtype != self._dtype or kept.device != self.workspace.device:
            kept = self._staging = torch.empty(n, dtype=self._dtype, device=self.workspace.device)
        return kept[:n]
