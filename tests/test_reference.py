"""The reference against mathematics: what the equations must do, computed by hand or by another algorithm."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from fastnlcg import OnlineLineSearch
from fastnlcg import reference as ref


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
@pytest.mark.parametrize("preconditioner", ["bfgs", None])
def test_the_first_step_is_steepest_descent(update: str, preconditioner: str | None) -> None:
    options = ref.Options(update=update, preconditioner=preconditioner)
    p, g = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -4.0])
    p_new, state = ref.nlcg_step(p, g, ref.initial_state(3, options), options, lr=0.1)
    np.testing.assert_array_equal(p_new, p - 0.1 * g)
    np.testing.assert_array_equal(state.d, -g)
    assert state.rz == pytest.approx(g @ g, rel=1e-15)


def test_three_steps_by_hand() -> None:
    """p = (p1, p2, p3), loss = (p1^2 + 4 p2^2) / 2 + p3, lr = 1/4; fractions worked out on paper."""
    gradient = np.array([1.0, 4.0, 0.0]), np.array([0.0, 0.0, 1.0])
    p, options = np.array([4.0, 1.0, 0.0]), ref.Options(preconditioner="bfgs", eps=0.0)
    state = ref.initial_state(3, options)

    p, state = ref.nlcg_step(p, gradient[0] * p + gradient[1], state, options, lr=0.25)
    # g = (4, 4, 1), d = -g, rz = 33
    np.testing.assert_allclose(p, [3.0, 0.0, -0.25], rtol=1e-15)
    assert state.rz == 33.0

    p, state = ref.nlcg_step(p, gradient[0] * p + gradient[1], state, options, lr=0.25)
    # g = (3, 0, 1), y = (-1, -4, 0), s = (-1, -1, -1/4), ys = 5, shs = 33/16
    # h = |1 + y^2/5 - s^2 16/33| = (1 + 1/5 - 16/33, 1 + 16/5 - 16/33, 1 - 1/33) = (118/165, 613/165, 32/33)
    h = np.array([118 / 165, 613 / 165, 32 / 33])
    assert (state.ys, state.shs, state.updated) == (5.0, 33 / 16, True)
    np.testing.assert_allclose(state.diagonal, h, rtol=1e-15)
    # z = -(9 / (118/165) ... ): rz = 9 * 165/118 + 33/32, beta = rz / 33
    rz = 9 * 165 / 118 + 33 / 32
    assert state.rz == pytest.approx(rz, rel=1e-15)
    assert state.beta == pytest.approx(rz / 33, rel=1e-15)
    d = np.array([-3 * 165 / 118, 0.0, -33 / 32]) + rz / 33 * np.array([-4.0, -4.0, -1.0])
    np.testing.assert_allclose(state.d, d, rtol=1e-15)
    np.testing.assert_allclose(p, np.array([3.0, 0.0, -0.25]) + 0.25 * d, rtol=1e-15)


def test_diagonal_secant_property() -> None:
    """In one dimension the update satisfies the secant equation exactly: h s = y."""
    for h, y, s in ((1.0, 3.0, 2.0), (5.0, 0.1, 0.7), (0.01, -4.0, -0.5)):
        new = ref.bfgs_diagonal(*(np.array([v]) for v in (h, y, s)), ys=y * s, shs=s * h * s)
        assert new[0] * s == pytest.approx(y, rel=1e-12)


def test_diagonal_agrees_with_the_full_bfgs_update() -> None:
    """The diagonal of H + y y^T / y^T s - H s s^T H / s^T H s, for diagonal H."""
    rng = np.random.default_rng(0)
    h, s = rng.uniform(0.5, 2.0, 6), rng.standard_normal(6)
    y = rng.uniform(0.5, 2.0, 6) * s
    full = np.diag(h) + np.outer(y, y) / (y @ s) - np.outer(h * s, h * s) / (s @ (h * s))
    diagonal = ref.bfgs_diagonal(h, y, s, float(y @ s), float(s @ (h * s)))
    np.testing.assert_allclose(diagonal, np.abs(np.diag(full)), rtol=1e-13)


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_linear_conjugate_gradients(update: str) -> None:
    """On a quadratic with exact line search and h = 1 the method is linear CG: the same iterates, done in n steps.

    Well enough conditioned for residuals that never grow: there beta <= 1, and the paper's clamp has no say."""
    rng = np.random.default_rng(1)
    a, b = np.linspace(1.0, 4.0, 8), rng.standard_normal(8)

    x = np.zeros(8)  # textbook linear CG
    r = b - a * x
    d, iterates = r.copy(), []
    for _ in range(8):
        alpha = (r @ r) / (d @ (a * d))
        x = x + alpha * d
        r_new = r - alpha * a * d
        d = r_new + (r_new @ r_new) / (r @ r) * d
        r = r_new
        iterates.append(x)

    def exact(p: np.ndarray, d: np.ndarray) -> float:
        return float((b - a * p) @ d / (d @ (a * d)))

    options = ref.Options(update=update, preconditioner=None)
    p, state = np.zeros(8), ref.initial_state(8, options)
    for expected in iterates:
        p, state = ref.nlcg_step(p, a * p - b, state, options, lr=exact)
        np.testing.assert_allclose(p, expected, atol=1e-10)
    np.testing.assert_allclose(p, b / a, atol=1e-10)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_no_curvature_update_where_ys_is_not_positive(sign: float) -> None:
    """sign 0: a constant gradient, y = 0; -1: a concave function, ys < 0."""
    p, g0 = np.array([1.0, 2.0]), np.array([1.0, -3.0])
    options = ref.Options(preconditioner="bfgs")
    state = ref.initial_state(2, options)
    for _ in range(3):
        p, state = ref.nlcg_step(p, g0 + sign * p, state, options, lr=0.1)
        assert not state.updated
        np.testing.assert_array_equal(state.diagonal, [1.0, 1.0])


def test_conjugacy() -> None:
    assert ref.conjugacy("fletcher_reeves", 4.0, 1.0, 99.0) == 0.25
    assert ref.conjugacy("polak_ribiere", 4.0, 3.0, 1.0) == 0.5
    assert ref.conjugacy("polak_ribiere", 4.0, 1.0, 3.0) == 0.0  # below
    assert ref.conjugacy("fletcher_reeves", 4.0, 9.0, 0.0) == 1.0  # above
    assert ref.conjugacy("fletcher_reeves", 0.0, 1.0, 0.0) == 0.0
    assert ref.conjugacy("fletcher_reeves", 1e-300, 1e300, 0.0) == 0.0  # not finite


def test_line_search_scale() -> None:
    thresholds = OnlineLineSearch()
    assert ref.line_search_scale(0.5, 1.021, 1.0, thresholds) == 0.5 * 0.975
    assert ref.line_search_scale(0.5, 1.009, 1.0, thresholds) == 0.5 * 1.025
    assert ref.line_search_scale(0.5, 1.015, 1.0, thresholds) == 0.5
    assert ref.line_search_scale(0.99, 0.5, 1.0, thresholds) == 1.0  # capped
    assert ref.line_search_scale(0.5, -0.97, -1.0, thresholds) == 0.5 * 0.975  # a negative loss that rises
    assert ref.line_search_scale(0.5, -1.2, -1.0, thresholds) == 0.5 * 1.025
    assert ref.line_search_scale(0.5, 7.0, None, thresholds) == 0.5


def test_a_nonfinite_gradient_changes_nothing_but_the_counter() -> None:
    options = ref.Options(line_search=OnlineLineSearch())
    p = np.ones(3)
    p, state = ref.nlcg_step(p, np.array([1.0, 2.0, 3.0]), ref.initial_state(3), options, lr=0.1, loss=1.0)
    p2, skipped = ref.nlcg_step(p, np.array([1.0, math.nan, 3.0]), state, options, lr=0.1, loss=2.0)
    assert p2 is p
    assert skipped.skipped_steps == 1
    assert (skipped.step, skipped.loss_prev, skipped.rz) == (state.step, state.loss_prev, state.rz)
    p3, _ = ref.nlcg_step(p, np.array([1.0, math.nan, 3.0]), state, ref.Options(nonfinite="propagate"), lr=0.1)
    assert np.isnan(p3[1])


def test_weight_decay_and_maximize() -> None:
    g, p = np.array([1.0, 2.0]), np.array([10.0, 20.0])
    np.testing.assert_array_equal(ref.effective_gradient(g, p, 0.1, False), [2.0, 4.0])
    np.testing.assert_array_equal(ref.effective_gradient(g, p, 0.1, True), [0.0, 0.0])


@pytest.mark.parametrize("options", [{}, {"update": "polak_ribiere"}, {"preconditioner": None}])
def test_minimize_reaches_the_minimum(options: dict) -> None:
    target = np.array([1.0, -2.0, 3.0])
    a = np.array([1.0, 3.0, 10.0])
    result = ref.minimize(
        lambda w: (float((w - target) @ (a * (w - target))) / 2, a * (w - target)),
        np.zeros(3),
        steps=300,
        lr=0.05,
        **options,
    )
    np.testing.assert_allclose(result.p, target, atol=1e-4)
    assert len(result.losses) == 300


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(ref)
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"p": np.ones((3, 1))}, ValueError, "p has shape"),
        ({"grad": np.ones(4)}, ValueError, "expected the same shape"),
        ({"grad": np.array(["a", "b", "c"])}, TypeError, "grad has dtype"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"lr": np.ones(4)}, ValueError, "lr has shape"),
        ({"weight_decay": np.full(3, np.nan)}, ValueError, "weight_decay has elements"),
        ({"active": np.ones(3)}, ValueError, "active has shape"),
    ],
)
def test_arguments_are_checked(changes: dict, error: type[Exception], match: str) -> None:
    given = {"p": np.ones(3), "grad": np.ones(3), "state": ref.initial_state(3), "lr": 0.1} | changes
    with pytest.raises(error, match=match):
        ref.nlcg_step(given.pop("p"), given.pop("grad"), given.pop("state"), **given)


def test_options_are_checked() -> None:
    for wrong in ({"update": "polak-ribiere"}, {"beta2": 2.0}, {"eps": -1.0}, {"preconditioner": "newton"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ref.Options(**wrong)
    with pytest.raises(ValueError, match="update must be"):
        ref.conjugacy("polak-ribiere", 1.0, 1.0, 1.0)
