"""CGDescent's table if there are curvature pairs, or rotated weight matrices: state is in flat buffers, and a
parameter's state is views of them.

============================  ==========================================================================
``direction``, ``origin``     as without pairs
``grad_prev``                 the last gradient, rotated
``rotated_direction``         d, rotated, if the optimizer rotates any matrix
``hessian_diag``              h, of the rotated matrix
``s_0``, ``y_0``, ``s_1``...  the pairs, rotated
``basis_left``, ``_right``    of a weight matrix, with ``factor_left`` and ``factor_right``
============================  ==========================================================================

A matrix is rotated on every rank that has all of it. A DTensor is not, because a rank has a shard of it and the bases
belong to whole sides; neither are the shards of ``process_group=``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastnlcg import _native
from fastnlcg.full_batch.descent_table import DescentTable, TablePasses
from fastnlcg.full_batch.iteration import Course, DescentOptions
from fastnlcg.full_batch.passes import Mark
from fastnlcg.full_batch.quasi_newton import OverVectors, Vectors
from fastnlcg.full_batch.rotation import matrices_of
from fastnlcg.tensors.checks import DTYPES, dense_strides, has_storage
from fastnlcg.tensors.dtensor import as_like, is_sharded, memory, shard_like
from fastnlcg.tensors.ranks import Ranks
from fastnlcg.tensors.state import HUGE, state_dtype
from fastnlcg.tensors.table import State, flat_offsets

ROTATED = ("basis_left", "basis_right", "factor_left", "factor_right")


def _only_here(key: str) -> bool:
    """Whether a key of a state is only this table's."""
    return key == "rotated_direction" or key in ROTATED or _is_pair(key)


def _is_pair(key: str) -> bool:
    return key[:2] in ("s_", "y_") and key[2:].isdecimal()


def leave_bases(state: Mapping[Any, Any], options: DescentOptions) -> bool:
    """If the state is in bases that the options do not use, removes what is in them. Returns whether it was. Without
    pairs in the options removes those of the state too."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    if not options.history:
        for entry in entries:
            for key in [key for key in entry if _is_pair(key)]:
                del entry[key]
    if options.preconditioner == "kronecker":
        return False
    if not any(key in entry for entry in entries for key in ROTATED):
        return False
    for entry in entries:
        _drop_rotated(entry)
    return True


def _drop_rotated(entry: dict[str, Any]) -> None:
    for key in [*entry]:
        if _only_here(key) or key in ("hessian_diag", "grad_prev", "direction"):
            del entry[key]


def basis_keys(params: list[Tensor], state: Mapping[Any, Any]) -> list[list[str]]:
    """For each parameter, the keys of its state that only a run with rotations has."""
    return [[key for key in ("rotated_direction", *ROTATED) if key in state.get(p, ())] for p in params]


def keep_bases(loaded: list[tuple[Tensor, dict[str, Any], list[str]]]) -> None:
    """Makes loaded state be in the bases in which it was saved, given each parameter, its entry, and the
    :func:`basis_keys` of the file. torch.distributed.checkpoint reads only what the reader's state has, and leaves
    what the file does not have as it is. If a basis is lost, by this or because a rank has only a shard of its matrix,
    the entries lose all that is in bases, on every rank alike."""
    for p, entry, keys in loaded:
        for key in ("rotated_direction", *ROTATED):
            if key in entry and (key not in keys or (key in ROTATED and is_sharded(p))):
                del entry[key]
    if any(entry and not entry.keys() >= {*keys} for _, entry, keys in loaded):
        for _, entry, _ in loaded:
            _drop_rotated(entry)


class VectorTable(DescentTable):
    """The parameters that take part, and the flat buffers of their vectors."""

    vectors: Vectors
    rotates: bool
    """whether matrices are rotated, if there are any"""
    keeps_pairs = True
    """whether the state had the pairs of these options"""

    def _make_vectors(self, params: list[Tensor], stateful: list[int], ranks: Ranks | None) -> None:
        unowned = frozenset() if ranks is None else ranks.unowned
        offsets, owned, n = flat_offsets(params, stateful, unowned)
        options, on_gpu = self.options, _native.on_gpu(self.device)
        dtype = state_dtype(memory(params[stateful[0]])) if stateful else torch.float32
        self.rotates = options.preconditioner == "kronecker" and not self.plain_shards
        shapes = [_rotatable(params[i]) if self.rotates else None for i in stateful]

        def make(shape: tuple[int, ...]) -> Tensor:
            made = torch.zeros(shape, dtype=dtype, device=self.device)
            if made.numel() * made.element_size() >= HUGE and not on_gpu:
                _native.Buffer(made.view(-1)).advise_huge_pages()
            return made

        device = f"cuda:{self.device.index or 0}" if on_gpu else "cpu"
        self.vectors = Vectors(
            n,
            make,
            DTYPES[dtype],
            device,
            _native.current_stream(str(self.device)) if on_gpu else 0,
            history=options.history,
            preconditioned=options.preconditioner is not None,
            matrices=matrices_of(shapes, offsets),
            load=_weakly(self._load),
            owned=owned,
            agree=None if ranks is None else _broadcast(ranks),
        )
        sides = {matrix.begin: matrix.sides for matrix in self.vectors.rotation.matrices}
        gradients: dict[int, Tensor] = {}
        self.views: list[tuple[dict[str, Any], list[Any]]] = []
        """each entry of the state, and what it has"""
        for i, offset in zip(stateful, offsets, strict=True):
            gradients[i] = _view(self.vectors.gradient, memory(params[i]), offset)
            self._take_state(params[i], offset, sides.get(offset, {}))
        self._gradient_views = [gradients[i] for i in self.active]
        _let_go(self.state, {params[i] for i in stateful})

    def _take_state(self, p: Tensor, offset: int, sides: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Makes the state of ``p`` views of the buffers, with what it had."""
        v, entry, local = self.vectors, self.state[p], memory(p)
        bases = {f"basis_{name}": side["basis"].shape for name, side in sides.items()}
        had = {key: entry[key].shape for key in ("basis_left", "basis_right") if key in entry}
        if "rotated_direction" in entry and bases != had:
            self.is_broken = True  # the matrix is rotated otherwise now, as with 0.8 its bias; or a basis was removed
        buffers: dict[str, Any] = {"direction": v.out, "grad_prev": v.grad_prev, "hessian_diag": v.h}
        if v.out is not v.direction:
            buffers["rotated_direction"] = v.direction
        made: dict[str, Tensor] = {}
        with torch.no_grad():
            for key, buffer in buffers.items():
                if buffer is None:
                    continue
                view = _view(buffer, local, offset)
                old = entry.get(key, entry.get("direction") if key == "rotated_direction" else None)
                if isinstance(old, Tensor) and old.shape == p.shape:
                    view.copy_(shard_like(old, p))
                made[key] = as_like(view, p)
            for name, side in sides.items():
                for kind, tensor in side.items():
                    old = entry.get(f"{kind}_{name}")
                    if isinstance(old, Tensor) and old.shape == tensor.shape:
                        tensor.copy_(old)
                    made[f"{kind}_{name}"] = tensor
            for k in range(2 * v.history):
                assert v.rows is not None
                key = f"{'sy'[k // v.history]}_{k % v.history}"
                view, old = _view(v.rows, local, k * v.n + offset), entry.get(key)
                if isinstance(old, Tensor) and old.shape == p.shape:
                    view.copy_(shard_like(old, p))
                else:
                    self.keeps_pairs = False
                made[key] = as_like(view, p)
        for key in [*entry]:
            if _only_here(key) and key not in made:
                del entry[key]
        entry.update(made)
        self.views.append((entry, list(entry.values())))

    def has_state(self, state: State) -> bool:
        return super().has_state(state) and all(
            _native.same_objects(list(entry.values()), tensors) for entry, tensors in self.views
        )

    def _load(self, buffer: Tensor) -> None:
        """The gradient, as what is minimized has it."""
        with torch.no_grad():
            if self._gradient_views:
                own = [p.grad for p in self._fixed["params"]] if self.gradients_fit else None
                torch._foreach_copy_(self._gradient_views, own or self._gradients())
            if self.maximize:
                buffer.neg_()

    def use_stream(self) -> None:
        super().use_stream()
        if _native.on_gpu(self.device):
            self.vectors.follow_stream(_native.current_stream(str(self.device)))

    def fit(self, course: Course) -> None:
        if self.rotates:
            active = [i for i in course.active if i < len(self.all)]
            before, now = _biases(self.all, active), _biases(self.all, self.members)
            if _parted(before - now, self.members) or _parted(now - before, active):
                self.is_broken = True  # their state was in one basis, and is not, or the other way round
        super().fit(course)
        pairs, m = course.pairs, self.options.history
        if not self.keeps_pairs or (pairs.count and len(pairs.gram) != m):
            pairs.drop()

    def forget(self) -> None:
        self.vectors.forget()


class VectorPasses(OverVectors, TablePasses):
    """:class:`PairPasses` over a table of tensors."""

    @property
    def vectors(self) -> Vectors:  # type: ignore[override]
        table = self.table
        assert isinstance(table, VectorTable)
        table.use_stream()
        table.vectors.total = self._total
        return table.vectors

    @functools.cached_property
    def _total(self) -> Callable[[list[float]], list[float]]:
        return _weakly(self._sums_over_ranks)

    def _sums_over_ranks(self, sums: list[float]) -> list[float]:
        return self.table.total(sums, self.course.evaluations)

    def slope(self, f: float) -> tuple[float, float, float]:
        self.vectors.fresh = False
        return super().slope(f)

    def _marked(self, dhd: float) -> tuple[float, float, Mark]:
        sums = self.table.run("mark")[:3]
        self.leave(sums[1], sums[2])
        slope, xd, xx = self.table.total(sums, self.course.evaluations)
        return slope, dhd, (xd, xx)


def _weakly(method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The method, for what its object holds: a cycle would keep both until Python looks for cycles."""
    reference = weakref.WeakMethod(method)

    def call(argument: Any) -> Any:
        bound = reference()
        assert bound is not None
        return bound(argument)

    return call


def _biases(params: list[Tensor], members: list[int]) -> set[tuple[int, int]]:
    """The matrices among these parameters that have a bias, and their biases."""
    matrices = matrices_of([_rotatable(params[i]) for i in members], members)
    return {(matrix.begin, matrix.bias) for matrix in matrices if matrix.bias is not None}


def _parted(pairs: set[tuple[int, int]], members: list[int]) -> bool:
    """Whether a matrix or a bias of these pairs is among the parameters ``members``."""
    return any(i in members for pair in pairs for i in pair)


def _view(buffer: Tensor, like: Tensor, offset: int) -> Tensor:
    """A parameter's elements in a flat buffer, in its memory order."""
    return buffer.as_strided(like.shape, dense_strides(like), offset)


def _rotatable(p: Tensor) -> tuple[int, ...] | None:
    """The shape of a parameter whose flat elements are row-major, and all here; None for another."""
    if is_sharded(p) or not has_storage(p):
        return None
    rows = torch.empty(p.shape, device="meta").stride()
    in_rows = all(a == b or size == 1 for a, b, size in zip(dense_strides(p), rows, p.shape, strict=True))
    return tuple(p.shape) if in_rows else None


def _let_go(state: State, members: set[Tensor]) -> None:
    """Copies the state of other parameters out of the buffers of an older table, which could otherwise not be freed."""
    for p, entry in state.items():
        if p in members or not isinstance(entry, dict):
            continue
        for key, value in entry.items():
            if type(value) is Tensor and value.untyped_storage().nbytes() > value.numel() * value.element_size():
                entry[key] = value.clone()


def _broadcast(ranks: Ranks) -> Callable[[list[Any]], None]:
    """The eigenvectors of the first rank, on every rank: they depend on the number of threads."""

    def agree(eigenvectors: list[Any]) -> None:
        first = dist.get_process_group_ranks(ranks.group)[0]
        for each in eigenvectors:
            dist.broadcast(each, first, group=ranks.group)

    return agree
