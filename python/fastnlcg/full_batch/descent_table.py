"""CGDescent's table of tensors: the parameters that take part, their state, and the passes over them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnlcg import _native
from fastnlcg.full_batch.iteration import Course, DescentOptions
from fastnlcg.full_batch.passes import Edited, Mark, Sums
from fastnlcg.tensors import groups
from fastnlcg.tensors.checks import usable_gradient
from fastnlcg.tensors.dtensor import memory
from fastnlcg.tensors.ranks import Ranks
from fastnlcg.tensors.state import local_arrays, missing_arrays
from fastnlcg.tensors.table import ParameterTable, State, check_parameters, expected_state, in_order, write_state


def state_arrays(options: DescentOptions) -> dict[str, float]:
    """The tensors of a parameter's state, and what they hold at first."""
    arrays = {"direction": 0.0, "grad_prev": 0.0, "origin": 0.0}
    return arrays if options.preconditioner is None else {**arrays, "hessian_diag": 1.0}


def with_gradient(params: Sequence[Tensor]) -> list[int]:
    """The parameters that take part in an iteration. A frozen one may still have a gradient: zeros, or an old one."""
    return [i for i, p in enumerate(params) if p.requires_grad and p.grad is not None and p.numel()]


def _kind(p: Tensor) -> tuple[object, ...]:
    return p.dtype, p.device, p.shape, p.stride()


_REPLACED = "a parameter or a tensor of the state was replaced, moved or resized during a step"


class DescentTable(ParameterTable):
    """The parameters ``members`` (None: those with a gradient), with their state.

    Args:
        params: every parameter of the optimizer.
        agreed: what has to be the same on all ranks, in words.
        plain_shards: whether plain parameters are shards.

    Raises:
        RuntimeError: if there is no gradient; and what a parameter that cannot be stepped raises.
    """

    def __init__(
        self,
        params: list[Tensor],
        members: list[int] | None,
        state: State,
        options: DescentOptions,
        ranks: Ranks | None,
        *,
        agreed: str,
        maximize: bool,
        plain_shards: bool = False,
    ) -> None:
        super().__init__()
        self.members = with_gradient(params) if members is None else list(members)
        if not self.members and ranks is None:
            raise RuntimeError("no parameter that requires a gradient has one: the closure must call backward()")
        check_parameters(params, self.members)
        stateful = in_order(self.members, ranks)
        for i in stateful:
            if params[i].dtype not in (torch.float32, torch.float64):
                raise TypeError(f"parameter {i} has dtype {params[i].dtype}; expected torch.float32 or torch.float64")
        self.plain_shards = plain_shards
        arrays = {"origin": 0.0} if options.in_vectors else state_arrays(options)
        new = {i: missing_arrays(i, params[i], state.get(params[i]) or {}, arrays) for i in stateful}
        had = [set(state.get(params[i]) or ()) for i in stateful]
        preconditioned = options.preconditioner is not None
        self.lacks_diagonal = preconditioned and bool(had) and not any("hessian_diag" in keys for keys in had)
        """whether the state was that of a run without a preconditioner"""
        needed = {"direction", "grad_prev"} | (
            {"hessian_diag"} if preconditioned and not self.lacks_diagonal else set()
        )
        self.is_broken = members is not None and not all(needed <= keys for keys in had)
        """whether the state lacked something without which these members cannot continue"""
        # Everything has been checked: from here on state is written.
        write_state(state, params, new)
        self.all, self.options, self.state, self.maximize, self.agreed = params, options, state, maximize, agreed
        self.mark: Mark | None = None
        """of this rank's elements; None after a load"""
        self.alpha = math.nan
        """of the last trial"""
        self.gradients_fit = False
        """whether the last pass read the parameters' own gradients"""
        self.params = [params[i] for i in stateful]
        self._kinds = [_kind(p) for p in self.params]
        self.entries = [state[p] for p in self.params]
        self.active = [i for i in stateful if memory(params[i]).numel()]  # a shard may have none
        keys: dict[str, str | None] = {"direction": "direction", "origin": "origin"}
        if not options.in_vectors:
            keys["grad_prev"] = "grad_prev"
            keys["diagonal"] = None if options.preconditioner is None else "hessian_diag"
        self.lay_out(params, stateful, self.active, ranks, _native.StateKeys(**keys))
        self._make_vectors(params, stateful, ranks)
        stepped = self.memory_of(params, self.active)
        self.plain = all(params[i] is local for i, local in zip(self.active, stepped, strict=True))
        entries = [state[params[i]] for i in self.active]
        self._fixed: dict[str, Any] = {
            "params": stepped,
            "entries": entries if self.plain else [local_arrays(entry) for entry in entries],
            "state": state,
            "expected_state": expected_state(state),
            "scalars": groups.new_scalars().to(self.device),
            "alpha_prev": [torch.zeros((), dtype=torch.float64, device=self.device)],
        }
        self._tensors = _native.Tensors(**self._fixed)

    def _make_vectors(self, params: list[Tensor], stateful: list[int], ranks: Ranks | None) -> None:
        """Makes the buffers of a table that has them; after :meth:`lay_out`."""

    def is_of(self, params: list[Tensor]) -> bool:
        """Whether these are the parameters it was made of, as they were."""
        return _native.same_objects(params, self.all) and self._kinds == [_kind(p) for p in self.params]

    def has_state(self, state: State) -> bool:
        """Whether this is the state it was made of."""
        return state is self.state and all(
            state.get(p) is entry for p, entry in zip(self.params, self.entries, strict=True)
        )

    def fit(self, course: Course) -> None:
        """Makes ``course`` continue from what the state had when the table was made of it."""
        if self.is_broken:
            course.f = course.g_max = math.nan
            course.forget()
        elif self.lacks_diagonal:
            course.updates, course.ratios = 0, []
        if not self.options.history:
            course.pairs.drop()
        if not course.updates:
            self.forget()

    def forget(self) -> None:
        """h = 1."""
        for entry in self.entries:
            if "hessian_diag" in entry:
                entry["hessian_diag"].fill_(1.0)

    def set_has_changed(self) -> bool:
        """Whether other parameters have a gradient than those that take part."""
        return with_gradient(self.all) != self.members

    def largest(self) -> float:
        """The largest ``|x|`` on this rank."""
        with torch.no_grad():
            return max((float(p.abs().max()) for p in self._fixed["params"]), default=0.0)

    def read_parameters(self) -> None:
        """Into the copies of those with gaps."""
        with torch.no_grad():
            for p, copy in self.copies:
                copy.copy_(p)

    def _pass(self, kind: str, **numbers: Any) -> _native.DescentPass:
        self.use_stream()
        preconditioned = self.options.preconditioner is not None
        return _native.DescentPass(kind, preconditioned=preconditioned, maximize=self.maximize, **numbers)

    def move(self, alpha: float, *, first: bool, sums: list[list[float]]) -> list[float]:
        """The pass of a trial; its sums on this rank, which are appended to ``sums``: by one call into C, in which no
        interrupt can come between the pass and its record."""
        assert self.native is not None
        given = [self._tensors], [self._pass("trial", alpha=alpha, first=first)], [_native.num_threads()]
        sums.extend(filter(None, map(self.native.descend, *given)))
        if not sums:
            raise RuntimeError(_REPLACED)
        return sums[-1]

    def run(self, kind: str, **numbers: Any) -> list[float]:
        """Another pass; its sums on this rank."""
        assert self.native is not None
        pass_, threads = self._pass(kind, **numbers), _native.num_threads()
        sums = self.native.descend(self._tensors, pass_, threads) if self.plain else None
        self.gradients_fit = sums is not None
        if sums is None:
            at = _native.Tensors(gradients=self._gradients(), **self._fixed)
            sums = self.native.descend(at, pass_, threads)
        if sums is None:
            raise RuntimeError(_REPLACED)
        return sums

    def _gradients(self) -> list[Tensor]:
        """In the memory order of the parameters; zeros for one that is None, as after a branch that was not taken."""
        gradients = []
        for i, local in zip(self.active, self._fixed["params"], strict=True):
            p = self.all[i]
            gradients.append(torch.zeros_like(local) if p.grad is None else usable_gradient(i, p, p.grad))
        return gradients

    def total(self, sums: list[float], step: int) -> list[float]:
        """These sums over all ranks."""
        if self.ranks is None or not self.ranks.every_decision:
            return sums
        return self.ranks.total(self.exchange(sums, step))

    def exchange(self, values: list[float], step: int) -> list[list[float]]:
        """The values of every rank. All must have come from the same length of the same trial."""
        assert self.ranks is not None
        digest = hashlib.blake2b(f"{self.agreed} {self.alpha!r}".encode(), digest_size=6).digest()
        return self.ranks.exchange(values, float(step), "full_batch", float(int.from_bytes(digest, "little")))


def _same(a: float, b: float, rtol: float) -> bool:
    return abs(a - b) <= rtol * abs(b) or (math.isnan(a) and math.isnan(b)) or a == b


class TablePasses:
    """The passes of a descent over a table of tensors.

    Args:
        current: returns the current table, which is made from the closure's first gradients.
        course: where the run stands.
    """

    def __init__(self, current: Callable[[], DescentTable | None], course: Course) -> None:
        self.current, self.course = current, course
        self.edited, self.unchecked = False, 0.0
        self.stored: list[list[float]] = []
        """the sums of the pass that has stored where the search begins, if it has run"""

    @property
    def table(self) -> DescentTable:
        table = self.current()
        assert table is not None
        return table

    def _over_ranks(self, values: list[float]) -> list[list[float]]:
        """The values of every rank. Edited if x was edited on one of them."""
        ranks = self.table.ranks
        assert ranks is not None
        rows = self.table.exchange([*values, self.unchecked, float(self.edited)], self.course.evaluations)
        edited = any(row[-1] for row in rows)
        edited = edited or (self.unchecked > 0.0 and self._is_another(ranks.total(rows)[-2]))
        self.edited, self.unchecked = False, 0.0
        if edited:
            raise Edited
        return rows

    def _is_another(self, xx: float) -> bool:
        """After a load: whether x is not that of the file, up to the order in which its devices and ranks add up."""
        return not _same(xx, self.course.mark[1], 1e-9)

    def mean(self, f: float) -> float:
        """The loss alone, over ranks."""
        if self.table.ranks is None:
            return f
        return _mean(row[0] for row in self._over_ranks([f]))

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        table = self.table
        if first is None and not self.stored:  # an interrupt before the first trial: x is where the search began
            return
        table.alpha = alpha
        torch.autograd.graph.increment_version(table.params)
        if first is not None:
            self.stored.clear()
            table.read_parameters()
        xd, xx, *_ = table.move(alpha, first=first is not None, sums=self.stored if first is not None else [])
        table.write_back()
        if first is None:
            return
        if table.mark is not None:
            self.edited = not (_same(xd, table.mark[0], 0.0) and _same(xx, table.mark[1], 0.0))
        elif table.ranks is None:
            self.edited = self._is_another(xx)
        else:
            self.unchecked = xx
        if self.edited and table.ranks is None:
            self.edited = False
            raise Edited

    def slope(self, f: float) -> tuple[float, float, float]:
        slope, largest, *_ = self.table.run("slope")
        ranks = self.table.ranks
        if ranks is None:
            return f, slope, largest
        rows = self._over_ranks([f, slope, largest])
        return _mean(row[0] for row in rows), ranks.total(rows)[1], max(row[2] for row in rows)

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        numbers = {"alpha": alpha, "scale": scale, "ys": ys, "shs": shs}
        sums = self.table.run("curvature", update=update is not None, **numbers)
        return Sums(*self.table.total(sums[:3], self.course.evaluations))

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        sums = self.table.run("direction", beta=beta)[:4]
        self.leave(sums[2], sums[3])
        slope, dhd, xd, xx = self.table.total(sums, self.course.evaluations)
        return slope, dhd, (xd, xx)

    def leave(self, *mark: float) -> None:
        """The next search begins here."""
        self.table.mark = mark[0], mark[1]
        self.stored.clear()

    def forget(self) -> None:
        self.table.forget()

    def x_max(self) -> float:
        largest = self.table.largest()
        if self.table.ranks is None:
            return largest
        return max(row[0] for row in self._over_ranks([largest]))


def _mean(values: Iterable[float]) -> float:
    each = list(values)
    return sum(each) / len(each)
