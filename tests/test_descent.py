"""Full-batch descent: the line search and the method against mathematics, and the native passes in lockstep with the
reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import HagerZhang, _native, reference
from fastnlcg.full_batch.flat import Flat
from fastnlcg.full_batch.hager_zhang import Point, Unbounded, search
from fastnlcg.full_batch.iteration import BETA_RULES, Course, Descent, DescentOptions, Slopes
from fastnlcg.full_batch.passes import Mark, Sums
from fastnlcg.tensors.table import DLPACK_API

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

    def full(self, _: bool) -> float:
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
    for wrong in ("1", *((2.5, 50.0) if option == "max_rounds" else ())):
        with pytest.raises(TypeError, match=option):
            HagerZhang(**{option: wrong})


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
    evaluations, and ten times as many without a preconditioner."""
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


# ---- the native passes, compared with the reference ------------------------------------------------------------------


class Both:
    """Native passes over flat arrays and the reference's: everything is compared after each."""

    def __init__(self, fun: Function, x0: np.ndarray, dtype: str, backend: Backend, *, preconditioned: bool) -> None:
        self.dtype, self.rtol = np.dtype(dtype), 3e-12 if dtype == "float64" else 2e-4
        self.fun, self.x = fun, x0.astype(dtype)
        self.g = np.zeros_like(self.x)
        # The reference works on what the native side works on: it is given the native vectors before each pass.
        self.reference = reference.DescentPasses(
            self.x.astype(float), lambda: self.g.astype(float), preconditioned=preconditioned
        )
        device = "cuda:0" if backend.on_gpu else "cpu"
        self.native = Flat(self.x, lambda: np.zeros_like(self.x), device, preconditioned=preconditioned)
        self.compared = 0

    def full(self, _: bool) -> float:
        f, g = self.fun(self.x.astype(float))
        self.g = g.astype(self.dtype)
        self.native.set_gradient(self.g)
        return float(f)

    def _each(self, name: str, *args: Any, **named: Any) -> Any:
        n, r = self.native, self.reference
        r.x[:], r.d, r.g_prev, r.origin = (a.astype(float) for a in (self.x, n.d, n.g_prev, n.origin))
        r.h = np.ones(self.x.size) if n.h is None else n.h.astype(float)
        found, expected = getattr(n, name)(*args, **named), getattr(r, name)(*args, **named)
        if name == "direction":  # with the mark as two more sums
            (slope, dhd, mark), (slope_r, dhd_r, mark_r) = found, expected
            found, expected = (slope, dhd, *mark), (slope_r, dhd_r, *mark_r)
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

    def trial(self, alpha: float, *, first: Mark | None) -> None:
        self._each("trial", alpha, first=first)

    def slope(self, f: float) -> tuple[float, float, float]:
        return self._each("slope", f)

    def curvature(self, update: Any) -> Sums:
        return self._each("curvature", update)

    def direction(self, beta: float) -> tuple[float, float, Mark]:
        slope, dhd, *mark = self._each("direction", beta)
        return slope, dhd, (mark[0], mark[1])

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
        passes, fun, g = Flat(x, memory, device, preconditioned=True), wavy(n), memory()

        def full(_: bool, x: Any = x, g: Any = g, passes: Any = passes, fun: Any = fun) -> float:
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
    step.bind(p=x, g=g, grad_prev=g_prev, direction=_native.Buffer(fixed))
    with pytest.raises(ValueError, match="direction is read-only"):
        step.descend(named("direction", preconditioned=False), 1)
    with pytest.raises(ValueError, match=r"lay_out\(\) first"):
        _native.TensorTable("float32").descend(_native.Tensors(), named("slope"), 1)
    step.bind(p=x, direction=d, origin=g_prev)
    step.descend(named("trial"), 1)
    with pytest.raises(ValueError, match="'slope' needs g"):  # a trial does not
        step.descend(named("slope"), 1)


@pytest.mark.parametrize("alpha", [1e-200, 1e-308, 5e-324, 1e300])
@pytest.mark.parametrize("cheap", [False, True])
def test_a_step_length_whose_square_no_double_holds(alpha: float, cheap: bool) -> None:
    """It does not come back as an exception, and the run continues from a first step."""
    run = Run(rosenbrock, np.full(4, -1.2))
    run.descent.loss = (lambda: run.full(False)) if cheap else None
    run.descent.begin()
    run.descent.course.alpha = alpha
    assert run.to(1e-6).g_max <= 1e-6
