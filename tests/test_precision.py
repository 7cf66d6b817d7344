"""Mixed precision: GradScaler, and parameters in bfloat16 that do not lose small updates."""

from __future__ import annotations

import copy
import math
from typing import Any

import backends
import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, OnlineLineSearch, _native, reference
from lockstep import Cut, Lockstep
from torch import Tensor, nn

# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def sgd(p: nn.Parameter | list[nn.Parameter], lr: float, **options: Any) -> NLCG:
    """Plain gradient descent: no sum has a say, so every backend has the same bits."""
    ps = p if isinstance(p, list) else [p]
    return NLCG(ps, lr, preconditioner=None, update="heavy_ball", beta_max=0.0, stochastic_rounding=True, **options)


def test_it_rounds_up_as_often_as_the_part_that_is_cut_off(backend: Backend) -> None:
    """1 - 0.3 ulp: three of ten go down. The bound is five standard deviations of a binomial."""
    n, part = 100_003, 0.3
    ulp = 2.0**-8  # of bfloat16 below 1
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device=backend.device))
    p.grad = torch.ones_like(p)
    optimizer = sgd(p, part * ulp)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
        optimizer.step()
        down = (p == 1.0 - ulp).cpu()
        assert bool((down | (p == 1.0).cpu()).all())
        assert abs(down.double().mean().item() - part) < 5 * math.sqrt(part * (1 - part) / n)
        seen.append(down)
    # independent from step to step, and from element to neighbour
    for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0][1:], seen[0][:-1]), (seen[0][16:], seen[0][:-16])):
        both = (a & b).double().mean().item()
        assert abs(both - part**2) < 5 * math.sqrt(part**2 * (1 - part**2) / n)


def test_small_updates_add_up_on_average_and_are_lost_without() -> None:
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optimizer = sgd(p, 2.0**-8 * 0.05)
        optimizer.param_groups[0]["stochastic_rounding"] = stochastic
        for _ in range(200):
            optimizer.step()
        expected = 1.0 - 200 * 2.0**-8 * 0.05
        mean = p.detach().double().mean().item()
        if stochastic:
            # a walk of 200 steps of variance below (2^-8)^2 / 4, over 20,000 elements
            assert abs(mean - expected) < 5 * 2.0**-8 * math.sqrt(200 / 4 / 20_000)
        else:
            assert mean == 1.0


SIZES = (1, 15, 16, 17, 65, 255, 257, 4097, 100_003)


def test_its_bits_depend_on_step_parameter_and_place_alone(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the instruction set, threads or address; nor on CPU or GPU."""
    n = sum(SIZES)
    start = torch.linspace(-3.0, 3.0, n).bfloat16()
    gradients = [torch.sin(torch.arange(n) * (0.1 + k)).bfloat16() for k in range(3)]

    def run(sizes: tuple[int, ...], device: str = "cpu", shift: int = 0) -> Tensor:
        def place(values: Tensor) -> list[Tensor]:
            found = []
            for part in values.split(sizes):
                found.append(torch.empty(len(part) + shift, dtype=torch.bfloat16, device=device)[shift:])
                found[-1].copy_(part)
            return found

        ps = [nn.Parameter(p) for p in place(start)]
        optimizer = sgd(ps, 1e-3)
        for values in gradients:
            for p, g in zip(ps, place(values), strict=True):
                p.grad = g
            optimizer.step()
        return torch.cat([p.detach().cpu() for p in ps]).view(torch.int16)

    found = run(SIZES, backend.device)
    assert torch.equal(found, run(SIZES, backend.device, shift=1))
    monkeypatch.setattr(_native, "num_threads", lambda threads=None: 3)
    assert torch.equal(found, run(SIZES, backend.device))
    with pytest.MonkeyPatch.context() as other:
        monkeypatch.undo()
        backends.use(backends.NARROWEST, other)
        assert torch.equal(found, run(SIZES))
        # and the first parameter's do not depend on what follows it
        assert torch.equal(found[: SIZES[0]], run((SIZES[0], n - SIZES[0]))[: SIZES[0]])


@pytest.mark.parametrize("of", ["adam", "bfgs", None])
def test_it_follows_the_reference_to_a_unit_in_the_last_place(of: str | None, backend: Backend) -> None:
    options = reference.Options(preconditioner=of)
    run = Lockstep([Cut(n, "bfloat16") for n in (1, 17, 300, 4097)], options, lr=(1e-3,), stochastic_rounding=True)
    for _ in range(4):
        run.noisy_gradients()
        run.checked_step()


def test_numbers_that_are_not_finite_stay_what_they_are() -> None:
    p = nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 3e38] * 5).bfloat16())
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    sgd(p, 0.1, nonfinite="propagate").step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_other_dtypes_are_rounded_as_ever() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16):
        ps = [nn.Parameter(torch.linspace(-1.0, 1.0, 100, dtype=dtype)) for _ in range(2)]
        for p, stochastic in zip(ps, (False, True), strict=True):
            p.grad = torch.linspace(0.1, 1.0, 100, dtype=dtype)
            NLCG([p], 0.01, stochastic_rounding=stochastic).step()
        assert torch.equal(*ps)


def test_a_resumed_run_has_the_same_random_bits() -> None:
    def steps(p: nn.Parameter, optimizer: NLCG, begin: int, end: int) -> None:
        for k in range(begin, end):
            p.grad = torch.cos(torch.arange(1000) * (0.1 + k)).bfloat16()
            optimizer.step()

    p = nn.Parameter(torch.linspace(-1.0, 1.0, 1000).bfloat16())
    optimizer = NLCG([p], 1e-3, stochastic_rounding=True)
    steps(p, optimizer, 0, 5)
    q = nn.Parameter(p.detach().clone())
    other = NLCG([q], 1e-3)  # the option comes with the file
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(p, optimizer, 5, 10)
    steps(q, other, 5, 10)
    assert torch.equal(p.view(torch.int16), q.view(torch.int16))


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def train(net: nn.Module, optimizer: NLCG, scaler: Any, t: int, *, unscaled: bool, infinite: bool) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
    optimizer.zero_grad()
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step(loss=loss.detach())
        return
    scaler.scale(loss).backward()
    if infinite:
        next(net.parameters()).grad.view(-1)[3] = math.inf
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer, loss=loss.detach())
    scaler.update()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("of", ["adam", "bfgs", None])
def test_grad_scaler(of: str | None, unscaled: bool, infinite: bool) -> None:
    """Unscaled before the step or by it, an infinity found or not: a skipped step freezes everything, and the others
    have the bits of a run without a scaler (whose scales, powers of two, are exact)."""
    net, plain = small(), small()
    search = OnlineLineSearch(0.0, -0.0, 0.1, 0.1)
    options: dict[str, Any] = {"preconditioner": of, "line_search": search, "lr": 0.01}
    optimizer, expected = NLCG(net.parameters(), **options), NLCG(plain.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        before = repr((list(net.parameters()), optimizer.state_dict()))
        train(net, optimizer, scaler, t, unscaled=unscaled, infinite=infinite and t == 3)
        if infinite and t == 3:
            assert repr((list(net.parameters()), optimizer.state_dict())) == before
            assert scaler.get_scale() == 512.0
        else:
            train(plain, expected, None, t, unscaled=False, infinite=False)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))
    found, wanted = optimizer.state_dict(), expected.state_dict()
    assert repr(found["state"]) == repr(wanted["state"])
    for key in ("scalars", "alpha_prev"):
        assert torch.equal(found["param_groups"][0][key], wanted["param_groups"][0][key])


# ---- maximize, by group ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["adam", "bfgs", None])
def test_groups_may_maximize_each_for_itself(backend: Backend, of: str | None) -> None:
    """As a run in which the gradients of that group have the other sign; also where one block holds both."""
    sizes = (5, 17, 3, 4099)
    runs = []
    for by_sign in (False, True):
        ps = [nn.Parameter(torch.linspace(-1.0, 1.0, n, device=backend.device)) for n in sizes]
        groups = [{"params": [p], "maximize": not by_sign and k % 2 == 1} for k, p in enumerate(ps)]
        optimizer = NLCG(groups, 0.01, preconditioner=of, weight_decay=0.1)
        for t in range(4):
            for k, p in enumerate(ps):
                g = torch.sin(torch.arange(p.numel(), device=backend.device) + t) + p.detach()
                p.grad = -g if by_sign and k % 2 == 1 else g
            optimizer.step()
        runs.append((ps, optimizer.diagnostics()))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_a_line_search_wants_one_sign() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "maximize": k == 1} for k in range(2)]
    with pytest.raises(ValueError, match="maximize is True in parameter group 1 and False in group 0.*one loss"):
        NLCG(groups, line_search=OnlineLineSearch())
