from __future__ import annotations

import pytest
from fastnlcg import _native

INSTRUCTION_SETS = _native.instruction_sets()


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set this processor has, one after another."""
    monkeypatch.setenv("FASTNLCG_ISA", request.param)
    assert _native.instruction_set() == request.param
    return request.param
