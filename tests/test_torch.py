"""What torch checks of its own optimizers, driven by an ``OptimizerInfo`` of ours, as torch's test suite drives it.

The checks are those of ``TestOptimRenewed`` in torch's ``test/test_optim.py``, which is not in the wheel; what is,
``torch.testing._internal.common_optimizers``, gives the inputs, the erroneous inputs and the combinations with
``foreach`` and ``fused``. Of them these do not apply:

    rosenbrock_sparse, sparse inputs          sparse gradients are refused (test_parameters.py)
    complex, complex_2d                       complex parameters are refused (test_parameters.py)
    mixed_device_dtype, *_multigpu            one optimizer, one device; mixed dtypes: test_parameters.py
    foreach_large_tensor, peak_memory_foreach no foreach implementation; memory: test_parameters.py, 2^31: test_step.py
    defaults_changed_to_foreach               likewise
    fused_does_not_step_if_foundinf           of CUDA: test_cuda.py
    cpu_load_state_dict, *_with_cuda_params   of CUDA: test_cuda.py
    second_order_optims_*                     of optimizers that call their closure more than once
    TestDifferentiableOptimizer               differentiable=True is refused: the step is native
    "capturable" inputs                       of CUDA: test_cuda.py
    shared options inside one group           NLCG's sums run over all groups, so only lr, weight_decay and maximize may
                                              differ: param_groups_* gives the others to the optimizer
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of its testing tools
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        _get_optim_inputs_including_global_cliquey_kwargs,
        get_error_inputs_for_all_optims,
    )

OF_GROUP = ("lr", "weight_decay", "maximize")


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    search = OnlineLineSearch()
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.01},
        "lr as a tensor": {"lr": torch.tensor(0.001)},
        "weight decay": {"weight_decay": 0.1},
        "maximize": {"maximize": True, "weight_decay": 0.1},
        "beta2, beta_max": {"beta2": 0.95, "beta_max": 0.8},
        "polak_ribiere": {"update": "polak_ribiere"},
        "heavy_ball": {"update": "heavy_ball"},
        "bfgs": {"preconditioner": "bfgs", "lr": 1e-4},
        "bfgs, polak_ribiere": {"preconditioner": "bfgs", "update": "polak_ribiere", "weight_decay": 0.1, "lr": 1e-4},
        "none": {"preconditioner": None, "lr": 1e-4},
        "none, maximize": {"preconditioner": None, "maximize": True, "lr": 1e-4},
        "line search": {"line_search": search, "nonfinite": "propagate"},
        "stochastic rounding": {"stochastic_rounding": True},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in options.items()]


SCHEDULERS: list[Callable[[Optimizer], Any]] = [
    lambda o: StepLR(o, gamma=0.9, step_size=10),
    lambda o: LinearLR(o, start_factor=0.4, total_iters=4),
    lambda o: ExponentialLR(o, gamma=0.9),
    lambda o: CosineAnnealingLR(o, T_max=40),
    lambda o: OneCycleLR(o, max_lr=0.01, total_steps=40, cycle_momentum=False),
    ReduceLROnPlateau,
]
INFO = OptimizerInfo(
    NLCG,
    optim_inputs_func=inputs,
    scheduler_inputs=[[scheduler] for scheduler in SCHEDULERS],
    supported_impls=("foreach", "fused"),
    not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable", "stochastic_rounding"),
    has_capturable_arg=True,
    supports_complex=False,
    supports_multiple_devices=False,
    optim_error_inputs_func=get_error_inputs_for_all_optims,
    supports_fused_on=("cpu",),
)


def every_input(**changes: Any) -> list[Any]:
    """All options, without a flag, and with foreach and fused in turn."""
    found = _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)
    return [pytest.param(i.kwargs, id=i.desc) for i in found]


all_inputs = pytest.mark.parametrize("options", every_input())
base_inputs = pytest.mark.parametrize("options", [pytest.param(i.kwargs, id=i.desc) for i in inputs("cpu")])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def make(params: Any, options: dict[str, Any], **more: Any) -> NLCG:
    return NLCG(params, **copy.deepcopy(options), **more)


class Problem:
    """|W x + b|^2, the problem of torch's checks."""

    def __init__(self, dtype: torch.dtype, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(10, 5, 2, generator=generator), torch.randn(10, 2, generator=generator)
        weight, bias = weight.to(dtype)[..., 0], bias.to(dtype)[..., 0]
        self.weight = Parameter(weight.clone(memory_format=torch.contiguous_format) if contiguous else weight)
        self.bias = Parameter(bias.clone() if contiguous else bias)
        self.input = torch.randn(5, generator=generator).to(dtype)

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def loss(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def train(self, optimizer: NLCG, steps: int, scheduler: Any = None) -> None:
        initial = self.loss().item()
        for _ in range(steps):
            loss = optimizer.step(self.loss)
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss.detach())
            elif scheduler is not None:
                scheduler.step()
        if optimizer.param_groups[0]["maximize"]:
            assert self.loss().item() > initial
        else:
            assert self.loss().item() < initial


def test_the_inputs_leave_foreach_and_fused_to_the_checks() -> None:
    for given in INFO.optim_inputs_func(device="cpu"):
        assert not any(flag in given.kwargs for flag in ("foreach", "fused", "differentiable"))


@both_dtypes
def test_errors(dtype: torch.dtype) -> None:
    for error in INFO.optim_error_inputs_func(device="cpu", dtype=dtype):
        given = error.optimizer_error_input
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [Parameter(torch.ones(1, 1, dtype=dtype))] if given.params is None else given.params
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                NLCG(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                NLCG(params, **given.kwargs)


@pytest.mark.parametrize("scheduler", [None, *range(len(SCHEDULERS))])
@pytest.mark.parametrize("contiguous", [True, False])
@both_dtypes
@base_inputs
def test_goes_right_direction(options: dict[str, Any], dtype: torch.dtype, contiguous: bool, scheduler: Any) -> None:
    problem = Problem(dtype, contiguous)
    optimizer = make(problem.params, options)
    (constructor,) = (None,) if scheduler is None else INFO.scheduler_inputs[scheduler]
    problem.train(optimizer, 20, None if constructor is None else constructor(optimizer))


@both_dtypes
def test_parameters_with_gaps_have_the_bits_of_whole_ones(dtype: torch.dtype) -> None:
    gapped, whole = Problem(dtype, contiguous=False), Problem(dtype)
    for problem in (gapped, whole):
        problem.train(NLCG(problem.params, 0.01), 5)
    assert all(torch.equal(p, q) for p, q in zip(gapped.params, whole.params, strict=True))


@both_dtypes
@pytest.mark.parametrize("scheduler", range(len(SCHEDULERS)))
def test_param_group_with_lrscheduler_goes_right_direction(scheduler: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    optimizer = NLCG([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
    (constructor,) = INFO.scheduler_inputs[scheduler]
    problem.train(optimizer, 20, constructor(optimizer))


@both_dtypes
@all_inputs
def test_tensor_lr(options: dict[str, Any], dtype: torch.dtype) -> None:
    number, tensor = Problem(dtype), Problem(dtype)
    rest = {key: value for key, value in options.items() if key != "lr"}
    optimizers = (
        make(number.params, rest, lr=1e-3),
        make(tensor.params, rest, lr=torch.tensor(1e-3, dtype=torch.float64)),
    )
    for _ in range(5):
        for problem, optimizer in zip((number, tensor), optimizers, strict=True):
            problem.loss()
            optimizer.step()
        assert torch.equal(number.weight, tensor.weight)
        assert torch.equal(number.bias, tensor.bias)


@both_dtypes
@base_inputs
def test_foreach_and_fused_change_no_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With a frozen layer, a step without any gradient, and an empty last parameter (pytorch#100701)."""
    runs = []
    for flags in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid())
        net.to(dtype)
        empty = Parameter(torch.empty(0, dtype=dtype))
        empty.grad = torch.empty(0, dtype=dtype)
        optimizer = make([*net.parameters(), empty], options, **flags)
        assert {key: optimizer.param_groups[0][key] for key in flags} == flags
        x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
        for t in range(7):
            optimizer.zero_grad()
            net[2].requires_grad_(not 3 <= t < 5)
            if t != 2:
                net(x).sum().backward()
            before = [p.clone() for p in net.parameters()]
            optimizer.step()
            moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
            assert moved == ([False] * 4 if t == 2 else [True, True, t not in (3, 4), t not in (3, 4)])
        runs.append([*net.parameters(), *(s for p in net.parameters() for s in optimizer.state[p].values())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@both_dtypes
@all_inputs
def test_param_groups_weight_decay(options: dict[str, Any], dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    of_group = {key: options[key] for key in OF_GROUP if key in options}
    shared = {key: value for key, value in options.items() if key not in OF_GROUP}
    groups = [{"params": [problem.weight], **of_group}, {"params": [problem.bias], **of_group, "weight_decay": 0.0}]
    problem.train(make(groups, shared), 20)


@both_dtypes
@all_inputs
def test_param_groups_lr(options: dict[str, Any], dtype: torch.dtype) -> None:
    """If a group maximizes, it is the first."""
    problem, irrelevant = Problem(dtype), Parameter(torch.randn(2, dtype=dtype))
    before = irrelevant.detach().clone()
    of_group = {key: options[key] for key in OF_GROUP if key in options}
    shared = {key: value for key, value in options.items() if key not in OF_GROUP}
    groups = [{"params": problem.params, **of_group, "lr": options.get("lr", 1e-3)}, {"params": [irrelevant]}]
    optimizer = make(groups, shared, lr=1e-28)

    def loss() -> Tensor:
        value = Problem.loss(problem)
        irrelevant.grad = torch.rand_like(irrelevant)
        return value

    problem.loss = loss  # type: ignore[method-assign]
    problem.train(optimizer, 20)
    torch.testing.assert_close(irrelevant.detach(), before)


@both_dtypes
@all_inputs
def test_step_is_noop_when_params_have_no_grad(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [torch.randn(2, 3, dtype=dtype) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = make(params, options)
    assert optimizer.step(lambda: torch.tensor([1], dtype=dtype)) == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@both_dtypes
@all_inputs
def test_step_is_noop_for_zero_grads(options: dict[str, Any], dtype: torch.dtype) -> None:
    if options.get("weight_decay"):
        options = {**options, "weight_decay": 0.0}
    param = torch.randn(5, 1, dtype=dtype, requires_grad=True)
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    make([param], options).step(lambda: torch.tensor([1], dtype=dtype))
    assert torch.equal(param, before)


@all_inputs
def test_grads_are_left_as_they_were(options: dict[str, Any]) -> None:
    param = torch.randn(5, 4, requires_grad=True)
    param.grad = torch.randn(5, 4)
    before, version = param.grad.clone(), param.grad._version
    make([param], options).step()
    assert torch.equal(param.grad, before)
    assert param.grad._version == version


@all_inputs
def test_optimizer_can_be_printed(options: dict[str, Any]) -> None:
    text = repr(make([Parameter(torch.randn(2, 3)) for _ in range(2)], options))
    assert text.startswith("NLCG (\nParameter Group 0\n    adjust_lr_fn: ")
    assert "scalars" not in text
    assert "alpha_prev" not in text
    assert f"\n    lr: {options.get('lr', 0.001)}\n" in text


def named(params: list[Parameter], are_named: bool) -> Any:
    return [(f"name{i}", p) for i, p in enumerate(params)] if are_named else params


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0) if isinstance(a, Tensor) else same_containers(a, b)


def same_containers(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize(("named0", "named1"), list(itertools.product([True, False], repeat=2)))
@both_dtypes
@base_inputs
def test_state_dict_deterministic(options: dict[str, Any], dtype: torch.dtype, named0: bool, named1: bool) -> None:
    problem, clone = Problem(dtype), Problem(dtype)
    optimizer = make(named(problem.params, named0), options)
    for _ in range(10):
        optimizer.step(problem.loss)
    with torch.no_grad():
        for p, q in zip(problem.params, clone.params, strict=True):
            q.copy_(p)
    other = make(named(clone.params, named1), options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        optimizer.step(problem.loss)
        other.step(clone.loss)
        same(problem.params, clone.params)
    same(without_names(optimizer.state_dict()), without_names(other.state_dict()))


def conv(dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    return net.to(dtype), torch.rand(1, 4, 16, 16, dtype=dtype)


def conv_step(optimizer: NLCG, net: torch.nn.Module, x: Tensor) -> None:
    optimizer.zero_grad()
    loss = net(x).sum()
    loss.backward()
    optimizer.step(loss=loss)


@both_dtypes
@all_inputs
def test_can_load_older_state_dict(options: dict[str, Any], dtype: torch.dtype) -> None:
    net, x = conv(dtype)
    optimizer = make(net.parameters(), options)
    for _ in range(3):
        conv_step(optimizer, net, x)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in INFO.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    conv_step(optimizer, net, x)
    assert optimizer.diagnostics().step == 4


@pytest.mark.parametrize(("named0", "named1"), list(itertools.product([True, False], repeat=2)))
@base_inputs
def test_can_load_from_to_named_state_dict(options: dict[str, Any], named0: bool, named1: bool) -> None:
    net, x = conv(torch.float32)
    optimizer = make(net.named_parameters() if named0 else net.parameters(), options)
    for _ in range(3):
        conv_step(optimizer, net, x)
    other = make(net.named_parameters() if named1 else net.parameters(), options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    conv_step(other, net, x)
    if named0 or named1:
        names = other.state_dict()["param_groups"][0]["param_names"]
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("are_named", [True, False])
@both_dtypes
@all_inputs
def test_save_load_equality_with_weights_only(options: dict[str, Any], dtype: torch.dtype, are_named: bool) -> None:
    problem = Problem(dtype)
    optimizer = make(named(problem.params, are_named), options)
    for _ in range(3):
        optimizer.step(problem.loss)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    for weights_only in (False, True):
        file.seek(0)
        same(torch.load(file, weights_only=weights_only), saved)


@both_dtypes
@all_inputs
def test_load_nontensor_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [Parameter(torch.randn(2, 3, dtype=dtype)) for _ in range(2)]
    for p in params:
        p.grad = torch.rand_like(p)
    optimizer = make(params, options)
    for _ in range(3):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = entry["step"].item()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 4


# ---- hooks -----------------------------------------------------------------------------------------------------------


def state_dict_pre_hook(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1


def state_dict_post_hook(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict["ran_pre_hook"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@all_inputs
def test_state_dict_hooks(options: dict[str, Any]) -> None:
    param = torch.rand(2, 3, requires_grad=True)
    optimizer = make([param], options)
    pre = optimizer.register_state_dict_pre_hook(state_dict_pre_hook)
    assert optimizer.state_dict()["state"]["test"] == 1
    post = optimizer.register_state_dict_post_hook(state_dict_post_hook)
    both = optimizer.state_dict()
    assert "test" not in both["state"]
    assert both["ran_pre_hook"]
    pre.remove()
    del optimizer.state["test"]
    assert not optimizer.state_dict()["ran_pre_hook"]
    post.remove()
    optimizer.state["test"] = 1  # an entry that a hook has left does no harm
    param.grad = torch.ones(2, 3)
    for _ in range(2):
        optimizer.step()
        optimizer.diagnostics()
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["test"] == 1
    assert optimizer.diagnostics().step == 2


@all_inputs
def test_load_state_dict_hooks(options: dict[str, Any]) -> None:
    def first(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def second(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        mine = copy.deepcopy(state_dict)
        mine["param_groups"][0]["lr"] = 0.003
        return mine

    def post(optimizer: Optimizer) -> None:
        optimizer.state["ran_second"] = optimizer.param_groups[0]["lr"] == 0.003
        optimizer.state["ran_post"] = True

    optimizer = make([torch.rand(2, 3, requires_grad=True)], options)
    state_dict = optimizer.state_dict()
    handle = optimizer.register_load_state_dict_pre_hook(first)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(second, prepend=True)
    optimizer.register_load_state_dict_post_hook(post)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the first hook comes last
    assert not optimizer.state["ran_second"]
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["ran_second"]
    assert optimizer.state["ran_post"]


def test_a_load_post_hook_sees_the_state_that_was_loaded() -> None:
    """Not bfloat16, to which torch's own load casts the state of such parameters; and what it writes stays."""
    p = Parameter(torch.ones(40, dtype=torch.bfloat16))
    p.grad = torch.linspace(-1, 1, 40).bfloat16()
    optimizer = NLCG([p])
    optimizer.step()
    saved, seen = copy.deepcopy(optimizer.state_dict()), []

    def post(optimizer: Optimizer) -> None:
        seen.append({key: value.clone() for key, value in optimizer.state[p].items()})
        optimizer.state[p]["direction"].zero_()

    optimizer.register_load_state_dict_post_hook(post)
    optimizer.load_state_dict(saved)
    assert seen[0].keys() == saved["state"][0].keys()
    for key, value in seen[0].items():
        assert value.dtype == saved["state"][0][key].dtype
        assert torch.equal(value, saved["state"][0][key])
    assert not optimizer.state[p]["direction"].any()


@pytest.mark.parametrize("with_gradient", [False, True])
@all_inputs
def test_step_hooks(options: dict[str, Any], with_gradient: bool) -> None:
    param = torch.tensor([1.0, 1.0])
    optimizer, other = make([param], options), SGD([param])
    param.grad = torch.ones(2) if with_gradient else None
    seen: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append(0)),
        register_optimizer_step_post_hook(lambda *_: seen.append(5)),
        optimizer.register_step_pre_hook(lambda *_: seen.append(1)),
        optimizer.register_step_post_hook(lambda *_: seen.append(2)),
        other.register_step_pre_hook(lambda *_: seen.append(1)),
        other.register_step_post_hook(lambda *_: seen.append(2)),
    ]
    try:
        optimizer.step()
        assert seen == [0, 1, 2, 5]
        other.step()
        optimizer.step()
        assert seen == [0, 1, 2, 5] * 3
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == [0, 1, 2, 5] * 3
    assert optimizer.diagnostics().step == (3 if with_gradient else 0)


@all_inputs
def test_deepcopy_copies_all_public_attrs(options: dict[str, Any]) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.rand_like(p)
    optimizer = make(params, options)
    for _ in range(3):
        optimizer.step()

    def public(o: Optimizer) -> set[str]:
        return {key for key in o.__dict__ if not key.startswith("_")}

    assert public(optimizer) == public(copy.deepcopy(optimizer))


@both_dtypes
@base_inputs
def test_non_empty_state(options: dict[str, Any], dtype: torch.dtype) -> None:
    net = torch.nn.Linear(5, 5).to(dtype)
    optimizer = make(net.parameters(), options)
    net(torch.rand(2, 5, dtype=dtype)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
    for entry in optimizer.state.values():
        assert {"step", "direction"} <= set(entry)
