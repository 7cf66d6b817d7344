"""What the tests run on: every instruction set of this processor, the CUDA kernels emulated on the CPU
(tests/emulation), and a GPU where there is one. One body of tests for all of them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastnlcg import _native, layout

GPU = torch.cuda.is_available() and not _native.cuda_unavailable_reason()
EMULATION = importlib.util.find_spec("fastnlcg._emulated") is not None
NO_EMULATION = "fastnlcg._emulated is not built (FASTNLCG_EMULATION=ON)"
NO_GPU = f"no GPU: {_native.cuda_unavailable_reason() or 'torch sees none'}"


# The preconditioner that NLCG takes by default (conftest.py): in tests that hold for one of them only.
only_bfgs = pytest.mark.parametrize("preconditioner", ["bfgs"], indirect=True)
only_adam = pytest.mark.parametrize("preconditioner", ["adam"], indirect=True)


@dataclass(frozen=True)
class Backend:
    """``device`` is torch's; ``on_gpu`` whether the CUDA path runs, emulated or not."""

    name: str
    device: str = "cpu"
    on_gpu: bool = False

    def placement(self, n: int, segments: int, groups: int) -> dict[str, Any]:
        """The arguments of ``Step`` that say where it runs."""
        if not self.on_gpu:
            return {}
        workspace = torch.zeros(_native.workspace_doubles(n, segments, groups), dtype=torch.float64, device=self.device)
        return {"device": "cuda:0", "workspace": _native.Buffer(workspace), "stream": _native.current_stream("cuda:0")}


current = Backend("cpu")


class OnDevice:
    """Memory of the CPU that says it is a GPU's, as the emulation's is."""

    def __init__(self, array: Any) -> None:
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


def emulated_buffer(owner: Any) -> Any:
    from fastnlcg import _emulated

    if isinstance(owner, torch.Tensor) or hasattr(owner, "__array_interface__"):
        owner = OnDevice(owner)
    return _emulated.Buffer(owner)


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Makes ``name`` what this test runs on."""
    backend = Backend(name)
    if name == "emulated":
        from fastnlcg import _emulated

        backend = Backend(name, on_gpu=True)
        for key in ("Step", "workspace_doubles", "cuda_status"):
            monkeypatch.setattr(_native, key, getattr(_emulated, key))
        monkeypatch.setattr(_native, "Buffer", emulated_buffer)
        monkeypatch.setattr(_native, "cuda_unavailable_reason", lambda: "")
        monkeypatch.setattr(_native, "current_stream", lambda device, *arrays: 0)
        monkeypatch.setattr(_native, "capturing", lambda: False)
        monkeypatch.setattr(_native, "on_gpu", lambda device: True)
        monkeypatch.setattr(layout, "EXCHANGE", None)  # it would say that the memory is the CPU's
    elif name == "cuda":
        backend = Backend(name, device="cuda", on_gpu=True)
    elif name != "cpu":
        monkeypatch.setenv("FASTNLCG_ISA", name)
        assert _native.instruction_set() == name
    monkeypatch.setattr("backends.current", backend)
    return backend


def parameters(*names: str) -> list[Any]:
    """For ``pytest.mark.parametrize`` and fixtures. What is not here is skipped, with the reason; but a test for others
    too just runs without the GPU that is not there, as the report's header says."""
    if len(names) > 1 and not GPU:
        names = tuple(name for name in names if name != "cuda")
    marks = {
        "emulated": pytest.mark.skipif(not EMULATION, reason=NO_EMULATION),
        "cuda": pytest.mark.skipif(not GPU, reason=NO_GPU),
    }
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@functools.cache
def all_names() -> tuple[str, ...]:
    return (*_native.instruction_sets(), "emulated", "cuda")
