"""Parameters as DTensors, by FSDP2, HSDP and tensor parallelism: the trajectory is the one of one process, and replicas
are equal to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG
from rank_training import (
    KINDS,
    STEPS,
    Gathers,
    alone,
    compare,
    compare_diagnostics,
    gradients,
    loss_of,
    model,
    optimizer_of,
    shapes,
    sharded,
    train,
    whole,
)
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py


def fsdp2(kind: str, mesh_shape: tuple[int, ...] | None, backend: str = "cpu") -> tuple[list[Tensor], Any, int, str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        net = sharded(mesh_shape)
        optimizer = optimizer_of(net.parameters(), kind)
        train(net, optimizer, 0, 1)
        train(net, optimizer, 1, STEPS - 1)
        world, rank = dist.get_world_size(), dist.get_rank()
        optimizer.zero_grad()
        loss = loss_of(net, STEPS - 1, world, rank)
        loss.backward()
        with Gathers() as gathers:
            optimizer.step(loss=loss.detach())
        for p in net.parameters():
            state = optimizer.state[p]
            assert state["step"] == STEPS
            for key in ("direction", "grad_prev", "hessian_diag", "exp_avg_sq"):
                if key in state:
                    assert type(state[key]) is DTensor
                    assert state[key].placements == p.placements
                    assert state[key].shape == p.shape
        streams = [s.to_local() for p in net.parameters() for s in optimizer.state[p].values() if s.ndim]
        shards = repr([p.to_local() for p in net.parameters()] + streams)
        return whole(net.parameters()), optimizer.diagnostics(), gathers.count, shards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_fsdp2_follows_one_process(world: int, kind: str) -> None:
    expected, optimizer = alone(kind)
    results = ranks(world)(fsdp2, kind, None)
    for found, diagnostics, gathers, _ in results:
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-3)
        # one more if the gradient is clipped, or was in the step before
        assert (diagnostics.clip < 1.0) == ("max_grad_norm" in KINDS[kind])
        assert gathers == (2 if KINDS[kind].get("preconditioner") == "bfgs" else 1) + (diagnostics.clip < 1.0)
        assert diagnostics == results[0][1]


@pytest.mark.parametrize("kind", ["adam", "bfgs_pr", "search"])
@pytest.mark.parametrize("mesh_shape", [(2, 2), *backends.thorough((4, 1), (1, 4))])  # those have one real dimension
def test_hsdp_follows_one_process_and_replicas_are_bit_equal(mesh_shape: tuple[int, int], kind: str) -> None:
    expected, optimizer = alone(kind)
    results = ranks(4)(fsdp2, kind, mesh_shape)
    by_shard: dict[int, set[str]] = {}
    for rank, (found, diagnostics, gathers, shards) in enumerate(results):
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-3)
        by_shard.setdefault(rank % mesh_shape[1], set()).add(shards)
        spread = mesh_shape[1] > 1
        assert gathers == ((2 if kind != "adam" else 1) if spread else int(kind == "search"))
    assert all(len(replicas) == 1 for replicas in by_shard.values())


# The exchange is the CPU's, except for the kernel that decides, which Adam's runs take as well.
KINDS_ON_THE_EMULATED_GPU = ["adam", "adam_pr", "adam_clip", *backends.thorough("bfgs", "bfgs_clip", "none", "search")]


@pytest.mark.skipif(not backends.EMULATION, reason=backends.NO_EMULATION)
@pytest.mark.parametrize("kind", KINDS_ON_THE_EMULATED_GPU)
def test_fsdp2_on_the_emulated_gpu(kind: str) -> None:
    expected, optimizer = alone(kind)
    for found, diagnostics, gathers, _ in ranks(3)(fsdp2, kind, None, "emulated"):
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-3)
        passes = (3 if KINDS[kind].get("preconditioner") == "bfgs" else 2) + ("max_grad_norm" in KINDS[kind])
        assert gathers == passes - 1
        assert diagnostics.launches == 2 * passes - 1  # the passes, and a decision after each but the last


# ---- other placements ------------------------------------------------------------------------------------------------


def placed(kind: str) -> tuple[list[Tensor], Any]:
    """A mesh of 2 x 2: parameters over both dimensions, over one, over none, and plain ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    placements = [
        (mesh, (Shard(0), Shard(1))),
        (mesh, (Replicate(), Shard(0))),
        (mesh, (Shard(1), Replicate())),
        (mesh, (Replicate(), Replicate())),
        (mesh["data"], (Shard(0),)),
        None,
    ]
    params, starts = [], shapes()
    for start, place in zip(starts, placements, strict=True):
        params.append(nn.Parameter(start if place is None else distribute_tensor(start, *place)))
    optimizer = optimizer_of(params, kind)
    for t in range(STEPS):
        for p, g in zip(params, gradients(whole(params), t), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()
    return whole(params), optimizer.diagnostics()


def tensor_parallel(kind: str) -> tuple[list[Tensor], Any]:
    """Column- and row-wise layers over two ranks, sharded over two more (_StridedShard where both cut dimension 0); and
    a layer without a plan, which fully_shard puts on a mesh of one dimension."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    net = even_model()
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for k in (0, 2, 4):
        fully_shard(net[k], mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])
    optimizer = optimizer_of(net.parameters(), kind)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, t, 2, mesh.get_coordinate()[0])
        loss.backward()
        optimizer.step(loss=loss.detach())
    return whole(net.parameters()), optimizer.diagnostics()


def even_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("kind", ["adam", "bfgs_pr", "search"])
def test_tensor_parallel_and_fsdp2(kind: str) -> None:
    net = even_model()
    optimizer = optimizer_of(net.parameters(), kind)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, t)
        loss.backward()
        optimizer.step(loss=loss.detach())
    results = ranks(4)(tensor_parallel, kind)
    for found, diagnostics in results:
        compare(found, whole(net.parameters()), [p.detach() for p in even_model().parameters()], 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-3)
        assert diagnostics == results[0][1]


@pytest.mark.thorough  # test_tensor_parallel_and_fsdp2 shards over both dimensions
@pytest.mark.parametrize("kind", ["adam", "adam_pr", "bfgs", "none"])
def test_every_element_counts_once_whatever_its_placement(kind: str) -> None:
    params = [nn.Parameter(start) for start in shapes()]
    optimizer = optimizer_of(params, kind)
    for t in range(STEPS):
        for p, g in zip(params, gradients([p.detach() for p in params], t), strict=True):
            p.grad = g
        optimizer.step()
    results = ranks(4)(placed, kind)
    for found, diagnostics in results:
        compare(found, [p.detach() for p in params], shapes(), 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-4)
        assert diagnostics == results[0][1]


def other_placements() -> None:
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor import Partial

    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    q = nn.Parameter(torch.ones(4))
    q.grad = torch.ones(4)
    for params, group, error, match in (
        ([q, p], None, RuntimeError, "gradient of parameter 1.*placements.*Replicate.*its parameter.*Shard"),
        ([q, p], dist.group.WORLD, ValueError, "process_group is for plain shards, but parameter 1 is a DTensor"),
    ):
        optimizer = NLCG(params, process_group=group)
        with pytest.raises(error, match=match):
            optimizer.step()
        assert not optimizer.state
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(TypeError, match="parameter 0 has placements.*Partial.*expected Shard or Replicate"):
        NLCG([partial]).step()
    with pytest.raises(TypeError, match="process_group= cannot be pickled"):
        copy.deepcopy(NLCG([q], process_group=dist.group.WORLD))


def test_other_placements_are_refused() -> None:
    ranks(2)(other_placements)


def groups_made() -> int:
    """Of three optimizers and some loads on one mesh of three dimensions, of which two are summed over."""
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("a", "b", "c"))
    made, original = [], dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return original(*args, **kwargs)

    dist.new_group = counted
    try:
        for _ in range(3):
            p = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0), Shard(1), Replicate()]))
            optimizer = NLCG([p])
            for _ in range(3):
                p.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0), Shard(1), Replicate()])
                optimizer.step()
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    finally:
        dist.new_group = original
    return len(made)


def test_no_process_group_is_made_twice() -> None:
    assert max(ranks(4)(groups_made)) <= 1


def rounded_steps(place: Callable[[Tensor], Tensor], replicate: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Some steps of stochastically rounded bfloat16 parameters, and some with state in bfloat16, each of a parameter
    that ``place`` spreads and one that ``replicate`` copies: parameters and state. The betas are constants, because
    sums over shards have other roundings."""
    found = []
    for options in (
        {"preconditioner": None, "beta_max": 0.0, "stochastic_rounding": True},
        {"beta_max": 0.5, "state_dtype": torch.bfloat16},
    ):
        p = nn.Parameter(place(torch.linspace(-1.0, 1.0, 240).view(6, 10, 4).bfloat16()))
        q = nn.Parameter(replicate(torch.linspace(0.5, 1.0, 300).bfloat16()))
        optimizer = NLCG([p, q], 1e-3, update="heavy_ball", **options)
        for t in range(4):
            p.grad = place(torch.sin(torch.arange(240.0) + t).view(6, 10, 4).bfloat16())
            q.grad = replicate(torch.cos(torch.arange(300.0) * (t + 1)).bfloat16())
            optimizer.step()
        found += [p.detach(), q.detach()]
        found += [x for each in (p, q) for key, x in sorted(optimizer.state[each].items()) if key != "step"]
    return found


def rounded(placement: Any, world_shape: tuple[int, ...]) -> list[Tensor]:
    """Those steps with one parameter sharded by ``placement`` and one replicated."""
    mesh = init_device_mesh("cpu", world_shape)

    def place(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, placement)

    def replicate(x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)

    return [x.full_tensor() for x in rounded_steps(place, replicate)]


@pytest.mark.parametrize(
    ("placement", "shape"),
    [
        ([Shard(0)], (2,)),
        ([Shard(1)], (2,)),
        ([Shard(2)], (2,)),
        ([Shard(0)], (3,)),
        ([Shard(0), Shard(1)], (2, 2)),
        ([Replicate(), Shard(1)], (2, 2)),
    ],
)
def test_random_bits_are_those_of_the_whole_parameter(placement: list[Any], shape: tuple[int, ...]) -> None:
    """Replicas agree, shards are parts of one sequence, and one process draws the same."""
    alone = rounded_steps(lambda x: x, lambda x: x)
    world = 1
    for extent in shape:
        world *= extent
    for found in ranks(world)(rounded, placement, shape):
        assert len(found) == len(alone) == 12
        for x, expected in zip(found, alone, strict=True):
            assert torch.equal(x, expected)
