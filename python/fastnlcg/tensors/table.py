"""The table of parameters that an optimizer works on: which take part, where in the flat index, with which state, and
the native table over them. NLCG and CGDescent each fill one.

Nothing is kept but the tensors' objects; the native side reads their addresses at every step, so tensors may be moved,
shared, off-loaded or replaced between two steps, and the step uses what they then hold. If anything but an address
differs from the table, the native side says so, and the table is made again.

A parameter's place in the flat index, over which sums run, is a multiple of 16 elements. A DTensor stands for its
shard. A parameter with gaps in memory (a slice of a larger tensor) is stepped in a copy, and copied back. NLCG steps an
empty shard as one dummy element that is always zero, so that step counts agree across ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.tensors.checks import DTYPES, check_mixture, check_parameter, copy_in_order, dense_strides, is_dense
from fastnlcg.tensors.dtensor import is_sharded, memory
from fastnlcg.tensors.ranks import Ranks, device_of
from fastnlcg.tensors.state import state_dtype

DLPACK_API: Any = Tensor.__dlpack_c_exchange_api__  # torch >= 2.10

Groups = list[dict[str, Any]]
State = MutableMapping[Any, Any]
Place = tuple[int, int, int]
"""Begin, run and skip of :func:`fastnlcg.tensors.dtensor.place_of`."""


def parameters(param_groups: Groups) -> list[Tensor]:
    """Of all groups, in their order."""
    return [p for group in param_groups for p in group["params"]]


class ParameterTable:
    """The native table over some parameters, their state and their gradients, on one device."""

    def __init__(self) -> None:
        self.native: _native.TensorTable | None = None
        self.ranks: Ranks | None = None
        self.device = torch.device("cpu")
        self.copies: list[tuple[Tensor, Tensor]] = []
        """the memory of a parameter with gaps, and the copy in which it is stepped"""
        self.offset_of: dict[int, int] = {}
        """the place of each parameter in the flat index"""
        self._dtype = torch.float32
        self._workspace: Tensor | None = None

    def device_for(self, params: Sequence[Tensor], stateful: Sequence[int], ranks: Ranks | None) -> torch.device:
        """The device of these parameters; a rank that has none exchanges its sums there."""
        return memory(params[stateful[0]]).device if stateful else device_of(ranks, params, self.device)

    def lay_out(
        self,
        params: Sequence[Tensor],
        stateful: Sequence[int],
        active: Sequence[int],
        ranks: Ranks | None,
        keys: _native.StateKeys,
        *,
        options: Mapping[str, Any] | None = None,
        wanted_dtype: str | None = None,
        group_of: Sequence[int] | None = None,
        n_groups: int = 1,
        place: Callable[[Tensor], Place] | None = None,
        matrices: Collection[int] = (),
        matrix_groups: Sequence[int] = (),
    ) -> None:
        """Makes the native table: places for the parameters ``stateful``, in their order (see :func:`in_order`), and a
        segment for each of them that is ``active``.

        Args:
            keys: the names of the state arrays.
            options: of the native step, if it takes any.
            wanted_dtype: the option ``state_dtype``.
            group_of: the group of each parameter; all are of one group by default.
            place: where a parameter's elements are in the whole parameter.
            matrices: the parameters that are matrices: their places are multiples of a tile.
            matrix_groups: their groups.
        """
        device = self.device_for(params, stateful, ranks)
        dtype = state_dtype(memory(params[stateful[0]]), wanted_dtype) if stateful else torch.float32
        offsets, owned, n = flat_offsets(params, stateful, frozenset() if ranks is None else ranks.unowned, matrices)
        offset_of = dict(zip(stateful, offsets, strict=True))
        segments = []
        for i in active:
            local = memory(params[i])
            shape, strides = ((1,), (1,)) if local.numel() == 0 else (local.shape, dense_strides(local))
            begin, run, skip = (0, 0, 0) if place is None else place(params[i])
            segments.append(
                _native.SegmentSpec(
                    offset=offset_of[i],
                    group=0 if group_of is None else group_of[i],
                    index=i,
                    dtype=DTYPES[local.dtype],
                    shape=shape,
                    strides=strides,
                    begin=begin,
                    run=run,
                    skip=skip,
                )
            )
        native, workspace = self.native, self._workspace
        if native is None or self.device != device or self._dtype != dtype:
            device_and_stream = ("cpu", 0)
            if _native.on_gpu(device):
                device_and_stream = f"cuda:{device.index or 0}", _native.current_stream(str(device))
            native, workspace = _native.TensorTable(DTYPES[dtype], *device_and_stream), None
        if options is not None:
            native.set_options(options)
        workspace = _workspace(workspace, device, n, len(stateful), n_groups)
        buffer = None if workspace is None else _native.Buffer(workspace)
        native.lay_out(n, segments, n_groups, keys, DLPACK_API, Tensor, buffer, list(matrix_groups))
        if ranks is not None:
            ranks.connect(native, owned, device)
        # Last, so that a table is never half of one: memory may run out before.
        self.native, self.ranks, self.device, self._dtype = native, ranks, device, dtype
        self.offset_of, self._workspace = offset_of, workspace

    def memory_of(self, params: Sequence[Tensor], active: Sequence[int]) -> list[Tensor]:
        """This rank's memory of each parameter: in ``copies``, a dense copy if it has gaps; for an empty shard one
        element of zero."""
        self.copies, stepped = [], []
        for i in active:
            local = memory(params[i])
            if local.numel() == 0:
                local = torch.zeros(1, dtype=local.dtype, device=local.device)
            elif not in_place(local):
                copy = copy_in_order(local, dense_strides(local))
                self.copies.append((local, copy))
                local = copy
            stepped.append(local)
        return stepped

    def write_back(self) -> None:
        """From the copies into the parameters."""
        with torch.no_grad():
            for p, copy in self.copies:
                p.copy_(copy)

    def use_stream(self) -> None:
        """On a GPU: native work goes to torch's current stream."""
        if self.native is not None and _native.on_gpu(self.device):
            self.native.stream = _native.current_stream(str(self.device))


def _workspace(present: Tensor | None, device: torch.device, n: int, segments: int, n_groups: int) -> Tensor | None:
    """Memory for partial sums on a GPU, which is kept while it is large enough; None on the CPU."""
    if not _native.on_gpu(device):
        return None
    doubles = _native.workspace_doubles(n, segments, n_groups)
    if present is not None and present.numel() >= doubles:
        return present
    if _native.capturing():
        raise RuntimeError(
            "the workspace cannot grow while a CUDA graph is captured: take a step with these parameters first"
        )
    return torch.zeros(doubles, dtype=torch.float64, device=device)


def check_parameters(params: Sequence[Tensor], stateful: Sequence[int]) -> None:
    """TypeError, RuntimeError or ValueError for a parameter that cannot be stepped, or not with the others."""
    for i in stateful:
        check_parameter(i, params[i])
    check_mixture(stateful, params)


def in_order(stateful: Sequence[int], ranks: Ranks | None) -> list[int]:
    """These parameters in the order of the flat index: that of the groups, and copies that another rank counts last."""
    unowned = frozenset() if ranks is None else ranks.unowned
    return sorted(stateful, key=lambda i: i in unowned)


def write_state(state: State, params: Sequence[Tensor], new: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Puts new state arrays of these parameters into ``state``."""
    for i, arrays in new.items():
        if arrays or params[i] not in state:
            state.setdefault(params[i], {}).update(arrays)


def expected_state(state: State) -> list[Any]:
    """Parameters and their entries, alternating: what the native side expects to find again in ``state``."""
    return [x for p, entry in state.items() if not isinstance(p, str) for x in (p, entry)]


def in_place(p: Tensor) -> bool:
    """Whether this memory is stepped as it is, without a copy."""
    return is_dense(p) and not p.is_neg()


def flat_offsets(
    params: Sequence[Tensor], stateful: Sequence[int], unowned: frozenset[int], matrices: Collection[int] = ()
) -> tuple[list[int], int, int]:
    """Where in the flat index each parameter begins, at multiples of a block, or of a tile; how much of it this rank
    adds to sums; its length."""
    if not stateful:
        return [], 0, 0

    split = sum(i not in unowned for i in stateful)
    own, owned = _in_sequence(params, stateful[:split], matrices)
    others, copies = _in_sequence(params, stateful[split:], matrices)
    if not copies:
        return own, owned, owned
    # The copies begin a span, so that the partial sums before them are those that count.
    span = _native.chunk_elements(owned + copies)
    begin = -(-owned // span) * span
    while _native.chunk_elements(begin + copies) != span:
        span = _native.chunk_elements(begin + copies)
        begin = -(-owned // span) * span
    return [*own, *(begin + offset for offset in others)], begin, begin + copies


def _in_sequence(params: Sequence[Tensor], indices: Sequence[int], matrices: Collection[int]) -> tuple[list[int], int]:
    """Where each of these parameters begins, one after another, and where the last one ends."""
    offsets, end = [], 0
    for i in indices:
        unit = _native.tile_elements if i in matrices else _native.block_elements
        begin = -(-end // unit) * unit
        offsets.append(begin)
        end = begin + max(memory(params[i]).numel(), is_sharded(params[i]))
    return offsets, -(-end // _native.block_elements) * _native.block_elements
