"""From AdamW and back: the same moves where h does not change, and to first order where it does."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, decay_groups
from ranks import ranks
from test_distributed import loss_of, model, sharded, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BETAS = (0.9, 0.999)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((40, 7), (33,), (5,))]


def set_gradients(ps: list[nn.Parameter], t: int, *, constant_size: bool) -> None:
    """Of random signs; of one size per element, which keeps v, or of random sizes."""
    generator = torch.Generator().manual_seed(t)
    for p in ps:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = (
            noise.sign() * torch.linspace(0.1, 2.0, p.numel(), dtype=p.dtype).view_as(p) if constant_size else noise
        )


def adamw(ps: list[nn.Parameter], steps: int, *, constant_size: bool, **options: Any) -> torch.optim.AdamW:
    groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 3e-3, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, weight_decay=0.1, **options)
    for t in range(steps):
        set_gradients(ps, t, constant_size=constant_size)
        optimizer.step()
    return optimizer


def twin(ps: list[nn.Parameter], **options: Any) -> tuple[list[nn.Parameter], NLCG]:
    copies = [nn.Parameter(p.detach().clone()) for p in ps]
    held = {"update": "heavy_ball", "beta_max": BETAS[0]} | options
    return copies, NLCG([{"params": copies[:2]}, {"params": copies[2:]}], 1.0, **held)


@pytest.mark.parametrize(("constant_size", "tolerance"), [(True, 1e-10), (False, 0.05)])
def test_goes_on_as_adamw(constant_size: bool, tolerance: float) -> None:
    """And back. With gradients of one size the moves are AdamW's to rounding: 400 steps leave no bias in m."""
    ps = parameters()
    theirs = adamw(ps, 400, constant_size=constant_size)
    start = [p.detach().clone() for p in ps]
    qs, ours = twin(ps)
    ours.load_adamw_state_dict(theirs.state_dict())
    assert [group["lr"] for group in ours.param_groups] == pytest.approx([1e-4, 3e-4])
    assert [group["weight_decay"] for group in ours.param_groups] == pytest.approx([1.0, 2.0])
    for t in range(400, 405):
        for x, optimizer in ((ps, theirs), (qs, ours)):
            set_gradients(x, t, constant_size=constant_size)
            optimizer.step()
    for p, q, before in zip(ps, qs, start, strict=True):
        assert torch.linalg.vector_norm(p - q) <= tolerance * torch.linalg.vector_norm(p - before)
    assert all(ours.state[q]["step"] == 405 for q in qs)

    again = adamw([nn.Parameter(q.detach().clone()) for q in qs], 0, constant_size=True)
    again.load_state_dict(ours.adamw_state_dict(BETAS[0]))
    for group, other in zip(again.param_groups, theirs.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "lr", "weight_decay")} == {
            k: v for k, v in other.items() if k not in ("params", "lr", "weight_decay")
        }
        assert (group["lr"], group["weight_decay"]) == pytest.approx((other["lr"], other["weight_decay"]))
    for p, q in zip(ps, [q for group in again.param_groups for q in group["params"]], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = again.state[q][key], theirs.state[p][key]
            assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)
        assert again.state[q]["step"] == 405


def test_there_and_back_is_the_same_state() -> None:
    ps = parameters()
    theirs = adamw(ps, 20, constant_size=False)
    _, ours = twin(ps)
    ours.load_adamw_state_dict(theirs.state_dict())
    back = ours.adamw_state_dict(BETAS[0])["state"]
    for i, entry in theirs.state_dict()["state"].items():
        torch.testing.assert_close(back[i]["exp_avg"], entry["exp_avg"], rtol=1e-12, atol=1e-15)
        assert torch.equal(back[i]["exp_avg_sq"], entry["exp_avg_sq"])


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_conjugate_beta_begins_between_its_bounds(update: str) -> None:
    """rz of a gradient that nobody has kept: what v expects of it."""
    ps = parameters()
    theirs = adamw(ps, 300, constant_size=False)
    qs, ours = twin(ps, update=update)
    ours.load_adamw_state_dict(theirs.state_dict())
    set_gradients(qs, 300, constant_size=False)
    ours.step()
    assert 0.5 < ours.diagnostics().beta <= 0.9


def test_bfloat16_and_a_file() -> None:
    """State of bfloat16, as AdamW has it beside such parameters, becomes float32; a file is a file."""
    ps = parameters(torch.bfloat16)
    theirs = adamw(ps, 5, constant_size=False)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    qs, ours = twin(ps)
    ours.load_adamw_state_dict(torch.load(file, weights_only=True))
    assert {value.dtype for q in qs for key, value in ours.state[q].items() if key != "step"} == {torch.float32}
    set_gradients(qs, 5, constant_size=False)
    ours.step()
    assert ours.diagnostics().step == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda s: s["param_groups"][1].update(decoupled_weight_decay=False), "L2 weight decay"),
        (lambda s: s["param_groups"][0].pop("betas"), "not the state dict of torch.optim.AdamW"),
        (lambda s: s["state"][1].pop("exp_avg"), "state of parameter 1"),
        (lambda s: s["param_groups"].pop(), "expected"),
        (lambda s: s.pop("state"), "not a state dict"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: Any, words: str) -> None:
    ps = parameters()
    saved = copy.deepcopy(adamw(ps, 3, constant_size=False).state_dict())
    change(saved)
    _, ours = twin(ps)
    before = repr(ours.state_dict())
    with pytest.raises(ValueError, match=words):
        ours.load_adamw_state_dict(saved)
    assert repr(ours.state_dict()) == before


def test_only_adams_diagonal_is_adams() -> None:
    ps = parameters()
    saved = adamw(ps, 3, constant_size=False).state_dict()
    optimizer = NLCG([{"params": ps[:2]}, {"params": ps[2:]}], preconditioner="bfgs")
    for call in (lambda: optimizer.load_adamw_state_dict(saved), optimizer.adamw_state_dict):
        with pytest.raises(ValueError, match="another"):
            call()
    with pytest.raises(ValueError, match="beta1"):
        NLCG(ps).adamw_state_dict(1.0)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for t in range(begin, end):
        optimizer.zero_grad()
        loss_of(net, t, world, rank).backward()
        optimizer.step()


def switched(net: nn.Module) -> tuple[list[Tensor], float]:
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-3)
    steps(net, theirs, 0, 5)
    optimizer = NLCG(net.parameters())
    optimizer.load_adamw_state_dict(theirs.state_dict())
    rz = optimizer.diagnostics().rz
    steps(net, optimizer, 5, 8)
    placed = {isinstance(optimizer.state[p]["direction"], DTensor) for p in net.parameters()}
    assert placed == {isinstance(p, DTensor) for p in net.parameters()}
    return whole(net.parameters()), rz


def over_shards() -> tuple[list[Tensor], float]:
    return switched(sharded())


def test_shards_follow_one_process() -> None:
    """AdamW over FSDP2, then NLCG over the same shards."""
    expected, rz = switched(model())
    for found, other in ranks(2)(over_shards):
        assert other == pytest.approx(rz, rel=1e-4)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_decay_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    net[2].bias.requires_grad_(False)
    first, second = decay_groups(net, 0.1)
    assert [p.dim() for p in first["params"]] == [4, 2]
    assert [tuple(p.shape) for p in second["params"]] == [(4,), (4,), (4,), (4,)]
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    NLCG(decay_groups(net, 0.1), lr=1e-3)
