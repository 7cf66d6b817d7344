"""``minimize`` keeps the contract of ``scipy.optimize.minimize``: directly and as a ``method=``, NumPy and torch."""

from __future__ import annotations

import functools
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import OptimizeResult, minimize
from full_batch_functions import WAYS, direct, optimize, quartic, quartic_of_torch, through_scipy

# ---- callbacks -------------------------------------------------------------------------------------------------------


@WAYS
def test_a_callback_gets_what_the_name_of_its_parameter_says(way: Any) -> None:
    points: list[Any] = []
    results: list[Any] = []

    class Object:
        def __call__(self, xk: Any) -> None:
            points.append(xk)

        def method(self, intermediate_result: Any) -> None:
            results.append(intermediate_result)

    def with_state(xk: Any, state: Any = None) -> None:
        assert state is None
        points.append(xk)

    def keyword_only(*, intermediate_result: Any) -> None:
        results.append(intermediate_result)

    def several(intermediate_result: Any, more: int = 0) -> None:  # not its only parameter
        points.append(intermediate_result)

    def partial(keep: list[Any], intermediate_result: Any) -> None:
        keep.append(intermediate_result)

    x0 = np.full(3, -2.0)
    for callback in (
        points.append,
        Object(),
        with_state,
        several,
        lambda xk: points.append(xk),
        lambda *x: points.extend(x),
    ):
        points.clear()
        found = way(quartic, x0, callback=callback)
        assert found.success
        assert len(points) == found.nit > 1
        assert np.allclose(points[-1], found.x)
        assert all(p.shape == (3,) and not isinstance(p, dict) for p in points)
        assert not np.array_equal(points[0], points[-1])  # copies
    for callback in (Object().method, keyword_only, functools.partial(partial, results)):
        results.clear()
        found = way(quartic, x0, callback=callback)
        assert len(results) == found.nit > 1
        assert [r.nit for r in results] == list(range(1, found.nit + 1))
        assert results[-1].fun == found.fun
        assert np.allclose(results[-1].x, found.x)


@WAYS
def test_stop_iteration_ends_a_run_and_a_return_value_does_not(way: Any) -> None:
    seen: list[Any] = []

    def stop(xk: Any) -> None:
        seen.append(xk)
        if len(seen) == 2:
            raise StopIteration

    result = way(quartic, np.full(3, -20.0), callback=stop)
    assert (result.nit, result.success, result.status) == (2, False, 99)
    assert "StopIteration" in result.message
    assert np.array_equal(result.x, seen[-1])
    assert way(quartic, np.full(3, -20.0), callback=lambda xk: True).success

    class TooLateError(Exception):
        pass

    def raising(xk: Any) -> None:
        raise TooLateError

    with pytest.raises(TooLateError):
        way(quartic, np.full(3, -20.0), callback=raising)


@WAYS
def test_what_a_callback_writes_changes_nothing(way: Any) -> None:
    def spoil(xk: Any) -> None:
        xk[:] = 1e9

    x0 = np.full(3, -2.0)
    assert np.array_equal(way(quartic, x0, callback=spoil).x, way(quartic, x0).x)


@pytest.mark.parametrize("loss_alone", [True, False])
def test_what_fun_writes_into_its_x_changes_nothing(loss_alone: bool) -> None:
    def spoil(x: Any) -> Any:
        with torch.no_grad():
            result = quartic_of_torch(x.detach()), 2 * (x - 1).detach() + 4 * (x - 1).detach() ** 3
            x.mul_(0)
        return result[0] if loss_alone and not x.requires_grad else result

    expected = minimize(quartic_of_torch, torch.zeros(3).double() - 2, gtol=1e-9)
    found = minimize(spoil, torch.zeros(3).double() - 2, gtol=1e-9)
    assert torch.allclose(found.x, expected.x)
    assert (found.nit, found.nfev) == (expected.nit, expected.nfev)

    def spoil_array(x: np.ndarray) -> Any:
        found = quartic(x)
        x[:] = math.nan
        return found

    expected = minimize(quartic, np.zeros(3))
    for found in (
        minimize(spoil_array, np.zeros(3)),
        through_scipy(spoil_array, np.zeros(3)),
        minimize(lambda x: spoil_array(x)[0], np.zeros(3), jac=lambda x: quartic(x)[1]),
    ):
        assert np.array_equal(found.x, expected.x)
        assert found.nfev == expected.nfev

    found = minimize(
        lambda x: (quartic_of_torch(x), x.zero_())[0],
        torch.zeros(3).double(),
        jac=lambda x: 2 * (x - 1) + 4 * (x - 1) ** 3,
    )
    assert np.array_equal(found.x, expected.x)


# ---- options ---------------------------------------------------------------------------------------------------------


@WAYS
def test_numpys_integers_and_whole_floats_are_counts(way: Any) -> None:
    for one in (3, np.int64(3), np.uint8(3), 3.0, np.float64(3.0)):
        result = way(quartic, np.full(3, -20.0), maxiter=one)
        assert (result.nit, result.status, result.success) == (3, 1, False)
        assert type(result.nit) is int
    assert way(quartic, np.full(3, -20.0), maxfun=np.int32(5)).status == 1
    assert way(quartic, np.full(3, -20.0), maxiter=math.inf, maxfun=math.inf).success
    for bad in (True, 2.5, "3", np.bool_(True), None if way is direct else 2.5):
        if bad is not None:
            with pytest.raises(TypeError, match="maxiter must be an int"):
                way(quartic, np.zeros(3), maxiter=bad)
    with pytest.raises(ValueError, match="maxiter"):
        way(quartic, np.zeros(3), maxiter=-1)


@WAYS
def test_no_iterations_evaluate_the_start(way: Any) -> None:
    result = way(quartic, np.full(3, -2.0), maxiter=0)
    assert (result.nit, result.nfev, result.status, result.success) == (0, 1, 1, False)
    assert np.array_equal(result.x, np.full(3, -2.0))
    assert result.fun == quartic(np.full(3, -2.0))[0]
    assert np.allclose(result.jac, quartic(np.full(3, -2.0))[1])
    assert way(quartic, np.ones(3), maxiter=0).success


@WAYS
def test_disp_prints_how_it_ended(way: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for disp in (True, 1):
        result = way(quartic, np.zeros(3), disp=disp)
        text = capsys.readouterr().out
        assert result.message in text
        assert f"Iterations: {result.nit}" in text
        assert f"Function evaluations: {result.nfev}" in text
    for disp in (False, 0, None):
        way(quartic, np.zeros(3), disp=disp)
        assert capsys.readouterr().out == ""


@WAYS
def test_return_all_keeps_every_point(way: Any) -> None:
    x0 = np.full(3, -2.0)
    result = way(quartic, x0, return_all=True)
    assert len(result.allvecs) == result.nit + 1
    assert np.array_equal(result.allvecs[0], x0)
    assert np.array_equal(result.allvecs[-1], result.x)
    assert "allvecs" not in way(quartic, x0)


def waves(x: np.ndarray) -> tuple[float, np.ndarray]:
    t = x - 0.3
    f = np.sum(0.05 * t**2 - np.cos(4 * t) + 0.4 * np.sin(11 * t))
    return float(f), 0.1 * t + 4 * np.sin(4 * t) + 4.4 * np.cos(11 * t)


@pytest.mark.parametrize(
    ("fun", "options", "status"),
    [
        (lambda x: (float(x.sum()), np.ones(2)), {}, 6),
        (lambda x: (float((x**4).sum()), 4 * x**3), {"maxfun": 2}, 1),
        *((waves, {"maxfun": limit}, 1) for limit in (3, 5, 8)),
    ],
)
@pytest.mark.parametrize(("history", "x0"), [(0, [1.0, 2.0]), (10, [3.0, -4.0])])
@WAYS
def test_the_iteration_with_which_a_run_ends_is_seen_too(
    way: Any, history: int, x0: list[float], fun: Any, options: Any, status: int
) -> None:
    """Also if the lowest point is not the last that was evaluated, as at 3 evaluations of the waves with pairs."""
    seen: list[Any] = []
    result = way(fun, np.array(x0), history=history, return_all=True, callback=seen.append, **options)
    assert result.status == status
    assert len(seen) == len(result.allvecs) - 1 == result.nit > 0
    assert np.array_equal(seen[-1], result.x)
    assert np.array_equal(result.allvecs[-1], result.x)


@WAYS
def test_unknown_options_are_ignored_and_named(way: Any) -> None:
    with pytest.warns(UserWarning, match="unknown options are ignored: ftol, maxcor"):
        result = way(quartic, np.zeros(3), maxcor=10, ftol=1e-9)
    assert result.success


@WAYS
def test_tol_is_gtol_unless_that_is_given(way: Any) -> None:
    loose, tight = way(quartic, np.zeros(3), tol=1.0), way(quartic, np.zeros(3), tol=1.0, gtol=1e-10)
    assert 1e-4 < np.abs(np.asarray(loose.jac)).max() <= 1.0
    assert np.abs(np.asarray(tight.jac)).max() <= 1e-10
    with pytest.raises(ValueError, match="Invalid tol"):
        way(quartic, np.zeros(3), tol=-1.0)


@WAYS
def test_bounds_that_bind_nothing_are_none(way: Any) -> None:
    for bounds in (
        None, [], [(None, None)] * 3, [(-math.inf, math.inf)] * 3, [(None, math.inf)] * 3, optimize.Bounds(),
        optimize.Bounds(-np.inf, np.full(3, np.inf)), np.tile([-np.inf, np.inf], (3, 1)),
    ):  # fmt: skip
        assert way(quartic, np.zeros(3), bounds=bounds).success
    for bounds, name in (
        ([(None, None), (0, None), (None, None)], "variable 1 has the lower bound 0"),
        ([(None, 2.5)] * 3, "variable 0 has the upper bound 2.5"),
        (optimize.Bounds([-np.inf, -1, -np.inf], np.inf), "variable 1 has the lower bound -1"),
        (optimize.Bounds(0, 1), "variable 0 has the lower bound 0"),
        (3, "bounds must be .min, max. pairs"),
        ([1, 2, 3], "bounds must be .min, max. pairs"),
    ):
        with pytest.raises(ValueError, match=name):
            way(quartic, np.zeros(3), bounds=bounds)


@WAYS
def test_constraints_are_refused_by_name(way: Any) -> None:
    for constraints in (None, (), [], {}):
        assert way(quartic, np.zeros(3), constraints=constraints).success
    one = {"type": "eq", "fun": lambda x: x[0]}
    linear = optimize.LinearConstraint(np.eye(3), 0, 1)
    for constraints in (one, [one], (one, one), linear, [linear], optimize.NonlinearConstraint(np.sum, 0, 1)):
        with pytest.raises(ValueError, match="constraints are not supported"):
            way(quartic, np.zeros(3), constraints=constraints)


def test_hessians_and_more_arguments_are_taken() -> None:
    fun = lambda x, a, b: (a * quartic(x)[0] + b, a * quartic(x)[1])  # noqa: E731
    hess = lambda x, *args: np.eye(3)  # noqa: E731
    result = optimize.minimize(fun, np.zeros(3), (2.0, 7.0), jac=True, method=minimize, hess=hess)
    assert result.fun == pytest.approx(7.0)
    single = minimize(lambda x, a: (a * quartic(x)[0], a * quartic(x)[1]), np.zeros(3), 3.0)  # SciPy: not a tuple
    assert single.success


def test_scipy_hands_over_its_forms_of_the_gradient() -> None:
    calls = {"f": 0, "g": 0}

    def f(x: np.ndarray) -> float:
        calls["f"] += 1
        return quartic(x)[0]

    def g(x: np.ndarray) -> np.ndarray:
        calls["g"] += 1
        return quartic(x)[1]

    result = optimize.minimize(f, np.full(3, -2.0), jac=g, method=minimize)
    assert result.success
    assert (result.nfev, result.njev) == (calls["f"], calls["g"])
    both = {"n": 0}

    def fg(x: np.ndarray) -> tuple[float, np.ndarray]:
        both["n"] += 1
        return quartic(x)

    result = optimize.minimize(fg, np.full(3, -2.0), jac=True, method=minimize)
    assert result.nfev == result.njev == both["n"]  # no gradient is thrown away
    assert result.nfev == minimize(quartic, np.full(3, -2.0)).nfev
    for jac in (None, False, "2-point"):
        with pytest.raises(TypeError, match="needs its gradient"):
            optimize.minimize(f, np.zeros(3), jac=jac, method=minimize)
    x0 = torch.zeros(3, dtype=torch.float64)
    for jac in (None, False, True):
        assert minimize(quartic_of_torch, x0, jac=jac).success


def test_it_serves_scipys_global_searches() -> None:
    fun = lambda x: (float(x @ x - 10 * np.cos(2 * np.pi * x).sum()), 2 * x + 20 * np.pi * np.sin(2 * np.pi * x))  # noqa: E731
    found = optimize.basinhopping(
        fun, np.array([2.2, -1.7]), niter=300, rng=0, minimizer_kwargs={"method": minimize, "jac": True}
    )
    assert found.fun == pytest.approx(-20.0)
    assert found.lowest_optimization_result.success


# ---- the result ------------------------------------------------------------------------------------------------------


@WAYS
def test_a_result_is_one_of_scipys(way: Any) -> None:
    result = way(quartic, np.zeros(3))
    assert {"x", "fun", "jac", "nit", "nfev", "njev", "status", "success", "message"} <= set(result)
    for key in ("nit", "nfev", "njev", "status"):
        assert type(result[key]) is int
    assert type(result.success) is bool
    assert type(result.fun) is float
    assert type(result.message) is str
    assert pickle.loads(pickle.dumps(result)).fun == result.fun
    result.extra = 3
    assert result["extra"] == 3
    del result.extra
    with pytest.raises(AttributeError, match="extra"):
        _ = result.extra
    with pytest.raises(AttributeError, match="extra"):
        del result.extra
    assert isinstance(result.copy(), dict)
    assert "success" in dir(OptimizeResult(success=True))


def test_x0_of_every_kind() -> None:
    for x0 in (
        [0.0, 0.0],
        (0, 0),
        np.zeros(2, np.int32),
        np.zeros(2, np.float16),
        np.zeros((2, 1)),
        np.float64(0.0),
        0,
    ):
        result = minimize(quartic, x0, gtol=1e-8)
        assert result.success
        assert result.x.dtype == np.float64
        assert result.x.shape == np.shape(x0)
    assert minimize(quartic, np.zeros(2, np.float32)).x.dtype == np.float32
    with pytest.raises(TypeError, match="masked"):
        minimize(quartic, np.ma.masked_array(np.zeros(2), [True, False]))
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    assert minimize(quartic, frozen).success
