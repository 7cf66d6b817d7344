"""preconditioner="muon" over ranks: FSDP2, HSDP, tensor parallel and DDP follow one process, replicas are equal to the
bit, and no rank repeats another's products."""

from __future__ import annotations

import math
import tempfile
import warnings
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG
from fastnlcg.tensors.polar import NewtonSchulz
from rank_training import compare, whole
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py
STEPS = 8
# Sides that 2 and 3 ranks do not divide, one that some ranks have nothing of, stacks, convolutions; and vectors.
SHAPES = ((7, 13), (7, 13), (13, 7), (2, 9), (3, 5, 4), (6, 2, 3, 3), (7, 13), (1, 6))
STACKED = 4
REST = ((13,), (1,))
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "heavy_ball": {"update": "heavy_ball"},
    "clip": {"max_grad_norm": 0.3},
}


def start(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (*SHAPES, *REST)]


def optimizer_of(params: list[nn.Parameter], **options: Any) -> NLCG:
    matrices = [p for k, p in enumerate(params[: len(SHAPES)]) if k != STACKED]
    muon = {"preconditioner": "muon", "beta_max": 0.95}
    groups = [
        {"params": matrices, **muon},
        {"params": [params[STACKED]], **muon, "stacked": True},
        {"params": params[len(SHAPES) :], "lr": 0.002},
    ]
    return NLCG(groups, lr=0.02, weight_decay=0.1, **options)


def take_steps(params: list[nn.Parameter], optimizer: NLCG, begin: int, end: int) -> None:
    for t in range(begin, end):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            noise = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                value = p.detach() + distribute_tensor(noise, p.device_mesh, p.placements)
                p.grad = value
            else:
                p.grad = p.detach() + noise
        optimizer.step()


def alone(steps: int = STEPS, **options: Any) -> tuple[list[Tensor], NLCG]:
    params = [nn.Parameter(x) for x in start()]
    optimizer = optimizer_of(params, **options)
    take_steps(params, optimizer, 0, steps)
    return [p.detach() for p in params], optimizer


def placements_of(kind: str, world: int) -> tuple[Any, list[tuple[Any, ...]]]:
    """The mesh, and the placements of every parameter."""
    count = len(SHAPES) + len(REST)
    if kind == "fsdp":
        return init_device_mesh("cpu", (world,)), [(Shard(0),)] * count
    if kind == "columns":
        return init_device_mesh("cpu", (world,)), [(Shard(1 if k < len(SHAPES) else 0),) for k in range(count)]
    if kind == "some":  # as tensor parallelism leaves norms
        own = [(Shard(0),), (Shard(1),), (Replicate(),)]
        rest = [(Replicate(),)] * len(REST)
        return init_device_mesh("cpu", (world,)), [own[k % 3] for k in range(len(SHAPES))] + rest
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if kind == "hsdp":
        return mesh, [(Replicate(), Shard(0))] * count
    two = [(Shard(0), Shard(1))] * len(SHAPES)
    return mesh, [*two, *[(Replicate(), Shard(0))] * len(REST)]


def placed(mesh: Any, placements: list[Any]) -> list[nn.Parameter]:
    both = zip(start(), placements, strict=True)
    return [nn.Parameter(x if mesh is None else distribute_tensor(x, mesh, placement)) for x, placement in both]


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list to which each batch of matrices that this rank multiplies from now on adds its number of matrices."""
    counted: list[int] = []
    polar_ = NewtonSchulz.polar_

    def counting(self: NewtonSchulz, x: Tensor, *rest: Any) -> None:
        counted.append(len(x))
        polar_(self, x, *rest)

    monkeypatch.setattr(NewtonSchulz, "polar_", counting)
    return counted


def sharded_run(kind: str, options: dict[str, Any], backend: str) -> tuple[list[Tensor], Any, list[bytes], list[int]]:
    """The parameters, the diagnostics, the bits of this rank's shards and state, and how many matrices it multiplied
    in the last step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        mesh, placements = placements_of(kind, dist.get_world_size())
        params = placed(mesh, placements)
        optimizer = optimizer_of(params, **options)
        take_steps(params, optimizer, 0, STEPS - 1)
        counted = count_products(monkeypatch)
        take_steps(params, optimizer, STEPS - 1, STEPS)
        for p in params[: len(SHAPES)]:
            assert set(optimizer.state[p]) == {"direction", "step"}
            assert optimizer.state[p]["direction"].placements == p.placements
        local = [p.to_local() for p in params] + [optimizer.state[p]["direction"].to_local() for p in params]
        return whole(params), optimizer.diagnostics(), [x.detach().numpy().tobytes() for x in local], counted


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 3), ("columns", 3), ("some", 2)])
def test_shards_follow_one_process(kind: str, world: int, name: str) -> None:
    expected, optimizer = alone(**KINDS[name])
    results = ranks(world)(sharded_run, kind, KINDS[name], "cpu")
    for found, diagnostics, _, _ in results:
        compare(found, expected, start(), 1e-5)
        assert diagnostics.beta_matrices == pytest.approx(optimizer.diagnostics().beta_matrices, rel=1e-5)
        assert diagnostics == results[0][1]
    # a stack counts as its three matrices; each matrix was multiplied on one rank
    assert sum(sum(counted) for _, _, _, counted in results) == len(SHAPES) + 2


@pytest.mark.parametrize("kind", ["hsdp", "two"])
def test_replicas_are_bit_equal_on_meshes_of_two_dimensions(kind: str) -> None:
    expected, _ = alone()
    results = ranks(4)(sharded_run, kind, {}, "cpu")
    for found, _, _, _ in results:
        compare(found, expected, start(), 1e-5)
    assert sum(sum(counted) for _, _, _, counted in results) == len(SHAPES) + 2
    if kind == "hsdp":
        assert results[0][2] == results[2][2]
        assert results[1][2] == results[3][2]


@pytest.mark.skipif(not backends.EMULATION, reason=backends.NO_EMULATION)
def test_shards_on_the_emulated_gpu() -> None:
    expected, _ = alone(**KINDS["clip"])
    for found, _, _, _ in ranks(2)(sharded_run, "fsdp", KINDS["clip"], "emulated"):
        compare(found, expected, start(), 1e-5)


# ---- DDP -------------------------------------------------------------------------------------------------------------


def replicas(share: bool) -> tuple[list[bytes], int]:
    params = [nn.Parameter(x) for x in start()]
    optimizer = optimizer_of(params, matrix_group=dist.group.WORLD if share else None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = count_products(monkeypatch)
        take_steps(params, optimizer, 0, STEPS)
    return [p.detach().numpy().tobytes() for p in params], sum(counted) // STEPS


@pytest.mark.parametrize("share", [False, True])
def test_ddp_replicas_are_bit_equal(share: bool) -> None:
    results = ranks(3)(replicas, share)
    assert all(result[0] == results[0][0] for result in results)
    whole_work = len(SHAPES) + 2
    assert sum(work for _, work in results) == (whole_work if share else 3 * whole_work)
    found = [torch.frombuffer(bytearray(x), dtype=torch.float32) for x in results[0][0]]
    compare(found, [p.flatten() for p in alone()[0]], [p.flatten() for p in start()], 1e-5)


# ---- each rank has some of the matrices, as with ZeroRedundancyOptimizer ---------------------------------------------


def some_of_them() -> tuple[list[Tensor], float]:
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = list(range(rank, len(SHAPES), world))
    params = [nn.Parameter(x) for x in start()]
    muon = {"preconditioner": "muon", "beta_max": 0.95}
    groups = [
        {"params": [params[k] for k in mine if k != STACKED], **muon},
        {"params": [params[k] for k in mine if k == STACKED], **muon, "stacked": True},
        {"params": params[len(SHAPES) + rank :: world], "lr": 0.002},
    ]
    optimizer = NLCG(groups, lr=0.02, weight_decay=0.1, process_group=dist.group.WORLD)
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(t)
        noise = [torch.randn(p.shape, generator=generator) for p in params]
        for p, x in zip(params, noise, strict=True):
            p.grad = p.detach() + x
        optimizer.step()
    chosen = [params[k] for k in (*mine, *range(len(SHAPES) + rank, len(params), world))]
    return [p.detach() for p in chosen], optimizer.diagnostics().beta_matrices


def test_whole_matrices_of_a_process_group_follow_one_process() -> None:
    expected, optimizer = alone()
    for rank, (found, beta) in enumerate(ranks(2)(some_of_them)):
        places = [*range(rank, len(SHAPES), 2), *range(len(SHAPES) + rank, len(SHAPES) + len(REST), 2)]
        compare(found, [expected[k] for k in places], [start()[k] for k in places], 1e-5)
        assert beta == pytest.approx(optimizer.diagnostics().beta_matrices, rel=1e-5)


# ---- disagreement, checkpoints ---------------------------------------------------------------------------------------


def one_rank_lacks_a_gradient() -> str:
    mesh, placements = placements_of("fsdp", dist.get_world_size())
    params = placed(mesh, placements)
    optimizer = optimizer_of(params)
    take_steps(params, optimizer, 0, 2)
    before = [p.to_local().detach().clone() for p in params]
    generator = torch.Generator().manual_seed(5)
    for p in params:
        p.grad = distribute_tensor(torch.randn(p.shape, generator=generator), mesh, p.placements)
    if dist.get_rank() == 1:
        params[0].grad = None
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(a, p.to_local()) for a, p in zip(before, params, strict=True))
        return str(error)
    return "no error"


def test_a_rank_that_lacks_a_matrix_is_named() -> None:
    for message in ranks(2)(one_rank_lacks_a_gradient):
        assert "the ranks are not about to take the same step, and nothing has changed" in message
        assert "matrices with gradients" in message


def saved(folder: str) -> list[Tensor]:
    import torch.distributed.checkpoint as dcp

    mesh, placements = placements_of("fsdp", dist.get_world_size())
    net, optimizer = as_module(mesh, placements)
    take_steps(list(net), optimizer, 0, 4)
    weights, state = dcp.state_dict.get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    take_steps(list(net), optimizer, 4, STEPS)
    return whole(net.parameters())


def loaded(folder: str) -> list[Tensor]:
    import torch.distributed.checkpoint as dcp

    mesh, placements = placements_of("fsdp", dist.get_world_size())
    net, optimizer = as_module(mesh, placements)
    weights, state = dcp.state_dict.get_state_dict(net, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    dcp.state_dict.set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
    take_steps(list(net), optimizer, 4, STEPS)
    return whole(net.parameters())


def as_module(mesh: Any, placements: list[Any]) -> tuple[nn.ParameterList, NLCG]:
    import torch.distributed.checkpoint.state_dict  # noqa: F401

    net = nn.ParameterList(placed(mesh, placements))
    return net, optimizer_of(list(net))


def test_a_checkpoint_of_2_ranks_is_continued_by_3_and_by_1() -> None:
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        expected = ranks(2)(saved, folder)[0]
        for again in ranks(2)(loaded, folder):
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        for found in ranks(3)(loaded, folder):
            compare(found, expected, start(), 1e-5)
        net, optimizer = as_module(None, [None] * (len(SHAPES) + len(REST)))
        weights, state = dcp.state_dict.get_state_dict(net, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a process without ranks
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        dcp.state_dict.set_state_dict(net, optimizer, model_state_dict=weights, optim_state_dict=state)
        take_steps(list(net), optimizer, 4, STEPS)
        compare([p.detach() for p in net], expected, start(), 1e-5)


def test_a_group_of_ranks_is_checked() -> None:
    with pytest.raises(TypeError, match="matrix_group must be a torch.distributed process group"):
        optimizer_of([nn.Parameter(x) for x in start()], matrix_group=3)


def both_groups() -> None:
    with pytest.raises(ValueError, match="matrix_group is for ranks with equal parameters"):
        optimizer_of([nn.Parameter(x) for x in start()], matrix_group=dist.group.WORLD, process_group=dist.group.WORLD)


def test_ranks_have_equal_parameters_or_different_ones() -> None:
    ranks(2)(both_groups)


def different_replicas(what: str) -> None:
    """One rank of those that share the products lacks a gradient, or has a NaN, or another gradient."""
    params = [nn.Parameter(x) for x in start()]
    optimizer = optimizer_of(params, matrix_group=dist.group.WORLD)
    take_steps(params, optimizer, 0, 2)
    before = [p.detach().clone() for p in params]
    state = [optimizer.state[p]["direction"].clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 1:
        params[1].grad = {"missing": None, "nan": params[1].grad.mul(math.nan), "other": 2.0 * params[1].grad}[what]
    if what == "other":
        with pytest.raises(RuntimeError, match="gradients, or the order of parameters, differ between replicas: sums"):
            optimizer.step()
    elif what == "missing":
        with pytest.raises(RuntimeError, match="nothing has changed: matrices with gradients 0, 2, .* on rank 1, 0, 1"):
            optimizer.step()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(torch.equal(optimizer.state[p]["direction"], old) for p, old in zip(params, state, strict=True))
    take_steps(params, optimizer, 2, 3)


@pytest.mark.parametrize("what", ["missing", "nan", "other"])
def test_replicas_that_share_products_take_the_same_step_or_none(what: str) -> None:
    ranks(2)(different_replicas, what)


def different_order(kind: str, named: bool) -> None:
    """Rank 1 lists matrices of one shape in another order, as a set of names does."""
    generator = torch.Generator().manual_seed(0)
    names = list("abcdefgh")
    tensors = [torch.randn(7, 13, generator=generator) / (k + 1) for k in range(len(names))]
    params = [nn.Parameter(x) for x in tensors]
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in tensors]
    for p in params:
        p.grad = p.detach().clone()
    if dist.get_rank() == 1:
        names, params = names[::-1], params[::-1]
    group: dict[str, Any] = {"params": list(zip(names, params, strict=True)) if named else params}
    shared = None if kind == "fsdp" else dist.group.WORLD
    optimizer = NLCG([group | {"preconditioner": "muon"}], lr=0.02, matrix_group=shared)
    words = (
        r"parameter 0 h \(7, 13\) on rank 1, a \(7, 13\) on rank 0"
        if named
        else "gradients, or the order of parameters, differ"
    )
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()


@pytest.mark.parametrize(("kind", "named"), [("fsdp", True), ("replicas", True), ("replicas", False)])
def test_ranks_with_another_order_of_matrices_refuse_the_step(kind: str, named: bool) -> None:
    ranks(2)(different_order, kind, named)


def different_options(name: str, value: Any) -> None:
    """One rank cuts its matrices differently."""
    mesh, placements = placements_of("fsdp", dist.get_world_size())
    params = placed(mesh, placements)
    optimizer = optimizer_of(params)
    take_steps(params, optimizer, 0, 1)
    before = [p.to_local().clone() for p in params]  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        for group in optimizer.param_groups[:2]:
            group[name] = value
    with pytest.raises(RuntimeError, match=f"nothing has changed: option {name} of group 0 {value!r} on rank 1"):
        take_steps(params, optimizer, 1, 2)
    assert all(torch.equal(p.to_local(), old) for p, old in zip(params, before, strict=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "value"), [("adjust_lr_fn", "original"), ("beta_max", 0.5)])
def test_ranks_with_different_options_of_matrices_refuse_the_step(name: str, value: Any) -> None:
    ranks(2)(different_options, name, value)
