"""The CUDA path: emulated on the CPU everywhere, and on a GPU where there is one.

test_step.py holds its kernels to the reference; here is what only a GPU has: forms of launching, grids, residency,
numbers on the device, graphs, streams.
"""

from __future__ import annotations

import copy
import ctypes
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import backends
import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import NLCG, OnlineLineSearch, _native, ops, reference
from fastnlcg.reference import Options
from fastnlcg.tensors import groups, table
from lockstep import Cut, Lockstep
from test_step import random_cuts
from torch import Tensor, nn

only_gpu = pytest.mark.parametrize("gpu", backends.parameters("cuda"), indirect=True)
only_emulated = pytest.mark.parametrize("gpu", backends.parameters("emulated"), indirect=True)


# ---- forms -----------------------------------------------------------------------------------------------------------


def trajectory(cuts: list[Cut], options: Options, form: str, blocks: int, resident: int, steps: int = 5) -> dict:
    lockstep = Lockstep(cuts, options, lr=(0.05, 0.02), weight_decay=(0.0, 0.1))
    lockstep.native.set_launch(form, blocks, resident)
    for _ in range(steps):
        lockstep.noisy_gradients()
        lockstep.run()
    assert lockstep.native.launches == (1 if form == "one" else PASSES[options.preconditioner] + options.measures_norm)
    assert lockstep.scalars["step"] == steps
    return lockstep.snapshot()


PASSES = {"adam": 2, "bfgs": 3, None: 2}
CUTS = {
    "whole": [Cut(9 * 4096 + 5, "float32")],
    "doubles": [Cut(5 * 4096 + 3, "float64")],
    "scattered": [*random_cuts(3000, ("float32", "bfloat16", "float16")), Cut(14_000, "float32", 1), Cut(7, "float16")],
}


PR = {"update": "polak_ribiere"}
FORMS = {
    "adam": Options(preconditioner="adam"),
    "adam_pr": Options(preconditioner="adam", **PR),
    "bfgs": Options(preconditioner="bfgs"),
    "bfgs_pr": Options(preconditioner="bfgs", **PR, eps=0.0),  # eps = 0 defers the update of h to the last pass
    "none_pr": Options(preconditioner=None, **PR),
    **{f"{of}_clip": Options(preconditioner=of, **PR, max_grad_norm=300.0) for of in ("adam", "bfgs", None)},
}


# bfgs_clip and None_clip run the same passes, with a norm besides.
THOROUGH_FORMS = ("bfgs_pr", "none_pr")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.thorough] if name in THOROUGH_FORMS else [])
        for name, options in FORMS.items()
    ],
)
@pytest.mark.parametrize("name", CUTS)
def test_same_bits_for_any_form_grid_and_residency(gpu: Backend, name: str, options: Options) -> None:
    """The sums' order depends on the place in the flat state alone."""
    expected = trajectory(CUTS[name], options, "separate", 1, 0)
    for form, blocks, resident in (
        *(("separate", blocks, 0) for blocks in (2, 3, 0)),
        *(("one", blocks, resident) for blocks in (1, 2, 3, 0) for resident in (0, 1, -1)),
    ):
        assert trajectory(CUTS[name], options, form, blocks, resident) == expected, (form, blocks, resident)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("of", ["adam", "bfgs", None])
@pytest.mark.parametrize("form", ["one", "separate"])
def test_both_forms_follow_the_reference(gpu: Backend, form: str, of: str | None, clips: bool) -> None:
    options = Options(preconditioner=of, update="polak_ribiere", max_grad_norm=150.0 if clips else None)
    lockstep = Lockstep([Cut(4096, "float32"), Cut(4096 + 77, "bfloat16")], options, shift=1)
    lockstep.native.set_launch(form)
    for t in range(10):
        lockstep.noisy_gradients()
        if t != 6:
            lockstep.checked_step()
            continue
        lockstep.g[1][3] = math.nan
        before = lockstep.scalars
        state = {key: tensor.clone() for key, tensor in lockstep.state.items()}
        lockstep.run()
        assert all(torch.equal(state[key], lockstep.state[key]) for key in state)
        after = lockstep.scalars
        assert repr({**after, "skipped_steps": 0.0, "grad_norm": before["grad_norm"]}) == repr(before)
        assert math.isnan(after["grad_norm"]) == clips
    assert lockstep.scalars["skipped_steps"] == 1


def test_spans_of_several_tiles(gpu: Backend) -> None:
    """Beyond 4096 tiles a partial sum covers two; every element is visited once, the last included."""
    n = 4096 * 4096 + 4099
    g, d = (torch.zeros(n, dtype=dtype, device=gpu.device) for dtype in (torch.float16, torch.float32))
    marked = [0, 4095, 4096, 8192, 4096 * 4096 - 1, 4096 * 4096, n - 1]
    g[marked] = torch.arange(1.0, 8.0, dtype=torch.float16, device=gpu.device)
    assert ops.preconditioned_dots(g, None, None).rz == sum(k * k for k in range(1, 8))
    ops.direction_update(d, g, None, beta=0.0)
    assert d[marked].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    assert int(torch.count_nonzero(d)) == len(marked)


def test_tiles_that_are_not_listed_in_the_arguments(gpu: Backend) -> None:
    """Beyond 512 tiles a tile's first segment is searched for."""
    lockstep = Lockstep(
        [*random_cuts(9000, ("float32",)), Cut(513 * 4096, "float32"), Cut(3, "float16")], FORMS["bfgs"]
    )
    for _ in range(3):
        lockstep.noisy_gradients()
        lockstep.checked_step()


def test_more_segments_and_groups_than_fit_the_arguments_of_a_launch(gpu: Backend) -> None:
    for count in (84, 85, 700, 1500):  # 84 rows of a small launch, 681 of a large one
        cuts = [Cut(1 + i % 5, "float32", group=i % 17) for i in range(count)]
        rates = tuple(0.01 + 0.001 * k for k in range(17))
        options = Options(preconditioner=("adam", "bfgs")[count % 2])
        lockstep = Lockstep(cuts, options, lr=rates, weight_decay=tuple(0.01 * k for k in range(17)))
        for _ in range(3):
            lockstep.noisy_gradients()
            lockstep.checked_step()
        # one gradient moves: only its row is written anew
        lockstep.g[count // 2] = lockstep.g[count // 2].clone()
        lockstep.noisy_gradients()
        lockstep.checked_step()


@pytest.mark.thorough  # test_same_bits_for_any_form_grid_and_residency takes separate launches too
@only_emulated
def test_without_cooperative_launches_there_is_one_for_each_pass(gpu: Backend) -> None:
    code = """
import sys; sys.path.insert(0, sys.argv[1])
import pytest, torch, backends
backends.use("emulated", pytest.MonkeyPatch())
from fastnlcg import NLCG
p = torch.nn.Parameter(torch.ones(100))
optimizer = NLCG([p], 0.1)
for _ in range(3):
    p.grad = p.detach() * 2
    optimizer.step()
optimizer._table.native.set_launch("one")  # asked for, and refused
p.grad = p.detach() * 2
optimizer.step()
print(optimizer.diagnostics().launches, p.sum().item())
"""
    outputs = []
    for old in ({}, {"FASTNLCG_EMULATE_OLD_DEVICE": "1"}):
        environment = {**os.environ, **old}
        done = subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert [o[0] for o in outputs] == ["1", "2"]
    assert outputs[0][1] == outputs[1][1]


# ---- flat buffers ----------------------------------------------------------------------------------------------------


def device_arrays(gpu: Backend, n: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {"p": dtype, "g": dtype, "g_prev": state, "d": state, "h": state}
    values = {name: rng.standard_normal(n) for name in kinds}
    values["h"] = rng.uniform(0.5, 2.0, n)
    values["g"] = values["g_prev"] + 0.3 * values["d"]  # ys > 0
    return {name: torch.from_numpy(values[name]).to(gpu.device, kind) for name, kind in kinds.items()}


def on_cpu(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu().clone() for name, t in x.items()}


@pytest.mark.parametrize("shift", [0, 1])
def test_the_parts_agree_with_the_cpu(gpu: Backend, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: to 1e-12, though in another order of addition; also where nothing is aligned to 16 bytes."""
    x = device_arrays(gpu, 20_011, torch.float64)
    y = on_cpu(x)
    x = {name: torch.cat([t[:shift], t])[shift:] if shift else t for name, t in x.items()}

    def steps(x: dict[str, Tensor]) -> tuple:
        dots = ops.preconditioned_dots(x["g"], x["g_prev"], x["h"], eps=0.1)
        curvature = ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.5)
        ops.direction_update(x["d"], x["g"], x["h"], beta=0.7, p=x["p"], alpha=0.1, g_prev=x["g_prev"])
        scalars = ops.Scalars()
        whole = {"lr": 0.05, "weight_decay": 0.1, "update": "polak_ribiere", "scalars": scalars}
        fused = [x[name] for name in ("p", "g", "g_prev", "d", "h")]
        moved = ops.nlcg_step(*fused, **whole, preconditioner="bfgs")
        adam = ops.adam_preconditioned_dots(x["g"], x["h"], updates=4, g_prev=x["g_prev"])
        ops.adam_direction_update(x["d"], x["g"], x["h"], beta=0.7, updates=4, p=x["p"], alpha=0.1, weight_decay=0.1)
        whole["scalars"] = again = ops.Scalars(updates=3)
        moved &= ops.nlcg_step(*fused, **whole, preconditioner="adam")
        return (*dots, *curvature, moved, scalars.rz, scalars.step, *adam, again.rz, again.updates)

    on_gpu = steps(x)
    with monkeypatch.context() as original:
        original.undo()
        backends.use("cpu", original)
        expected = steps(y)
    assert on_gpu == tuple(pytest.approx(v, rel=1e-12) for v in expected)
    for name in y:
        np.testing.assert_allclose(x[name].cpu().numpy(), y[name].numpy(), rtol=1e-12, atol=1e-12, err_msg=name)


class Interface:
    """An array that has ``__cuda_array_interface__`` and nothing else."""

    def __init__(self, tensor: Tensor, **changes: object) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": {torch.float32: "<f4", torch.float64: "<f8", torch.int32: "<i4"}[tensor.dtype],
            "data": (tensor.data_ptr(), False),
            "version": 3,
            **changes,
        }


def test_cuda_array_interface(gpu: Backend) -> None:
    x = device_arrays(gpu, 1000, torch.float32)
    expected = ops.preconditioned_dots(x["g"], x["g_prev"], x["h"])
    wrapped = {name: Interface(t) for name, t in x.items()}
    assert ops.preconditioned_dots(wrapped["g"], wrapped["g_prev"], wrapped["h"]) == expected
    matrix = Interface(x["g"].view(10, 100), strides=(400, 4))
    assert ops.preconditioned_dots(matrix, wrapped["g_prev"], wrapped["h"]) == expected
    for wrong, error, match in (
        (Interface(x["g"], strides=(8,)), ValueError, "g is not contiguous"),
        (Interface(x["g"].to(torch.int32)), TypeError, "typestr '<i4'"),
        (Interface(x["g"], shape=7), ValueError, "lacks shape"),
        (Interface(x["g"], strides=(4, 4)), ValueError, "strides"),
        (Interface(x["g"], data=(0, False)), ValueError, "no memory"),
        (Interface(x["g"], shape=(999,)), ValueError, "different lengths"),
    ):
        with pytest.raises(error, match=match):
            ops.preconditioned_dots(wrong, wrapped["g_prev"], wrapped["h"])
    with pytest.raises(ValueError, match="d is read-only"):
        ops.direction_update(Interface(x["d"], data=(x["d"].data_ptr(), True)), wrapped["g"], None, beta=0.0)
    with pytest.raises(TypeError, match="stream"):
        ops.preconditioned_dots(x["g"], None, None, stream="0")


class OnDevice:
    """Memory of the CPU that says it is a GPU's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> object:
        assert stream == -1  # nobody is to wait
        capsule = self.array.__dlpack__(max_version=max_version)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device_type = pointer(capsule, b"dltensor_versioned") + 40  # behind version, manager, deleter, flags, data
        ctypes.c_int32.from_address(device_type).value = 2
        return capsule


def test_a_cuda_buffer_without_a_gpu_is_refused() -> None:
    """And its address is not read."""
    if backends.GPU:
        pytest.skip("this machine has a GPU")
    array = np.ones(4, np.float32)
    with pytest.raises((ValueError, RuntimeError), match="cuda"):
        ops.preconditioned_dots(OnDevice(array), None, None)


# ---- NLCG ------------------------------------------------------------------------------------------------------------


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
    assert (d.step, d.skipped_steps, d.launches) == (30, 0, 1)
    assert d.rz == pytest.approx(state.rz, rel=50 * tolerance)
    assert d.ls_scale == pytest.approx(state.ls_scale)
    assert all(optimizer.state[q]["step"].item() == 30 for q in ps)


def test_numbers_on_the_device_are_as_good_as_the_hosts(gpu: Backend, preconditioner: str) -> None:
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


def test_what_is_refused(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1)
    set_gradients(ps)
    monkeypatch.setattr(_native, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="state cannot be made while a CUDA graph is captured"):
        optimizer.step()
    monkeypatch.setattr(_native, "capturing", lambda: False)
    optimizer.step()
    before = bits(optimizer)
    monkeypatch.setattr(_native, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="only with capturable=True"):
        optimizer.step()
    monkeypatch.setattr(_native, "capturing", lambda: False)
    assert bits(optimizer) == before
    for value, error in ((torch.ones(2, device=gpu.device), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="loss"):
            NLCG(ps, 0.1, line_search=OnlineLineSearch()).step(loss=value)
    with pytest.raises(TypeError, match="lr"):
        NLCG(ps, torch.ones((), dtype=torch.int32, device=gpu.device), capturable=True)


def test_capturable_needs_cuda_parameters() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = NLCG([p], 0.1, capturable=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="capturable=True needs CUDA"):
        optimizer.step()
    with pytest.raises(TypeError, match="capturable"):
        NLCG([p], 0.1, capturable=1)


# ---- on a GPU only ---------------------------------------------------------------------------------------------------


@only_gpu
@pytest.mark.parametrize("form", ["one", "separate"])
def test_graph_replay_has_the_bits_of_eager_steps(gpu: Backend, preconditioner: str, form: str) -> None:
    runs = []
    for graphed in (False, True):
        ps = parameters(gpu)
        lr = torch.tensor(0.02, device="cuda")
        optimizer = NLCG(ps, lr, line_search=OnlineLineSearch(), capturable=True, preconditioner=preconditioner)
        loss = torch.zeros((), device="cuda")

        def one_step(
            ps: list[nn.Parameter] = ps, optimizer: NLCG = optimizer, loss: Tensor = loss, lr: Tensor = lr
        ) -> None:
            loss.copy_(set_gradients(ps))
            optimizer.step(loss=loss)
            lr.mul_(0.9)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # which made the inputs
        with torch.cuda.stream(side):
            for _ in range(3):
                one_step()
                optimizer._table.native.set_launch(form)
        torch.cuda.current_stream().wait_stream(side)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one_step()
            for _ in range(7):
                graph.replay()
            one_step()  # eager again, with other addresses
            graph.replay()
        else:
            for _ in range(9):
                one_step()
        assert optimizer.diagnostics().step == 12
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@only_gpu
def test_a_step_neither_waits_nor_allocates(gpu: Backend, preconditioner: str) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(
        ps,
        torch.tensor(0.02, device="cuda"),
        line_search=OnlineLineSearch(),
        capturable=True,
        preconditioner=preconditioner,
    )
    losses = []
    for _ in range(3):
        losses.append(set_gradients(ps))
        optimizer.step(loss=losses[-1])
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step(loss=losses[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@only_gpu
def test_streams(gpu: Backend, preconditioner: str) -> None:
    """A step follows what the caller's current stream holds."""
    runs = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        ps = parameters(gpu)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer = NLCG(ps, 0.02, preconditioner=preconditioner)
            for _ in range(5):
                torch.cuda._sleep(1_000_000)
                set_gradients(ps)
                optimizer.step()
            runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@only_gpu
def test_cupy_arrays(gpu: Backend) -> None:
    cupy = pytest.importorskip("cupy")
    x = device_arrays(gpu, 10_007, torch.float32)
    expected = ops.preconditioned_dots(x["g"], x["g_prev"], x["h"])
    with cupy.cuda.Stream(non_blocking=True):
        y = {name: cupy.asarray(t.cpu().numpy()) for name, t in x.items()}
        assert ops.preconditioned_dots(y["g"], y["g_prev"], y["h"]) == expected
        ops.direction_update(y["d"], y["g"], y["h"], beta=0.5)
        found = cupy.asnumpy(y["d"])
    ops.direction_update(x["d"], x["g"], x["h"], beta=0.5)
    np.testing.assert_array_equal(found, x["d"].cpu().numpy())


@only_gpu
def test_beyond_two_billion_elements_on_the_gpu(gpu: Backend) -> None:
    n = (1 << 31) + 20
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    g = torch.zeros(n, dtype=torch.float16, device="cuda")
    marked = [0, 1 << 30, (1 << 31) - 1, 1 << 31, n - 1]
    g[marked] = torch.arange(1.0, 6.0, dtype=torch.float16, device="cuda")
    assert ops.preconditioned_dots(g, None, None).rz == 55
    d = torch.zeros(n, device="cuda")
    ops.direction_update(d, g, None, beta=0.0)
    assert d[marked].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]


@only_gpu
def test_cpu_and_gpu_parameters_do_not_mix(gpu: Backend) -> None:
    ps = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="cuda"))]
    optimizer = NLCG(ps, 0.1)
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 1 is on cuda:0, parameter 0 on cpu"):
        optimizer.step()
    assert not optimizer.state


def test_the_report_says_why_cuda_is_off() -> None:
    done = subprocess.run([sys.executable, "-m", "fastnlcg", "--json"], capture_output=True, text=True, check=True)
    cuda = json.loads(done.stdout)["cuda"]
    assert bool(cuda["unavailable_reason"]) == (not cuda["devices"])


# ---- edges -----------------------------------------------------------------------------------------------------------


@only_emulated
def test_a_cooperative_launch_that_is_too_large_falls_back_for_good(
    gpu: Backend, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under MPS, or in a green context."""
    runs = []
    for refused in (False, True):
        ps = parameters(gpu)
        optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
        launches = []
        for t in range(4):
            set_gradients(ps, 1.0 + t)
            with monkeypatch.context() as inside:
                if refused and t == 1:
                    inside.setenv("FASTNLCG_EMULATE_TOO_LARGE", "1")
                optimizer.step()
            launches.append(optimizer.diagnostics().launches)
        passes = {"adam": 2, "bfgs": 3}[preconditioner]
        assert launches == ([1, passes, passes, passes] if refused else [1] * 4)
        runs.append(bits(optimizer))
    assert runs[0] == runs[1]


@only_emulated
def test_work_on_another_stream_waits_for_the_last(
    gpu: Backend, preconditioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps at once would count on one barrier, and hang."""
    log = tmp_path / "log"
    monkeypatch.setenv("FASTNLCG_EMULATE_LOG", str(log))
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    for stream in (0, 0, 7, 7, 0):
        monkeypatch.setattr(_native, "current_stream", lambda device, *arrays, s=stream: s)
        set_gradients(ps)
        optimizer.step()
    monkeypatch.setattr(_native, "current_stream", lambda device, *arrays: 9)
    optimizer.diagnostics()
    events = [tuple(line.split()) for line in log.read_text().splitlines()]
    expected = [("record", "0"), ("record", "0"), ("wait", "7"), ("record", "7"), ("record", "7"), ("wait", "0")]
    assert events[:7] == [*expected, ("record", "0")]
    assert set(events[7:]) == {("wait", "9")}


@only_emulated
def test_ops_are_not_captured(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would copy from the host's numbers when they are gone."""
    x = device_arrays(gpu, 100, torch.float32)
    before = on_cpu(x)
    monkeypatch.setenv("FASTNLCG_EMULATE_CAPTURE", "1")
    arrays = x
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        ops.direction_update(arrays["d"], arrays["g"], arrays["h"], beta=0.5, p=arrays["p"], alpha=0.1)
    assert all(torch.equal(x[name], t) for name, t in before.items())


@only_emulated
def test_waiting_for_a_stream_lets_other_threads_run(
    gpu: Backend, preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    set_gradients(ps)
    optimizer.step()
    monkeypatch.setenv("FASTNLCG_EMULATE_SLOW", "1")
    for wait in (optimizer.diagnostics,):  # state_dict() has references, and waits for nothing
        counted, stop = [0], threading.Event()

        def count(counted: list[int] = counted, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                counted[0] += 1
                time.sleep(0.001)

        thread = threading.Thread(target=count)
        thread.start()
        before = counted[0]
        wait()
        after = counted[0]
        stop.set()
        thread.join()
        assert after - before > 20  # of the 200 ms that a wait takes


def test_what_amp_sets_may_be_of_another_dtype_or_a_number(gpu: Backend, preconditioner: str) -> None:
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


@only_emulated
def test_a_stream_handle_that_is_used_again_is_another_stream(
    gpu: Backend, preconditioner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FASTNLCG_EMULATE_LOG", str(log))
    ps = parameters(gpu)
    optimizer = NLCG(ps, 0.1, preconditioner=preconditioner)
    for generation in (0, 0, 1):
        monkeypatch.setenv("FASTNLCG_EMULATE_STREAM_GENERATION", str(generation))
        set_gradients(ps)
        optimizer.step()
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["record", "record", "wait", "record"]


@only_emulated
def test_bias_corrections_follow_the_counts_that_others_change(gpu: Backend) -> None:
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
