"""The scalars of L-BFGS: which pairs there are, and the two loops over them, from sums alone.

With the pairs (s_i, y_i) from the oldest to the newest and H0 = gamma P::

    a_i = (s_i g - sum_{j > i} a_j s_i y_j) / s_i y_i             from the newest to the oldest
    q   = g - sum_i a_i y_i,  r = H0 q
    b_i = (y_i r + sum_{j < i} (a_j - b_j) s_j y_i) / s_i y_i     from the oldest to the newest
    d   = -(r + sum_i (a_i - b_i) s_i)

Each vector is read once: the sums ``s_i y_j`` of two pairs are kept, and ``s_i y`` with a new y is a difference of
``s_i g`` at two points.

Source: Nocedal, Math. Comp. 35 (1980) 773. The choice of H0 is this library's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastnlcg.full_batch.rotation import EVERY

KEEP = 0.9
"""of the running means that choose H0"""

MARGIN = 0.3
"""by how much the identity has to be better than a diagonal that is not rotated. Without it Poisson's and Burgers'
networks as flat vectors chose the identity and ended 5 to 300 times higher (seed 9, 1,500 evaluations)"""


class PairSums(NamedTuple):
    """Sums over a new pair; P before and after its update."""

    y_Py_before: float  # noqa: N815
    y_Py: float  # noqa: N815
    yy: float
    ss: float


@dataclass
class Pairs:
    """The pairs that a run has. They lie in rows, which are used in turn."""

    count: int = 0
    next_row: int = 0
    gram: list[list[float]] = field(default_factory=list)
    """``gram[i][j]`` = sum(s_i y_j), by rows; known for pairs of which j is not older than i"""
    s_g: list[float] = field(default_factory=list)
    """sum(s_i g) at the point where the last iteration ended"""
    gamma: float = 1.0
    plain: bool = False
    """whether H0 is gamma times the identity"""
    misfit: tuple[float, float] = (0.0, 0.0)
    """running means of log(sum(y P y) sum(s B s) / ys^2), with B = 1/P, for the identity and for 1/h: 0 for a perfect
    P"""

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Pairs:
        """From :meth:`as_dict`."""
        return cls(**kept)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return dict(vars(self))

    def drop(self) -> None:
        """Drops the pairs, and keeps gamma and the choice of H0."""
        self.count, self.next_row, self.gram, self.s_g = 0, 0, [], []

    def order(self, history: int) -> list[int]:
        """The rows of the pairs, from the oldest to the newest."""
        return [(self.next_row - self.count + i) % history for i in range(self.count)]

    def new_to_factors(self, history: int, ys: float) -> list[tuple[int, float]]:
        """The rows, with ys, of the pairs since the last change of bases, from the oldest to the one that is about to
        be added; ``ys``: of that one."""
        older = [i for i in self.order(history) if i != self.next_row]
        return [*((i, self.gram[i][i]) for i in older[1 - EVERY :]), (self.next_row, ys)]

    def choose(
        self, sums: PairSums, ys: float, shs: float, preconditioned: bool, *, first: bool, margin: float
    ) -> None:
        """Chooses H0, by which P has predicted the pairs better, and sets gamma. ``shs``: sum(s h s) before the
        update; ``margin``: by how much the identity has to be better."""
        if preconditioned:
            plain = _log(sums.yy * sums.ss, ys)
            diagonal = plain if first else _log(sums.y_Py_before * shs, ys)
            if math.isfinite(plain) and math.isfinite(diagonal):
                self.misfit = tuple(KEEP * a + (1.0 - KEEP) * b for a, b in zip(self.misfit, (plain, diagonal)))  # type: ignore[assignment]  # noqa: B905
            self.plain = self.misfit[0] + margin < self.misfit[1]
        y_Py = sums.yy if self.plain else sums.y_Py  # noqa: N806
        gamma = ys / y_Py if y_Py > 0.0 else math.nan
        if 0.0 < gamma < math.inf:
            self.gamma = gamma

    def add(self, history: int, ys: float) -> None:
        """A new pair, whose vectors are in the row ``next_row``. Its sums with the others follow in :meth:`see`."""
        if not self.gram:
            self.gram, self.s_g = [[0.0] * history for _ in range(history)], [0.0] * history
        self.gram = [list(row) for row in self.gram]
        self.gram[self.next_row][self.next_row] = ys
        self.next_row = (self.next_row + 1) % history
        self.count = min(self.count + 1, history)

    def see(self, history: int, s_g: list[float], *, added: bool) -> None:
        """Takes sum(s_i g) at a new point, by rows; ``added``: a pair was added for the step to it."""
        if added:
            *older, newest = self.order(history)
            for i in older:
                self.gram[i][newest] = s_g[i] - self.s_g[i]
        self.s_g = s_g

    def first_loop(self, history: int) -> list[float]:
        """a, by rows."""
        a = [0.0] * self.count
        order = self.order(history)
        for k in reversed(range(len(order))):
            i = order[k]
            a[i] = (self.s_g[i] - sum(a[j] * self.gram[i][j] for j in order[k + 1 :])) / self.gram[i][i]
        return a

    def second_loop(self, history: int, a: list[float], y_r: list[float]) -> list[float]:
        """a - b, by rows. ``y_r``: sum(y_i r)."""
        c = [0.0] * self.count
        order = self.order(history)
        for k, i in enumerate(order):
            c[i] = a[i] - (y_r[i] + sum(c[j] * self.gram[j][i] for j in order[:k])) / self.gram[i][i]
        return c


def _log(product: float, ys: float) -> float:
    ratio = product / ys / ys
    return math.log(ratio) if 0.0 < ratio < math.inf else math.nan
