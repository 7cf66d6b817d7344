"""Parameter groups that users reorder, delete, replace and add, and parameters that come and go."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch
from quadratic import one_step, parameter
from test_state import KINDS, bits, make, step
from torch import nn

pytestmark = pytest.mark.usefixtures("cpu_or_emulated")


def some(kind: str) -> tuple[list[nn.Parameter], NLCG]:
    """Groups of one preconditioner, or a group of matrices before one of ``"adam"``."""
    if kind != "muon":
        return make(kind)
    ps = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3))) for shape in ((4, 5), (3, 2))]
    return ps, NLCG([{"params": ps[:1], "preconditioner": "muon"}, {"params": ps[1:], "lr": 0.002}], 0.02)


@pytest.mark.parametrize("kind", [*KINDS, "muon"])
def test_groups_may_be_reordered(kind: str) -> None:
    """Equal up to the order of the sums."""
    ps, optimizer = some(kind)
    qs, undisturbed = some(kind)
    for t in range(8):
        if t == 4:
            optimizer.param_groups.reverse()
        step(ps, optimizer, t)
        step(qs, undisturbed, t)
        assert optimizer.diagnostics().beta == pytest.approx(undisturbed.diagnostics().beta, rel=1e-5, abs=1e-9)
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_without_gradients_does_not_forget_the_last_set() -> None:
    """Part of the parameters are frozen; then comes a step without any gradient, and then a change of the groups."""
    betas = []
    for empty, change in itertools.product((False, True), ("reorder", "lose state")):
        ps = [parameter(4, seed=k) for k in range(3)]
        optimizer = NLCG([{"params": ps[:2]}, {"params": ps[2:]}], 0.01)
        one_step(ps, optimizer)
        ps[2].grad = None
        for _ in range(2):
            one_step(ps[:2], optimizer)
        if empty:
            optimizer.zero_grad()
            optimizer.step()
        if change == "reorder":
            optimizer.param_groups.reverse()
        else:
            optimizer.state.pop(ps[0])
        one_step(ps[:2], optimizer)
        betas.append(optimizer.diagnostics().beta)
    assert betas[:2] == betas[2:]
    assert betas[0] > 0.0 == betas[1]


@pytest.mark.parametrize("kind", [*KINDS, "muon"])
def test_groups_may_be_deleted_replaced_and_added_again(kind: str) -> None:
    ps, optimizer = some(kind)
    for t in range(3):
        step(ps, optimizer, t)
    gone = optimizer.param_groups.pop(0)
    left = optimizer.param_groups[0]["params"]
    untouched = bits(gone["params"])
    step(left, optimizer, 3)
    assert optimizer.diagnostics().beta == 0.0
    assert bits(gone["params"]) == untouched
    step(left, optimizer, 4)
    optimizer.param_groups.append(gone)  # with its old state
    step(ps, optimizer, 5)
    assert optimizer.diagnostics().beta == 0.0
    step(ps, optimizer, 6)
    new = nn.Parameter(torch.randn(9, 2))
    optimizer.state.pop(gone["params"][0])
    gone["params"][0] = new
    step([new, *ps[1:]], optimizer, 7)
    assert optimizer.diagnostics().beta == 0.0
    assert optimizer.state[new]["step"] == 1
    assert optimizer.diagnostics().step == 8
    del optimizer.param_groups[:]
    with pytest.raises(RuntimeError, match="no parameter groups"):
        optimizer.step()


def test_a_parameter_with_state_keeps_its_preconditioner() -> None:
    """Whatever place its group has."""
    ps, optimizer = some("muon")
    step(ps, optimizer, 0)
    optimizer.param_groups.reverse()
    optimizer.param_groups[1]["preconditioner"] = "adam"
    with pytest.raises(ValueError, match="preconditioner cannot change once there is state"):
        step(ps, optimizer, 1)
    optimizer.param_groups[1]["preconditioner"] = "muon"
    step(ps, optimizer, 1)


def test_a_new_group_has_the_options_that_the_others_share() -> None:
    """Those of a file, say, where the constructor's differ; the rest are the constructor's. What the group itself says
    is checked, and so are the groups given to the constructor."""

    def new(**options: Any) -> dict[str, Any]:
        return {"params": [nn.Parameter(torch.ones(3, 2))], **options}

    method = {"beta_max": 0.5, "update": "heavy_ball", "eps": 1e-6, "line_search": OnlineLineSearch()}
    saved = NLCG([new()], **method).state_dict()
    optimizer = NLCG([new()], 0.5)
    optimizer.load_state_dict(saved)
    optimizer.add_param_group(new())
    first, second = optimizer.param_groups
    assert all(second[key] == first[key] for key in method)
    assert second["lr"] == 0.5
    with pytest.raises(ValueError, match=r"beta_max is 0\.25 in parameter group 2 and 0\.5 in group 0"):
        optimizer.add_param_group(new(beta_max=0.25))
    optimizer.add_param_group(new(preconditioner="muon"))
    optimizer.add_param_group(new())
    assert [g["beta_max"] for g in optimizer.param_groups] == [0.5, 0.5, None, 0.5]
    with pytest.raises(ValueError, match="eps is 1e-08 in parameter group 1"):
        NLCG([new(eps=1e-6), new()])


def test_a_group_takes_a_line_search() -> None:
    """ZeroRedundancyOptimizer puts the constructor's arguments into the groups, and again before every step."""
    search, p = OnlineLineSearch(decrease=0.5), nn.Parameter(torch.ones(2))
    optimizer = NLCG([{"params": [p], "line_search": search}], line_search=search)
    for loss in (1.0, 2.0):
        optimizer.param_groups[0]["line_search"] = search
        p.grad = torch.ones(2)
        optimizer.step(loss=loss)
    assert optimizer.diagnostics().ls_scale == 0.5
    optimizer.param_groups[0]["line_search"] = search
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["line_search"] == search.as_tuple()


def test_a_weight_decay_that_no_group_takes_is_reported() -> None:
    w = nn.Parameter(torch.zeros(3, 3))
    with pytest.warns(UserWarning, match=r"weight_decay=0\.1 has no effect"):
        NLCG([{"params": [w], "weight_decay": 0.0}], weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NLCG([{"params": [w], "weight_decay": 0.0}, {"params": [nn.Parameter(torch.zeros(3))]}], weight_decay=0.1)
        NLCG([{"params": [w], "weight_decay": 0.1}])


@pytest.mark.parametrize(("period", "warns"), [(1, True), (3, False)])
def test_a_set_of_gradients_that_keeps_changing_is_reported(period: int, warns: bool) -> None:
    """Once, if more than 25 of 50 steps had another set than the one before. A step without a gradient is none."""
    common, first, second = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = NLCG([common, first, second])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for t in range(80):
            optimizer.zero_grad()
            optimizer.step()
            for p in (common, second if t // period % 2 else first):
                p.grad = torch.ones(2)
            optimizer.step()
    assert [str(w.message)[:26] for w in seen] == warns * ["in 26 of at most 50 steps "]


def test_state_may_be_cut_and_extended_as_gaussian_splatting_does() -> None:
    """Every entry except ``"step"`` is extended or cut by rows, and given to a new parameter."""
    p = nn.Parameter(torch.randn(10, 3))
    optimizer = NLCG([{"params": [p], "name": "means"}], 0.01)
    for n in (14, 6):
        for t in range(3):
            step([p], optimizer, t)
        entry = optimizer.state.pop(p)
        rows = torch.arange(n) % len(p)
        new = nn.Parameter(p.detach()[rows])
        for key in entry:
            if key != "step":
                entry[key] = entry[key][rows]
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state[new] = entry
        p = new
    step([p], optimizer, 9)
    assert optimizer.state[p]["direction"].shape == (6, 3)
    assert optimizer.state[p]["step"] == 7


def test_three_thousand_groups_are_added_in_linear_time() -> None:
    """Counted in checks, not in seconds: every group is looked at once, and compared with the first."""
    looked = []

    class Counted(dict):
        def __getitem__(self, key: Any) -> Any:
            if key != "params":  # torch's add_param_group looks at these many times
                looked.append(key)
            return super().__getitem__(key)

    def count(n: int) -> int:
        looked.clear()
        optimizer = NLCG([nn.Parameter(torch.ones(1))])
        for _ in range(n):
            optimizer.param_groups[-1] = Counted(optimizer.param_groups[-1])
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        return len(looked)

    assert count(80) <= 2.2 * count(40)
    optimizer = NLCG([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(3000)])
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(1)
    optimizer.step()


def test_lazy_parameters_take_part_once_they_are_materialized() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    optimizer = NLCG(net.parameters(), 0.01)
    optimizer.step()  # nothing has a gradient
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("lr", [np.float32(0.25), np.float64(0.25), np.array(0.25), np.int64(1)])
def test_options_may_be_numpy_scalars(lr: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], lr, eps=np.float64(1e-8), beta2=np.float32(0.5), weight_decay=np.float64(0.5))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float64(0.125)  # as a scheduler's
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == 0.125


def test_a_parameter_comes_back_with_a_gradient_of_other_strides_next_to_it() -> None:
    """Its gradient was overlooked until the next change."""
    ps, optimizer = make("none", n_groups=1)
    qs, undisturbed = make("none", n_groups=1)
    for t in range(6):
        for each, o in ((ps, optimizer), (qs, undisturbed)):
            generator = torch.Generator().manual_seed(t)
            for i, p in enumerate(each):
                p.grad = None if i == 0 and t in (2, 3) else torch.randn(p.shape, generator=generator)
            if o is optimizer and each[1].grad is not None:
                each[1].grad = each[1].grad.t().contiguous().t()
            o.step()
        assert bits(ps) == bits(qs), t


def test_a_larger_set_after_skipped_sets_restarts_the_direction() -> None:
    """Steps without a gradient that moves anything, and new parameters, between two steps of the whole set."""
    ps = [nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(0))]
    optimizer = NLCG(ps[:1], 0.01)
    step(ps[:1], optimizer, 0)
    optimizer.add_param_group({"params": ps[2:]})
    ps[0].grad = None
    ps[2].grad = torch.ones(0)
    optimizer.step(loss=1.0)  # moves nothing
    optimizer.add_param_group({"params": ps[1:2]})
    step([ps[0], ps[2], ps[1]], optimizer, 1)  # another set than that of step 0
    assert optimizer.diagnostics().beta == 0.0
    assert optimizer.diagnostics().step == 2
