"""The step and its parts over flat buffers, for NumPy arrays, torch tensors and anything with the buffer protocol or
DLPack. In place, explicit scalars, no torch needed: what you use to write an optimizer, or a framework, of your own.

All arrays of a call are on one device, the CPU or a GPU, contiguous, of the same length n (the shape does not matter),
and do not overlap. ``p`` and ``g`` share a dtype: float64, float32, bfloat16 or float16. The state (``g_prev``, ``d``,
``h``) is float32, or float64 for float64 parameters. Nothing is cast or copied. Formulas are evaluated in the state's
dtype, sums in double in an order that n alone fixes: the same bits for any thread count, instruction set and address,
and for any GPU (though not the CPU's bits: that order is another).

Arrays on a GPU come through DLPack or ``__cuda_array_interface__``. The work goes to ``stream``, a ``cudaStream_t`` as
an integer: by default torch's current stream for torch's tensors, CuPy's for CuPy's arrays, else the default stream. A
function that returns numbers waits for them; :class:`fastnlcg.NLCG` never does.

A step from its parts (Fletcher-Reeves, without the safeguards of :func:`nlcg_step`)::

    curvature = bfgs_diag_update(h, g, g_prev, d, alpha_prev=alpha)
    rz_new = preconditioned_dots(g, None, h).rz
    direction_update(d, g, h, beta=min(1.0, rz_new / rz), p=p, alpha=alpha, g_prev=g_prev)
    rz = rz_new

For Polak-Ribiere take ``rz_mid = preconditioned_dots(g, g_prev, h).rz_mid`` before ``bfgs_diag_update``: it needs the
old ``h``.

Errors, all before anything is written: TypeError for something that is no array or has the wrong dtype, ValueError for
different lengths, overlap, a read-only or non-contiguous array, several devices, or a number out of range.
RuntimeError, with the kernel's name and CUDA's text, where CUDA fails.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from fastnlcg import _native
from fastnlcg.line_search import OnlineLineSearch

__all__ = [
    "Curvature",
    "Dots",
    "Scalars",
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
    """largest |g| of the last step"""
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
    """1 where the last step updated h"""


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
        curvature_eps: the gate, >= 0.
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
    _set_options(step, curvature_eps=curvature_eps)
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
    view = _native.buffers({"g": g}, {"g_prev": g_prev, "h": h}, ())
    step = _step(view, stream, g)
    _set_options(step, eps=eps)
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
    view = _native.buffers({"g": g, "p": p}, {"d": d, "h": h, "g_prev": g_prev}, ("d", "p", "g_prev"))
    step = _step(view, stream, g, d)
    _set_options(step, eps=eps)
    step.update_direction(view.get("p"), view["g"], alpha, beta, threads)
    _native.mark_written(d, p, g_prev)


def nlcg_step(
    p: Any,
    g: Any,
    g_prev: Any,
    d: Any,
    h: Any,
    scalars: Scalars,
    *,
    lr: float,
    loss: float | None = None,
    weight_decay: float = 0.0,
    update: Literal["fletcher_reeves", "polak_ribiere"] = "fletcher_reeves",
    line_search: OnlineLineSearch | None = None,
    eps: float = 1e-8,
    curvature_eps: float = 1e-8,
    restart: Literal["descent", "powell"] | int | None = None,
    nonfinite: Literal["skip", "propagate"] = "skip",
    maximize: bool = False,
    threads: int | None = None,
    stream: int | None = None,
) -> bool:
    """One whole fused step, in place: what :class:`fastnlcg.NLCG` does, for one flat buffer.

    Three passes, 56 bytes of traffic per float32 parameter, no temporary of the size of the parameters. On a GPU it
    waits for the scalars, which are the host's here. Before the
    first step ``g_prev`` and ``d`` are zero, ``h`` is one, ``scalars`` is ``Scalars()``.

    Args:
        p: parameters, shape (n,), written.
        g: gradient.
        g_prev: gradient of the previous step, written.
        d: direction, written.
        h: diagonal of the Hessian estimate, written; None for no preconditioner.
        scalars: written.
        lr: learning rate, >= 0; the step length is ``lr`` times the line-search scale.
        loss: loss at ``p``, for the line search.
        weight_decay: L2 coefficient, >= 0.
        update, line_search, eps, curvature_eps, restart, nonfinite, maximize: as in :class:`fastnlcg.NLCG`.
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
        "preconditioner": None if h is None else "bfgs",
        "line_search": line_search,
        "eps": eps,
        "curvature_eps": curvature_eps,
        "restart": restart,
        "nonfinite": nonfinite,
        "maximize": maximize,
    }
    _native.check_options(options)
    if not isinstance(scalars, Scalars):
        raise TypeError(f"scalars must be an ops.Scalars, got {type(scalars).__name__}")
    loss_value = _native.check_loss(loss)
    threads = _native.num_threads(threads)
    view = _native.buffers({"g": g, "p": p}, {"g_prev": g_prev, "d": d, "h": h}, ("p", "g_prev", "d", "h"))
    step = _step(view, stream, g, p)
    step.set_options(**_native.native_options(options))
    step.scalars = asdict(scalars)
    step.alpha_prev = [float(scalars.alpha_prev)]
    n = view.n
    if n:
        step.set_segments([(0, 0, 0, view.dtype, (n,), (1,))])
        step.point([view["p"].pointer], [view["g"].pointer])
    moved = n == 0 or step.step([lr], [weight_decay], 0.0, loss_value, threads)
    after = {**step.scalars, "alpha_prev": step.alpha_prev[0]}
    for field in fields(Scalars):
        setattr(scalars, field.name, after[field.name])
    if moved:
        _native.mark_written(p, g_prev, d, h)
    return moved


def _step(view: _native.Views, stream: int | None, *arrays: object) -> _native.Step:
    """The native side of one call over these buffers."""
    if stream is None:
        stream = 0 if view.device == "cpu" else _native.current_stream(view.device, *arrays)
    elif isinstance(stream, bool) or not isinstance(stream, int):
        raise TypeError(f"stream must be an int, a cudaStream_t, got {stream!r}")
    return _native.Step(
        view.state_dtype, view.n, view.get("g_prev"), view.get("d"), view.get("h"), None, 1, view.device, None, stream
    )


def _set_options(step: _native.Step, *, eps: float = 0.0, curvature_eps: float = 0.0) -> None:
    """The options of a part: the one that matters to it."""
    step.set_options("fletcher_reeves", "never", 0, eps, curvature_eps, True, False, None)
