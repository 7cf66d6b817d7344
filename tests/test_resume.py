"""Saving and resuming an ``NLCG`` in every way that torch has, to the bit, and the state that is saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from backends import emulated_is_thorough
from fastnlcg import NLCG, OnlineLineSearch
from fastnlcg.tensors import groups
from test_nlcg import backward, bits, model, train
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("cpu_or_emulated")


OPTIONS = {"update": "polak_ribiere", "line_search": OnlineLineSearch(), "weight_decay": 1e-3}

STATE = {
    "adam": {"step", "exp_avg_sq", "direction"},
    "bfgs": {"step", "grad_prev", "hessian_diag", "direction"},
    None: {"step", "grad_prev", "direction"},
}


@pytest.mark.parametrize(
    ("options", "keys", "size"),
    [
        ({"preconditioner": "adam"}, STATE["adam"], 8),  # Adam's own
        ({"preconditioner": "adam", "update": "polak_ribiere"}, STATE["adam"] | {"grad_prev"}, 12),
        ({"preconditioner": "bfgs"}, STATE["bfgs"], 12),
        ({"preconditioner": None}, STATE[None], 8),
    ],
)
def test_bytes_of_state_per_parameter(options: dict, keys: set[str], size: int) -> None:
    p = nn.Parameter(torch.randn(10_000))
    optimizer = NLCG([p], 0.1, **options)
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert set(state) == keys
    assert sum(t.numel() * t.element_size() for t in state.values() if t.dim()) == size * p.numel()
    if "grad_prev" in keys:
        assert torch.equal(state["grad_prev"], p.grad)
    optimizer.param_groups[0]["preconditioner"] = None if options["preconditioner"] else "bfgs"
    with pytest.raises(ValueError, match="cannot change once there is"):  # a step needs what its state was made for
        optimizer.step()


def test_an_update_that_needs_other_state_is_refused() -> None:
    p = nn.Parameter(torch.randn(10))
    optimizer = NLCG([p], 0.1, preconditioner="adam")
    p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.param_groups[0]["update"] = "polak_ribiere"
    with pytest.raises(ValueError, match="grad_prev"):
        optimizer.step()
    optimizer.param_groups[0]["update"] = "fletcher_reeves"
    optimizer.step()


def through_a_file(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume_by_state_dict(net: nn.Module, optimizer: NLCG) -> tuple[nn.Module, NLCG]:
    new = model(next(net.parameters()).dtype)
    other = NLCG(new.parameters(), 0.9, preconditioner=optimizer.defaults["preconditioner"])
    weights, state = through_a_file((net.state_dict(), optimizer.state_dict()))
    new.load_state_dict(weights)
    other.load_state_dict(state)
    return new, other


def resume_mid_run(net: nn.Module, optimizer: NLCG) -> tuple[nn.Module, NLCG]:
    """Into an optimizer that has already stepped elsewhere."""
    new = model(next(net.parameters()).dtype)
    other = NLCG(new.parameters(), 0.9, preconditioner=optimizer.defaults["preconditioner"])
    train(new, other, 3, next(net.parameters()).dtype)
    new.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    return new, other


RESUME = {
    "state_dict": resume_by_state_dict,
    "mid_run": resume_mid_run,
    "deepcopy": lambda net, optimizer: copy.deepcopy((net, optimizer)),
    "pickle": lambda net, optimizer: pickle.loads(pickle.dumps((net, optimizer))),
}


@emulated_is_thorough
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", RESUME)
def test_resume_at_step_10_is_bit_exact(how: str, dtype: torch.dtype, preconditioner: str) -> None:
    net = model(dtype)
    optimizer = NLCG(net.parameters(), 0.1, **OPTIONS, preconditioner=preconditioner)
    train(net, optimizer, 10, dtype)
    new, other = RESUME[how](net, optimizer)
    ours, theirs = optimizer.state.values(), other.state.values()
    assert not {t.data_ptr() for s in ours for t in s.values()} & {t.data_ptr() for s in theirs for t in s.values()}
    assert train(net, optimizer, 10, dtype) == train(new, other, 10, dtype)
    assert bits(net) == bits(new)
    assert optimizer.diagnostics() == other.diagnostics()
    for p, q in zip(net.parameters(), new.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][key]), key
            assert value.dtype == torch.float64 if key == "step" or dtype == torch.float64 else torch.float32


def test_resume_with_a_frozen_parameter_knows_the_last_set(preconditioner: str) -> None:
    def frozen_run(steps: int, net: nn.Module, optimizer: NLCG) -> None:
        for _ in range(steps):
            loss = backward(net)
            net[0].bias.grad = None
            optimizer.step(loss=loss)

    net = model()
    optimizer = NLCG(net.parameters(), 0.1, preconditioner=preconditioner)
    train(net, optimizer, 3)
    frozen_run(3, net, optimizer)
    new, other = resume_by_state_dict(net, optimizer)
    ours, theirs = optimizer.diagnostics(), other.diagnostics()  # before another step, from what was saved
    for key in ("step", "rz", "beta", "ls_scale"):  # the norms are over all parameters then
        assert getattr(ours, key) == getattr(theirs, key)
    for n, o in ((net, optimizer), (new, other)):
        frozen_run(1, n, o)
        assert o.diagnostics().beta > 0  # the same set as before the checkpoint: no restart
        train(n, o, 3)
    assert bits(net) == bits(new)


def test_state_dict_of_an_optimizer_that_never_stepped(preconditioner: str) -> None:
    net = model()
    optimizer = NLCG(net.parameters(), 0.1, preconditioner=preconditioner)
    optimizer.load_state_dict(NLCG(net.parameters(), 0.2, preconditioner=preconditioner).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2
    train(net, optimizer, 2)


def test_hooks_see_the_steps_and_the_state(preconditioner: str) -> None:
    net, seen = model(), []
    optimizer = NLCG(net.parameters(), 0.1, preconditioner=preconditioner)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda _, sd: {**sd, "param_groups": copy.deepcopy(sd["param_groups"])})
    train(net, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post"]


def test_a_step_with_zero_gradients_and_lr_0_creates_all_state_and_moves_nothing(preconditioner: str) -> None:
    """What torch.distributed.checkpoint does before it loads."""
    net = model()
    before = bits(net)
    optimizer = NLCG(net.parameters(), torch.tensor(0.0), preconditioner=preconditioner)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    assert bits(net) == before
    assert all(set(optimizer.state[p]) == STATE[preconditioner] for p in net.parameters())


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)])
@pytest.mark.parametrize("options", [{}, {"update": "polak_ribiere", "line_search": OnlineLineSearch()}])
def test_reading_the_state_before_the_first_step_counts_nothing(
    options: dict, lr: float | Tensor, preconditioner: str
) -> None:
    """torch.distributed.checkpoint makes the state by a step of its own. The next ones are those of a run without it,
    to the bit; so are those of a run that loads what was read."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    runs = []
    for how in ("not read", "read", "loaded"):
        net = model()
        optimizer = NLCG(net.parameters(), lr, weight_decay=0.1, **options, preconditioner=preconditioner)
        if how != "not read":
            state = get_optimizer_state_dict(net, optimizer)
            assert set(state["state"]) == {name for name, _ in net.named_parameters()}
            assert all(entry["step"] == 0.0 for entry in state["state"].values())
            scalars = state["param_groups"][0]["scalars"]
            assert torch.equal(scalars.nan_to_num(), groups.new_scalars().nan_to_num())
        if how == "loaded":
            optimizer = NLCG(net.parameters(), lr, weight_decay=0.1, **options, preconditioner=preconditioner)
            set_optimizer_state_dict(net, optimizer, state)
        for _ in range(6):
            loss = backward(net)
            optimizer.step(loss=loss.detach())
        runs.append((bits(net), optimizer.diagnostics()))
    assert runs[0] == runs[1] == runs[2]


def test_other_steps_that_move_nothing_count(preconditioner: str) -> None:
    """A warm-up that begins at 0, whose first gradient is one; gradients of zero at a rate; and both later on."""
    for lr, scale, first in ((0.0, 1.0, True), (0.1, 0.0, True), (0.0, 0.0, False)):
        net = model()
        optimizer = NLCG(net.parameters(), 0.1, preconditioner=preconditioner)
        if not first:
            train(net, optimizer, 1)
        optimizer.param_groups[0]["lr"] = lr
        backward(net)
        for p in net.parameters():
            p.grad.mul_(scale)
        optimizer.step()
        assert optimizer.diagnostics().step == 2 - first
        assert all(optimizer.state[p]["step"] == 2 - first for p in net.parameters())


def test_distributed_checkpoint_takes_the_state_dict(preconditioner: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flatten in (False, True):
        net, new = model(), model()
        optimizer, other = (
            NLCG(net.parameters(), 0.1, preconditioner=preconditioner),
            NLCG(new.parameters(), 0.1, preconditioner=preconditioner),
        )
        train(net, optimizer, 4)
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        state = get_optimizer_state_dict(net, optimizer, options=options)
        new.load_state_dict(net.state_dict())
        set_optimizer_state_dict(new, other, state, options=options)
        train(net, optimizer, 3)
        train(new, other, 3)
        assert bits(net) == bits(new)
