"""Full-batch descent: the line search and the method against mathematics, the native passes in lockstep with the
reference, and what ``minimize`` and ``CGDescent`` promise."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import CGDescent, HagerZhang, _native, full_batch, minimize, reference
from fastnlcg.descent import BETA_RULES, Course, Descent, DescentOptions, Slopes, Sums
from fastnlcg.layout import DLPACK_API
from fastnlcg.wolfe import Point, Unbounded, search
from torch import Tensor, nn

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


def quadratic(eigenvalues: np.ndarray, seed: int = 0) -> tuple[Function, np.ndarray, np.ndarray]:
    """x A x / 2 - b x with these eigenvalues in a random basis, A, and its minimizer."""
    rng = np.random.default_rng(seed)
    n = eigenvalues.size
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    a, b = (q * eigenvalues) @ q.T, rng.standard_normal(n)
    return lambda x: (0.5 * x @ (a @ x) - b @ x, a @ x - b), a, np.linalg.solve(a, b)


def rosenbrock(x: np.ndarray) -> tuple[float, np.ndarray]:
    t, g = x[1:] - x[:-1] ** 2, np.zeros_like(x)
    g[1:] = 200 * t
    g[:-1] -= 400 * x[:-1] * t + 2 * (1 - x[:-1])
    return float(np.sum(100 * t**2 + (1 - x[:-1]) ** 2)), g


def powell(x: np.ndarray) -> tuple[float, np.ndarray]:
    a, b, c, d = (x[k::4] for k in range(4))
    t1, t2, t3, t4 = a + 10 * b, c - d, b - 2 * c, a - d
    g = np.empty_like(x)
    g[::4], g[1::4] = 2 * t1 + 40 * t4**3, 20 * t1 + 4 * t3**3
    g[2::4], g[3::4] = 10 * t2 - 8 * t3**3, -10 * t2 - 40 * t4**3
    return float(np.sum(t1**2 + 5 * t2**2 + t3**4 + 10 * t4**4)), g


class Run:
    """A descent in float64 by the reference's passes, that keeps what it saw."""

    def __init__(self, fun: Function, x0: np.ndarray, **options: Any) -> None:
        self.fun, self.x = fun, np.array(x0, float)
        self.g = np.zeros_like(self.x)
        named = DescentOptions(**options)
        self.passes = reference.DescentPasses(self.x, lambda: self.g, preconditioned=named.preconditioner is not None)
        self.descent = Descent(
            self.passes, self.full, lambda: float(fun(self.x)[0]), named, x_max=lambda: float(np.abs(self.x).max())
        )

    def full(self) -> float:
        with np.errstate(all="ignore"):
            f, self.g = self.fun(self.x)
        return float(f)

    def to(self, gtol: float, most: int = 5000) -> Course:
        self.descent.begin()
        at = self.descent.course
        while at.g_max > gtol and at.iterations < most:
            assert self.descent.iterate() == ""
        return at


# ---- the line search -------------------------------------------------------------------------------------------------

CURVES = {
    "a parabola": lambda a: ((a - 1) ** 2, 2 * (a - 1)),
    "far": lambda a: ((a / 1e6 - 1) ** 2, 2e-6 * (a / 1e6 - 1)),
    "near": lambda a: ((1e6 * a - 1) ** 2, 2e6 * (1e6 * a - 1)),
    "waves": lambda a: (0.1 * a * a - math.sin(3 * a), 0.2 * a - 3 * math.cos(3 * a)),
    "More and Thuente 1": lambda a: (-a / (a * a + 2), (a * a - 2) / (a * a + 2) ** 2),
    "More and Thuente 2": lambda a: (
        (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4,
        5 * (a + 0.004) ** 4 - 8 * (a + 0.004) ** 3,
    ),
    "a wall": lambda a: (-math.log(1 - a) - 3 * a, 1 / (1 - a) - 3) if a < 1 else (math.nan, math.nan),
    "an infinite wall": lambda a: (a * a - 3 * a, 2 * a - 3) if a < 1.6 else (math.inf, math.nan),
}  # fmt: skip


@pytest.mark.parametrize("sigma", [0.9, 0.1])
@pytest.mark.parametrize("first", [1e-3, 0.7, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("name", CURVES)
def test_an_accepted_point_satisfies_the_wolfe_conditions(name: str, first: float, sigma: float) -> None:
    phi, looked = CURVES[name], []
    start = Point(0.0, *phi(0.0))
    o = HagerZhang(sigma=sigma)

    def seen(alpha: float) -> tuple[float, float]:
        looked.append(alpha)
        return phi(alpha)

    found = search(seen, start, first, 0.0, o)
    assert found is not None
    assert found[1:] == phi(found.alpha)
    assert found.alpha == looked[-1] > 0.0  # so that x and g are its
    decrease = found.f <= start.f + o.delta * found.alpha * start.slope
    approximate = found.f <= start.f and (2 * o.delta - 1) * start.slope >= found.slope
    assert decrease or approximate
    assert found.slope >= o.sigma * start.slope
    assert len(looked) < 40


def test_at_the_limit_of_rounding_slopes_decide() -> None:
    """f is flat to its last bit; the slope still knows where its zero is: the approximate Wolfe conditions."""
    phi = lambda a: (1.0, 1e-12 * (a - 0.5))  # noqa: E731
    start = Point(0.0, *phi(0.0))
    assert search(phi, start, 4.0, 0.0, HagerZhang()) is None or phi(4.0)[1] > 0  # without slack
    found = search(phi, start, 4.0, 1e-6, HagerZhang(sigma=0.1))
    assert found is not None
    assert abs(found.slope) <= 0.8 * abs(start.slope)


def test_a_fall_without_end_is_unbounded() -> None:
    with pytest.raises(Unbounded):
        search(lambda a: (-a, -1.0), Point(0.0, 0.0, -1.0), 1.0, 0.0)


def test_nothing_but_nan_is_no_point() -> None:
    assert search(lambda a: (math.nan, math.nan), Point(0.0, 1.0, -1.0), 1.0, 0.0) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("delta", 0.5), ("delta", 0.0), ("sigma", 0.05), ("sigma", 1.0), ("rho", 1.0), ("gamma", 1.0), ("theta", 0.0),
     ("epsilon", -1.0), ("max_rounds", 0)],
)  # fmt: skip
def test_constants_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid {option}"):
        HagerZhang(**{option: value})
    with pytest.raises(TypeError, match=option):
        HagerZhang(**{option: "1"})


# ---- the method, against mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETA_RULES)
def test_on_a_quadratic_it_is_linear_cg(beta: str) -> None:
    """n steps to the minimizer, and directions that are conjugate to rounding: the quadratic first step is exact."""
    n = 12
    fun, a, minimum = quadratic(np.linspace(1.0, 30.0, n))
    run = Run(fun, np.ones(n), beta=beta, preconditioner=None)
    run.descent.begin()
    run.descent.iterate()  # along -g, to no exact minimum: conjugacy begins with the next exact one
    run.descent.begin()
    directions = []
    for _ in range(n):
        directions.append(run.passes.d.copy())
        assert run.descent.iterate() == ""
    assert np.abs(run.x - minimum).max() < 1e-5
    gram = np.array(
        [[d @ a @ e / math.sqrt((d @ a @ d) * (e @ a @ e)) for e in directions[:6]] for d in directions[:6]]
    )
    assert np.abs(gram - np.eye(6)).max() < 1e-5


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("beta", BETA_RULES)
def test_known_minimizers(beta: str, preconditioner: str | None) -> None:
    k = np.linspace(1.0, 50.0, 30)
    problems: list[tuple[Function, np.ndarray, np.ndarray]] = [
        (lambda x: (float(np.sum(k * x**2 + x**4)), 2 * k * x + 4 * x**3), np.ones(30), np.zeros(30))
    ]
    if beta not in ("fletcher_reeves", "dai_yuan"):  # which jam on these, as is known of them
        problems.append((rosenbrock, np.zeros(10), np.ones(10)))
        problems.append((powell, np.tile([3.0, -1.0, 0.0, 1.0], 10), np.zeros(40)))
    for fun, x0, minimum in problems:
        run = Run(fun, x0, beta=beta, preconditioner=preconditioner)
        assert run.to(1e-7, 4000).g_max <= 1e-7
        assert np.abs(run.x - minimum).max() < 1e-2


@pytest.mark.parametrize("beta", BETA_RULES)
def test_the_rules_of_beta(beta: str) -> None:
    rng = np.random.default_rng(1)
    g, g_prev, d, h = rng.standard_normal((4, 50))
    h = np.abs(h) + 0.1
    y = g - g_prev
    now = Sums(float(g @ (g / h)), float(y @ (g / h)), float(y @ (y / h)))
    then = Slopes(float(g_prev @ d), float(g @ d), float(d @ (h * d)), float(g_prev @ (g_prev / h)))
    dy = float(d @ y)
    expected = {
        "hager_zhang": max(
            (now.y_Pg - 2 * now.y_Py * float(d @ g) / dy) / dy,
            0.4 * float(d @ g_prev) / float(d @ (h * d)),
        ),
        "polak_ribiere": max(0.0, float(y @ (g / h)) / float(g_prev @ (g_prev / h))),
        "fletcher_reeves": float(g @ (g / h)) / float(g_prev @ (g_prev / h)),
        "dai_yuan": float(g @ (g / h)) / dy,
        "hestenes_stiefel": max(0.0, float(y @ (g / h)) / dy),
    }[beta]  # fmt: skip
    assert BETA_RULES[beta](now, then) == pytest.approx(expected, rel=1e-12)


def test_hager_zhang_always_descends() -> None:
    """d g <= -(7/8) g P g, whatever the line search: Theorem 1.1 of 2005 with P."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        g, g_prev, d = rng.standard_normal((3, 20))
        h = rng.uniform(0.1, 10, 20)
        y = g - g_prev
        if abs(float(d @ y)) < 1e-3:
            continue
        now = Sums(float(g @ (g / h)), float(y @ (g / h)), float(y @ (y / h)))
        then = Slopes(float(g_prev @ d), float(g @ d), float(d @ (h * d)), 1.0)
        beta = (now.y_Pg - 2.0 * now.y_Py * (then.end / then.dy)) / then.dy
        assert float(g @ (beta * d - g / h)) <= -(7 / 8 - 1e-9) * now.g_Pg


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20])
def test_scaling_the_loss_changes_nothing(factor: float, preconditioner: str | None) -> None:
    """To the bit, for a power of two."""
    scaled = lambda x: tuple(factor * v for v in rosenbrock(x))  # noqa: E731
    for x0 in (np.full(10, -1.2), np.zeros(10)):
        a, b = Run(rosenbrock, x0, preconditioner=preconditioner), Run(scaled, x0, preconditioner=preconditioner)
        a.to(0.0, 40), b.to(0.0, 40)
        assert np.array_equal(a.x, b.x)


def test_the_diagonal_answers_to_the_scale_of_the_variables() -> None:
    """x = D z with D over six decades: the update itself is equivariant, and a run needs no more than twice the
    evaluations, where it needs ten times as many without a preconditioner."""
    rng = np.random.default_rng(3)
    scale = 10.0 ** rng.uniform(-3, 3, 40)
    h, y, s = rng.uniform(0.5, 2, 40), rng.standard_normal(40), rng.standard_normal(40)
    y = y * np.sign(y @ s)
    ys, shs = float(y @ s), float(s @ (h * s))
    there = reference.scaled_bfgs_diagonal(h * scale**2, y * scale, s / scale, ys, shs, 0.7)
    assert there / scale**2 == pytest.approx(reference.scaled_bfgs_diagonal(h, y, s, ys, shs, 0.7), rel=1e-12)

    curvature = np.linspace(1, 5, 40)
    plain = lambda x: (0.5 * float(np.sum(curvature * x * x)), curvature * x)  # noqa: E731

    def badly(z: np.ndarray) -> tuple[float, np.ndarray]:
        f, g = plain(scale * z)
        return f, scale * g

    counts = {}
    for name in ("bfgs", None):
        run = Run(badly, np.ones(40) / scale, preconditioner=name)
        start = abs(badly(np.ones(40) / scale)[1]).max()
        counts[name] = run.to(1e-10 * start, 3000).evaluations
    assert 5 * counts["bfgs"] < counts[None]


# ---- the native passes, beside the reference -------------------------------------------------------------------------


class Both:
    """Native passes over flat arrays, and the reference's beside them: everything compared after each."""

    def __init__(self, fun: Function, x0: np.ndarray, dtype: str, backend: Backend, *, preconditioned: bool) -> None:
        self.dtype, self.rtol = np.dtype(dtype), 3e-12 if dtype == "float64" else 2e-4
        self.fun, self.x = fun, x0.astype(dtype)
        self.g = np.zeros_like(self.x)
        # The reference works on what the native side works on: it is given the native vectors before each pass.
        self.reference = reference.DescentPasses(
            self.x.astype(float), lambda: self.g.astype(float), preconditioned=preconditioned
        )
        device = "cuda:0" if backend.on_gpu else "cpu"
        self.native = full_batch._Flat(self.x, lambda: np.zeros_like(self.x), device, preconditioned=preconditioned)
        self.compared = 0

    def full(self) -> float:
        f, g = self.fun(self.x.astype(float))
        self.g = g.astype(self.dtype)
        self.native.set_gradient(self.g)
        return float(f)

    def _each(self, name: str, *args: Any, **named: Any) -> Any:
        n, r = self.native, self.reference
        r.x[:], r.d, r.g_prev, r.origin = (a.astype(float) for a in (self.x, n.d, n.g_prev, n.origin))
        r.h = np.ones(self.x.size) if n.h is None else n.h.astype(float)
        found, expected = getattr(n, name)(*args, **named), getattr(r, name)(*args, **named)
        for a, b in ((self.x, r.x), (n.d, r.d), (n.g_prev, r.g_prev), (n.origin, r.origin), (n.h, r.h)):
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=self.rtol, atol=self.rtol * np.abs(b).max(initial=0.0))
        if found is not None:
            sums, wanted = (list(vars(x).values()) if isinstance(x, Sums) else list(x) for x in (found, expected))
            size = 0.0
            if name == "slope":
                assert sums.pop(0) == wanted.pop(0)  # f is passed through
                size = np.abs(self.g.astype(float) * n.d).sum()
            atol = 4 * self.rtol * max(np.abs(wanted).max(), size)
            for a, b in zip(sums, wanted, strict=True):
                assert a == pytest.approx(b, rel=self.rtol, abs=atol), name
        self.compared += 1
        return found

    def trial(self, alpha: float, *, first: bool) -> None:
        self._each("trial", alpha, first=first)

    def slope(self, f: float) -> tuple[float, float, float]:
        return self._each("slope", f)

    def curvature(self, update: Any) -> Sums:
        return self._each("curvature", update)

    def direction(self, beta: float) -> tuple[float, float]:
        return self._each("direction", beta)

    def forget(self) -> None:
        self._each("forget")


def wavy(n: int) -> Function:
    k = 1.0 + np.arange(n) % 7
    return lambda x: (float(np.sum(k * (x - 0.3) ** 2 + np.cos(3 * x))), 2 * k * (x - 0.3) - 3 * np.sin(3 * x))


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("n", [1, 17, 511, 4097, 20001])
def test_passes_in_lockstep(lockstep_on: Backend, n: int, dtype: str, preconditioner: str | None) -> None:
    both = Both(wavy(n), np.random.default_rng(n).standard_normal(n), dtype, lockstep_on,
                preconditioned=preconditioner is not None)  # fmt: skip
    run = Descent(both, both.full, None, DescentOptions(preconditioner=preconditioner), x_max=lambda: 1.0)
    run.begin()
    for _ in range(6):
        if run.iterate():
            break
    both.forget()
    run.begin()
    run.iterate()
    assert both.compared > 10


def test_a_trial_needs_no_gradient_and_stores_the_origin(lockstep_on: Backend) -> None:
    """Parameters back to back, so that blocks of the flat index straddle them, and one of many tiles."""
    sizes, alpha = [5, 7, 1, 40, 9000], 0.25
    offsets = np.cumsum([0, *sizes])
    table, device = lockstep_on.step("float64"), lockstep_on.device
    segments = [
        _native.SegmentSpec(offset=int(at), group=0, index=i, dtype="float64", shape=(size,), strides=(1,))
        for i, (at, size) in enumerate(zip(offsets[:-1], sizes, strict=True))
    ]
    n = int(offsets[-1])
    workspace = lockstep_on.workspace(n, len(sizes), 1)
    keys = _native.StateKeys(direction="direction", origin="origin")
    table.lay_out(n, segments, 1, keys, DLPACK_API, torch.Tensor, workspace)
    start, d = ([torch.randn(size, dtype=torch.float64, device=device) for size in sizes] for _ in range(2))
    params = [p.clone() for p in start]
    origin = [torch.zeros_like(p) for p in start]
    at = _native.Tensors(
        params=params,
        entries=[{"direction": x, "origin": y} for x, y in zip(d, origin, strict=True)],
        scalars=torch.zeros(len(_native.SCALARS), dtype=torch.float64, device=device),
        alpha_prev=[torch.zeros((), dtype=torch.float64, device=device)],
    )
    for k, first in enumerate((True, False)):
        table.descend(at, _native.DescentPass("trial", alpha=alpha * (k + 1), first=first), 1)
        for p, x, y, s in zip(params, start, origin, d, strict=True):
            assert torch.equal(y, x)
            assert torch.equal(p, x + alpha * (k + 1) * s)  # the same two roundings


def test_the_passes_have_the_same_bits_however_they_run(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Threads, instruction sets, memory that is aligned or not: one result (the emulated GPU has its own)."""
    n = 70001
    results = []
    for threads, shift in ((1, 0), (3, 1)):
        monkeypatch.setattr(_native, "num_threads", lambda given=threads: given)
        memory = lambda: np.zeros(n + 1, np.float32)[shift : n + shift]  # noqa: B023, E731
        x = memory()
        x[:] = np.random.default_rng(0).standard_normal(n)
        device = "cuda:0" if backend.on_gpu else "cpu"
        passes, fun, g = full_batch._Flat(x, memory, device, preconditioned=True), wavy(n), memory()

        def full(x: Any = x, g: Any = g, passes: Any = passes, fun: Any = fun) -> float:
            f, g[:] = fun(x)
            passes.set_gradient(g)
            return f

        run = Descent(passes, full, None, DescentOptions(), x_max=lambda: 1.0)
        run.begin()
        for _ in range(4):
            run.iterate()
        results.append((x.tobytes(), passes.h.tobytes(), passes.d.tobytes(), run.course.slope, run.course.f))
    assert results[0] == results[1]
    if not backend.on_gpu:
        _SEEN.setdefault("bits", results[0])
        assert results[0] == _SEEN["bits"]


_SEEN: dict[str, Any] = {}


def test_a_pass_refuses_what_would_write_elsewhere() -> None:
    step = _native.FlatStep("float32")
    named = _native.DescentPass
    with pytest.raises(ValueError, match=r"bind\(\) first"):
        step.descend(named("slope"), 1)
    x, g, g_prev, d = (_native.Buffer(np.zeros(8, np.float32)) for _ in range(4))
    step.bind(g=g, grad_prev=g_prev, direction=d)
    with pytest.raises(ValueError, match="unknown pass 'jump'"):
        step.descend(named("jump"), 1)
    with pytest.raises(ValueError, match="'curvature' needs the preconditioner's diagonal"):
        step.descend(named("curvature"), 1)
    with pytest.raises(ValueError, match="'trial' needs origin"):
        step.descend(named("trial"), 1)
    step.bind(g=g, direction=d, origin=g_prev)
    with pytest.raises(ValueError, match="'trial' needs p"):
        step.descend(named("trial"), 1)
    with pytest.raises(ValueError, match="p or g is needed"):
        step.bind(direction=d)
    fixed = np.zeros(8, np.float32)
    fixed.flags.writeable = False
    step.bind(g=g, grad_prev=g_prev, direction=_native.Buffer(fixed))
    with pytest.raises(ValueError, match="direction is read-only"):
        step.descend(named("direction", preconditioned=False), 1)
    with pytest.raises(ValueError, match=r"lay_out\(\) first"):
        _native.TensorTable("float32").descend(_native.Tensors(), named("slope"), 1)
    step.bind(p=x, direction=d, origin=g_prev)
    step.descend(named("trial"), 1)
    with pytest.raises(ValueError, match="'slope' needs g"):  # a trial does not
        step.descend(named("slope"), 1)


# ---- minimize --------------------------------------------------------------------------------------------------------


def test_minimize_numpy() -> None:
    x0 = np.full((5, 2), -1.2)
    kept = x0.copy()
    result = minimize(lambda x: tuple(map(np.reshape, rosenbrock(x.ravel()), ((), (5, 2)))), x0, gtol=1e-8)
    assert result.success
    assert result.status == 0
    assert result.x.shape == result.jac.shape == (5, 2)
    assert np.allclose(result.x, 1.0)
    assert result["fun"] == result.fun < 1e-12
    assert result.njev == result.nfev > result.nit > 10
    assert np.array_equal(x0, kept)
    assert "success: True" in repr(result)
    assert "nit" in dir(result)
    with pytest.raises(AttributeError):
        _ = result.nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minimize_torch(lockstep_on: Backend, dtype: torch.dtype) -> None:
    x0 = torch.full((4, 3), -0.5, dtype=dtype, requires_grad=True, device=lockstep_on.device)
    flags = []

    def fun(x: Tensor, shift: float) -> Tensor:
        flags.append(x.requires_grad)
        return ((x - shift) ** 4 + (x - shift) ** 2).sum()

    result = minimize(fun, x0, (2.0,), gtol=1e-4)
    assert result.success
    assert result.x.dtype == dtype
    assert not result.x.requires_grad
    assert torch.allclose(result.x, torch.full_like(result.x, 2.0), atol=1e-3)
    assert result.njev == sum(flags) < result.nfev == len(flags)
    assert x0[0, 0].item() == -0.5


def test_a_gradient_of_its_own() -> None:
    x0 = np.zeros(6)
    a = minimize(lambda x: rosenbrock(x)[0], x0, jac=lambda x: rosenbrock(x)[1], gtol=1e-9)
    b = minimize(lambda x: tuple(map(torch.from_numpy, map(np.asarray, rosenbrock(x.detach().numpy())))),
                 torch.zeros(6, dtype=torch.float64), gtol=1e-9)  # fmt: skip
    assert a.success
    assert b.success
    assert a.nfev > a.njev
    assert np.allclose(a.x, b.x.numpy(), atol=1e-7)


def test_it_is_a_method_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    result = optimize.minimize(rosenbrock, np.zeros(8), jac=True, method=minimize, options={"gtol": 1e-9})
    assert result.success
    assert np.allclose(result.x, 1.0)
    with pytest.raises(ValueError, match="bounds and constraints"):
        optimize.minimize(rosenbrock, np.zeros(2), jac=True, method=minimize, bounds=[(0, 1), (0, 1)])


@pytest.mark.parametrize(
    ("options", "status"),
    [({"maxiter": 3}, 1), ({"maxfun": 7}, 1), ({"maxfun": 1}, 1), ({"maxtime": 0.0}, 4),
     ({"callback": lambda r: r.nit == 2}, 5)],
)  # fmt: skip
def test_limits(options: dict[str, Any], status: int) -> None:
    begin = rosenbrock(np.full(10, -1.2))[0]
    for fun, x0 in (
        (rosenbrock, np.full(10, -1.2)),
        (lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), torch.full((10,), -1.2).double()),
    ):
        result = minimize(fun, x0, **options)
        assert not result.success
        assert result.status == status
        assert result.fun <= begin * (1 + 1e-6)  # torch's -1.2 is float32's
        at = rosenbrock(np.asarray(result.x))
        assert result.fun == pytest.approx(at[0], rel=1e-12)
        assert np.allclose(np.asarray(result.jac), at[1])
        assert result.nfev <= options.get("maxfun", 10**9) + 1


def test_a_callback_may_stop() -> None:
    def stop(result: Any) -> None:
        assert result.x.shape == (3,)
        raise StopIteration

    assert minimize(rosenbrock, np.zeros(3), callback=stop).nit == 1


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    minimize(rosenbrock, np.zeros(3), progress=True)
    assert "max |g|" in capfd.readouterr().err


@pytest.mark.parametrize("x0", [np.zeros(3), torch.zeros(3)])
def test_functions_that_are_not_what_they_should_be(x0: Any) -> None:
    one = lambda x: (x**2).sum()  # noqa: E731
    zero = minimize(lambda x: (0 * one(x), 0 * x), x0)
    assert (zero.success, zero.nit) == (True, 0)
    nan = minimize(lambda x: (one(x) * math.nan, x * math.nan), x0)
    assert (nan.status, nan.nfev) == (3, 1)
    assert "not finite at x0" in nan.message
    down = minimize(lambda x: (x.sum(), x * 0 + 1), x0)
    assert down.status == 6
    assert down.fun < -1e6
    kink = minimize(lambda x: (abs(x - 1).sum(), (x > 1) * 2.0 - 1.0 + 0 * x), x0 + 0.25, maxfun=2000)
    assert not kink.success
    assert kink.fun <= 0.75 * 3
    inconsistent = minimize(lambda x: (one(x - 1), 2 * (1 - x)), x0)  # the gradient has the wrong sign
    assert inconsistent.status == 2
    assert "no step length" in inconsistent.message
    assert np.array_equal(np.asarray(inconsistent.x), np.asarray(x0))


def test_noise_is_warned_of() -> None:
    rng = np.random.default_rng(0)

    def noisy(x: np.ndarray) -> tuple[float, np.ndarray]:
        t = x - rng.standard_normal(x.size)
        return float(t @ t), 2 * t

    with pytest.warns(UserWarning, match="the loss does not repeat"):
        minimize(noisy, np.zeros(20), maxfun=500)


def test_a_domain_with_a_wall() -> None:
    """log x is not a number below 0; steps stay on this side."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        with np.errstate(invalid="ignore"):
            return float(np.sum(x - np.log(x))), 1 - 1 / x

    result = minimize(fun, np.array([1e-3, 0.5, 30.0]), gtol=1e-8)
    assert result.success
    assert np.allclose(result.x, 1.0)


def test_errors_of_minimize() -> None:
    x0 = np.zeros(3)
    good = lambda x: (float(x @ x), 2 * x)  # noqa: E731
    for error, match, call in (
        (TypeError, "fun must be callable", lambda: minimize(3, x0)),
        (TypeError, "dtype complex128", lambda: minimize(good, x0 + 1j)),
        (TypeError, "float16", lambda: minimize(good, torch.zeros(3).half())),
        (TypeError, "must return .loss, gradient.", lambda: minimize(lambda x: float(x @ x), x0)),
        (TypeError, "must give its gradient", lambda: minimize(good, x0, jac=None)),
        (TypeError, "must return the loss", lambda: minimize(lambda x: (None, x), x0)),
        (ValueError, r"gradient has shape \(2,\)", lambda: minimize(lambda x: (0.0, x[:2]), x0)),
        (TypeError, "torch can differentiate", lambda: minimize(lambda x: x.detach().sum(), torch.zeros(3))),
        (ValueError, "one element", lambda: minimize(lambda x: x * x, torch.zeros(3))),
        (ValueError, "beta must be one of", lambda: minimize(good, x0, beta="newton")),
        (TypeError, "beta must be one of", lambda: minimize(good, x0, beta=1)),
        (ValueError, "preconditioner", lambda: minimize(good, x0, preconditioner="adam")),
        (TypeError, "line_search", lambda: minimize(good, x0, line_search=0.1)),
        (ValueError, "gtol", lambda: minimize(good, x0, gtol=-1)),
        (TypeError, "maxiter", lambda: minimize(good, x0, maxiter=1.5)),
        (ValueError, "maxfun", lambda: minimize(good, x0, maxfun=0)),
        (TypeError, "callback", lambda: minimize(good, x0, callback=3)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_an_empty_array() -> None:
    result = minimize(lambda x: (0.0, x), np.zeros(0))
    assert result.success
    assert result.x.shape == (0,)


# ---- CGDescent -------------------------------------------------------------------------------------------------------


def problem(dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> tuple[nn.Module, Callable]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).to(device, dtype)
    x = torch.rand(100, 2, dtype=dtype, device=device)
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    return model, lambda: ((model(x) - y) ** 2).mean()


def closure_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", ["bfgs", None])
def test_it_descends(lockstep_on: Backend, preconditioner: str | None, dtype: torch.dtype) -> None:
    model, loss = problem(dtype, device=lockstep_on.device)
    optimizer = CGDescent(model.parameters(), preconditioner=preconditioner)
    closure = closure_of(optimizer, loss)
    begin, losses = loss().item(), []
    for _ in range(60):
        losses.append(optimizer.step(closure))
    assert losses[-1] < 0.02 * begin
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    seen = optimizer.diagnostics()
    assert seen["iterations"] == 60
    assert seen["loss"] == losses[-1] == pytest.approx(loss().item(), rel=1e-6)
    sizes = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    elements = sum(p.numel() for p in model.parameters())
    assert sizes == elements * (3 + (preconditioner is not None)) * torch.empty((), dtype=dtype).element_size()


def test_one_parameter_has_the_bits_of_minimize() -> None:
    """The table of tensors and the flat buffers run the same passes."""
    x0 = torch.linspace(-1, 2, 50, dtype=torch.float64)
    fun = lambda x: ((x - 0.3) ** 4 + torch.cos(x)).sum()  # noqa: E731
    expected = minimize(fun, x0, maxiter=12, gtol=0.0)
    p = nn.Parameter(x0.clone())
    optimizer = CGDescent([p], max_iter=12, tolerance_grad=0.0)
    assert optimizer.step(closure_of(optimizer, lambda: fun(p)), loss=lambda: fun(p.detach())) == expected.fun
    assert torch.equal(p.detach(), expected.x)


def test_parameters_of_every_layout() -> None:
    """Slices, transposed, channels last, a frozen one, one without a gradient, two groups: as one flat vector."""
    rng = torch.Generator().manual_seed(0)
    base = [torch.randn(6, 8, generator=rng, dtype=torch.float64) for _ in range(4)]
    fun = lambda ts: sum(((t - 0.5) ** 2 * k).sum() + torch.cos(t).sum() for k, t in enumerate(ts, 1))  # noqa: E731
    room = torch.zeros(6, 16, dtype=torch.float64)
    ps = [
        nn.Parameter(room[:, ::2]),
        nn.Parameter(torch.empty(8, 6, dtype=torch.float64).t()),
        nn.Parameter(torch.empty(6, 8, dtype=torch.float64)),
        nn.Parameter(torch.empty(6, 8, dtype=torch.float64)),
    ]
    with torch.no_grad():
        for p, t in zip(ps, base, strict=True):
            p.copy_(t)
    frozen, unused = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = CGDescent([{"params": ps[:2]}, {"params": [*ps[2:], frozen, unused]}], tolerance_grad=0.0)
    closure = closure_of(optimizer, lambda: fun(ps))
    flat_p = nn.Parameter(torch.stack(base))
    other = CGDescent([flat_p], tolerance_grad=0.0)
    other_closure = closure_of(other, lambda: fun(list(flat_p)))
    for _ in range(15):
        optimizer.step(closure), other.step(other_closure)
        for p, q in zip(ps, flat_p, strict=True):
            assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)
    assert not room[:, 1::2].any()
    assert unused.eq(1).all()
    assert unused not in optimizer.state


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_checkpoint_resumes_to_the_bit(at: int) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    closure = closure_of(optimizer, loss)
    for _ in range(at):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    data_model, data_loss = problem()
    data_model.load_state_dict(saved["model"])
    second = CGDescent(data_model.parameters())
    second.load_state_dict(saved["optimizer"])
    second_closure = closure_of(second, data_loss)
    for _ in range(8):
        assert optimizer.step(closure) == second.step(second_closure)
        assert torch.equal(flat(model.parameters()), flat(data_model.parameters()))


def test_copies_and_pickles_go_on() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    closure = closure_of(optimizer, loss)
    for _ in range(4):
        optimizer.step(closure)
    twin = copy.deepcopy(optimizer)
    ps = twin.param_groups[0]["params"]
    clone, loss_c = problem()
    for p, q in zip(clone.parameters(), ps, strict=True):
        p.data = q.data
    for p, q in zip(clone.parameters(), ps, strict=True):
        q.grad = None
        del p

    def twin_closure() -> Tensor:
        value = loss_c()
        grads = torch.autograd.grad(value, list(clone.parameters()))
        for q, g in zip(ps, grads, strict=True):
            q.grad = g
        return value

    for _ in range(4):
        assert optimizer.step(closure) == twin.step(twin_closure)


def test_an_exception_leaves_the_point_where_the_search_began() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    closure = closure_of(optimizer, loss)
    for _ in range(3):
        optimizer.step(closure)
    before, calls = flat(model.parameters()), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(flat(model.parameters()), before)
    reference_model, reference_loss = problem()
    other = CGDescent(reference_model.parameters())
    other_closure = closure_of(other, reference_loss)
    for _ in range(4):
        other.step(other_closure)
    optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), flat(reference_model.parameters()))


def test_edits_are_seen() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    closure = closure_of(optimizer, loss)
    for _ in range(5):
        optimizer.step(closure)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    begin = loss().item()
    assert optimizer.step(closure) < begin


def test_a_function_that_changes_after_restart() -> None:
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    target = torch.ones(5, dtype=torch.float64)
    optimizer = CGDescent([p], tolerance_grad=0.0)
    closure = closure_of(optimizer, lambda: ((p - target) ** 4 + (p - target) ** 2).sum())
    for _ in range(10):
        optimizer.step(closure)
    target = -target
    optimizer.restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            optimizer.step(closure)
    assert torch.allclose(p.detach(), target, atol=1e-6)


def test_a_closure_that_does_not_repeat() -> None:
    p = nn.Parameter(torch.zeros(8))
    optimizer = CGDescent([p])
    generator = torch.Generator().manual_seed(0)
    closure = closure_of(optimizer, lambda: ((p - torch.randn(8, generator=generator)) ** 2).sum())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(6):
            optimizer.step(closure)
    assert "does not repeat" in str(seen[0].message)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_limits_of_a_step() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), max_iter=50, max_eval=9)
    calls = []
    inner = closure_of(optimizer, loss)
    begin = loss().item()

    def closure() -> Tensor:
        calls.append(0)
        return inner()

    assert optimizer.step(closure) < begin
    assert len(calls) == 9
    assert optimizer.diagnostics()["message"] == "max_eval is reached"
    for options, message in (
        ({"tolerance_grad": 1e9}, "tolerance_grad"),
        ({"tolerance_change": 1e9}, "tolerance_change"),
    ):
        optimizer = CGDescent(model.parameters(), max_iter=50, **options)
        optimizer.step(closure_of(optimizer, loss))
        assert message in optimizer.diagnostics()["message"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value: float) -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = CGDescent([p])
    before = p.detach().clone()
    optimizer.step(closure_of(optimizer, lambda: (p * value).sum()))
    assert torch.equal(p.detach(), before)
    assert "not finite" in optimizer.diagnostics()["message"]


def test_no_step_is_a_message() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = CGDescent([p])

    def closure() -> Tensor:  # the gradient has the wrong sign
        p.grad = -2 * p.detach()
        return (p.detach() ** 2).sum()

    before = p.detach().clone()
    assert optimizer.step(closure) == 4.0
    assert torch.equal(p.detach(), before)
    assert "no step length" in optimizer.diagnostics()["message"]


def test_a_loss_without_bound() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = CGDescent([p])
    assert optimizer.step(closure_of(optimizer, p.sum)) < -1e6
    assert "without bound" in optimizer.diagnostics()["message"]


def test_errors_of_the_optimizer() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = CGDescent([p])
    for error, match, call in (
        (TypeError, "closure must be callable", lambda: optimizer.step(None)),
        (TypeError, "loss must be callable", lambda: optimizer.step(lambda: 0.0, loss=3)),
        (RuntimeError, "no parameter has a gradient", lambda: optimizer.step(lambda: p.detach().sum())),
        (TypeError, "closure must return the loss", lambda: optimizer.step(lambda: None)),
        (TypeError, "dtype torch.bfloat16", lambda: CGDescent([nn.Parameter(torch.ones(2).bfloat16())])),
        (TypeError, "max_iter", lambda: CGDescent([p], max_iter=1.0)),
        (ValueError, "max_eval", lambda: CGDescent([p], max_eval=0)),
        (ValueError, "tolerance_grad", lambda: CGDescent([p], tolerance_grad=-1.0)),
        (ValueError, "beta must be one of", lambda: CGDescent([p], beta="cd")),
        (ValueError, "empty", lambda: CGDescent([])),
        (ValueError, "expected a state dict", lambda: optimizer.load_state_dict({})),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(RuntimeError, match="inside its own closure"):
        optimizer.step(lambda: optimizer.step(lambda: 0.0))
    p.grad = torch.zeros(3).to_sparse()
    with pytest.raises(RuntimeError, match="gradient of parameter 0"):
        optimizer.step(lambda: 1.0)
    model, loss = problem()
    trained = CGDescent(model.parameters())
    trained.step(closure_of(trained, loss))
    plain = CGDescent(model.parameters(), preconditioner=None)
    plain.step(closure_of(plain, loss))
    with pytest.raises(ValueError, match="lacks .*hessian_diag"):
        trained.load_state_dict(plain.state_dict())
    damaged = copy.deepcopy(trained.state_dict())
    damaged["state"][0]["direction"] = torch.zeros(3)
    with pytest.raises(ValueError, match="state 'direction' of parameter 0"):
        trained.load_state_dict(damaged)


def test_where_strong_wolfe_stalls_slopes_go_on() -> None:
    """A convex function whose minimum is not 0: f stops moving at 1e-16 |f|, where the gradient is still 1e-8. The
    approximate Wolfe conditions go on by slopes; torch's strong-Wolfe L-BFGS cannot."""
    n = 60
    k = torch.logspace(0, 2, n, dtype=torch.float64)
    fun = lambda x: (torch.log(torch.cosh(k.sqrt() * (x - 0.7))) + 0.05 * k * (x - 0.7) ** 2).sum() + 100.0  # noqa: E731
    x = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = torch.optim.LBFGS([x], max_iter=2000, max_eval=10000, history_size=10, tolerance_grad=0.0,
                                  tolerance_change=0.0, line_search_fn="strong_wolfe")  # fmt: skip
    optimizer.step(closure_of(optimizer, lambda: fun(x)))
    stalled = torch.autograd.grad(fun(x), x)[0].abs().max().item()
    start = torch.autograd.grad(fun(z := torch.zeros_like(x, requires_grad=True)), z)[0].abs().max().item()
    result = minimize(fun, torch.zeros(n, dtype=torch.float64), gtol=1e-12 * start, maxfun=10000)
    assert result.success
    assert result.jac.abs().max().item() <= 1e-12 * start
    assert stalled > 1e-10 * start
