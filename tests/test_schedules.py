"""``OnlineLineSearch``'s options, and the schedules of the learning rate."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, paper_schedule, warmup_cosine
from torch import nn
from torch.optim.lr_scheduler import LinearLR, SequentialLR


def test_line_search_options_are_checked() -> None:
    assert OnlineLineSearch().as_tuple() == (0.02, 0.01, 0.025, 0.025)
    for keywords, error in (
        ({"decrease": 1.0}, ValueError),
        ({"increase": -0.1}, ValueError),
        ({"increase_threshold": math.nan}, ValueError),
        ({"flat_threshold": 0.5}, ValueError),
        ({"decrease": "a"}, TypeError),
        ({"decrease": True}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(keywords))):
            OnlineLineSearch(**keywords)


@pytest.mark.parametrize(
    ("batch_size", "warm_up", "final"), [(512, 5, 0.001), (8192, 5, 0.01), (16384, 15, 0.01), (65536, 30, 0.01)]
)
def test_the_papers_schedule(batch_size: int, warm_up: int, final: float) -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], 123.0)
    epochs, steps = 90, 3
    scheduler = paper_schedule(optimizer, batch_size=batch_size, epochs=epochs, steps_per_epoch=steps)
    rates = []
    for _ in range(epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    peak = 0.1 * batch_size / 256
    assert rates[0] == pytest.approx(0.001)
    rise = np.linspace(0.001, peak, warm_up * steps + 1)
    np.testing.assert_allclose(rates[: warm_up * steps + 1], rise, rtol=1e-9)
    after = np.array(rates[warm_up * steps :]).reshape(-1, steps)
    np.testing.assert_allclose(after, after[:, :1].repeat(steps, 1))  # constant within an epoch
    steady = after[: len(after) // 2 * 2, 0].reshape(-1, 2)
    np.testing.assert_allclose(steady[:, 0], steady[:, 1])  # and over two
    ratios = steady[1:, 0] / steady[:-1, 0]
    np.testing.assert_allclose(ratios, ratios[0])
    assert rates[-1] == pytest.approx(final)


def test_the_papers_schedule_checks_its_arguments() -> None:
    p = nn.Parameter(torch.zeros(1))

    def last_lr(**keywords: object) -> float:
        optimizer = torch.optim.SGD([p], 1.0)
        scheduler = paper_schedule(optimizer, **{"batch_size": 256, "epochs": 20, "steps_per_epoch": 1, **keywords})
        for _ in range(keywords.get("epochs", 20) - 1):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    assert last_lr() == pytest.approx(0.001)
    assert last_lr(peak_lr=3.0) == pytest.approx(0.001)
    assert last_lr(peak_lr=1e-4) == pytest.approx(1e-4)  # below the final rate: constant
    assert last_lr(epochs=4) < 0.1  # all warm-up
    for keywords, error in (
        ({"batch_size": 0}, ValueError),
        ({"epochs": 1.5}, TypeError),
        ({"steps_per_epoch": -1}, ValueError),
        ({"peak_lr": 0.0}, ValueError),
        ({"peak_lr": math.inf}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(keywords))):
            last_lr(**keywords)


def test_warmup_cosine_is_relative_to_each_groups_peak() -> None:
    ps = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [ps[0]], "lr": 3.0}, {"params": [ps[1]], "lr": 0.001}])
    scheduler = warmup_cosine(optimizer, 96)
    rates = []
    for step in range(100):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
        if step == 40:  # through a checkpoint
            file = io.BytesIO()
            torch.save(scheduler.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            groups = copy.deepcopy(optimizer.state_dict())
            scheduler = warmup_cosine(optimizer, 7)
            scheduler.load_state_dict(saved)
            optimizer.load_state_dict(groups)
            pickle.loads(pickle.dumps(scheduler))
    factor = np.array(rates) / [3.0, 0.001]
    np.testing.assert_allclose(factor[:, 0], factor[:, 1], rtol=1e-12)
    np.testing.assert_allclose(factor[:20, 0], np.arange(1, 21) / 20, rtol=1e-12)  # 5/24 of 96
    k = np.arange(77)  # from the peak to the last step
    np.testing.assert_allclose(factor[19:96, 0], 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * k / 76)), rtol=1e-10)
    np.testing.assert_allclose(factor[95:, 0], 0.01, rtol=1e-10)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("optimizer_of", [NLCG, torch.optim.SGD])
@pytest.mark.parametrize("loaded", [False, True])
def test_warmup_cosine_of_a_second_phase_has_the_lr_of_that_phase(loaded: bool, optimizer_of: Any, kind: Any) -> None:
    """Whatever the first phase has left in ``initial_lr``; and a scheduler's own state dict has the last word."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of([p], kind(1.0))
    first = warmup_cosine(optimizer, 3, warmup_steps=2)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        first.step()
    if loaded and optimizer.state:  # SGD has none
        saved = optimizer.state_dict()
        optimizer = optimizer_of([p], kind(1.0))
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = kind(0.25)
    second = warmup_cosine(optimizer, 10, warmup_steps=2)
    assert [float(lr) for lr in second.base_lrs] == [0.25]
    assert float(optimizer.param_groups[0]["lr"]) == 0.125
    assert float(optimizer.param_groups[0]["initial_lr"]) == 0.25
    second.load_state_dict(first.state_dict())
    second.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)


def test_warmup_cosine_may_follow_another_schedule_in_a_sequence() -> None:
    """Which has already lowered lr for the first step."""
    optimizer = NLCG([nn.Parameter(torch.zeros(1))], 1.0)
    rise = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    scheduler = SequentialLR(optimizer, [rise, warmup_cosine(optimizer, 9, warmup_steps=0)], milestones=[4])
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])


def test_warmup_cosine_checks_its_arguments() -> None:
    def rates(total: int, **keywords: object) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 2.0)
        scheduler = warmup_cosine(optimizer, total, **keywords)
        found = []
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    assert rates(1) == [2.0]
    assert rates(3, warmup_steps=0, final=0.0) == pytest.approx([2.0, 1.0, 0.0])
    assert rates(4, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates(3, warmup_steps=1, final=1.0) == [2.0, 2.0, 2.0]
    for keywords, error, match in (
        ({"total": 0}, ValueError, "total_steps"),
        ({"total": 2.5}, TypeError, "total_steps"),
        ({"total": 3, "warmup_steps": 4}, ValueError, "warmup_steps must be at most"),
        ({"total": 3, "warmup_steps": -1}, ValueError, "warmup_steps"),
        ({"total": 3, "final": 1.5}, ValueError, "final"),
        ({"total": 3, "final": "0"}, TypeError, "final"),
    ):
        with pytest.raises(error, match=match):
            rates(**keywords)


@pytest.mark.parametrize("kind", [float, np.float64, torch.tensor], ids=["float", "numpy", "tensor"])
def test_a_schedule_may_end_a_rounding_error_below_zero(kind: Any) -> None:
    """As torch's LinearLR does. That is a rate of 0; an lr that is really negative is refused."""
    p = nn.Parameter(torch.ones(2))
    optimizer = NLCG([p], kind(1.0))
    scheduler = LinearLR(optimizer, end_factor=0.0, total_iters=7)
    for _ in range(8):
        before, p.grad = p.detach().clone(), torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 0.0
    assert torch.equal(p, before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = kind(-1e-12)
    with pytest.raises(ValueError, match="Invalid learning rate: -"):
        optimizer.step()


def test_schedulers_cannot_cycle_momentum() -> None:
    """NLCG has no momentum to cycle, so cycle_momentum=False is needed (docs/limits.md)."""
    optimizer = NLCG([nn.Parameter(torch.ones(2))], 0.01)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False)
