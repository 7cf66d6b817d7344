"""The step and its parts over flat buffers, for NumPy arrays, torch tensors and anything with the buffer protocol or
DLPack. In place, explicit scalars, no torch needed: what you use to write an optimizer, or a framework, of your own.

All arrays of a call are on one device, the CPU or a GPU, contiguous, of the same length n (the shape does not matter),
and do not overlap. ``p`` and ``g`` share a dtype: float64, float32, bfloat16 or float16. The state (``g_prev``, ``d``,
``h``, ``v``) is float32, or float64 for float64 parameters. Nothing is cast or copied. Formulas are evaluated in the
state's dtype, sums in double in an order that n alone fixes: the same bits for any thread count, instruction set and
address, and for any GPU (though not the CPU's bits: that order is another).

Arrays on a GPU come through DLPack or ``__cuda_array_interface__``. The work goes to ``stream``, a ``cudaStream_t`` as
an integer: by default torch's current stream for torch's tensors, CuPy's for CuPy's arrays, else the default stream. A
function that returns numbers waits for them; :class:`fastnlcg.NLCG` never does.

A step from its parts (Fletcher-Reeves, without the safeguards of :func:`nlcg_step`)::

    rz_new = adam_preconditioned_dots(g, v, updates=k).rz              # "adam", step number k = 0, 1, ...
    adam_direction_update(d, g, v, beta=min(0.9, rz_new / rz), updates=k, p=p, alpha=alpha)
    rz = rz_new

    curvature = bfgs_diag_update(h, g, g_prev, d, alpha_prev=alpha)    # "bfgs"
    rz_new = preconditioned_dots(g, None, h).rz
    direction_update(d, g, h, beta=min(1.0, rz_new / rz), p=p, alpha=alpha, g_prev=g_prev)
    rz = rz_new

For Polak-Ribiere subtract ``rz_mid`` from the numerator: give ``g_prev`` to the dots, with ``"bfgs"`` before the
update, because it takes the old ``h``.

Errors, all before anything is written: TypeError for something that is no array or has the wrong dtype, ValueError for
different lengths, overlap, a read-only or non-contiguous array, several devices, or a number out of range.
RuntimeError, with the kernel's name and CUDA's text, where CUDA fails.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from fastnlcg import _native
from fastnlcg.line_search import OnlineLineSearch

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
    """What :func:`bfgs_diag_update` found."""

    ys: float
    """sum(y s)"""
    shs: float
    """sum(s h s), with the old h"""
    updated: bool
    """whether both were above ``curvature_eps``, and h was written"""


class Dots(NamedTuple):
    """What :func:`preconditioned_dots` found."""

    rz: float
    """sum(-g z) = sum(g g / (h + eps))"""
    rz_mid: float
    """sum(g g_prev / (h + eps)); 0 without ``g_prev``"""


@dataclass
class Scalars:
    """Every scalar that survives a step of :func:`nlcg_step`. A new one starts a new optimization.

    Plain floats, so it copies, pickles and prints as one expects.
    """

    step: float = 0.0
    """completed steps"""
    skipped_steps: float = 0.0
    """steps that changed nothing, because a sum was not finite"""
    rz: float = 0.0
    """sum(-g z) of the last step"""
    gs: float = 0.0
    """sum(g s) over the last gradient and the last move"""
    shs: float = 0.0
    """sum(s h s) of the last move: the next step's curvature gate"""
    grad_max: float = 0.0
    """largest absolute value of g of the last step"""
    alpha_prev: float = 0.0
    """lr * ls_scale of the last step"""
    ls_scale: float = 1.0
    """line-search scale, in (0, 1]"""
    loss_prev: float = float("nan")
    """last loss the line search saw, negated under ``maximize``; NaN: none yet"""
    beta: float = 0.0
    """of the last step"""
    ys: float = 0.0
    """sum(y s) in the last step"""
    updated: float = 0.0
    """1 where the last step updated the preconditioner's diagonal"""
    beta2_power: float = 1.0
    """beta2^k after k updates of Adam's v"""


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

        h = | h + y^2 / ys - (h s)^2 / shs |     where ys = sum(y s) and shs = sum(s h s) are both > curvature_eps

    and nothing where they are not. ``h`` stays finite whatever the gradients.

    Args:
        h: diagonal of the Hessian estimate, shape (n,), written.
        g: gradient now.
        g_prev: gradient before the last move.
        d: direction of the last move.
        alpha_prev: its step length.
        curvature_eps: the curvature condition, >= 0.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``ys``, ``shs`` and whether h was updated.
    """
    alpha_prev = _native.check_real("alpha_prev", alpha_prev)
    curvature_eps = _native.check_real("curvature_eps", curvature_eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"g_prev": g_prev, "d": d, "h": h}, ("h",))
    step = _step(view, stream, g, h)
    _set_options(step, "bfgs", curvature_eps=curvature_eps)
    curvature = Curvature(*step.update_curvature(view["g"], alpha_prev, threads))
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
        h: diagonal of the Hessian estimate, or None for none: z = -g.
        eps: added to h, >= 0.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``rz = sum(g g / (h + eps))`` and ``rz_mid = sum(g g_prev / (h + eps))``.
    """
    eps = _native.check_real("eps", eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"g_prev": g_prev, "h": h}, (), ("g_prev", "h"))
    step = _step(view, stream, g)
    _set_options(step, None if h is None else "bfgs", eps=eps)
    return Dots(*step.preconditioned_dots(view["g"], threads))


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

    ``z = -g / (h + eps)``, ``d = z + beta * d``, and where given ``p = p + alpha * d`` and ``g_prev = g``.

    Args:
        d: direction, shape (n,), written.
        g: gradient.
        h: diagonal of the Hessian estimate, or None for none: z = -g.
        beta: conjugacy coefficient.
        eps: added to h, >= 0.
        p: parameters to move, written; None: none.
        alpha: step length.
        g_prev: where to keep the gradient for the next step, written; None: nowhere.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.
    """
    beta = _native.check_real("beta", beta)
    alpha = _native.check_real("alpha", alpha)
    eps = _native.check_real("eps", eps, minimum=0.0)
    threads = _native.num_threads(threads)
    view = _native.buffers(
        {"g": g, "p": p}, {"d": d, "h": h, "g_prev": g_prev}, ("d", "p", "g_prev"), ("p", "h", "g_prev")
    )
    step = _step(view, stream, g, d)
    _set_options(step, None if h is None else "bfgs", eps=eps)
    step.update_direction(view.get("p"), view["g"], alpha, 0.0, beta, threads)
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
    """The dot products of a step with Adam's diagonal. Reads only: ``v`` is the second moment before this gradient.

    With ``v_new = beta2 v + (1 - beta2) g^2`` and ``h = sqrt(v_new / (1 - beta2^(updates + 1)))``.

    Args:
        g: gradient, shape (n,).
        v: running mean of squared gradients, shape (n,).
        updates: how many gradients ``v`` has seen, >= 0.
        beta2: its decay, in [0, 1).
        eps: added to h, > 0.
        g_prev: gradient of the previous step, or None to leave ``rz_mid`` out.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        ``rz = sum(g g / (h + eps))``, and ``rz_mid = sum(g g_prev / (h_old + eps))`` with the h of ``v`` as given.
    """
    options = _adam_options(beta2, eps)
    updates = _check_updates(updates)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g}, {"v": v, "g_prev": g_prev}, (), ("g_prev",))
    step = _step(view, stream, g)
    step.set_options(**options)
    step.beta2_power = beta2**updates
    return Dots(*step.preconditioned_dots(view["g"], threads))


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
    """The second moment, the new conjugate direction with Adam's diagonal, and the move along it, in one pass and in
    place.

    ``v = beta2 v + (1 - beta2) g^2``, ``h = sqrt(v / (1 - beta2^(updates + 1)))``, ``z = -g / (h + eps)``,
    ``d = z + beta * d``, and where given ``p = (1 - alpha weight_decay) p + alpha * d`` and ``g_prev = g``.

    Args:
        d: direction, shape (n,), written.
        g: gradient.
        v: running mean of squared gradients, written.
        beta: conjugacy coefficient.
        updates: how many gradients ``v`` had seen before, >= 0.
        beta2: decay of v, in [0, 1).
        eps: added to h, > 0.
        p: parameters to move, written; None: none.
        alpha: step length.
        weight_decay: decoupled weight decay, >= 0.
        g_prev: where to keep the gradient for the next step, written; None: nowhere.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.
    """
    beta = _native.check_real("beta", beta)
    alpha = _native.check_real("alpha", alpha)
    weight_decay = _native.check_real("weight_decay", weight_decay, minimum=0.0)
    options = _adam_options(beta2, eps)
    updates = _check_updates(updates)
    threads = _native.num_threads(threads)
    view = _native.buffers(
        {"g": g, "p": p}, {"d": d, "v": v, "g_prev": g_prev}, ("d", "v", "p", "g_prev"), ("p", "g_prev")
    )
    step = _step(view, stream, g, d)
    step.set_options(**options)
    step.beta2_power = beta2**updates
    step.update_direction(view.get("p"), view["g"], alpha, weight_decay, beta, threads)
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
    update: Literal["fletcher_reeves", "polak_ribiere", "heavy_ball"] = "fletcher_reeves",
    line_search: OnlineLineSearch | None = None,
    eps: float = 1e-8,
    curvature_eps: float = 1e-8,
    beta2: float = 0.999,
    beta_max: float | None = None,
    restart: Literal["descent", "powell"] | int | None = None,
    nonfinite: Literal["skip", "propagate"] = "skip",
    maximize: bool = False,
    threads: int | None = None,
    stream: int | None = None,
) -> bool:
    """One whole fused step, in place: what :class:`fastnlcg.NLCG` does, for one flat buffer.

    No temporary of the size of the parameters. On a GPU it waits for the scalars, which are the host's here. Before the
    first step ``g_prev``, ``d`` and Adam's ``diagonal`` are zero, the BFGS one is one, ``scalars`` is ``Scalars()``.

    Args:
        p: parameters, shape (n,), written.
        g: gradient.
        g_prev: gradient of the previous step, written. With ``"adam"`` None, unless ``"polak_ribiere"`` or
            ``"powell"`` look at it.
        d: direction, written.
        diagonal: the preconditioner's state, written: v for ``"adam"``, h for ``"bfgs"``, None without one.
        scalars: written.
        lr: learning rate, >= 0; the step length is ``lr`` times the line-search scale.
        preconditioner: as in :class:`fastnlcg.NLCG`; it says what ``diagonal`` holds, so there is no default.
        loss: loss at ``p``, for the line search.
        weight_decay: >= 0; decoupled with ``"adam"``, else L2.
        update, line_search, eps, curvature_eps, beta2, beta_max, restart, nonfinite, maximize: as in
            :class:`fastnlcg.NLCG`.
        threads: on the CPU; default torch's thread count where torch is loaded, else OpenMP's.
        stream: on a GPU; default the caller's current one.

    Returns:
        False where the step was skipped because a sum was not finite: then nothing changed but
        ``scalars.skipped_steps``.
    """
    lr = _native.check_real("lr", lr, minimum=0.0)
    weight_decay = _native.check_real("weight_decay", weight_decay, minimum=0.0)
    options = {
        "update": update,
        "preconditioner": preconditioner,
        "line_search": line_search,
        "eps": eps,
        "curvature_eps": curvature_eps,
        "beta2": beta2,
        "beta_max": beta_max,
        "restart": restart,
        "nonfinite": nonfinite,
        "maximize": maximize,
    }
    _native.check_options(options)
    kind = _native.PRECONDITIONERS[preconditioner]
    if (diagonal is None) != (kind.diagonal is None):
        wanted = "None" if kind.diagonal is None else f"its {kind.diagonal}"
        raise ValueError(f"diagonal must be {wanted} with preconditioner={preconditioner!r}")
    if g_prev is None and (kind.keeps_gradient or _native.needs_rz_mid(options)):
        raise ValueError(f"g_prev is needed with preconditioner={preconditioner!r}, {update=}, {restart=}; got None")
    if not isinstance(scalars, Scalars):
        raise TypeError(f"scalars must be an ops.Scalars, got {type(scalars).__name__}")
    before = {name: _check_scalar(name, value) for name, value in asdict(scalars).items()}
    loss_value = _native.check_loss(loss)
    threads = _native.num_threads(threads)
    state = {"g_prev": g_prev, "d": d, "diagonal": diagonal}
    view = _native.buffers({"g": g, "p": p}, state, ("p", *state), ("g_prev", "diagonal"))
    step = _step(view, stream, g, p)
    step.set_options(**_native.native_options(options))
    step.scalars = before
    step.alpha_prev = [before["alpha_prev"]]
    step.beta2_power = before["beta2_power"]
    n = view.n
    if n:
        step.set_segments([(0, 0, 0, view.dtype, (n,), (1,))])
        step.point([view["p"].pointer], [view["g"].pointer])
    moved = n == 0 or step.step([lr], [weight_decay], [maximize], 0.0, loss_value, threads)
    after = {**step.scalars, "alpha_prev": step.alpha_prev[0], "beta2_power": step.beta2_power}
    for field in fields(Scalars):
        setattr(scalars, field.name, after[field.name])
    if moved:
        _native.mark_written(p, g_prev, d, diagonal)
    return moved


def _step(view: _native.Views, stream: int | None, *arrays: object) -> _native.Step:
    """The native side of one call over these buffers."""
    if stream is None:
        stream = 0 if view.device == "cpu" else _native.current_stream(view.device, *arrays)
    elif isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream must be an int, a cudaStream_t, got {stream!r}")
    diagonal = next((view[name] for name in ("h", "v", "diagonal") if name in view), None)
    streams = view.get("g_prev"), view.get("d"), diagonal
    return _native.Step(view.state_dtype, view.n, *streams, None, None, 1, view.device, None, stream)


_NEUTRAL = {
    "update": "fletcher_reeves",
    "line_search": None,
    "eps": 1e-8,
    "curvature_eps": 0.0,
    "beta2": 0.0,
    "beta_max": None,
    "restart": None,
    "nonfinite": "skip",
    "maximize": False,
}


def _set_options(step: _native.Step, preconditioner: str | None, **options: float) -> None:
    """The options of a part: those that matter to it."""
    step.set_options(**_native.native_options({**_NEUTRAL, "preconditioner": preconditioner, **options}))


def _adam_options(beta2: float, eps: float) -> dict[str, Any]:
    options = {**_NEUTRAL, "preconditioner": "adam", "beta2": beta2, "eps": eps}
    _native.check_options(options)
    return _native.native_options(options)


def _check_scalar(name: str, value: object) -> float:
    if isinstance(value, float) and not math.isfinite(value):  # no loss_prev yet, or what "propagate" has left
        return value
    return _native.check_real(f"scalars.{name}", value)


def _check_updates(updates: object) -> int:
    if isinstance(updates, bool) or not isinstance(updates, int):
        raise TypeError(f"updates must be an int, got {updates!r}")
    if not 0 <= updates <= _native.LARGEST_COUNT:
        raise ValueError(f"updates must be from 0 to 2**53, got {updates}")
    return updates
