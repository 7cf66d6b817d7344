"""``CGDescent`` with curvature pairs and rotated matrices: checkpoints, options and layers that change, bad input."""

from __future__ import annotations

import collections
import copy
import gc
import io
import itertools
import json
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import CGDescent, minimize
from fastnlcg.full_batch import rotation
from fastnlcg.full_batch.rotation import EVERY, Matrix, Rotation
from network import closure_of, flat, problem
from torch import Tensor, nn

OPTIONS = [
    {"history": 0, "preconditioner": "kronecker"},
    {"history": 3, "preconditioner": "kronecker"},
    {"history": 3, "preconditioner": "bfgs"},
    {"history": 3, "preconditioner": None},
]


def steps(optimizer: CGDescent, closure: Callable[[], Tensor], n: int) -> list[float]:
    losses = []
    for _ in range(n):
        optimizer.step(closure)
        losses.append(optimizer.diagnostics()["loss"])
    return losses


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_has_the_run_of_minimize_with_its_shapes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, loss = problem(dtype)
    ps = list(model.parameters())
    shapes = [tuple(p.shape) for p in ps]
    x0 = flat(ps)

    def fun(x: Tensor) -> Tensor:
        parts = x.split([p.numel() for p in ps])
        named = {k: v.view(s) for (k, _), v, s in zip(model.named_parameters(), parts, shapes, strict=True)}
        return torch.func.functional_call(_Loss(model, loss), named_of(named), ())

    optimizer = CGDescent(ps, tolerance_grad=0.0, **options)
    steps(optimizer, closure_of(optimizer, loss), 8)
    expected = minimize(fun, x0, maxiter=8, gtol=0.0, shapes=shapes, **options)
    rtol = 1e-8 if dtype == torch.float64 else 2e-2
    if options["history"]:  # else minimize probes with the loss alone
        assert optimizer.diagnostics()["loss"] == pytest.approx(expected.fun, rel=rtol)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        return self.loss()


def named_of(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{key}": value for key, value in named.items()}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("at", [1, 2, 12])
def test_a_checkpoint_resumes_to_the_bit(at: int, options: dict[str, Any]) -> None:
    """Before the pairs are full, after, and after a change of bases; and across the next one."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), **options)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_loss = problem()
    other.load_state_dict(saved["model"])
    second = CGDescent(other.parameters(), **options)
    second.load_state_dict(saved["optimizer"])
    second_closure = closure_of(second, other_loss)
    for _ in range(EVERY + 2):
        assert optimizer.step(closure) == second.step(second_closure)
        assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_every_tensor_of_the_state_matters() -> None:
    """A resumed run differs if one of them is not what was saved."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=3)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, 12)
    saved = optimizer.state_dict()
    start = flat(model.parameters()).clone()

    def resumed(key: str | None) -> Tensor:
        other, other_loss = problem()
        nn.utils.vector_to_parameters(start, other.parameters())
        second = CGDescent(other.parameters(), history=3)
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        changed = torch.load(file, weights_only=True)
        if key is not None:
            changed["state"][0][key].mul_(1.01)
        second.load_state_dict(changed)
        steps(second, closure_of(second, other_loss), EVERY + 2)
        return flat(other.parameters()).clone()

    expected = resumed(None)
    keys = set(saved["state"][0]) - {"origin"}  # which every search writes first
    assert keys == {"direction", "grad_prev", "hessian_diag", "rotated_direction",
                    "basis_left", "basis_right", "factor_left", "factor_right",
                    *(f"{v}_{k}" for v in "sy" for k in range(3))}  # fmt: skip
    for key in keys:
        assert not torch.equal(resumed(key), expected), key


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(range(3), 2)))
def test_options_may_change_in_a_checkpoint(before: int, after: int) -> None:
    """The pairs are dropped, and the run continues."""
    options = [
        {"history": 3, "preconditioner": "kronecker"},
        {"history": 5, "preconditioner": "kronecker"},
        {"history": 0, "preconditioner": "bfgs"},
    ]
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), **options[before])
    steps(optimizer, closure_of(optimizer, loss), 12)
    start = loss().item()
    second = CGDescent(model.parameters(), **options[after])
    second.load_state_dict(optimizer.state_dict())
    losses = steps(second, closure_of(second, loss), 12)
    assert losses[0] <= start
    assert losses[-1] < 0.9 * start
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise([start, *losses]))
    keys = set(second.state[next(model.parameters())])
    assert ("s_0" in keys) == (after < 2)
    assert ("basis_left" in keys) == (after < 2)


def test_a_checkpoint_of_0_6_0_is_loaded() -> None:
    """Its course is a mapping, and has no pairs."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=0, preconditioner="bfgs")
    steps(optimizer, closure_of(optimizer, loss), 5)
    saved = optimizer.state_dict()
    course = saved["param_groups"][0]["course"] = dict(optimizer.param_groups[0]["course"])
    del course["pairs"], course["next_length"], course["suspect"]
    for options in ({"history": 0, "preconditioner": "bfgs"}, {}):
        second = CGDescent(model.parameters(), **options)
        second.load_state_dict(saved)
        start = loss().item()
        assert steps(second, closure_of(second, loss), 6)[-1] < start


@pytest.mark.parametrize("options", OPTIONS)
def test_a_checkpoint_of_0_8_0_resumes_to_the_bit(options: dict[str, Any]) -> None:
    """Its course is a mapping."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), **options)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, 12)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["course"] = copy.deepcopy(optimizer.param_groups[0]["course"])
    other, other_loss = problem()
    other.load_state_dict(model.state_dict())
    second = CGDescent(other.parameters(), **options)
    second.load_state_dict(saved)
    assert steps(second, closure_of(second, other_loss), 3) == steps(optimizer, closure, 3)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_bases_of_0_8_0_are_not_taken() -> None:
    """Its bases had no column for the bias: the run starts again where it is, in the bases that are left."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    steps(optimizer, closure_of(optimizer, loss), 12)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for key in {"basis_right", "factor_right"} & entry.keys():
            entry[key] = entry[key][:-1, :-1].clone()
    other, other_loss = problem()
    other.load_state_dict(model.state_dict())
    second, new = CGDescent(model.parameters()), CGDescent(other.parameters())
    second.load_state_dict(saved)
    losses = steps(second, closure_of(second, loss), 14)
    assert losses[0] == pytest.approx(steps(new, closure_of(new, other_loss), 1)[0], rel=1e-6)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert [v.shape for k, v in second.state_dict()["state"][0].items() if k == "basis_right"] == [(3, 3)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda course: "{", "not that of a CGDescent"),
        (lambda course: None, "not that of a CGDescent"),
        (lambda course: json.dumps({**course, "another": 1}), "not that of a CGDescent"),
        (lambda course: json.dumps({**course, "active": [9]}), "has the active parameters"),
        (lambda course: json.dumps({**course, "bases": [[]]}), "has the bases of 1 parameters, expected 4"),
    ],
)
def test_a_damaged_course_is_refused_and_changes_nothing(change: Callable[[Any], Any], words: str) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=3)
    steps(optimizer, closure_of(optimizer, loss), 2)
    saved = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(saved)
    damaged["param_groups"][0]["course"] = change(json.loads(saved["param_groups"][0]["course"]))
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(damaged)
    assert repr(optimizer.state_dict()) == repr(saved)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_a_checkpoint_without_a_preconditioner_continues_with_one(options: dict[str, Any]) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=options["history"], preconditioner=None)
    start = steps(optimizer, closure_of(optimizer, loss), 12)[-1]
    second = CGDescent(model.parameters(), **options)
    second.load_state_dict(optimizer.state_dict())
    losses = steps(second, closure_of(second, loss), 12)
    assert losses[0] <= start
    assert losses[-1] < 0.9 * start
    assert second.diagnostics()["iterations"] == 24


def clear(optimizer: CGDescent) -> None:
    optimizer.state.clear()


def replace(optimizer: CGDescent) -> None:
    optimizer.state = collections.defaultdict(dict)


def delete_an_entry(optimizer: CGDescent) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def load_without_an_entry(optimizer: CGDescent) -> None:
    saved = optimizer.state_dict()
    del saved["state"][0]
    optimizer.load_state_dict(saved)


def load_without_a_basis(optimizer: CGDescent) -> None:
    saved = optimizer.state_dict()
    saved["state"][0] = {key: value for key, value in saved["state"][0].items() if key != "basis_left"}
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lose", [clear, replace, delete_an_entry, load_without_an_entry, load_without_a_basis])
def test_a_run_that_has_lost_state_starts_again_where_it_is(
    lose: Callable[[CGDescent], None], options: dict[str, Any]
) -> None:
    """It takes the steps of a new one; after a part of its bases was lost, in the bases that are left."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), **options)
    steps(optimizer, closure_of(optimizer, loss), 12)
    twin, twin_loss = problem()
    twin.load_state_dict(model.state_dict())
    lose(optimizer)
    losses = steps(optimizer, closure_of(optimizer, loss), 8)
    assert all(optimizer.state[p] for p in model.parameters())
    if lose is load_without_a_basis and options["preconditioner"] != "kronecker":
        return
    new = CGDescent(twin.parameters(), **options)
    expected = steps(new, closure_of(new, twin_loss), 8)
    if lose in (clear, replace) or options["preconditioner"] != "kronecker":
        assert losses == expected
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)


# ---- layers and edits ------------------------------------------------------------------------------------------------


def test_a_frozen_layer_keeps_its_bits_and_its_state() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=3)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, 12)
    frozen = list(model.parameters())[:2]
    for p in frozen:
        p.requires_grad_(False)
        p.grad = None
    kept = [p.clone() for p in frozen]
    # The first trial of the next step writes the origin, before the closure shows what takes part.
    state = [{k: v.clone() for k, v in optimizer.state[p].items() if k != "origin"} for p in frozen]
    assert optimizer.param_groups[0]["course"]["pairs"]["count"] == 3
    losses = steps(optimizer, closure, 5)
    assert losses[-1] < losses[0]
    for p, q, entry in zip(frozen, kept, state, strict=True):
        assert torch.equal(p, q)
        for key, v in entry.items():
            assert torch.equal(optimizer.state[p][key], v), key
        # The buffers of the table before can be freed.
        for key, v in optimizer.state[p].items():
            assert v.untyped_storage().nbytes() == v.numel() * 8, key
    for p in frozen:
        p.requires_grad_(True)
    losses = steps(optimizer, closure, 5)
    assert losses[-1] < losses[0]
    assert not torch.equal(frozen[0], kept[0])


def test_the_pairs_are_those_since_the_last_restart() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=4)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, 6)
    course = lambda: optimizer.param_groups[0]["course"]  # noqa: E731
    assert course()["pairs"]["count"] == 4
    with torch.no_grad():
        next(model.parameters()).add_(0.01)  # an edit
    steps(optimizer, closure, 1)
    assert course()["pairs"]["count"] == 1
    steps(optimizer, closure, 3)
    optimizer.restart()
    steps(optimizer, closure, 2)
    assert course()["pairs"]["count"] == 2


def test_state_that_was_replaced_is_taken_over() -> None:
    """By a run that off-loads it between steps, for example."""
    results = []
    for replaces in (False, True):
        model, loss = problem()
        optimizer = CGDescent(model.parameters(), history=3)
        closure = closure_of(optimizer, loss)
        for _ in range(14):
            optimizer.step(closure)
            for entry in optimizer.state.values() if replaces else ():
                for key in entry:
                    entry[key] = entry[key].clone()
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


def test_parameters_of_every_layout(lockstep_on: Backend) -> None:
    """A slice with gaps, a transposed one, channels last, a stack, a convolution: each descends, and gaps are kept."""
    device = lockstep_on.device
    room = torch.zeros(6, 16, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 8), (8, 6), (4, 3, 2, 2), (3, 4, 5), (4, 3, 2, 2)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]
    ps = [
        nn.Parameter(room[:, ::2]),
        nn.Parameter(torch.empty(6, 8, dtype=torch.float64, device=device).t()),
        nn.Parameter(torch.empty(4, 3, 2, 2, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)),
        *(nn.Parameter(torch.empty(s, dtype=torch.float64, device=device)) for s in shapes[3:]),
    ]
    with torch.no_grad():
        for p, t in zip(ps, start, strict=True):
            p.copy_(t)
    optimizer = CGDescent(ps, history=4)
    fun = lambda: sum(((t - 0.5) ** 2 * k).sum() + torch.cos(t).sum() for k, t in enumerate(ps, 1))  # noqa: E731
    losses = steps(optimizer, closure_of(optimizer, fun), 25)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert optimizer.diagnostics()["gradient_max"] < 1e-4
    assert not room[:, 1::2].any()
    rotated = ["basis_left" in optimizer.state[p] for p in ps]
    assert rotated == [True, False, False, True, True]
    assert optimizer.state[ps[3]]["basis_right"].shape == (3, 5, 5)
    assert optimizer.state[ps[4]]["basis_right"].shape == (12, 12)


def test_maximize() -> None:
    results = []
    for sign in (1, -1):
        model, loss = problem()
        optimizer = CGDescent(model.parameters(), history=3, maximize=sign < 0)
        steps(optimizer, closure_of(optimizer, lambda: sign * loss()), 14)  # noqa: B023
        results.append(flat(model.parameters()))
    assert torch.equal(*results)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_a_trial_that_is_not_finite_gets_a_shorter_step(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.full((4, 3), 0.1, dtype=torch.float64))
    optimizer = CGDescent([p], **options)
    target = torch.linspace(0.5, 0.9, 12, dtype=torch.float64).view(4, 3)
    fun = lambda: (-torch.log1p(-p.clamp(max=1.5)) + 40 * (p - target) ** 2).sum()  # noqa: E731
    losses = steps(optimizer, closure_of(optimizer, fun), 40)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))  # as HagerZhang counts rounding
    assert optimizer.diagnostics()["gradient_max"] < 1e-4
    assert all(bool(torch.isfinite(t).all()) for t in optimizer.state[p].values())


def test_pairs_of_negative_curvature_are_not_taken() -> None:
    """A function that falls ever faster: every ys is negative or the search is unbounded, and no pair is stored."""
    p = nn.Parameter(torch.full((3, 2), 0.1, dtype=torch.float64))
    optimizer = CGDescent([p], history=3, max_eval=3)
    fun = lambda: -(p**4).sum()  # noqa: E731
    losses = steps(optimizer, closure_of(optimizer, fun), 4)
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["course"]["pairs"]["count"] == 0
    assert bool(torch.isfinite(p).all())


def test_a_matrix_of_zeros_and_one_without_influence() -> None:
    """Their factors are zero: their bases stay, and so do the bits of the second."""
    p = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    idle = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    optimizer = CGDescent([p, idle], history=3, tolerance_grad=0.0)
    k = torch.linspace(1, 30, 12, dtype=torch.float64).view(4, 3)
    fun = lambda: (k * (p - 1) ** 2 + torch.cos(p)).sum() + 0.0 * idle.sum()  # noqa: E731
    steps(optimizer, closure_of(optimizer, fun), EVERY + 20)
    assert optimizer.diagnostics()["gradient_max"] < 1e-6
    assert bool((idle == 1).all())
    assert torch.equal(optimizer.state[idle]["basis_left"], torch.eye(4, dtype=torch.float64))
    assert not torch.equal(optimizer.state[p]["basis_left"], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("make", [np.zeros, lambda shape: torch.zeros(shape, dtype=torch.float64)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_is_dropped(make: Any, bad: float) -> None:
    """torch.linalg.eigh may return finite vectors for it (2.13.0)."""
    turning = Rotation([Matrix(0, (40, 2))], make)
    left = turning.matrices[0].sides["left"]
    left["factor"][...] = 1.0
    left["factor"][3, 5] = bad
    h, vector = make((80,)) + 1.0, make((80,)) + 2.0
    assert not turning.turn(h, [vector])
    assert not left["factor"].any()
    assert bool((left["basis"].sum(0) == 1.0).all())
    assert bool((h == 1.0).all())
    assert bool((vector == 2.0).all())


def test_a_factor_of_zeros_keeps_its_basis() -> None:
    turning = Rotation([Matrix(0, (2, 1))], np.zeros)
    left = turning.matrices[0].sides["left"]
    left["basis"][:] = [[0.6, 0.8], [-0.8, 0.6]]
    h = np.array([1.0, 2.0])
    assert not turning.turn(h, [])
    assert left["basis"].tolist() == [[0.6, 0.8], [-0.8, 0.6]]
    assert h.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("no convergence"), None])
def test_an_eigendecomposition_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """It raises, or returns vectors that are not finite: the bases stay, and the run continues."""

    def eigh(x: Tensor) -> Any:
        if error is not None:
            raise error
        return x[..., 0], x * math.nan

    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=3)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    losses = steps(optimizer, closure_of(optimizer, loss), EVERY + 4)
    assert losses[-1] < losses[0]
    basis = optimizer.state[next(model.parameters())]["basis_left"]
    assert torch.equal(basis, torch.eye(len(basis), dtype=torch.float64))


def test_an_interrupt_in_a_change_of_bases_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), history=3)
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, EVERY - 2)
    original, calls = rotation._change_bases, []

    def interrupted(*args: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(rotation, "_change_bases", interrupted)
    before = loss().item()
    with pytest.raises(KeyboardInterrupt):
        steps(optimizer, closure, 4)
    assert math.isfinite(loss().item())
    assert loss().item() <= before
    assert bool((optimizer.state[next(model.parameters())]["hessian_diag"] == 1.0).all())
    monkeypatch.undo()
    losses = steps(optimizer, closure, 25)
    assert losses[-1] < 0.7 * before
    assert all(b <= a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"history": -1}, ValueError, "Invalid history: -1; expected at least 0"),
        ({"history": 40}, ValueError, "Invalid history: 40; expected at most 32"),
        ({"history": 1.5}, TypeError, "history must be an int, got 1.5"),
        ({"history": True}, TypeError, "history must be an int"),
        ({"preconditioner": "shampoo"}, ValueError, "preconditioner must be one of 'kronecker', 'bfgs', None"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CGDescent([nn.Parameter(torch.zeros(3))], **options)


# ---- what is kept, and what is not ----------------------------------------------------------------------------------


def test_pairs_do_not_survive_a_run_without() -> None:
    """history 10, 0, and 10 again: what the first left is not the last's."""
    model, loss = problem()
    options = {"preconditioner": "bfgs"}
    first = CGDescent(model.parameters(), **options)
    closure = closure_of(first, loss)
    steps(first, closure, 12)
    second = CGDescent(model.parameters(), history=0, **options)
    second.load_state_dict(first.state_dict())
    steps(second, closure, 3)
    assert second._course().pairs.count == 0
    assert set(second.state_dict()["state"][0]) == {"direction", "grad_prev", "origin", "hessian_diag"}
    third = CGDescent(model.parameters(), **options)
    third.load_state_dict(second.state_dict())
    steps(third, closure, 1)
    assert third._course().pairs.count <= 1


@pytest.mark.parametrize("options", [*OPTIONS, {}])
def test_nothing_keeps_an_optimizer_or_an_old_table(options: dict[str, Any]) -> None:
    """Without the search for cycles, which may come late for a GPU's memory."""
    model, loss = problem()
    optimizer = CGDescent(model.parameters(), **options)
    closure = closure_of(optimizer, loss)
    gc.collect()
    gc.disable()
    try:
        steps(optimizer, closure, 3)
        table = weakref.ref(optimizer._table)
        optimizer.restart()
        steps(optimizer, closure, 2)
        assert table() is None
        table, kept = weakref.ref(optimizer._table), weakref.ref(optimizer)
        del optimizer, closure
        assert kept() is None
        assert table() is None
    finally:
        gc.enable()


def test_load_hooks_see_what_is_given() -> None:
    model, loss = problem()
    optimizer = CGDescent(model.parameters())
    optimizer.register_state_dict_post_hook(lambda _, whole: {"wrapped": whole})
    closure = closure_of(optimizer, loss)
    steps(optimizer, closure, 3)
    saved = optimizer.state_dict()
    assert isinstance(saved["wrapped"]["param_groups"][0]["course"], str)
    second = CGDescent(model.parameters())
    with pytest.raises(ValueError, match="not a state dict"):
        second.load_state_dict(saved)
    second.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    seen = []
    second.register_load_state_dict_post_hook(lambda one: seen.append(len(one.state)))
    second.load_state_dict(saved)
    assert seen == [len(list(model.parameters()))]
    assert second.step(closure) == optimizer.diagnostics()["loss"]


@pytest.mark.parametrize("shape", [(8, 4), (6, 520)])  # of which both sides, or one, are rotated
def test_autocast_is_the_closures(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    data, start = torch.randn(16, shape[1], generator=generator), torch.randn(shape, generator=generator)

    def run(enabled: bool) -> Tensor:
        p = nn.Parameter(start.clone())
        optimizer = CGDescent([p])

        def closure() -> Tensor:
            with torch.autocast("cpu", enabled=False):
                optimizer.zero_grad()
                loss = ((data @ p.t()).tanh() - 0.5).square().mean()
                loss.backward()
            return loss

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            steps(optimizer, closure, 2 * EVERY + 2)
        return p.detach()

    assert torch.equal(run(enabled=True), run(enabled=False))


@pytest.mark.parametrize("frozen", [["bias"], ["weight"], ["weight", "bias"]])
def test_a_bias_that_is_frozen_without_its_matrix(frozen: list[str]) -> None:
    """Another vector of the same length is behind it: it must not take the bias's place, whose basis it had not."""
    linear, other = nn.Linear(4, 8).double(), nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = CGDescent([linear.weight, linear.bias, other])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((linear(torch.eye(4, dtype=torch.float64)) + other.sin()).tanh() - 0.3).square().sum()
        loss.backward()
        return loss

    steps(optimizer, closure, EVERY + 3)
    assert optimizer._course().updates > EVERY
    for _ in range(2):  # frozen, and thawed
        for name in frozen:
            getattr(linear, name).requires_grad_(not getattr(linear, name).requires_grad)
        steps(optimizer, closure, 1)
        starts_again = optimizer._course().updates <= 1
        assert starts_again == (len(frozen) == 1)
