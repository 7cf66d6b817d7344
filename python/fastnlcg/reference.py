"""The definition of a step, as NumPy float64: one function per equation, no speed, no surprises.

Every native kernel is tested against this module, and this module against mathematics. It needs nothing but NumPy:

    >>> import numpy as np
    >>> from fastnlcg import reference
    >>> def bowl(w):
    ...     return float(w @ (np.array([1.0, 10.0]) * w)) / 2, np.array([1.0, 10.0]) * w
    >>> result = reference.minimize(bowl, np.array([1.0, 1.0]), steps=60, lr=0.1)
    >>> bool(result.losses[-1] < 1e-6 * result.losses[0])
    True

Source: Adya et al., *Nonlinear Conjugate Gradients for Scaling Synchronous Distributed DNN Training*
(arXiv:1812.02886), Algorithms 1 and 2 and section 3.2.2. What the paper leaves open follows the authors' TensorFlow
code.

Symbols: ``p`` parameters, ``g`` gradient, ``g_prev`` the previous one, ``d`` direction, ``h`` diagonal of the Hessian
estimate, ``v`` Adam's second moment, ``y = g - g_prev``, ``s = alpha_prev * d``, ``z = -g / (h + eps)``,
``rz = sum(-g z)``.

A preconditioner is an object (:class:`Plain`, :class:`Bfgs`, :class:`Adam`) that defines its own state array, h before
and after a step's update, and the kind of weight decay. ``"muon"`` is not one of them: its parameters are matrices
(:class:`Matrix`), which a step takes besides those of ``"adam"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastnlcg.full_batch.passes import Edited, Sums
from fastnlcg.line_search import OnlineLineSearch
from fastnlcg.options import Options, check_real

Array = npt.NDArray[np.float64]

__all__ = [
    "DescentPasses",
    "Matrix",
    "Options",
    "Result",
    "State",
    "adam_diagonal",
    "bfgs_diagonal",
    "clip_factor",
    "conjugacy",
    "conjugate_direction",
    "curvature_accepted",
    "decayed_parameter",
    "effective_gradient",
    "initial_state",
    "line_search_scale",
    "minimize",
    "nlcg_step",
    "polar",
    "preconditioned_residual",
    "rounded_to_bfloat16",
    "scaled_bfgs_diagonal",
    "second_moment",
]


@dataclass(frozen=True)
class State:
    """What survives a step. Arrays have shape (n,)."""

    g_prev: Array
    d: Array
    diagonal: Array | None
    """The preconditioner's own array: h for ``"bfgs"``, v for ``"adam"``, None without a preconditioner."""
    alpha_prev: Array
    active: npt.NDArray[np.bool_]
    """Which elements took part in the last step."""
    updates: Array = field(default_factory=lambda: np.zeros(0))
    """How many steps have moved each element."""
    step: int = 0
    skipped_steps: int = 0
    rz: float = 0.0
    ls_scale: float = 1.0
    loss_prev: float | None = None
    # The results of the last step.
    beta: float = 0.0
    ys: float = 0.0
    shs: float = 0.0
    updated: bool = False
    grad_norm: float = 0.0
    """before clipping, if it is measured; also set by a skipped step"""
    clip: float = 1.0
    rz_matrices: float = 0.0
    beta_matrices: float = 0.0


@dataclass(frozen=True)
class Matrix:
    """Elements ``begin`` to ``begin + rows * columns`` of the parameters: a matrix, row by row, with
    ``preconditioner="muon"``. ``size``: the factor of its polar factor."""

    begin: int
    rows: int
    columns: int
    size: float

    @property
    def elements(self) -> slice:
        return slice(self.begin, self.begin + self.rows * self.columns)


def initial_state(n: int, options: Options | None = None) -> State:
    """The state before the first step: ``h = 1``, everything else zero."""
    zeros = np.zeros(n)
    return State(
        g_prev=zeros,
        d=zeros,
        diagonal=PRECONDITIONERS[(options or Options()).preconditioner].start(n),
        alpha_prev=zeros,
        active=np.ones(n, dtype=bool),
        updates=np.zeros(n),
    )


# ---- the equations ---------------------------------------------------------------------------------------------------


def effective_gradient(grad: Array, p: Array, weight_decay: float | Array, maximize: bool) -> Array:
    """The gradient that the method sees: negated for ``maximize``, then with L2 weight decay added."""
    signed = -grad if maximize else grad
    return np.where(np.asarray(weight_decay) != 0.0, signed + weight_decay * p, signed)


def clip_factor(norm: float, max_grad_norm: float | None) -> float:
    """The factor of ``torch.nn.utils.clip_grad_norm_``: ``max_grad_norm / (norm + 1e-6)``, at most 1."""
    if max_grad_norm is None or max_grad_norm == np.inf:
        return 1.0
    factor = max_grad_norm / (norm + 1e-6)
    return 1.0 if factor >= 1.0 else factor


def curvature_accepted(ys: float, shs: float, curvature_eps: float) -> bool:
    """Whether the pair (s, y) may update ``h``: both denominators clearly positive."""
    return ys > curvature_eps and shs > curvature_eps


def bfgs_diagonal(h: Array, y: Array, s: Array, ys: float, shs: float) -> Array:
    """Diagonal BFGS update (Algorithm 2): ``| h + y^2/ys - (h s)^2/shs |``."""
    return np.abs(h + y**2 / ys - (h * s) ** 2 / shs)


def scaled_bfgs_diagonal(h: Array, y: Array, s: Array, ys: float, shs: float, scale: float) -> Array:
    """The diagonal of full-batch descent: ``L h + y^2/ys - (L h s)^2/(L shs)``, at least rounding of ``L h``."""
    scaled = scale * h
    return np.maximum(bfgs_diagonal(scaled, y, s, ys, scale * shs), np.finfo(np.float64).eps * scaled)


def second_moment(v: Array, g: Array, beta2: float) -> Array:
    """Adam's running mean of squares: ``beta2 v + (1 - beta2) g^2``."""
    return beta2 * v + (1.0 - beta2) * g**2


def adam_diagonal(v: Array, beta2: float, updates: Array) -> Array:
    """Adam's diagonal, bias-corrected: ``sqrt(v / (1 - beta2^k))`` after k updates; 0 before the first."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = -np.expm1(updates * np.log(beta2))  # without cancellation
    return np.sqrt(v / np.where(updates > 0, bias, 1.0))


def decayed_parameter(p: Array, alpha: Array, weight_decay: float | Array) -> Array:
    """Decoupled weight decay: ``(1 - alpha weight_decay) p``."""
    return (1.0 - alpha * weight_decay) * p


def preconditioned_residual(g: Array, h: Array | None, eps: float = 0.0) -> Array:
    """``z = -g / (h + eps)``; ``-g`` without a preconditioner."""
    return -g if h is None else -g / (h + eps)


def conjugacy(update: str, rz: float, rz_new: float, rz_mid: float, beta_max: float = 1.0) -> float:
    """beta of Algorithm 1, clamped to [0, beta_max]; 0 if ``rz`` is 0 or the quotient is not finite. Heavy ball:
    beta_max.

    Raises:
        ValueError: for an unknown ``update``.
    """
    if update not in ("fletcher_reeves", "polak_ribiere", "heavy_ball"):
        raise ValueError(f"update must be 'fletcher_reeves', 'polak_ribiere' or 'heavy_ball', got {update!r}")
    if update == "heavy_ball":
        return beta_max
    numerator = rz_new - rz_mid if update == "polak_ribiere" else rz_new
    if rz == 0.0:
        return 0.0
    with np.errstate(all="ignore"):
        beta = float(np.float64(numerator) / np.float64(rz))
    return min(max(beta, 0.0), beta_max) if np.isfinite(beta) else 0.0


def conjugate_direction(z: Array, beta: float | Array, d: Array) -> Array:
    """``d_new = z + beta d``."""
    return z + beta * d


def line_search_scale(scale: float, loss: float, loss_prev: float | None, search: OnlineLineSearch) -> float:
    """Online stochastic line search (section 3.2.2): the new scale, in (0, 1].

    "Increased by 2 %" is taken relative to ``|loss_prev|``, so that it keeps its meaning for a negative loss.
    """
    increase_threshold, flat_threshold, decrease, increase = search.as_tuple()
    if loss_prev is None:
        return scale
    if loss > loss_prev + increase_threshold * abs(loss_prev):
        return max(scale * (1.0 - decrease), float(np.finfo(np.float64).tiny))
    if loss < loss_prev + flat_threshold * abs(loss_prev):
        return min(1.0, scale * (1.0 + increase))
    return scale


_STATE_ARRAYS = {"g_prev": (0xC2B2AE35, 0), "d": (0x27D4EB2F, 0), "diagonal": (0x27D4EB2F, 16)}


def rounded_to_bfloat16(
    x: npt.NDArray[np.float32], *, step: int, parameter: int, array: str = "p"
) -> npt.NDArray[np.float32]:
    """Stochastic rounding: a number goes to the bfloat16 away from zero with the probability of the part that is cut
    off, to the other one else, by bits that depend on the arguments and on the place in ``x`` alone.

    Args:
        x: a whole parameter, or an array of its state, in row-major order.
        step: how many steps the optimizer has completed before this one.
        parameter: the parameter's index, over all groups.
        array: what ``x`` is: ``"p"``, or state: ``"g_prev"``, ``"d"`` or ``"diagonal"``.
    """

    half = np.uint32(16)

    def mixed(n: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:  # lowbias32 of Chris Wellons' hash-prospector
        n = (n ^ (n >> half)) * np.uint32(0x7FEB352D)
        n = (n ^ (n >> np.uint32(15))) * np.uint32(0x846CA68B)
        return n ^ (n >> half)

    def word(n: int) -> npt.NDArray[np.uint32]:
        return np.array([n & 0xFFFFFFFF], dtype=np.uint32)

    salt, shift = (0, 0) if array == "p" else _STATE_ARRAYS[array]
    key = mixed(mixed(word(step + 0x9E3779B9)) ^ mixed(word(parameter + 0x85EBCA6B)) ^ word(salt))
    place = np.arange(x.size, dtype=np.uint64)
    low, high = (place & 0xFFFFFFFF).astype(np.uint32), (place >> 32).astype(np.uint32)
    if array == "p":
        random = mixed(mixed(low ^ key) + (mixed(high + np.uint32(0x85EBCA6B)) ^ key))
    else:
        random = mixed(low ^ np.where(high == 0, key, mixed(key ^ mixed(high)))) >> np.uint32(shift)
    random = random & np.uint32(0xFFFF)
    bits = np.ascontiguousarray(x, dtype=np.float32).reshape(-1).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> half) & np.uint32(1))
    up = bits + random
    chosen = np.where((up >> half) & np.uint32(0x7FFF) >= 0x7F80, nearest, up) & np.uint32(0xFFFF0000)
    return chosen.astype(np.uint32).view(np.float32).reshape(x.shape)


def polar(u: Array) -> Array:
    """The polar factor of a matrix, up to the spread of Muon's Newton-Schulz iteration (Jordan et al. 2024): five times
    ``X = a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = u / |u|``. It brings the singular values to between 0.7
    and 1.2, the smallest ones apart. Zero for a matrix of zeros."""
    a, b, c = 3.4445, -4.775, 2.0315
    norm = float(np.sqrt(np.sum(u**2)))
    x = u / norm if norm > 0.0 else np.zeros_like(u)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


# ---- the preconditioners ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """No preconditioner: ``z = -g``. The base class of the others."""

    decoupled: bool = False
    """Whether weight decay acts on p, not on the gradient."""

    def start(self, n: int) -> Array | None:
        """The preconditioner's array before the first step."""
        return None

    def old_h(self, state: State, o: Options) -> Array | None:
        """h before this step's update, plus eps."""
        return None

    def update(
        self, state: State, o: Options, g: Array, g_prev: Array, d: Array, *, same: bool
    ) -> tuple[Array | None, Array | None, dict[str, Any]]:
        """This step's h plus eps, the preconditioner's array after the step, and the values for diagnostics."""
        return None, None, {}


class Bfgs(Plain):
    """The paper's diagonal of Algorithm 2: the array is h itself."""

    def start(self, n: int) -> Array:
        return np.ones(n)

    def _eps(self, state: State, o: Options) -> float:
        return 0.0 if state.step == 0 else o.eps

    def old_h(self, state: State, o: Options) -> Array:
        assert state.diagonal is not None
        return state.diagonal + self._eps(state, o)

    def update(
        self, state: State, o: Options, g: Array, g_prev: Array, d: Array, *, same: bool
    ) -> tuple[Array, Array, dict[str, Any]]:
        h = state.diagonal
        assert h is not None
        ys, shs, updated = 0.0, 0.0, False
        if same:
            y, s = g - g_prev, state.alpha_prev * d
            ys, shs = float(np.sum(y * s)), float(np.sum(s * h * s))
            updated = curvature_accepted(ys, shs, o.curvature_eps)
            if updated:
                h = bfgs_diagonal(h, y, s, ys, shs)
        return h + self._eps(state, o), h, {"ys": ys, "shs": shs, "updated": updated}


class Adam(Plain):
    """Adam's diagonal (Kingma & Ba, arXiv:1412.6980): the array is v."""

    def start(self, n: int) -> Array:
        return np.zeros(n)

    def old_h(self, state: State, o: Options) -> Array:
        assert state.diagonal is not None
        return adam_diagonal(state.diagonal, o.beta2, state.updates) + o.eps

    def update(
        self, state: State, o: Options, g: Array, g_prev: Array, d: Array, *, same: bool
    ) -> tuple[Array, Array, dict[str, Any]]:
        assert state.diagonal is not None
        v = second_moment(state.diagonal, g, o.beta2)
        return adam_diagonal(v, o.beta2, state.updates + 1) + o.eps, v, {"updated": True}


PRECONDITIONERS: dict[str | None, Plain] = {"adam": Adam(decoupled=True), "bfgs": Bfgs(), None: Plain()}


def _vector(name: str, value: npt.ArrayLike) -> Array:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}, expected real numbers")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one dimension")
    return array.astype(np.float64, copy=False)


def _check_numbers(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """One number for all elements, or one for each: finite and >= 0."""
    if np.ndim(value) == 0:
        check_real(name, value, minimum=0.0)
    elif np.shape(value) != shape:
        raise ValueError(f"{name} has shape {np.shape(value)}, expected one number or an array of shape {shape}")
    elif not (np.all(np.isfinite(value)) and np.all(np.asarray(value) >= 0.0)):
        raise ValueError(f"{name} has elements that are not finite numbers >= 0")


# ---- one step --------------------------------------------------------------------------------------------------------


def nlcg_step(
    p: Array,
    grad: Array,
    state: State,
    options: Options | None = None,
    *,
    lr: float | Array | Callable[[Array, Array], float],
    weight_decay: float | Array = 0.0,
    loss: float | None = None,
    active: npt.NDArray[np.bool_] | None = None,
    matrices: Sequence[Matrix] = (),
    beta_max_matrices: float = 0.95,
) -> tuple[Array, State]:
    """One step. A pure function: it returns the new parameters and the new state, and changes no argument.

    Args:
        p: parameters, shape (n,).
        grad: gradient of the loss at ``p``, shape (n,); values outside ``active`` are not used.
        state: from :func:`initial_state` or the previous step.
        options: see :class:`Options`.
        lr: step length before the line-search scale, >= 0; an array gives every element its own (parameter groups); a
            callable is called as ``lr(p, d)`` with the new direction (for an exact line search, for example).
        weight_decay: coefficient >= 0, a number or one per element: L2, or decoupled with ``"adam"``.
        loss: this step's loss, for the line search; None or a number that is not finite leaves the scale unchanged.
        active: which elements have a gradient, a bool array of shape (n,); all by default. The others keep value and
            state, and are left out of every sum.
        matrices: the elements that have ``preconditioner="muon"``; the others then have ``"adam"``.
        beta_max_matrices: upper bound of the beta of the matrices.

    Returns:
        The new parameters and the new state.

    Raises:
        TypeError, ValueError: for an array of the wrong dtype or shape, or a number out of range.
    """
    o = options or Options()
    if o.preconditioner == "muon" or (matrices and o.preconditioner != "adam"):
        raise ValueError(
            f"preconditioner is {o.preconditioner!r}; expected 'adam' with matrices=, whose elements have 'muon'"
        )
    preconditioner = PRECONDITIONERS[o.preconditioner]
    p, grad = _vector("p", p), _vector("grad", grad)
    if grad.shape != p.shape or state.d.shape != p.shape:
        raise ValueError(
            f"p has shape {p.shape}, grad {grad.shape} and state.d {state.d.shape}; expected the same shape"
        )
    if not callable(lr):
        _check_numbers("lr", lr, p.shape)
    _check_numbers("weight_decay", weight_decay, p.shape)
    if active is not None and (active.shape != p.shape or active.dtype != np.bool_):
        raise ValueError(f"active has shape {active.shape} and dtype {active.dtype}, expected {p.shape} and bool")
    l2, decoupled = (0.0, weight_decay) if preconditioner.decoupled else (weight_decay, 0.0)
    active = np.ones(p.size, dtype=bool) if active is None else active
    grad_norm, clip = state.grad_norm, state.clip
    if o.measures_norm:
        with np.errstate(all="ignore"):
            grad_norm = float(np.sqrt(np.sum(np.where(active, grad, 0.0) ** 2)))
        spike = o.skip_grad_norm is not None and grad_norm > o.skip_grad_norm
        if spike or (o.nonfinite == "skip" and not np.isfinite(grad_norm)):
            return p, replace(state, skipped_steps=state.skipped_steps + 1, grad_norm=grad_norm)
        clip = clip_factor(grad_norm, o.max_grad_norm)
    g = np.where(active, effective_gradient(clip * grad if clip != 1.0 else grad, p, l2, o.maximize), 0.0)
    is_matrix = np.zeros(p.size, dtype=bool)
    for matrix in matrices:
        is_matrix[matrix.elements] = True
    d_old = np.where(active, state.d, 0.0)
    g_prev = np.where(active, state.g_prev, 0.0)
    same_course = state.step != 0 and bool(np.array_equal(active, state.active))

    ls_scale, loss_prev = state.ls_scale, state.loss_prev
    if o.line_search is not None and loss is not None and np.isfinite(loss):
        signed = -loss if o.maximize else loss
        ls_scale, loss_prev = line_search_scale(ls_scale, signed, loss_prev, o.line_search), signed

    with np.errstate(all="ignore"):
        h, diagonal, info = preconditioner.update(state, o, g, g_prev, d_old, same=same_course)
        z = np.where(is_matrix, -g, preconditioned_residual(g, h))
        rz_new = float(np.sum(np.where(is_matrix, 0.0, -g * z)))
        rz_matrices = float(np.sum(np.where(is_matrix, g * g, 0.0)))
        rz_mid = float(np.sum(g * -preconditioned_residual(g_prev, preconditioner.old_h(state, o))))
        beta = conjugacy(o.update, state.rz, rz_new, rz_mid, o.largest_beta) if same_course else 0.0

        beta_matrices = (
            conjugacy(o.update, state.rz_matrices, rz_matrices, 0.0, beta_max_matrices) if same_course else 0.0
        )

        sums = [info.get("ys", 0.0), info.get("shs", 0.0), rz_new, rz_mid, rz_matrices]
        if o.nonfinite == "skip" and not np.all(np.isfinite(sums)):
            return p, replace(state, skipped_steps=state.skipped_steps + 1, grad_norm=grad_norm)

        d = np.where(active, conjugate_direction(z, np.where(is_matrix, beta_matrices, beta), d_old), state.d)
        moves_along = d.copy()
        for matrix in matrices:
            at = matrix.elements
            u = conjugate_direction(z[at], beta_matrices, d[at]).reshape(matrix.rows, matrix.columns)
            moves_along[at] = matrix.size * polar(u).ravel()
        alpha = (lr(p, d) if callable(lr) else lr) * ls_scale * np.ones(p.size)
        p_new = np.where(active & (alpha != 0.0), decayed_parameter(p, alpha, decoupled) + alpha * moves_along, p)
    changed = active & ~is_matrix
    return p_new, State(
        g_prev=np.where(active, g, state.g_prev),
        d=d,
        diagonal=None if diagonal is None or state.diagonal is None else np.where(changed, diagonal, state.diagonal),
        alpha_prev=np.where(active, alpha, state.alpha_prev),
        active=active,
        updates=np.where(active, state.updates + 1, state.updates),
        step=state.step + 1,
        skipped_steps=state.skipped_steps,
        rz=rz_new,
        ls_scale=ls_scale,
        loss_prev=loss_prev,
        beta=beta,
        ys=info.get("ys", 0.0),
        shs=info.get("shs", 0.0),
        updated=info.get("updated", False),
        grad_norm=grad_norm,
        clip=clip,
        rz_matrices=rz_matrices,
        beta_matrices=beta_matrices,
    )


# ---- full-batch descent ----------------------------------------------------------------------------------------------


class DescentPasses:
    """The vectors of full-batch descent, in float64. :mod:`fastnlcg.full_batch.iteration` decides, on scalars; each
    method of this class is an equation or two.

    Args:
        x: the starting point, shape (n,); written.
        gradient: returns the gradient at ``x``, which the last evaluation has formed.
        preconditioned: whether h is used.
    """

    def __init__(self, x: Array, gradient: Callable[[], Array], *, preconditioned: bool = True) -> None:
        self.x, self.gradient = x, gradient
        self.d, self.g_prev, self.origin = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
        self.h = np.ones_like(x)
        self.preconditioned = preconditioned

    def _mark(self) -> tuple[float, float]:
        """``sum(x d)``, ``sum(x x)``"""
        return float(np.sum(self.x * self.d)), float(np.sum(self.x * self.x))

    def trial(self, alpha: float, *, first: tuple[float, float] | None) -> None:
        """``x = origin + alpha d``. ``first``, in the first trial of a search: the mark that x must have."""
        if first is not None:
            # The tolerance allows for sums in another order.
            if not np.allclose(self._mark(), first, rtol=1e-9, atol=1e-9 * first[1]):
                raise Edited
            self.origin[:] = self.x
        self.x[:] = self.origin + alpha * self.d if alpha != 0.0 else self.origin

    def slope(self, f: float) -> tuple[float, float, float]:
        """``f``, ``sum(g d)``, ``max |g|``"""
        g = self.gradient()
        return f, float(np.sum(g * self.d)), float(np.max(np.abs(g)))

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        """h, then ``sum(g P g)``, ``sum(y P g)``, ``sum(y P y)`` with P = 1/h."""
        g = self.gradient()
        y = g - self.g_prev
        if update is not None:
            alpha, scale, ys, scaled_shs = update
            self.h = scaled_bfgs_diagonal(self.h, y, alpha * self.d, ys, scaled_shs / scale, scale)
        return Sums(float(np.sum(g * g / self.h)), float(np.sum(y * g / self.h)), float(np.sum(y * y / self.h)))

    def direction(self, beta: float) -> tuple[float, float, tuple[float, float]]:
        """``d = beta d - P g``; ``sum(g d)``, ``sum(d h d)``, and the mark of x"""
        g = self.gradient()
        z = preconditioned_residual(g, self.h)
        self.d = conjugate_direction(z, beta, self.d) if beta != 0.0 else z
        self.g_prev = g.copy()
        return float(np.sum(g * self.d)), float(np.sum(self.d * self.h * self.d)), self._mark()

    def forget(self) -> None:
        """``h = 1``"""
        self.h = np.ones_like(self.x)


# ---- a whole optimization --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What :func:`minimize` returns: the last point, the loss before every step, and the last state."""

    p: Array
    losses: list[float] = field(default_factory=list)
    state: State | None = None


def minimize(
    fun: Callable[[Array], tuple[float, Array]],
    p: npt.ArrayLike,
    *,
    steps: int,
    lr: float | Callable[[Array, Array], float],
    weight_decay: float = 0.0,
    **options: Any,
) -> Result:
    """Takes ``steps`` steps on ``fun(p) -> (loss, gradient)`` from ``p``, shape (n,).

    ``lr`` and ``weight_decay`` are those of :func:`nlcg_step`; the other keywords are those of :class:`Options`.
    """
    o = Options(**options)
    point = np.array(p, dtype=np.float64).ravel()
    state = initial_state(point.size, o)
    losses = []
    for _ in range(steps):
        loss, grad = fun(point)
        losses.append(float(loss))
        point, state = nlcg_step(point, np.asarray(grad), state, o, lr=lr, weight_decay=weight_decay, loss=float(loss))
    return Result(point, losses, state)
