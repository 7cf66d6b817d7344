"""What ``NLCG`` and ``add_param_group`` refuse: options and lists of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from fastnlcg import NLCG
from quadratic import everything, one_step, parameter, quadratic_gradients, stepped


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"lr": math.nan}, ValueError, "Invalid learning rate: nan"),
        ({"lr": math.inf}, ValueError, "Invalid learning rate: inf"),
        ({"lr": "0.1"}, TypeError, "lr"),
        ({"lr": None}, TypeError, "lr"),
        ({"lr": 0.1j}, TypeError, "lr"),
        ({"lr": True}, TypeError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element, got shape \(2,\)"),
        ({"eps": -1e-8}, ValueError, "Invalid eps"),
        ({"eps": math.nan}, ValueError, "Invalid eps"),
        ({"curvature_eps": -1.0}, ValueError, "Invalid curvature_eps"),
        ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay"),
        ({"weight_decay": math.nan}, ValueError, "Invalid weight_decay"),
        ({"update": "newton"}, ValueError, "'fletcher_reeves', 'polak_ribiere', 'heavy_ball'; got 'newton'"),
        ({"update": "heavy_ball", "preconditioner": "bfgs"}, ValueError, "beta_max < 1"),
        ({"beta2": 1.0}, ValueError, r"Invalid beta2: 1.0; expected a number in \[0, 1\)"),
        ({"beta2": -0.1}, ValueError, "Invalid beta2"),
        ({"beta2": None}, TypeError, "beta2"),
        ({"beta_max": 1.1}, ValueError, "Invalid beta_max: 1.1"),
        ({"beta_max": math.nan}, ValueError, "Invalid beta_max"),
        ({"beta_max": "0.9"}, TypeError, "beta_max"),
        ({"eps": 0.0, "preconditioner": "adam"}, ValueError, "Invalid eps: 0.0; expected at least 1.17549e-38"),
        ({"update": 3}, TypeError, "update"),
        ({"preconditioner": "newton"}, ValueError, "'adam', 'bfgs', 'muon', None"),
        ({"nonfinite": "ignore"}, ValueError, "'skip', 'propagate'"),
        ({"line_search": (0.02, 0.01, 0.025, 0.025)}, TypeError, "OnlineLineSearch"),
        ({"maximize": 1}, TypeError, "maximize"),
        ({"differentiable": True}, ValueError, "differentiable"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ],
)
def test_invalid_options_are_refused(keywords: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        NLCG([parameter(3)], **{"lr": 0.1, **keywords})


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"lr": 10**400}, "Invalid learning rate"),
        ({"eps": 10**400}, "Invalid eps"),
    ],
)
def test_numbers_beyond_a_double_are_refused(keywords: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NLCG([parameter(3)], **keywords)


def test_invalid_options_of_a_group_are_refused_and_change_nothing() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        NLCG([{"params": [parameter(3)], "lr": -1.0}], 0.1)
    ps, optimizer = stepped()
    before = everything(ps, optimizer)
    for group, error in (
        ({"weight_decay": -1.0}, ValueError),
        ({"lr": "a"}, TypeError),
        ({"eps": 1.0}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group({"params": [parameter(3)], **group})
    assert everything(ps, optimizer) == before
    one_step(ps, optimizer)


def test_invalid_options_set_between_steps_are_refused_and_change_nothing() -> None:
    ps, optimizer = stepped()
    before = everything(ps, optimizer)
    quadratic_gradients(ps)
    for key, value in (
        ("lr", math.nan),
        ("lr", torch.ones(2)),
        ("weight_decay", -1.0),
        ("update", "newton"),
        ("preconditioner", None),
    ):
        good = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match="lr|learning rate|" + key):
            optimizer.step()
        optimizer.param_groups[0][key] = good
    assert everything(ps, optimizer) == before
    optimizer.step()


@pytest.mark.usefixtures("cpu_or_emulated")
def test_lists_of_parameters_are_checked(preconditioner: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        NLCG([], 0.1, preconditioner=preconditioner)
    with pytest.raises(TypeError):
        NLCG(parameter(3), 0.1, preconditioner=preconditioner)
    p = parameter(3)
    with pytest.warns(UserWarning, match="duplicate"):
        NLCG([p, p], 0.1, preconditioner=preconditioner)
    with pytest.raises(ValueError, match="leaf"):
        NLCG([p * 2], 0.1, preconditioner=preconditioner)
    optimizer = NLCG([{"params": []}, {"params": [p]}], 0.1, preconditioner=preconditioner)
    one_step([p], optimizer)
