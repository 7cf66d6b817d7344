"""Numbers at their limits: zeros, infinities, NaN, overflow, underflow, and what skips a step."""

from __future__ import annotations

import math

import backends
import numpy as np
import pytest
import torch
from fastnlcg import NLCG, OnlineLineSearch, reference
from fastnlcg.options import Options
from fastnlcg.tensors import groups
from quadratic import DIAGONAL, everything, one_step, parameter, quadratic_gradients, stepped
from torch import nn


def test_weight_decay_of_one_group_leaves_an_infinity_in_another() -> None:
    """0 * inf: an infinite parameter without decay became NaN in a block that had a parameter with decay."""
    ps = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.full((5,), math.inf))]
    for p in ps:
        p.grad = torch.ones(5)
    groups = [{"params": [ps[0]], "weight_decay": 0.1}, {"params": [ps[1]]}]
    optimizer = NLCG(groups, 0.1, preconditioner=None)
    optimizer.step()
    assert optimizer.diagnostics().skipped_steps == 0
    assert torch.isfinite(ps[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_0_moves_no_bit(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.tensor([-0.0, 0.0, 1.5, -2.0, math.inf] * 9).to(dtype))
    before = p.detach().clone()
    optimizer = NLCG([p], 0.0)
    for _ in range(3):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert torch.equal(p.detach().view(torch.uint8), before.view(torch.uint8))
    assert optimizer.diagnostics().step == 3


@pytest.mark.parametrize("n", [5, 16, 40])
def test_zeros_keep_their_sign_when_alpha_underflows(cpu_or_emulated: backends.Backend, n: int) -> None:
    p = nn.Parameter(torch.full((n,), -0.0))
    p.grad = torch.full((n,), -1.0)
    NLCG([p], 1e-46, preconditioner=None).step()
    assert bool(torch.signbit(p).all())


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("keywords", [{}, {"preconditioner": None}, {"update": "polak_ribiere"}])
def test_a_nonfinite_gradient_skips_the_step(keywords: dict, value: float, preconditioner: str) -> None:
    keywords = {"preconditioner": preconditioner, "line_search": OnlineLineSearch(), **keywords}
    ps, optimizer = stepped(**keywords)
    qs, expected = stepped(**keywords)
    before = everything(ps, optimizer)
    quadratic_gradients(ps)
    ps[1].grad[0, 1] = value
    optimizer.step(loss=100.0)
    assert everything(ps, optimizer) == before
    assert optimizer.diagnostics().skipped_steps == 1
    for _ in range(3):
        one_step(ps, optimizer)
        one_step(qs, expected)
    assert everything(ps, optimizer) == everything(qs, expected)


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_nan_in_the_first_step_is_skipped_or_propagated(preconditioner: str) -> None:
    p = parameter(5)
    optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
    p.grad = torch.full((5,), math.nan)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.diagnostics().step == 0
    optimizer = NLCG([p], 0.1, nonfinite="propagate", preconditioner=preconditioner)
    optimizer.step()
    assert torch.isnan(p).all()


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_sum_that_overflows_only_in_pass_2_skips_the_step(eps: float) -> None:
    """Every g and sum(g s) are finite, but g / (h + eps) is not, and h has not been written by then."""
    ps, optimizer = stepped(eps=eps, preconditioner="bfgs")
    with torch.no_grad():
        optimizer.state[ps[0]]["hessian_diag"].fill_(0.0)
        optimizer.state[ps[0]]["direction"].fill_(0.0)
        optimizer.state[ps[0]]["grad_prev"].fill_(3e38)
    before = everything(ps, optimizer)
    quadratic_gradients(ps)
    ps[0].grad = torch.full_like(ps[0], 3e38)
    optimizer.step()
    assert optimizer.diagnostics().skipped_steps == 1
    assert everything(ps, optimizer) == before


def test_a_tiny_eps_does_not_let_a_skipped_step_write_h(cpu_or_emulated: backends.Backend) -> None:
    """In float32 an eps of 1e-50 is 0, so pass 2 divides by 0 when h is 0."""
    ps, optimizer = stepped(preconditioner="bfgs", eps=1e-50)
    optimizer.state[ps[0]]["hessian_diag"].view(-1)[0] = 0.0
    before = everything(ps, optimizer)
    quadratic_gradients(ps)
    ps[0].grad.view(-1)[0] = optimizer.state[ps[0]]["grad_prev"].view(-1)[0]  # y = 0 there: h stays 0
    optimizer.state[ps[0]]["direction"].view(-1)[0] = 0.0
    before = everything(ps, optimizer)
    optimizer.step()
    if optimizer.diagnostics().skipped_steps:
        assert everything(ps, optimizer) == before


@pytest.mark.usefixtures("cpu_or_emulated")
def test_zero_gradients_move_nothing(preconditioner: str) -> None:
    p = parameter(5)
    before = p.detach().clone()
    optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
    for _ in range(3):
        p.grad = torch.zeros(5)
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.diagnostics().beta == 0.0
    assert math.isnan(optimizer.diagnostics().cosine)


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_h_is_kept_without_positive_curvature(slope: float) -> None:
    p = parameter(5)
    optimizer = NLCG([p], 0.1, preconditioner="bfgs")
    for _ in range(4):
        p.grad = 1.0 + slope * p.detach()
        optimizer.step()
        assert not optimizer.diagnostics().updated
        assert torch.equal(optimizer.state[p]["hessian_diag"], torch.ones(5))


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("scale", [1e19, 1e30, 1e-30, 1e-42])
def test_extreme_gradients_keep_everything_finite(scale: float, preconditioner: str) -> None:
    p = parameter(40)
    optimizer = NLCG([p], 1e-3 / max(scale, 1.0), preconditioner=preconditioner)
    for t in range(6):
        p.grad = scale * (p.detach() + 0.1 * t)
        optimizer.step()
        state = optimizer.state[p]
        assert all(torch.isfinite(state[key]).all() for key in state)
        assert (state[DIAGONAL[preconditioner]] >= 0).all()
        assert torch.isfinite(p).all()
    too_large = preconditioner == "adam" and scale >= 1e19  # g^2 overflows: the step is skipped
    assert optimizer.diagnostics().skipped_steps == (6 if too_large else 0)


@pytest.mark.usefixtures("cpu_or_emulated")
def test_the_diagonal_stays_finite_when_its_formula_overflows(preconditioner: str) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = NLCG([p], 1e-30, preconditioner=preconditioner)
    for g in ([1.0, 1.0, 1e30], [1.0, 1.0, -3e35], [1.0, 1.0, 3e35]):
        p.grad = torch.tensor(g)
        optimizer.step()
        assert torch.isfinite(optimizer.state[p][DIAGONAL[preconditioner]]).all()
        assert torch.isfinite(p).all()


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize(
    "loss", [math.nan, math.inf, 0.0, -3.0, None, torch.tensor(2.0), torch.tensor([1.0]), np.float32(1)]
)
def test_any_real_number_is_a_loss_and_other_types_are_refused(loss: object) -> None:
    ps, optimizer = stepped(line_search=OnlineLineSearch(), preconditioner="bfgs")
    for value in (1.0, loss, 2.0, loss, 1.0):
        quadratic_gradients(ps)
        optimizer.step(loss=value)
        assert 0.0 < optimizer.diagnostics().ls_scale <= 1.0
    for bad, error in (("1", TypeError), (1j, TypeError), (torch.ones(2), ValueError), (object(), TypeError)):
        with pytest.raises(error, match="loss"):
            optimizer.step(loss=bad)


def test_bits_do_not_depend_on_the_callers_floating_point_mode(preconditioner: str) -> None:
    """torch.set_flush_denormal() holds for one thread, so one and two threads differed."""
    runs = []
    start, gradient = torch.linspace(1e-39, 3e-38, 40_000), torch.linspace(1e-42, 1e-37, 40_000)
    for flush, threads in ((False, 1), (True, 1), (True, 2), (False, 2)):
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flush)
        try:
            p = nn.Parameter(start.clone())
            optimizer = NLCG([p], 0.1, preconditioner=preconditioner)
            for _ in range(3):
                p.grad = gradient
                optimizer.step()
            assert (torch.tensor(1e-39) * 1.0 == 0.0) == flush  # the caller's mode is restored
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(2)
        runs.append([x.numpy().tobytes() for x in (p.detach(), optimizer.state[p]["direction"])])
    assert all(run == runs[0] for run in runs)


MAGNITUDES = [10.0**e for e in (-44, -38, -30, -23, -20, -12, -5, 0, 5, 12, 17, 19, 20, 25, 30, 34, 37, 38)] + [3e38]


@pytest.mark.usefixtures("cpu_or_emulated")
@pytest.mark.parametrize("spike", [False, True])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("kind", ["adam", "bfgs", "none"])
def test_a_finite_gradient_of_any_size_follows_float64_or_is_skipped(kind: str, magnitude: float, spike: bool) -> None:
    """Moves every parameter as float64 does, to rounding, or the step is skipped and changes nothing. ``spike``: one
    element among ordinary ones, once; else all elements, at every step."""
    options = Options(preconditioner=None if kind == "none" else kind)
    lr = 1e-2 if kind == "adam" or spike else 1e-2 / max(magnitude, 1.0)
    rng = np.random.default_rng(5)
    p = nn.Parameter(torch.from_numpy(rng.standard_normal(40).astype(np.float32)))
    optimizer = NLCG([p], lr, preconditioner=options.preconditioner)
    taken = 0
    for t in range(6):
        g = rng.standard_normal(40) * (1.0 if spike else 0.3) + p.detach().numpy()
        g = (
            np.where(np.arange(40) == 7, magnitude * np.sign(g) if t == 3 else g, g)
            if spike
            else g / np.abs(g).max() * magnitude
        )
        g = np.clip(g, -3.4e38, 3.4e38).astype(np.float32)
        before = reference_state(optimizer, p, options)
        old = p.detach().clone()
        p.grad = torch.from_numpy(g.copy())
        optimizer.step()
        after = groups.named_scalars(optimizer.param_groups[0])
        if after["skipped_steps"] > before.skipped_steps:
            assert magnitude > 1e15  # never at ordinary sizes
            assert torch.equal(p.detach(), old)
            continue
        taken += 1
        expected, new = reference.nlcg_step(old.double().numpy(), g.astype(float), before, options, lr=lr)
        assert torch.isfinite(p).all()
        # bfgs divides by differences of sums, which amplify rounding; its h may nearly cancel
        slack = 2e-2 if kind == "bfgs" else 1e-4
        scale = np.abs(expected) + np.abs(expected - old.double().numpy()) + 1e-30
        assert np.all(np.abs(p.detach().double().numpy() - expected) <= slack * scale + 1e-7), t
        assert after["beta"] == pytest.approx(new.beta, rel=slack, abs=slack)
    assert taken or magnitude > 1e15


def reference_state(optimizer: NLCG, p: nn.Parameter, options: Options) -> reference.State:
    state, scalars = optimizer.state.get(p), groups.named_scalars(optimizer.param_groups[0])
    if not state:
        return reference.initial_state(p.numel(), options)
    diagonal = options.kind.diagonal
    array = {key: value.double().numpy() for key, value in state.items()}
    return reference.State(
        g_prev=array.get("grad_prev", np.zeros(p.numel())),
        d=array["direction"],
        diagonal=None if diagonal is None else array[diagonal],
        alpha_prev=np.full(p.numel(), optimizer.param_groups[0]["alpha_prev"].item()),
        active=np.ones(p.numel(), dtype=bool),
        updates=np.full(p.numel(), float(state["step"])),
        step=int(scalars["step"]),
        skipped_steps=int(scalars["skipped_steps"]),
        rz=scalars["rz"],
    )


@pytest.mark.usefixtures("cpu_or_emulated")
def test_a_spike_is_skipped() -> None:
    for spikes in ([1e30], [1e25] * 3):
        p = nn.Parameter(torch.zeros(50))
        optimizer = NLCG([p], 1e-2)
        for t in range(12):
            p.grad = torch.ones(50)
            if 5 <= t < 5 + len(spikes):
                p.grad[3] = spikes[t - 5]
            optimizer.step()
        assert p.abs().max() < 2.0
        assert optimizer.diagnostics().skipped_steps == len(spikes)


@pytest.mark.usefixtures("cpu_or_emulated")
def test_stochastic_rounding_makes_no_infinity() -> None:
    largest = torch.finfo(torch.bfloat16).max
    p = nn.Parameter(torch.full((4096,), largest, dtype=torch.bfloat16))
    optimizer = NLCG([p], 1e-3, preconditioner=None, stochastic_rounding=True)
    p.grad = torch.full_like(p, -1e36)  # less than half of the last place
    optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.usefixtures("cpu_or_emulated")
def test_random_bits_differ_between_parameters() -> None:
    ps = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = NLCG(ps, 1e-3, preconditioner=None, stochastic_rounding=True)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    a, b = (p.detach() != 1.0 for p in ps)
    agreement = (a == b).float().mean().item()
    assert 0.5 < a.float().mean() + 0.5 < 1.4
    expected = a.float().mean() * b.float().mean() + (1 - a.float().mean()) * (1 - b.float().mean())
    assert agreement == pytest.approx(expected.item(), abs=0.05)  # independent
