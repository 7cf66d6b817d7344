"""``torch.compile``: training steps around the optimizer, and full graphs that hold its step."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, warmup_cosine
from test_torch import Problem, conv, make, same
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, StepLR


@pytest.mark.parametrize("options", [{}, {"preconditioner": "bfgs", "lr": 0.01}, {"line_search": OnlineLineSearch()}])
def test_a_compiled_training_step_has_eagers_bits(options: dict[str, Any]) -> None:
    """With a graph break at the step, on purpose, and no warning of ours. ``backend="eager"`` is the compiler's front
    end, which decides where graphs break, without code generation, which changes the network's bits, not the step's."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = make(net.parameters(), options)

        def train(x: Tensor, net: torch.nn.Module = net, optimizer: NLCG = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step(loss=loss.detach())
            return loss

        step = torch.compile(train, backend="eager") if compiled else train
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            losses = [step(torch.full((4, 6), 0.1 * t)).item() for t in range(1, 6)]
        assert not [w for w in seen if "fastnlcg" in str(w.message) + w.filename or "pybind" in str(w.message)]
        runs.append((losses, [p.detach() for p in net.parameters()], optimizer.diagnostics()))
    same(runs[0][:2], runs[1][:2])
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"preconditioner": "bfgs"}, {"line_search": OnlineLineSearch()}])
def test_a_full_graph_holds_the_step(backend: str, options: dict[str, Any]) -> None:
    """As one operator. A new lr and other values compile nothing again. ``aot_eager`` hands the operator copies of what
    it writes, ``eager`` the parameters themselves."""
    runs, counts = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        frozen = torch.nn.Parameter(torch.ones(3))  # never has a gradient
        optimizer = NLCG([frozen, *net.parameters()], lr=0.01, **options)

        def step(loss: Tensor, optimizer: NLCG = optimizer) -> None:
            optimizer.step(loss=loss)

        take = torch.compile(step, backend=backend, fullgraph=True) if compiled else step
        for t in range(1, 7):
            optimizer.param_groups[0]["lr"] = 0.01 / t
            optimizer.zero_grad()
            loss = net(torch.full((4, 6), 0.1 * t)).square().mean()
            loss.backward()
            take(loss.detach())  # Dynamo itself warns of a graph input that is no leaf
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert torch.equal(frozen, torch.ones(3))
        runs.append(([p.detach() for p in net.parameters()], optimizer.diagnostics()))
        same(optimizer.state_dict()["state"], runs[0][2] if compiled else optimizer.state_dict()["state"])
        runs[-1] = (*runs[-1], optimizer.state_dict()["state"])
    same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert counts[-1] == counts[7], "compiled again"  # the second step is the first with a state


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_full_graph_forms_the_gradient_too(backend: str) -> None:
    """The operator takes gradients that are not assigned yet, and parameters that the graph has changed before."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1025))
        optimizer = NLCG([p], lr=0.01)

        def train(x: Tensor, p: Tensor = p, optimizer: NLCG = optimizer) -> Tensor:
            p.grad = (p * x).detach()
            before = p.detach() * 2.0
            with torch.no_grad():
                p.mul_(0.99)
            optimizer.step()
            return before + p.detach()

        step = torch.compile(train, backend=backend, fullgraph=True) if compiled else train
        runs.append(([step(torch.full_like(p, float(t))) for t in range(1, 5)], p.detach(), p.grad))
        assert p.grad is not None
    same(runs[0], runs[1])


def write_into(group: dict[str, Any], lr: Any, weight_decay: Any) -> None:
    group["lr"].copy_(lr)
    group["weight_decay"].copy_(weight_decay)


def put_into(group: dict[str, Any], lr: Any, weight_decay: Any) -> None:
    group["lr"], group["weight_decay"] = lr, weight_decay


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [(write_into, torch.tensor), (put_into, torch.tensor), (put_into, float)],
    ids=["write into a tensor", "put a tensor", "put a float"],
)
def test_a_full_graph_may_change_rates_before_the_step(backend: str, change: Any, kind: Any) -> None:
    """The step has the new ones, and a new number compiles nothing again. The entry ``"capturable"`` that the compiler
    then writes into that group has no effect on a CPU."""
    runs, counts = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        p, q = (torch.nn.Parameter(torch.linspace(-1.0, 1.0, 5)) for _ in range(2))
        optimizer = NLCG([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=kind(1.0), weight_decay=kind(1.0))

        def train(lr: Any, weight_decay: Any, optimizer: NLCG = optimizer) -> None:
            change(optimizer.param_groups[0], lr, weight_decay)
            optimizer.step()

        take = torch.compile(train, backend=backend, fullgraph=True) if compiled else train
        for t in range(1, 7):
            p.grad, q.grad = p.detach() + t, q.detach() - t
            take(kind(0.1 / t), kind(0.3 / t))
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        group = optimizer.param_groups[0]
        runs.append((p.detach(), q.detach(), optimizer.diagnostics(), float(group["lr"]), float(group["weight_decay"])))
        p.grad = q.grad = torch.ones(5)
        optimizer.step()  # not compiled
    same(runs[0][:2], runs[1][:2])
    assert runs[0][2:] == runs[1][2:]
    assert counts[-1] == counts[8], "compiled again"


def test_a_loss_set_in_a_compiled_function_is_that_of_its_step() -> None:
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = NLCG([p], lr=0.1, line_search=OnlineLineSearch())

        def train(loss: float, optimizer: NLCG = optimizer) -> None:
            optimizer.set_loss(loss)
            optimizer.step()

        take = torch.compile(train, backend="eager") if compiled else train
        for loss in (1.0, 2.0, 0.5, 4.0):
            p.grad = torch.ones(3)
            take(loss)
        runs.append((p.detach(), optimizer.diagnostics()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize(
    "scheduler",
    [lambda o: warmup_cosine(o, 6), lambda o: StepLR(o, 2), lambda o: OneCycleLR(o, 0.1, 9, cycle_momentum=False)],
)
def test_a_full_graph_goes_on_under_a_scheduler(scheduler: Any, made: str) -> None:
    """Whose wrapper around ``step`` no graph takes: there is none. Made before the first compiled step, or after it."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        net, x = conv(torch.float32)
        optimizer = NLCG(net.parameters(), lr=0.01)
        schedule = scheduler(optimizer) if made == "before" else None

        def step(optimizer: NLCG = optimizer) -> None:
            optimizer.step()

        take = torch.compile(step, backend="eager", fullgraph=True) if compiled else step
        for t in range(6):
            optimizer.zero_grad()
            net(x).sum().backward()
            take()
            schedule = schedule or scheduler(optimizer)
            schedule.step()
            if t == 2:
                compiled_so_far = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_so_far
        runs.append(([p.detach() for p in net.parameters()], optimizer.diagnostics(), schedule.get_last_lr()))
    same(runs[0], runs[1])


def test_a_scheduler_still_knows_the_order() -> None:
    """Torch warns of a scheduler that goes first. A subclass with a step of its own is wrapped as ever."""

    class Own(NLCG):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for optimizer_of in (NLCG, Own):
        for stepped in (True, False):
            problem = Problem(torch.float32)
            optimizer = optimizer_of(problem.params)
            schedule = StepLR(optimizer, 1)
            if stepped:
                problem.train(optimizer, 1)
            with pytest.warns(UserWarning, match="before `optimizer.step") if not stepped else nullcontext():
                schedule.step()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_one_compiled_function_takes_twenty_optimizers(fullgraph: bool) -> None:
    """Each its own, also after others have gone. The compiler knows optimizers by identity and makes a graph for each,
    eight by default: without fullgraph the others are stepped outside of it."""
    torch._dynamo.reset()

    def step(optimizer: NLCG) -> None:
        optimizer.step()

    limit = {"recompile_limit": 64} if fullgraph else {}
    take = torch.compile(step, backend="eager", fullgraph=fullgraph)
    with torch._dynamo.config.patch(**limit):
        nets = [conv(torch.float32)[0] for _ in range(20)]
        optimizers = [NLCG(net.parameters(), lr=0.01 * (k + 1)) for k, net in enumerate(nets)]
        twins = copy.deepcopy(nets)
        expected = [NLCG(net.parameters(), lr=0.01 * (k + 1)) for k, net in enumerate(twins)]
        for t in range(3):
            for k in range(4 * t, 20):
                for net, optimizer, how in ((nets[k], optimizers[k], take), (twins[k], expected[k], step)):
                    for p in net.parameters():
                        p.grad = torch.full_like(p, 1.0 + t)
                    how(optimizer)
            for k in range(4 * t, 4 * t + 4):
                optimizers[k] = None
            same([list(net.parameters()) for net in nets], [list(net.parameters()) for net in twins])


def test_a_full_graph_refuses_what_it_cannot_hold() -> None:
    torch._dynamo.reset()
    net = torch.nn.Linear(3, 1)
    optimizer = NLCG(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="`NLCG._step`"):
        step(lambda: 1.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate: -1.0"):
        step()
    same(before, [p.detach() for p in net.parameters()])
    optimizer.param_groups[0]["lr"] = 0.1
    step()
    assert optimizer.diagnostics().step == 1
