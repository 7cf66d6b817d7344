"""What ``load_state_dict`` takes, and what it refuses without changing anything."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from fastnlcg import NLCG, _native
from quadratic import DIAGONAL, everything, one_step, parameter, stepped
from torch import nn


def scalar(saved: dict, name: str, value: float) -> None:
    saved["param_groups"][0]["scalars"][list(_native.SCALARS).index(name)] = value


def quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch announces their removal
        return torch.quantize_per_tensor(torch.ones(()), 0.1, 0, torch.qint8)


def diagonal(saved: dict) -> str:
    return DIAGONAL[saved["param_groups"][0]["preconditioner"]]


def bad(change: object, match: str, preconditioner: str) -> None:
    ps, optimizer = stepped(preconditioner=preconditioner)
    saved = copy.deepcopy(optimizer.state_dict())
    result = change(saved)  # changes `saved`, or returns another dict
    changed = result if isinstance(result, dict) else saved
    before = everything(ps, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(changed)
    assert everything(ps, optimizer) == before
    one_step(ps, optimizer)


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["state"][1].update(direction=torch.ones(3)), "parameter 1.*'direction'.*shape"),
        (lambda s: s["state"][0].pop("direction"), "parameter 0 has .*expected the keys"),
        (lambda s: s["state"][0].update(direction="abc"), "'direction' is str"),
        (lambda s: s["state"][0].update(direction=torch.ones(20, dtype=torch.int64)), "'direction' is torch.int64"),
        (lambda s: s["state"][0].update(step=torch.tensor(-1.0)), "'step'"),
        (lambda s: s["state"][0].update(step="3"), "'step'"),
        (lambda s: s["state"][0][diagonal(s)].fill_(math.nan), "'(hess|exp).*' has values that are not finite"),
        (lambda s: s["state"][0][diagonal(s)].fill_(-1.0), "'(hess|exp).*' has negative"),
        (lambda s: s["state"].update({7: s["state"][0]}), "parameter 7"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "param_groups have"),
        (lambda s: s["param_groups"][0]["params"].append(2), "param_groups have"),
        (lambda s: scalar(s, "rz", math.nan), r"param_groups\[0\]\['scalars'\], 'rz', is nan"),
        (lambda s: scalar(s, "ls_scale", 0.0), "ls_scale"),
        (lambda s: scalar(s, "step", 1.5), "'step'.*whole number"),
        (lambda s: s["param_groups"][0].pop("alpha_prev"), "'alpha_prev'.*missing"),
        (lambda s: s["param_groups"][0].pop("scalars"), "'scalars'.*missing"),
        (lambda s: s["param_groups"][0].update(scalars=None), "'scalars'.*NoneType"),
        (lambda s: s["param_groups"][0].update(scalars=torch.zeros(3)), "'scalars'.*shape"),
        (lambda s: s["param_groups"][0].update(alpha_prev=torch.zeros(1)), "'alpha_prev'.*shape"),
        (lambda s: s["param_groups"][0].update(scalars={"rz": "1"}), "'scalars'.*dict"),
        (lambda s: s["state"][0].update(step=quantized()), "'step'"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), r"param_groups\[0\]: Invalid learning rate"),
        (lambda s: s["param_groups"][0].update(update="newton"), "update"),
        (lambda s: {"state": s["state"]}, "param_groups"),
        (lambda s: {"state": [], "param_groups": s["param_groups"]}, "mapping"),
        (lambda s: {"state": {}, "param_groups": "abc"}, "param_groups"),
    ],
)
def test_a_bad_state_dict_is_refused_and_changes_nothing(change: object, match: str, preconditioner: str) -> None:
    bad(change, match, preconditioner)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["state"][0].update(step=2**63), r"'step'.*2\*\*53"),
        (lambda s: s["state"][0].update(step=1e308), r"'step'.*2\*\*53"),
        (lambda s: s["state"][0].update(direction=torch.full((20,), 1e300, dtype=torch.float64)), "not finite"),
        (lambda s: s["param_groups"][0].update(params=[0, 0]), "twice"),
    ],
)
def test_a_state_dict_that_would_fail_later_is_refused(change: object, match: str) -> None:
    ps, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    before = everything(ps, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert everything(ps, optimizer) == before


@pytest.mark.usefixtures("cpu_or_emulated")
def test_another_optimizers_state_is_refused(preconditioner: str) -> None:
    ps, optimizer = stepped(preconditioner=preconditioner)
    adam = torch.optim.Adam(ps, 0.1)
    adam.step()
    with pytest.raises(ValueError, match=r"lacks the key|expected the keys"):
        optimizer.load_state_dict(adam.state_dict())


@pytest.mark.usefixtures("cpu_or_emulated")
def test_options_follow_the_state_dict(preconditioner: str) -> None:
    """As in torch; the preconditioner is one of them."""
    ps, optimizer = stepped(preconditioner=preconditioner)
    qs, other = stepped(preconditioner=None)
    with pytest.warns(UserWarning, match="changes preconditioner"):
        optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            p.copy_(q)
    for _ in range(2):
        one_step(ps, optimizer)
        one_step(qs, other)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))
    assert optimizer.diagnostics() == other.diagnostics()


@pytest.mark.usefixtures("cpu_or_emulated")
def test_state_of_another_dtype_is_converted_and_stays_float32(preconditioner: str) -> None:
    ps, optimizer = stepped(preconditioner=preconditioner)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["direction"] = entry["direction"].double()
    half = [nn.Parameter(p.detach().bfloat16()) for p in ps]
    other = NLCG(half, 0.1, preconditioner=preconditioner)
    other.load_state_dict(saved)
    assert other.state[half[0]]["direction"].dtype == torch.float32
    assert torch.equal(other.state[half[0]]["direction"], optimizer.state[ps[0]]["direction"])
    one_step(half, other)


def test_its_own_state_dict_is_taken_after_a_propagated_nan() -> None:
    ps, optimizer = stepped(nonfinite="propagate")
    ps[0].grad.fill_(math.nan)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("own", ["adam", "bfgs", None])
def test_a_state_after_enormous_gradients_loads(own: str | None) -> None:
    p = parameter(5)
    optimizer = NLCG([p], 1e-30, preconditioner=own)
    for _ in range(4):
        p.grad = torch.full((5,), 2e38)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = NLCG([p], 0.1, preconditioner=own)
    again.load_state_dict(saved)
    assert torch.equal(again.state[p]["direction"], optimizer.state[p]["direction"])
    saved["state"][0]["direction"][1] = math.nan
    with pytest.raises(ValueError, match="'direction' has values that are not finite"):
        again.load_state_dict(saved)


def test_a_step_count_of_one_element_is_taken() -> None:
    ps, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor([3.0])
    optimizer.load_state_dict(saved)
    one_step(ps, optimizer)
    assert optimizer.state[ps[0]]["step"] == 4


def test_options_with_which_no_step_is_possible_are_refused() -> None:
    p = nn.Parameter(torch.ones(12, 8))
    optimizer = NLCG([{"params": [p], "preconditioner": "muon", "split": 3}])
    one_step([p], optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["split"] = 5
    before = everything([p], optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(12, 8\) cannot be split into 5 parts"):
        optimizer.load_state_dict(saved)
    assert everything([p], optimizer) == before
    of_vectors = NLCG([nn.Parameter(torch.ones(3))], update="heavy_ball")
    with pytest.raises(ValueError, match="parameter 0 .*has no matrices"):
        of_vectors.load_state_dict(NLCG([p], preconditioner="muon").state_dict())
    double = NLCG([nn.Parameter(torch.ones(12, 8, dtype=torch.float64))])
    with pytest.raises(ValueError, match="parameter 0 .*is torch.float64 and state_dtype 'bfloat16'"):
        double.load_state_dict(NLCG([p], state_dtype=torch.bfloat16).state_dict())
    assert double.param_groups[0]["state_dtype"] is None


def test_another_preconditioner_or_state_dtype_of_a_file_is_told() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    saved = NLCG([p]).state_dict()
    optimizer = NLCG([p], preconditioner="muon", state_dtype=torch.bfloat16)
    before = everything([p], optimizer)
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="'muon'"):
        optimizer.load_state_dict(saved)
    assert everything([p], optimizer) == before
    message = (
        r"preconditioner of parameter group 0 from 'muon' to 'adam' and "
        r"state_dtype of parameter group 0 from 'bfloat16' to None"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        optimizer.load_state_dict(saved)
    assert warned[0].filename == __file__
    assert optimizer.param_groups[0]["preconditioner"] == "adam"
    saved["param_groups"][0].pop("state_dtype")  # as in files of 0.8
    kept = NLCG([p], state_dtype=torch.bfloat16)
    kept.load_state_dict(saved)
    assert kept.param_groups[0]["state_dtype"] == "bfloat16"
