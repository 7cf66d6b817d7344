"""The line search of Hager and Zhang, on scalars: phi(alpha) = f(x + alpha d) and its slope. Knows no vectors.

Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, section 4, and ACM TOMS 32 (2006) 113; the names of steps (B1, U2,
S3, L0, ...) are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from fastnlcg.options import check_real

__all__ = ["HagerZhang", "Point", "Unbounded", "search"]


class Point(NamedTuple):
    """A step length, the loss there, and its slope along the direction."""

    alpha: float
    f: float
    slope: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.f) and math.isfinite(self.slope)


@dataclass(frozen=True)
class HagerZhang:
    """The constants of the line search; their defaults, but for epsilon, are CG_DESCENT's.

    Args:
        delta: of the sufficient decrease, in (0, 1/2).
        sigma: of the curvature condition, in [delta, 1): the smaller, the more exact the search.
        epsilon: what counts as rounding in f, relative to ``|f|``: within it the approximate Wolfe conditions look at
            slopes alone. None: by the dtype of x, 1e-12 for float64 and 1e-6 for float32. Set it higher for a noisy f.
        theta: at which fraction a bracket is subdivided, in (0, 1); 0.5 is bisection.
        gamma: how much shorter an interval must become in one round, in (0, 1).
        rho: how much farther the bracket reaches each time, > 1.
        max_rounds: rounds of the secant, and evaluations for a bracket, before the search gives up.

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
        for one in fields(self):
            if one.name != "epsilon" or self.epsilon is not None:
                check_real(one.name, getattr(self, one.name))
        bounds = {
            "delta": 0.0 < self.delta < 0.5,
            "sigma": self.delta <= self.sigma < 1.0,
            "epsilon": self.epsilon is None or self.epsilon >= 0.0,
            "theta": 0.0 < self.theta < 1.0,
            "gamma": 0.0 < self.gamma < 1.0,
            "rho": self.rho > 1.0,
            "max_rounds": self.max_rounds >= 1,
        }
        for name, fits in bounds.items():
            if not fits:
                raise ValueError(
                    f"Invalid {name}: {getattr(self, name)!r}; expected 0 < delta < 1/2, delta <= sigma < 1, "
                    "epsilon >= 0, theta and gamma in (0, 1), rho > 1, max_rounds >= 1"
                )

    def accepts(self, start: Point, at: Point, slack: float) -> bool:
        """The Wolfe conditions, or the approximate ones where f has not risen by more than ``slack``."""
        if not (at.finite and at.slope >= self.sigma * start.slope):
            return False
        if at.f - start.f <= self.delta * at.alpha * start.slope:
            return True
        return at.f <= start.f + slack and (2.0 * self.delta - 1.0) * start.slope >= at.slope


def _secant(a: Point, b: Point) -> float:
    """Where a slope that is linear between two points is 0; NaN for a constant one."""
    rise = b.slope - a.slope
    return (a.alpha * b.slope - b.alpha * a.slope) / rise if rise != 0.0 else math.nan


class _Found(Exception):  # noqa: N818
    """Carries the accepted point out of the rounds."""

    def __init__(self, point: Point) -> None:
        self.point = point


class Unbounded(Exception):  # noqa: N818
    """f falls as far as a search looks."""


class _Search:
    def __init__(
        self, phi: Callable[[float], tuple[float, float]], start: Point, slack: float, options: HagerZhang
    ) -> None:
        self.phi, self.start, self.slack, self.options = phi, start, slack, options

    def at(self, alpha: float) -> Point:
        """Evaluates there. Ends the search where the point will do."""
        point = Point(alpha, *self.phi(alpha))
        if self.options.accepts(self.start, point, self.slack):
            raise _Found(point)
        return point

    def low(self, point: Point) -> bool:
        """Whether f has not risen there: the left end of an interval may be moved to it."""
        return point.f <= self.start.f + self.slack

    def cut(self, a: Point, b: Point) -> tuple[Point, Point]:
        """U3: f falls at ``a`` and is too high, or not a number, at ``b``: an interval in between with a minimum."""
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
        """B0 to B3: an interval with f falling at its left end and rising at its right, from ``first`` on."""
        left, point, wall = self.start, self.at(first), math.inf
        for _ in range(self.options.max_rounds):
            if point.finite and point.slope >= 0.0:
                return left, point
            if math.isinf(point.alpha):
                break
            if not point.finite:  # out of f's domain: back by tenths, and once there are finite points, by halves
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
        """U0 to U3: the interval after a look at ``alpha``."""
        if not a.alpha < alpha < b.alpha:
            return a, b
        point = self.at(alpha)
        if point.finite and point.slope >= 0.0:
            return a, point
        if point.finite and self.low(point):
            return point, b
        return self.cut(a, point)

    def secant2(self, a: Point, b: Point) -> tuple[Point, Point]:
        """S1 to S4: a secant step, and one more from the side that it moved."""
        alpha = _secant(a, b)
        new_a, new_b = self.update(a, b, alpha)
        if new_b.alpha == alpha:
            return self.update(new_a, new_b, _secant(b, new_b))
        if new_a.alpha == alpha:
            return self.update(new_a, new_b, _secant(a, new_a))
        return new_a, new_b

    def run(self, first: float) -> Point | None:
        """L0 to L3."""
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
            if not a.alpha < middle < b.alpha:  # neighbouring numbers
                return None
        return None


def search(
    phi: Callable[[float], tuple[float, float]],
    start: Point,
    first: float,
    slack: float,
    options: HagerZhang | None = None,
) -> Point | None:
    """A step length that satisfies the Wolfe conditions, or the approximate ones; the last point that was evaluated.

    Args:
        phi: f and its slope at a step length; either may be NaN or infinite.
        start: phi(0), with a negative slope.
        first: the first step length to try, > 0.
        slack: what counts as rounding in f, >= 0.
        options: see :class:`HagerZhang`.

    Returns:
        None where there is none: f is not smooth, or all is rounding.

    Raises:
        Unbounded: where f falls to the end of a bracket that has grown ``max_rounds`` times.
    """
    try:
        return _Search(phi, start, slack, options or HagerZhang()).run(first)
    except _Found as found:
        return found.point
