"""What full-batch descent asks of the vectors, in any kind of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastnlcg.full_batch.pairs import PairSums

Mark = tuple[float, float]
"""sum(x d) and sum(x x): any write to x between two iterations changes them"""


class Edited(Exception):  # noqa: N818
    """x is not what the last iteration left, or other variables take part: the run must start from x again."""


class Passes(Protocol):
    """The vectors: x, g, d, h, and x and g at the point where a search starts. Each method is one pass over memory."""

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        """x = origin + alpha d. ``first``, in the first trial of a search, is the mark that x must have: x becomes the
        origin, and if its mark differs, this call or the next evaluation raises Edited."""

    def slope(self, f: float) -> tuple[float, float, float]:
        """Returns f, sum(g d), max |g|; the second is not finite if an element of g is not. Over ranks: the mean of f,
        the sum, and the maximum."""

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        """Updates h with (alpha, scale, ys, scale * shs) if given; returns the sums over the new h."""

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        """d = beta d - P g, g_prev = g. Returns sum(g d), sum(d h d), and the mark of x."""

    def forget(self) -> None:
        """Sets h = 1."""


class PairPasses(Passes, Protocol):
    """The vectors of a run with curvature pairs, or with rotated weight matrices; see :class:`Vectors`."""

    @property
    def rotates(self) -> bool:
        """Whether there are rotated matrices."""

    def curvature(self, update: tuple[float, float, float, float] | None, *, turn: bool = False) -> Sums:
        """As in :class:`Passes`. ``turn``: new bases after the update."""

    def pair(
        self, row: int, update: tuple[float, float, float, float], *, turn: Sequence[tuple[int, float]] = ()
    ) -> PairSums:
        """Stores the pair of the last step, updates h with (alpha, scale, ys, scale * shs), and returns sums over the
        pair. ``turn``: new bases after the update, from these pairs: their rows, with ys."""

    def gradient_dots(self, count: int) -> list[float]:
        """Returns sum(s_i g) of the first ``count`` rows."""

    def residual(self, a: list[float], gamma: float, *, plain: bool) -> list[float]:
        """d = r = gamma P (g - sum a_i y_i), g_prev = g. Returns sum(y_i r), by rows."""

    def pair_direction(self, c: list[float]) -> tuple[float, float, Mark]:
        """d = -(d + sum c_i s_i). Returns sum(g d), sum(d h d), and the mark of x."""


@dataclass(frozen=True)
class Sums:
    """Sums over a new gradient g, its change y since the last one, and P = 1/h."""

    g_Pg: float  # noqa: N815
    y_Pg: float  # noqa: N815
    y_Py: float  # noqa: N815
