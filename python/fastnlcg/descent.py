"""Full-batch descent: conjugate gradients with the line search of Hager and Zhang and a diagonal preconditioner. What
is decided, on scalars; the vectors are :class:`Passes`, wherever they lie.

One iteration, with P = 1/h::

    x_new = x + alpha d                       alpha satisfies the Wolfe conditions (wolfe.py)
    y     = g_new - g,  s = alpha d
    h_new = L h + y^2 / ys - (L h s)^2 / (L shs)      ys = sum(y s), shs = sum(s h s); L: see Course.scale
    beta  = beta_rule(...)
    d_new = beta d - P g_new

Sources: Hager & Zhang, SIAM J. Optim. 16 (2005) 170 and 23 (2013) 2150 (beta, its truncation, preconditioning); ACM
TOMS 32 (2006) 113 (the first step length); Adya et al., arXiv:1812.02886, Algorithm 2 (the diagonal); Oren &
Luenberger, Management Science 20 (1974) 845 (its scaling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastnlcg.options import check_real
from fastnlcg.wolfe import HagerZhang, Point, Unbounded, search

__all__ = ["BETA_RULES", "Course", "Descent", "DescentOptions", "Passes", "Sums", "first_step"]

FIRST_SCALE = 1e-3
"""h starts at this share of the first curvature, ys / ss: below most of what it will be. A small h_i is raised by the
first step that moves element i; a large one takes as many steps as there are elements to come down."""
WINDOW, EXCESS = 11, 10.0
"""h is lowered where the median of the last ``WINDOW`` ratios ys / shs is below 1 / ``EXCESS``: it overstates the
curvature along the direction time after time, not once."""
PROBE = 0.1
"""where the quadratic step looks at f: at this share of the last step length"""


class Passes(Protocol):
    """The vectors: x, g, d, h, and those of the point that a search starts from. Each method is one pass over
    memory."""

    def trial(self, alpha: float, *, first: bool) -> None:
        """x = origin + alpha d; ``first`` of a search: from here on x is the origin."""

    def slope(self, f: float) -> tuple[float, float, float]:
        """f, sum(g d), max |g|; the second is not finite where an element of g is not. Over ranks the mean of f, the
        sum, and the largest."""

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        """h, updated with (alpha, scale, ys, scale * shs) where given; and the sums over it."""

    def direction(self, beta: float) -> tuple[float, float]:
        """d = beta d - P g, g_prev = g; sum(g d), sum(d h d)."""

    def forget(self) -> None:
        """h = 1."""


@dataclass(frozen=True)
class Sums:
    """Over a new gradient g, the change y since the last one, and P = 1/h."""

    g_Pg: float  # noqa: N815
    y_Pg: float  # noqa: N815
    y_Py: float  # noqa: N815


# ---- beta ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slopes:
    """What the line search knows: sum(g d) at its begin and its end, sum(d h d) before it, sum(g P g) at its begin."""

    begin: float
    end: float
    dhd: float
    g_Pg: float  # noqa: N815

    @property
    def dy(self) -> float:
        """sum(d y)"""
        return self.end - self.begin


ETA = 0.4


def hager_zhang(now: Sums, d: Slopes) -> float:
    """``(y P g - 2 (y P y) (d g) / (d y)) / (d y)``, at least ``eta (d g_prev) / (d h d)``; eta = 0.4."""
    beta = (now.y_Pg - 2.0 * now.y_Py * (d.end / d.dy)) / d.dy
    return max(beta, ETA * d.begin / d.dhd)


def polak_ribiere(now: Sums, d: Slopes) -> float:
    """``max(0, y P g / g_prev P g_prev)``"""
    return max(0.0, now.y_Pg / d.g_Pg)


def fletcher_reeves(now: Sums, d: Slopes) -> float:
    """``g P g / g_prev P g_prev``"""
    return now.g_Pg / d.g_Pg


def dai_yuan(now: Sums, d: Slopes) -> float:
    """``g P g / d y``"""
    return now.g_Pg / d.dy


def hestenes_stiefel(now: Sums, d: Slopes) -> float:
    """``max(0, y P g / d y)``"""
    return max(0.0, now.y_Pg / d.dy)


BETA_RULES: dict[str, Callable[[Sums, Slopes], float]] = {
    rule.__name__: rule for rule in (hager_zhang, polak_ribiere, fletcher_reeves, dai_yuan, hestenes_stiefel)
}


def first_step(x_max: float, g_max: float, f: float, gg: float) -> float:
    """The first step length of a run: 0.01 of the largest |x| over the largest |g|, or, from x = 0, 0.01 |f| /
    |g|^2."""
    if x_max > 0.0:
        return 0.01 * x_max / g_max
    return 0.01 * abs(f) / gg if f != 0.0 else 1.0


# ---- options and state -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescentOptions:
    """What a run computes.

    Raises:
        TypeError, ValueError: for a value of the wrong kind or out of range.
    """

    beta: str = "hager_zhang"
    preconditioner: str | None = "bfgs"
    line_search: HagerZhang = field(default_factory=HagerZhang)

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {"beta": tuple(BETA_RULES), "preconditioner": ("bfgs", None)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise TypeError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        if not isinstance(self.line_search, HagerZhang):
            raise TypeError(f"line_search must be a HagerZhang(), got {self.line_search!r}")


@dataclass
class Course:
    """What survives an iteration beside the vectors: plain numbers, for a checkpoint."""

    f: float = math.nan
    """at x; NaN: not known"""
    g_max: float = math.nan
    slope: float = 0.0
    """sum(g d)"""
    dhd: float = 0.0
    g_Pg: float = 0.0  # noqa: N815
    alpha: float = 0.0
    """of the last step; 0: none yet"""
    beta: float = 0.0
    mean_f: float = 0.0
    """running mean of |f|, and its weight"""
    weight: float = 0.0
    updates: int = 0
    """of h"""
    ratios: list[float] = field(default_factory=list)
    """ys / shs of the last updates, as if h had had today's scale"""
    steepest: bool = True
    """d = -P g"""
    unbounded: bool = False
    """the last search has found no end of a fall"""
    warned: bool = False
    """that the loss does not repeat"""
    iterations: int = 0
    evaluations: int = 0
    """of the loss and its gradient"""
    loss_evaluations: int = 0
    """of the loss alone"""

    def scale(self, ys: float, shs: float) -> float:
        """L: by how much h is scaled before its update. Remembers the ratio."""
        ratio = ys / shs
        if self.updates == 0:
            return FIRST_SCALE * ratio  # h is 1: shs is ss
        self.ratios = [*self.ratios, ratio][-WINDOW:]
        if len(self.ratios) < WINDOW:
            return 1.0
        lower = min(1.0, EXCESS * sorted(self.ratios)[WINDOW // 2])
        if lower < 1.0:
            self.ratios = [r / lower for r in self.ratios]
        return lower

    def as_dict(self) -> dict[str, Any]:
        """Numbers, and a list of them that is never written again."""
        return dict(vars(self))


class OutOfBudget(Exception):  # noqa: N818
    """Raised by an evaluation that the caller's limits do not allow."""


class Descent:
    """Iterates.

    Args:
        passes: the vectors.
        full: evaluates the loss and its gradient at x, and returns the loss.
        loss: the loss alone, where that is cheaper; None: it is not.
        course: where a run stands; a new one by default.
        x_max: the largest |x|, asked for once, before the first step.
    """

    def __init__(
        self,
        passes: Passes,
        full: Callable[[], float],
        loss: Callable[[], float] | None,
        options: DescentOptions,
        *,
        x_max: Callable[[], float],
        course: Course | None = None,
    ) -> None:
        self.passes, self.full, self.loss, self.options, self.x_max = passes, full, loss, options, x_max
        self.course = course or Course()
        self.warning = ""

    @property
    def _preconditioned(self) -> bool:
        return self.options.preconditioner is not None

    def evaluate(self) -> tuple[float, float, float]:
        """f, sum(g d) and max |g| at x."""
        f = self.full()
        self.course.evaluations += 1
        return self.passes.slope(f)

    def begin(self) -> None:
        """Evaluates at x, and turns to -P g."""
        at = self.course
        at.f, slope, at.g_max = self.evaluate()
        if not math.isfinite(slope):
            at.g_max = math.nan
        self._turn_to_steepest()

    def _turn_to_steepest(self) -> None:
        at = self.course
        at.steepest, at.beta = True, 0.0
        if math.isfinite(at.g_max):
            at.slope, at.dhd = self.passes.direction(0.0)
            at.g_Pg = -at.slope

    def iterate(self) -> str:
        """One iteration from a point that :meth:`begin` or an iteration has left. Returns "" where x has moved, else
        why it has not; x is then what it was, to the bit."""
        at = self.course
        if not (math.isfinite(at.f) and math.isfinite(at.g_max)):
            return "the loss or its gradient is not finite"
        if at.g_max == 0.0:
            return "the gradient is zero"
        while True:
            if at.slope < 0.0 and math.isfinite(at.slope):
                found = self._search()
                if found is not None:
                    self._conclude(found)
                    return "the loss falls without bound" if at.unbounded else ""
            else:
                self.passes.trial(0.0, first=True)
            # Nothing was found: what d and h say of the function is of no use here.
            f_before = at.f
            if not at.steepest:
                self.begin()
            elif at.updates:
                self.passes.forget()
                at.updates, at.ratios, at.alpha = 0, [], 0.0
                self.begin()
            else:
                return "no step length was found: the loss is at the limit of rounding, not smooth, or unbounded below"
            if not (math.isfinite(at.f) and math.isfinite(at.g_max)):
                return "the loss or its gradient is not finite"
            self.compare(f_before, at.f)

    def compare(self, before: float, now: float) -> None:
        """The loss at one point, evaluated twice: a warning for the caller, once, where it does not repeat."""
        slack = max(1e-5 * abs(before), self.options.line_search.epsilon * self.course.mean_f)
        if abs(now - before) <= slack or not (math.isfinite(before) and math.isfinite(now)) or self.course.warned:
            return
        self.course.warned = True
        self.warning = (
            f"the loss does not repeat: {before!r} and then {now!r} at the same parameters. A line search needs a "
            "function that stays: the full batch, no dropout, the averaged loss on data-parallel ranks; restart() "
            "where it changes on purpose. For mini-batches use NLCG"
        )

    def _search(self) -> Point | None:
        """A step along d, which x and g are at afterwards; else x is back at the origin. OutOfBudget leaves x at the
        best point, and where that is not the last, ``g_max`` NaN."""
        at = self.course
        weight = 1.0 + 0.7 * at.weight
        mean_f = at.mean_f + (abs(at.f) - at.mean_f) / weight
        slack = self.options.line_search.epsilon * mean_f
        start = Point(0.0, at.f, at.slope)
        best, latest, g_max = start, start, at.g_max
        moved = at.unbounded = False

        def move(alpha: float) -> None:
            nonlocal moved
            self.passes.trial(alpha, first=not moved)
            moved = True

        def phi(alpha: float) -> tuple[float, float]:
            nonlocal best, latest, g_max
            move(alpha)
            f, slope, g_max = self.evaluate()
            latest = Point(alpha, f, slope)
            if latest.finite and f < best.f:
                best = latest
            return f, slope

        try:
            found = search(phi, start, self._first_length(start, move, phi), slack, self.options.line_search)
            if found is None and best is not start:  # no Wolfe point, but a lower one
                found = best if best is latest else Point(best.alpha, *phi(best.alpha))
        except Unbounded:
            at.unbounded, found = True, best
        except OutOfBudget:
            if best is latest and best is not start:
                at.g_max = g_max
                self._conclude(best)
            else:
                move(best.alpha)
                if best is not start:
                    at.f, at.g_max = best.f, math.nan
            raise
        except BaseException:
            if moved:
                self.passes.trial(0.0, first=False)
            raise
        at.weight, at.mean_f = weight, mean_f
        if found is None:
            move(0.0)
            return None
        at.g_max = g_max
        return found

    def _first_length(
        self, start: Point, move: Callable[[float], None], phi: Callable[[float], tuple[float, float]]
    ) -> float:
        """Where the search begins: I0 of Hager and Zhang, then their quadratic step."""
        at = self.course
        if at.alpha == 0.0:
            return first_step(self.x_max(), at.g_max, start.f, -start.slope)
        probe = PROBE * at.alpha
        if self.loss is None:  # a gradient comes with it: the secant of the slopes
            f, slope = phi(probe)
            curvature = (slope - start.slope) / probe
        else:
            move(probe)
            f = self.loss()
            at.loss_evaluations += 1
            curvature = 2.0 * (f - start.f - start.slope * probe) / (probe * probe)
        if not (math.isfinite(f) and f <= start.f and math.isfinite(curvature)):
            return 2.0 * at.alpha
        return -start.slope / curvature if curvature > 0.0 else 10.0 * at.alpha

    def _conclude(self, found: Point) -> None:
        """At the new x and g: h, beta, d."""
        at, options = self.course, self.options
        slopes = Slopes(at.slope, found.slope, at.dhd, at.g_Pg)
        ys, shs = found.alpha * slopes.dy, found.alpha * found.alpha * at.dhd
        curved = ys > 0.0 and 0.0 < shs < math.inf
        update, scale = None, 1.0
        if curved and self._preconditioned:
            scale = at.scale(ys, shs)
            update = (found.alpha, scale, ys, scale * shs)
            at.updates += 1
            slopes = Slopes(at.slope, found.slope, scale * at.dhd, at.g_Pg)
        sums = self.passes.curvature(update)
        at.g_Pg, at.f = sums.g_Pg, found.f
        at.alpha = found.alpha * scale  # P has become 1 / scale of what it was
        at.iterations += 1
        beta = 0.0
        if curved:
            try:
                beta = BETA_RULES[options.beta](sums, slopes)
            except ZeroDivisionError:
                beta = 0.0
        at.beta = beta if math.isfinite(beta) else 0.0
        at.slope, at.dhd = self.passes.direction(at.beta)
        at.steepest = at.beta == 0.0
        if not (at.slope < 0.0 and math.isfinite(at.slope)):
            self._turn_to_steepest()


def check_count(name: str, value: object, *, minimum: int = 1) -> int:
    """A whole number >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"Invalid {name}: {value!r}; expected at least {minimum}")
    return value


def check_positive(name: str, value: object) -> float:
    """A finite number >= 0."""
    return check_real(name, value, minimum=0.0)
