"""Checkpoints of sharded state: resumed to the bit, on another number of ranks, and read before the first step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from rank_training import (
    STEPS,
    alone,
    compare,
    loss_of,
    model,
    optimizer_of,
    sharded,
    train,
    whole,
)
from ranks import ranks
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py


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
    """On any rank, also if one has only zeros."""
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
