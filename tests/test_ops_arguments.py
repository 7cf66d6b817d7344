"""What the flat-buffer functions refuse, before anything is written, and what they take."""

from __future__ import annotations

import copy
import ctypes
import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from backends import NARROWEST
from fastnlcg import OnlineLineSearch, _native, ops
from fastnlcg.options import Options
from test_ops import N, arrays, step


def refused(error: type[Exception], match: str, changes: dict, **keywords: object) -> None:
    x = arrays()
    before = copy.deepcopy(x)
    with pytest.raises(error, match=match):
        step({**x, **{k: f(x) for k, f in changes.items()}}, ops.Scalars(), **{"lr": 0.1, **keywords})
    for name, value in before.items():
        np.testing.assert_array_equal(x[name], value)


def test_different_lengths_are_all_named() -> None:
    refused(ValueError, r"g 1000.*p 999.*d 1000", {"p": lambda x: x["p"][:-1]})


@pytest.mark.parametrize(
    ("name", "dtype"), [("p", "f8"), ("d", "f8"), ("h", "f2"), ("g_prev", "i4"), ("g", "i8"), ("g", ">f4")]
)
def test_wrong_dtypes_are_not_cast(name: str, dtype: str) -> None:
    refused(TypeError, "dtype", {name: lambda x: x[name].astype(dtype)})


@pytest.mark.parametrize("name", ["p", "d", "h", "g_prev"])
def test_read_only_arrays_that_are_written_are_refused(name: str) -> None:
    def frozen(x: dict) -> np.ndarray:
        a = x[name].copy()
        a.flags.writeable = False
        return a

    refused(ValueError, f"{'diagonal' if name == 'h' else name} is read-only", {name: frozen})


def test_the_gradient_may_be_read_only() -> None:
    x = arrays()
    x["g"].flags.writeable = False
    assert step(x, ops.Scalars(), lr=0.1)


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


def test_arrays_that_overlap_are_refused() -> None:
    refused(ValueError, "g and p overlap|p and g overlap", {"g": lambda x: x["p"]})
    base = np.zeros(2 * N, "f")
    refused(ValueError, "overlap", {"d": lambda _: base[:N], "h": lambda _: base[N - 1 : 2 * N - 1]})


def test_other_wrong_arguments_are_refused() -> None:
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


@pytest.mark.parametrize("missing", ["p", "g", "d"])
def test_arrays_that_are_required_are_named(missing: str) -> None:
    arrays: dict[str, Any] = {name: np.ones(4, np.float32) for name in ("p", "g", "g_prev", "d", "diagonal")}
    arrays[missing] = None
    with pytest.raises(TypeError, match=f"^{missing} must be an array, got None"):
        ops.nlcg_step(*arrays.values(), ops.Scalars(), lr=0.1, preconditioner="bfgs")


def test_a_missing_gradient_is_refused() -> None:
    with pytest.raises(TypeError, match="g must be an array, got None"):
        ops.preconditioned_dots(None, None, None)


@pytest.mark.parametrize("threads", [0, -1, 2**31, 2**70])
def test_thread_counts_are_bounded(threads: int) -> None:
    with pytest.raises(ValueError, match=r"threads must be from 1 to 2\*\*31 - 1"):
        ops.preconditioned_dots(np.ones(3, "f"), None, None, threads=threads)


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


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTNLCG_ISA", "mmx")
    refused(ValueError, f"FASTNLCG_ISA is 'mmx'; this processor has {NARROWEST}", {})


@pytest.mark.parametrize("make", [lambda x: x.to("meta"), lambda x: x.to_sparse()], ids=["meta", "sparse"])
def test_memory_that_torch_does_not_export_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="^g: "):
        ops.preconditioned_dots(make(torch.ones(4)), None, None)


def test_a_masked_array_does_not_lose_its_mask() -> None:
    masked = np.ma.masked_array(np.ones(4, np.float32), mask=[1, 0, 0, 0])
    with pytest.raises(TypeError, match="g is a masked array"):
        ops.preconditioned_dots(masked, None, None)


def test_arrays_without_strides() -> None:
    """ctypes leaves strides out of its buffers, which means row-major; they were read through a null pointer."""
    import ctypes

    array = (ctypes.c_float * 12)(*range(12))
    view = _native.Buffer(array)
    assert (view.size, view.dtype, view.contiguous) == (12, "float32", True)
    nested = ((ctypes.c_double * 3) * 4)()
    view = _native.Buffer(nested)
    assert (view.size, view.contiguous) == (12, True)


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


class Producer:
    def __init__(self, error: BaseException, *, device: bool) -> None:
        self.error, self.device = error, device

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device:
            raise self.error
        return 1, 0

    def __dlpack__(self, **_: object) -> object:
        raise self.error


def test_errors_of_a_dlpack_producer() -> None:
    with pytest.raises(ValueError, match="^g: 'utf-8' codec can't decode"):  # its constructor takes five arguments
        ops.preconditioned_dots(Producer(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), device=False), None, None)
    with pytest.raises(KeyboardInterrupt):
        ops.preconditioned_dots(Producer(KeyboardInterrupt(), device=True), None, None)


def test_a_capsule_is_consumed_once() -> None:
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
    """A DLPack tensor made by hand, with any field changed."""

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


def test_dlpack_fields_are_honoured_and_the_deleter_called_once() -> None:
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
        ({"device_type": 2, "device_id": 3}, ValueError, "cuda:3, expected cpu"),
        ({"device_type": 8}, ValueError, "DLPack device type 8"),
        ({"data": None}, ValueError, "no memory"),
        ({"length": -1}, ValueError, "negative"),
        ({"length": 2**63 - 1}, ValueError, "expected 0 <= n <= 2^60".replace("^", r"\^")),
    ):
        made = HandMade(x["g"], **changes)
        with pytest.raises(error, match=match):
            ops.preconditioned_dots(made, None, None)
        gc.collect()
        assert made.deleted == 1, changes


def test_native_lengths_are_checked_again() -> None:
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


def test_a_step_lets_go_of_the_scalars() -> None:
    """They are the caller's, and may be freed before the next call."""
    flat = _native.FlatStep("float32")
    flat.set_options(Options(preconditioner="adam").native())
    memory = {name: np.ones(40, np.float32) for name in ("p", "g", "direction", "diagonal")}
    flat.bind(**{name: _native.Buffer(array) for name, array in memory.items()}, steps=3.0)
    dots = flat.preconditioned_dots(1)
    scalars = np.array([*_native.SCALARS.values(), 0.0, 3.0])
    flat.step(_native.Buffer(scalars), 0.0, 0.0, False, math.nan, 1)
    assert scalars[-1] == 4.0
    scalars[:] = 7.0
    memory["diagonal"][:] = 1.0
    assert flat.preconditioned_dots(1) == dots
    rounding = Options(preconditioner="adam", stochastic_rounding=True).native()
    flat.set_options(rounding)
    with pytest.raises(ValueError, match="does not round stochastically"):
        flat.preconditioned_dots(1)


def test_the_owner_of_the_memory_is_held() -> None:
    view = _native.Buffer(np.full(1000, 7.0, "f"))  # its only other reference is gone
    gc.collect()
    assert np.all(np.ctypeslib.as_array((ctypes.c_float * 1000).from_address(view.pointer)) == 7.0)


@pytest.mark.parametrize("name", ["p", "g", "d", "diagonal"])
def test_a_negative_bit_is_refused(name: str) -> None:
    """DLPack would hand over the memory without the sign (torch 2.13)."""
    arrays = {key: torch.ones(4) for key in ("p", "g", "d", "diagonal")}
    arrays[name] = torch._neg_view(-arrays[name])
    with pytest.raises(ValueError, match=f"^{name} has torch's negative bit"):
        ops.nlcg_step(g_prev=None, scalars=ops.Scalars(), lr=0.1, preconditioner="adam", **arrays)
    assert all(torch.equal(a, torch.ones(4)) for a in arrays.values())
