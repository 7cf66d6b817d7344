from __future__ import annotations

import backends
import pytest
from fastnlcg import _native


def pytest_report_header() -> str:
    cuda = "a GPU" if backends.GPU else f"not a GPU ({backends.NO_GPU})"
    emulation = "the emulation of CUDA" if backends.EMULATION else f"not the emulation ({backends.NO_EMULATION})"
    return f"fastnlcg on: {', '.join(_native.instruction_sets())}; {emulation}; {cuda}"


@pytest.fixture(params=backends.parameters(*backends.all_names()))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """Every instruction set this processor has, the emulated GPU, a GPU: one after another."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=backends.parameters(backends.NARROWEST, "emulated", "cuda"))
def lockstep_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """The backends that are compared with the reference. The wider instruction sets are compared with the narrowest, to
    the bit, for every dtype (test_step.py, test_same_bits_however_it_is_run)."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=_native.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has."""
    return backends.use(request.param, monkeypatch).name


@pytest.fixture(params=backends.parameters(*_native.instruction_sets(), "emulated"))
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """The backends whose memory is the CPU's."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=["adam", "bfgs"])
def preconditioner(request: pytest.FixtureRequest) -> str:
    """For ``NLCG(preconditioner=...)``: both that have a diagonal."""
    return request.param


@pytest.fixture(params=backends.parameters("cpu", "emulated"))
def cpu_or_emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=backends.parameters("emulated", "cuda"))
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """The CUDA path, emulated or not."""
    return backends.use(request.param, monkeypatch)
