"""The step and its parts over flat buffers, for NumPy arrays, torch tensors and anything with the buffer protocol or
DLPack. They work in place, take their scalars as arguments and need no torch: use them to write an optimizer, or a
framework, of your own.

All arrays of a call are on one device, the CPU or a GPU, contiguous, of the same length n (the shape does not matter),
and do not overlap. ``p`` and ``g`` share a dtype: float64, float32, bfloat16 or float16. The state (``g_prev``, ``d``,
``h``, ``v``) is float32, or float64 for float64 parameters. Nothing is cast or copied. Formulas are evaluated in the
state's dtype, sums in double in an order that depends on n alone: results have the same bits for any thread count,
instruction set and address, and for any GPU (though GPUs and CPUs sum in different orders).

Arrays on a GPU come through DLPack or ``__cuda_array_interface__``. The work is enqueued on ``stream``, a
``cudaStream_t`` as an integer: by default torch's current stream for torch tensors, CuPy's for CuPy arrays, else the
default stream. A function that returns numbers waits for them; :class:`fastnlcg.NLCG` never does.

A step from its parts (Fletcher-Reeves, without the safeguards of :func:`nlcg_step`); before the first step ``rz`` is
infinite::

    rz_new = adam_preconditioned_dots(g, v, updates=k).rz              # "adam", step number k = 0, 1, ...
    adam_direction_update(d, g, v, beta=min(0.9, rz_new / rz), updates=k, p=p, alpha=alpha)
    rz = rz_new

    curvature = bfgs_diag_update(h, g, g_prev, d, alpha_prev=alpha)    # "bfgs"
    rz_new = preconditioned_dots(g, None, h).rz
    direction_update(d, g, h, beta=min(1.0, rz_new / rz), p=p, alpha=alpha, g_prev=g_prev)
    rz = rz_new

For Polak-Ribiere subtract ``rz_mid`` from the numerator: pass ``g_prev`` to the dots, and with ``"bfgs"`` call them
before the update, because ``rz_mid`` takes the old ``h``.

Errors are raised before anything is written: TypeError for an argument that is not an array or has the wrong dtype;
ValueError for different lengths, overlap, a read-only or non-contiguous array, several devices, or a number out of
range. If CUDA fails, RuntimeError with the kernel's name and CUDA's text.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from fastnlcg import _native
from fastnlcg.options import LARGEST_COUNT, Options, check_real

__all__ = [
    "Curvature",
    "Dots",
    "Scalars",
    "adam_direction_update",
    "adam_preconditioned_dots",
    "bfgs_diag_update",
    "direction_update",
    "nlcg_step",
    "preconditioned_dots",
]


class Curvature(NamedTuple):
    """What :func:`bfgs_diag_update` returns."""

    ys: float
    """sum(y s)"""
    shs: float
    """sum(s h s), with the old h"""
    updated: bool
    """whether both were above ``curvature_eps``, and h was written"""


class Dots(NamedTuple):
    """What :func:`preconditioned_dots` and :func:`adam_preconditioned_dots` return."""

    rz: float
    """sum(-g z) = sum(g g / (h + eps))"""
    rz_mid: float
    """sum(g g_prev / (h + eps)); 0 without ``g_prev``"""


class Scalars:
    """Every scalar that survives a step of :func:`nlcg_step`. A new object starts a new optimization.

    ``step`` counts completed steps, ``skipped_steps`` skipped ones; ``rz`` = sum(-g z) of the last step; ``gs`` =
    sum(g s) and ``shs`` = sum(s h s) over the last move; ``grad_max`` is the largest ``|g|`` of the last step
    (``"bfgs"``), ``direction_max`` a bound of ``|d|``; ``ls_scale`` is the line-search scale, in (0, 1];
    ``loss_prev`` is negated under ``maximize``, and infinite before the first loss; ``alpha_prev`` = lr * ls_scale of
    the last step; ``updates`` counts the gradients in Adam's v.

    Diagnostics of the last step: ``beta``; ``ys``, ``shs_used`` (that of the curvature condition) and
    ``updated``; ``gg`` = sum(g g) and ``gd`` = sum(g d), if g is not kept; ``grad_norm`` before clipping, if it is
    measured, and ``clip``, the factor of clipping. ``active_set``, ``disagreements``, ``rz_matrices`` and
    ``beta_matrices`` are those of an optimizer with several parameters or ranks, and stay what they are.

    All are floats, and attributes that may be set. One float64 array holds them, which the step writes at once, so an
    interrupt never leaves half of them written. Objects are copied, pickled, compared and printed by value.
    """

    __slots__ = ("_values",)
    _values: np.ndarray[Any, np.dtype[np.float64]]
    _names = (*_native.SCALARS, "alpha_prev", "updates")

    def __init__(self, **values: float) -> None:
        object.__setattr__(self, "_values", np.array([*_native.SCALARS.values(), 0.0, 0.0]))
        for name, value in values.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> float:
        return float(self._values[Scalars._index(name)])

    def __setattr__(self, name: str, value: Any) -> None:
        index = Scalars._index(name)
        # Not finite: there is no loss_prev yet, or nonfinite="propagate" let a step through.
        if not isinstance(value, float) or math.isfinite(value):
            value = check_real(f"scalars.{name}", value)
        if name == "updates" and not (0.0 <= value <= LARGEST_COUNT and value == int(value)):
            raise ValueError(f"scalars.updates is {value!r}, expected a whole number from 0 to 2**53")
        self._values[index] = value

    @staticmethod
    def _index(name: str) -> int:
        if name not in Scalars._names:
            raise AttributeError(f"Scalars has no attribute {name!r}; it has {', '.join(Scalars._names)}")
        return Scalars._names.index(name)

    def _asdict(self) -> dict[str, float]:
        return dict(zip(Scalars._names, self._values.tolist(), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:  # copy, deepcopy and pickle
        return functools.partial(Scalars, **self._asdict()), ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scalars):
            return NotImplemented
        return bool(np.array_equal(self._values, other._values, equal_nan=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Scalars({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"


def bfgs_diag_update(
    h: Any,
    g: Any,
    g_prev: Any,
    d: Any,
    *,
    alpha_prev: float,
    curvature_eps: float = 1e-8,
    threads: int | None = None,
    stream: int | None = None,
) -> Curvature:
    """Diagonal BFGS update of the Hessian estimate (Algorithm 2), in place.

    With ``y = g - g_prev`` and ``s = alpha_prev * d``::

        h = | h + y^2 / ys - (h s)^2 / shs |     if ys = sum(y s) and shs = sum(s h s) are both > curvature_eps

    Otherwise ``h`` is unchanged. ``h`` stays finite for any gradients.

    Args:
        h: diagonal of the Hessian estimate, shape (n,), written.
        g: current gradient.
        g_prev: gradient before the last move.
        d: direction of the last move.
        alpha_prev: step length of the last move.
        curvature_eps: bound of the curvature condition, >= 0.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``ys``, ``shs``, and whether h was updated.
    """
    alpha_prev = check_real("alpha_prev", alpha_prev)
    curvature_eps = check_real("curvature_eps", curvature_eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"g_prev": g_prev, "d": d, "h": h}, ("h",))
    step = _step(view, stream, Options(preconditioner="bfgs", curvature_eps=curvature_eps), g, h)
    curvature = Curvature(*step.update_curvature(alpha_prev, threads))
    if curvature.updated:
        _native.mark_written(h)
    return curvature


def preconditioned_dots(
    g: Any, g_prev: Any, h: Any, *, eps: float = 1e-8, threads: int | None = None, stream: int | None = None
) -> Dots:
    """The preconditioned dot products that make beta (Algorithm 1). Reads only.

    Args:
        g: gradient, shape (n,).
        g_prev: gradient of the previous step, or None to leave ``rz_mid`` out.
        h: diagonal of the Hessian estimate; None: no preconditioner, z = -g.
        eps: added to h, >= 0.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``rz = sum(g g / (h + eps))`` and ``rz_mid = sum(g g_prev / (h + eps))``.
    """
    eps = check_real("eps", eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"g_prev": g_prev, "h": h}, (), ("g_prev", "h"))
    step = _step(view, stream, Options(preconditioner=None if h is None else "bfgs", eps=eps), g)
    return Dots(*step.preconditioned_dots(threads))


def direction_update(
    d: Any,
    g: Any,
    h: Any,
    *,
    beta: float,
    eps: float = 1e-8,
    p: Any = None,
    alpha: float = 0.0,
    g_prev: Any = None,
    threads: int | None = None,
    stream: int | None = None,
) -> None:
    """New conjugate direction, and the move along it, in one pass and in place.

    ``z = -g / (h + eps)``, ``d = z + beta * d``, and ``p = p + alpha * d`` and ``g_prev = g`` if these are given.

    Args:
        d: direction, shape (n,), written.
        g: gradient.
        h: diagonal of the Hessian estimate; None: no preconditioner, z = -g.
        beta: conjugacy coefficient.
        eps: added to h, >= 0.
        p: parameters to move, written; None: only d is updated.
        alpha: step length.
        g_prev: receives a copy of ``g`` for the next step; None: no copy is kept.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.
    """
    beta = check_real("beta", beta)
    alpha = check_real("alpha", alpha)
    eps = check_real("eps", eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers(
        {"g": g, "p": p}, {"d": d, "h": h, "g_prev": g_prev}, ("d", "p", "g_prev"), ("p", "h", "g_prev")
    )
    step = _step(view, stream, Options(preconditioner=None if h is None else "bfgs", eps=eps), g, d)
    step.update_direction(alpha, 0.0, beta, threads)
    _native.mark_written(d, p, g_prev)


def adam_preconditioned_dots(
    g: Any,
    v: Any,
    *,
    updates: int,
    beta2: float = 0.999,
    eps: float = 1e-8,
    g_prev: Any = None,
    threads: int | None = None,
    stream: int | None = None,
) -> Dots:
    """The dot products that make beta, with Adam's diagonal. Reads only: ``v`` is the second moment before this
    gradient.

    With ``v_new = beta2 v + (1 - beta2) g^2`` and ``h = sqrt(v_new / (1 - beta2^(updates + 1)))``.

    Args:
        g: gradient, shape (n,).
        v: running mean of squared gradients, shape (n,).
        updates: number of gradients that ``v`` has averaged, >= 0.
        beta2: decay of v, in [0, 1).
        eps: added to h, > 0.
        g_prev: gradient of the previous step, or None to leave ``rz_mid`` out.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``rz = sum(g g / (h + eps))``, and ``rz_mid = sum(g g_prev / (h_old + eps))``, where h_old is formed from ``v``
        as given.
    """
    options = Options(preconditioner="adam", beta2=beta2, eps=eps)
    updates = _check_updates(updates)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"v": v, "g_prev": g_prev}, (), ("g_prev",))
    return Dots(*_step(view, stream, options, g, updates=updates).preconditioned_dots(threads))


def adam_direction_update(
    d: Any,
    g: Any,
    v: Any,
    *,
    beta: float,
    updates: int,
    beta2: float = 0.999,
    eps: float = 1e-8,
    p: Any = None,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    g_prev: Any = None,
    threads: int | None = None,
    stream: int | None = None,
) -> None:
    """Adam's second moment, the new conjugate direction with its diagonal, and the move along it, in one pass and in
    place.

    ``v = beta2 v + (1 - beta2) g^2``, ``h = sqrt(v / (1 - beta2^(updates + 1)))``, ``z = -g / (h + eps)``,
    ``d = z + beta * d``, and ``p = (1 - alpha weight_decay) p + alpha * d`` and ``g_prev = g`` if these are given.

    Args:
        d: direction, shape (n,), written.
        g: gradient.
        v: running mean of squared gradients, written.
        beta: conjugacy coefficient.
        updates: number of gradients that ``v`` had averaged before, >= 0.
        beta2: decay of v, in [0, 1).
        eps: added to h, > 0.
        p: parameters to move, written; None: only v and d are updated.
        alpha: step length.
        weight_decay: decoupled weight decay, >= 0.
        g_prev: receives a copy of ``g`` for the next step; None: no copy is kept.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.
    """
    beta = check_real("beta", beta)
    alpha = check_real("alpha", alpha)
    weight_decay = check_real("weight_decay", weight_decay, minimum=0.0)
    options = Options(preconditioner="adam", beta2=beta2, eps=eps)
    updates = _check_updates(updates)
    threads = _native.num_threads(threads)
    view = _native.buffers(
        {"g": g, "p": p}, {"d": d, "v": v, "g_prev": g_prev}, ("d", "v", "p", "g_prev"), ("p", "g_prev")
    )
    _step(view, stream, options, g, d, updates=updates).update_direction(alpha, weight_decay, beta, threads)
    _native.mark_written(d, v, p, g_prev)


def nlcg_step(
    p: Any,
    g: Any,
    g_prev: Any,
    d: Any,
    diagonal: Any,
    scalars: Scalars,
    *,
    lr: float,
    preconditioner: Literal["adam", "bfgs"] | None,
    loss: float | None = None,
    weight_decay: float = 0.0,
    threads: int | None = None,
    stream: int | None = None,
    **options: Any,
) -> bool:
    """One whole fused step, in place: what :class:`fastnlcg.NLCG` does, for one flat buffer.

    It allocates no temporary of the size of the parameters. On a GPU it waits for the scalars, which are kept on the
    host. Before the first step ``g_prev``, ``d`` and Adam's ``diagonal`` must be zero, the ``diagonal`` of ``"bfgs"``
    one, and ``scalars`` ``Scalars()``.

    Args:
        p: parameters, shape (n,), written.
        g: gradient.
        g_prev: gradient of the previous step, written. With ``"adam"`` None, unless ``update="polak_ribiere"``.
        d: direction, written.
        diagonal: the preconditioner's state, written: v for ``"adam"``, h for ``"bfgs"``, None without one.
        scalars: the scalars of the previous step, written.
        lr: learning rate, >= 0; the step length is ``lr`` times the line-search scale.
        preconditioner: as in :class:`fastnlcg.NLCG`. It defines what ``diagonal`` holds, so there is no default.
        loss: loss at ``p``, for the line search; None or a number that is not finite leaves the scale unchanged.
        weight_decay: >= 0; decoupled with ``"adam"``, else L2.
        threads: on the CPU; default torch's thread count if torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.
        options: ``update``, ``line_search``, ``eps``, ``curvature_eps``, ``beta2``, ``beta_max``, ``nonfinite``,
            ``maximize``, ``max_grad_norm``, ``skip_grad_norm``, ``stochastic_rounding``, as in :class:`fastnlcg.NLCG`.

    Returns:
        False if the step was skipped: a sum was not finite, or the gradient's norm was above ``skip_grad_norm``. Only
        ``scalars.skipped_steps`` and, if the norm is measured, ``scalars.grad_norm`` have then changed.
    """
    lr = check_real("lr", lr, minimum=0.0)
    weight_decay = check_real("weight_decay", weight_decay, minimum=0.0)
    chosen = Options(preconditioner=preconditioner, **options)
    kind = chosen.kind
    if chosen.state_dtype is not None:
        raise ValueError(
            f"state_dtype is {chosen.state_dtype!r}; expected None: the state of flat buffers is float32, or float64 "
            "for float64 parameters; fastnlcg.NLCG takes bfloat16"
        )
    if kind.of_matrices:
        raise ValueError(
            f"preconditioner is {preconditioner!r}, which needs the shapes of matrices, and a flat buffer has none; "
            "expected 'adam', 'bfgs' or None, or fastnlcg.NLCG"
        )
    if (diagonal is None) != (kind.diagonal is None):
        wanted = "None" if kind.diagonal is None else f"its {kind.diagonal}"
        got = "None" if diagonal is None else type(diagonal).__name__
        raise ValueError(f"diagonal must be {wanted} with preconditioner={preconditioner!r}, got {got}")
    if g_prev is None and chosen.keeps_gradient:
        raise ValueError(f"g_prev is needed with preconditioner={preconditioner!r}, update={chosen.update!r}; got None")
    if not isinstance(scalars, Scalars):
        raise TypeError(f"scalars must be an ops.Scalars, got {type(scalars).__name__}")
    loss_value = _native.check_loss(loss)
    threads = _native.num_threads(threads)
    state = {"g_prev": g_prev, "d": d, "diagonal": diagonal}
    view = _native.buffers({"g": g, "p": p}, state, ("p", *state), ("g_prev", "diagonal"))
    step = _step(view, stream, chosen, g, p)
    numbers = _native.Buffer(scalars._values)
    moved = step.step(numbers, lr, weight_decay, chosen.maximize, loss_value, threads)
    if moved:
        _native.mark_written(p, g_prev, d, diagonal)
    return moved


def _step(
    view: _native.Views, stream: int | None, options: Options, *arrays: object, updates: float = 0.0
) -> _native.FlatStep:
    """The native step of one call over these buffers."""
    if stream is None:
        stream = 0 if view.device == "cpu" else _native.current_stream(view.device, *arrays)
    elif isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream must be an int, a cudaStream_t, got {stream!r}")
    diagonal = next((view[name] for name in ("h", "v", "diagonal") if name in view), None)
    step = _native.FlatStep(view.state_dtype, view.device, stream)
    step.set_options(options.native())
    step.bind(
        p=view.get("p"),
        g=view["g"],
        grad_prev=view.get("g_prev"),
        direction=view.get("d"),
        diagonal=diagonal,
        steps=float(updates),
    )
    return step


def _check_updates(updates: object) -> int:
    if isinstance(updates, bool) or not isinstance(updates, int):
        raise TypeError(f"updates must be an int, got {updates!r}")
    if not 0 <= updates <= LARGEST_COUNT:
        raise ValueError(f"updates must be from 0 to 2**53, got {updates}")
    return updates
