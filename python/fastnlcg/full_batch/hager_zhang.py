"""The line search of Hager and Zhang, on scalars: phi(alpha) = f(x + alpha d) and its slope. It uses no vectors.

Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, section 4, and ACM TOMS 32 (2006) 113; the names of the steps (B1,
U2, S3, L0, ...) are those of the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from fastnlcg.options import check_count, check_real

__all__ = ["HagerZhang", "Point", "Unbounded", "search"]


class Point(NamedTuple):
    """A step length, the loss at that length, and its slope along the direction."""

    alpha: float
    f: float
    slope: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.f) and math.isfinite(self.slope)


@dataclass(frozen=True)
class HagerZhang:
    """The constants of the line search; all defaults except that of epsilon are CG_DESCENT's.

    Args:
        delta: constant of the sufficient-decrease condition, in (0, 1/2).
        sigma: constant of the curvature condition, in [delta, 1): the smaller, the more exact the search.
        epsilon: differences in f that count as rounding, relative to ``|f|``: within them the approximate Wolfe
            conditions compare slopes only. None: by the dtype of x, 1e-12 for float64 and 1e-6 for float32. Set it
            higher for a noisy f.
        theta: split point when a bracket is subdivided, in (0, 1); 0.5 is bisection.
        gamma: factor by which an interval must shrink in one round, in (0, 1).
        rho: factor by which the bracket grows in each expansion, > 1.
        max_rounds: rounds of the secant, and evaluations for a bracket, before the search gives up, >= 1.

    Raises:
        TypeError, ValueError: for a value of the wrong kind or out of range.
    """

    delta: float = 0.1
    sigma: float = 0.9
    epsilon: float | None = None
    theta: float = 0.5
    gamma: float = 0.66
    rho: float = 5.0
    max_rounds: int = 50

    def __post_init__(self) -> None:
        for constant in fields(self):
            value = getattr(self, constant.name)
            if constant.name == "max_rounds":
                check_count(constant.name, value)
            elif constant.name != "epsilon" or value is not None:
                check_real(constant.name, value)
        bounds = {
            "delta": 0.0 < self.delta < 0.5,
            "sigma": self.delta <= self.sigma < 1.0,
            "epsilon": self.epsilon is None or self.epsilon >= 0.0,
            "theta": 0.0 < self.theta < 1.0,
            "gamma": 0.0 < self.gamma < 1.0,
            "rho": self.rho > 1.0,
        }
        for name, fits in bounds.items():
            if not fits:
                raise ValueError(
                    f"Invalid {name}: {getattr(self, name)!r}; expected 0 < delta < 1/2, delta <= sigma < 1, "
                    "epsilon >= 0, theta and gamma in (0, 1), rho > 1"
                )

    def accepts(self, start: Point, at: Point, slack: float) -> bool:
        """Whether ``at`` satisfies the Wolfe conditions, or, if f has not risen by more than ``slack``, the
        approximate ones."""
        if not (at.finite and at.slope >= self.sigma * start.slope):
            return False
        if at.f - start.f <= self.delta * at.alpha * start.slope:
            return True
        return at.f <= start.f + slack and (2.0 * self.delta - 1.0) * start.slope >= at.slope


def _secant(a: Point, b: Point) -> float:
    """The zero of the slope, linear between two points; NaN for a constant slope."""
    rise = b.slope - a.slope
    return (a.alpha * b.slope - b.alpha * a.slope) / rise if rise != 0.0 else math.nan


class _Found(Exception):  # noqa: N818
    """Carries the accepted point out of the rounds."""

    def __init__(self, point: Point) -> None:
        self.point = point


class Unbounded(Exception):  # noqa: N818
    """f decreases up to the largest step length that the search tries."""


class _Search:
    def __init__(
        self, phi: Callable[[float], tuple[float, float]], start: Point, slack: float, options: HagerZhang
    ) -> None:
        self.phi, self.start, self.slack, self.options = phi, start, slack, options

    def at(self, alpha: float) -> Point:
        """Evaluates f and its slope at ``alpha``. Ends the search if the point is acceptable."""
        point = Point(alpha, *self.phi(alpha))
        if self.options.accepts(self.start, point, self.slack):
            raise _Found(point)
        return point

    def low(self, point: Point) -> bool:
        """Whether f has not risen at ``point``: the left end of an interval may be moved to it."""
        return point.f <= self.start.f + self.slack

    def cut(self, a: Point, b: Point) -> tuple[Point, Point]:
        """U3: f decreases at ``a`` and is too high, or not a number, at ``b``: returns an interval between them that
        contains a minimum."""
        for _ in range(self.options.max_rounds):
            middle = self.at((1.0 - self.options.theta) * a.alpha + self.options.theta * b.alpha)
            if middle.finite and middle.slope >= 0.0:
                return a, middle
            if middle.finite and self.low(middle):
                a = middle
            else:
                b = middle
        return a, b

    def bracket(self, first: float) -> tuple[Point, Point] | None:
        """B0 to B3: an interval on which f decreases at the left end and increases at the right end; starts at
        ``first``."""
        left, point, wall = self.start, self.at(first), math.inf
        for _ in range(self.options.max_rounds):
            if point.finite and point.slope >= 0.0:
                return left, point
            if math.isinf(point.alpha):
                break
            if not point.finite:  # outside f's domain: go back by tenths, or by halves once a point has been finite
                wall = point.alpha
                point = self.at(left.alpha + (0.1 if left is self.start else 0.5) * (wall - left.alpha))
            elif not self.low(point):
                return self.cut(self.start, point)
            else:
                left = point
                point = self.at(min(self.options.rho * point.alpha, 0.5 * (point.alpha + wall)))
        if left is not self.start and wall == math.inf:
            raise Unbounded
        return None

    def update(self, a: Point, b: Point, alpha: float) -> tuple[Point, Point]:
        """U0 to U3: the interval after an evaluation at ``alpha``."""
        if not a.alpha < alpha < b.alpha:
            return a, b
        point = self.at(alpha)
        if point.finite and point.slope >= 0.0:
            return a, point
        if point.finite and self.low(point):
            return point, b
        return self.cut(a, point)

    def secant2(self, a: Point, b: Point) -> tuple[Point, Point]:
        """S1 to S4: a secant step, and a second one from the end that the first has moved."""
        alpha = _secant(a, b)
        new_a, new_b = self.update(a, b, alpha)
        if new_b.alpha == alpha:
            return self.update(new_a, new_b, _secant(b, new_b))
        if new_a.alpha == alpha:
            return self.update(new_a, new_b, _secant(a, new_a))
        return new_a, new_b

    def run(self, first: float) -> Point | None:
        """L0 to L3: the search itself."""
        interval = self.bracket(first)
        if interval is None:
            return None
        a, b = interval
        for _ in range(self.options.max_rounds):
            width = b.alpha - a.alpha
            a, b = self.secant2(a, b)
            if b.alpha - a.alpha > self.options.gamma * width:
                a, b = self.update(a, b, 0.5 * (a.alpha + b.alpha))
            middle = 0.5 * (a.alpha + b.alpha)
            if not a.alpha < middle < b.alpha:  # no double is left between them
                return None
        return None


def search(
    phi: Callable[[float], tuple[float, float]],
    start: Point,
    first: float,
    slack: float,
    options: HagerZhang | None = None,
) -> Point | None:
    """Searches for a step length that satisfies the Wolfe conditions, or the approximate ones.

    Args:
        phi: f and its slope at a step length; either may be NaN or infinite.
        start: phi(0), with a negative slope.
        first: the first step length to try, > 0.
        slack: the increase of f that counts as rounding, >= 0.
        options: see :class:`HagerZhang`.

    Returns:
        The accepted point, which is the last that was evaluated. None if no point was accepted: f is not smooth, or
        its changes are all rounding.

    Raises:
        Unbounded: if f decreases to the end of a bracket that has grown ``max_rounds`` times.
    """
    try:
        return _Search(phi, start, slack, options or HagerZhang()).run(first)
    except _Found as found:
        return found.point
