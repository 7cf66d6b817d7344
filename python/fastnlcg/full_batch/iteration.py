"""Full-batch descent: conjugate gradients or L-BFGS, with the line search of Hager and Zhang and a diagonal
preconditioner. This module decides, on scalars; the vectors, in any kind of memory, are behind the protocol
:class:`Passes`.

One iteration, with P = 1/h::

    x_new = x + alpha d                       alpha satisfies the Wolfe conditions (hager_zhang.py)
    y     = g_new - g,  s = alpha d
    h_new = L h + y^2 / ys - (L h s)^2 / (L shs)      ys = sum(y s), shs = sum(s h s); L: see Course.scale
    beta  = beta_rule(...)
    d_new = beta d - P g_new                  with pairs instead: pairs.py

Sources: Hager & Zhang, SIAM J. Optim. 16 (2005) 170 and 23 (2013) 2150 (beta, its truncation, preconditioning); ACM
TOMS 32 (2006) 113 (the first step length); Adya et al., arXiv:1812.02886, Algorithm 2 (the diagonal); Oren &
Luenberger, Management Science 20 (1974) 845 (its scaling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastnlcg import _native
from fastnlcg.full_batch.hager_zhang import HagerZhang, Point, Unbounded, search
from fastnlcg.full_batch.pairs import MARGIN, Pairs
from fastnlcg.full_batch.passes import Edited, Mark, PairPasses, Passes, Sums
from fastnlcg.full_batch.rotation import EVERY
from fastnlcg.options import check_count

__all__ = ["BETA_RULES", "Course", "Descent", "DescentOptions", "first_step"]

FIRST_SCALE = 1e-3
"""h starts at this fraction of the first curvature, ys / ss: below most of its later values. A small h_i is raised by
the first step that moves element i; a large one takes as many steps to come down as there are elements."""
WINDOW, EXCESS = 11, 10.0
"""h is lowered if the median of the last ``WINDOW`` ratios ys / shs is below 1 / ``EXCESS``: it then overstates the
curvature along the direction repeatedly, not just once."""
PROBE = 0.1
"""the quadratic step evaluates f at this fraction of the last step length"""
NOT_FOUND = "no step length was found: the loss is at the limit of rounding, not smooth, or unbounded below"
NO_SQUARES = "the sum of the squares of the gradient overflows or underflows: scale the loss"
ROUNDING = 64 * 2.0**-52
"""the rounding error of a loss in float64, relative to a running mean of |f|"""
RESOLUTION = 2.0**-40
"""the resolution of a loss that a function of float64 returns, relative to |f|: 4096 units in the last place, for sums
of many terms"""
RESOLUTION_FLOAT32 = 1e-6
"""the resolution of a loss that a function of float32 returns: eight units in the last place"""


# ---- beta ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slopes:
    """Sums from the line search: sum(g d) at its beginning and end, and sum(d h d) and sum(g P g) at its beginning."""

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
    beta = quotient(now.y_Pg - 2.0 * now.y_Py * quotient(d.end, d.dy), d.dy)
    return max(beta, quotient(ETA * d.begin, d.dhd))


def polak_ribiere(now: Sums, d: Slopes) -> float:
    """``max(0, y P g / g_prev P g_prev)``"""
    return max(0.0, quotient(now.y_Pg, d.g_Pg))


def fletcher_reeves(now: Sums, d: Slopes) -> float:
    """``g P g / g_prev P g_prev``"""
    return quotient(now.g_Pg, d.g_Pg)


def dai_yuan(now: Sums, d: Slopes) -> float:
    """``g P g / d y``"""
    return quotient(now.g_Pg, d.dy)


def hestenes_stiefel(now: Sums, d: Slopes) -> float:
    """``max(0, y P g / d y)``"""
    return max(0.0, quotient(now.y_Pg, d.dy))


BETA_RULES: dict[str, Callable[[Sums, Slopes], float]] = {
    rule.__name__: rule for rule in (hager_zhang, polak_ribiere, fletcher_reeves, dai_yuan, hestenes_stiefel)
}


def first_step(x_max: float, g_max: float, f: float, gg: float) -> float:
    """The first step length of a run: 0.01 max |x| / max |g|, or, from x = 0, 0.01 |f| / |g|^2; 1 if that overflows or
    underflows."""
    length = 0.01 * quotient(x_max, g_max) if x_max > 0.0 else 0.01 * quotient(abs(f), gg)
    return length if 0.0 < length < math.inf else 1.0


def quotient(a: float, b: float) -> float:
    """a / b; NaN if b is 0, as after an underflow."""
    return a / b if b != 0.0 else math.nan


# ---- options and state -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescentOptions:
    """The options of a run; see :class:`fastnlcg.CGDescent` for the meaning of each.

    Raises:
        TypeError, ValueError: for a value of the wrong kind or out of range.
    """

    beta: str = "hager_zhang"
    preconditioner: str | None = "bfgs"
    line_search: HagerZhang = field(default_factory=HagerZhang)
    history: int = 0

    @property
    def in_vectors(self) -> bool:
        """Whether the vectors are :class:`Vectors`: there are pairs, or rotated matrices."""
        return self.history > 0 or self.preconditioner == "kronecker"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "beta": tuple(BETA_RULES),
            "preconditioner": ("kronecker", "bfgs", None),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise TypeError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        if not isinstance(self.line_search, HagerZhang):
            raise TypeError(f"line_search must be a HagerZhang(), got {self.line_search!r}")
        if check_count("history", self.history, minimum=0) > _native.most_pairs:
            raise ValueError(f"Invalid history: {self.history!r}; expected at most {_native.most_pairs}")


@dataclass
class Course:
    """What survives an iteration in addition to the vectors: plain numbers, for a checkpoint."""

    f: float = math.nan
    """the loss at x; NaN: unknown"""
    g_max: float = math.nan
    """max |g| at x; NaN: unknown, or f or g is not finite"""
    slope: float = 0.0
    """sum(g d)"""
    dhd: float = 0.0
    """sum(d h d)"""
    g_Pg: float = 0.0  # noqa: N815
    """sum(g P g)"""
    mark: Mark = (math.nan, math.nan)
    """the mark of x"""
    alpha: float = 0.0
    """the length of the last step, or the shortest length tried by a search that a limit has ended; 0: none yet"""
    beta: float = 0.0
    mean_f: float = 0.0
    """running mean of |f|"""
    weight: float = 0.0
    """the weight of that mean"""
    updates: int = 0
    """number of updates of h"""
    ratios: list[float] = field(default_factory=list)
    """ys / shs of the last updates, converted to the current scale of h"""
    steepest: bool = True
    """whether d = -P g"""
    stuck: bool = False
    """whether the last search, along -P g with h = 1, found no lower point"""
    unbounded: bool = False
    """whether the loss decreased as far as the last search tried"""
    repeats: bool = False
    """whether one point has been evaluated twice, to check that the loss repeats"""
    warned: bool = False
    """whether the user has been warned that the loss does not repeat"""
    iterations: int = 0
    evaluations: int = 0
    """evaluations of the loss and its gradient"""
    loss_evaluations: int = 0
    """evaluations of the loss alone"""
    active: list[int] = field(default_factory=list)
    """the indices of the parameters that take part; used by ``CGDescent``"""
    pairs: Pairs = field(default_factory=Pairs)
    next_length: float = 1.0
    """with pairs: the first length of the next search"""
    suspect: bool = False
    """whether the function may have changed: a limit has ended the last search where it began, before x could be
    evaluated again, and the first point of that search did not fit the loss at its start"""

    def __post_init__(self) -> None:
        if isinstance(self.pairs, dict):
            self.pairs = Pairs.of(self.pairs)

    def forget(self) -> None:
        """Drops what belongs to h and to the pairs."""
        self.pairs, self.updates, self.ratios, self.alpha = Pairs(), 0, [], 0.0

    def scale(self, ratio: float) -> float:
        """L: by how much h is scaled before its update, given ys / shs. Remembers the ratio."""
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
        """The fields: numbers, and lists and pairs of numbers, which are replaced but never changed in place."""
        return {**vars(self), "pairs": self.pairs.as_dict()}


class OutOfBudget(Exception):  # noqa: N818
    """Raised by an evaluation that the caller's limits do not allow."""


class Descent:
    """A run: its iterations, one at a time.

    Args:
        passes: the vectors.
        full: ``full(start)`` evaluates the loss and its gradient at x, and returns the loss. At a ``start`` the set of
            variables that take part may change.
        loss: evaluates the loss alone; None: that is not cheaper.
        options: see :class:`DescentOptions`.
        x_max: returns max |x|; called if there is no last step length.
        course: the state of a run, to continue it; a new run by default.
        resolution: the resolution of a loss, relative to |f|: two losses that differ by less count as equal, unless the
            line search has an ``epsilon``.
        trusted: whether the loss in ``course`` is known to be that of the current function. If not, the first
            evaluation is compared with it, and if it does not fit, x is evaluated again.
        defers: whether that is left to the next run, which sees ``course.suspect``: the limits allow too few
            evaluations for a look at x and a search.
        sign: -1 if ``full`` and ``loss`` return the negated loss; for messages.
    """

    def __init__(
        self,
        passes: Passes | PairPasses,
        full: Callable[[bool], float],
        loss: Callable[[], float] | None,
        options: DescentOptions,
        *,
        x_max: Callable[[], float],
        course: Course | None = None,
        resolution: float = RESOLUTION,
        trusted: bool = True,
        defers: bool = False,
        sign: float = 1.0,
    ) -> None:
        self.passes, self.full, self.loss, self.options, self.x_max = passes, full, loss, options, x_max
        self.course = course or Course()
        self.resolution, self.trusted, self.defers, self.sign = resolution, trusted, defers, sign
        self.warning = ""
        self.f_before = self.course.f
        """the loss at which the first iteration began"""
        self._iterations = self.course.iterations

    @property
    def _preconditioned(self) -> bool:
        return self.options.preconditioner is not None

    @property
    def _epsilon(self) -> float:
        """Differences in f that count as rounding, relative to |f|."""
        epsilon = self.options.line_search.epsilon
        return self.resolution if epsilon is None else epsilon

    def evaluate(self, *, start: bool = False) -> tuple[float, float, float]:
        """Evaluates f, sum(g d) and max |g| at x."""
        f = self.full(start)
        self.course.evaluations += 1
        return self.passes.slope(f)

    # ---- a start ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Evaluates at x, and sets d = -P g."""
        self._start_from(*self.evaluate(start=True))

    def _start_from(self, f: float, slope: float, g_max: float) -> None:
        at = self.course
        at.f, at.g_max = f, g_max if math.isfinite(f) and math.isfinite(slope) else math.nan
        at.suspect, self.trusted = False, True
        if at.iterations == self._iterations:
            self.f_before = f
        self._turn_to_steepest()

    def _turn_to_steepest(self) -> None:
        at = self.course
        at.steepest, at.stuck, at.beta = True, False, 0.0
        at.pairs.drop()
        if self.options.history:
            at.next_length = 1.0
            if math.isfinite(at.g_max):
                self._take_direction()
        elif math.isfinite(at.g_max):
            at.slope, at.dhd, at.mark = self.passes.direction(0.0)
            at.g_Pg = -at.slope

    def look(self) -> bool:
        """Evaluates at x once more. Returns whether x, the loss or the gradient has changed; if so, the next iteration
        starts from the new values."""
        at = self.course
        try:
            self.passes.trial(0.0, first=at.mark)
            f, slope, g_max = self.evaluate()
        except Edited:
            self.begin()
            return True
        at.suspect, self.trusted, at.repeats = False, True, True
        same = self._same_loss(at.f, f) and all(
            abs(now - before) <= 1e-6 * abs(before) for now, before in ((slope, at.slope), (g_max, at.g_max))
        )
        if not same:
            self.compare(at.f, f)
            self._start_from(f, slope, g_max)
        return not same

    def _same_loss(self, before: float, now: float) -> bool:
        return abs(now - before) <= max(1e-5 * abs(before), self._epsilon * self.course.mean_f)

    def compare(self, before: float, now: float) -> None:
        """Compares two evaluations of the loss at one point: if it does not repeat, leaves a warning for the caller,
        once."""
        at = self.course
        if self._same_loss(before, now) or not (math.isfinite(before) and math.isfinite(now)) or at.warned:
            return
        at.warned = True
        self.warning = (
            f"the loss does not repeat: {self.sign * before!r} and then {self.sign * now!r} at the same parameters. A "
            "line search needs a function that does not change: the full batch, no dropout, the averaged loss on "
            "data-parallel ranks; call restart() if it changes on purpose. For mini-batches use NLCG"
        )

    # ---- an iteration ----------------------------------------------------------------------------------------------

    def iterate(self) -> str:
        """Takes one iteration, after :meth:`begin` or another iteration. Returns "" if x has moved, else the reason
        why not; x is then unchanged, bit for bit."""
        at = self.course
        while True:
            if not (math.isfinite(at.f) and math.isfinite(at.g_max)):
                return "the loss or its gradient is not finite"
            if at.g_max == 0.0:
                return "the gradient is zero"
            try:
                point = self._search() if at.slope < 0.0 and math.isfinite(at.slope) else None
            except Edited:
                self.begin()
                continue
            except _Suspect:
                self.look()
                continue
            if point is not None:
                self._conclude(point)
                return "the loss falls without bound" if at.unbounded else ""
            # The search found no point: drop d, then h, which do not describe the function at x.
            f_before = at.f
            if not at.steepest:
                self.begin()
            elif at.updates or at.alpha != 0.0:
                self.passes.forget()
                at.forget()
                self.begin()
            else:
                at.stuck = True
                return NOT_FOUND if at.slope < 0.0 and math.isfinite(at.slope) else NO_SQUARES
            self.compare(f_before, at.f)

    def _slack(self, f: float, mean_f: float) -> float:
        """By how much losses near ``f`` may differ through rounding."""
        # The mean lags behind a loss that falls by orders of magnitude, so for a positive loss the noise is at most the
        # loss itself. For a loss at or below zero, the mean is the only measure of the size of its terms.
        noise = ROUNDING * mean_f if f <= 0.0 else min(ROUNDING * mean_f, f)
        return max(self._epsilon * min(mean_f, abs(f)), noise)

    def _search(self) -> Point | None:
        """Searches along d. Returns a point, with x and g left there, such that no point that was evaluated is lower;
        or None, with x back at the origin. OutOfBudget leaves x at the lowest point, and if that is not the last that
        was evaluated, ``g_max`` NaN."""
        at = self.course
        weight = 1.0 + 0.7 * at.weight
        mean_f = at.mean_f + (abs(at.f) - at.mean_f) / weight
        start = Point(0.0, at.f, at.slope)
        trials, at.unbounded = _Trials(self, start, self._slack(at.f, mean_f)), False
        try:
            accepted = self._accepted(trials, mean_f)
        except OutOfBudget:
            self._end_at_limit(trials)
            raise
        except BaseException:
            if trials.moved:
                self.passes.trial(0.0, first=None)
            raise
        if accepted is None or not accepted.finite:
            trials.move(0.0)
            return None
        at.weight, at.mean_f, at.g_max = weight, mean_f, trials.g_max
        return accepted

    def _accepted(self, trials: _Trials, mean_f: float) -> Point | None:
        """The point with which a search ends, evaluated last: what the line search accepts, or a lower one."""
        start = trials.start

        def is_lower(a: Point, b: Point | None) -> bool:
            if a is start or b is None:
                return a is not start
            return a.f < b.f - self._epsilon * (mean_f if b.f <= 0.0 else min(mean_f, b.f))

        try:
            accepted = search(trials.phi, start, self._first_length(trials), trials.slack, self.options.line_search)
        except Unbounded:
            accepted, self.course.unbounded = None, trials.lowest is not start
        if is_lower(trials.probed, accepted) and trials.probed.f < trials.lowest.f:
            trials.phi(trials.probed.alpha)
        if is_lower(trials.lowest, accepted):
            accepted = trials.lowest
        if accepted is not None and accepted != trials.latest:
            accepted = Point(accepted.alpha, *trials.phi(accepted.alpha))
        return accepted

    def _end_at_limit(self, trials: _Trials) -> None:
        """Moves to the lowest point of a search that the caller's limits have ended."""
        at, longest = self.course, trials.wanted
        target = min(trials.lowest, trials.probed, key=lambda point: point.f)
        trials.move(target.alpha)
        if target is trials.start:
            at.suspect = trials.suspect
            at.alpha = trials.shortest if trials.shortest < math.inf else at.alpha
            at.next_length = longest if 0.0 < longest < math.inf else at.next_length
        elif target is trials.latest and target.finite:  # the gradient is still that of this point
            at.g_max = trials.g_max
            self._conclude(target)
            at.alpha *= max(1.0, longest / target.alpha)  # the length that the search would have tried next
        else:
            at.f, at.g_max = target.f, math.nan
            at.iterations += 1

    def _first_length(self, trials: _Trials) -> float:
        """The first length to try: Hager and Zhang's quadratic step, or their I0 if there is no last length."""
        at, start = self.course, trials.start
        if at.alpha == 0.0:
            return first_step(self.x_max(), at.g_max, start.f, -start.slope)
        if self.options.history:
            return at.next_length
        alpha = PROBE * at.alpha
        if self.loss is None:  # every evaluation gives a slope: use the secant of the slopes
            f, slope = trials.phi(alpha)
            curvature = quotient(slope - start.slope, alpha)
        else:
            f = trials.probe(alpha)
            curvature = quotient(2.0 * (f - start.f - start.slope * alpha), alpha * alpha)
        length = 10.0 * at.alpha
        if not (math.isfinite(f) and f <= start.f and math.isfinite(curvature)):
            length = 2.0 * at.alpha
        elif curvature > 0.0:
            length = quotient(-start.slope, curvature)
        return length if 0.0 < length < math.inf else 2.0 * at.alpha

    def _conclude(self, point: Point) -> None:
        """Updates h, beta and d at the new x and g."""
        if self.options.history:
            return self._conclude_with_pairs(point)
        at, options = self.course, self.options
        slopes = Slopes(at.slope, point.slope, at.dhd, at.g_Pg)
        ys, shs = point.alpha * slopes.dy, point.alpha * point.alpha * at.dhd
        curved = ys > 0.0 and 0.0 < shs < math.inf and 0.0 < FIRST_SCALE * (ys / shs) < math.inf
        update, scale = None, 1.0
        if curved and self._preconditioned:
            scale = at.scale(ys / shs)
            update = (point.alpha, scale, ys, scale * shs)
            at.updates += 1
            slopes = Slopes(at.slope, point.slope, scale * at.dhd, at.g_Pg)
        turn = {"turn": at.updates % EVERY == 0} if options.preconditioner == "kronecker" else {}
        sums = self.passes.curvature(update, **turn)
        at.g_Pg, at.f = sums.g_Pg, point.f
        at.alpha = point.alpha * scale  # P has become 1 / scale of what it was
        at.iterations += 1
        beta = BETA_RULES[options.beta](sums, slopes) if curved else 0.0
        at.beta = beta if math.isfinite(beta) else 0.0
        at.slope, at.dhd, at.mark = self.passes.direction(at.beta)
        at.steepest, at.stuck = at.beta == 0.0, False
        if not (at.slope < 0.0 and math.isfinite(at.slope)):
            self._turn_to_steepest()

    def _conclude_with_pairs(self, point: Point) -> None:
        """Takes the pair of the step, updates h, and takes d by the two loops over the pairs."""
        at, passes, history = self.course, self._pair_passes, self.options.history
        dy = point.slope - at.slope
        ys, shs = point.alpha * dy, point.alpha * point.alpha * at.dhd
        curved = ys > 0.0 and 0.0 < shs < math.inf and 0.0 < FIRST_SCALE * (ys / shs) < math.inf
        fall = at.f - point.f
        at.f, at.alpha = point.f, point.alpha
        at.iterations += 1
        at.beta, at.stuck = 0.0, False
        if curved:
            scale = at.scale(ys / shs) if self._preconditioned else 1.0
            turns = self.options.preconditioner == "kronecker" and (at.updates + 1) % EVERY == 0
            turn = at.pairs.new_to_factors(history, ys) if turns else []
            sums = passes.pair(at.pairs.next_row, (point.alpha, scale, ys, scale * shs), turn=turn)
            first = at.updates == 0
            at.updates += 1
            margin = 0.0 if passes.rotates else MARGIN
            at.pairs.choose(sums, ys, scale * shs, self._preconditioned, first=first, margin=margin)
            at.pairs.add(history, ys)
        if at.pairs.count:
            at.pairs.see(history, passes.gradient_dots(at.pairs.count), added=curved)
        at.steepest = not at.pairs.count
        self._take_direction()
        at.next_length = 1.0
        if fall > self._slack(at.f, at.mean_f):  # half the slope promises at most the last decrease
            length = quotient(2.0 * fall, -at.slope)
            at.next_length = length if 0.0 < length < 1.0 else 1.0
        if not (at.slope < 0.0 and math.isfinite(at.slope)):
            self._turn_to_steepest()

    @property
    def _pair_passes(self) -> PairPasses:
        return self.passes  # type: ignore[return-value]

    def _take_direction(self) -> None:
        """d by the two loops over the pairs, or -gamma P g if there are none."""
        at, passes, history = self.course, self._pair_passes, self.options.history
        pairs = at.pairs
        try:
            a = pairs.first_loop(history) if pairs.count else []
        except (ZeroDivisionError, OverflowError):
            a = [math.nan] * history
        if not all(map(math.isfinite, a)):
            pairs.drop()
            at.steepest, a = True, []
        y_r = passes.residual(a, pairs.gamma, plain=pairs.plain)
        c = pairs.second_loop(history, a, y_r) if a else []
        at.slope, at.dhd, at.mark = passes.pair_direction(c)
        at.g_Pg = -at.slope


class _Suspect(Exception):  # noqa: N818
    """The first point of a search does not fit the loss at its start: the function may have changed."""


class _Trials:
    """The points of one search: moves x there, evaluates, and keeps the lowest.

    Args:
        run: whose search it is.
        start: where it begins.
        slack: by how much two losses may differ through rounding.
    """

    def __init__(self, run: Descent, start: Point, slack: float) -> None:
        self.run, self.start, self.slack = run, start, slack
        self.lowest = self.latest = start
        self.probed = start
        """the lowest point at which only the loss is known"""
        self.shortest, self.wanted = math.inf, 0.0
        """the shortest length that was evaluated, and the length of the last move"""
        self.g_max = run.course.g_max
        """the largest element of the last gradient"""
        self.moved = self.suspect = False

    def move(self, alpha: float) -> None:
        """Moves x to this length, back to the start too."""
        first, self.moved, self.wanted = None if self.moved else self.run.course.mark, True, alpha
        self.run.passes.trial(alpha, first=first)

    def phi(self, alpha: float) -> tuple[float, float]:
        """The loss and its slope."""
        self.move(alpha)
        f, slope, self.g_max = self.run.evaluate()
        self._saw(Point(alpha, f, slope))
        if self.latest.finite and f < self.lowest.f:
            self.lowest = self.latest
        return f, slope

    def probe(self, alpha: float) -> float:
        """The loss alone: the gradient at this point may not be finite."""
        self.move(alpha)
        assert self.run.loss is not None
        f = self.run.loss()
        self.run.course.loss_evaluations += 1
        self._saw(Point(alpha, f, math.nan))
        if math.isfinite(f) and f < self.start.f:
            self.probed = self.latest
        return f

    def _saw(self, point: Point) -> None:
        self.latest, self.shortest = point, min(self.shortest, point.alpha)
        if not self.run.trusted and not _fits(self.start, point, self.slack):
            if not self.run.defers:
                raise _Suspect
            self.suspect = True
        self.run.trusted = True


def _fits(start: Point, seen: Point, slack: float) -> bool:
    """Whether a point fits the loss at the start of its search: a parabola through both slopes (or, without a slope,
    the tangent) meets the two losses, with an error of at most the whole decrease along the tangent."""
    fall = -start.slope * seen.alpha
    expected = -fall if math.isnan(seen.slope) else 0.5 * (seen.slope - start.slope) * seen.alpha - fall
    return abs(seen.f - start.f - expected) <= fall + slack
