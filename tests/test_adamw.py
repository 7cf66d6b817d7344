"""From AdamW and back: the same moves where h does not change, and to first order where it does."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastnlcg import NLCG, CGDescent, OnlineLineSearch, decay_groups, warmup_cosine
from rank_training import loss_of, model, sharded, whole
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

BETAS = (0.9, 0.999)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((40, 7), (33,), (5,))]


def set_gradients(ps: list[nn.Parameter], t: int, *, constant_size: bool) -> None:
    """Of random signs; of one size per element, which keeps v, or of random sizes."""
    generator = torch.Generator().manual_seed(t)
    for p in ps:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = (
            noise.sign() * torch.linspace(0.1, 2.0, p.numel(), dtype=p.dtype).view_as(p) if constant_size else noise
        )


def adamw(ps: list[nn.Parameter], steps: int, *, constant_size: bool, **options: Any) -> torch.optim.AdamW:
    groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 3e-3, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, weight_decay=0.1, **options)
    for t in range(steps):
        set_gradients(ps, t, constant_size=constant_size)
        optimizer.step()
    return optimizer


def twin(ps: list[nn.Parameter], **options: Any) -> tuple[list[nn.Parameter], NLCG]:
    copies = [nn.Parameter(p.detach().clone()) for p in ps]
    held = {"update": "heavy_ball", "beta_max": BETAS[0]} | options
    return copies, NLCG([{"params": copies[:2]}, {"params": copies[2:]}], 1.0, **held)


@pytest.mark.parametrize(("constant_size", "tolerance"), [(True, 1e-10), (False, 0.05)])
def test_goes_on_as_adamw(constant_size: bool, tolerance: float) -> None:
    """And back. With gradients of one size the moves are AdamW's to rounding: 400 steps leave no bias in m."""
    ps = parameters()
    theirs = adamw(ps, 400, constant_size=constant_size)
    start = [p.detach().clone() for p in ps]
    qs, ours = twin(ps)
    ours.load_adamw_state_dict(theirs.state_dict())
    assert [group["lr"] for group in ours.param_groups] == pytest.approx([1e-4, 3e-4])
    assert [group["weight_decay"] for group in ours.param_groups] == pytest.approx([1.0, 2.0])
    for t in range(400, 405):
        for x, optimizer in ((ps, theirs), (qs, ours)):
            set_gradients(x, t, constant_size=constant_size)
            optimizer.step()
    for p, q, before in zip(ps, qs, start, strict=True):
        assert torch.linalg.vector_norm(p - q) <= tolerance * torch.linalg.vector_norm(p - before)
    assert all(ours.state[q]["step"] == 405 for q in qs)

    again = adamw([nn.Parameter(q.detach().clone()) for q in qs], 0, constant_size=True)
    again.load_state_dict(ours.adamw_state_dict(BETAS[0]))
    for group, other in zip(again.param_groups, theirs.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "lr", "weight_decay")} == {
            k: v for k, v in other.items() if k not in ("params", "lr", "weight_decay")
        }
        assert (group["lr"], group["weight_decay"]) == pytest.approx((other["lr"], other["weight_decay"]))
    for p, q in zip(ps, [q for group in again.param_groups for q in group["params"]], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = again.state[q][key], theirs.state[p][key]
            assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b)
        assert again.state[q]["step"] == 405


def test_there_and_back_is_the_same_state() -> None:
    ps = parameters()
    theirs = adamw(ps, 20, constant_size=False)
    _, ours = twin(ps)
    ours.load_adamw_state_dict(theirs.state_dict())
    back = ours.adamw_state_dict(BETAS[0])["state"]
    for i, entry in theirs.state_dict()["state"].items():
        torch.testing.assert_close(back[i]["exp_avg"], entry["exp_avg"], rtol=1e-12, atol=1e-15)
        assert torch.equal(back[i]["exp_avg_sq"], entry["exp_avg_sq"])


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_conjugate_beta_begins_between_its_bounds(update: str) -> None:
    """rz of a gradient that was not kept: its expectation under v."""
    ps = parameters()
    theirs = adamw(ps, 300, constant_size=False)
    qs, ours = twin(ps, update=update)
    ours.load_adamw_state_dict(theirs.state_dict())
    set_gradients(qs, 300, constant_size=False)
    ours.step()
    assert 0.5 < ours.diagnostics().beta <= 0.9


def test_bfloat16_and_a_file() -> None:
    """State of bfloat16, as AdamW keeps it for such parameters, becomes float32; also from a file."""
    ps = parameters(torch.bfloat16)
    theirs = adamw(ps, 5, constant_size=False)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    qs, ours = twin(ps)
    ours.load_adamw_state_dict(torch.load(file, weights_only=True))
    assert {value.dtype for q in qs for key, value in ours.state[q].items() if key != "step"} == {torch.float32}
    set_gradients(qs, 5, constant_size=False)
    ours.step()
    assert ours.diagnostics().step == 6


def refused(optimizer: NLCG, saved: Any, words: str, load: str = "load_adamw_state_dict") -> None:
    before = repr(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        getattr(optimizer, load)(saved)
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda s: s["param_groups"][1].update(decoupled_weight_decay=False), "L2 weight decay"),
        (lambda s: s["param_groups"][0].pop("betas"), "lacks betas: not the state dict of torch.optim.AdamW"),
        (lambda s: s["param_groups"][0].update(betas=0.9), "not the state dict of torch.optim.AdamW"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 0.99, 0.999)), "not the state dict of torch.optim.AdamW"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"param_groups\[0\]: Invalid betas\[1\]"),
        (lambda s: s["param_groups"][0].update(betas=(None, 0.999)), r"betas\[0\] must be a real number"),
        (lambda s: s["param_groups"][1].pop("lr"), r"param_groups\[1\] lacks lr"),
        (lambda s: s["param_groups"][1].update(lr=math.nan), "learning rate"),
        (lambda s: s["param_groups"][1].update(eps="small"), "eps must be a real number"),
        (lambda s: s["param_groups"][1].update(eps=1e-4), "eps is 0.0001 in parameter group 1"),
        (lambda s: s["param_groups"][1].update(params=[1]), "twice"),
        (lambda s: s["param_groups"].pop(), "expected"),
        (lambda s: s.pop("state"), "not a state dict"),
        (lambda s: s.update(state=[]), "mapping"),
        (lambda s: s["state"].update({7: s["state"][0]}), "parameter 7"),
        (lambda s: s["state"].update({1: 3.0}), "state of parameter 1 has float"),
        (lambda s: s["state"][1].pop("exp_avg"), "state of parameter 1"),
        (lambda s: s["state"][1].pop("step"), "state of parameter 1"),
        (lambda s: s["state"][1].update(max_exp_avg_sq=torch.zeros(33)), "state of parameter 1.*max_exp_avg_sq"),
        (lambda s: s["state"][1].update(step=-1), "state of parameter 1: 'step' is -1"),
        (lambda s: s["state"][1].update(step=torch.tensor(0.5)), "'step'"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(32)), r"parameter 1: 'exp_avg' has shape \(32,\)"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(33, dtype=torch.uint8)), "'exp_avg' is torch.uint8"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(33, device="meta")), "'exp_avg'.*meta"),
        (lambda s: s["state"][1].update(exp_avg_sq=None), "'exp_avg_sq' is NoneType"),
        (lambda s: s["state"][1]["exp_avg"].fill_(math.nan), "'exp_avg' has values that are not finite"),
        (lambda s: s["state"][1]["exp_avg_sq"].fill_(-1.0), "'exp_avg_sq' has negative values"),
    ],
)
def test_what_has_no_counterpart_is_refused(change: Any, words: str) -> None:
    ps = parameters()
    saved = copy.deepcopy(adamw(ps, 3, constant_size=False).state_dict())
    change(saved)
    _, ours = twin(ps)
    refused(ours, saved, words)


def stepped(make: Any, ps: Any, count: int = 2) -> Any:
    optimizer = make(ps)
    for t in range(count):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        set_gradients(params, t, constant_size=False)
        optimizer.step(*([lambda: 1.0] if isinstance(optimizer, torch.optim.LBFGS) else []))
    return optimizer


class Lion(torch.optim.Optimizer):
    """Betas, and one moment of the same name."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0})

    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg"] = torch.zeros_like(p)


class EightBit(torch.optim.Optimizer):
    """AdamW's groups, and state in bytes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": BETAS, "eps": 1e-8, "weight_decay": 0.0})

    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p].update({key: torch.zeros(p.shape, dtype=torch.uint8) for key in ("state1", "state2")}, step=1)


OTHERS = {
    **{
        name: getattr(torch.optim, name)
        for name in [
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adamax",
            "ASGD",
            "LBFGS",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        ]
    },
    "Adam, amsgrad": lambda ps: torch.optim.Adam(ps, amsgrad=True),
    "Adam, L2": lambda ps: torch.optim.Adam(ps, weight_decay=0.1),
    "NAdam, decoupled": lambda ps: torch.optim.NAdam(ps, decoupled_weight_decay=True),
    "RAdam, decoupled": lambda ps: torch.optim.RAdam(ps, decoupled_weight_decay=True),
    "SGD": torch.optim.SGD,
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, momentum=0.9),
    "CGDescent": CGDescent,
    "NLCG": NLCG,
    "Lion": Lion,
    "8 bits": EightBit,
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_files_are_refused(name: str, count: int, named: bool) -> None:
    """By both loads, also before the first step, when there is no state to tell them by."""
    ps = parameters()
    given = list(zip("abc", ps, strict=True)) if named else ps
    other = stepped(OTHERS[name], given, 0 if name == "CGDescent" else count)
    saved = other.state_dict()
    ours = stepped(NLCG, given)
    refused(
        ours, saved, "not the state dict of torch.optim.AdamW|counterpart|expected AdamW's|L2", "load_adamw_state_dict"
    )
    if name != "NLCG":
        refused(ours, saved, "another optimizer's", "load_state_dict")


@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.SparseAdam])
def test_files_of_matrices_alone_are_refused(make: Any) -> None:
    p = parameters()[0]
    ours = NLCG([p])
    for load in ("load_adamw_state_dict", "load_state_dict"):
        refused(ours, make([p]).state_dict(), "not the state dict of torch.optim.AdamW|another optimizer's", load)


def test_adamws_own_files_are_not_nlcgs() -> None:
    ps = parameters()
    for count in (0, 2):
        refused(
            NLCG(ps), stepped(torch.optim.AdamW, ps, count).state_dict(), "load_adamw_state_dict", "load_state_dict"
        )
    scheduler = LambdaLR(torch.optim.AdamW(ps), lambda t: 1.0)
    for load in ("load_adamw_state_dict", "load_state_dict"):
        refused(NLCG(ps), scheduler.state_dict(), "not a state dict: got the keys .'_get_lr_called", load)


def old(saved: dict[str, Any]) -> None:
    """As torch 1.2 wrote it."""
    for group in saved["param_groups"]:
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}:
            del group[key]
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])


def by_name(saved: dict[str, Any]) -> None:
    """As torch.distributed.checkpoint and FSDP hand it over."""
    names = ["a", "b", "c"]
    saved["state"] = {names[i]: entry for i, entry in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [names[i] for i in group["params"]]


FILES: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, lambda s: None),
    "foreach": ({"foreach": True}, lambda s: None),
    "fused": ({"fused": True}, lambda s: None),
    "lr is a tensor": ({"lr": torch.tensor(1e-3, dtype=torch.float64), "foreach": False}, lambda s: None),
    "lr has a dimension": ({}, lambda s: s["param_groups"][0].update(lr=torch.tensor([1e-3], dtype=torch.float64))),
    "betas are tensors": (
        {},
        lambda s: s["param_groups"][0].update(betas=[torch.tensor(b, dtype=torch.float64) for b in BETAS]),
    ),
    "capturable": ({}, lambda s: s["param_groups"][0].update(capturable=True)),
    "of torch 1.2": ({}, old),
    "by name": ({}, by_name),
    "with a hook's entry": ({}, lambda s: s["state"].update(hook=1)),
    "not contiguous": ({}, lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].t().contiguous().t())),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_any_form_of_its_file_is_the_same_state(name: str, named: bool) -> None:
    options, change = FILES[name]
    ps = parameters()
    expected = NLCG(ps)
    expected.load_adamw_state_dict(stepped(lambda x: torch.optim.AdamW(x, lr=1e-3), parameters()).state_dict())
    given = list(zip("abc", parameters(), strict=True)) if named else parameters()
    saved = copy.deepcopy(stepped(lambda x: torch.optim.AdamW(x, **{"lr": 1e-3} | options), given).state_dict())
    change(saved)
    optimizer = NLCG(list(zip("abc", parameters(), strict=True)))
    optimizer.load_adamw_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]
    mine, whole = optimizer.state_dict(), expected.state_dict()
    torch.testing.assert_close(list(mine["state"].values())[:3], list(whole["state"].values()), rtol=1e-15, atol=0.0)
    found, wanted = mine["param_groups"][0], whole["param_groups"][0]
    torch.testing.assert_close(found["scalars"], wanted["scalars"], rtol=1e-15, atol=0.0, equal_nan=True)
    for key in set(wanted) - {"params", "scalars"}:
        assert found[key] == wanted[key], key


def test_adam_without_weight_decay_is_adamw() -> None:
    ps = parameters()
    optimizer = NLCG(ps)
    optimizer.load_adamw_state_dict(stepped(lambda x: torch.optim.Adam(x, lr=1e-3), ps).state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (pytest.approx(1e-4), 0.0)


@pytest.mark.parametrize("touched", [False, True])
def test_a_file_without_state_is_a_beginning(touched: bool) -> None:
    """As a new optimizer with the file's rates, to the bit. Reading ``state[p]`` leaves an empty entry."""
    runs = []
    for of_a_file in (False, True):
        ps = parameters()
        optimizer = NLCG(ps, lr=3e-4, eps=1e-7, beta2=0.99, line_search=OnlineLineSearch())
        if of_a_file:
            theirs = torch.optim.AdamW(parameters(), lr=3e-4, eps=1e-7, betas=(0.0, 0.99), weight_decay=0.0)
            if touched:
                assert not theirs.state[theirs.param_groups[0]["params"][1]]
            optimizer.load_adamw_state_dict(theirs.state_dict())
            assert not optimizer.state
        for t in range(4):
            set_gradients(ps, t, constant_size=False)
            optimizer.step(loss=float(t))
        runs.append((ps, optimizer.diagnostics()))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_state_of_some_parameters() -> None:
    """Those that had gradients. There and back, too."""
    ps = parameters()
    theirs = torch.optim.AdamW(ps)
    set_gradients(ps, 0, constant_size=False)
    ps[1].grad = None
    theirs.step()
    optimizer = NLCG(ps)
    optimizer.load_adamw_state_dict(theirs.state_dict())
    assert [p in optimizer.state for p in ps] == [True, False, True]
    assert set(optimizer.adamw_state_dict()["state"]) == {0, 2}
    set_gradients(ps, 1, constant_size=False)
    optimizer.step()
    assert optimizer.diagnostics().beta == 0.0  # another set of parameters
    assert [float(optimizer.state[p]["step"]) for p in ps] == [2.0, 1.0, 2.0]


def test_names_in_another_order_are_refused() -> None:
    """Encoder and decoder of one shape: nothing else tells them apart. Groups, too."""
    net = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 4)})
    named = list(net.named_parameters())
    swapped = named[2:] + named[:2]
    saved = stepped(torch.optim.AdamW, named).state_dict()
    words = r"param_names'\]\[0\] is 'encoder.weight', expected 'decoder.weight'"
    refused(NLCG(swapped), saved, words)
    NLCG(named).load_adamw_state_dict(saved)
    NLCG([p for _, p in swapped]).load_adamw_state_dict(saved)  # one side without names: by order, as torch
    in_groups = stepped(torch.optim.AdamW, [{"params": named[:2]}, {"params": named[2:]}]).state_dict()
    refused(NLCG([{"params": swapped[:2]}, {"params": swapped[2:]}]), in_groups, words)
    by_key = copy.deepcopy(saved)  # torch.distributed.checkpoint's form
    by_key["param_groups"][0]["params"] = by_key["param_groups"][0].pop("param_names")
    by_key["state"] = dict(zip(by_key["param_groups"][0]["params"], saved["state"].values(), strict=True))
    refused(NLCG(swapped), by_key, words)
    back = stepped(NLCG, named).adamw_state_dict()
    assert back["param_groups"][0]["param_names"] == [name for name, _ in named]
    refused(NLCG(swapped), back, words)


def test_keys_of_the_users_own_come_along() -> None:
    ps = parameters()
    theirs = torch.optim.AdamW(
        [{"params": ps[:2], "name": "stem", "lr_scale": 0.5}, {"params": ps[2:], "name": "head"}]
    )
    optimizer = NLCG([{"params": ps[:2]}, {"params": ps[2:], "name": "own"}])
    optimizer.load_adamw_state_dict(theirs.state_dict())
    assert [group["name"] for group in optimizer.param_groups] == ["stem", "own"]
    assert "betas" not in optimizer.param_groups[0]
    back = optimizer.adamw_state_dict()["param_groups"]
    assert (back[0]["lr_scale"], back[1]["name"]) == (0.5, "own")
    assert set(back[1]) == {*theirs.param_groups[1]}


# ---- schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda t: 1.0 / (1.0 + t)),
    "warmup_cosine": lambda o: warmup_cosine(o, 20),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 7, 9]),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o, total_iters=7),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=7),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 15),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)], [4]
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.LinearLR(o), LambdaLR(o, lambda t: 0.9**t)]
    ),
}


def run(optimizer: Any, scheduler: Any, steps: int) -> list[list[float]]:
    rates = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on(name: str, back: bool) -> None:
    """As the docs say: made before the load, its file loaded, its base rates put right."""
    ps = parameters()
    groups = [{"params": ps[:2]}, {"params": ps[2:], "lr": 3e-3}]
    first, second = (NLCG, torch.optim.AdamW) if back else (torch.optim.AdamW, NLCG)
    theirs, ours = first(copy.copy(groups), lr=1e-3), second(copy.copy(groups), lr=0.5)
    schedule, after = SCHEDULERS[name](theirs), SCHEDULERS[name](ours)
    set_gradients(ps, 0, constant_size=False)
    run(theirs, schedule, 5)
    if back:
        ours.load_state_dict(theirs.adamw_state_dict())
    else:
        with pytest.warns(UserWarning, match="After scheduler.load_state_dict") as seen:
            ours.load_adamw_state_dict(theirs.state_dict())
        assert seen[0].filename == __file__
    after.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for part in getattr(after, "_schedulers", [after]):
        part.base_lrs = [group["initial_lr"] for group in ours.param_groups]
    factor = 10.0 if back else 0.1
    expected = [[factor * rate for rate in rates] for rates in run(theirs, schedule, 10)]
    for found, wanted in zip(run(ours, after, 10), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)


def test_initial_rates_are_converted_and_enough_for_last_epoch() -> None:
    ps = parameters()
    theirs = torch.optim.AdamW(ps, lr=torch.tensor(1e-3, dtype=torch.float64), foreach=False)
    schedule = LambdaLR(theirs, lambda t: 1.0 / (1.0 + t))
    set_gradients(ps, 0, constant_size=False)
    run(theirs, schedule, 5)
    optimizer = NLCG(ps, lr=0.5)
    with pytest.warns(UserWarning, match="scheduler"):
        optimizer.load_adamw_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-4)
    after = LambdaLR(optimizer, lambda t: 1.0 / (1.0 + t), last_epoch=schedule.last_epoch - 1)
    assert after.get_last_lr() == pytest.approx([1e-4 / 6])
    assert optimizer.adamw_state_dict()["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)


def test_a_run_without_a_scheduler_says_nothing() -> None:
    ps = parameters()
    optimizer = NLCG(ps)
    schedule = warmup_cosine(optimizer, 5)  # ours
    base = optimizer.param_groups[0]["initial_lr"]
    optimizer.load_adamw_state_dict(stepped(torch.optim.AdamW, ps).state_dict())
    assert (optimizer.param_groups[0]["initial_lr"], schedule.base_lrs) == (base, [base])


def test_only_adams_diagonal_is_adams() -> None:
    ps = parameters()
    saved = adamw(ps, 3, constant_size=False).state_dict()
    optimizer = NLCG([{"params": ps[:2]}, {"params": ps[2:]}], preconditioner="bfgs")
    for call in (lambda: optimizer.load_adamw_state_dict(saved), optimizer.adamw_state_dict):
        with pytest.raises(ValueError, match="expected .adam., whose"):
            call()
    with pytest.raises(ValueError, match="beta1"):
        NLCG(ps).adamw_state_dict(1.0)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for t in range(begin, end):
        optimizer.zero_grad()
        loss_of(net, t, world, rank).backward()
        optimizer.step()


def switched(net: nn.Module) -> tuple[list[Tensor], float]:
    theirs = torch.optim.AdamW(net.parameters(), lr=1e-3)
    steps(net, theirs, 0, 5)
    optimizer = NLCG(net.parameters())
    optimizer.load_adamw_state_dict(theirs.state_dict())
    rz = optimizer.diagnostics().rz
    steps(net, optimizer, 5, 8)
    placed = {isinstance(optimizer.state[p]["direction"], DTensor) for p in net.parameters()}
    assert placed == {isinstance(p, DTensor) for p in net.parameters()}
    return whole(net.parameters()), rz


def over_shards() -> tuple[list[Tensor], float]:
    return switched(sharded())


@pytest.mark.xdist_group("ranks")  # see ranks.py
def test_shards_follow_one_process() -> None:
    """AdamW over FSDP2, then NLCG over the same shards."""
    expected, rz = switched(model())
    for found, other in ranks(2)(over_shards):
        assert other == pytest.approx(rz, rel=1e-4)
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_decay_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    net[2].bias.requires_grad_(False)
    first, second = decay_groups(net, 0.1)
    assert [p.dim() for p in first["params"]] == [4, 2]
    assert [tuple(p.shape) for p in second["params"]] == [(4,), (4,), (4,), (4,)]
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    NLCG(decay_groups(net, 0.1), lr=1e-3)
