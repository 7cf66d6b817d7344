"""Shards that are plain tensors, with ``process_group=``: FSDP1, ZeroRedundancyOptimizer and DeepSpeed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, muon_groups
from rank_training import (
    KINDS,
    STEPS,
    alone,
    compare,
    compare_diagnostics,
    gradients,
    loss_of,
    model,
    optimizer_of,
    shapes,
    train,
)
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py


def replicas_as_shards() -> list[str]:
    """``process_group=`` under DDP, by mistake; then shards."""
    said = []
    for p in (nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), 1.0 + dist.get_rank()))):
        p.grad = p.detach().clone()
        optimizer = NLCG([p], process_group=dist.group.WORLD)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        said.append(" ".join(str(w.message) for w in caught))
    return said


def test_replicas_that_are_taken_for_shards_are_noticed() -> None:
    for mistaken, shards in ranks(2)(replicas_as_shards):
        assert mistaken.count("all ranks of process_group= have the same gradients") == 1
        assert not shards


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


def fsdp1_groups() -> None:
    for use_orig_params in (False, True):
        wrapped = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        for net in (wrapped, nn.Sequential(wrapped)):
            with pytest.raises(ValueError, match="is wrapped by FSDP1, which keeps flat shards"):
                muon_groups(net, lr=0.02, weight_decay=0.1)


def test_muon_groups_refuses_fsdp1() -> None:
    ranks(3)(fsdp1_groups)


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
    """As DeepSpeed's ZeRO 1 and 2: each group's parameters are replaced by one flat share."""
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


def test_a_bias_that_is_left_alone_is_no_flat_share() -> None:
    net = model()
    optimizer = NLCG([{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}])
    del optimizer.param_groups[0]
    bias = net[2].bias
    optimizer.param_groups[0]["params"] = [bias]
    before, bias.grad = bias.detach().clone(), torch.ones_like(bias)
    optimizer.step()
    assert not torch.equal(bias, before)


def test_flat_shares_as_deepspeed_makes_them_are_recognized() -> None:
    """By a step of one flat group at a time, or by flat groups when there are ranks; not by an import."""
    flat, optimizer = deepspeed_like()
    optimizer.param_groups, whole = [optimizer.param_groups[0]], optimizer.param_groups
    with pytest.raises(RuntimeError, match="1 of 2 parameter groups.*DeepSpeed's ZeRO"):
        optimizer.step()
    assert not any(p.any() for p in flat)
    optimizer.param_groups = whole  # all of them, and no other rank: the sums are whole
    optimizer.step()
    assert all(p.all() for p in flat)
    ranks(2)(flat_shares_over_ranks)
