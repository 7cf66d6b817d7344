"""The CUDA path, emulated on the CPU everywhere, and on a GPU if there is one: forms of launching, grids, residency and
the flat-buffer functions. test_step.py compares its kernels with the reference; NLCG is in test_cuda_optimizer.py.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys

import backends
import numpy as np
import pytest
import torch
from backends import Backend
from fastnlcg import ops
from fastnlcg.reference import Options
from lockstep import Cut, Lockstep
from test_step import random_cuts
from torch import Tensor

only_gpu = pytest.mark.parametrize("gpu", backends.parameters("cuda"), indirect=True)
only_emulated = pytest.mark.parametrize("gpu", backends.parameters("emulated"), indirect=True)


# ---- forms -----------------------------------------------------------------------------------------------------------


def trajectory(cuts: list[Cut], options: Options, form: str, blocks: int, resident: int, steps: int = 5) -> dict:
    lockstep = Lockstep(cuts, options, lr=(0.05, 0.02), weight_decay=(0.0, 0.1))
    lockstep.native.set_launch(form, blocks, resident)
    for _ in range(steps):
        lockstep.noisy_gradients()
        lockstep.run()
    one = form == "one" and cuts[0].dtype != "float64" and options.state_dtype is None  # others have separate launches
    assert lockstep.native.launches == (1 if one else PASSES[options.preconditioner] + options.measures_norm)
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
    "adam_state16": Options(preconditioner="adam", state_dtype="bfloat16", **PR),
    "bfgs": Options(preconditioner="bfgs"),
    "bfgs_pr": Options(preconditioner="bfgs", **PR, eps=0.0),  # eps = 0 defers the update of h to the last pass
    "none_pr": Options(preconditioner=None, **PR),
    **{f"{of}_clip": Options(preconditioner=of, **PR, max_grad_norm=300.0) for of in ("adam", "bfgs", None)},
}


# Those with a clip run the same passes, and the pass that measures the norm.
THOROUGH_FORMS = ("adam_pr", "bfgs", "bfgs_pr", "none_pr")


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
    if name == "doubles" and options.state_dtype is not None:
        pytest.skip("float64 parameters have float64 state")
    expected = trajectory(CUTS[name], options, "separate", 1, 0)
    for form, blocks, resident in (
        *(("separate", blocks, 0) for blocks in (3, 0)),
        *(("one", blocks, resident) for blocks in (1, 3, 0) for resident in (0, 1, -1)),
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
        # one gradient moves: only its row is written again
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
    """In float64 to 1e-12, because the order of addition differs; also when nothing is aligned to 16 bytes."""
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
    """Memory of the CPU whose DLPack device is a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> object:
        assert stream == -1  # the producer is not to wait
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


def test_the_report_says_why_cuda_is_off() -> None:
    done = subprocess.run([sys.executable, "-m", "fastnlcg", "--json"], capture_output=True, text=True, check=True)
    cuda = json.loads(done.stdout)["cuda"]
    assert bool(cuda["unavailable_reason"]) == (not cuda["devices"])
