"""Unconstrained minimization of a function of one array, in SciPy's words. NumPy arrays need no torch; torch tensors
may lie on a GPU."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastnlcg import _native
from fastnlcg.descent import Course, Descent, DescentOptions, OutOfBudget, Sums, check_count, check_positive
from fastnlcg.warn import warn
from fastnlcg.wolfe import HagerZhang

__all__ = ["OptimizeResult", "minimize"]


class OptimizeResult(dict[str, Any]):
    """What :func:`minimize` found; a dict whose entries are attributes too, as SciPy's.

    ``x``, ``fun`` and ``jac`` (the gradient) at the best point; ``nit`` iterations; ``nfev`` evaluations of the loss,
    of which ``njev`` had a gradient; ``success``, ``status`` and ``message``:

    ====== ==========================================================================================
    0      the largest element of the gradient is at most ``gtol``
    1      ``maxiter`` or ``maxfun`` is reached
    2      no step length was found: f is at the limit of rounding, not smooth there, or inconsistent
    3      f or its gradient is not finite at ``x0``
    4      ``maxtime`` is over
    5      ``callback`` has stopped it
    6      f falls without bound
    ====== ==========================================================================================
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return "\n".join(f"{key:>8}: {value!r}" for key, value in self.items())

    def __dir__(self) -> list[str]:
        return sorted(self)


_CONVERGED = "the largest element of the gradient is at most gtol"


class _Flat:
    """Passes over flat arrays of one dtype and device."""

    def __init__(self, x: Any, zeros: Callable[[], Any], device: str, *, preconditioned: bool) -> None:
        self.x, self.threads = x, _native.num_threads()
        self.g_prev, self.d, self.origin = zeros(), zeros(), zeros()
        self.h = zeros() if preconditioned else None
        self.preconditioned = preconditioned
        self.forget()
        dtype = str(x.dtype).removeprefix("torch.")
        stream = _native.current_stream(device, x) if device != "cpu" else 0
        self._step = _native.FlatStep(dtype, device, stream)
        arrays = {"p": x, "grad_prev": self.g_prev, "direction": self.d, "diagonal": self.h, "origin": self.origin}
        self._buffers: dict[str, Any] = {
            name: _native.Buffer(array) for name, array in arrays.items() if array is not None
        }

    def set_gradient(self, g: Any) -> None:
        self._step.bind(g=_native.Buffer(g), **self._buffers)

    def _run(self, kind: str, **numbers: Any) -> list[float]:
        return self._step.descend(
            _native.DescentPass(kind, preconditioned=self.preconditioned, **numbers), self.threads
        )

    def trial(self, alpha: float, *, first: bool) -> None:
        self._run("trial", alpha=alpha, first=first)
        _native.mark_written(self.x)

    def slope(self, f: float) -> tuple[float, float, float]:
        slope, largest, *_ = self._run("slope")
        return f, slope, largest

    def curvature(self, update: tuple[float, float, float, float] | None) -> Sums:
        alpha, scale, ys, shs = update or (0.0, 1.0, 0.0, 0.0)
        sums = self._run("curvature", update=update is not None, alpha=alpha, scale=scale, ys=ys, shs=shs)
        return Sums(*sums[:3])

    def direction(self, beta: float) -> tuple[float, float]:
        slope, dhd, *_ = self._run("direction", beta=beta)
        return slope, dhd

    def forget(self) -> None:
        if self.h is not None:
            self.h[:] = 1.0


def _is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _number(f: object) -> float:
    """A loss as a float."""
    if f is None or isinstance(f, tuple | list):
        raise TypeError(f"fun must return the loss here, got {f if f is None else type(f).__name__}")
    return _native.check_loss(f)


class _NumPy:
    """A function of NumPy arrays."""

    def __init__(self, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], jac: object) -> None:
        x = np.asarray(x0)
        if x.dtype.kind not in "fiu":
            raise TypeError(f"x0 has dtype {x.dtype}, expected real numbers")
        dtype = np.float32 if x.dtype == np.float32 else np.float64
        self.x = np.array(x, dtype=dtype).ravel()
        self.shape, self.n, self.args, self.fun, self.jac = x.shape, x.size, args, fun, jac
        if jac is not True and not callable(jac):
            raise TypeError(
                "a function of a NumPy array must give its gradient: let fun return (loss, gradient), or pass jac=, "
                f"its gradient; got jac={jac!r}"
            )
        self.g = np.zeros(0, dtype)
        self.device, self.cheap_loss = "cpu", callable(jac)

    def zeros(self) -> Any:
        return np.zeros(self.x.size, self.x.dtype)

    def _at(self) -> Any:
        return self.x.reshape(self.shape).copy()  # the caller's to keep

    def loss(self) -> float:
        return _number(self.fun(self._at(), *self.args))

    def full(self) -> float:
        at = self._at()
        if callable(self.jac):
            f, g = self.fun(at, *self.args), self.jac(at, *self.args)
        else:
            both = self.fun(at, *self.args)
            if not isinstance(both, tuple | list) or len(both) != 2:
                raise TypeError(f"fun must return (loss, gradient), or pass jac=; got {type(both).__name__}")
            f, g = both
        g = np.asarray(g)
        if g.dtype.kind not in "fiu":
            raise TypeError(f"the gradient has dtype {g.dtype}, expected real numbers")
        if g.size != self.x.size:
            raise ValueError(f"the gradient has shape {g.shape}, x0 {self.shape}")
        self.g = np.ascontiguousarray(g, self.x.dtype).reshape(-1)
        return _number(f)

    def out(self, x: Any) -> Any:
        return x.reshape(self.shape).copy()

    def x_max(self) -> float:
        return float(np.abs(self.x).max(initial=0.0))


class _Torch:
    """A function of torch tensors."""

    def __init__(self, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], jac: object) -> None:
        import torch

        if x0.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x0 has dtype {x0.dtype}, expected torch.float32 or torch.float64")
        if x0.device.type not in ("cpu", "cuda") or x0.layout is not torch.strided:
            raise TypeError(f"x0 is on {x0.device} with layout {x0.layout}, expected a dense tensor on cpu or cuda")
        if jac is not True and jac is not None and not callable(jac):
            raise TypeError(f"jac must be True, None or a function, got {jac!r}")
        if x0.device.type == "cuda" and _native.cuda_unavailable_reason():
            raise RuntimeError(f"x0 is on {x0.device}: {_native.cuda_unavailable_reason()}")
        self.torch, self.fun, self.args, self.jac, self.shape = torch, fun, args, jac, x0.shape
        self.x = x0.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        self.g, self.n = torch.zeros_like(self.x), self.x.numel()
        index = x0.device.index or 0
        self.device, self.cheap_loss = f"cuda:{index}" if _native.on_gpu(x0.device) else "cpu", True

    def zeros(self) -> Any:
        return self.torch.zeros_like(self.x)

    def loss(self) -> float:
        # x takes no gradient, so nothing is recorded; a fun that differentiates inside still may.
        f = self.fun(self.x.view(self.shape), *self.args)
        return _number(f[0] if isinstance(f, tuple | list) else f)

    def full(self) -> float:
        torch = self.torch
        with torch.enable_grad():
            at = self.x.detach().view(self.shape).requires_grad_(not callable(self.jac))
            f = self.fun(at, *self.args)
            if callable(self.jac):
                g = self.jac(at, *self.args)
            elif isinstance(f, tuple | list) and len(f) == 2:
                f, g = f
            else:
                if not (isinstance(f, torch.Tensor) and f.requires_grad):
                    raise TypeError(
                        f"fun must return a loss that torch can differentiate by x, or (loss, gradient); got {f!r}"
                    )
                if f.numel() != 1:
                    raise ValueError(f"fun must return a loss of one element, got shape {tuple(f.shape)}")
                (g,) = torch.autograd.grad(f, at, allow_unused=True)
                g = torch.zeros_like(at) if g is None else g
        if not isinstance(g, torch.Tensor) or g.numel() != self.x.numel():
            raise ValueError(f"the gradient is {getattr(g, 'shape', type(g).__name__)}, x0 {tuple(self.shape)}")
        self.g = g.detach().to(self.x).contiguous().view(-1)
        return _number(f)

    def out(self, x: Any) -> Any:
        return x.view(self.shape).clone()

    def x_max(self) -> float:
        return float(self.x.abs().max()) if self.x.numel() else 0.0


class _Limits:
    def __init__(self, maxfun: int | None, maxtime: float | None) -> None:
        self.maxfun, self.until = maxfun, math.inf if maxtime is None else time.monotonic() + maxtime
        self.evaluations = self.gradients = 0

    def spend(self, *, gradient: bool) -> None:
        if self.maxfun is not None and self.evaluations >= self.maxfun:
            raise OutOfBudget("maxfun")
        if time.monotonic() > self.until:
            raise OutOfBudget("maxtime")
        self.evaluations += 1
        self.gradients += gradient


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: tuple[Any, ...] = (),
    *,
    jac: bool | Callable[..., Any] | None = True,
    beta: str = "hager_zhang",
    preconditioner: str | None = "bfgs",
    line_search: HagerZhang | None = None,
    gtol: float = 1e-5,
    maxiter: int | None = None,
    maxfun: int | None = None,
    maxtime: float | None = None,
    callback: Callable[..., object] | None = None,
    progress: bool = False,
    tol: float | None = None,
    hess: object = None,
    hessp: object = None,
    bounds: object = None,
    constraints: Sequence[object] = (),
) -> OptimizeResult:
    """Minimizes a smooth function by preconditioned nonlinear conjugate gradients with the line search of Hager and
    Zhang. There is no learning rate. The state is five arrays of the size of ``x0``.

    Args:
        fun: ``fun(x, *args)``. Of a NumPy array: returns ``(loss, gradient)``, or the loss where ``jac`` is a function.
            Of a torch tensor: returns the loss, which torch differentiates, or ``(loss, gradient)``; it is also called
            with an ``x`` that takes no gradient, where the loss alone is wanted. It must not change ``x``.
        x0: where to start, of any shape: a NumPy array (or a list), or a torch tensor of float32 or float64. Unchanged.
        args: more arguments of ``fun`` and ``jac``.
        jac: the gradient, ``jac(x, *args)``; True: ``fun`` gives it.
        beta: ``"hager_zhang"``, ``"polak_ribiere"`` (and 0 where that is negative), ``"fletcher_reeves"``,
            ``"dai_yuan"`` or ``"hestenes_stiefel"``.
        preconditioner: ``"bfgs"``, a diagonal of the Hessian that is learned on the way; or None.
        line_search: its constants, a :class:`HagerZhang`.
        gtol: success where the largest element of the gradient is at most this, in absolute value; >= 0.
        maxiter: at most so many iterations; default 200 times the size of ``x0``.
        maxfun: at most so many evaluations of ``fun`` (one more where the best point is not the last).
        maxtime: no evaluation begins after so many seconds.
        callback: called after every iteration with an :class:`OptimizeResult` that has ``x``, ``fun``, ``nit``,
        ``nfev``;
            stops where it raises StopIteration or returns True.
        progress: show a line, with tqdm.
        tol, hess, hessp, bounds, constraints: for ``scipy.optimize.minimize(..., method=fastnlcg.minimize)``: ``tol``
        is
            ``gtol``; Hessians are not used; bounds and constraints are refused.

    Returns:
        The best point that was found, and how.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or value.

    Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, 23 (2013) 2150; the diagonal: Adya et al., arXiv:1812.02886.

    >>> import numpy as np
    >>> def rosenbrock(x):
    ...     t = x[1:] - x[:-1] ** 2
    ...     g = np.zeros_like(x)
    ...     g[1:] = 200 * t
    ...     g[:-1] -= 400 * x[:-1] * t + 2 * (1 - x[:-1])
    ...     return float(np.sum(100 * t**2 + (1 - x[:-1]) ** 2)), g
    >>> result = minimize(rosenbrock, np.zeros(10), gtol=1e-8)
    >>> result.success, bool(np.allclose(result.x, 1.0))
    (True, True)
    """
    if not callable(fun):
        raise TypeError(f"fun must be callable, got {type(fun).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    if bounds is not None or (constraints is not None and len(constraints)):
        raise ValueError("bounds and constraints are not supported: the method is for unconstrained problems")
    args = args if isinstance(args, tuple) else (args,)
    options = DescentOptions(beta, preconditioner, line_search or HagerZhang())
    gtol = check_positive("gtol", gtol if tol is None else tol)
    for name, value in (("maxiter", maxiter), ("maxfun", maxfun)):
        if value is not None:
            check_count(name, value)
    if maxtime is not None:
        check_positive("maxtime", maxtime)
    problem = (_Torch if _is_torch(x0) else _NumPy)(fun, x0, args, jac)
    passes = _Flat(problem.x, problem.zeros, problem.device, preconditioned=preconditioner is not None)
    limits = _Limits(maxfun, maxtime)

    def full() -> float:
        limits.spend(gradient=True)
        f = problem.full()
        passes.set_gradient(problem.g)
        return f

    def loss() -> float:
        limits.spend(gradient=False)
        return problem.loss()

    run = Descent(passes, full, loss if problem.cheap_loss else None, options, x_max=problem.x_max)
    bar = _bar() if progress else None
    try:
        status, message = _iterate(run, problem, gtol, maxiter or 200 * max(problem.n, 1), callback, bar, limits)
    finally:
        if bar is not None:
            bar.close()
    if run.warning:
        warn(run.warning)
    at = run.course
    if math.isnan(at.g_max) and status != 3:  # the best point is not the last that was evaluated
        limits.maxfun, limits.until = None, math.inf
        at.f = full()
    return OptimizeResult(
        x=problem.out(problem.x),
        fun=at.f,
        jac=problem.out(problem.g),
        nit=at.iterations,
        nfev=limits.evaluations,
        njev=limits.gradients,
        status=status,
        success=status == 0,
        message=message,
    )


def _iterate(
    run: Descent,
    problem: _NumPy | _Torch,
    gtol: float,
    maxiter: int,
    callback: Callable[..., object] | None,
    bar: Any,
    limits: _Limits,
) -> tuple[int, str]:
    """Until something ends it: status and message."""
    at: Course = run.course
    try:
        run.begin()
    except OutOfBudget as limit:
        return _out_of(limit)
    if not (math.isfinite(at.f) and math.isfinite(at.g_max)):
        return 3, "fun or its gradient is not finite at x0"
    while at.g_max > gtol:
        if at.iterations >= maxiter:
            return 1, f"maxiter is reached: {maxiter} iterations"
        try:
            reason = run.iterate()
        except OutOfBudget as limit:
            return _out_of(limit)
        if reason:
            return (6 if at.unbounded else 2), reason
        if bar is not None:
            bar.update()
            bar.set_postfix_str(f"f {at.f:.6g}, max |g| {at.g_max:.2e}", refresh=False)
        if callback is not None:
            seen = OptimizeResult(x=problem.out(problem.x), fun=at.f, nit=at.iterations, nfev=limits.evaluations)
            try:
                if callback(seen) is True:
                    return 5, "callback has stopped it"
            except StopIteration:
                return 5, "callback has stopped it"
    return 0, _CONVERGED


def _out_of(limit: OutOfBudget) -> tuple[int, str]:
    which = str(limit)
    return (4, "maxtime is over") if which == "maxtime" else (1, "maxfun is reached")


def _bar() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install tqdm", name="tqdm") from None
    return tqdm(unit=" iterations")
