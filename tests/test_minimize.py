"""``minimize``: what it finds, and what it makes of functions that are not what they should be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import HagerZhang, minimize
from full_batch_functions import WAYS, quartic, quartic_of_torch, rosenbrock
from torch import Tensor

# ---- what it finds ---------------------------------------------------------------------------------------------------


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

    result = minimize(fun, x0, (2.0,), gtol=1e-4, history=0)  # with pairs the loss alone is never asked for
    assert result.success
    assert result.x.dtype == dtype
    assert not result.x.requires_grad
    assert torch.allclose(result.x, torch.full_like(result.x, 2.0), atol=1e-3)
    assert result.njev == sum(flags) < result.nfev == len(flags)
    assert x0[0, 0].item() == -0.5


def test_a_gradient_of_its_own() -> None:
    x0 = np.zeros(6)
    a = minimize(lambda x: rosenbrock(x)[0], x0, jac=lambda x: rosenbrock(x)[1], gtol=1e-9, history=0)
    b = minimize(lambda x: tuple(map(torch.from_numpy, map(np.asarray, rosenbrock(x.detach().numpy())))),
                 torch.zeros(6, dtype=torch.float64), gtol=1e-9)  # fmt: skip
    assert a.success
    assert b.success
    assert a.nfev > a.njev
    assert np.allclose(a.x, b.x.numpy(), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "status"),
    [({"maxiter": 3}, 1), ({"maxfun": 7}, 1), ({"maxfun": 1}, 1), ({"maxtime": 0.0}, 4)],
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
        (TypeError, "needs its gradient", lambda: minimize(good, x0, jac=None)),
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


@pytest.mark.parametrize("factor", [1e200, 1e-200])
def test_a_gradient_whose_square_no_double_holds_has_a_message_of_its_own(factor: float) -> None:
    result = minimize(lambda x: (factor * float(x @ x), 2 * factor * x), np.ones(3), gtol=0.0)
    assert result.status == 2
    assert "scale the loss" in result.message


@pytest.mark.parametrize("history", [0, 3])
@pytest.mark.parametrize("mode", ["raise", "warn"])
def test_a_strict_floating_point_mode_is_that_of_the_users_functions(mode: Any, history: int) -> None:
    """Under np.errstate(all="raise") no operation of ours raises, and those of fun and of the callback do."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        modes.append(np.geterr()["under"])
        f, g = rosenbrock(x[:10])
        return f + 1e-200 * float(x[10:].sum()), np.concatenate([g, [1e-200, 1e-200]])

    modes: list[str] = []
    see = lambda x: modes.append(np.geterr()["under"])  # noqa: E731
    with np.errstate(all=mode):
        result = minimize(fun, np.full(12, -1.2), shapes=[(6, 2)], gtol=1e-10, history=history, callback=see)
        assert np.geterr()["under"] == mode
    assert result.success
    assert set(modes) == {mode}


def test_an_empty_array() -> None:
    result = minimize(lambda x: (0.0, x), np.zeros(0))
    assert result.success
    assert result.x.shape == (0,)


# ---- the best point that was seen ------------------------------------------------------------------------------------


def gaussian_process(x: np.ndarray) -> tuple[float, np.ndarray]:
    """The negative log marginal likelihood of an exact Gaussian process, over its log length scale, log amplitude and
    log noise: two minima, one that explains the data by noise and one by the function."""
    t = np.linspace(0, 1, 25)
    y = np.sin(9 * t) + 0.15 * np.cos(40 * t + 1)
    q = (t[:, None] - t[None, :]) ** 2
    length, amplitude, noise = np.exp(np.clip(x, -30, 30))
    e = amplitude * np.exp(-0.5 * q / length**2)
    k = e + (noise + 1e-8 * amplitude) * np.eye(t.size)
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(k))
    except np.linalg.LinAlgError:
        return math.nan, np.full(3, math.nan)
    inverse = inverse.T @ inverse
    a = inverse @ y
    f = 0.5 * y @ a + 0.5 * np.linalg.slogdet(k)[1]
    w = inverse - np.outer(a, a)
    each = (e * q / length**2, e + 1e-8 * amplitude * np.eye(t.size), noise * np.eye(t.size))
    return float(f / t.size), np.array([0.5 * np.sum(w * d) for d in each]) / t.size


def two_basins(offset: float) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """Waves on a parabola: a search that jumps lands in another basin than the lowest it has seen."""

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        t = x - 0.3
        return (
            offset + float(np.sum(0.05 * t**2 - np.cos(4 * t) + 0.4 * np.sin(11 * t))),
            0.1 * t + 4 * np.sin(4 * t) + 4.4 * np.cos(11 * t),
        )

    return fun


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("limit", [{}, {"maxfun": 9}, {"maxfun": 17}, {"maxiter": 2}])
@WAYS
def test_a_fit_returns_the_lowest_point_that_it_evaluated(way: Any, limit: dict[str, int], offset: float) -> None:
    functions = [(two_basins(offset), np.random.default_rng(k).uniform(-6, 6, 1 + k % 3)) for k in range(25)]
    if not offset:
        rng = np.random.default_rng(1)
        functions += [(gaussian_process, rng.uniform(-3, 3, 3)) for _ in range(15)]
    for fun, x0 in functions:
        seen = []

        def watched(x: np.ndarray, fun: Any = fun, seen: Any = seen) -> tuple[float, np.ndarray]:
            f, g = fun(x)
            if math.isfinite(f) and np.isfinite(g).all():
                seen.append(f)
            return f, g

        result = way(watched, x0, **limit)
        # Up to what rounding leaves of a difference: 2^-40 of f's size in each of the iterations.
        assert result.fun <= min(seen) + 1e-10 * max(1.0, abs(offset))


def test_a_search_that_saw_a_lower_point_ends_there() -> None:
    """phi falls steeply into a narrow well, which the first trial hits, and is lower there than at the Wolfe point that
    follows."""
    seen = []

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        (t,) = x
        well = 2.0 * math.exp(-(((t - 0.01) / 0.004) ** 2))
        f = -0.1 * t + 0.02 * t * t - well
        seen.append(f)
        return f, np.array([-0.1 + 0.04 * t + well * 2 * (t - 0.01) / 0.004**2])

    result = minimize(fun, np.array([1.0]), maxiter=3)
    assert result.fun <= min(seen) + 1e-12


def valley_of_waves(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Its first iteration falls by fifteen orders of magnitude: waves of 1e-5 are what is left."""
    r, z = x[0] - 1, 3.83754915661771 * x[1] + 0.9164785653967613
    return float(1e10 * r * r + 1e-5 * (1 + np.sin(z))), np.array([2e10 * r, 3.83754915661771e-5 * np.cos(z)])


@pytest.mark.parametrize("line_search", [HagerZhang(), HagerZhang(epsilon=0.0)])
def test_a_loss_that_has_fallen_by_orders_of_magnitude_ends_at_the_lowest_point(line_search: HagerZhang) -> None:
    for maxiter in range(1, 8):
        seen = []

        def watched(x: np.ndarray, seen: Any = seen) -> tuple[float, np.ndarray]:
            f, g = valley_of_waves(x)
            seen.append(f)
            return f, g

        result = minimize(watched, np.array([3.0, 0.1]), maxiter=maxiter, line_search=line_search)
        assert result.fun <= min(seen) * (1 + 1e-11)


@pytest.mark.parametrize("offset", [-1e-3, -1e-10, 0.0, 1e-10])
def test_a_loss_that_falls_to_zero_or_through_it_is_as_fine_as_its_terms(offset: float) -> None:
    """Its terms are of size 1 and cancel, so that its rounding, which the sine stands for, has their size."""
    k = np.logspace(0, 4, 8)

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        t = x - 1
        f = float((k * t**2 + t**4).sum())
        return f + offset + 2e-16 * math.sin(1e9 * float(x.sum())), 2 * k * t + 4 * t**3

    for seed in range(3):
        assert minimize(fun, np.random.default_rng(seed).uniform(-1, 2, 8), gtol=1e-10).success


# ---- the gradient of the result --------------------------------------------------------------------------------------


def wall(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Infinite inside the unit sphere."""
    f = float(x @ x)
    return (f, 2 * x) if f >= 1 else (math.inf, 0 * x)


def kinked(x: np.ndarray) -> tuple[float, np.ndarray]:
    g = 1.5 * np.sign(x) * np.sqrt(abs(x))
    g[0] += 3 * np.sign(x[0] - 1)
    return float((abs(x) ** 1.5).sum() + 3 * abs(x[0] - 1)), g


def one_buffer(x: np.ndarray, buffer: np.ndarray = np.zeros(4)) -> tuple[float, np.ndarray]:  # noqa: B008
    """Returns the same array each time."""
    f, buffer[:] = quartic(x)
    return f, buffer


@pytest.mark.parametrize("history", [0, 10])
@pytest.mark.parametrize(
    ("fun", "options", "status"),
    [(wall, {"maxfun": 5}, 1), (wall, {"maxfun": 6}, 1), (kinked, {}, 2), (one_buffer, {}, 0)],
)  # fmt: skip
@WAYS
def test_the_gradient_of_the_result_is_that_at_its_x(
    way: Any, fun: Any, options: dict[str, int], status: int, history: int
) -> None:
    x0 = np.array([1.3, 0.7, 2.1, 0.4])
    result = way(fun, x0, history=history, callback=lambda x: fun(0 * np.asarray(x)), **options)
    assert result.status == status
    assert np.array_equal(np.asarray(result.jac), fun(np.asarray(result.x))[1])


# ---- no function makes it raise --------------------------------------------------------------------------------------


def gamma_likelihood(x: np.ndarray) -> tuple[float, np.ndarray]:
    data = np.random.default_rng(0).uniform(0.1, 2.1, 400)
    a, b = x
    if not (a > 0 and b > 0):
        return math.nan, np.full(2, math.nan)
    lgamma = math.lgamma(a) if a < 1e300 else math.inf
    digamma = math.log(a) - 0.5 / a if a > 1 else -1 / a
    f = lgamma - a * math.log(b) - (a - 1) * np.log(data).mean() + b * data.mean()
    return float(f), np.array([digamma - math.log(b) - np.log(data).mean(), -a / b + data.mean()])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("beta", ["hager_zhang", "polak_ribiere", "fletcher_reeves", "dai_yuan", "hestenes_stiefel"])
@pytest.mark.parametrize("preconditioner", ["bfgs", None])
def test_no_function_raises_an_arithmetic_error(beta: str, preconditioner: str | None) -> None:
    one = np.ones(3)
    functions: list[tuple[Callable[..., Any], np.ndarray]] = [
        (gamma_likelihood, np.array([50.0, 0.01])),
        (lambda x: (-1e300 * x.sum(), -1e300 * one), one),
        (lambda x: (-1e-300 * x.sum(), -1e-300 * one), one),
        (lambda x: (1e-320 * x.sum(), 1e-320 * one), 1e-320 * one),
        (lambda x: (1e308 * (x @ x), 1e308 * x), 1e-200 * one),
        (lambda x: (1e-308 * (x @ x), 2e-308 * x), 1e150 * one),
        (lambda x: (1e-200 * (x @ x), 2e-200 * x), 1e-200 * one),
        (lambda x: (float(np.sum(np.sqrt(np.abs(x)))), 0.5 * np.sign(x) / np.sqrt(np.abs(x))), one),
        (lambda x: (float(np.sum(np.exp(x))), np.exp(x)), 709 * one),
        (lambda x: (float(-np.sum(np.exp(x))), -np.exp(x)), one),
        (lambda x: (float(np.sum(-np.log(np.abs(x)))), -1 / x), 1e-300 * one),
        (lambda x: (float(np.sum(np.where(x < 0.5, 1e300, 1e-300) * x)), np.where(x < 0.5, 1e300, 1e-300)), one),
        (lambda x: (0.0, one), one),
        (lambda x: (math.inf, one), one),
        (lambda x: (1.0, math.inf * one), one),
        (lambda x: (float(np.sum(x)), np.array([math.nan, 1.0, 1.0]) if x[0] < 0.99 else one), one),
    ]
    for fun, x0 in functions:
        for dtype in (np.float64, np.float32):
            result = minimize(fun, x0.astype(dtype), maxfun=400, beta=beta, preconditioner=preconditioner)
            assert result.status in (0, 1, 2, 3, 6)
            assert result.message


# ---- the shape of a gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_shape", "g_shape", "fits"),
    [((3, 2), (2, 3), False), ((3, 2), (6,), False), ((6,), (3, 2), False), ((3, 2), (3, 2), True),
     ((3, 2), (3, 2, 1), True), ((4,), (4, 1), True), ((4,), (1, 4), True), ((4, 1), (4,), True), ((4,), (4,), True),
     ((4,), (2, 2), False), ((), (1,), True), ((1,), (), True), ((2, 3, 4), (4, 3, 2), False), ((3,), (4,), False)],
)  # fmt: skip
@pytest.mark.parametrize("own_jac", [True, False])
@pytest.mark.parametrize("of", ["numpy", "torch"])
def test_a_gradient_has_the_shape_of_x0(
    of: str, own_jac: bool, x_shape: tuple[int, ...], g_shape: tuple[int, ...], fits: bool
) -> None:
    if of == "numpy":
        x0, loss = np.zeros(x_shape), lambda x: quartic(x)[0]
        g = lambda x: np.resize(quartic(x)[1], g_shape)  # noqa: E731
    else:
        x0, loss = torch.zeros(x_shape, dtype=torch.float64), quartic_of_torch
        g = lambda x: torch.from_numpy(np.resize(quartic(x.detach().numpy())[1], g_shape))  # noqa: E731
    run = (
        (lambda: minimize(loss, x0, jac=g))
        if own_jac
        else (lambda: minimize(lambda x: (loss(x), g(x)), x0))
    )  # fmt: skip
    if fits:
        result = run()
        assert result.success
        assert tuple(result.jac.shape) == tuple(result.x.shape) == x_shape
    else:
        with pytest.raises(ValueError, match="the gradient has shape") as error:
            run()
        assert str(g_shape) in str(error.value)
        assert str(x_shape) in str(error.value)


@pytest.mark.parametrize("n", [1, 5])
def test_a_gradient_with_the_negative_bit_keeps_its_sign(n: int) -> None:
    """Autograd leaves that bit in the gradient by the imaginary part of a conjugate; DLPack loses it (torch 2.13)."""
    x0 = torch.ones(n, dtype=torch.float64)
    of_autograd = minimize(lambda x: (torch.complex(x * 0, x).conj() + 3j).abs().square().sum(), x0)
    given = minimize(lambda x: ((x - 3).square().sum(), torch._neg_view(-2 * (x - 3))), x0)
    for result in (of_autograd, given):
        assert result.success, result.message
        torch.testing.assert_close(result.x, x0 * 3)


# ---- torch's transforms ----------------------------------------------------------------------------------------------


# torch's own, of jvp: of torch.jit.script, a FutureWarning in 2.14
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_transform_of_torch_func_is_named() -> None:
    def solve(x0: Tensor) -> Tensor:
        return minimize(quartic_of_torch, x0).x

    x0 = torch.zeros(4, 3, dtype=torch.float64)
    for call in (
        lambda: torch.vmap(solve)(x0),
        lambda: torch.func.grad(lambda x: solve(x).sum())(x0[0]),
        lambda: torch.func.jvp(solve, (x0[0],), (x0[0],)),
        lambda: torch.vmap(lambda a: minimize(lambda x: (a * x).square().sum(), torch.zeros(3)).x)(x0),
    ):
        with pytest.raises(RuntimeError, match=r"minimize\(\) was called inside a torch.func transform"):
            call()


def test_inference_mode_and_no_grad_are_left_for_the_run() -> None:
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            result = minimize(quartic_of_torch, torch.zeros(3, dtype=torch.float64))
        assert result.success
        assert not result.x.is_inference()
    with torch.device("meta"):
        x0 = torch.zeros(3)
    with pytest.raises(TypeError, match="x0 is on meta"):
        minimize(quartic_of_torch, x0)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(TypeError, match="FakeTensor"):
        minimize(quartic_of_torch, torch.zeros(3))


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-6])
def test_what_counts_as_rounding_is_an_option(epsilon: float | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert minimize(quartic, np.zeros(5), line_search=HagerZhang(epsilon=epsilon)).success
