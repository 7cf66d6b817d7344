"""The vectors of a full-batch run with curvature pairs, or with weight matrices in rotated bases: flat buffers, one
native pass over all of them at a time.

======================  =======================================================================
``gradient``            the gradient at x, rotated
``grad_prev``           that at the last point
``direction``           d, rotated
``out``                 d as x moves along it: ``direction`` itself if nothing is rotated
``h``                   the diagonal, of the rotated matrix
``rows``                2 m of them: s of m pairs, then their y, rotated
======================  =======================================================================

A buffer is whole blocks of 16 elements. What no variable covers is 0 in it, and 1 in h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from fastnlcg import _native
from fastnlcg.full_batch.pairs import PairSums
from fastnlcg.full_batch.passes import Mark, Sums
from fastnlcg.full_batch.rotation import Matrix, Rotation

AT_ONCE = 4
"""rows in one pass of sums"""


class Vectors:
    """Buffers of ``n`` elements, which are whole blocks.

    Args:
        make: ``make(shape)`` returns zeros.
        dtype, device, stream: of the native step.
        history: the number of pairs.
        preconditioned: whether there is an h.
        matrices: those that are rotated.
        load: writes the gradient at x into a buffer.
        owned: how many elements, from the start, this rank adds to sums; -1: all.
        total: makes sums of this rank sums over ranks.
        agree: see :class:`Rotation`.
    """

    def __init__(
        self,
        n: int,
        make: Callable[[tuple[int, ...]], Any],
        dtype: str,
        device: str,
        stream: int,
        *,
        history: int,
        preconditioned: bool,
        matrices: list[Matrix],
        load: Callable[[Any], None],
        owned: int = -1,
        total: Callable[[list[float]], list[float]] | None = None,
        agree: Callable[[list[Any]], None] | None = None,
    ) -> None:
        self.n, self.history, self.load, self.owned = n, history, load, owned
        self.total = total or (lambda sums: sums)
        self.gradient, self.grad_prev, self.direction = make((n,)), make((n,)), make((n,))
        self.h = make((n,)) if preconditioned else None
        self.rows = make((2 * history, n)) if history else None
        self.out = make((n,)) if matrices else self.direction
        self._change = self.out.reshape(1, -1)
        self.rotation = Rotation(matrices, make, agree)
        self.preconditioned = preconditioned
        self.fresh = False
        """whether ``gradient`` is that at x"""
        if self.h is not None:
            self.h[...] = 1.0
        self._step = _native.FlatStep(dtype, device, stream)
        arrays = {"g": self.gradient, "grad_prev": self.grad_prev, "direction": self.direction, "diagonal": self.h,
                  "rows": self.rows, "p": self.gradient}  # fmt: skip
        # p is not read: the mark of x is formed elsewhere.
        self._buffers: dict[str, Any] = {
            name: _native.Buffer(array.reshape(-1)) for name, array in arrays.items() if array is not None and n
        }
        if n:
            self._step.bind(owned=owned, **self._buffers)

    @property
    def rotates(self) -> bool:
        """Whether there are rotated matrices."""
        return bool(self.rotation.matrices)

    def follow_stream(self, stream: int) -> None:
        """Native work goes to this stream."""
        self._step.stream = stream

    def _run(self, kind: str, n_sums: int, **numbers: Any) -> list[float]:
        """One pass; its first ``n_sums`` sums, over ranks."""
        sums = [0.0] * n_sums
        if self.n:
            pass_ = _native.DescentPass(kind, preconditioned=self.preconditioned, **numbers)
            sums = self._step.descend(pass_, _native.num_threads())[:n_sums]
        return self.total(sums)

    def take_gradient(self) -> None:
        """The gradient at x, unless it is there."""
        if not self.fresh:
            self.load(self.gradient)
            self.rotation.rotate(self.gradient)
            self.fresh = True

    def _turn(self) -> bool:
        """Brings everything to new bases."""
        vectors = [self.grad_prev, self.direction, *([] if self.rows is None else [self.rows])]
        if not self.rotation.turn(self.h, vectors):
            return False
        self.fresh = False
        self.take_gradient()
        return True

    # ---- without pairs -----------------------------------------------------------------------------------------------

    def curvature(self, update: tuple[float, float, float, float] | None, *, turn: bool) -> Sums:
        """As :meth:`Passes.curvature`; ``turn``: new bases after the update."""
        self.take_gradient()
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        if update is not None and self.rotates:
            self.out[...] = self.gradient  # its memory is free until the next direction
            self.out -= self.grad_prev
            self.rotation.see(self._change, [(0, ys)])
        numbers = {"alpha": alpha, "scale": scale, "ys": ys, "shs": shs}
        sums = self._run("curvature", 3, update=update is not None, **numbers)
        if update is not None and turn and self._turn():
            sums = self._run("curvature", 3, update=False)
        return Sums(*sums)

    def conjugate(self, beta: float) -> float:
        """d = beta d - P g; g_prev = g. Returns sum(d h d)."""
        self.take_gradient()
        sums = self._run("direction", 2, beta=beta)
        self._write_out()
        return sums[1]

    # ---- pairs -------------------------------------------------------------------------------------------------------

    def pair(
        self, row: int, update: tuple[float, float, float, float], *, turn: Sequence[tuple[int, float]] = ()
    ) -> PairSums:
        """Stores a pair, and updates h with (alpha, scale, ys, scale * shs). ``turn``: new bases after that, from these
        pairs: their rows, with ys."""
        self.take_gradient()
        alpha, scale, ys, shs = update
        numbers = {"alpha": alpha, "scale": scale, "ys": ys, "shs": shs}
        before, after, yy, ss = self._run("pair", 4, row=row, y_row=self.history + row, **numbers)
        if turn and self.rotates:
            self.rotation.see(self.rows, [(self.history + i, each) for i, each in turn])
            if self._turn():
                after = self._run("curvature", 3, update=False)[2]
        return PairSums(before, after, yy, ss)

    def _dots(self, kind: str, first: int, count: int, sums: Sequence[float] = ()) -> list[float]:
        """Sums of ``count`` rows from ``first`` on, times g or d; those in ``sums`` are known."""
        found = list(sums)
        while len(found) < count:
            some = min(AT_ONCE, count - len(found))
            found += self._run(kind, some, row=first + len(found), count=some)
        return found

    def gradient_dots(self, count: int) -> list[float]:
        """sum(s_i g) of the first ``count`` rows."""
        self.take_gradient()
        return self._dots("gradient_dots", 0, count)

    def residual(self, a: Sequence[float], gamma: float, *, plain: bool) -> list[float]:
        """d = r = gamma P (g - sum a_i y_i); g_prev = g. Returns sum(y_i r), by rows. ``plain``: P is the identity."""
        self.take_gradient()
        known = min(AT_ONCE, len(a))
        pass_ = _native.DescentPass(
            "residual",
            preconditioned=self.preconditioned and not plain,
            gamma=gamma,
            row=self.history,
            count=len(a),
            coefficients=[-x for x in a],
        )
        sums = self._step.descend(pass_, _native.num_threads())[:known] if self.n else [0.0] * known
        if not a:
            return []
        return self._dots("direction_dots", self.history, len(a), self.total(sums))

    def pair_direction(self, c: Sequence[float]) -> float:
        """d = -(d + sum c_i s_i). Returns sum(d h d)."""
        sums = self._run("pair_direction", 2, row=0, count=len(c), coefficients=list(c))
        self._write_out()
        return sums[1]

    def _write_out(self) -> None:
        if self.out is not self.direction:
            self.out[...] = self.direction
            self.rotation.rotate_back(self.out)

    def forget(self) -> None:
        """h = 1, and factors of zero."""
        if self.h is not None:
            self.h[...] = 1.0
        self.rotation.forget()


class OverVectors(ABC):
    """The part of :class:`PairPasses` that is :class:`Vectors`' work, wherever x is."""

    vectors: Vectors

    @abstractmethod
    def _marked(self, dhd: float) -> tuple[float, float, Mark]:
        """Behind a new direction: sum(g d), ``dhd``, and the mark of x."""

    def curvature(self, update: tuple[float, float, float, float] | None, *, turn: bool = False) -> Sums:
        return self.vectors.curvature(update, turn=turn)

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        return self._marked(self.vectors.conjugate(beta))

    @property
    def rotates(self) -> bool:
        return self.vectors.rotates

    def pair(
        self, row: int, update: tuple[float, float, float, float], *, turn: Sequence[tuple[int, float]] = ()
    ) -> PairSums:
        return self.vectors.pair(row, update, turn=turn)

    def gradient_dots(self, count: int) -> list[float]:
        return self.vectors.gradient_dots(count)

    def residual(self, a: list[float], gamma: float, *, plain: bool) -> list[float]:
        return self.vectors.residual(a, gamma, plain=plain)

    def pair_direction(self, c: list[float]) -> tuple[float, float, Mark]:
        return self._marked(self.vectors.pair_direction(c))
