"""CGDescent over ranks: the trajectory is one process's, and all ranks take the same decisions, to the bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastnlcg import CGDescent
from rank_training import Gathers, loss_of, model, sharded, whole
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py
STEPS = 8


def descend(net: nn.Module, optimizer: CGDescent, steps: int, *, cheap: bool = False) -> list[Any]:
    """The loss, the length and beta of every step, and the evaluations it took."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def loss() -> Tensor:
        return loss_of(net, 0, world, rank)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    def alone() -> Tensor:
        with torch.no_grad():
            return loss()

    found = []
    for _ in range(steps):
        optimizer.step(closure, loss=alone if cheap else None)
        found.append(optimizer.diagnostics())
    return found


def one_process(preconditioner: str | None, *, cheap: bool = False) -> tuple[list[Tensor], list[Any]]:
    net = model(torch.float64)
    found = descend(net, CGDescent(net.parameters(), preconditioner=preconditioner), STEPS, cheap=cheap)
    return whole(net.parameters()), found


def check_follows(results: list[tuple[list[Tensor], list[Any]]], expected: tuple[list[Tensor], list[Any]]) -> None:
    """Ranks agree to the bit; with one process to rounding, which eight steps have not blown up."""
    for params, course in results:
        assert course == results[0][1]
        for a, b in zip(params, results[0][0], strict=True):
            assert torch.equal(a, b)
    for now, then in zip(results[0][1], expected[1], strict=True):
        assert now["evaluations"] == then["evaluations"]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-9)
        assert now["gradient_max"] == pytest.approx(then["gradient_max"], rel=1e-6)
        assert now["alpha"] == pytest.approx(then["alpha"], rel=1e-6)
    start = whole(model(torch.float64).parameters())
    for a, b, before in zip(results[0][0], expected[0], start, strict=True):
        assert torch.linalg.vector_norm(b - before) > 1e-3 * torch.linalg.vector_norm(before)
        assert torch.linalg.vector_norm(a - b) <= 1e-8 * torch.linalg.vector_norm(b)


def fsdp2(mesh: tuple[int, ...] | None, preconditioner: str | None, cheap: bool) -> tuple[list[Tensor], list[Any]]:
    net = sharded(mesh, torch.float64)
    optimizer = CGDescent(net.parameters(), preconditioner=preconditioner)
    found = descend(net, optimizer, STEPS, cheap=cheap)
    assert all(isinstance(x, DTensor) for p in net.parameters() for x in optimizer.state[p].values())
    return whole(net.parameters()), found


@pytest.mark.parametrize("preconditioner", ["bfgs", None])
@pytest.mark.parametrize(("world", "mesh"), [(2, None), (3, None), (4, (2, 2))])
def test_fsdp2_and_hsdp_follow_one_process(
    world: int, mesh: tuple[int, ...] | None, preconditioner: str | None
) -> None:
    check_follows(ranks(world)(fsdp2, mesh, preconditioner, False), one_process(preconditioner))


def test_the_loss_alone_is_averaged_too() -> None:
    check_follows(ranks(2)(fsdp2, None, "bfgs", True), one_process("bfgs", cheap=True))


def ddp() -> tuple[list[Tensor], list[Any], int, list[str]]:
    net = model(torch.float64)
    optimizer = CGDescent(net.parameters(), average_loss=True)
    with warnings.catch_warnings(record=True) as caught, Gathers() as gathers:
        warnings.simplefilter("always")
        found = descend(DistributedDataParallel(net), optimizer, STEPS)
    return whole(net.parameters()), found, gathers.count, [str(w.message) for w in caught if "line" in str(w.message)]


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_follows_one_process_with_one_exchange_per_evaluation(world: int) -> None:
    results = ranks(world)(ddp)
    check_follows([(params, course) for params, course, _, _ in results], one_process("kronecker"))
    for _, course, gathers, messages in results:
        assert gathers == course[-1]["evaluations"] + 1  # and one for the largest element at the start
        assert messages == []


def rotated(kind: str) -> tuple[list[Tensor], list[Any], list[bool]]:
    """Thirteen steps, of which the tenth changes the bases."""
    net = model(torch.float64) if kind == "ddp" else sharded(None, torch.float64)
    optimizer = CGDescent(net.parameters(), history=3, average_loss=True if kind == "ddp" else None)
    found = descend(DistributedDataParallel(net) if kind == "ddp" else net, optimizer, 13)
    turned = [
        not torch.equal(entry["basis_left"], torch.eye(len(entry["basis_left"]), dtype=torch.float64))
        for entry in optimizer.state.values()
        if "basis_left" in entry
    ]
    return whole(net.parameters()), found, turned


def test_ddp_rotates_alike_on_every_rank_and_a_sharded_matrix_is_not_rotated() -> None:
    net = model(torch.float64)
    expected = descend(net, CGDescent(net.parameters(), history=3), 13)
    for params, course, turned in (results := ranks(2)(rotated, "ddp")):
        assert course == results[0][1]
        assert all(map(torch.equal, params, results[0][0]))
        assert turned
        assert all(turned)
    assert results[0][1][-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-6)
    for params, course, turned in (results := ranks(2)(rotated, "fsdp2")):
        assert course == results[0][1]
        assert all(map(torch.equal, params, results[0][0]))
        assert turned == []


def warnings_of(average_loss: bool | None) -> list[str]:
    p = nn.Parameter(torch.ones(3))
    optimizer = CGDescent([p], average_loss=average_loss)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step(closure)
    return [f"{Path(w.filename).name}: {w.message}" for w in caught]


def test_one_ranks_loss_warns() -> None:
    for (message,) in ranks(2)(warnings_of, None):
        assert message.startswith("test_descent_ranks.py: the line search sees this rank's loss alone")
    assert ranks(2)(warnings_of, False) == ranks(2)(warnings_of, True) == [[], []]


def shares() -> tuple[list[Tensor], list[Any]]:
    """One flat parameter, of which every rank has a part, the last one none of the second."""
    world, rank = dist.get_world_size(), dist.get_rank()
    scale = torch.logspace(0, 2, 37, dtype=torch.float64)
    parts = [nn.Parameter(torch.full_like(part, 0.5)) for part in (scale.chunk(world)[rank], scale[: 3 * (rank == 0)])]
    scales = scale.chunk(world)[rank], scale[: 3 * (rank == 0)]
    optimizer = CGDescent(parts, process_group=dist.group.WORLD)

    def closure() -> float:
        mine = [0.5 * (s * (p - 1).square()).sum() for p, s in zip(parts, scales, strict=True)]
        for p, loss in zip(parts, mine, strict=True):
            p.grad = torch.autograd.grad(loss, p)[0]
        total = torch.stack(mine).sum().detach()
        dist.all_reduce(total)
        return float(total)

    found = []
    for _ in range(STEPS):
        optimizer.step(closure)
        found.append(optimizer.diagnostics())
    pieces: list[list[Tensor]] = [[] for _ in range(world)]
    dist.all_gather_object(pieces, [p.detach() for p in parts])
    return [torch.cat([piece[0] for piece in pieces]), pieces[0][1]], found


def test_plain_shards_follow_one_process() -> None:
    results, expected = ranks(3)(shares), ranks(1)(shares)
    for params, course in results:
        assert course == results[0][1]
        for a, b in zip(params, expected[0][0], strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=0.0)
    for now, then in zip(results[0][1], expected[0][1], strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-9)


def placed() -> tuple[list[Tensor], list[Any]]:
    """Sharded and replicated parameters in one optimizer: every element counts once."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    whole_ones = [torch.randn(6, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    params = [
        nn.Parameter(distribute_tensor(x, mesh, [placement]))
        for x, placement in zip(whole_ones, (Shard(0), Replicate()), strict=True)
    ]
    optimizer = CGDescent(params)

    def closure() -> float:
        loss = 0.0
        for k, p in enumerate(params):
            at = p.full_tensor().detach().requires_grad_()
            f = (torch.cosh(at) * (k + 1)).sum()
            (g,) = torch.autograd.grad(f, at)
            p.grad = distribute_tensor(g, mesh, p.placements)
            loss += float(f)
        return loss

    found = []
    for _ in range(STEPS):
        optimizer.step(closure)
        found.append(optimizer.diagnostics())
    return whole(params), found


def test_every_element_counts_once() -> None:
    results, expected = ranks(2)(placed), ranks(1)(placed)
    for params, course in results:
        assert course == results[0][1]
        for a, b in zip(params, expected[0][0], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert results[0][1][-1]["loss"] == pytest.approx(6 * 5 + 2 * 7, rel=1e-3)


def whole_state(optimizer: CGDescent) -> dict[str, Any]:
    """A copy; the entries of ``state_dict()`` are those of the optimizer."""
    state = optimizer.state_dict()
    whole = {
        i: {key: value.full_tensor().clone() for key, value in entry.items()} for i, entry in state["state"].items()
    }
    return {**state, "state": whole}


def saved() -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    net = sharded(None, torch.float64)
    optimizer = CGDescent(net.parameters())
    descend(net, optimizer, 3)
    at, state = whole(net.parameters()), whole_state(optimizer)
    descend(net, optimizer, 3)
    return at, state, whole(net.parameters())


def resumed(at: list[Tensor], state: dict[str, Any]) -> list[Tensor]:
    net = sharded(None, torch.float64)
    with torch.no_grad():
        for p, x in zip(net.parameters(), at, strict=True):
            p.copy_(distribute_tensor(x, p.device_mesh, p.placements))
    optimizer = CGDescent(net.parameters())
    optimizer.load_state_dict(state)
    descend(net, optimizer, 3)
    return whole(net.parameters())


def test_a_checkpoint_resumes_to_the_bit_and_reshards() -> None:
    at, state, end = ranks(2)(saved)[0]
    for found in ranks(2)(resumed, at, state):
        assert all(torch.equal(a, b) for a, b in zip(found, end, strict=True))
    for found in ranks(3)(resumed, at, state):
        assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(found, end, strict=True))


def network(shards: bool) -> nn.Module:
    return sharded(None, torch.float64) if shards else model(torch.float64)


def trained(shards: bool) -> tuple[nn.Module, CGDescent]:
    """Until the window of ratios is full, and the bases have changed."""
    net = network(shards)
    optimizer = CGDescent(net.parameters())
    descend(net, optimizer, 14)
    return net, optimizer


def write(how: str, folder: str, shards: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """A checkpoint by torch's utilities; the parameters three steps later, and the next step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    net, optimizer = trained(shards)
    options = {"dcp": {}, "flat": {"flatten_optimizer_state_dict": True}}
    whole_on_cpu = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(
        net, optimizer, options=StateDictOptions(**options[how]) if how in options else whole_on_cpu
    )
    if how in options:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    elif not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": state}, f"{folder}/whole.pt")
    found = descend(net, optimizer, 3)
    return whole(net.parameters()), found[0]


def read(how: str, folder: str, shards: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """What :func:`write` has written, into an optimizer that has stepped if it is read as a whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    net = network(shards)
    optimizer = CGDescent(net.parameters())
    if how in ("dcp", "flat"):
        options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        weights, state = get_state_dict(net, optimizer, options=options)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, planner=planner)
    else:
        descend(net, optimizer, 2)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=how == "broadcast")
        weights, state = {}, {}
        if how == "whole" or dist.get_rank() == 0:
            weights, state = torch.load(f"{folder}/whole.pt", weights_only=True).values()
        if dist.is_initialized():
            dist.barrier()
    set_model_state_dict(net, weights, options=options)
    set_optimizer_state_dict(net, optimizer, state, options=options)
    found = descend(net, optimizer, 3)
    return whole(net.parameters()), found[0]


WAYS = ["dcp", "flat", "whole", "broadcast"]


@pytest.mark.parametrize("how", WAYS)
def test_torchs_checkpoints_resume_to_the_bit_and_reshard(how: str, tmp_path: Path) -> None:
    end, step = ranks(2)(write, how, str(tmp_path), True)[0]
    for found, again in ranks(2)(read, how, str(tmp_path), True):
        assert again == step
        assert all(torch.equal(a, b) for a, b in zip(found, end, strict=True))
    for found, again in ranks(3)(read, how, str(tmp_path), True):
        assert again["evaluations"] == step["evaluations"]
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, end, strict=True))


@pytest.mark.parametrize("how", WAYS[:3])
def test_torchs_checkpoints_resume_one_process_to_the_bit(how: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: no process group
        end, step = write(how, str(tmp_path), False)
        found, again = read(how, str(tmp_path), False)
    assert again == step
    assert all(torch.equal(a, b) for a, b in zip(found, end, strict=True))


@pytest.mark.parametrize("how", WAYS[:3])
def test_one_process_continues_in_the_unrotated_basis_of_shards(how: str, tmp_path: Path) -> None:
    """With their h and their pairs."""
    end, step = ranks(2)(write, how, str(tmp_path), True)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: no process group
        found, again = read(how, str(tmp_path), False)
    assert again["evaluations"] == step["evaluations"]
    assert again["loss"] == pytest.approx(step["loss"], rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, end, strict=True))


@pytest.mark.parametrize("how", WAYS)
def test_shards_that_cannot_have_the_bases_start_again_where_they_are(how: str, tmp_path: Path) -> None:
    """On every rank alike: their elements of h, of the gradient and of the pairs say nothing without the bases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: no process group
        write("whole" if how == "broadcast" else how, str(tmp_path), False)
    net, _ = trained(False)
    first = descend(net, CGDescent(net.parameters(), preconditioner="bfgs"), 1)[0]
    for _, again in ranks(2)(read, how, str(tmp_path), True):
        assert again["loss"] == pytest.approx(first["loss"], rel=1e-9)


def disagree(what: str) -> tuple[str, bool]:
    net = sharded(None, torch.float64)
    optimizer = CGDescent(
        net.parameters(), beta="dai_yuan" if what == "an option" and dist.get_rank() else "hager_zhang"
    )
    before = [p.detach().to_local().clone() for p in net.parameters()]
    try:
        if what != "an option":
            descend(net, optimizer, 2)
            before = [p.detach().to_local().clone() for p in net.parameters()]
            if dist.get_rank() == 1:
                optimizer.restart()
        descend(net, optimizer, 2)
    except RuntimeError as error:
        same = all(torch.equal(p.detach().to_local(), b) for p, b in zip(net.parameters(), before, strict=True))
        return str(error), same
    return "", False


@pytest.mark.parametrize(("what", "words"), [("an option", "dai_yuan"), ("restart() on one", "not about to take")])
def test_ranks_that_disagree_all_raise_and_move_nothing(what: str, words: str) -> None:
    for message, same in ranks(2)(disagree, what):
        assert words in message
        assert same


def bad_rank() -> tuple[str, bool]:
    net = sharded(None, torch.float64)
    optimizer = CGDescent(net.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, 0, dist.get_world_size(), dist.get_rank())
        loss.backward()
        return loss * (float("nan") if dist.get_rank() == 1 else 1.0)

    before = [p.detach().to_local().clone() for p in net.parameters()]
    optimizer.step(closure)
    same = all(torch.equal(p.detach().to_local(), b) for p, b in zip(net.parameters(), before, strict=True))
    return optimizer.diagnostics()["message"], same


def test_a_nan_on_one_rank_moves_none() -> None:
    assert ranks(2)(bad_rank) == [("the loss or its gradient is not finite", True)] * 2
