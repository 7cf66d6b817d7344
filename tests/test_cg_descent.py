"""``CGDescent``: what torch's users know of ``torch.optim.LBFGS`` and of optimizers in general holds for it."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend, emulated_is_thorough
from fastnlcg import CGDescent, minimize
from fastnlcg.full_batch.descent_table import DescentTable
from network import closure_of, flat, problem
from torch import Tensor, nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", ["kronecker", "bfgs", None])
@pytest.mark.parametrize("history", [0, 10])
@emulated_is_thorough
def test_it_descends(cpu_or_emulated: Backend, history: int, preconditioner: str | None, dtype: torch.dtype) -> None:
    model, loss = problem(dtype, device=cpu_or_emulated.device)
    optimizer = CGDescent(model.parameters(), history=history, preconditioner=preconditioner)
    closure = closure_of(optimizer, loss)
    begin, losses = loss().item(), []
    for _ in range(60):
        optimizer.step(closure)
        losses.append(optimizer.diagnostics()["loss"])
    assert losses[-1] < 0.02 * begin
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    seen = optimizer.diagnostics()
    assert seen["iterations"] == 60
    assert seen["loss"] == losses[-1] == pytest.approx(loss().item(), rel=1e-6)
    sizes = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    elements = sum(p.numel() for p in model.parameters())
    rotated = preconditioner == "kronecker"
    vectors = elements * (3 + (preconditioner is not None) + 2 * history + rotated)
    weights = [p for p in model.parameters() if p.dim() == 2 and rotated]  # each with a bias: one column more
    sides = [side for p in weights for side in (p.shape[0], p.shape[1] + 1) if side > 1]
    assert sizes == (vectors + 2 * sum(side * side for side in sides)) * torch.empty((), dtype=dtype).element_size()


def test_one_parameter_has_the_bits_of_minimize() -> None:
    """The table of tensors and the flat buffers run the same passes."""
    x0 = torch.linspace(-1, 2, 50, dtype=torch.float64)
    fun = lambda x: ((x - 0.3) ** 4 + torch.cos(x)).sum()  # noqa: E731
    expected = minimize(fun, x0, maxiter=12, gtol=0.0)
    p = nn.Parameter(x0.clone())
    optimizer = CGDescent([p], max_iter=12, tolerance_grad=0.0)
    assert optimizer.step(closure_of(optimizer, lambda: fun(p)), loss=lambda: fun(p.detach())) == fun(x0)
    assert optimizer.diagnostics()["loss"] == expected.fun
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


def test_a_loaded_state_is_a_copy() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=0, preconditioner="bfgs")
    optimizer.step(closure_of(optimizer, loss))
    second = CGDescent(model.parameters(), history=0, preconditioner="bfgs")
    saved = optimizer.state_dict()
    second.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    for _ in range(3):
        second.step(closure_of(second, loss))
    assert all(torch.equal(a, before[i][key]) for i, entry in saved["state"].items() for key, a in entry.items())


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


@pytest.mark.parametrize("history", [0, 10])
def test_an_exception_leaves_the_point_where_the_search_began(history: int) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=history)
    closure = closure_of(optimizer, loss)
    for _ in range(3):
        optimizer.step(closure)
    before, calls = flat(model.parameters()), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (1 if history else 2):  # pairs need one evaluation here
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert torch.equal(flat(model.parameters()), before)
    reference_model, reference_loss = problem()
    other = CGDescent(reference_model.parameters(), history=history)
    other_closure = closure_of(other, reference_loss)
    for _ in range(4):
        other.step(other_closure)
    optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), flat(reference_model.parameters()))


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("history", [0, 10])
def test_an_interrupt_around_the_first_move_of_a_search_leaves_its_start(
    monkeypatch: pytest.MonkeyPatch, history: int, before: int
) -> None:
    """An interrupt may come before the pass that stores where a search starts, and right behind it."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=history)
    closure = closure_of(optimizer, loss)

    def interrupted(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    for _ in range(before):
        optimizer.step(closure)
    for where, name in ((torch.autograd.graph, "increment_version"), (DescentTable, "write_back")):
        start = flat(model.parameters())
        monkeypatch.setattr(where, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.equal(flat(model.parameters()), start)
    begin = loss().item()
    optimizer.step(closure)
    assert optimizer.diagnostics()["loss"] < begin


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
    assert optimizer.step(closure) == begin
    assert optimizer.diagnostics()["loss"] < begin


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

    assert optimizer.step(closure) == begin
    assert optimizer.diagnostics()["loss"] < begin
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


def test_a_run_continues_when_the_loss_is_finite_again() -> None:
    p = nn.Parameter(torch.tensor([1e20, 2e20]))  # the loss overflows, its gradient does not
    optimizer = CGDescent([p])
    closure = closure_of(optimizer, lambda: p.square().sum())
    for _ in range(2):
        assert optimizer.step(closure) == torch.tensor(math.inf)
    with torch.no_grad():
        p.mul_(1e-20)
    begin = optimizer.step(closure)
    assert isinstance(begin, Tensor)
    assert begin == pytest.approx(5.0)
    assert optimizer.diagnostics()["loss"] < 5.0


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
    assert optimizer.step(closure_of(optimizer, p.sum)) == 4.0
    assert optimizer.diagnostics()["loss"] < -1e6
    assert "without bound" in optimizer.diagnostics()["message"]


def test_errors_of_the_optimizer() -> None:
    p, half = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).half())
    optimizer = CGDescent([p])
    for error, match, call in (
        (TypeError, "closure must be callable", lambda: optimizer.step(None)),
        (TypeError, "loss must be callable", lambda: optimizer.step(lambda: 0.0, loss=3)),
        (RuntimeError, "no parameter that requires a gradient has", lambda: optimizer.step(lambda: p.detach().sum())),
        (TypeError, "closure must return the loss", lambda: optimizer.step(lambda: None)),
        (TypeError, "parameter 0 has dtype torch.float16", lambda: CGDescent([half])),
        (TypeError, "parameter 1 has dtype torch.float16", lambda: CGDescent([nn.Parameter(torch.ones(2)), half])),
        (TypeError, "parameter 2 has dtype torch.float16",
         lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1)), half]})),
        (TypeError, "max_iter", lambda: CGDescent([p], max_iter=1.0)),
        (ValueError, "max_eval", lambda: CGDescent([p], max_eval=0)),
        (ValueError, "tolerance_grad", lambda: CGDescent([p], tolerance_grad=-1.0)),
        (ValueError, "beta must be one of", lambda: CGDescent([p], beta="cd")),
        (ValueError, "empty", lambda: CGDescent([])),
        (ValueError, "not a state dict", lambda: optimizer.load_state_dict({})),
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
    damaged = copy.deepcopy(trained.state_dict())
    del damaged["state"][1]["hessian_diag"]
    with pytest.raises(ValueError, match="parameter 1 lacks .*hessian_diag"):
        trained.load_state_dict(damaged)
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


# ---- the lowest point ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_iter": 5}, {"max_eval": 2}, {"max_eval": 5, "max_iter": 9}])
@pytest.mark.parametrize("cheap", [False, True])
def test_no_point_evaluated_in_a_step_is_lower_than_where_it_ends(options: dict[str, int], cheap: bool) -> None:
    for seed in range(12):
        p = nn.Parameter(torch.empty(1 + seed % 3, dtype=torch.float64).uniform_(-6, 6))
        optimizer, seen = CGDescent([p], **options), []

        def fun(p: Tensor = p, seen: Any = seen) -> Tensor:
            t = p - 0.3
            value = (0.05 * t**2 - torch.cos(4 * t) + 0.4 * torch.sin(11 * t)).sum()
            seen.append(value.item())
            return value

        closure = closure_of(optimizer, fun)
        for _ in range(15):
            seen.clear()
            optimizer.step(closure, loss=(lambda fun=fun, p=p: fun(p.detach())) if cheap else None)
            assert optimizer.diagnostics()["loss"] <= min(seen) + 1e-11  # 2^-40 of the loss's size
            assert fun().item() == pytest.approx(optimizer.diagnostics()["loss"], abs=1e-13)


def test_float32_that_has_fallen_by_orders_of_magnitude_ends_a_step_at_its_lowest_point() -> None:
    p = nn.Parameter(torch.tensor([2.0, 0.1]))
    optimizer, seen = CGDescent([p]), []

    def fun() -> Tensor:
        value = 100 * (p[0] - 1) ** 2 + 1e-5 * (1 + torch.sin(4.792 * p[1] + 1.2414))
        seen.append(value.item())
        return value

    for _ in range(8):
        seen.clear()
        optimizer.step(closure_of(optimizer, fun))
        assert optimizer.diagnostics()["loss"] <= min(seen) * (1 + 2e-6)


# ---- what LBFGS's users expect ---------------------------------------------------------------------------------------


def test_step_returns_the_loss_before_it_as_lbfgs_does() -> None:
    kinds = {}
    for make in (CGDescent, functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=1)):
        model, loss = problem()
        optimizer = make(model.parameters())
        closure = closure_of(optimizer, loss)
        for _ in range(4):
            before = loss().item()
            value = optimizer.step(closure)
            assert value.item() == before
            kinds[make] = type(value), value.dtype, value.shape
        assert not (optimizer.step(closure).requires_grad and make is CGDescent)
    assert len(set(kinds.values())) == 1
    p = nn.Parameter(torch.ones(2))
    optimizer = CGDescent([p])

    def number() -> float:
        p.grad = 2 * p.detach()
        return float(p.detach().square().sum())

    assert type(optimizer.step(number)) is float


def test_a_closure_of_any_kind() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))

    class Closure:
        def __call__(self) -> Tensor:
            optimizer.zero_grad()
            loss = (p**2).sum().reshape(1)  # one element, one dimension
            loss.backward()
            return loss

    optimizer = CGDescent([p])
    assert optimizer.step(Closure()).shape == (1,)
    assert optimizer.step(functools.partial(Closure().__call__)).shape == (1,)
    for mode in (torch.no_grad(), torch.inference_mode()):
        p.data.fill_(1.0)
        optimizer = CGDescent([p])
        with mode:
            optimizer.step(Closure())
        assert optimizer.diagnostics()["loss"] < 2.0


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("cheap", [False, True])
def test_a_budget_of_few_evaluations_still_descends(limit: int, cheap: bool) -> None:
    model, loss = problem()
    optimizer, calls = CGDescent(model.parameters(), max_eval=limit), []
    inner = closure_of(optimizer, loss)

    def closure() -> Tensor:
        calls.append(0)
        return inner()

    begin = loss().item()
    for _ in range(200 // limit):
        calls.clear()
        optimizer.step(closure, loss=(lambda: loss().detach()) if cheap else None)
        assert len(calls) <= limit
    assert optimizer.diagnostics()["loss"] < (0.1 if limit > 1 else 0.7) * begin


def test_maximize_is_the_other_sign() -> None:
    model, loss = problem()
    twin, twin_loss = problem()
    up, down = CGDescent(model.parameters(), maximize=True), CGDescent(twin.parameters())
    climb, descend = closure_of(up, lambda: -loss()), closure_of(down, twin_loss)
    for _ in range(10):
        assert up.step(climb) == -down.step(descend)
        assert up.diagnostics()["loss"] == -down.diagnostics()["loss"]
        assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    with pytest.raises(TypeError, match="maximize must be a bool"):
        CGDescent(model.parameters(), maximize=1)


# ---- trainers --------------------------------------------------------------------------------------------------------


def test_groups_have_an_lr_that_nothing_reads() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert CGDescent([p]).param_groups[0]["lr"] == 1.0
    assert CGDescent([p], lr=0.01).param_groups[0]["lr"] == 0.01
    assert CGDescent([p], 0.5).param_groups[0]["lr"] == 0.5
    assert [g["lr"] for g in CGDescent([{"params": [p]}, {"params": [q], "lr": torch.tensor(2.0)}]).param_groups] == [
        1.0,
        2.0,
    ]
    for lr, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=r"lr must be|Invalid learning rate"):
            CGDescent([p], lr=lr)
    ends = []
    for lr in (1.0, 0.01):
        model, loss = problem()
        optimizer = CGDescent(model.parameters(), lr=lr)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(5):
                optimizer.step(closure_of(optimizer, loss))
        ends.append(flat(model.parameters()))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1.0),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
def test_a_scheduler_on_it_warns_once(scheduler: Callable[[CGDescent], Any]) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    schedule = scheduler(optimizer)
    closure = closure_of(optimizer, loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(6):
            value = optimizer.step(closure)
            schedule.step(*([value + k] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1
    assert "which nothing reads" in messages[0]
    assert caught[0].filename == __file__


def test_a_pickle_keeps_its_options() -> None:
    model, _ = problem()
    optimizer = CGDescent(model.parameters(), 0.3, maximize=True, max_eval=7)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["lr"] == 0.3
    assert (twin._maximize, twin._max_eval) == (True, 7)


def test_a_file_with_names_in_another_order_is_refused_and_wrappers_do_not_count() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.named_parameters())
    optimizer.step(closure_of(optimizer, loss))
    saved = optimizer.state_dict()
    backwards = CGDescent(reversed(list(model.named_parameters())))
    with pytest.raises(ValueError, match="param_names"):
        backwards.load_state_dict(saved)
    assert not backwards.state
    compiled = torch.compile(model, backend="eager")
    CGDescent(compiled.named_parameters()).load_state_dict(saved)
    fewer = CGDescent(list(model.parameters())[:2])
    with pytest.raises(ValueError, match=r"param_groups have \[4\] parameters, expected \[2\]"):
        fewer.load_state_dict(saved)
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    with pytest.raises(ValueError, match="the state of parameter 0 lacks"):
        optimizer.load_state_dict(adamw.state_dict())
