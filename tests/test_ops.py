"""The flat-buffer functions: what they compute, on whose memory, and what they refuse (faults, list D)."""

from __future__ import annotations

import array
import copy
import ctypes
import gc
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from backends import NARROWEST, Backend
from fastnlcg import OnlineLineSearch, _native, ops, reference

N = 1000


BFGS = {"preconditioner": "bfgs"}


def step(x: dict[str, object], scalars: ops.Scalars, **options: object) -> bool:
    """A whole step with h as the diagonal."""
    named = {("diagonal" if name == "h" else name): array for name, array in x.items()}
    return ops.nlcg_step(**named, scalars=scalars, **{**BFGS, **options})


def arrays(n: int = N, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    state = ops._native.state_dtype(dtype)
    return {
        "p": rng.standard_normal(n).astype(dtype),
        "g": rng.standard_normal(n).astype(dtype),
        "g_prev": rng.standard_normal(n).astype(state),
        "d": rng.standard_normal(n).astype(state),
        "h": rng.uniform(0.5, 2.0, n).astype(state),
    }


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_parts_compute_the_equations(on_host: Backend, dtype: str, rtol: float) -> None:
    x = arrays(dtype=dtype)
    x["g"] = (x["g_prev"] - 0.3 * x["d"]).astype(dtype)  # so that ys > 0 for negative d . y
    e = {key: value.astype(float) for key, value in x.items()}
    y, s = e["g"] - e["g_prev"], -0.5 * e["d"]
    ys, shs = float(y @ s), float(s @ (e["h"] * s))

    dots = ops.preconditioned_dots(x["g"], x["g_prev"], x["h"], eps=0.1)
    assert dots.rz == pytest.approx(np.sum(e["g"] ** 2 / (e["h"] + 0.1)), rel=rtol)
    assert dots.rz_mid == pytest.approx(np.sum(e["g"] * e["g_prev"] / (e["h"] + 0.1)), rel=rtol)
    assert ops.preconditioned_dots(x["g"], None, None) == (pytest.approx(float(e["g"] @ e["g"]), rel=rtol), 0.0)

    curvature = ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5)
    assert curvature.ys == pytest.approx(ys, rel=rtol)
    assert curvature.shs == pytest.approx(shs, rel=rtol)
    assert curvature.updated
    h = reference.bfgs_diagonal(e["h"], y, s, ys, shs)
    np.testing.assert_allclose(x["h"], h, rtol=100 * rtol)

    ops.direction_update(x["d"], x["g"], x["h"], beta=0.7, eps=0.1, p=x["p"], alpha=0.2, g_prev=x["g_prev"])
    d = -e["g"] / (x["h"].astype(float) + 0.1) + 0.7 * e["d"]
    np.testing.assert_allclose(x["d"], d, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(x["p"], e["p"] + 0.2 * d, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(x["g_prev"], x["g"])


def test_the_gate_keeps_h(on_host: Backend) -> None:
    x = arrays()
    before = x["h"].copy()
    curvature = ops.bfgs_diag_update(x["h"], x["g"], x["g"].copy(), x["d"], alpha_prev=0.5)
    assert curvature == (0.0, pytest.approx(curvature.shs), False)
    np.testing.assert_array_equal(x["h"], before)
    x["g"][:] = x["g_prev"] - x["d"]  # ys < 0 for a positive step, > 0 for a negative one
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.5).updated
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5, curvature_eps=1e9).updated
    np.testing.assert_array_equal(x["h"], before)
    assert ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=-0.5).updated


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_step_from_its_parts_has_the_bits_of_the_fused_step(on_host: Backend, update: str) -> None:
    """The recipe in the module's docstring."""
    x, lr = arrays(), 0.05
    x["h"][:], x["d"][:], x["g_prev"][:] = 1, 0, 0
    own = copy.deepcopy(x)
    a = np.random.default_rng(1).uniform(0.1, 3.0, N).astype("f")
    scalars, rz = ops.Scalars(), 0.0
    for t in range(10):
        for z in (x, own):
            z["g"][:] = a * z["p"]
        step(x, scalars, lr=lr, update=update)
        mid = ops.preconditioned_dots(own["g"], own["g_prev"], own["h"]).rz_mid
        if t:
            ops.bfgs_diag_update(own["h"], own["g"], own["g_prev"], own["d"], alpha_prev=lr)
        rz_new = ops.preconditioned_dots(own["g"], None, own["h"]).rz
        numerator = rz_new - mid if update == "polak_ribiere" else rz_new
        beta = min(max(numerator / rz, 0.0), 1.0) if t else 0.0
        ops.direction_update(own["d"], own["g"], own["h"], beta=beta, p=own["p"], alpha=lr, g_prev=own["g_prev"])
        rz = rz_new
        for name in x:
            np.testing.assert_array_equal(x[name], own[name], err_msg=f"{name} after step {t + 1}")


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_parts_of_adam_compute_the_equations(on_host: Backend, dtype: str, rtol: float) -> None:
    x = arrays(dtype=dtype)
    v = x.pop("h")
    e, v_old = {key: value.astype(float) for key, value in x.items()}, v.astype(float)
    v_new = reference.second_moment(v_old, e["g"], 0.99)
    h_old, h = (np.sqrt(value / (1 - 0.99**k)) + 0.1 for value, k in ((v_old, 3), (v_new, 4)))
    options = {"updates": 3, "beta2": 0.99, "eps": 0.1}

    dots = ops.adam_preconditioned_dots(x["g"], v, g_prev=x["g_prev"], **options)
    assert dots.rz == pytest.approx(np.sum(e["g"] ** 2 / h), rel=rtol)
    assert dots.rz_mid == pytest.approx(np.sum(e["g"] * e["g_prev"] / h_old), rel=rtol, abs=rtol * N)
    np.testing.assert_array_equal(v, v_old)  # read only

    move = {"p": x["p"], "alpha": 0.2, "weight_decay": 0.5, "g_prev": x["g_prev"]}
    ops.adam_direction_update(x["d"], x["g"], v, beta=0.7, **options, **move)
    d = -e["g"] / h + 0.7 * e["d"]
    np.testing.assert_allclose(v, v_new, rtol=rtol)
    np.testing.assert_allclose(x["d"], d, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(x["p"], 0.9 * e["p"] + 0.2 * d, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(x["g_prev"], x["g"])


@pytest.mark.parametrize("update", ["fletcher_reeves", "polak_ribiere"])
def test_a_step_of_adam_from_its_parts_follows_the_fused_step(on_host: Backend, update: str) -> None:
    x, lr, pr = arrays(), 0.05, update == "polak_ribiere"
    v, own_v = (np.zeros(N, "f") for _ in range(2))
    x["d"][:], x["g_prev"][:] = 0, 0
    del x["h"]
    own, scalars, rz = copy.deepcopy(x), ops.Scalars(), 0.0
    a = np.random.default_rng(1).uniform(0.1, 3.0, N).astype("f")
    kept = {"g_prev": own["g_prev"]} if pr else {}
    for t in range(10):
        for z in (x, own):
            z["g"][:] = a * z["p"] + np.float32(0.1 * t)
        fused = {**x, "g_prev": x["g_prev"] if pr else None, "diagonal": v}
        options = {"lr": lr, "preconditioner": "adam", "update": update, "weight_decay": 0.1}
        assert ops.nlcg_step(**fused, scalars=scalars, **options)
        dots = ops.adam_preconditioned_dots(own["g"], own_v, updates=t, **kept)
        beta = min(max((dots.rz - dots.rz_mid) / rz, 0.0), 0.9) if t else 0.0
        move = {"p": own["p"], "alpha": lr, "weight_decay": 0.1, **kept}
        ops.adam_direction_update(own["d"], own["g"], own_v, beta=beta, updates=t, **move)
        rz = dots.rz
        np.testing.assert_allclose(v, own_v, rtol=1e-6)
        for name in ("p", "d"):  # beta2^k is a product there and a power here
            np.testing.assert_allclose(x[name], own[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} after step {t + 1}")
    assert scalars.updates == 10
    assert scalars.rz == pytest.approx(rz, rel=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch", "parameter", "memoryview", "array", "dlpack_only"])
def test_anything_with_a_buffer_or_dlpack(kind: str) -> None:
    class OnlyDLPack:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self) -> object:  # DLPack 0: no max_version
            return self.tensor.__dlpack__()

    wrap = {
        "numpy": lambda a: a,
        "torch": torch.from_numpy,
        "parameter": lambda a: torch.nn.Parameter(torch.from_numpy(a)),
        "memoryview": memoryview,
        "array": lambda a: array.array("f", a.tobytes()),
        "dlpack_only": lambda a: OnlyDLPack(torch.from_numpy(a)),
    }[kind]
    plain, x = arrays(), arrays()
    wrapped = {name: wrap(a) for name, a in x.items()}
    assert step(plain, ops.Scalars(), lr=0.1)
    assert step(wrapped, ops.Scalars(), lr=0.1)
    got = {name: np.frombuffer(w, dtype="f") for name, w in wrapped.items()} if kind == "array" else x
    for name in plain:
        np.testing.assert_array_equal(got[name], plain[name])


def test_torch_is_told_of_the_writes() -> None:
    x = {name: torch.from_numpy(a) for name, a in arrays().items()}
    step(x, ops.Scalars(), lr=0.1)
    assert [x[name]._version for name in ("p", "g", "g_prev", "d", "h")] == [1, 0, 1, 1, 1]


def test_scalars_copy_pickle_and_resume() -> None:
    x, scalars = arrays(), ops.Scalars()
    options = {"lr": 0.1, "line_search": OnlineLineSearch(), "update": "polak_ribiere"}
    for t in range(6):
        if t == 3:
            y, other = copy.deepcopy(x), pickle.loads(pickle.dumps(scalars))
        x["g"][:] = 2 * x["p"]
        step(x, scalars, loss=1.0 + t, **options)
    for t in range(3, 6):
        y["g"][:] = 2 * y["p"]
        step(y, other, loss=1.0 + t, **options)
    assert other == scalars
    for name in x:
        np.testing.assert_array_equal(x[name], y[name])


def test_a_skipped_step_writes_only_the_counter() -> None:
    x, scalars = arrays(), ops.Scalars()
    step(x, scalars, lr=0.1)
    before, kept = copy.deepcopy(x), copy.copy(scalars)
    x["g"][7] = np.inf
    assert not step(x, scalars, lr=0.1, loss=3.0, line_search=OnlineLineSearch())
    assert scalars.skipped_steps == 1
    scalars.skipped_steps = 0.0
    assert repr(scalars) == repr(kept)
    for name in ("p", "g_prev", "d", "h"):
        np.testing.assert_array_equal(x[name], before[name])


def test_empty_buffers() -> None:
    x = arrays(0)
    assert step(x, ops.Scalars(), lr=0.1)
    assert ops.preconditioned_dots(x["g"], x["g_prev"], x["h"]) == (0.0, 0.0)
    assert not ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.1).updated
    ops.direction_update(x["d"], x["g"], None, beta=0.0)


# ---- what is refused, before anything is written ---------------------------------------------------------------------


def refused(error: type[Exception], match: str, changes: dict, **keywords: object) -> None:
    x = arrays()
    before = copy.deepcopy(x)
    with pytest.raises(error, match=match):
        step({**x, **{k: f(x) for k, f in changes.items()}}, ops.Scalars(), **{"lr": 0.1, **keywords})
    for name, value in before.items():
        np.testing.assert_array_equal(x[name], value)


def test_35_different_lengths_are_all_named() -> None:
    refused(ValueError, r"g 1000.*p 999.*d 1000", {"p": lambda x: x["p"][:-1]})


@pytest.mark.parametrize(
    ("name", "dtype"), [("p", "f8"), ("d", "f8"), ("h", "f2"), ("g_prev", "i4"), ("g", "i8"), ("g", ">f4")]
)
def test_36_wrong_dtypes_are_not_cast(name: str, dtype: str) -> None:
    refused(TypeError, "dtype", {name: lambda x: x[name].astype(dtype)})


@pytest.mark.parametrize("name", ["p", "d", "h", "g_prev"])
def test_37_read_only(name: str) -> None:
    def frozen(x: dict) -> np.ndarray:
        a = x[name].copy()
        a.flags.writeable = False
        return a

    refused(ValueError, f"{'diagonal' if name == 'h' else name} is read-only", {name: frozen})


def test_37_a_read_only_gradient_is_fine() -> None:
    x = arrays()
    x["g"].flags.writeable = False
    assert step(x, ops.Scalars(), lr=0.1)


def test_38_overlap() -> None:
    refused(ValueError, "g and p overlap|p and g overlap", {"g": lambda x: x["p"]})
    base = np.zeros(2 * N, "f")
    refused(ValueError, "overlap", {"d": lambda _: base[:N], "h": lambda _: base[N - 1 : 2 * N - 1]})


def test_39_a_capsule_is_consumed_once() -> None:
    x = arrays()
    capsule = torch.from_numpy(x["g"]).__dlpack__()
    assert ops.preconditioned_dots(capsule, None, None).rz > 0
    with pytest.raises(ValueError, match="g: .*consumed before"):
        ops.preconditioned_dots(capsule, None, None)


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


class HandMade:
    """A DLPack tensor of one's own making."""

    def __init__(self, array: np.ndarray, **changes: object) -> None:
        self.array, self.deleted = array, 0

        def delete(_: int) -> None:
            self.deleted += 1

        self.shape = (ctypes.c_int64 * 1)(changes.pop("length", array.size))
        stride = changes.pop("stride", None)
        self.strides = None if stride is None else (ctypes.c_int64 * 1)(stride)
        self.deleter = Deleter(delete)
        tensor = DLTensor(array.ctypes.data, 1, 0, 1, 2, 32, 1, self.shape, self.strides, 0)
        for key, value in changes.items():
            setattr(tensor, key, value)
        self.managed = DLManagedTensor(tensor, None, self.deleter)

    def __dlpack__(self) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.name = b"dltensor"
        return new(ctypes.addressof(self.managed), self.name, None)


def test_40_dlpack_fields_are_honoured_and_the_deleter_called_once() -> None:
    x = arrays()
    plain = HandMade(x["g"])
    expected = ops.preconditioned_dots(x["g"], None, None).rz
    assert ops.preconditioned_dots(plain, None, None).rz == expected
    gc.collect()
    assert plain.deleted == 1
    shifted = HandMade(x["g"], byte_offset=4, length=N - 1, stride=1)
    assert ops.preconditioned_dots(shifted, None, None).rz == ops.preconditioned_dots(x["g"][1:], None, None).rz
    for changes, error, match in (
        ({"stride": 2, "length": N // 2}, ValueError, "not contiguous"),
        ({"lanes": 4}, TypeError, "float32x4"),
        ({"code": 5, "bits": 64}, TypeError, "complex64"),
        ({"code": 0}, TypeError, "int32"),
        ({"device_type": 2, "device_id": 3}, ValueError, "cuda:3, expected cpu"),  # 43
        ({"device_type": 8}, ValueError, "DLPack device type 8"),
        ({"data": None}, ValueError, "no memory"),  # 41
        ({"length": -1}, ValueError, "negative"),  # 42
        ({"length": 2**63 - 1}, ValueError, "expected 0 <= n <= 2^60".replace("^", r"\^")),
    ):
        made = HandMade(x["g"], **changes)
        with pytest.raises(error, match=match):
            ops.preconditioned_dots(made, None, None)
        gc.collect()
        assert made.deleted == 1, changes


def test_42_native_lengths_are_checked_again() -> None:
    import torch
    from fastnlcg.tensors.table import DLPACK_API

    step = _native.TensorTable("float32")
    keys = _native.StateKeys(direction="direction", steps="step")

    def lay_out(n: int, *segments: Any, groups: int = 1) -> None:
        step.lay_out(n, segments, groups, keys, DLPACK_API, torch.Tensor)

    for n in (-1, 2**62):
        with pytest.raises(ValueError, match="n is"):
            lay_out(n)
    right = {"offset": 0, "group": 0, "index": 0, "dtype": "float32", "shape": (3,), "strides": (1,)}
    for wrong in (
        {"offset": 5, "shape": (6,)},
        {"offset": -1},
        {"group": 1},
        {"run": -1},
        {"shape": (2**40, 2**40), "strides": (1, 1)},
        {"shape": (3, 3)},
        {"shape": (-1,)},
        {"shape": (0,)},
    ):
        with pytest.raises(ValueError, match="segment 0"):
            lay_out(10, _native.SegmentSpec(**(right | wrong)))
    with pytest.raises(ValueError, match="segment 1"):
        lay_out(10, _native.SegmentSpec(**right), _native.SegmentSpec(**right))
    with pytest.raises(TypeError, match="segment 0 is float64 but the state is float32"):
        lay_out(10, _native.SegmentSpec(**(right | {"dtype": "float64"})))
    with pytest.raises(ValueError, match="groups is -1"):
        lay_out(10, groups=-1)
    nothing, unlaid = _native.Tensors(scalars=torch.zeros(3)), _native.TensorTable("float32")
    for call in (lambda: unlaid.step(nothing, [], [], [], 0.0, math.nan, 1), lambda: unlaid.state_norms(nothing, 1)):
        with pytest.raises(ValueError, match=r"lay_out\(\) first"):
            call()
    with pytest.raises(ValueError, match=r"bind\(\) first"):
        _native.FlatStep("float32").preconditioned_dots(1)


def test_44_the_owner_is_held() -> None:
    view = _native.Buffer(np.full(1000, 7.0, "f"))  # its only other reference is gone
    gc.collect()
    assert np.all(np.ctypeslib.as_array((ctypes.c_float * 1000).from_address(view.pointer)) == 7.0)


def test_other_refusals() -> None:
    refused(TypeError, "diagonal: expected an array .* got list", {"h": lambda x: x["h"].tolist()})
    refused(ValueError, "g is not contiguous", {"g": lambda x: np.repeat(x["g"], 2)[::2]})
    odd = np.zeros(4 * N + 1, np.uint8)
    refused(ValueError, "not aligned", {"g": lambda _: odd[1:].view("f")})
    refused(ValueError, "Invalid learning rate: -1.0", {}, lr=-1.0)
    refused(ValueError, "Invalid weight_decay", {}, weight_decay=math.nan)
    refused(TypeError, "loss", {}, loss="1.0")
    refused(ValueError, "loss must have one element", {}, loss=np.ones(2))
    refused(ValueError, "update must be one of", {}, update="newton")
    refused(TypeError, "threads", {}, threads=1.5)
    refused(ValueError, "threads", {}, threads=0)
    with pytest.raises(TypeError, match="Scalars"):
        step(arrays(), {}, lr=0.1)
    refused(ValueError, "diagonal must be its hessian_diag with preconditioner='bfgs'", {"h": lambda _: None})
    refused(ValueError, "diagonal must be None with preconditioner=None", {}, preconditioner=None)
    refused(ValueError, "g_prev is needed with preconditioner='bfgs'", {"g_prev": lambda _: None})
    adam = {"preconditioner": "adam"}
    for options in ({"update": "polak_ribiere"},):
        refused(ValueError, "g_prev is needed with .*'adam'", {"g_prev": lambda _: None}, **adam, **options)
    refused(ValueError, "Invalid eps: 0.0", {}, eps=0.0, **adam)
    x = arrays()
    for keywords, error, match in (
        ({"updates": -1}, ValueError, "updates must be from 0 to"),
        ({"updates": 1.0}, TypeError, "updates must be an int"),
        ({"updates": 0, "beta2": 1.0}, ValueError, "Invalid beta2"),
        ({"updates": 0, "eps": 0.0}, ValueError, "Invalid eps"),
    ):
        with pytest.raises(error, match=match):
            ops.adam_preconditioned_dots(x["g"], x["h"], **keywords)
        with pytest.raises(error, match=match):
            ops.adam_direction_update(x["d"], x["g"], x["h"], beta=0.5, **keywords)
    with pytest.raises(ValueError, match="Invalid beta"):
        ops.direction_update(*(arrays()[k] for k in "dgh"), beta=math.inf)


def test_50_the_floating_point_mode_is_left_alone() -> None:
    """Denormals stay denormals, before and after."""
    x = arrays(64)
    x["g"][:] = np.float32(1e-42)
    scalars = ops.Scalars()
    for _ in range(3):
        assert step(x, scalars, lr=1.0)
    assert np.all(x["g_prev"] == np.float32(1e-42))
    assert np.all(np.isfinite(x["p"]))
    assert np.float32(1e-42) * np.float32(0.5) > 0


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNLCG_ISA", "mmx")
    refused(ValueError, f"FASTNLCG_ISA is 'mmx'; this processor has {NARROWEST}", {})


def test_works_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, fastnlcg
x = [np.ones(5, "f") for _ in range(5)]
fastnlcg.ops.nlcg_step(*x, fastnlcg.ops.Scalars(), lr=0.1, preconditioner="adam")
try:
    fastnlcg.NLCG
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastnlcg.NLCG needs torch: pip install 'fastnlcg[torch]'" in done.stdout


# ---- found by attacks ------------------------------------------------------------------------------------------------


def test_arrays_without_strides() -> None:
    """ctypes leaves them out of its buffer, which means row-major; it was a null pointer."""
    import ctypes

    array = (ctypes.c_float * 12)(*range(12))
    view = _native.Buffer(array)
    assert (view.size, view.dtype, view.contiguous) == (12, "float32", True)
    nested = ((ctypes.c_double * 3) * 4)()
    view = _native.Buffer(nested)
    assert (view.size, view.contiguous) == (12, True)


def test_no_gradient_is_said() -> None:
    with pytest.raises(TypeError, match="g must be an array, got None"):
        ops.preconditioned_dots(None, None, None)


@pytest.mark.parametrize("threads", [0, -1, 2**31, 2**70])
def test_thread_counts_are_bounded(threads: int) -> None:
    with pytest.raises(ValueError, match=r"threads must be from 1 to 2\*\*31 - 1"):
        ops.preconditioned_dots(np.ones(3, "f"), None, None, threads=threads)


def test_a_shape_beyond_64_bits_is_refused() -> None:
    class Absurd:
        __cuda_array_interface__ = {"shape": (2**40, 2**40), "typestr": "<f4", "data": (4096, False), "version": 3}  # noqa: RUF012

    with pytest.raises(ValueError, match="more bytes than 64 bits"):
        _native.Buffer(Absurd())


def test_a_raising_bool_is_passed_on() -> None:
    class Bad:
        def __bool__(self) -> bool:
            raise ZeroDivisionError

    class Array:
        __cuda_array_interface__ = {"shape": (2,), "typestr": "<f4", "data": (4096, Bad()), "version": 3}  # noqa: RUF012

    with pytest.raises(ZeroDivisionError):
        _native.Buffer(Array())


# ---- what the fuzzer found -------------------------------------------------------------------------------------------


def test_both_sums_of_the_curvature_condition_are_looked_at() -> None:
    """h this small makes s h s tiny where y s is not; and the other way round."""
    for h, y in ((1e-12, 1.0), (1.0, 1e-12)):
        x = {name: np.full(10, value) for name, value in {"h": h, "g": y, "g_prev": 0.0, "d": 1.0}.items()}
        found = ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=1.0)
        assert not found.updated
        assert max(found.ys, found.shs) == 10.0
        assert np.all(x["h"] == h)


@pytest.mark.parametrize("missing", ["p", "g", "d"])
def test_an_array_that_is_none_and_may_not_be(missing: str) -> None:
    arrays: dict[str, Any] = {name: np.ones(4, np.float32) for name in ("p", "g", "g_prev", "d", "diagonal")}
    arrays[missing] = None
    with pytest.raises(TypeError, match=f"^{missing} must be an array, got None"):
        ops.nlcg_step(*arrays.values(), ops.Scalars(), lr=0.1, preconditioner="bfgs")


@pytest.mark.parametrize("make", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
def test_memory_that_torch_does_not_export(make: Any) -> None:
    with pytest.raises(ValueError, match="^g: "):
        ops.preconditioned_dots(make(torch.ones(4)), None, None)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: ops.adam_preconditioned_dots(a, a.copy(), updates=10**400),
        lambda a: ops.nlcg_step(*few(a), lr=0.1, preconditioner="adam", loss=10**400),
        lambda a: ops.nlcg_step(*few(a, ops.Scalars(rz=10**400)), lr=0.1, preconditioner="adam"),
        lambda a: OnlineLineSearch(10**400),
    ],
    ids=["updates", "loss", "scalars", "line_search"],
)
def test_an_int_beyond_every_double_is_a_wrong_value(call: Any) -> None:
    with pytest.raises(ValueError, match="expected|from 0 to"):
        call(np.ones(4, np.float32))


def few(a: np.ndarray, scalars: ops.Scalars | None = None) -> tuple[Any, ...]:
    return a, a.copy(), None, a.copy(), a.copy(), scalars or ops.Scalars()


# ---- what others hand over ------------------------------------------------------------------------------------------


def test_arrays_that_are_only_read_may_be_read_only() -> None:
    x = arrays()
    for name in ("g", "g_prev", "d"):
        x[name].setflags(write=False)
    expected = {name: a.copy() for name, a in x.items()}
    ops.bfgs_diag_update(x["h"], x["g"], x["g_prev"], x["d"], alpha_prev=0.1)
    x["h"].setflags(write=False)
    ops.preconditioned_dots(x["g"], x["g_prev"], x["h"])
    ops.adam_preconditioned_dots(x["g"], x["h"], updates=1, g_prev=x["g_prev"])
    assert all(np.array_equal(x[name], expected[name]) for name in ("g", "g_prev", "d"))


def test_a_masked_array_does_not_lose_its_mask() -> None:
    masked = np.ma.masked_array(np.ones(4, np.float32), mask=[1, 0, 0, 0])
    with pytest.raises(TypeError, match="g is a masked array"):
        ops.preconditioned_dots(masked, None, None)


class Producer:
    def __init__(self, error: BaseException, *, device: bool) -> None:
        self.error, self.device = error, device

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device:
            raise self.error
        return 1, 0

    def __dlpack__(self, **_: object) -> object:
        raise self.error


def test_errors_of_a_producer() -> None:
    with pytest.raises(ValueError, match="^g: 'utf-8' codec can't decode"):  # whose error takes five arguments
        ops.preconditioned_dots(Producer(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), device=False), None, None)
    with pytest.raises(KeyboardInterrupt):
        ops.preconditioned_dots(Producer(KeyboardInterrupt(), device=True), None, None)


def test_scalars_are_one_object_that_a_step_writes() -> None:
    """So an interrupt, which Python raises when the native step has returned, finds buffers and scalars of one step."""
    x = arrays()
    scalars = ops.Scalars()
    held = scalars._values
    ops.nlcg_step(x["p"], x["g"], x["g_prev"], x["d"], x["h"], scalars, lr=0.1, preconditioner="bfgs")
    assert scalars._values is held
    assert scalars.step == 1
    assert copy.deepcopy(scalars) == pickle.loads(pickle.dumps(scalars)) == copy.copy(scalars) == scalars
    assert copy.copy(scalars)._values is not held
    assert scalars != ops.Scalars()
    assert repr(scalars).startswith("Scalars(step=1.0, ")
    with pytest.raises(AttributeError, match="nobody"):
        scalars.nobody = 1.0
    with pytest.raises(TypeError, match=r"scalars\.rz"):
        scalars.rz = "1"
    with pytest.raises(ValueError, match="updates"):
        scalars.updates = 0.5
