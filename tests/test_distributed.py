"""Parameters over ranks, and data over ranks: the trajectory is one process's, and replicas are equal to the bit."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, OnlineLineSearch, _native
from fastnlcg.tensors import groups
from fastnlcg.tensors.ranks import _GATHER
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py
STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.01},
    "adam_pr": {"lr": 0.01, "update": "polak_ribiere"},
    "adam_decay": {"lr": 0.01, "weight_decay": 0.1},
    "bfgs": {"lr": 0.02, "preconditioner": "bfgs"},
    "bfgs_pr": {"lr": 0.02, "preconditioner": "bfgs", "update": "polak_ribiere", "weight_decay": 0.01},
    "adam_clip": {"lr": 0.01, "max_grad_norm": 0.3},
    "bfgs_clip": {"lr": 0.02, "preconditioner": "bfgs", "max_grad_norm": 0.3, "weight_decay": 0.01},
    "none": {"lr": 0.02, "preconditioner": None},
    "none_pr": {"lr": 0.02, "preconditioner": None, "update": "polak_ribiere"},
    "search": {"lr": 0.05, "preconditioner": "bfgs", "line_search": (0.0, -0.0, 0.2, 0.1)},
}


def optimizer_of(params: Any, kind: str, **more: Any) -> NLCG:
    options = {**KINDS[kind], **more}
    if "line_search" in options:
        options["line_search"] = OnlineLineSearch(*options["line_search"])
    return NLCG(params, **options)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Dimensions that 2 and 3 ranks do not divide; the last bias has one element, and is empty on all ranks but one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(12, 7, generator=generator).to(dtype)
    return x, x[:, :1] * x[:, 1:2] + 0.3


def share(x: Tensor, world: int, rank: int) -> Tensor:
    return x.chunk(world)[rank]


def loss_of(net: nn.Module, t: int, world: int = 1, rank: int = 0) -> Tensor:
    x, y = batch(t, next(net.parameters()).dtype)
    return (net(share(x, world, rank)) - share(y, world, rank)).square().mean()


def alone(kind: str, steps: int = STEPS, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[list[Tensor], NLCG]:
    """One process on the joined batch."""
    net = model(dtype)
    optimizer = optimizer_of(net.parameters(), kind, **more)
    for t in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net, t)
        loss.backward()
        optimizer.step(loss=loss.detach())
    return [p.detach().clone() for p in net.parameters()], optimizer


def train(net: nn.Module, optimizer: NLCG, begin: int, end: int) -> None:
    for t in range(begin, end):
        optimizer.zero_grad()
        loss = loss_of(net, t, dist.get_world_size(), dist.get_rank())
        loss.backward()
        optimizer.step(loss=loss.detach())


def whole(params: Any) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def compare(found: list[Tensor], expected: list[Tensor], start: list[Tensor], tolerance: float) -> None:
    """Relative to the parameters, and a move that is there to compare."""
    for a, b, before in zip(found, expected, start, strict=True):
        assert torch.linalg.vector_norm(b - before) > 1e-3 * torch.linalg.vector_norm(before)
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)


def compare_diagnostics(a: Any, b: Any, tolerance: float) -> None:
    for name in ("beta", "rz", "ys", "shs", "grad_norm", "direction_norm", "cosine", "ls_scale"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=tolerance, abs=1e-12), name
    assert (a.step, a.updated, a.skipped_steps) == (b.step, b.updated, b.skipped_steps)
    assert a.total_norm == (b.total_norm and pytest.approx(b.total_norm, rel=tolerance))
    assert a.clip == pytest.approx(b.clip, rel=tolerance)


class Gathers:
    """Counts the exchanges of the steps inside."""

    def __enter__(self) -> Gathers:
        self.count, self.original = 0, getattr(dist, _GATHER)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.original(*args, **kwargs)

        setattr(dist, _GATHER, counted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(dist, _GATHER, self.original)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(mesh_shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    net = model(dtype)
    names = None if mesh_shape is None or len(mesh_shape) == 1 else ("replicate", "shard")
    mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),), mesh_dim_names=names)
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


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
        # one more where the gradient is clipped, or was in the step before
        assert (diagnostics.clip < 1.0) == ("max_grad_norm" in KINDS[kind])
        assert gathers == (2 if KINDS[kind].get("preconditioner") == "bfgs" else 1) + (diagnostics.clip < 1.0)
        assert diagnostics == results[0][1]


@pytest.mark.parametrize("kind", ["adam", "bfgs_pr", "search"])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (4, 1), (1, 4)])
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


def shapes() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in ((5, 6), (9,), (3, 7), (11,), (3, 2), (4,))]


def gradients(params: list[Tensor], t: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [(k + 1) * p + 0.2 * torch.randn(p.shape, generator=generator) for k, p in enumerate(params)]


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


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor import Partial

    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    q = nn.Parameter(torch.ones(4))
    q.grad = torch.ones(4)
    for params, group, error, match in (
        ([q, p], None, RuntimeError, "gradient of parameter 1.*placed.*Replicate.*its parameter.*Shard"),
        ([q, p], dist.group.WORLD, ValueError, "process_group is for plain shards, and parameter 1 is a DTensor"),
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


def test_refusals() -> None:
    ranks(2)(refusals)


# ---- faults over ranks -----------------------------------------------------------------------------------------------


def one_bad_rank(kind: str, backend: str) -> tuple[str, str, int]:
    """A NaN on rank 1, in one element of its shard."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        runs = []
        for bad in (True, False):
            net = sharded()
            optimizer = optimizer_of(net.parameters(), kind)
            train(net, optimizer, 0, 4)
            if bad:
                train_bad(net, optimizer)
            train(net, optimizer, 4, 8)
            state = copy.deepcopy(optimizer.state_dict())
            state["param_groups"][0]["scalars"][list(_native.SCALARS).index("skipped_steps")] = 0.0
            runs.append(repr([p.to_local() for p in net.parameters()]) + repr(state))
            if bad:
                skipped = optimizer.diagnostics().skipped_steps
        return runs[0], runs[1], skipped


def train_bad(net: nn.Module, optimizer: NLCG) -> None:
    optimizer.zero_grad()
    loss = loss_of(net, 100, dist.get_world_size(), dist.get_rank())
    loss.backward()
    if dist.get_rank() == 1:
        next(net.parameters()).grad.to_local()[0, 0] = math.nan
    optimizer.step(loss=loss.detach())


@pytest.mark.parametrize("backend", backends.parameters("cpu", "emulated"))
@pytest.mark.parametrize("kind", ["adam", "bfgs", "search", "none"])
def test_a_nan_on_one_rank_skips_the_step_on_all(kind: str, backend: str) -> None:
    for with_skip, without, skipped in ranks(3)(one_bad_rank, kind, backend):
        assert with_skip == without
        assert skipped == 1


def scaled(kind: str) -> tuple[str, str, int]:
    """GradScaler over shards; in step 4 an infinity in rank 1's."""
    runs = []
    for with_scaler in (True, False):
        net = sharded()
        optimizer = optimizer_of(net.parameters(), kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=with_scaler)
        for t in range(8):
            if t == 4 and not with_scaler:
                continue
            optimizer.zero_grad()
            loss = loss_of(net, t, dist.get_world_size(), dist.get_rank())
            scaler.scale(loss).backward()
            if t == 4 and dist.get_rank() == 1:
                next(net.parameters()).grad.to_local()[0, 0] = math.inf
            scaler.step(optimizer, loss=loss.detach())
            scaler.update()
        runs.append(repr([p.to_local() for p in net.parameters()]) + repr(optimizer.state_dict()))
    return runs[0], runs[1], optimizer.diagnostics().step


@pytest.mark.parametrize("kind", ["adam", "search"])
def test_grad_scaler_over_shards(kind: str) -> None:
    for with_scaler, without, steps in ranks(2)(scaled, kind):
        assert with_scaler == without
        assert steps == 7


def failing_gather(kind: str, nth: int) -> None:
    net = sharded()
    optimizer = optimizer_of(net.parameters(), kind)
    train(net, optimizer, 0, 5)
    twin = sharded()
    other = optimizer_of(twin.parameters(), kind)
    train(twin, other, 0, 5)

    def state(net: nn.Module, optimizer: NLCG) -> str:
        return repr([p.to_local() for p in net.parameters()]) + repr(optimizer.state_dict())

    before, original, calls = state(net, optimizer), getattr(dist, _GATHER), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise ConnectionError("the cable")
        return original(*args, **kwargs)

    loss = loss_of(net, 5, dist.get_world_size(), dist.get_rank())
    optimizer.zero_grad()
    loss.backward()
    setattr(dist, _GATHER, failing)
    try:
        with pytest.raises(ConnectionError, match="the cable"):
            optimizer.step(loss=loss.detach())
    finally:
        setattr(dist, _GATHER, original)
    assert state(net, optimizer) == before
    train(twin, other, 5, 6)
    assert other.diagnostics().updated == (kind != "none")  # the step that failed would have written h
    train(net, optimizer, 5, 8)
    train(twin, other, 6, 8)
    assert state(net, optimizer) == state(twin, other)


@pytest.mark.parametrize(("kind", "nth"), [("adam", 1), ("bfgs", 1), ("bfgs", 2), ("search", 2), ("none", 1)])
def test_a_failed_exchange_changes_nothing(kind: str, nth: int) -> None:
    ranks(2)(failing_gather, kind, nth)


def no_gradients_yet(backend: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        net = sharded()
        optimizer = optimizer_of(net.parameters(), "adam")
        before = repr([p.to_local() for p in net.parameters()])
        for _ in range(3):
            optimizer.step()
        assert repr([p.to_local() for p in net.parameters()]) == before
        assert optimizer.diagnostics().step == optimizer.diagnostics().skipped_steps == 0
        train(net, optimizer, 0, 2)
        optimizer.zero_grad()
        optimizer.step()
        assert optimizer.diagnostics().step == 2


@pytest.mark.parametrize("backend", backends.parameters("cpu", "emulated"))
def test_a_step_without_gradients_does_nothing(backend: str) -> None:
    ranks(2)(no_gradients_yet, backend)


# ---- plain shards: FSDP1, ZeRO, any ----------------------------------------------------------------------------------


def process_group(kind: str, frozen: bool) -> tuple[list[Tensor], Any]:
    """Rank r owns parameters r, r + world, ...; with ``frozen`` one of them has no gradient in some steps."""
    params = [nn.Parameter(start) for start in shapes()]
    mine = params[dist.get_rank() :: dist.get_world_size()]
    optimizer = optimizer_of(mine, kind, process_group=dist.group.WORLD)
    for t in range(STEPS):
        for k, (p, g) in enumerate(zip(params, gradients([p.detach() for p in params], t), strict=True)):
            p.grad = None if frozen and k == 1 and t in (3, 4, 7) else g
        optimizer.step()
        for k, p in enumerate(params):
            dist.broadcast(p.data, k % dist.get_world_size())
    return [p.detach() for p in params], optimizer.diagnostics()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["adam", "adam_pr", "bfgs", "none"])
def test_process_group_sums_over_plain_shards(kind: str, frozen: bool) -> None:
    params = [nn.Parameter(start) for start in shapes()]
    optimizer = optimizer_of(params, kind)
    for t in range(STEPS):
        for k, (p, g) in enumerate(zip(params, gradients([p.detach() for p in params], t), strict=True)):
            p.grad = None if frozen and k == 1 and t in (3, 4, 7) else g
        optimizer.step()
    for found, diagnostics in ranks(3)(process_group, kind, frozen):
        compare(found, [p.detach() for p in params], shapes(), 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-4)


def fsdp1(kind: str, use_orig_params: bool) -> tuple[list[Tensor], int]:
    net = model()
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = optimizer_of(wrapped.parameters(), kind, process_group=dist.group.WORLD)
    train(wrapped, optimizer, 0, STEPS)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [p.detach().clone() for p in net.parameters()], optimizer.diagnostics().step


@pytest.mark.thorough  # test_process_group_sums_over_plain_shards takes the same path
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("kind", ["adam", "bfgs", "search"])
def test_fsdp1(kind: str, use_orig_params: bool) -> None:
    expected, _ = alone(kind)
    for found, steps in ranks(2)(fsdp1, kind, use_orig_params):
        joined, b = torch.cat([p.flatten() for p in found]), torch.cat([p.flatten() for p in expected])
        assert torch.linalg.vector_norm(joined - b) <= 1e-5 * torch.linalg.vector_norm(b)
        assert steps == STEPS


def fsdp1_checkpoint(kind: str) -> tuple[str, str]:
    """By FSDP's own functions, which gather the state under names and scatter it again. Not with use_orig_params: on a
    CPU torch 2.13 then returns one buffer for all of a parameter's states, AdamW's too."""
    FSDP = FullyShardedDataParallel  # noqa: N806

    def make() -> tuple[nn.Module, NLCG]:
        net = FSDP(model(), device_id=torch.device("cpu"), use_orig_params=False)
        return net, optimizer_of(net.parameters(), kind, process_group=dist.group.WORLD)

    def bits(net: nn.Module) -> str:
        return repr([p.detach().clone() for p in net.parameters()])

    net, optimizer = make()
    train(net, optimizer, 0, 6)
    weights, saved = net.state_dict(), FSDP.optim_state_dict(net, optimizer)
    twin, other = make()
    twin.load_state_dict(weights)
    other.load_state_dict(FSDP.optim_state_dict_to_load(twin, other, saved))
    train(net, optimizer, 6, 9)
    train(twin, other, 6, 9)
    assert optimizer.diagnostics().step == other.diagnostics().step == 9
    return bits(net), bits(twin)


@pytest.mark.thorough  # test_a_checkpoint_resumes_to_the_bit_and_reshards saves and loads FSDP2
@pytest.mark.parametrize("kind", ["adam", "bfgs_pr"])
def test_fsdp1_checkpoints(kind: str) -> None:
    for ours, theirs in ranks(2)(fsdp1_checkpoint, kind):
        assert ours == theirs


class OverRanks(NLCG):
    """ZeroRedundancyOptimizer keeps ``process_group=`` for itself."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, process_group=dist.group.WORLD, **options)


def zero(kind: str) -> tuple[list[Tensor], str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DistributedDataParallel(model())
    options = dict(KINDS[kind])
    optimizer = ZeroRedundancyOptimizer(net.parameters(), OverRanks, **options)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, t, dist.get_world_size(), dist.get_rank()).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], repr(list(net.parameters()))


def zero_checkpoint(kind: str) -> tuple[str, str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make() -> tuple[nn.Module, Any]:
        net = DistributedDataParallel(model())
        return net, ZeroRedundancyOptimizer(net.parameters(), OverRanks, **KINDS[kind])

    def steps(net: nn.Module, optimizer: Any, begin: int, end: int) -> str:
        for t in range(begin, end):
            optimizer.zero_grad()
            loss_of(net, t, dist.get_world_size(), dist.get_rank()).backward()
            optimizer.step()
        return repr(list(net.parameters()))

    net, optimizer = make()
    steps(net, optimizer, 0, 6)
    optimizer.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    twin, other = make()
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(saved[0])
    return steps(net, optimizer, 6, 9), steps(twin, other, 6, 9)


@pytest.mark.thorough  # test_zero_redundancy_optimizer steps, and test_checkpoints.py loads
@pytest.mark.parametrize("kind", ["adam", "bfgs_pr"])
def test_zero_checkpoints(kind: str) -> None:
    for ours, theirs in ranks(2)(zero_checkpoint, kind):
        assert ours == theirs


@pytest.mark.parametrize("kind", ["adam", "bfgs_pr"])
def test_zero_redundancy_optimizer(kind: str) -> None:
    expected, _ = alone(kind)
    results = ranks(3)(zero, kind)
    for found, bits in results:
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)
        assert bits == results[0][1]


def deepspeed_like(**options: Any) -> tuple[list[nn.Parameter], NLCG]:
    """What DeepSpeed's ZeRO 1 and 2 do: one flat share in the place of each group's parameters."""
    net = model()
    optimizer = NLCG([{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}], **options)
    flat = [nn.Parameter(torch.zeros(sum(p.numel() for p in g["params"]))) for g in optimizer.param_groups]
    for group, p in zip(optimizer.param_groups, flat, strict=True):
        group["params"] = [p]
        p.grad = torch.ones_like(p)
    return flat, optimizer


def flat_shares_over_ranks() -> None:
    flat, optimizer = deepspeed_like()
    with pytest.raises(RuntimeError, match="DeepSpeed's ZeRO does this.*process_group="):
        optimizer.step()
    assert not any(p.any() for p in flat)
    # one group at a time is no better with a process group; all of them at once are
    flat, optimizer = deepspeed_like(process_group=dist.group.WORLD)
    optimizer.param_groups, whole_ones = [optimizer.param_groups[0]], optimizer.param_groups
    with pytest.raises(RuntimeError, match="1 of 2 parameter groups.*DeepSpeed's ZeRO"):
        optimizer.step()
    assert not any(p.any() for p in flat)
    optimizer.param_groups = whole_ones
    optimizer.step()
    assert all(p.all() for p in flat)


def test_deepspeed_is_recognized_by_what_it_does() -> None:
    """By stepping one of the flat groups at a time, or by flat groups where there are ranks; not by an import."""
    flat, optimizer = deepspeed_like()
    optimizer.param_groups, whole = [optimizer.param_groups[0]], optimizer.param_groups
    with pytest.raises(RuntimeError, match="1 of 2 parameter groups.*DeepSpeed's ZeRO"):
        optimizer.step()
    assert not any(p.any() for p in flat)
    optimizer.param_groups = whole  # all of them, and no other rank: the sums are whole
    optimizer.step()
    assert all(p.all() for p in flat)
    ranks(2)(flat_shares_over_ranks)


# ---- DDP -------------------------------------------------------------------------------------------------------------


class WithUnused(nn.Module):
    """``second`` takes no part in odd steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = model(), model()

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.first(x) + (self.second(x) if both else 0.0)


def ddp(kind: str, **options: Any) -> tuple[list[str], list[float]]:
    """50 steps; the bits after every one, and the scale."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1 + rank)
    unused, virtual = options.pop("unused", False), options.pop("virtual", 1)
    try:
        net = DistributedDataParallel(
            WithUnused() if unused else wide(), gradient_as_bucket_view=True, find_unused_parameters=unused
        )
        optimizer = optimizer_of(net.parameters(), kind, **options)
        bits, scales = [], []
        for t in range(50):
            optimizer.zero_grad()
            losses = []
            for k in range(virtual):
                x, y = batch(1000 * k + t)
                x, y = share(x, world, rank), share(y, world, rank)
                with net.no_sync() if k < virtual - 1 else torch.enable_grad():
                    prediction = net(x, t % 2 == 0) if unused else net(x)
                    loss = (prediction - y).square().mean() / virtual
                    loss.backward()
                losses.append(loss.detach())
            optimizer.step(loss=sum(losses))
            bits.append(repr([p.detach().view(torch.int32) for p in net.parameters()]))
            scales.append(groups.named_scalars(optimizer.param_groups[0])["ls_scale"])
        return bits, scales
    finally:
        torch.set_num_threads(1)


def wide() -> nn.Sequential:
    """Enough elements for two threads."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5000), nn.Tanh(), nn.Linear(5000, 1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adam", {}),
        ("bfgs_pr", {"virtual": 3, "lr": 0.001}),
        ("none", {"unused": True}),
        ("adam_pr", {"unused": True, "virtual": 2}),
        ("search", {"average_loss": True}),
    ],
)
def test_ddp_replicas_are_bit_equal_after_every_step(kind: str, options: dict[str, Any]) -> None:
    (bits, scales), (other_bits, other_scales) = ranks(2)(ddp_with, kind, options)
    assert bits == other_bits
    assert len(set(bits)) == 50
    assert scales == other_scales
    assert (len(set(scales)) > 5) == (kind == "search")


def ddp_with(kind: str, options: dict[str, Any]) -> tuple[list[str], list[float]]:
    return ddp(kind, **options)


def test_ddp_replicas_stay_bit_equal_after_a_step_that_all_skip(tmp_path: Path) -> None:
    """Rank 1 alone meets an infinity; the reduced gradient has it on both. Their threads and kernels differ."""
    code = f"""
import os, sys, torch
import torch.distributed as dist
from torch import nn
from fastnlcg import NLCG, OnlineLineSearch
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1 + rank)
os.environ["FASTNLCG_ISA"] = ({backends.NARROWEST!r}, "")[rank]
torch.manual_seed(0)
net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(40, 900), nn.Tanh(), nn.Linear(900, 3)),
                                          gradient_as_bucket_view=True)
optimizer = NLCG(net.parameters(), 0.1, update="polak_ribiere", line_search=OnlineLineSearch(),
                 average_loss=False)
torch.manual_seed(rank + 1)
for t in range(8):
    x = torch.randn(16, 40)
    if t == 4 and rank == 1:
        x[0, 0] = float("inf")
    optimizer.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    optimizer.step(loss=mean / 2)
assert optimizer.diagnostics().skipped_steps == 1 and optimizer.diagnostics().step == 7
both = [torch.empty(0)] * 2
dist.all_gather_object(both, [p.detach().numpy().tobytes() for p in net.parameters()] + [repr(optimizer.diagnostics())])
assert both[0] == both[1]
os._exit(0)  # gloo's threads may want the GIL of an interpreter that ends, and abort (pytorch#190489)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]


def ddp_trajectory(kind: str) -> tuple[list[Tensor], Any]:
    net = DistributedDataParallel(model())
    optimizer = optimizer_of(net.parameters(), kind, average_loss=True)
    train(net, optimizer, 0, STEPS)
    return whole(net.parameters()), optimizer.diagnostics()


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_follows_one_process_on_the_joined_batch(kind: str) -> None:
    expected, optimizer = alone(kind)
    for found, diagnostics in ranks(2)(ddp_trajectory, kind):
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)
        compare_diagnostics(diagnostics, optimizer.diagnostics(), 1e-3)


def losses_that_differ() -> list[float]:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], 0.0, line_search=OnlineLineSearch(0.1, 0.0, 0.5, 0.0), average_loss=True)
    scales = []
    for losses in ((1.0, 1.0), (1.0, 1.3), (math.nan, 9.0), (1.0, 1.5)):
        p.grad = torch.ones(3)
        optimizer.step(loss=losses[dist.get_rank()])
        scales.append(optimizer.diagnostics().ls_scale)
    return scales


def test_the_line_search_sees_the_average_loss() -> None:
    """1, then 1.15, then one that is not finite on one rank and counts on none, then 1.25, less than 10 % more."""
    assert ranks(2)(losses_that_differ) == [[1.0, 0.5, 0.5, 0.5]] * 2


def warnings_of(**options: Any) -> list[str]:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], 0.0, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(12):
            p.grad = torch.ones(3)
            optimizer.step(loss=1.0)
    return [f"{Path(w.filename).name}: {w.message}" for w in seen]


def search_without_average() -> tuple[list[str], ...]:
    search = OnlineLineSearch()
    return (
        warnings_of(line_search=search),
        warnings_of(line_search=search, average_loss=False),
        warnings_of(line_search=search, average_loss=True),
        warnings_of(),
    )


def test_a_line_search_on_one_ranks_loss_has_a_voice() -> None:
    for first, *others in ranks(2)(search_without_average):
        assert len(first) == 1
        assert first[0].startswith("test_distributed.py: the line search sees this rank's loss alone")
        assert others == [[], [], []]


def joined() -> tuple[str, int]:
    """Rank 0 has 5 batches, rank 1 has 9."""
    net = DistributedDataParallel(model())
    optimizer = optimizer_of(net.parameters(), "adam")
    with net.join():
        for t in range(5 + 4 * dist.get_rank()):
            optimizer.zero_grad()
            loss_of(net, t, 2, dist.get_rank()).backward()
            optimizer.step()
    return repr([p.detach().view(torch.int32) for p in net.parameters()]), optimizer.diagnostics().step


def test_ddp_join() -> None:
    """At its end DDP gives every rank the weights of the last to finish. The optimizer's state is then each rank's own,
    with any optimizer: who goes on has to send that too."""
    (bits, steps), (other_bits, other_steps) = ranks(2)(joined)
    assert bits == other_bits
    assert (steps, other_steps) == (5, 9)


# ---- checkpoints over ranks ------------------------------------------------------------------------------------------


def save(folder: str, kind: str) -> tuple[list[Tensor], str]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = sharded()
    optimizer = optimizer_of(net.parameters(), kind)
    train(net, optimizer, 0, 6)
    weights, state = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(net, optimizer, 6, STEPS)
    return whole(net.parameters()), repr([p.to_local() for p in net.parameters()]) + repr(optimizer.state_dict())


def load(folder: str, kind: str) -> tuple[list[Tensor], str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = sharded()
    optimizer = optimizer_of(net.parameters(), kind)
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    before = optimizer.diagnostics()
    train(net, optimizer, 6, STEPS)
    return (
        whole(net.parameters()),
        repr([p.to_local() for p in net.parameters()]) + repr(optimizer.state_dict()),
        before,
    )


def load_alone(folder: str, kind: str) -> list[Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = model()
    optimizer = optimizer_of(net.parameters(), kind)
    weights, state = get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    for t in range(6, STEPS):
        optimizer.zero_grad()
        loss = loss_of(net, t)
        loss.backward()
        optimizer.step(loss=loss.detach())
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", ["adam", "adam_pr", "bfgs", "none", "search"])
def test_a_checkpoint_resumes_to_the_bit_and_reshards(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = ranks(2)(save, folder, kind)
        again = ranks(2)(load, folder, kind)
        assert [bits for _, bits in written] == [bits for _, bits, _ in again]
        start = [p.detach() for p in model().parameters()]
        for found, _, before in ranks(3)(load, folder, kind):
            compare(found, written[0][0], start, 1e-5)
            assert before.step == 6
            assert before.rz == again[0][2].rz
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch: no process group
            compare(load_alone(folder, kind), written[0][0], start, 1e-5)


def read_first(kind: str, backend: str) -> tuple[str, str, int]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        found = []
        for read in (False, True):
            net = sharded()
            optimizer = optimizer_of(net.parameters(), kind)
            if read:
                state = get_optimizer_state_dict(net, optimizer)
                assert all(entry["step"] == 0.0 for entry in state["state"].values())
            train(net, optimizer, 0, 4)
            found.append(repr([p.to_local() for p in net.parameters()]) + repr(optimizer.state_dict()))
        # A warm-up from 0, and a first gradient that is zero on one rank: a step for all of them.
        net = sharded()
        optimizer = optimizer_of(net.parameters(), kind, lr=0.0)
        loss_of(net, 0, dist.get_world_size(), dist.get_rank()).backward()
        if dist.get_rank() == 1:
            for p in net.parameters():
                p.grad.to_local().zero_()
        optimizer.step()
        return found[0], found[1], optimizer.diagnostics().step


@pytest.mark.parametrize("backend", backends.parameters("cpu", "emulated"))
@pytest.mark.parametrize("kind", ["adam", "bfgs_pr", "search"])
def test_reading_the_state_before_the_first_step_counts_nothing(kind: str, backend: str) -> None:
    """On any rank, nor where one has nothing but zeros."""
    for without, read, step in ranks(2)(read_first, kind, backend):
        assert read == without
        assert step == 1


def load_whole(state: dict[str, Any], weights: dict[str, Tensor], kind: str) -> list[Tensor]:
    """What one process saved, into shards."""
    net = sharded()
    optimizer = optimizer_of(net.parameters(), kind)
    with torch.no_grad():
        for p, value in zip(net.parameters(), weights.values(), strict=True):
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements))
    optimizer.load_state_dict(state)
    train(net, optimizer, 6, STEPS)
    return whole(net.parameters())


@pytest.mark.parametrize("kind", ["adam", "bfgs"])
def test_shards_take_one_processs_state_dict(kind: str) -> None:
    expected, _ = alone(kind)
    weights, optimizer = alone(kind, steps=6)
    state = copy.deepcopy(optimizer.state_dict())
    for found in ranks(3)(load_whole, state, dict(enumerate(weights)), kind):
        compare(found, expected, [p.detach() for p in model().parameters()], 1e-5)


# ---- ranks that are not about to take the same step ------------------------------------------------------------------


def out_of_step(what: str, backend: str) -> tuple[str, bool, str]:
    """Something differs on rank 1. Returns what this rank is told, whether anything has changed, and what the next step
    says when it is mended."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        net = sharded()
        optimizer = optimizer_of(net.parameters(), "bfgs")
        train(net, optimizer, 0, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, 2, 4)
        odd, group, options = dist.get_rank() == 1, optimizer.param_groups[0], {}
        mend: Any = lambda: group.update(options)  # noqa: E731
        if what == "a checkpoint":
            now = copy.deepcopy(optimizer.state_dict())
            mend = lambda: optimizer.load_state_dict(now)  # noqa: E731
            if odd:
                optimizer.load_state_dict(saved)
        elif what != "diagnostics":
            key, value = {"lr": ("lr", 0.5), "maximize": ("maximize", True), "weight decay": ("weight_decay", 0.1)}.get(
                what, ("eps", 1e-3)
            )
            options[key] = group[key]
            if odd:
                group[key] = value
        before = repr((list(net.parameters()), optimizer.state_dict()["state"]))
        said = ""
        for _ in range(2 if backend == "emulated" else 1):  # a GPU's host hears of it at the next step
            try:
                if what == "diagnostics":  # FSDP's own collectives are not to meet it
                    loss_of(net, 4, dist.get_world_size(), dist.get_rank()).backward()
                    optimizer.diagnostics() if odd else optimizer.step()
                else:
                    train(net, optimizer, 4, 5)
            except RuntimeError as error:
                said = str(error)
        changed = repr((list(net.parameters()), optimizer.state_dict()["state"])) != before
        mend()
        train(net, optimizer, 5, 6)
        return said, changed, repr(next(p.to_local() for p in net.parameters()).shape)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lr", "lr of group 0 0.5 on rank 1, 0.02 on rank 0"),
        ("weight decay", "weight_decay of group 0 0.1 on rank 1, 0.0 on rank 0"),
        ("maximize", "option maximize True on rank 1, False on rank 0"),
        ("eps", "option eps 0.001 on rank 1, 1e-08 on rank 0"),
        ("a checkpoint", "step number 2 on rank 1, 4 on rank 0"),
        ("diagnostics", "is in diagnostics() on rank 1, step() on rank 0"),
    ],
)
def test_ranks_that_are_out_of_step_all_say_so_and_change_nothing(what: str, words: str) -> None:
    for said, changed, _ in ranks(2)(out_of_step, what, "cpu"):
        assert "the ranks are not about to take the same step, and nothing has changed: " + words == said
        assert not changed


@pytest.mark.skipif(not backends.EMULATION, reason=backends.NO_EMULATION)
@pytest.mark.parametrize("what", ["lr", "eps", "a checkpoint"])
def test_ranks_out_of_step_on_gpus_change_nothing_and_say_so_at_the_next_step(what: str) -> None:
    for said, changed, _ in ranks(2)(out_of_step, what, "emulated"):
        assert "a step before has changed nothing: ranks [1] differ from rank 0" in said
        assert not changed


def wrong_groups() -> None:
    p = nn.Parameter(torch.ones(3))
    for wrong in ("gloo", 3, object()):
        with pytest.raises(TypeError, match="process_group must be a torch.distributed process group"):
            NLCG([p], process_group=wrong)
    other = dist.new_group([0])
    if dist.get_rank() == 0:
        NLCG([p], process_group=other)
    else:
        with pytest.raises((TypeError, ValueError), match="process_group"):
            NLCG([p], process_group=other)
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.device_mesh import DeviceMesh

    lone = DeviceMesh("cpu", [0])
    q = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    q.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    NLCG([q]).step()
    r = nn.Parameter(DTensor.from_local(torch.ones(2), lone, [Shard(0)], run_check=False))
    r.grad = DTensor.from_local(torch.ones(2), lone, [Shard(0)], run_check=False)
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match=r"lies on ranks \[0\], which this rank, 1, is not one of"):
            NLCG([r]).step()


def test_a_wrong_process_group_is_refused_at_construction() -> None:
    ranks(2)(wrong_groups)


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


# ---- stochastic rounding over ranks ----------------------------------------------------------------------------------


def rounded(placement: Any, world_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Some steps of stochastically rounded bfloat16 parameters: one sharded as said, one replicated."""
    mesh = init_device_mesh("cpu", world_shape)
    whole_p = torch.linspace(-1.0, 1.0, 240).view(6, 10, 4).bfloat16()
    sharded_p = nn.Parameter(distribute_tensor(whole_p, mesh, placement))
    replica = nn.Parameter(distribute_tensor(torch.linspace(0.5, 1.0, 300).bfloat16(), mesh, [Replicate()] * mesh.ndim))
    optimizer = NLCG([sharded_p, replica], 1e-3, preconditioner=None, update="heavy_ball", beta_max=0.0,
                     stochastic_rounding=True)  # fmt: skip
    for t in range(4):
        g = torch.sin(torch.arange(240.0) + t).view(6, 10, 4).bfloat16()
        sharded_p.grad = distribute_tensor(g, mesh, placement)
        replica.grad = distribute_tensor(
            torch.cos(torch.arange(300.0) * (t + 1)).bfloat16(), mesh, [Replicate()] * mesh.ndim
        )
        optimizer.step()
    return sharded_p.full_tensor().detach(), replica.to_local().detach()


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
    """However it is cut: replicas agree, shards are parts of one stream, and one process draws the same."""
    p = nn.Parameter(torch.linspace(-1.0, 1.0, 240).view(6, 10, 4).bfloat16())
    q = nn.Parameter(torch.linspace(0.5, 1.0, 300).bfloat16())
    optimizer = NLCG([p, q], 1e-3, preconditioner=None, update="heavy_ball", beta_max=0.0, stochastic_rounding=True)
    for t in range(4):
        p.grad = torch.sin(torch.arange(240.0) + t).view(6, 10, 4).bfloat16()
        q.grad = torch.cos(torch.arange(300.0) * (t + 1)).bfloat16()
        optimizer.step()
    world = 1
    for extent in shape:
        world *= extent
    for found, replica in ranks(world)(rounded, placement, shape):
        assert torch.equal(found, p.detach())
        assert torch.equal(replica, q.detach())
