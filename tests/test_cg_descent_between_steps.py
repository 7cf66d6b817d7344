"""What happens to ``CGDescent`` between two steps: layers are frozen, parameters written, data changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastnlcg import CGDescent
from network import closure_of, flat, problem
from torch import Tensor, nn

# ---- who takes part --------------------------------------------------------------------------------------------------


def freeze_nothing(layer: nn.Module) -> None:
    """The gradient of a branch that is no longer taken is None."""


def freeze(layer: nn.Module) -> None:
    layer.requires_grad_(False)


def freeze_and_clear(layer: nn.Module) -> None:
    for p in layer.requires_grad_(False).parameters():
        p.grad = None


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize("options", [{}, {"max_iter": 3}, {"max_eval": 3}])
@pytest.mark.parametrize("how", [freeze_nothing, freeze, freeze_and_clear])
def test_a_layer_without_a_gradient_does_not_move_a_bit(
    how: Callable[[nn.Module], None], options: dict[str, int], preconditioner: str | None
) -> None:
    model, _ = problem()
    x = torch.rand(100, 2, dtype=torch.float64)
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    through: list[Any] = [model]
    optimizer = CGDescent(model.parameters(), preconditioner=preconditioner, **options)
    closure = closure_of(optimizer, lambda: ((through[0](x) - y) ** 2).mean())
    for _ in range(15):
        optimizer.step(closure)
    layer = model[0]
    how(layer)
    if how is freeze_nothing:
        through[0] = lambda x: model[2](torch.tanh(x @ torch.ones(2, 16, dtype=torch.float64)))
        optimizer.restart()  # another function
    before = [p.detach().clone() for p in layer.parameters()]
    other = model[2].weight.detach().clone()
    losses = []
    for _ in range(15):
        optimizer.step(closure)
        losses.append(optimizer.diagnostics()["loss"])
        assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))
    assert not torch.equal(model[2].weight, other)
    assert losses[-1] <= losses[0]
    layer.requires_grad_(True)
    through[0] = model
    if how is freeze_nothing:
        optimizer.restart()
    for _ in range(20):
        optimizer.step(closure)
    assert not torch.equal(layer.weight, before[0])  # takes part again
    assert optimizer.diagnostics()["loss"] < losses[-1]


def test_a_branch_not_taken_at_a_trial_point_has_gradient_zero() -> None:
    """Which does not end the step: at the point where it began the branch was taken."""
    p, q = (nn.Parameter(torch.tensor([2.0], dtype=torch.float64)) for _ in range(2))
    optimizer = CGDescent([p, q], max_iter=10)

    def loss() -> Tensor:
        value = (p - 1).square().sum()
        return value + (q - p.detach()).square().sum() if p.item() > 1.5 else value

    closure = closure_of(optimizer, loss)
    for _ in range(10):
        optimizer.step(closure)
    assert p.item() == pytest.approx(1.0, abs=1e-6)


def test_a_frozen_layer_stays_frozen_over_a_checkpoint() -> None:
    def start() -> tuple[nn.Module, CGDescent, Callable[[], Tensor]]:
        model, loss = problem()
        optimizer = CGDescent(model.parameters())
        return model, optimizer, closure_of(optimizer, loss)

    model, optimizer, closure = start()
    for _ in range(5):
        optimizer.step(closure)
    model[0].requires_grad_(False)
    for _ in range(5):
        optimizer.step(closure)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    second, resumed, second_closure = start()
    second[0].requires_grad_(False)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(5):
        assert optimizer.step(closure) == resumed.step(second_closure)
        assert torch.equal(flat(model.parameters()), flat(second.parameters()))
    assert optimizer.diagnostics()["evaluations"] == resumed.diagnostics()["evaluations"]


@pytest.mark.parametrize("history", [0, 10])
def test_a_frozen_layer_with_a_gradient_of_zeros_does_not_move(history: int) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=history)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = loss()
        value.backward()
        return value

    for k in range(10):
        if k == 5:
            before = flat(model[0].requires_grad_(False).parameters())
        optimizer.step(closure)
    assert torch.equal(flat(model[0].parameters()), before)


def delete_a_group(optimizer: CGDescent) -> None:
    del optimizer.param_groups[1]


def delete_the_first_group(optimizer: CGDescent) -> None:
    del optimizer.param_groups[0]


def delete_a_parameter(optimizer: CGDescent) -> None:
    del optimizer.param_groups[0]["params"][1]


def reverse_groups(optimizer: CGDescent) -> None:
    optimizer.param_groups.reverse()


def replace_a_group(optimizer: CGDescent) -> None:
    optimizer.param_groups[0] = {"params": optimizer.param_groups[0]["params"][:1]}


@pytest.mark.parametrize("options", [{}, {"history": 0, "preconditioner": "bfgs"}])
@pytest.mark.parametrize(
    "edit", [delete_a_group, delete_the_first_group, delete_a_parameter, reverse_groups, replace_a_group]
)
def test_groups_may_be_edited_between_steps(edit: Callable[[CGDescent], None], options: dict[str, Any]) -> None:
    model, loss = problem()
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in ((model[0], 1.0), (model[2], 0.5))]
    optimizer = CGDescent(groups, **options)
    for _ in range(12):
        optimizer.step(closure_of(optimizer, loss))
    edit(optimizer)
    left = {id(p) for group in optimizer.param_groups for p in group["params"]}
    out = [p for p in model.parameters() if id(p) not in left]
    begin, start = loss().item(), [p.detach().clone() for p in out]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(closure_of(optimizer, loss)).item() == begin
        for _ in range(12):
            optimizer.step(closure_of(optimizer, loss))
    assert optimizer.diagnostics()["loss"] == pytest.approx(loss().item(), rel=1e-12)
    assert loss().item() < begin
    assert all(torch.equal(p, q) for p, q in zip(out, start, strict=True))
    if not out:  # torch has no state dict while state has a parameter that no group has
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("options", [{}, {"history": 0, "preconditioner": "bfgs"}])
def test_parameters_may_be_of_another_kind_between_steps(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 1))
    x = torch.rand(20, 2, 4, 4, dtype=torch.float64)
    optimizer = CGDescent(model.parameters(), **options)

    def loss() -> Tensor:
        y = x.to(model[3].weight.dtype)
        return (model(y) - y.square().mean((1, 2, 3)).unsqueeze(1)).square().mean()

    for change in (lambda: model, model.double, model.float, lambda: model.to(memory_format=torch.channels_last)):
        change()
        begin = loss().item()
        for _ in range(12):
            optimizer.step(closure_of(optimizer, loss))
        assert loss().item() < begin


# ---- who else writes -------------------------------------------------------------------------------------------------


def clamp(p: nn.Parameter) -> None:
    p.data.clamp_(max=0.8)


def replace(p: nn.Parameter) -> None:
    p.data = p.data * 0.9


def copy_in(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.copy_(p * 1.1)


def permute(p: nn.Parameter) -> None:
    p.data.copy_(p.data.flip(0))


def one_element(p: nn.Parameter) -> None:
    p.data[3] += 1e-3


def through_numpy(p: nn.Parameter) -> None:
    p.detach().numpy()[:5] = 0.1


def without_a_version(p: nn.Parameter) -> None:
    """As a collective writes (torch 2.13)."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
        p.mul_(0.5)


@pytest.mark.parametrize("write", [clamp, replace, copy_in, permute, one_element, through_numpy, without_a_version])
@pytest.mark.parametrize("gaps", [False, True])
def test_whatever_writes_a_parameter_between_steps_is_seen(write: Callable[[nn.Parameter], None], gaps: bool) -> None:
    """The step begins at the new point: two evaluations more at the most, the loss of before is not gone on from, and
    no warning says that the loss does not repeat."""
    torch.manual_seed(0)
    room = torch.rand(60, dtype=torch.float64)
    p = nn.Parameter(room[::2] if gaps else room[:30].clone())
    k = torch.logspace(0, 2, 30, dtype=torch.float64)
    optimizer, calls = CGDescent([p], tolerance_grad=0.0), []

    def loss() -> Tensor:
        return (k * (p - torch.linspace(0, 1, 30, dtype=torch.float64)) ** 2 + torch.cos(3 * p)).sum()

    inner = closure_of(optimizer, loss)

    def closure() -> Tensor:
        calls.append(0)
        return inner()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            optimizer.step(closure)
            write(p)
            begin = loss().item()
            calls.clear()
            assert optimizer.step(closure).item() == begin
            assert optimizer.diagnostics()["loss"] < begin
            assert len(calls) <= 12


def test_a_projection_after_every_step_converges() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    target = torch.tensor([2.0, 0.5, -3.0, 0.1], dtype=torch.float64)
    optimizer, calls = CGDescent([p]), []

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        loss = (torch.tensor([1.0, 5.0, 2.0, 9.0], dtype=torch.float64) * (p - target) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
        p.data.clamp_(-1, 1)
    assert torch.allclose(p.detach(), target.clamp(-1, 1), atol=1e-3)
    assert len(calls) <= 6 * 60  # the count was 61,911 for a problem of this kind


def test_a_file_of_another_point_is_seen() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    closure = closure_of(optimizer, loss)
    for _ in range(5):
        optimizer.step(closure)
    other, other_loss = problem(seed=1)
    second = CGDescent(other.parameters())
    second.load_state_dict(optimizer.state_dict())
    begin = other_loss().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert second.step(closure_of(second, other_loss)) == begin
    assert second.diagnostics()["loss"] < begin


# ---- a function that changes -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the loss does not repeat")
@pytest.mark.parametrize("options", [{}, {"max_iter": 20}, {"max_eval": 4}])
def test_data_that_change_between_steps_are_noticed(options: dict[str, int]) -> None:
    """As torch.optim.LBFGS, which evaluates first: no step continues from the loss of other data."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer, calls = CGDescent([p], **options), []
    target = torch.zeros(6, dtype=torch.float64)

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        loss = ((p - target) ** 4 + (p - target) ** 2).sum()
        loss.backward()
        return loss

    for k in range(12):
        target = torch.full((6,), float((-1) ** k) * (1 + k), dtype=torch.float64)
        begin = ((p - target) ** 4 + (p - target) ** 2).sum().item()
        calls.clear()
        for _ in range(12):
            optimizer.step(closure)
        assert optimizer.diagnostics()["loss"] < 0.05 * begin
        assert len(calls) <= 60 * options.get("max_iter", 1)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"history": 0}, {"preconditioner": "bfgs", "history": 0}, {"preconditioner": None}]
)
@pytest.mark.parametrize("before", [1, 40])
def test_data_that_change_are_noticed_by_a_few_steps_of_few_evaluations(
    before: int, options: dict[str, Any], limit: int
) -> None:
    model, _ = problem()
    optimizer, shift = CGDescent(model.parameters(), max_eval=limit, **options), 0.0
    x = torch.rand(50, 2, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(x) - torch.sin(2 * x.sum(1, keepdim=True)) - shift).square().mean()

    for _ in range(before):
        optimizer.step(closure_of(optimizer, loss))
    shift = 3.0
    begin = loss().item()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(60):
            optimizer.step(closure_of(optimizer, loss))
    assert ["does not repeat" in str(one.message) for one in seen] == [True]
    assert optimizer.diagnostics()["loss"] == pytest.approx(loss().item(), rel=1e-9)
    assert loss().item() < 0.2 * begin


def test_a_step_where_nothing_was_found_costs_one_evaluation() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer, calls = CGDescent([p]), []
    wrong = -2.0  # the sign of the gradient

    def closure() -> Tensor:
        calls.append(0)
        p.grad = wrong * p.detach()
        return (p.detach() ** 2).sum()

    for _ in range(2):  # the second is where one point is evaluated twice
        optimizer.step(closure)
    for _ in range(5):
        calls.clear()
        assert optimizer.step(closure) == 4.0
        assert len(calls) == 1
        assert "no step length" in optimizer.diagnostics()["message"]
    wrong = 2.0
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.diagnostics()["loss"] < 1e-6


def test_a_step_after_the_tolerance_was_met_looks_once() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer, calls = CGDescent([p], max_iter=100), []
    target = 0.0

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 1
    assert "tolerance_grad" in optimizer.diagnostics()["message"]
    target = 5.0
    with pytest.warns(UserWarning, match="does not repeat"):
        optimizer.step(closure)
    assert torch.allclose(p.detach(), torch.full_like(p, 5.0))
