"""Files that versions have written: this one and later ones load them, and resume bit for bit.

python tests/test_checkpoints.py FILE     writes a fixture with the version that is installed; once a version that
                                          changes what is saved, into tests/fixtures
"""

from __future__ import annotations

import copy
import io
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("state_*.pt"))
KINDS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam_pr": {"update": "polak_ribiere"},
    "bfgs": {"preconditioner": "bfgs"},
    "bfgs_pr": {"preconditioner": "bfgs", "update": "polak_ribiere"},
    "none": {"preconditioner": None},
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def make(net: nn.Sequential, kind: str) -> NLCG:
    first = {"params": [net[0].weight, net[0].bias], "lr": 0.02}
    second = {"params": [net[2].weight, net[2].bias], "weight_decay": 0.1}
    return NLCG([first, second], 0.01, line_search=OnlineLineSearch(), **KINDS[kind])


def steps(net: nn.Module, optimizer: NLCG, begin: int, end: int) -> None:
    """With gradients that any machine computes alike."""
    for k in range(begin, end):
        rng = torch.Generator().manual_seed(100 + k)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=rng) + p.detach()
        optimizer.step(loss=2.0 + torch.randn((), generator=rng).item() * 0.1)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clones(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def write(path: str) -> None:
    found = {}
    for kind in KINDS:
        net = model()
        optimizer = make(net, kind)
        steps(net, optimizer, 0, 6)
        saved = {"model": clones(net), "optimizer": through_a_file(optimizer.state_dict())}
        steps(net, optimizer, 6, 12)
        found[kind] = {**saved, "then": clones(net)}
    torch.save(found, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_file_of_every_version_resumes_to_the_bit(path: Path, kind: str) -> None:
    saved = torch.load(path, weights_only=True)[kind]
    net = model()
    optimizer = make(net, kind)
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["scalars"] is optimizer.param_groups[1]["scalars"]
    assert optimizer.diagnostics().step == 6
    steps(net, optimizer, 6, 12)
    new_sums = path.stem == "state_0_8" and kind.startswith("adam")  # 0.9 adds up in runs
    for key, value in net.state_dict().items():
        # torch forms the model's gradients, and its products have other bits on another architecture.
        if platform.machine() != "x86_64" or new_sums:
            torch.testing.assert_close(value, saved["then"][key], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, saved["then"][key]), key


def stepped(kind: str = "adam") -> tuple[nn.Sequential, NLCG]:
    net = model()
    optimizer = make(net, kind)
    steps(net, optimizer, 0, 3)
    return net, optimizer


def test_state_and_group_entries_that_are_unknown_are_kept() -> None:
    net, optimizer = stepped()
    twin, expected = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["third_moment"] = torch.zeros(4, 5)
    saved["param_groups"][0]["lookahead"] = True
    optimizer.load_state_dict(saved)
    steps(net, optimizer, 3, 6)
    steps(twin, expected, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    assert optimizer.param_groups[0]["lookahead"]
    assert torch.equal(optimizer.state[next(net.parameters())]["third_moment"], torch.zeros(4, 5))


def test_the_users_own_keys_in_a_group_are_kept() -> None:
    _, optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(initial_lr=0.1, name="stem")
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["name"] == "stem"


def test_names_are_matched_where_both_sides_have_them() -> None:
    net = model()
    optimizer = NLCG(net.named_parameters())
    steps(net, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    backwards = NLCG(reversed(list(net.named_parameters())))
    with pytest.raises(ValueError, match=r"param_names'\]\[0\] is '0.weight', expected '2.bias'"):
        backwards.load_state_dict(saved)
    assert not backwards.state
    NLCG(net.parameters()).load_state_dict(saved)  # one side without names: by order


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # inductor warns when it is imported


def checkpointed(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in net))


def as_fsdp1_names_them(named: Named) -> Named:
    prefix = "_fsdp_wrapped_module."
    return [(prefix + name.replace(".", f".{prefix}_checkpoint_wrapped_module."), p) for name, p in named]


Named = list[tuple[str, nn.Parameter]]
WRAPPED: dict[str, Callable[[nn.Sequential], Named]] = {
    "plain": lambda net: list(net.named_parameters()),
    "compiled": lambda net: list(compiled(net).named_parameters()),
    "replicated": lambda net: list(nn.DataParallel(net).named_parameters()),
    "compiled, replicated": lambda net: list(nn.DataParallel(compiled(net)).named_parameters()),
    "replicated, compiled": lambda net: list(compiled(nn.DataParallel(net)).named_parameters()),
    "replicated twice": lambda net: list(nn.DataParallel(nn.DataParallel(net)).named_parameters()),
    "its layers compiled": lambda net: list(nn.Sequential(*map(compiled, net)).named_parameters()),
    "a layer replicated": lambda net: list(nn.Sequential(nn.DataParallel(net[0]), *net[1:]).named_parameters()),
    "checkpointed, compiled": lambda net: list(compiled(checkpointed(net)).named_parameters()),
    "FSDP1, checkpointed": lambda net: as_fsdp1_names_them(list(net.named_parameters())),
}


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [pair for x in WRAPPED for pair in dict.fromkeys([("plain", x), (x, "plain")])]
)
def test_names_of_a_wrapped_model_are_the_models(first: str, second: str, adamw: bool) -> None:
    """From the wrapped model to the plain one, and the other way round. Another order is refused all the same."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = (torch.optim.AdamW if adamw else NLCG)(WRAPPED[first](net))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    named = WRAPPED[second](net)
    load = "load_adamw_state_dict" if adamw else "load_state_dict"
    loaded = NLCG(named)
    getattr(loaded, load)(saved)
    assert loaded.param_groups[0]["param_names"] == [name for name, _ in named]
    swapped = NLCG(named[2:] + named[:2])
    with pytest.raises(ValueError, match=r"param_names'\]\[0\] is .*0.*weight', expected .*2.*weight'"):
        getattr(swapped, load)(saved)
    assert not swapped.state


class OfTheUsers(nn.Module):
    """Has a module called module, and by its side a parameter of the same name and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.module = nn.Linear(4, 4, bias=False)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, compiled])
def test_a_module_called_module_is_no_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = OfTheUsers()
    named = list(wrap(net).named_parameters())
    saved = NLCG(named).state_dict()
    NLCG(net.named_parameters()).load_state_dict(saved)
    for ours in (net, wrap(net)):
        with pytest.raises(ValueError, match="the orders differ"):
            NLCG(reversed(list(ours.named_parameters()))).load_state_dict(saved)


def test_names_that_are_not_one_a_parameter() -> None:
    optimizer = NLCG(model().named_parameters())
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"].pop()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['param_names'\] has 3 names"):
        optimizer.load_state_dict(saved)


def test_an_entry_that_reading_the_state_has_made() -> None:
    net = model()
    optimizer = NLCG(net.parameters())
    assert not optimizer.state[net[0].weight]
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] == {0: {}}
    other = NLCG(model().parameters())
    other.load_state_dict(saved)
    assert not other.state


def test_the_scalars_are_one_entry_of_a_group_and_not_printed() -> None:
    _, optimizer = stepped("bfgs")
    optimizer.state_dict()
    known = {"lr", "weight_decay", "maximize", "params", "scalars", "alpha_prev", "foreach", "fused", "differentiable"}
    options = {"update", "preconditioner", "line_search", "eps", "curvature_eps", "beta2", "beta_max"}
    more = {"nonfinite", "stochastic_rounding", "capturable", "max_grad_norm", "skip_grad_norm"}
    more |= {"state_dtype", "adjust_lr_fn", "stacked", "split"}
    assert all(set(group) == known | options | more for group in optimizer.param_groups)
    assert "scalars" not in repr(optimizer)
    assert "rz" not in repr(optimizer)
    assert "dtype=" not in repr(optimizer)  # of a tensor whose first line alone was left out


@pytest.mark.parametrize("kind", KINDS)
def test_map_location_and_other_dtypes(kind: str) -> None:
    """A float32 file into parameters of other dtypes: state takes the dtype that goes with those, unrounded."""
    _, optimizer = stepped(kind)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, map_location=torch.device("cpu"), weights_only=True)
    for dtype, of_state in (
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ):
        other = make(model().to(dtype), kind)
        other.load_state_dict(saved)
        other.diagnostics()
        for p, entry in other.state.items():
            for key, value in entry.items():
                expected = torch.float64 if key == "step" else of_state
                assert value.dtype == expected, key
                assert p.dtype == dtype
        for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
            for key in mine:
                assert torch.equal(mine[key].double(), theirs[key].double()), key


if __name__ == "__main__":
    write(sys.argv[1])
