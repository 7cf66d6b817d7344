from __future__ import annotations

import backends
import pytest
from fastnlcg import _native


@pytest.fixture(params=backends.parameters(*backends.all_names()))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> backends.Backend:
    """Every instruction set this processor has, the emulated GPU, a GPU: one after another."""
    return backends.use(request.param, monkeypatch)


@pytest.fixture(params=_native.instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has."""
    return backends.use(request.param, monkeypatch).name
