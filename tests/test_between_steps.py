"""What a user may change between two steps: weights, storage, state, groups and which parameters have gradients."""

from __future__ import annotations

import copy
import math

import backends
import pytest
import torch
from fastnlcg import NLCG
from quadratic import DIAGONAL, one_step, parameter, quadratic_gradients, stepped
from torch import nn


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_parameters_new_storage_is_followed(preconditioner: str) -> None:
    """Also with other strides, possibly at the same address."""
    ps, optimizer = stepped(preconditioner=preconditioner)
    qs, expected = stepped(preconditioner=preconditioner)
    for p in ps:
        p.data = p.data.clone()
    one_step(ps, optimizer)
    one_step(qs, expected)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))

    ps[1].data = ps[1].data.t().contiguous().t()  # other strides: state follows by index
    one_step(ps, optimizer)
    one_step(qs, expected)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
        key = DIAGONAL[preconditioner]
        torch.testing.assert_close(optimizer.state[p][key], expected.state[q][key])


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_parameter_of_another_shape_is_refused(preconditioner: str) -> None:
    ps, optimizer = stepped(preconditioner=preconditioner)
    ps[0].data = torch.ones(21)
    ps[0].grad = torch.ones(21)
    with pytest.raises(RuntimeError, match="parameter 0 .*shape"):
        optimizer.step()


def test_a_model_may_become_double() -> None:
    ps, optimizer = stepped()
    for p in ps:
        p.data = p.data.double()
    one_step(ps, optimizer)
    assert all(s["direction"].dtype == torch.float64 for s in optimizer.state.values())
    assert optimizer.diagnostics().step == 4


@pytest.mark.usefixtures("cpu_or_emulated")
def test_weights_may_be_edited(preconditioner: str) -> None:
    p = parameter(200)
    optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
    largest = p.abs().max()
    for t in range(100):
        if t % 10 == 5:
            with torch.no_grad():
                p.neg_().add_(0.1)
        one_step([p], optimizer)
        assert p.abs().max() < 2 * largest + 1


def test_state_set_by_hand_is_taken() -> None:
    ps, optimizer = stepped()
    qs, other = stepped()
    zero = torch.zeros_like(ps[0])
    optimizer.state[ps[0]]["direction"] = zero  # another tensor
    other.state[qs[0]]["direction"].zero_()  # in place
    one_step(ps, optimizer)
    one_step(qs, other)
    assert torch.equal(ps[0], qs[0])
    assert torch.equal(optimizer.state[ps[0]]["direction"], other.state[qs[0]]["direction"])
    optimizer.state[ps[1]] = {}  # starts again
    one_step(ps, optimizer)
    assert optimizer.state[ps[1]]["step"] == 1
    assert optimizer.diagnostics().beta == 0.0


@pytest.mark.usefixtures("cpu_or_emulated")
def test_state_cleared_by_hand_starts_again(preconditioner: str) -> None:
    ps, optimizer = stepped(preconditioner=preconditioner)
    optimizer.state.clear()
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    expected = NLCG(qs, 0.1, preconditioner=preconditioner)
    for _ in range(3):
        one_step(ps, optimizer)
        one_step(qs, expected)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.usefixtures("cpu_or_emulated")
def test_another_set_of_gradients_restarts_the_direction_and_keeps_h(preconditioner: str) -> None:
    """A late first gradient, freezing, unfreezing and add_param_group: beta is 0 in that step, and h is kept."""
    ps = [parameter(20, seed=1), parameter(3, 4, seed=2), parameter(7, seed=3)]
    optimizer = NLCG(ps[:2], 0.1, preconditioner=preconditioner)

    def step(active: list[int]) -> None:
        for i, p in enumerate(ps):
            p.grad = None
            if i in active:
                quadratic_gradients([p])
        optimizer.step()

    for active in ([0], [0], [0, 1], [0, 1], [1], [1], [0, 1], [0, 1]):
        resting = [i for i in (0, 1) if i not in active and optimizer.state.get(ps[i])]
        kept = {i: copy.deepcopy(optimizer.state[ps[i]]) for i in resting}
        weights = {i: ps[i].detach().clone() for i in resting}
        before = optimizer.diagnostics()
        h = optimizer.state[ps[0]][DIAGONAL[preconditioner]].clone() if before.step else None
        step(active)
        after = optimizer.diagnostics()
        assert all(torch.equal(ps[i], w) for i, w in weights.items())
        assert all(torch.equal(optimizer.state[ps[i]][k], v) for i, s in kept.items() for k, v in s.items())
        if before.step and after.beta == 0.0 and preconditioner == "bfgs":
            assert torch.equal(optimizer.state[ps[0]]["hessian_diag"], h)
    assert after.beta > 0
    optimizer.add_param_group({"params": [ps[2]], "lr": 0.05})
    step([0, 1, 2])
    assert optimizer.diagnostics().beta == 0.0
    if preconditioner == "adam":  # bias-corrected by its own count: h = |g|
        torch.testing.assert_close(optimizer.state[ps[2]]["direction"], -ps[2].grad.sign())
    else:
        assert torch.equal(optimizer.state[ps[2]]["direction"], -ps[2].grad)  # h = 1
    step([0, 1, 2])
    assert optimizer.diagnostics().beta > 0
    assert optimizer.diagnostics().updated


@pytest.mark.filterwarnings("ignore:in .* other parameters had gradients")  # a GPU's host does not know of the skips
def test_many_skipped_sets_do_not_forget_the_last_one(cpu_or_emulated: backends.Backend) -> None:
    ps = [parameter(3, seed=k) for k in range(8)]
    optimizer = NLCG(ps, 0.01)
    for _ in range(2):
        one_step(ps, optimizer)
    for k in range(1, 200):  # other sets, all skipped
        for i, p in enumerate(ps):
            p.grad = torch.full((3,), math.nan) if k >> i & 1 else None
        optimizer.step()
    one_step(ps, optimizer)
    assert optimizer.diagnostics().beta > 0


@pytest.mark.usefixtures("cpu_or_emulated")
def test_groups_that_go_and_come_back(preconditioner: str) -> None:
    ps = [parameter(3), parameter(4)]
    optimizer = NLCG([{"params": [ps[0]]}, {"params": [ps[1]]}], 0.1, preconditioner=preconditioner)
    quadratic_gradients(ps)
    groups, optimizer.param_groups = optimizer.param_groups, optimizer.param_groups[:1]
    optimizer.step()  # the optimizer cannot tell this from a deletion
    assert optimizer.diagnostics().direction_norm == pytest.approx(ps[0].grad.norm().item(), rel=1e6)
    assert ps[1] not in optimizer.state
    optimizer.param_groups = groups
    optimizer.step()
    assert optimizer.diagnostics().beta == 0.0  # another set


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_step_before_any_gradient_does_nothing(preconditioner: str) -> None:
    """As with torch's optimizers. Also with a closure, and after a load."""
    ps, optimizer = stepped(preconditioner=preconditioner)
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    other = NLCG(qs, 0.1, preconditioner=preconditioner)
    other.step()
    assert other.step(lambda: 3.0) == 3.0
    assert not other.state
    assert other.diagnostics().step == 0
    other.load_state_dict(copy.deepcopy(other.state_dict()))  # without state
    other.step()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # with state
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert other.diagnostics().step == 3
    for _ in range(2):
        one_step(ps, optimizer)
        one_step(qs, other)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("before", [0, 3])
def test_a_new_group_without_gradients_changes_nothing(before: int, preconditioner: str) -> None:
    """The other groups are stepped as without it; likewise with an empty group."""
    ps, optimizer = [parameter(20, seed=1)], None
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    optimizer, expected = NLCG(ps, 0.1, preconditioner=preconditioner), NLCG(qs, 0.1, preconditioner=preconditioner)
    for _ in range(before):
        one_step(ps, optimizer)
        one_step(qs, expected)
    late = parameter(7, seed=3)
    optimizer.add_param_group({"params": [late], "lr": 0.05})
    optimizer.add_param_group({"params": []})
    for _ in range(3):
        one_step(ps, optimizer)
        one_step(qs, expected)
    assert torch.equal(ps[0], qs[0])
    assert optimizer.diagnostics() == expected.diagnostics()
    kept = late.detach().clone()
    one_step([*ps, late], optimizer)
    assert optimizer.diagnostics().beta == 0.0
    assert not torch.equal(late, kept)
