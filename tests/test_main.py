"""``python -m fastnlcg``, and the README's lines of use."""

from __future__ import annotations

import dataclasses
import json
import os
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
    assert facts["cpu"]["instruction_set"] == isa
    assert facts["self_check"]["passed"]
    assert facts["version"] == _native.version
    cuda = facts["cuda"]
    assert cuda["unavailable_reason"]  # the CUDA step does not exist yet


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
    """The class, the function over flat buffers, the reference, and what old checkpoints are completed with."""
    import inspect

    from fastnlcg import NLCG, groups, ops

    def defaults(function: object) -> dict[str, object]:
        found = inspect.signature(function).parameters.items()
        return {name: p.default for name, p in found if p.default is not inspect.Parameter.empty}

    of_class, of_step = defaults(NLCG.__init__), defaults(ops.nlcg_step)
    of_reference = {field.name: field.default for field in dataclasses.fields(reference.Options)}
    for name in {*of_class} & {*of_step}:
        assert of_class[name] == of_step[name], name
    for name in {*of_class} & {*of_reference} - {"preconditioner"}:  # the reference's is the paper's
        assert of_class[name] == of_reference[name], name
    assert {*groups.SHARED} <= {*of_class}
    assert all(of_class[name] == value for name, value in groups.SINCE.items())


def test_scalars_have_one_set_of_names() -> None:
    from fastnlcg import groups, ops

    native = set(_native.Step("float32", 0, None, None, None, None, None, 1).scalars)
    assert {field.name for field in dataclasses.fields(ops.Scalars)} - {"alpha_prev", "beta2_power"} <= native
    assert set(groups.SCALARS) - {"format"} <= native
    assert native - set(groups.SCALARS) == {"gs", "shs", "set", "beta", "ys", "shs_used", "updated"}  # formed again


def test_dtypes_have_one_order() -> None:
    from fastnlcg.parameters import DTYPES

    assert tuple(DTYPES.values()) == _native.DTYPES == tuple(_native.ITEMSIZE)
    assert [dtype.itemsize for dtype in DTYPES] == list(_native.ITEMSIZE.values())
