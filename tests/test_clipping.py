"""Clipping inside the step: what ``clip_grad_norm_`` before it would do, and what it must not do. The formulas are held
to the reference in test_step.py, forms of launch in test_cuda.py, many ranks in test_distributed.py and test_ddp.py."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, _native, reference
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

KINDS: dict[str, dict[str, Any]] = {
    "adam": {"weight_decay": 0.1},
    "adam_pr": {"update": "polak_ribiere"},
    "bfgs": {"preconditioner": "bfgs", "weight_decay": 0.1},
    "none": {"preconditioner": None, "weight_decay": 0.1},
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def parameters(backend: Backend, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(backend.device, dtype)) for shape in ((40, 7), (33,), (5000,), (1,))]


def set_gradients(ps: list[nn.Parameter], t: int) -> None:
    """Of norms around 7 to 40."""
    generator = torch.Generator().manual_seed(t)
    for p in ps:
        noise = torch.randn(p.shape, generator=generator) * (0.05 + 0.2 * (t % 3))
        p.grad = (0.1 * p.detach() + noise.to(p.device, p.dtype)).to(p.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_as_clip_grad_norm_and_a_step(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    """Several groups, of which one maximizes. Gradients stay as they are."""
    inside, before = parameters(backend, dtype), parameters(backend, dtype)
    optimizers = []
    for ps, options in ((inside, {"max_grad_norm": 15.0}), (before, {})):
        groups = [{"params": ps[:2], "lr": 0.02}, {"params": ps[2:], "maximize": True}]
        optimizers.append(NLCG(groups, 0.01, **KINDS[kind], **options))
    factors = []
    for t in range(8):
        set_gradients(inside, t)
        kept = [p.grad.clone() for p in inside]
        optimizers[0].step()
        assert all(torch.equal(p.grad, g) for p, g in zip(inside, kept, strict=True))
        for p, g in zip(before, kept, strict=True):
            p.grad = g
        norm = clip_grad_norm_(before, 15.0)
        optimizers[1].step()
        found = optimizers[0].diagnostics()
        assert found.total_norm == pytest.approx(float(norm), rel=TOLERANCE[dtype])
        assert float(optimizers[0].last_grad_norm) == found.total_norm
        assert optimizers[0].last_grad_norm.device.type == torch.device(backend.device).type
        assert found.grad_norm <= 15.0 * 1.2 or kind in ("bfgs", "none")  # those have weight decay in it
        factors.append(found.clip)
        for p, q in zip(inside, before, strict=True):
            assert torch.linalg.vector_norm(p - q) <= TOLERANCE[dtype] * torch.linalg.vector_norm(q)
    assert {factor == 1.0 for factor in factors} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_does_not_clip_has_the_bits_of_one_without(backend: Backend, kind: str) -> None:
    runs = []
    for options in ({}, {"max_grad_norm": 1e6}, {"max_grad_norm": math.inf}, {"skip_grad_norm": 1e6}):
        ps = parameters(backend)
        optimizer = NLCG(ps, 0.01, **KINDS[kind], **options)
        for t in range(6):
            set_gradients(ps, t)
            optimizer.step()
        assert optimizer.diagnostics().clip == 1.0
        runs.append(ps)
    for ps in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ps, runs[0], strict=True))


def test_bits_do_not_depend_on_which_pass_forms_the_norm(preconditioner: str) -> None:
    """On the CPU a step after one that clipped forms it first. Here the scalar that says so is turned over."""
    runs = []
    for turned in (False, True):
        ps = parameters(Backend("cpu"))
        optimizer = NLCG(ps, 0.01, max_grad_norm=15.0, weight_decay=0.1, preconditioner=preconditioner)
        for t in range(8):
            set_gradients(ps, t)
            if turned and t:
                clip = optimizer.param_groups[0]["scalars"][list(_native.SCALARS).index("clip")]
                clip.fill_(0.5 if clip == 1.0 else 1.0)
            optimizer.step()
        runs.append((ps, optimizer.diagnostics()))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_at_the_bound_and_at_zero(backend: Backend, preconditioner: str) -> None:
    """The factor is torch's, norm / (norm + 1e-6): just below 1 at the bound itself."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64, device=backend.device))
    optimizer = NLCG([p], 0.1, max_grad_norm=2.0, preconditioner=preconditioner)
    for gradient, clip in (([1.0] * 4, 2.0 / (2.0 + 1e-6)), ([0.0] * 4, 1.0), ([3.0] * 4, 2.0 / (6.0 + 1e-6))):
        p.grad = torch.tensor(gradient, dtype=torch.float64, device=backend.device)
        optimizer.step()
        found = optimizer.diagnostics()
        assert (found.total_norm, found.clip) == (2.0 * gradient[0], clip)
    assert found.skipped_steps == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_skips_the_step(backend: Backend, preconditioner: str, bad: float) -> None:
    ps = parameters(backend)
    optimizer = NLCG(ps, 0.01, max_grad_norm=15.0, preconditioner=preconditioner)
    set_gradients(ps, 2)
    optimizer.step()
    before = [p.detach().clone() for p in ps]
    ps[2].grad[4097] = bad
    with warnings.catch_warnings(record=True):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    found = optimizer.diagnostics()
    assert (found.step, found.skipped_steps) == (1, 1)
    assert not math.isfinite(found.total_norm)
    again = NLCG(ps, 0.01, max_grad_norm=15.0, preconditioner=preconditioner)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the norm is no damage


def test_propagate_does_what_torch_does(backend: Backend, preconditioner: str) -> None:
    ps = parameters(backend)
    optimizer = NLCG(ps, 0.01, max_grad_norm=15.0, nonfinite="propagate", preconditioner=preconditioner)
    set_gradients(ps, 0)
    ps[0].grad[0, 0] = math.nan
    optimizer.step()
    assert all(bool(p.isnan().all()) for p in ps)


def test_a_gradient_too_large_for_the_state_is_clipped_into_it(backend: Backend) -> None:
    """Its square overflows float32, so without clipping the step would be skipped."""
    p = nn.Parameter(torch.zeros(3, device=backend.device))
    optimizer = NLCG([p], 0.1, max_grad_norm=1.0)
    p.grad = torch.tensor([3e30, 0.0, -4e30], device=backend.device)
    optimizer.step()
    assert optimizer.diagnostics().total_norm == pytest.approx(5e30)
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([-0.1, 0.0, 0.1]), rtol=1e-4, atol=0.0)


def test_spikes_are_skipped_and_counted(backend: Backend, preconditioner: str) -> None:
    ps, without = parameters(backend), parameters(backend)
    optimizer, expected = (
        NLCG(ps, 0.01, skip_grad_norm=15.0, max_grad_norm=10.0, preconditioner=preconditioner),
        NLCG(without, 0.01, max_grad_norm=10.0, preconditioner=preconditioner),
    )
    spikes = 0
    for t in range(8):
        set_gradients(ps, t)
        spike = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ps)) > 15.0
        spikes += spike
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        if not backend.on_gpu:  # who cannot know without waiting
            assert [str(w.message)[:18] for w in caught] == ["a step was skipped"] * (spike and spikes == 1)
        assert (float(optimizer.last_grad_norm) > 15.0) == spike
        if not spike:
            set_gradients(without, t)
            for p, q in zip(without, ps, strict=True):
                p.grad = q.grad
            expected.step()
        assert optimizer.diagnostics().skipped_steps == spikes
        assert all(torch.equal(p, q) for p, q in zip(ps, without, strict=True))
    assert 0 < spikes < 8


def test_a_skipped_step_warns_of_its_own_reason(preconditioner: str) -> None:
    """Once each, whichever comes first. A norm that is infinite is above the bound, and not finite."""
    kinds = {"spike": (20.0, "norm, 40.0, is above skip_grad_norm=15.0"), "bad": (math.nan, "is not finite")}
    kinds["infinite"] = (math.inf, kinds["bad"][1])
    for order in (["spike", "bad", "spike", "bad"], ["bad", "spike", "infinite"], ["infinite", "bad", "spike"]):
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = NLCG([p], 0.1, skip_grad_norm=15.0, max_grad_norm=10.0, preconditioner=preconditioner)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for kind in order:
                p.grad = torch.full_like(p, kinds[kind][0])
                optimizer.step()
        expected = list(dict.fromkeys(kinds[kind][1] for kind in order))
        assert len(caught) == len(expected) == 2
        for warning, words in zip(caught, expected, strict=True):
            assert words in str(warning.message)
            assert warning.filename == __file__
        assert optimizer.diagnostics().skipped_steps == len(order)


def test_a_finite_gradient_below_the_bound_is_no_spike() -> None:
    """Too large for the state, with a bound that is larger still."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = NLCG([p], 0.1, skip_grad_norm=1e35)
    p.grad = torch.full_like(p, 1e30)
    with pytest.warns(UserWarning, match="too large for the state's dtype"):
        optimizer.step()


def test_the_bound_may_change_between_steps(backend: Backend, preconditioner: str) -> None:
    ps = parameters(backend)
    optimizer = NLCG(ps, 0.01, max_grad_norm=15.0, preconditioner=preconditioner)
    for bound in (15.0, 5.0, None, math.inf, 2.0):
        optimizer.param_groups[0]["max_grad_norm"] = bound
        set_gradients(ps, 2)
        optimizer.step()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ps))
        assert optimizer.diagnostics().clip == pytest.approx(
            1.0 if bound is None else reference.clip_factor(norm, bound)
        )


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_grad_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "1", True])
def test_wrong_bounds(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        NLCG([nn.Parameter(torch.ones(2))], **{name: value})


def test_the_norm_has_to_be_asked_for() -> None:
    optimizer = NLCG([nn.Parameter(torch.ones(2))])
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        _ = optimizer.last_grad_norm
    measured = NLCG([nn.Parameter(torch.ones(2))], max_grad_norm=math.inf)
    assert float(measured.last_grad_norm) == 0.0


def test_amp_is_unscaled_first(preconditioner: str) -> None:
    """The bound is of the unscaled gradient, whoever unscales."""
    runs: list[list[Tensor]] = []
    for scale in (1.0, 1024.0):
        ps = parameters(Backend("cpu"))
        optimizer = NLCG(ps, 0.01, max_grad_norm=10.0, preconditioner=preconditioner)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        for t in range(4):
            set_gradients(ps, t)
            for p in ps:
                p.grad *= scale
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.diagnostics().total_norm < 100.0
        runs.append([p.detach() for p in ps])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
