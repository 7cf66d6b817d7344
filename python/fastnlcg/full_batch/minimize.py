"""Unconstrained minimization of a function of one array, with SciPy's interface. NumPy arrays need no torch; torch
tensors may be on a GPU."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastnlcg import _native
from fastnlcg.full_batch.flat import Flat, FlatVectors
from fastnlcg.full_batch.hager_zhang import HagerZhang
from fastnlcg.full_batch.iteration import (
    RESOLUTION,
    RESOLUTION_FLOAT32,
    Course,
    Descent,
    DescentOptions,
    OutOfBudget,
)
from fastnlcg.full_batch.rotation import flat_matrices
from fastnlcg.options import check_count, check_positive
from fastnlcg.warn import warn

__all__ = ["OptimizeResult", "minimize"]


class OptimizeResult(dict[str, Any]):
    """What :func:`minimize` returns; a dict whose entries are attributes too, as SciPy's.

    It has ``x``, ``fun`` and ``jac`` (the gradient) at the best point; ``nit``, the number of iterations; ``nfev``, the
    number of evaluations of the loss, of which ``njev`` included the gradient; with ``return_all`` also ``allvecs``,
    the start and x after every iteration; and ``success``, ``status`` and ``message``:

    ====== ==========================================================================================
    0      the largest element of the gradient is at most ``gtol``
    1      ``maxiter`` or ``maxfun`` is reached
    2      no step length was found: f is at the limit of rounding, not smooth there, or inconsistent,
           or the squares of its gradient overflow or underflow
    3      f or its gradient is not finite at ``x0``
    4      ``maxtime`` has passed
    6      f decreases without bound
    99     ``callback`` raised StopIteration
    ====== ==========================================================================================
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        return "\n".join(f"{key:>8}: {value!r}" for key, value in self.items())

    def __dir__(self) -> list[str]:
        return sorted(self)


_CONVERGED = "the largest element of the gradient is at most gtol"


def _is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _as_loss(f: object) -> float:
    """What ``fun`` returned for the loss, as a float."""
    if f is None or isinstance(f, tuple | list):
        raise TypeError(
            f"fun must return the loss as a number or a one-element array, got {f if f is None else type(f).__name__}"
        )
    return _native.check_loss(f)


def _check_gradient_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """ValueError unless the shapes agree. Dimensions of size 1 do not count: (n,), (n, 1) and (1, n) are one vector."""
    if [n for n in shape if n != 1] != [n for n in expected if n != 1]:
        raise ValueError(f"the gradient has shape {tuple(shape)}, expected that of x0, {tuple(expected)}")


class _NumPy:
    """A function of NumPy arrays. It gets copies of x, which the user may keep and write to; what it returns is copied
    too."""

    def __init__(self, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], jac: object) -> None:
        if isinstance(x0, np.ma.MaskedArray):
            raise TypeError("x0 is a masked array, whose mask would be lost; expected an array without one")
        x = np.asarray(x0)
        if x.dtype.kind not in "fiu":
            raise TypeError(f"x0 has dtype {x.dtype}, expected real numbers")
        dtype = np.float32 if x.dtype == np.float32 else np.float64
        self.x = np.array(x, dtype=dtype).ravel()
        self.shape, self.n, self.args, self.fun, self.jac = x.shape, x.size, args, fun, jac
        self.errors = np.geterr()
        """how the user's functions treat floating-point errors; ours ignore them"""
        if jac is not True and not callable(jac):
            raise TypeError(
                "minimizing a function of a NumPy array needs its gradient: let fun return (loss, gradient), or pass "
                f"the gradient function as jac=; got jac={jac!r}"
            )
        self.g = np.zeros(0, dtype)
        # SciPy splits a fun that returns loss and gradient into two functions, each of which evaluates both: then the
        # loss alone is not cheaper.
        self.device, self.cheap_loss = "cpu", callable(jac) and getattr(jac, "__self__", None) is not fun

    def zeros(self, shape: tuple[int, ...] | None = None) -> Any:
        return np.zeros(self.x.size if shape is None else shape, self.x.dtype)

    def _at(self) -> Any:
        return self.x.reshape(self.shape).copy()

    def _call(self, function: Callable[..., Any]) -> Any:
        with np.errstate(**self.errors):
            return function(self._at(), *self.args)

    def loss(self) -> float:
        return _as_loss(self._call(self.fun))

    def full(self) -> float:
        if callable(self.jac):
            f, g = self._call(self.fun), self._call(self.jac)
        else:
            both = self._call(self.fun)
            if not isinstance(both, tuple | list) or len(both) != 2:
                raise TypeError(f"fun must return (loss, gradient), or pass jac=; got {type(both).__name__}")
            f, g = both
        g = np.asarray(g)
        if g.dtype.kind not in "fiu":
            raise TypeError(f"the gradient has dtype {g.dtype}, expected real numbers")
        _check_gradient_shape(g.shape, self.shape)
        self.g = np.array(g, self.x.dtype, order="C").reshape(-1)
        return _as_loss(f)

    def out(self, x: Any) -> Any:
        return x.reshape(self.shape).copy()

    def x_max(self) -> float:
        return float(np.abs(self.x).max(initial=0.0))


class _Torch:
    """A function of torch tensors. It gets copies of x, which the user may keep and write to; what it returns is copied
    too."""

    def __init__(self, fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], jac: object) -> None:
        import torch

        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "minimize() was called inside a torch.func transform (vmap, grad, jvp, functionalize, ...): a line "
                "search decides by the values of numbers, which a transform does not provide. Call it outside, for "
                "each problem of a batch in turn"
            )
        if type(x0).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(f"x0 is a {type(x0).__name__}, without storage of its own; expected a plain tensor")
        if x0.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x0 has dtype {x0.dtype}, expected torch.float32 or torch.float64")
        if x0.device.type not in ("cpu", "cuda") or x0.layout is not torch.strided:
            raise TypeError(f"x0 is on {x0.device} with layout {x0.layout}, expected a dense tensor on cpu or cuda")
        if not isinstance(jac, bool | None) and not callable(jac):
            raise TypeError(f"jac must be a bool, None or a function, got {jac!r}")
        if x0.device.type == "cuda" and _native.cuda_unavailable_reason():
            raise RuntimeError(f"x0 is on {x0.device}: {_native.cuda_unavailable_reason()}")
        self.torch, self.fun, self.args, self.jac, self.shape = torch, fun, args, jac, x0.shape
        self.x = x0.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        self.g, self.n = torch.zeros_like(self.x), self.x.numel()
        index = x0.device.index or 0
        self.device, self.cheap_loss = f"cuda:{index}" if _native.on_gpu(x0.device) else "cpu", True

    def zeros(self, shape: tuple[int, ...] | None = None) -> Any:
        return self.torch.zeros(self.x.shape if shape is None else shape, dtype=self.x.dtype, device=self.x.device)

    def loss(self) -> float:
        # x does not require a gradient, so autograd records nothing, unless fun itself differentiates.
        f = self.fun(self._at(), *self.args)
        return _as_loss(f[0] if isinstance(f, tuple | list) else f)

    def _at(self) -> Any:
        return self.x.clone().view(self.shape)

    def full(self) -> float:
        torch = self.torch
        with torch.enable_grad():
            at = self._at().requires_grad_(not callable(self.jac))
            f = self.fun(at, *self.args)
            if callable(self.jac):
                g = self.jac(self._at(), *self.args)
            elif isinstance(f, tuple | list) and len(f) == 2:
                f, g = f
            else:
                if not (isinstance(f, torch.Tensor) and f.requires_grad):
                    raise TypeError(
                        "fun must return a loss that torch can differentiate with respect to x, or (loss, gradient); "
                        f"got {f!r}"
                    )
                if f.numel() != 1:
                    raise ValueError(f"fun must return a loss of one element, got shape {tuple(f.shape)}")
                (g,) = torch.autograd.grad(f, at, allow_unused=True)
                g = torch.zeros_like(at) if g is None else g
        if not isinstance(g, torch.Tensor) or g.is_complex() or g.layout is not torch.strided:
            kind = f"a tensor of {g.dtype}, {g.layout}" if isinstance(g, torch.Tensor) else type(g).__name__
            raise TypeError(f"the gradient is {kind}; expected a real dense tensor")
        _check_gradient_shape(g.shape, self.shape)
        # copy_ resolves a lazy sign, which DLPack would lose.
        self.g = torch.empty_like(self.x).copy_(g.detach().reshape(-1))
        return _as_loss(f)

    def out(self, x: Any) -> Any:
        return x.view(self.shape).clone()

    def x_max(self) -> float:
        return float(self.x.abs().max()) if self.x.numel() else 0.0


class _Limits:
    """Counts evaluations, and raises OutOfBudget before one that ``maxfun`` or ``maxtime`` does not allow."""

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
    history: int = 10,
    preconditioner: str | None = "kronecker",
    shapes: Sequence[Sequence[int]] | None = None,
    line_search: HagerZhang | None = None,
    gtol: float | None = None,
    maxiter: int | None = None,
    maxfun: int | None = None,
    maxtime: float | None = None,
    callback: Callable[..., object] | None = None,
    progress: bool = False,
    disp: bool = False,
    return_all: bool = False,
    tol: float | None = None,
    hess: object = None,
    hessp: object = None,
    bounds: object = None,
    constraints: object = (),
    **unknown: object,
) -> OptimizeResult:
    """Minimizes a smooth function by L-BFGS on the diagonal of BFGS, or by nonlinear conjugate gradients, with the line
    search of Hager and Zhang; see :class:`CGDescent`. There is no learning rate. The state is 8 + 2 ``history`` arrays
    of the size of ``x0``, seven with ``history=0``; three of them are copies that :class:`CGDescent` does not need. It
    can also be used through SciPy: ``scipy.optimize.minimize(fun, x0, jac=True, method=fastnlcg.minimize,
    options={...})``, for NumPy arrays.

    Args:
        fun: ``fun(x, *args)``. For a NumPy array it returns ``(loss, gradient)``, or the loss if ``jac`` is a function.
            For a torch tensor it returns the loss, which torch differentiates, or ``(loss, gradient)``; if only the
            loss is needed, it is called with an ``x`` that does not require a gradient. ``x`` is a copy, of the shape
            of ``x0``.
        x0: the starting point, of any shape: a NumPy array (or a list), or a torch tensor of float32 or float64. It is
            not changed.
        args: more arguments of ``fun`` and ``jac``.
        jac: the gradient, ``jac(x, *args)``; True: ``fun`` returns it. It has the shape of ``x0``, up to dimensions of
            size 1. None and False mean True for torch, and are refused for NumPy: there are no finite differences.
        beta: of runs without pairs: ``"hager_zhang"``, ``"polak_ribiere"`` (0 if that is negative),
            ``"fletcher_reeves"``, ``"dai_yuan"`` or ``"hestenes_stiefel"``.
        history: the number of curvature pairs, 0 to 32; 0: conjugate gradients.
        preconditioner: ``"kronecker"``, a diagonal estimate of the Hessian that is built during the run, in rotated
            bases of the matrices in ``shapes``; ``"bfgs"``, the same without rotations, which ``"kronecker"`` is
            without ``shapes``; or None.
        shapes: the shapes of the parts of x, in their order, if some are matrices: ``[(32, 2), (32,), ...]``. A vector
            behind a matrix is its bias if it has the length of the matrix's first side.
        line_search: the constants of the line search, a :class:`HagerZhang`.
        gtol: success means that the largest element of the gradient is at most this, in absolute value; >= 0. Default
            ``tol``, or 1e-5.
        maxiter: maximum number of iterations, >= 0; default 200 times the size of ``x0``.
        maxfun: maximum number of evaluations of ``fun``, >= 1 (one more if the best point is not the last); default no
            limit.
        maxtime: no evaluation begins after this many seconds, >= 0; default no limit.
        callback: called after every iteration, by SciPy's rule: ``callback(intermediate_result=...)``, with an
            :class:`OptimizeResult` that has ``x``, ``fun``, ``nit`` and ``nfev``, if that is the name of its only
            parameter; else ``callback(x)``. ``x`` is a copy. The run ends if it raises StopIteration; its return value
            is ignored.
        progress: show a progress bar, with tqdm.
        disp: print how the run ended.
        return_all: keep x of every iteration, as ``allvecs``.
        tol: used for ``gtol`` if that is not given.
        hess, hessp: not used.
        bounds, constraints: refused, unless they bind nothing: no bound, or infinite ones.
        unknown: options of other methods. They are ignored, with a warning that names them.

    Returns:
        An :class:`OptimizeResult`: the best point that was evaluated, and how the run ended.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or value.
        RuntimeError: if called inside a transform of torch.func. Exceptions of ``fun``, ``jac`` and ``callback`` are
            passed on.
        ModuleNotFoundError: for ``progress=True`` without tqdm.

    Source: Hager & Zhang, SIAM J. Optim. 16 (2005) 170, 23 (2013) 2150; the pairs: Nocedal, Math. Comp. 35 (1980) 773;
    the diagonal: Adya et al., arXiv:1812.02886.

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
    report = _callback_of(callback)
    _refuse_bounds(bounds)
    _refuse_constraints(constraints)
    args = args if isinstance(args, tuple) else (args,)
    options = DescentOptions(beta, preconditioner, line_search or HagerZhang(), history)
    gtol = check_positive(*(("gtol", gtol) if gtol is not None else ("tol", 1e-5 if tol is None else tol)))
    maxiter = _count("maxiter", maxiter, minimum=0)
    maxfun = _count("maxfun", maxfun, minimum=1)
    if maxtime is not None:
        check_positive("maxtime", maxtime)
    limits = _Limits(maxfun, maxtime)
    if _is_torch(x0):
        with sys.modules["torch"].inference_mode(False):  # inference mode records no gradient, and makes frozen tensors
            return _run(_Torch(fun, x0, args, jac), options, shapes, gtol, maxiter, limits, report,
                        progress=progress, disp=disp, return_all=return_all, unknown=unknown)  # fmt: skip
    problem = _NumPy(fun, x0, args, jac)
    report = report and np.errstate(**problem.errors)(report)
    with np.errstate(all="ignore"):
        return _run(problem, options, shapes, gtol, maxiter, limits, report,
                    progress=progress, disp=disp, return_all=return_all, unknown=unknown)  # fmt: skip


def _run(
    problem: _NumPy | _Torch,
    options: DescentOptions,
    shapes: Sequence[Sequence[int]] | None,
    gtol: float,
    maxiter: int | None,
    limits: _Limits,
    report: Callable[[OptimizeResult], object] | None,
    *,
    progress: bool,
    disp: bool,
    return_all: bool,
    unknown: Mapping[str, object],
) -> OptimizeResult:
    if unknown:
        warn(f"unknown options are ignored: {', '.join(sorted(unknown))}")
    parts = _check_shapes(shapes, problem.n)
    if options.preconditioner == "kronecker" and not flat_matrices(parts):
        options = replace(options, preconditioner="bfgs")
    passes = _passes(problem, options, parts)

    def full(_: bool = True) -> float:
        limits.spend(gradient=True)
        f = problem.full()
        passes.set_gradient(problem.g)
        return f

    def loss() -> float:
        limits.spend(gradient=False)
        return problem.loss()

    resolution = RESOLUTION if passes.x.dtype.itemsize == 8 else RESOLUTION_FLOAT32
    run = Descent(
        passes,
        full,
        loss if problem.cheap_loss else None,
        options,
        x_max=problem.x_max,
        resolution=resolution,
    )
    bar = _bar() if progress else None
    path = [problem.out(problem.x)] if return_all else None

    def after_iteration() -> None:
        at = run.course
        if path is not None:
            path.append(problem.out(problem.x))
        if bar is not None:
            bar.update()
            bar.set_postfix_str(f"f {at.f:.6g}, max |g| {at.g_max:.2e}", refresh=False)
        if report is not None:
            report(OptimizeResult(x=problem.out(problem.x), fun=at.f, nit=at.iterations, nfev=limits.evaluations))

    try:
        limit = 200 * max(problem.n, 1) if maxiter is None else maxiter
        status, message = _iterate(run, gtol, limit, after_iteration)
    finally:
        if bar is not None:
            bar.close()
    if run.warning:
        warn(run.warning)
    at = run.course
    if math.isnan(at.g_max) and status != 3:  # the best point is not the last that was evaluated
        limits.maxfun, limits.until = None, math.inf
        at.f = full()
    result = OptimizeResult(
        x=problem.out(problem.x),
        fun=at.f,
        jac=problem.out(passes.g),
        nit=at.iterations,
        nfev=limits.evaluations,
        njev=limits.gradients,
        status=status,
        success=status == 0,
        message=message,
    )
    if path is not None:
        result.allvecs = path
    if disp:
        print(message)
        print(f"         Current function value: {at.f:f}")
        print(f"         Iterations: {at.iterations}")
        print(f"         Function evaluations: {limits.evaluations}")
        print(f"         Gradient evaluations: {limits.gradients}")
    return result


def _passes(problem: _NumPy | _Torch, options: DescentOptions, shapes: list[tuple[int, ...]]) -> Flat | FlatVectors:
    if options.in_vectors:
        return FlatVectors(problem.x, problem.zeros, problem.device, options, shapes)
    return Flat(problem.x, problem.zeros, problem.device, preconditioned=options.preconditioner is not None)


def _check_shapes(shapes: object, n: int) -> list[tuple[int, ...]]:
    """The shapes of the parts of x; TypeError or ValueError unless they have n elements together."""
    if shapes is None:
        return [(n,)]
    if not isinstance(shapes, Sequence) or isinstance(shapes, str) or not all(isinstance(s, Sequence) for s in shapes):
        raise TypeError(f"shapes must be a list of shapes, got {shapes!r}")
    found = [tuple(check_count(f"shapes[{i}]", size, minimum=0) for size in s) for i, s in enumerate(shapes)]
    if (total := sum(map(math.prod, found))) != n:
        raise ValueError(f"shapes have {total} elements together, expected those of x0, {n}")
    return found


def _iterate(run: Descent, gtol: float, maxiter: int, after_iteration: Callable[[], None]) -> tuple[int, str]:
    """Iterates until the run ends; returns status and message."""
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
        iterations, end = at.iterations, None
        try:
            reason = run.iterate()
            if reason:
                end = (6 if at.unbounded else 2), reason
        except OutOfBudget as limit:
            end = _out_of(limit)
        if at.iterations > iterations:
            try:
                after_iteration()
            except StopIteration:
                return 99, "`callback` raised `StopIteration`."
        if end is not None:
            return end
    return 0, _CONVERGED


def _out_of(limit: OutOfBudget) -> tuple[int, str]:
    which = str(limit)
    return (4, "maxtime has passed") if which == "maxtime" else (1, "maxfun is reached")


def _callback_of(callback: object) -> Callable[[OptimizeResult], object] | None:
    """The callback as a function of an OptimizeResult. By SciPy's rule, the name of its only parameter decides whether
    it gets the result or x."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    try:
        parameters = inspect.signature(callback).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return lambda result: callback(result.x)
    if set(parameters) != {"intermediate_result"}:
        return lambda result: callback(result.x)
    if parameters["intermediate_result"].kind is inspect.Parameter.POSITIONAL_ONLY:
        return callback
    return lambda result: callback(intermediate_result=result)


def _count(name: str, value: object, *, minimum: int) -> int | None:
    """A whole number as an int, also if it is a float, as in SciPy; None for no limit."""
    if value is None or value == math.inf:
        return None if value is None else sys.maxsize
    return check_count(name, int(value) if isinstance(value, float) and value.is_integer() else value, minimum=minimum)


_UNCONSTRAINED = "bounds and constraints are not supported: the method is for unconstrained problems"


def _refuse_bounds(bounds: Any) -> None:
    """ValueError if a variable has a bound."""
    if bounds is None:
        return
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        lower, upper = np.atleast_1d(np.asarray(bounds.lb, float)), np.atleast_1d(np.asarray(bounds.ub, float))
    else:
        try:
            pairs = np.asarray([(low, high) for low, high in bounds], dtype=float)  # None becomes NaN
        except (TypeError, ValueError):
            raise ValueError(f"bounds must be (min, max) pairs or a scipy.optimize.Bounds, got {bounds!r}") from None
        lower, upper = pairs.reshape(-1, 2).T
    for name, side, free in (("lower", lower, -math.inf), ("upper", upper, math.inf)):
        bound = np.flatnonzero(~np.isnan(side) & (side != free))
        if bound.size:
            i = int(bound[0])
            raise ValueError(f"{_UNCONSTRAINED}; variable {i} has the {name} bound {side[i]:g}")


def _refuse_constraints(constraints: Any) -> None:
    """ValueError unless there are none."""
    if constraints is None or (hasattr(constraints, "__len__") and not len(constraints)):
        return
    single = isinstance(constraints, dict) or not hasattr(constraints, "__getitem__")
    raise ValueError(f"{_UNCONSTRAINED}; got the constraint {constraints if single else constraints[0]!r}")


def _bar() -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ModuleNotFoundError("progress=True needs tqdm: pip install tqdm", name="tqdm") from None
    return tqdm(unit=" iterations")
