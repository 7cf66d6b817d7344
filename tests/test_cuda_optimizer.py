"""``NLCG`` on a GPU, emulated or not: device scalars, gradient scaling and checkpoints."""

from __future__ import annotations

import copy
import math

import backends
import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, OnlineLineSearch, reference
from fastnlcg.reference import Options
from fastnlcg.tensors import groups, table
from test_cuda import only_emulated, only_gpu
from torch import Tensor, nn


def parameters(gpu: Backend, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    rng = np.random.default_rng(0)
    shapes = ((64, 3, 3, 3), (10,), (), (33, 17), (5000,))
    return [nn.Parameter(torch.from_numpy(np.array(rng.standard_normal(s))).to(gpu.device, dtype)) for s in shapes]


def set_gradients(ps: list[nn.Parameter], scale: float = 1.0) -> Tensor:
    """Of a quadratic; returns its value, on the device."""
    loss = torch.zeros((), dtype=torch.float32, device=ps[0].device)
    for k, p in enumerate(ps, start=1):
        p.grad = (scale * k * p.detach()).to(p.dtype)
        loss += 0.5 * k * p.detach().float().square().sum()
    return loss


def bits(optimizer: NLCG) -> str:
    state = optimizer.state_dict()
    tensors = [p.detach() for p in table.parameters(optimizer.param_groups)]
    tensors += [t for entry in state["state"].values() for t in entry.values()]
    scalars = [
        groups.named_scalars(g) | {"skipped_steps": 0.0, "alpha_prev": g["alpha_prev"].item()}
        for g in state["param_groups"]
    ]
    return repr([t.double().cpu().flatten().numpy().tobytes() for t in tensors] + scalars)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_the_optimizer_follows_the_float64_reference(
    gpu: Backend, preconditioner: str, update: str, dtype: torch.dtype
) -> None:
    ps = parameters(gpu, dtype)
    optimizer = NLCG(
        ps, 0.02, update=update, weight_decay=0.01, line_search=OnlineLineSearch(), preconditioner=preconditioner
    )
    o = Options(preconditioner=preconditioner, update=update, line_search=OnlineLineSearch())

    def flat(tensors: list[Tensor]) -> np.ndarray:
        return torch.cat([t.detach().double().flatten() for t in tensors]).cpu().numpy()

    p, state = flat(ps), reference.initial_state(sum(q.numel() for q in ps), o)
    for _ in range(30):
        loss = set_gradients(ps)
        p, state = reference.nlcg_step(
            p, flat([q.grad for q in ps]), state, o, lr=0.02, weight_decay=0.01, loss=float(loss)
        )
        optimizer.step(loss=loss)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4}[dtype]
    assert np.linalg.norm(flat(ps) - p) <= tolerance * np.linalg.norm(p)
    d = optimizer.diagnostics()
    launches = {"adam": 2, "bfgs": 3}[preconditioner] if dtype == torch.float64 else 1
    assert (d.step, d.skipped_steps, d.launches) == (30, 0, launches)
    assert d.rz == pytest.approx(state.rz, rel=50 * tolerance)
    assert d.ls_scale == pytest.approx(state.ls_scale)
    assert all(optimizer.state[q]["step"].item() == 30 for q in ps)


def test_lr_and_loss_on_the_device_have_the_bits_of_the_hosts(gpu: Backend, preconditioner: str) -> None:
    """lr as a tensor the step reads when it runs, loss as a tensor of any float type."""
    runs = []
    for on_device in (False, True):
        ps = parameters(gpu)
        lr: float | Tensor = torch.tensor(0.03, device=gpu.device) if on_device else float(np.float32(0.03))
        optimizer = NLCG(ps, lr, line_search=OnlineLineSearch(), capturable=on_device, preconditioner=preconditioner)
        for t in range(6):
            value = (1.0, 1.5, 1.25, 2.0, math.nan, 0.5)[t]
            set_gradients(ps)
            dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[t % 4]
            optimizer.step(loss=torch.tensor(value, dtype=dtype, device=gpu.device) if on_device else value)
            if on_device:
                optimizer.param_groups[0]["lr"].mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        assert optimizer.diagnostics().ls_scale < 1.0
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_a_bad_lr_on_the_device_skips_the_step(gpu: Backend, preconditioner: str, bad: float) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(ps, torch.tensor(0.1, device=gpu.device), capturable=True, preconditioner=preconditioner)
    set_gradients(ps)
    optimizer.step()
    before = bits(optimizer)
    optimizer.param_groups[0]["lr"].fill_(bad)
    optimizer.step()
    assert optimizer.diagnostics().skipped_steps == 1
    assert bits(optimizer).replace("'skipped_steps': 1.0", "'skipped_steps': 0.0") == before


@pytest.mark.parametrize("scale", [65536.0, 1000.0])
def test_grad_scaler_leaves_unscaling_and_skipping_to_the_step(gpu: Backend, preconditioner: str, scale: float) -> None:
    """An overflow freezes everything, counters included; the next step equals a run without it."""
    plain, scaled = parameters(gpu), parameters(gpu)
    expected = NLCG(plain, 0.02, line_search=OnlineLineSearch(), preconditioner=preconditioner)
    optimizer = NLCG(scaled, 0.02, line_search=OnlineLineSearch(), capturable=True, preconditioner=preconditioner)
    scaler = torch.amp.GradScaler(gpu.device, init_scale=scale, growth_interval=1000)
    scaler.scale(torch.ones((), device=gpu.device))
    for t in range(5):
        loss = set_gradients(scaled, scale)
        overflows = t == 2
        if overflows:
            scaled[0].grad.view(-1)[5] = math.inf
        before, kept = bits(optimizer), scaled[1].grad.clone()
        scaler.step(optimizer, loss=loss)
        assert torch.equal(scaled[1].grad, kept)  # p.grad is left as it was
        if overflows:
            assert bits(optimizer) == before
            scaler.update(scale)
            continue
        scaler.update()
        loss = set_gradients(plain)
        if scale != 65536.0:  # not a power of two: the same roundings as GradScaler's
            inverse = torch.tensor(scale).double().reciprocal().float().to(gpu.device)
            for k, p in enumerate(plain, start=1):
                p.grad = (scale * k * p.detach()) * inverse
        expected.step(loss=loss)
    assert bits(optimizer) == bits(expected)
    assert optimizer.diagnostics().skipped_steps == 0
    assert optimizer.diagnostics().step == 4


def test_grad_scale_and_found_inf_of_any_type_are_taken(gpu: Backend, preconditioner: str) -> None:
    runs = []
    for scale in (None, torch.tensor(4.0, device=gpu.device), torch.tensor(4.0, dtype=torch.float64), 4.0):
        ps = parameters(gpu)
        optimizer = NLCG(ps, 0.1, capturable=True, preconditioner=preconditioner)
        for t in range(2):
            set_gradients(ps, 1.0 + t)
            if scale is not None:
                for p in ps:
                    p.grad *= 4.0
                optimizer.grad_scale, optimizer.found_inf = scale, 0.0
            optimizer.step()
        optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), dtype=torch.float64)
        optimizer.step()  # called off
        runs.append((bits(optimizer), optimizer.diagnostics().step))
    assert all(run == runs[0] for run in runs)
    assert runs[0][1] == 2


def test_an_exception_in_a_scaled_step_leaves_no_scale_behind(gpu: Backend, preconditioner: str) -> None:
    """GradScaler multiplies with the scale it finds on the optimizer: once, the next step divided by its square."""
    plain, scaled = parameters(gpu), parameters(gpu)
    expected, optimizer = (
        NLCG(plain, 0.02, preconditioner=preconditioner),
        NLCG(scaled, 0.02, line_search=OnlineLineSearch(), capturable=True, preconditioner=preconditioner),
    )
    scaler = torch.amp.GradScaler(gpu.device, init_scale=1024.0)
    scaler.scale(torch.ones((), device=gpu.device))
    set_gradients(scaled, 1024.0)
    with pytest.raises(TypeError, match="loss"):
        scaler.step(optimizer, loss="1")
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    scaler.update()
    set_gradients(scaled, 1024.0)
    scaler.step(optimizer)
    set_gradients(plain)
    expected.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, scaled, strict=True))


def test_checkpoints_move_between_cpu_and_gpu(
    gpu: Backend, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps = parameters(gpu, torch.float64)
    optimizer = NLCG(ps, 0.02, update="polak_ribiere", preconditioner=preconditioner)
    for _ in range(5):
        set_gradients(ps)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    cut = [p.detach().cpu().clone() for p in ps]
    for _ in range(5):
        set_gradients(ps)
        optimizer.step()
    with monkeypatch.context() as original:
        original.undo()
        backends.use("cpu", original)
        qs = [nn.Parameter(p) for p in cut]
        other = NLCG(qs, 0.02, update="polak_ribiere", preconditioner=preconditioner)
        other.load_state_dict(saved)
        for _ in range(5):
            set_gradients(qs)
            other.step()
        assert other.diagnostics().step == 10
        back = copy.deepcopy(other.state_dict())
    for p, q in zip(ps, qs, strict=True):
        np.testing.assert_allclose(p.detach().cpu().numpy(), q.detach().numpy(), rtol=1e-11)
    optimizer.load_state_dict(back)
    set_gradients(ps)
    optimizer.step()
    assert optimizer.diagnostics().step == 11


def test_a_step_that_was_skipped_does_not_change_the_last_set(gpu: Backend) -> None:
    """The host does not know of the skip; the device compares with the last step that moved something."""
    ps = parameters(gpu, torch.float64)
    optimizer = NLCG(ps, 0.02)
    for t in range(8):
        set_gradients(ps)
        if t == 4:
            ps[1].grad = None
            ps[0].grad.view(-1)[0] = math.nan
        optimizer.step()
        d = optimizer.diagnostics()
        assert d.skipped_steps == (t >= 4)
        if t > 0:
            assert d.beta > 0  # step 5 has the set of step 3


@only_emulated
def test_bias_corrections_follow_step_counts_and_beta2_that_users_change(gpu: Backend) -> None:
    """A table of them is kept on the device; a step count, or beta2, that is another is noticed."""
    runs = []
    for edited in (False, True):
        ps = parameters(gpu)
        optimizer = NLCG(ps, 0.1)
        for t in range(6):
            set_gradients(ps, 1.0 + t)
            if t in (2, 4):
                for p in ps:
                    optimizer.state[p]["step"].fill_(t - 1)
                optimizer.param_groups[0]["beta2"] = 0.9
                if not edited:  # the same in a fresh native side
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


def test_capturable_needs_cuda_parameters() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], 0.1, capturable=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="capturable=True needs CUDA"):
        optimizer.step()
    with pytest.raises(TypeError, match="capturable"):
        NLCG([p], 0.1, capturable=1)


@only_gpu
def test_cpu_and_gpu_parameters_do_not_mix(gpu: Backend) -> None:
    ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))]
    optimizer = NLCG(ps, 0.1)
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 1 is on cuda:0, parameter 0 on cpu"):
        optimizer.step()
    assert not optimizer.state
