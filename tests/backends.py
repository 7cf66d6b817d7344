"""What the tests run on: every instruction set of this processor, the CUDA kernels emulated on the CPU
(tests/emulation), and a GPU if there is one. One body of tests for all of them."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastnlcg import _native

NARROWEST = _native.instruction_sets()[0]  # baseline on x86-64, neon on aarch64
GPU = torch.cuda.is_available() and not _native.cuda_unavailable_reason()
EMULATION = importlib.util.find_spec("fastnlcg._emulated") is not None
NO_EMULATION = "fastnlcg._emulated is not built (FASTNLCG_EMULATION=ON)"
NO_GPU = f"no GPU: {_native.cuda_unavailable_reason() or 'torch sees none'}"


@dataclass(frozen=True)
class Backend:
    """``device`` is torch's; ``on_gpu`` whether the CUDA path runs, emulated or not."""

    name: str
    device: str = "cpu"
    on_gpu: bool = False

    def step(self, state_dtype: str) -> Any:
        """A native side that runs here."""
        return (
            _native.TensorTable(state_dtype, "cuda:0", _native.current_stream("cuda:0"))
            if self.on_gpu
            else _native.TensorTable(state_dtype)
        )

    def workspace(self, n: int, segments: int, groups: int) -> Any:
        """What ``TensorTable.lay_out`` takes for such a state."""
        if not self.on_gpu:
            return None
        doubles = _native.workspace_doubles(n, segments, groups)
        return _native.Buffer(torch.zeros(doubles, dtype=torch.float64, device=self.device))


NATIVE_CLASSES = (
    "Buffer",
    "DescentPass",
    "DeviceScalar",
    "FlatStep",
    "SegmentSpec",
    "StateKeys",
    "TensorTable",
    "Tensors",
)
current = Backend("cpu")


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Makes ``name`` what this test runs on."""
    backend = Backend(name)
    if name == "emulated":
        from fastnlcg import _emulated

        backend = Backend(name, on_gpu=True)
        functions = ("workspace_doubles", "normalize", "normalize_doubles", "cuda_status")
        for key in (*NATIVE_CLASSES, "RanksDisagree", *functions):
            monkeypatch.setattr(_native, key, getattr(_emulated, key))
        monkeypatch.setattr(_native, "cuda_unavailable_reason", lambda: "")
        monkeypatch.setattr(_native, "current_stream", lambda device, *arrays: 0)
        monkeypatch.setattr(_native, "capturing", lambda: False)
        monkeypatch.setattr(_native, "on_gpu", lambda device: True)
    elif name == "cuda":
        backend = Backend(name, device="cuda", on_gpu=True)
    elif name != "cpu":
        monkeypatch.setenv("FASTNLCG_ISA", name)
        assert _native.instruction_set() == name
    monkeypatch.setattr("backends.current", backend)
    return backend


def parameters(*names: str, thorough: tuple[str, ...] = ()) -> list[Any]:
    """For ``pytest.mark.parametrize`` and fixtures. What is not available is skipped, with the reason; but a test for
    several backends runs without a GPU that is missing, as the report's header says. Those in ``thorough`` are not in
    make test."""
    if len(names) > 1 and not GPU:
        names = tuple(name for name in names if name != "cuda")
    marks = {
        "emulated": [pytest.mark.skipif(not EMULATION, reason=NO_EMULATION)],
        "cuda": [pytest.mark.skipif(not GPU, reason=NO_GPU)],
    }
    slow = [pytest.mark.thorough]
    return [pytest.param(name, marks=marks.get(name, []) + (slow if name in thorough else [])) for name in names]


def thorough(*values: Any) -> list[Any]:
    """Parameters that are not in make test."""
    return [pytest.param(value, marks=pytest.mark.thorough) for value in values]


# The emulated kernels of a trajectory take seconds; test_step.py and test_cuda.py compare every step of theirs.
emulated_is_thorough = pytest.mark.parametrize(
    "cpu_or_emulated", parameters("cpu", "emulated", thorough=("emulated",)), indirect=True
)


@functools.cache
def all_names() -> tuple[str, ...]:
    return (*_native.instruction_sets(), "emulated", "cuda")
