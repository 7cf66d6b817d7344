"""``python -m fastnlcg``, and the README's lines of use."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys

import pytest
from fastnlcg import __main__ as main
from fastnlcg import _native, reference


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastnlcg", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_text_and_json(isa: str) -> None:
    done = run()
    assert done.returncode == 0
    assert isa in done.stdout
    assert "self-check   passed" in done.stdout
    facts = json.loads(run("--json").stdout)
    assert facts["cpu"]["architecture"] == platform.machine()
    assert facts["cpu"]["instruction_set"] == isa
    assert facts["self_check"]["passed"]
    assert facts["version"] == _native.version
    cuda = facts["cuda"]
    assert bool(cuda["unavailable_reason"]) == (not cuda["devices"])


def test_a_wrong_instruction_set_is_reported_and_fails() -> None:
    done = run(FASTNLCG_ISA="mmx")
    assert done.returncode == 1
    assert "FASTNLCG_ISA is 'mmx'" in done.stdout


def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(reference, "conjugate_direction", lambda z, beta, d: z + 1.01 * beta * d)
    assert main.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


# ---- lists that stand in several places agree ------------------------------------------------------------------------


def test_options_have_one_set_of_defaults() -> None:
    """Those of the class are those of Options, but for those that only groups have; what else the class takes is no
    option of a step."""
    import inspect

    from fastnlcg import NLCG
    from fastnlcg.options import Options

    found = inspect.signature(NLCG.__init__).parameters.items()
    of_class = {name: p.default for name, p in found if p.default is not inspect.Parameter.empty}
    of_options = {field.name: field.default for field in dataclasses.fields(Options) if field.metadata["native"]}
    assert {name: of_class[name] for name in of_options} == of_options


def test_options_and_scalars_have_one_list() -> None:
    """Python's against the native side's."""
    from fastnlcg import _core, ops
    from fastnlcg.options import PRECONDITIONERS, Options

    assert {*Options().native()} == {*_core.options}
    assert {kind.native for kind in PRECONDITIONERS.values()} == {*_core.preconditioners}
    choices = dataclasses.fields(Options)[0]
    assert choices.name == "update"
    for name in _core.updates:
        Options(update=name, beta_max=0.5)
    assert ops.Scalars._names == (*_core.scalars, "alpha_prev", "updates")


def test_dtypes_have_one_order() -> None:
    from fastnlcg.tensors.checks import DTYPES

    assert tuple(DTYPES.values()) == _native.DTYPES == tuple(_native.ITEMSIZE)
    assert [dtype.itemsize for dtype in DTYPES] == list(_native.ITEMSIZE.values())
