"""DDP: replicas are equal to the bit after every step, and follow one process on the joined batch."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, OnlineLineSearch
from fastnlcg.tensors import groups
from rank_training import (
    KINDS,
    STEPS,
    alone,
    batch,
    compare,
    compare_diagnostics,
    loss_of,
    model,
    optimizer_of,
    share,
    train,
    whole,
)
from ranks import ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.xdist_group("ranks")  # see ranks.py


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


def ddp_with(kind: str, options: dict[str, Any]) -> tuple[list[str], list[float]]:
    return ddp(kind, **options)


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


def test_a_line_search_on_one_ranks_loss_warns() -> None:
    for first, *others in ranks(2)(search_without_average):
        assert len(first) == 1
        assert first[0].startswith("test_ddp.py: the line search sees this rank's loss alone")
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


def test_ddp_join_gives_all_ranks_the_last_weights() -> None:
    """Then the state differs between ranks, with any optimizer: a user who continues training has to send it too."""
    (bits, steps), (other_bits, other_steps) = ranks(2)(joined)
    assert bits == other_bits
    assert (steps, other_steps) == (5, 9)


def test_these_tests_are_on_one_worker(request: pytest.FixtureRequest) -> None:
    """Else two workers start the same ranks, which wait for each other: pytest-xdist 3.8.0 with pytest 9.2.0."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@ranks")
