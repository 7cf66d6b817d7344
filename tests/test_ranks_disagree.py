"""A NaN, a failed exchange, or another option on one rank: all ranks skip the step, or refuse it and change nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, _native
from fastnlcg.tensors.ranks import _GATHER
from rank_training import (
    loss_of,
    optimizer_of,
    sharded,
    train,
)
from ranks import ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py


def nan_on_rank_1(kind: str, backend: str) -> tuple[str, str, int]:
    """A NaN on rank 1, in one element of its shard."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        runs = []
        for bad in (True, False):
            net = sharded()
            optimizer = optimizer_of(net.parameters(), kind)
            train(net, optimizer, 0, 4)
            if bad:
                train_with_a_nan(net, optimizer)
            train(net, optimizer, 4, 8)
            state = copy.deepcopy(optimizer.state_dict())
            state["param_groups"][0]["scalars"][list(_native.SCALARS).index("skipped_steps")] = 0.0
            runs.append(repr([p.to_local() for p in net.parameters()]) + repr(state))
            if bad:
                skipped = optimizer.diagnostics().skipped_steps
        return runs[0], runs[1], skipped


def train_with_a_nan(net: nn.Module, optimizer: NLCG) -> None:
    optimizer.zero_grad()
    loss = loss_of(net, 100, dist.get_world_size(), dist.get_rank())
    loss.backward()
    if dist.get_rank() == 1:
        next(net.parameters()).grad.to_local()[0, 0] = math.nan
    optimizer.step(loss=loss.detach())


@pytest.mark.parametrize("backend", backends.parameters("cpu", "emulated"))
@pytest.mark.parametrize("kind", ["adam", "bfgs", "search", "none"])
def test_a_nan_on_one_rank_skips_the_step_on_all(kind: str, backend: str) -> None:
    for with_skip, without, skipped in ranks(3)(nan_on_rank_1, kind, backend):
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


def steps_without_gradients(backend: str) -> None:
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
    ranks(2)(steps_without_gradients, backend)


def disagree(what: str, backend: str) -> tuple[str, bool, str]:
    """``what`` differs on rank 1. Returns this rank's error, whether anything has changed, and the shape of its first
    shard after another step without the difference."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use(backend, monkeypatch)
        net = sharded()
        optimizer = optimizer_of(net.parameters(), "bfgs")
        train(net, optimizer, 0, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer, 2, 4)
        odd, group, options = dist.get_rank() == 1, optimizer.param_groups[0], {}
        repair: Any = lambda: group.update(options)  # noqa: E731
        if what == "a checkpoint":
            now = copy.deepcopy(optimizer.state_dict())
            repair = lambda: optimizer.load_state_dict(now)  # noqa: E731
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
        for _ in range(2 if backend == "emulated" else 1):  # the host of a GPU learns of it at the next step
            try:
                if what == "diagnostics":  # FSDP's own collectives are not to meet it
                    loss_of(net, 4, dist.get_world_size(), dist.get_rank()).backward()
                    optimizer.diagnostics() if odd else optimizer.step()
                else:
                    train(net, optimizer, 4, 5)
            except RuntimeError as error:
                said = str(error)
        changed = repr((list(net.parameters()), optimizer.state_dict()["state"])) != before
        repair()
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
def test_ranks_that_disagree_all_raise_and_change_nothing(what: str, words: str) -> None:
    for said, changed, _ in ranks(2)(disagree, what, "cpu"):
        assert "the ranks are not about to take the same step, and nothing has changed: " + words == said
        assert not changed


@pytest.mark.skipif(not backends.EMULATION, reason=backends.NO_EMULATION)
@pytest.mark.parametrize("what", ["lr", "eps", "a checkpoint"])
def test_ranks_that_disagree_on_gpus_change_nothing_and_raise_at_the_next_step(what: str) -> None:
    for said, changed, _ in ranks(2)(disagree, what, "emulated"):
        assert "an earlier step was skipped on all ranks: ranks [1] differ from rank 0" in said
        assert not changed


def resume_after_a_disagreement() -> int:
    """A file that counts a disagreement of the run that wrote it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends.use("emulated", monkeypatch)
        net = sharded()
        optimizer = optimizer_of(net.parameters(), "adam")
        train(net, optimizer, 0, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["scalars"][list(_native.SCALARS).index("disagreements")] = 1.0
        optimizer.load_state_dict(saved)
        train(net, optimizer, 2, 5)
        return int(optimizer.diagnostics().step)


def test_a_disagreement_in_a_file_is_no_new_one() -> None:
    assert ranks(2)(resume_after_a_disagreement) == [5, 5]


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
        with pytest.raises(RuntimeError, match=r"lives on ranks \[0\]; rank 1 cannot step it"):
            NLCG([r]).step()


def test_a_wrong_process_group_is_refused_at_construction() -> None:
    ranks(2)(wrong_groups)
